"""Mistakes in classes of methods that are not clrun's own: misspelt hooks, a forgotten `super().__init__`."""

import difflib
import inspect
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from clrun.learning.method import Method
from clrun.system.errors import ConfigError, warn

OTHERS = {"before_task": "begin_task", "after_task": "end_task"}  # their names in other libraries
NEAR = 0.7  # similarity from which on a name counts as a misspelt hook; befor_task and begin_task have 0.7


def warn_of_misspelt_hooks(cls: type[Method]) -> None:
    """Warn of methods of a class that nothing calls and whose names are nearly those of a hook, which is missing then.

    Args:
        cls: the class of the learner.
    """
    for name, hook in misspelt_hooks(cls):
        warn(f"method: nothing calls {cls.__qualname__}.{name}; if it is meant to be the hook '{hook}', rename it")


def misspelt_hooks(cls: type[Method]) -> Iterator[tuple[str, str]]:
    """Yield names that a class defines, and the hook that each of them is probably meant to be.

    A name counts when it is no hook, is public, resembles a hook that has as many parameters and that the class does
    not define itself, and when no function of the class calls it.
    """
    hooks = {name: value for name, value in vars(Method).items() if isinstance(value, FunctionType)}
    for owner in cls.__mro__:
        if owner is Method or not issubclass(owner, Method):
            continue
        own = {name: value for name, value in vars(owner).items() if isinstance(value, FunctionType)}
        called = {called for part in cls.__mro__ for value in vars(part).values() for called in _called(value)}
        for name, function in own.items():
            if name.startswith("_") or hasattr(Method, name) or name in called:
                continue
            missing = [hook for hook in hooks if hook not in own and _count(hooks[hook]) == _count(function)]
            near = [OTHERS[name]] if name in OTHERS else difflib.get_close_matches(name, missing, n=1, cutoff=NEAR)
            yield from ((name, hook) for hook in near if hook in missing)


def _called(value: Any) -> tuple[str, ...]:
    """Return the names that a function, a property or a class method of a class uses."""
    function = getattr(value, "fget", None) or getattr(value, "__func__", value)
    return function.__code__.co_names if isinstance(function, FunctionType) else ()


def _count(function: FunctionType) -> int:
    return len(inspect.signature(function).parameters)


def made_method(factory: Any, *arguments: Any) -> Method:
    """Return what a factory makes of backbone and number of classes.

    Raises:
        ConfigError: the class has not called the constructor of its base.
    """
    try:
        method: Method = factory(*arguments)
        complete = hasattr(method, "backbone") and hasattr(method, "num_classes")
    except AttributeError as error:
        if "before Module.__init__() call" not in str(error):
            raise
        complete = False
    if not complete:
        cls = getattr(factory, "func", factory)
        raise ConfigError(
            f"method: {cls.__qualname__}.__init__ does not call the constructor of its base; begin it with "
            "super().__init__(backbone, num_classes)"
        )
    return method
