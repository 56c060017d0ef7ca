"""Reuse of the frozen backbone that this process built last: the next run of a sweep mostly needs the same one."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

Fact = TypeVar("Fact")


@dataclass
class _Reusable:
    """A frozen backbone.

    Attributes:
        key: identifies what it was built from.
        backbone: it is never trained, so that it stays as it was built.
        facts: properties that were computed for it, by name.
    """

    key: object
    backbone: nn.Module
    facts: dict[str, Any] = field(default_factory=dict)


_last: list[_Reusable] = []  # at most one


def reused_backbone(key: object, build: Callable[[], nn.Module]) -> nn.Module:
    """Return the backbone built last if it has the same `key`, else a new one; for learners that never train it."""
    if not _last or _last[0].key != key:
        _last[:] = [_Reusable(key, build())]
    return _last[0].backbone


def remembered(backbone: nn.Module, name: str, compute: Callable[[], Fact]) -> Fact:
    """Return a property of a backbone whose computation takes a while; computed once for a backbone that is reused."""
    if not _last or _last[0].backbone is not backbone:
        return compute()
    if name not in _last[0].facts:
        _last[0].facts[name] = compute()
    found: Fact = _last[0].facts[name]
    return found
