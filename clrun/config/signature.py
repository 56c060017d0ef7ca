"""The callable behind a dotted path, its parameters, and whether a value fits an annotation."""

import importlib
import inspect
from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from clrun.system.errors import ConfigError, Range, did_you_mean, one_line

NODE = "a node with a _target_"
NAMES: dict[Any, str] = {bool: "bool", int: "int", float: "float", str: "str", Path: "str", NoneType: "null"}


def locate(target: str) -> Callable[..., Any]:
    """Import the callable at a dotted path.

    Raises:
        ConfigError: it does not exist, or its module cannot be imported; one line, whatever the module raised.
    """
    module, _, name = target.rpartition(".")
    try:
        owner: Any = importlib.import_module(module)
    except Exception as error:
        within_class = isinstance(error, ModuleNotFoundError) and error.name == module and "." in module
        if not within_class:
            raise ConfigError(f"cannot import '{target}': {one_line(error)}") from error
        owner = locate(module)
    if not hasattr(owner, name):
        raise ConfigError(f"cannot import '{target}': '{module}' has no '{name}'{did_you_mean(name, dir(owner))}")
    found = getattr(owner, name)
    if not callable(found):
        raise ConfigError(f"'{target}' is not callable; name a class or a function")
    return found  # type: ignore[no-any-return]


@cache
def parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters of a callable with evaluated annotations (Any where they cannot be evaluated)."""
    try:
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    except (NameError, TypeError, AttributeError):
        hints = {}
    try:
        found = inspect.signature(target).parameters
    except ValueError:  # some built-in callables have no signature: accept every argument
        found = inspect.signature(lambda *args, **kwargs: None).parameters
    return {name: p.replace(annotation=hints.get(name, Any)) for name, p in found.items()}


def mismatch(value: Any, hint: Any) -> str | None:
    """Return the problem of `value` ("expected float", "must be at least 0"), or None when it fits the annotation.

    Args:
        value: None, bool, int, float, str, or lists and mappings of these; a mapping with a `_target_` stands for the
            object that it will become and fits every annotation except those of plain types.
        hint: an evaluated annotation; plain types, Literal, Union, Annotated with `Range`, and collections of these.
            An int fits a float; a bool, 1.0 and "1" do not fit an int. Every value fits an annotation of another kind.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        ranges = [x for x in args[1:] if isinstance(x, Range)] if isinstance(value, int | float) else []
        return mismatch(value, args[0]) or next((p for p in (r.problem(value) for r in ranges) if p), None)
    if origin in (Union, UnionType):
        return _union_mismatch([mismatch(value, arg) for arg in args])
    if origin is Literal:
        fits = any(value == arg and type(value) is type(arg) for arg in args)
        return None if fits else f"expected one of {', '.join(map(str, args))}"
    kind = origin or hint
    node = isinstance(value, Mapping) and "_target_" in value
    if not inspect.isclass(kind) or kind in (Any, object) or (node and kind not in NAMES):
        return None
    if kind in (list, tuple, set, dict) or (kind.__module__ == "collections.abc" and issubclass(kind, Collection)):
        return _collection_mismatch(value, kind, args)
    accepted = {float: (float, int), Path: (str, Path)}.get(kind, kind)
    fits = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
    if not fits:
        return f"expected {NAMES.get(kind, NODE)}"
    return Range().problem(value) if isinstance(value, float) else None


def _union_mismatch(problems: list[str | None]) -> str | None:
    """Return the problem of a value with a union, given its problem with each member of the union."""
    if None in problems:
        return None
    texts = [p for p in dict.fromkeys(problems) if p]
    right_type = [p for p in texts if not p.startswith("expected")]
    plain = [p.removeprefix("expected ") for p in texts if not p.endswith(NODE)]
    words = plain if set(plain) - {"null"} else [NODE, *plain]
    return right_type[0] if right_type else "expected " + " or ".join(words)


def _collection_mismatch(value: Any, kind: type, args: tuple[Any, ...]) -> str | None:
    """Return the problem of a list or a mapping, or of its first item that does not fit."""
    if issubclass(kind, Mapping):
        if not isinstance(value, Mapping):
            return "expected a mapping"
        items, hints = list(value.values()), list(args[1:]) * len(value)
    else:
        if not isinstance(value, list | tuple):
            return "expected a list"
        fixed = kind is tuple and args and args[-1] is not Ellipsis
        items, hints = list(value), list(args) if fixed else list(args[:1]) * len(value)
    if hints and len(items) != len(hints):
        return f"expected a list of {len(hints)}"
    problems = (mismatch(item, hint) for item, hint in zip(items, hints, strict=False))
    return next((f"in each item {problem}" for problem in problems if problem), None)
