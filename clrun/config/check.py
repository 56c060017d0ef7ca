"""Checks every node of a configuration against the signature of the class or function that it names.

Importing this module is fast: only `check` imports the targets, and torch with them.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

from clrun.config.groups import GROUPS, OPTIONAL, RESERVED
from clrun.config.kinds import ANY, KINDS, Kind, kind_of, wrong_kind
from clrun.config.signature import locate, mismatch, parameters
from clrun.system.errors import ConfigError, Count, did_you_mean

PLAIN: dict[str, Any] = {"name": str, "seed": Count}
FACTORIES = ("scenario", "task_order", "backbone", "method")  # called during the run, with more arguments


def check(config: Mapping[str, Any], choices: Mapping[str, str]) -> None:
    """Import every target of a resolved configuration and compare the options with its signature.

    For each node with a `_target_`, at any depth, keys, plain types and declared ranges are checked. Data classes that
    need no argument at run time are instantiated, so that `__post_init__` can refuse combinations of options.

    Args:
        config: plain containers, interpolations resolved, without the `hydra` node.
        choices: choice in each configuration group, named in the messages.

    Raises:
        ConfigError: one line per problem.
    """
    problems: list[str] = []
    for key, value in config.items():
        if key in GROUPS:
            problems += _known_problems(key, value, choices.get(key))
        elif key not in PLAIN:
            problems.append(f"{key}: unknown option{did_you_mean(key, (*GROUPS, *PLAIN))}")
        elif wrong := mismatch(value, PLAIN[key]):
            problems.append(f"{key}: {wrong}, got {value!r}")
        elif key == "name" and not re.fullmatch(r"[^./\\\s][^/\\\n]*", value):
            problems.append(
                f"name: must be a valid folder name (not empty, no slash, no leading dot or space), got {value!r}"
            )
    needed = [key for key in GROUPS if key not in OPTIONAL]
    problems += [f"{key}: is missing; set {key}=CHOICE (see clrun list {key})" for key in needed if key not in config]
    problems += [f"{key}: is missing; set {key}=..." for key in PLAIN if key not in config]
    if not problems:
        problems += _setting_problems(config)
    if problems:
        raise ConfigError("\n".join(problems))


_known: dict[tuple[str, str, str | None], list[str]] = {}


def forget() -> None:
    """Check every node again: a class of an interactive session may have been defined anew under the same name."""
    _known.clear()


def _known_problems(group: str, node: Any, choice: str | None) -> list[str]:
    """Return the problems of a top-level node; cached, because the runs of a sweep share most nodes."""
    key = (group, repr(node), choice)
    if key not in _known:
        _known[key] = list(_group_problems(group, node, choice))
    return _known[key]


def _group_problems(group: str, node: Any, choice: str | None) -> Iterator[str]:
    """Yield the problems of a top-level node."""
    if choice and isinstance(node, Mapping) and "_target_" not in node:
        yield f"{group}={choice}: its YAML file has no _target_, which names the class or function"
    elif not isinstance(node, Mapping) or "_target_" not in node:
        yield f"{group}: expected a node with a _target_, got {node!r}; set {group}=CHOICE (see clrun list {group})"
    else:
        yield from _node_problems(node, group, f"{group}={choice}" if choice else group, KINDS[group])


def _setting_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a problem when the method does not support the setting of the scenario."""
    method, setting = locate(config["method"]["_target_"]), config["scenario"].get("setting")
    settings = getattr(method, "settings", None)
    if setting is None or settings is None or setting in settings:
        return
    name, allowed = getattr(method, "__name__", "the method"), ", ".join(sorted(settings))
    why = f"{name} needs the task id at test time; " if getattr(method, "needs_task_id", False) else f"{name}: "
    yield f"{why}scenario.setting={setting} cannot use it ({allowed})"


def _node_problems(node: Mapping[str, Any], path: str, label: str, kind: Kind) -> Iterator[str]:
    """Yield the problems of a node with a `_target_` and of the nodes inside it; `kind` is what its place expects."""
    try:
        target = locate(str(node["_target_"]))
    except ConfigError as error:
        yield f"{path}._target_: {error}"
        return
    if wrong := wrong_kind(target, str(node["_target_"]), kind):
        yield f"{path}._target_: {wrong}"
        return
    options = {key: value for key, value in node.items() if key not in RESERVED}
    partial = bool(node.get("_partial_", False))
    factory = kind.factory or path in FACTORIES
    problems = list(_option_problems(target, options, path, label, partial=partial, factory=factory))
    takes = parameters(target)
    for key, value in options.items():
        expected = kind_of(takes[key].annotation) if key in takes else ANY
        problems += _nested_problems(value, f"{path}.{key}", expected)
    yield from problems or _construction_problems(target, options, path, partial=partial)


def _nested_problems(value: Any, path: str, kind: Kind) -> Iterator[str]:
    """Yield the problems of the nodes with a `_target_` inside a value; `kind` is what the value's option expects.

    In lists and mappings it is what the option expects of each item.
    """
    if isinstance(value, Mapping):
        if "_target_" in value:
            yield from _node_problems(value, path, str(value["_target_"]).rpartition(".")[2], kind)
        else:
            for key, item in value.items():
                yield from _nested_problems(item, f"{path}.{key}", kind)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _nested_problems(item, f"{path}[{i}]", kind)


def _option_problems(
    target: Callable[..., Any], options: Mapping[str, Any], path: str, label: str, *, partial: bool, factory: bool
) -> Iterator[str]:
    """Yield unknown, missing and invalid options; a partial node gets its positional parameters at run time.

    `factory` says whether the place expects a partial node.
    """
    takes = parameters(target)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    for key, value in options.items():
        if key not in takes:
            if not takes_any:
                yield f"{path}.{key}: unknown option of {label}{did_you_mean(key, takes)}"
        elif value == "???":
            yield f"{path}.{key}: needs a value; set {path}.{key}=..."
        elif wrong := mismatch(value, takes[key].annotation):
            yield f"{path}.{key}: {wrong}, got {value!r}"
    for key, parameter in takes.items():
        variadic = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        at_run_time = partial and parameter.kind is not parameter.KEYWORD_ONLY
        if key not in options and parameter.default is parameter.empty and not (variadic or at_run_time):
            own = f"add it to the YAML file, or set +{path}.{key}=..."
            clruns = f"add _partial_: true to the YAML file if clrun is to pass it, or set +{path}.{key}=..."
            if "[" in path:  # an item of a list, to which the command line cannot add a key
                own, clruns = "add it to the node", "add _partial_: true to the node, and clrun passes it"
            positional = factory and not partial and parameter.kind is not parameter.KEYWORD_ONLY
            yield f"{path}.{key}: is missing; {label} needs it: {clruns if positional else own}"


def _construction_problems(
    target: Callable[..., Any], options: Mapping[str, Any], path: str, *, partial: bool
) -> Iterator[str]:
    """Yield the problems that the target itself reports, where instantiating it is cheap."""
    try:
        if is_dataclass(target) and not partial:
            target(**options)
        elif any(base.__name__ == "Optimizer" for base in getattr(target, "__mro__", ())):
            import torch

            optimizer: Any = target([weight := torch.nn.Parameter(torch.zeros(1))], **options)
            weight.grad = torch.ones(1)
            if not hasattr(optimizer, "watch"):
                optimizer.step()  # an optimizer with `watch` also needs statistics of a model
    except ConfigError as error:
        yield str(error)
    except (
        ValueError,
        TypeError,
        RuntimeError,
    ) as error:  # checks of torch itself, such as "Invalid learning rate: -1"
        yield f"{path}: {error}"
