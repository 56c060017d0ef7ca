"""Every option of every file in conf/: what its signature excludes is refused, in one line that names the option."""

import copy
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
from running import configuration, member

from clrun.config.check import check
from clrun.config.groups import GROUPS
from clrun.config.signature import locate, parameters
from clrun.system.errors import ConfigError, Range

CONF = Path(__file__).parents[2] / "conf"
EVERY = [file for group in GROUPS for file in sorted((CONF / group).glob("*.yaml"))]
FILES = [file for file in EVERY if "_target_" in member(file)]  # `none` of an optional group has no node
NONSENSE = {"no": ["sense"]}  # fits no option


def options(node: dict[str, Any], *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Path and annotation of every option of a node and of the nodes within."""
    takes = parameters(locate(node["_target_"]))
    for key, value in node.items():
        if not key.startswith("_"):
            yield (*path, key), takes[key].annotation
            if isinstance(value, dict) and "_target_" in value:
                yield from options(value, *path, key)


def just_outside(bounds: Range, kind: type) -> Iterator[Any]:
    """The nearest numbers of a kind that a range excludes."""
    if kind is int:
        below, above = (lambda x: int(x) - 1), (lambda x: int(x) + 1)
    else:
        below, above = (lambda x: math.nextafter(x, -math.inf)), (lambda x: math.nextafter(x, math.inf))
        yield math.nan
    if bounds.minimum is not None:
        yield below(bounds.minimum)
    if bounds.above is not None:
        yield kind(bounds.above)
    if bounds.maximum is not None:
        yield above(bounds.maximum)


def beyond(hint: Any) -> Iterator[Any]:
    """Values just outside the ranges that an annotation declares."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        for bounds in (x for x in args[1:] if isinstance(x, Range)):
            yield from just_outside(bounds, args[0])
    elif origin in (Union, UnionType):
        for arg in args:
            yield from beyond(arg)
    elif origin is list:
        yield from ([value] for value in beyond(args[0]))


@cache
def base() -> tuple[dict[str, Any], dict[str, str]]:
    return configuration()


def lines(group: str, name: str, node: dict[str, Any], path: tuple[str, ...], value: Any) -> list[str]:
    """What is said about an option when it has this value."""
    changed = inner = copy.deepcopy(node)
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    config, choices = base()
    key = ".".join((group, *path))
    try:
        check({**config, group: changed}, {**choices, group: name})
    except ConfigError as error:
        return [line.removeprefix(f"{key}: ") for line in str(error).splitlines() if line.startswith(f"{key}: ")]
    return []


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_option_refuses_what_its_signature_excludes(file):
    group, name = file.parent.name, file.stem
    node = member(file)
    for path, hint in options(node):
        [line] = lines(group, name, node, path, NONSENSE)
        assert line.replace("in each item ", "").startswith("expected "), path
        for value in beyond(hint):
            [line] = lines(group, name, node, path, value)
            assert line.replace("in each item ", "").startswith("must be "), path
            assert line.endswith(f", got {value!r}")
