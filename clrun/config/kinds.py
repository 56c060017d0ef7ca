"""What a node of a configuration may name: a class or function of the kind that its place expects.

A configuration is code: what a `_target_` names is imported and called. It is checked before the call, so that a value
that was copied from somewhere (`dataset._target_=shutil.copyfile`) is refused. Functions do not always say what they
return; those of clrun and those that the user has written are accepted without a word about it, those of the standard
library and of installed packages are not.
"""

import functools
import inspect
import re
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from clrun.config.signature import locate

INSTALLED = ("site-packages", "dist-packages")


class Kind(NamedTuple):
    """What a place of the configuration expects.

    Attributes:
        name: dotted name of the class of which the target is a subclass, or which a function returns; None for any.
        words: the same for a message.
        strict: whether every class has to be a subclass of it; else a class of the user's own may be called instead.
        factory: whether the node stands for a function that is called during the run, with more arguments.
    """

    name: str | None
    words: str
    strict: bool = False
    factory: bool = False


KINDS = {
    "dataset": Kind("clrun.data.stream.Dataset", "a function that returns a clrun.data.stream.Dataset"),
    "scenario": Kind("clrun.data.stream.Stream", "a function that returns a clrun.data.stream.Stream"),
    "task_order": Kind("collections.abc.Iterable", "a function that returns a list of task ids"),
    "backbone": Kind("torch.nn.Module", "a torch.nn.Module or a function that returns one", strict=True),
    "method": Kind("clrun.learning.method.Method", "a subclass of clrun.learning.method.Method", strict=True),
    "compress": Kind(
        "clrun.blocks.compress.base.Compressor", "a clrun.blocks.compress.base.Compressor or a subclass", strict=True
    ),
    "budget": Kind("clrun.learning.budget.Budget", "clrun.learning.budget.Budget or a subclass", strict=True),
    "hardware": Kind("clrun.system.hardware.Hardware", "clrun.system.hardware.Hardware or a subclass", strict=True),
    "logger": Kind("clrun.running.loggers.Logger", "a clrun.running.loggers.Logger", strict=True),
    "job": Kind("clrun.config.job.Job", "clrun.config.job.Job or a subclass", strict=True),
}
ANY = Kind(None, "a class or function of clrun or of your own, or a module, optimizer or schedule of torch")
HARMLESS = ("torch.nn.Module", "torch.optim.Optimizer", "torch.optim.lr_scheduler.LRScheduler")


def kind_of(hint: Any) -> Kind:
    """Return what an option with this annotation expects of a node, or of each node in a list or mapping.

    `Callable[..., Optimizer]` is an `Optimizer`.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return next((found for arg in args if (found := kind_of(arg)).name), ANY)
    if origin in (list, dict):
        return kind_of(args[-1])
    factory = origin is not None and getattr(origin, "__name__", "") == "Callable" and bool(args)
    if factory:
        hint = args[-1]
    if not inspect.isclass(hint) or hint.__module__ in ("builtins", "typing", "pathlib") or hint is NoneType:
        return ANY
    name = f"{hint.__module__}.{hint.__qualname__}"
    return Kind(name, f"a {name} or a function that returns one", strict=True, factory=factory)


def wrong_kind(target: Callable[..., Any], name: str, kind: Kind) -> str | None:
    """Return the problem of a target that is not of the kind that its place expects; None when it is.

    Args:
        target: what `name` names.
        name: dotted name in the configuration.
        kind: what the place expects.
    """
    while isinstance(target, functools.partial):
        target = target.func
    own = is_own(target)
    if inspect.isclass(target):
        names = [kind.name] if kind.name else HARMLESS
        fits = (own and not kind.strict) or any(_is_a(target, locate(each)) for each in names)
    elif kind.name is None or (returned := _returned(target)) is None:
        fits = own
    else:
        wanted = locate(kind.name)
        fits = (own or kind.name != "collections.abc.Iterable") and _is_a(returned, wanted)
        fits = fits or (own and _is_a(wanted, returned))
    if fits:
        return None
    return f"'{name}' is not {kind.words}" + ("" if own else "; it was not called")


def is_own(target: Any) -> bool:
    """Return whether a class or function belongs to clrun, to the user, or to a package that needs clrun.

    Everything counts as the user's that is neither in the standard library nor in a folder of installed packages.
    """
    module = getattr(target, "__module__", None) or ""
    top = module.partition(".")[0]
    if not top or (top in sys.stdlib_module_names and top != "__main__"):
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    if top == "clrun" or file is None or not set(INSTALLED) & set(Path(file).parts):
        return True
    return _needs_clrun(top)


@functools.cache
def _needs_clrun(package: str) -> bool:
    """Return whether an installed package declares that it needs clrun.

    Most distributions have the name of their package; the table of all others takes a second to read.
    """
    try:
        needed = metadata.requires(package) or ()
    except metadata.PackageNotFoundError:
        distributions = metadata.packages_distributions().get(package, ())
        needed = [text for name in distributions for text in metadata.requires(name) or ()]
    return any(re.match(r"clrun\b", text) for text in needed)


def _returned(target: Any) -> Any:
    """Return the class that a function says it returns; None when it says nothing that can be compared."""
    try:
        hint = get_type_hints(target).get("return", Any)
    except (NameError, TypeError, AttributeError):
        return None
    found = get_origin(hint) or hint
    return found if inspect.isclass(found) and found is not Any else None


def _is_a(found: Any, wanted: Any) -> bool:
    try:
        return issubclass(found, wanted)
    except TypeError:  # a protocol that cannot be asked
        return False
