"""Live objects that are given a stored state in place, so that everything that refers to them sees it.

A fit changes the learner, and code of the learner that runs around the fit refers to the same objects: a loss to a
network, a local variable to a parameter. A copy would leave these references behind. Therefore the objects that exist
when a fit begins are numbered (`Anchors`). When its state is stored, each stored object is marked with the number of
the live object that it is (`places`); when the state is restored, the fit begins in the same state, so that the same
numbers name the same objects, and `graft` writes the stored contents into them. Objects that the fit has made are
taken from what is stored. Tensors are written in place unless the fit has replaced them by others.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from enum import Enum
from functools import partial
from pathlib import PurePath
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clrun.data.split import Split
from clrun.data.stream import Stream, Task
from clrun.learning.budget import Budget
from clrun.learning.context import Context
from clrun.system.errors import ConfigError
from clrun.system.hardware import Hardware

# Hooks are set by code that runs again; they are no state.
HOOKS = frozenset(name for name in vars(nn.Module()) if name.endswith("_hooks") or "_hooks_" in name)
NEVER = HOOKS | {"_compiled_call_impl"}
ATOMS = (
    *(type(None), str, bytes, int, float, complex, range, frozenset, type, Enum, PurePath, ModuleType, partial),
    torch.Size,
    *(FunctionType, BuiltinFunctionType, MethodType, torch.dtype, torch.device, torch.layout, torch.memory_format),
)
LEAVES = (Tensor, np.ndarray, torch.Generator)
UNCHANGED = (Context, Stream, Task, Split, Hardware, Budget)  # what the steps of a fit read and never change


class Changed(ConfigError):
    """The live objects are others than those of the stored state."""


def attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object that belong to its state, by name, as its pickle has them."""
    found = getattr(value, "__dict__", None)
    if found is not None:
        found = value.__getstate__()  # without what a class leaves out of its pickles
    if isinstance(found, tuple):  # a class with slots on one without
        found = {name: part for parts in found for name, part in (parts or {}).items()}
    if not isinstance(found, dict):
        slots = (name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ()))
        found = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return {name: found[name] for name in sorted(found) if name not in NEVER}


def children(value: Any) -> Iterable[Any]:
    """Return the objects that `value` refers to, in an order that depends on its state alone."""
    if isinstance(value, LEAVES):
        return ()
    if isinstance(value, dict):
        return [part for item in value.items() for part in item]
    if isinstance(value, list | deque):
        return list(value)
    if isinstance(value, set):
        if walk(tuple(value)):
            raise TypeError(f"a set of {type(next(iter(value))).__name__}")
        return ()
    return attributes(value).values()


def walk(value: Any, *, without: tuple[type, ...] = ()) -> list[Any]:
    """Return the objects with an identity that `value` refers to, each once, in a fixed order; tuples have none.

    Args:
        value: where to begin.
        without: classes whose objects are left out, with all that they alone refer to.

    Raises:
        TypeError: a set contains objects, which have no fixed order.
    """
    nodes: list[Any] = []
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, tuple) and not isinstance(value, torch.Size):
            waiting += reversed(value)
        elif not isinstance(value, (*ATOMS, *without)) and id(value) not in seen:
            seen.add(id(value))
            nodes.append(value)
            waiting += reversed(list(children(value)))
    return nodes


def closures(values: Iterable[Any]) -> list[Any]:
    """Return what objectives, parameters and splits refer to beyond a learner: objects, and cells of functions."""
    found: list[Any] = []
    seen: set[int] = set()
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, FunctionType):
            cells = list(value.__closure__ or ())
            found += cells
            waiting += map(_value, cells)
            waiting += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        elif isinstance(value, MethodType):
            waiting += [value.__self__]
        elif isinstance(value, partial):
            waiting += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, list | tuple):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, Split):
            waiting += [part for name, part in vars(value).items() if name not in ("images", "labels", "rows")]
        elif isinstance(value, Context) or not isinstance(value, (*ATOMS, *UNCHANGED)):
            found.append(value)
    return found


def _version(node: Any) -> int:
    """Return how often a tensor was written in place, as far as torch counts it."""
    return node._version if isinstance(node, Tensor) and not node.is_inference() else 0


def _value(cell: CellType) -> Any:
    """Return what a function's cell contains; None for a variable that has no value yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


class Anchors:
    """The objects that exist when a fit begins, by number.

    Args:
        root: the learner.
        further: what else the fit uses (`closures`).
    """

    def __init__(self, root: Any, further: Iterable[Any]) -> None:
        found = closures(further)
        self.contexts = [value for value in found if isinstance(value, Context)]
        cells = [value for value in found if isinstance(value, CellType)]
        rest = [value for value in found if not isinstance(value, Context | CellType)]
        inner = walk(root)
        own = {id(node) for node in inner}
        outer = [node for node in walk(tuple(rest), without=UNCHANGED) if id(node) not in own]
        nodes = [*inner, *outer, *cells]
        self.inner = len(inner)
        self._place = {id(node): place for place, node in enumerate(nodes)}
        # Tensors are not held: a fit that replaces a large one would need memory for both.
        self._held = [weakref.ref(node) if isinstance(node, Tensor) else node for node in nodes]
        self._versions = [_version(node) for node in nodes]

    def __len__(self) -> int:
        """Return the number of objects."""
        return len(self._held)

    def __getitem__(self, place: int) -> Any:
        """Return an object; None for a tensor that is no longer used."""
        held = self._held[place]
        return held() if isinstance(held, weakref.ref) else held

    def places(self, nodes: Sequence[Any]) -> list[int]:
        """Return the number of each of the objects; -1 for those that did not exist when the fit began."""
        places = [self._place.get(id(node), -1) for node in nodes]
        return [p if p >= 0 and self[p] is node else -1 for p, node in zip(places, nodes, strict=True)]

    def unwritten(self, tensor: Tensor) -> bool:
        """Return whether a tensor was not written in place since the fit began, as far as torch counts it."""
        place = self.places([tensor])[0]
        return place >= 0 and _version(tensor) == self._versions[place]

    def contents(self) -> dict[int, Any]:
        """Return the present contents, by number, of what the learner does not refer to and the fit may have changed.

        These are tensors, generators, and numbers in cells of functions.
        """
        found: dict[int, Any] = {}
        for place in range(self.inner, len(self)):
            node = self[place]
            if isinstance(node, Tensor) and (node.requires_grad or _version(node) != self._versions[place]):
                found[place] = node.detach().cpu()
            elif isinstance(node, torch.Generator):
                found[place] = node.get_state()
            elif isinstance(node, CellType) and isinstance(_value(node), bool | int | float):
                found[place] = node.cell_contents
        return found

    @torch.no_grad()
    def fill(self, contents: dict[int, Any]) -> None:
        """Write back what `contents` returned.

        Raises:
            Changed: the objects are of other kinds.
        """
        for place, value in contents.items():
            node = self[place] if self.inner <= place < len(self) else None
            if isinstance(node, Tensor):
                write_tensor(node, value)
            elif isinstance(node, torch.Generator):
                node.set_state(value)
            elif isinstance(node, CellType):
                node.cell_contents = value
            else:
                raise Changed(f"number {place} is a {type(node).__name__}")


def graft(stored: Any, places: Sequence[int], on_device: Iterable[int], anchors: Anchors, device: str) -> Any:
    """Write a stored state into the live objects; return it with these objects in the places of their copies.

    Args:
        stored: the state; it is taken apart.
        places: of its objects (`walk`), as `Anchors.places` returned them.
        on_device: which of the objects, by their place in the walk, are tensors that were not on the CPU.
        anchors: the live objects.
        device: where tensors that were not on the CPU go.

    Raises:
        Changed: the live objects are others than those of the state.
    """
    nodes = walk(stored)
    if len(nodes) != len(places):
        raise Changed(f"{len(nodes)} objects were read and {len(places)} stored")
    moved = set(on_device)
    target: dict[int, Any] = {}
    for number, (node, place) in enumerate(zip(nodes, places, strict=True)):
        live: Any = node if place < 0 else anchors[place] if place < anchors.inner else None
        if type(live) is not type(node):
            raise Changed(f"object {number} is a {type(live).__name__} and was a {type(node).__name__}")
        if live is node and number in moved:
            node.data = node.data.to(device)
        target[id(node)] = live

    def resolve(value: Any) -> Any:
        if isinstance(value, tuple) and not isinstance(value, torch.Size):
            parts = [resolve(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        return target.get(id(value), value)

    pairs = [(target[id(node)], node) for node in nodes]
    contents = [_content(node, resolve) for _, node in pairs]  # before anything is taken apart
    for (live, node), content in zip(pairs, contents, strict=True):
        _write(live, node, content)
    return resolve(stored)


def _content(node: Any, resolve: Callable[[Any], Any]) -> Any:
    """Return the content of a stored object, with live objects in the places of their copies."""
    if isinstance(node, LEAVES):
        return node
    if isinstance(node, dict):
        return [(resolve(key), resolve(value)) for key, value in node.items()]
    if isinstance(node, list | deque | set):
        return [resolve(value) for value in node]
    return {name: resolve(value) for name, value in attributes(node).items()}


def _write(live: Any, node: Any, content: Any) -> None:
    """Give a live object the content of its stored copy."""
    if isinstance(node, LEAVES):
        if live is not node:
            _write_leaf(live, node)
    elif isinstance(node, dict):
        live.clear()
        for key, value in content:
            live[key] = value
    elif isinstance(node, list | deque | set):
        live.clear()
        (live.update if isinstance(node, set) else live.extend)(content)
    else:
        kept = {*NEVER, *getattr(live, "not_state", ())}
        for name in attributes(live).keys() - content.keys() - kept:
            object.__delattr__(live, name)
        for name in content.keys() - kept:
            if name in getattr(live, "__dict__", ()):  # where a property may have the same name
                live.__dict__[name] = content[name]
            else:
                object.__setattr__(live, name, content[name])


def _write_leaf(live: Any, stored: Any) -> None:
    """Give a live tensor or array the content of its stored copy."""
    if isinstance(live, Tensor):
        write_tensor(live, stored)
        if live.is_leaf and live.requires_grad != stored.requires_grad:
            live.requires_grad_(stored.requires_grad)
    else:
        live[...] = stored


@torch.no_grad()
def write_tensor(live: Tensor, stored: Tensor) -> None:
    """Give a live tensor the content of a stored one, in place where the shape is the same."""
    live.grad = None
    if live.shape == stored.shape and live.dtype == stored.dtype:
        if not torch.equal(live, stored.to(live.device)):  # others are left alone, so that they may share memory
            with torch.inference_mode() if live.is_inference() else nullcontext():
                live.copy_(stored)
    else:
        live.data = stored.data.to(live.device)


@contextmanager
def without_hooks(nodes: Iterable[Any]) -> Iterator[None]:
    """Take the hooks off those of the objects that are modules, within the block."""
    modules = [node for node in nodes if isinstance(node, nn.Module)]
    taken = [(module, name, vars(module)[name]) for module in modules for name in HOOKS & vars(module).keys()]
    taken = [(module, name, hooks) for module, name, hooks in taken if hooks]
    try:
        for module, name, hooks in taken:
            vars(module)[name] = type(hooks)()
        yield
    finally:
        for module, name, hooks in taken:
            vars(module)[name] = hooks
