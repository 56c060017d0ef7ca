"""The frozen backbone that this process built last, kept for the next run of a sweep."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

Fact = TypeVar("Fact")


@dataclass
class _Kept:
    """The frozen backbone that this process built last: the next run of a sweep most often wants the same.

    Attributes:
        key: what it was built from.
        backbone: never trained, hence as it was built.
        facts: what was found out about it.
    """

    key: str
    backbone: nn.Module
    facts: dict[str, Any] = field(default_factory=dict)


_kept: list[_Kept] = []  # at most one


def reuse(key: str, build: Callable[[], nn.Module]) -> nn.Module:
    """Return the backbone that was built from the same `key` last, else a new one, for a learner that freezes it."""
    if not _kept or _kept[0].key != key:
        _kept[:] = [_Kept(key, build())]
    return _kept[0].backbone


def fact(backbone: nn.Module, name: str, find_out: Callable[[], Fact]) -> Fact:
    """Return something about a backbone that may take a while to find out, once for one that is reused."""
    if not _kept or _kept[0].backbone is not backbone:
        return find_out()
    if name not in _kept[0].facts:
        _kept[0].facts[name] = find_out()
    found: Fact = _kept[0].facts[name]
    return found
