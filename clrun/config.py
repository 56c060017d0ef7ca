"""Every node of a configuration against the signature of what it names; the options of a run; the configuration's hash.

Importing this module is cheap: only `check` imports the targets, and with them torch.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from clrun.errors import ConfigError, Count, PositiveInt, did_you_mean
from clrun.signature import locate, mismatch, parameters

# Keys that cannot change a result: they name, show, store or speed up a run.
OUTSIDE_HASH = (
    "name",
    "logger",
    "dataset.root",
    "dataset.download",
    "dataset.archive",
    "dataset.images.max_pixels",
    "dataset.images.memory",
    "dataset.images.cache",
    "hardware.workers",
    "job.resume",
    "job.keep_checkpoint",
    "job.progress",
    "job.picture",
    "job.save_model",
    "job.save_predictions",
    "job.feature_cache",
)
GROUPS = ("dataset", "scenario", "task_order", "backbone", "method", "budget", "hardware", "logger", "job")
PLAIN: dict[str, Any] = {"name": str, "seed": Count}
RESERVED = frozenset({"_target_", "_partial_", "_convert_", "_recursive_"})
CANONICAL = json.JSONEncoder(sort_keys=True, default=repr)


@dataclass(frozen=True)
class Job:
    """Limits, evaluation cadence and files of a run.

    Attributes:
        resume: continue from the checkpoint found in the run's folder.
        keep_checkpoint: keep the checkpoint of a completed run.
        progress: bars and lines on the terminal.
        picture: draw accuracy_matrix.png.
        save_model: write the final weights as safetensors.
        save_predictions: write the final prediction of every test sample.
        feature_cache: folder for the features of frozen backbones; true is the default one, false keeps none.
        mode: run; or dry_run, print what the run would do; or preview, draw the data. The latter train nothing.
        eval_initial: evaluate the untrained learner and unseen tasks (domain-incremental only).
        eval_every: optimizer steps between evaluations within a task; null evaluates after tasks only.
        eval_split: rows to evaluate on.
        eval_batch_size: rows of an evaluation batch.
        max_tasks: learn only so many tasks; null learns all.
        max_steps: upper limit of the steps of each fit; null for none.
        max_eval_rows: evaluate at most so many rows of each task; null for all.
        tuning: chooses hyper-parameters task by task (`clrun.tuning`); null learns each task once, as configured.

    Raises:
        ConfigError: options that exclude each other.
    """

    resume: bool
    keep_checkpoint: bool
    progress: bool
    picture: bool
    save_model: bool
    save_predictions: bool
    feature_cache: bool | str
    mode: Literal["run", "dry_run", "preview"]
    eval_initial: bool
    eval_every: PositiveInt | None
    eval_split: Literal["test", "val"]
    eval_batch_size: PositiveInt
    max_tasks: PositiveInt | None
    max_steps: PositiveInt | None
    max_eval_rows: PositiveInt | None
    tuning: Callable[..., Any] | None

    def __post_init__(self) -> None:
        """Check combinations."""
        if self.tuning is not None and self.eval_every is not None:
            raise ConfigError("job.eval_every: evaluates one training of a task, job.tuning does many; set it to null")


@dataclass(frozen=True)
class JobInfo:
    """How a run was started.

    Attributes:
        number: number of the job in its sweep; None for a single run.
        parallel: jobs of the sweep that run at once on this machine.
        choices: chosen member of each configuration group.
        sweep: whether the run belongs to a sweep.
        overrides: command-line overrides of the run, without Hydra's own.
        hydra: Hydra's record of the run: file names and texts for the folder `.hydra`.
    """

    number: int | None
    parallel: int
    choices: dict[str, str]
    sweep: bool
    overrides: list[str]
    hydra: dict[str, str]


def conf_dir() -> Path:
    """Return the folder of clrun's YAML files: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    return next(d for d in (package / "conf", package.parent / "conf") if (d / "config.yaml").is_file())


@cache
def inside_hash(key: str) -> bool:
    """Whether the dotted `key` can change a result."""
    return not any(key == outside or key.startswith(f"{outside}.") for outside in OUTSIDE_HASH)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by dotted key; lists and empty mappings are leaves."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def config_hash(config: Mapping[str, Any]) -> str:
    """Return 16 hex digits that depend on every key inside the hash; 1 and 1.0 are the same."""
    lines = [f"{key}={text}" for key, text in sorted(_texts(config).items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def differing_keys(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys inside the hash whose values differ, or that only one configuration has."""
    texts_a, texts_b = _texts(a), _texts(b)
    return [key for key in sorted(texts_a.keys() | texts_b.keys()) if texts_a.get(key) != texts_b.get(key)]


def _texts(config: Mapping[str, Any]) -> dict[str, str]:
    """Return a canonical text of every leaf inside the hash."""

    def canonical(x: Any) -> Any:
        if isinstance(x, list | tuple):
            return [canonical(item) for item in x]
        if isinstance(x, Mapping):
            return {str(key): canonical(item) for key, item in x.items()}
        return int(x) if isinstance(x, float) and x.is_integer() else x

    leaves = flatten(config).items()
    return {key: CANONICAL.encode(canonical(leaf)) for key, leaf in leaves if inside_hash(key)}


def check(config: Mapping[str, Any], choices: Mapping[str, str]) -> None:
    """Compare a resolved configuration with the signatures of everything it names, and import it.

    Keys, plain types and declared ranges are compared for each node with a `_target_`, at any depth. Data classes that
    need no run-time argument are built once, so that `__post_init__` can refuse combinations.

    Args:
        config: plain containers, interpolations resolved, without the `hydra` node.
        choices: chosen member of each group, for the messages.

    Raises:
        ConfigError: one line for each problem.
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
            problems.append(f"name: must be usable as the name of a folder, got {value!r}")
    problems += [f"{key}: missing; choose one (clrun list {key})" for key in GROUPS if key not in config]
    problems += [f"{key}: missing" for key in PLAIN if key not in config]
    if not problems:
        problems += _setting_problems(config)
    if problems:
        raise ConfigError("\n".join(problems))


_known: dict[tuple[str, str, str | None], list[str]] = {}


def _known_problems(group: str, node: Any, choice: str | None) -> list[str]:
    """Return the problems of a top-level node, looked for once a process: runs of a sweep share most nodes."""
    key = (group, repr(node), choice)
    if key not in _known:
        _known[key] = list(_group_problems(group, node, choice))
    return _known[key]


def _group_problems(group: str, node: Any, choice: str | None) -> Iterator[str]:
    """Yield the problems of a top-level node."""
    if not isinstance(node, Mapping) or "_target_" not in node:
        yield f"{group}: expected a node with a _target_, got {node!r}; choose one (clrun list {group})"
    else:
        yield from _node_problems(node, group, f"{group}={choice}" if choice else group)


def _setting_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the problem of a method that cannot live in the scenario's setting."""
    method, setting = locate(config["method"]["_target_"]), config["scenario"].get("setting")
    settings = getattr(method, "settings", None)
    if setting is None or settings is None or setting in settings:
        return
    name, allowed = getattr(method, "__name__", "the method"), ", ".join(sorted(settings))
    why = f"{name} needs the task id at test time; " if getattr(method, "needs_task_id", False) else f"{name}: "
    yield f"{why}scenario.setting={setting} cannot use it ({allowed})"


def _node_problems(node: Mapping[str, Any], path: str, label: str) -> Iterator[str]:
    """Yield the problems of a node with a `_target_` and of the nodes within."""
    try:
        target = locate(str(node["_target_"]))
    except ConfigError as error:
        yield f"{path}._target_: {error}"
        return
    options = {key: value for key, value in node.items() if key not in RESERVED}
    partial = bool(node.get("_partial_", False))
    problems = list(_option_problems(target, options, path, label, partial=partial))
    for key, value in options.items():
        problems += _nested_problems(value, f"{path}.{key}")
    yield from problems or _construction_problems(target, options, path, partial=partial)


def _nested_problems(value: Any, path: str) -> Iterator[str]:
    """Yield the problems of the nodes with a `_target_` within a value."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            yield from _node_problems(value, path, str(value["_target_"]).rpartition(".")[2])
        else:
            for key, item in value.items():
                yield from _nested_problems(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _nested_problems(item, f"{path}[{i}]")


def _option_problems(
    target: Callable[..., Any], options: Mapping[str, Any], path: str, label: str, *, partial: bool
) -> Iterator[str]:
    """Yield unknown, missing and unfitting options; the positional parameters of a partial node come at run time."""
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
            yield f"{path}.{key}: missing; {label} needs it"


def _construction_problems(
    target: Callable[..., Any], options: Mapping[str, Any], path: str, *, partial: bool
) -> Iterator[str]:
    """Yield what the target itself refuses, where trying costs nothing."""
    try:
        if is_dataclass(target) and not partial:
            target(**options)
        elif any(base.__name__ == "Optimizer" for base in getattr(target, "__mro__", ())):
            import torch

            optimizer: Any = target([weight := torch.nn.Parameter(torch.zeros(1))], **options)
            weight.grad = torch.ones(1)
            if not hasattr(optimizer, "watch"):
                optimizer.step()  # some want more than gradients, or other ones
    except ConfigError as error:
        yield str(error)
    except (ValueError, TypeError, RuntimeError) as error:  # torch's own checks, as "Invalid learning rate: -1"
        yield f"{path}: {error}"
