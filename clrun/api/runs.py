"""One run: start it, or read its folder."""

import io
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clrun.api.overrides import Overrides, as_arguments, text_of
from clrun.api.process import borrowed
from clrun.reporting.collect import run_folders
from clrun.reporting.tables import cost_totals
from clrun.results.metrics import METRICS, AccuracyMatrix, summary
from clrun.results.records import LOG_LIMIT, PREDICTIONS_LIMIT, RunRecord
from clrun.system import libraries
from clrun.system.errors import ConfigError, first_line
from clrun.system.locks import lock_holder
from clrun.system.reading import read_regular

if TYPE_CHECKING:
    import pandas as pd

    from clrun.api.learner import Learner

Metrics = dict[str, float | None]


@dataclass(frozen=True)
class TaskInfo:
    """One task of a run.

    Attributes:
        position: in the order learned, from 0.
        id: identity, the same in every order.
        name: short text, as in tables.
        classes: class ids.
    """

    position: int
    id: int
    name: str
    classes: tuple[int, ...]


@dataclass(frozen=True)
class Cost:
    """What a run has cost.

    Attributes:
        train_seconds: of all tasks, without evaluations; None when unknown.
        eval_seconds: of all evaluations at the ends of tasks; None when unknown.
        parameters: after the last task; None when unknown.
        trainable: parameters that training moved in the last task; None when unknown.
        state_bytes: everything the method keeps after the last task; None when unknown.
        flops_per_image: of one forward pass of one row: an image, or a text as long as the run's; None when unknown.
        tasks: one mapping per learned task, as in run.json.
    """

    train_seconds: float | None
    eval_seconds: float | None
    parameters: int | None
    trainable: int | None
    state_bytes: int | None
    flops_per_image: int | None
    tasks: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Run:
    """The results of one run, read from the files in its folder.

    `load(run.folder)` reads them again. Accuracies are fractions. A `setting` is "til", "cil" or "dil"; by default that
    of the run's scenario.

    Attributes:
        folder: where its files are.
        name: label of the run.
        status: "completed", "running", "failed", or "interrupted" when its process is gone.
        error: what ended it; "" for nothing.
        setting: that of the scenario.
        seed: seed of the run.
        config: resolved configuration, nested mappings of plain values.
        overrides: of the command line, as the run was started.
        tasks: in the order learned; () when the run ended before its stream was built.
        cost: seconds, parameters and bytes.
        versions: of Python, torch and clrun, and the device.
        notes: what a reader of its numbers should know.
    """

    folder: Path
    name: str
    status: str
    error: str
    setting: str
    seed: int
    config: Mapping[str, Any] = field(repr=False)
    overrides: tuple[str, ...] = field(repr=False)
    tasks: tuple[TaskInfo, ...] = field(repr=False)
    cost: Cost = field(repr=False)
    versions: Mapping[str, Any] = field(repr=False)
    notes: tuple[str, ...] = field(repr=False)
    _matrices: Mapping[str, AccuracyMatrix] = field(repr=False)
    _trusted: bool = field(default=False, repr=False)

    @property
    def order(self) -> tuple[int, ...]:
        """Task ids by position."""
        return tuple(task.id for task in self.tasks)

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings in which it was evaluated."""
        return tuple(sorted(self._matrices))

    def matrix(self, setting: str | None = None) -> AccuracyMatrix:
        """Return the counts behind the accuracies, `correct` [T + 1, T] and `total` [T].

        Raises:
            ConfigError: the run was not evaluated in this setting.
        """
        name = setting or self.setting
        if name not in self._matrices:
            known = ", ".join(self.settings) or f"nothing yet, its status is {self.status}"
            raise ConfigError(f"{self.folder}: no accuracies in the setting '{name}' (measured: {known})")
        return self._matrices[name]

    def accuracy(self, setting: str | None = None) -> "pd.DataFrame":
        """Return the accuracy matrix as a frame.

        A row is the state after a task was learned, by name and in the order learned; a column is the task that was
        evaluated. NaN was not evaluated. The untrained state is the first row, "(untrained)", where it was evaluated.

        Raises:
            ConfigError: the run was not evaluated in this setting, or pandas is not installed.
        """
        values, names = self.matrix(setting).by_position(), self._names()
        frame = _frame(values, index=["(untrained)", *names], columns=names)
        frame = frame.rename_axis(index="learned", columns="task")
        return frame if frame.iloc[0].notna().any() else frame.iloc[1:]

    @cached_property
    def metrics(self) -> dict[str, Metrics]:
        """The metrics by setting and name, as run.json has them; None where an accuracy that they need is missing."""
        return {setting: summary(matrix) for setting, matrix in sorted(self._matrices.items())}

    def metrics_frame(self) -> "pd.DataFrame":
        """Return the metrics, one row per setting."""
        rows = [list(values.values()) for values in self.metrics.values()]
        frame = _frame(rows, index=list(self.metrics), columns=list(METRICS)).astype(float)
        return frame.rename_axis(index="setting", columns="metric")

    def cost_frame(self) -> "pd.DataFrame":
        """Return steps, seconds, parameters and bytes of each learned task, one row per task in the order learned."""
        names = dict(zip(self.order, self._names(), strict=True))
        rows = [{"name": names.get(task.get("task", -1), ""), **_flat(task)} for task in self.cost.tasks]
        return _frame(rows)

    def training_log(self) -> "pd.DataFrame":
        """Return metrics.jsonl, one row per record of training: losses, penalties, learning rates.

        Raises:
            ConfigError: a line of the file cannot be read.
        """
        path = self.folder / "metrics.jsonl"
        if not os.path.lexists(path):
            return _frame([])
        try:
            records = [json.loads(line) for line in read_regular(path, LOG_LIMIT).splitlines()]
            if not all(isinstance(record, dict) for record in records):
                raise ValueError("a line is no record")
            return _frame(records)
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: cannot be read ({first_line(error)})") from error

    def predictions(self) -> "pd.DataFrame":
        """Return predictions.csv: task, row, label and the predicted class in each setting of every test row.

        Raises:
            ConfigError: the run did not save them, or the file cannot be read.
        """
        path = self.folder / "predictions.csv"
        if not os.path.lexists(path):
            raise ConfigError(f"{self.folder}: predictions were not saved; the run needs job.save_predictions")
        try:
            text = io.BytesIO(read_regular(path, PREDICTIONS_LIMIT))
            frame: pd.DataFrame = libraries.load("pandas").read_csv(text)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read ({first_line(error)})") from error
        return frame

    def learner(self, *, device: str | None = None, trust: str | Collection[str] = ()) -> "Learner":
        """Return the trained method, ready to predict.

        It is read from checkpoint.pt (`run` keeps it; the command line does so with job.keep_checkpoint=true), else
        from model.safetensors (job.save_model=true). Data set and backbone are built again, hence both must be there.
        The classes must be those of the run; when other things of the data have changed since, a warning says what.
        No code in the files is run; classes and functions that the configuration names and that are not clrun's own
        are refused unless trusted, or the run was started by this process.

        Args:
            device: "cpu", "cuda", "cuda:1"; None is the run's `hardware.device`.
            trust: name or names of modules that the run's configuration may name, as ["my_package"].

        Raises:
            ConfigError: the folder holds no trained method, it cannot be restored here, or a part is not trusted.
        """
        from clrun.api.learner import learner_of

        names = (trust,) if isinstance(trust, str) else tuple(trust)
        return learner_of(self.folder, self.config, device=device, trust=None if self._trusted else names)

    def _names(self) -> list[str]:
        """Return the names of the tasks by position, with the id where two are called the same."""
        names = [task.name for task in self.tasks]
        return [t.name if names.count(t.name) == 1 else f"{t.name} ({t.id})" for t in self.tasks]


def run(
    overrides: Overrides = (),
    *,
    folder: str | Path | None = None,
    progress: bool | None = None,
    keep_learner: bool = True,
    config_dir: str | Path | None = None,
    config_name: str | None = None,
    **options: Any,
) -> Run:
    """Run one configuration, or continue what is in its folder, and return the results.

    Args:
        overrides: as on the command line: a list ["method=er", "seed=1"], one text "method=er seed=1", or a mapping
            {"method": "er", "method.capacity": 200, "budget": {"epochs": 2}}.
        folder: where the files go; None chooses a new one below outputs/, as the command line does.
        progress: print the accuracies after each task; None is as configured (`job.progress`, true by default).
        keep_learner: keep checkpoint.pt, so that `Run.learner` works; False is as configured.
        config_dir: a folder of your own YAML files, as --config-dir.
        config_name: another main configuration file, as --config-name.
        options: further keys and values, as run(method="er", seed=1, budget={"epochs": 2}).

    Raises:
        ConfigError: a mistake in the configuration or the data, in the words of the command line.
        NumericalError: the loss became NaN or infinite.
        KeyboardInterrupt: the run was interrupted; the same call with its folder continues it.
    """
    arguments = as_arguments(overrides, options)
    arguments += settings_of(arguments, {"hydra.run.dir": folder, "job.progress": progress})
    if keep_learner and not _given(arguments, "job.keep_checkpoint"):
        arguments.append("job.keep_checkpoint=true")
    found = start(arguments, sweep=False, config_dir=config_dir, config_name=config_name, progress=progress)[0]
    return _load(found, trusted=True)


def load(folder: str | Path) -> Run:
    """Return the results in the folder of a run, whatever its status; nothing but text is read.

    Raises:
        ConfigError: there is no such folder, it holds no run, or its files are damaged or not clrun's.
    """
    return _load(Path(folder), trusted=False)


def _load(folder: Path, *, trusted: bool) -> Run:
    """Return the run in a folder; the configuration of a trusted one comes from this process."""
    if not folder.is_dir():
        raise ConfigError(f"load: no such folder: {folder}")
    if not os.path.lexists(folder / "run.json"):
        below = list(run_folders(folder))
        advice = f"; load_sweep reads the {len(below)} below it" if below else ""
        raise ConfigError(f"load: no run (run.json) in {folder}{advice}")
    record = RunRecord.load(folder)
    stored, job = record.stored, record.config.get("job")
    split = job.get("eval_split", "test") if isinstance(job, dict) else "test"
    scenario = record.config.get("scenario")
    configured = scenario.get("setting") if isinstance(scenario, dict) else None
    dead = record.status == "running" and lock_holder(folder / "lock") is None
    return Run(
        folder=folder,
        name=record.name,
        status="interrupted" if dead else record.status,
        error=record.error,
        setting=str(stored.get("setting") or configured or ""),
        seed=record.seed,
        config=record.config,
        overrides=_texts(stored.get("overrides")),
        tasks=_tasks(record),
        cost=_cost(record.cost),
        versions=record.versions,
        notes=_texts(stored.get("notes")),
        _matrices={setting: matrix for (part, setting), matrix in record.matrices.items() if part == split},
        _trusted=trusted,
    )


def start(
    arguments: Sequence[str],
    *,
    sweep: bool,
    config_dir: str | Path | None,
    config_name: str | None,
    progress: bool | None,
) -> tuple[Path, tuple[str, ...]]:
    """Start what the arguments ask for; return its folder and one line for each failed job of a sweep.

    Raises:
        ConfigError: a mistake of the user; or the arguments ask for the other kind of start, or for no run at all.
    """
    with borrowed():
        from clrun.config.check import forget
        from clrun.config.compose import Composer
        from clrun.running.jobs import run as start_jobs

        forget()  # a class of a notebook may have been defined anew
        place = None if config_dir is None else str(config_dir)
        show: Callable[[str], None] = (lambda text: None) if progress is False else print
        with Composer.of(config_path=None, config_name=config_name, config_dir=place) as composer:
            _check_kind(composer.compose(arguments, sweep=sweep), sweep=sweep)
            outcome = start_jobs(composer, arguments, sweep=sweep, show=show)
    return outcome.folder, outcome.failed


def _check_kind(cfg: Any, *, sweep: bool) -> None:
    """Refuse a sweep where one run is asked for, and modes that leave no run.

    Raises:
        ConfigError: see above.
    """
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    if not sweep and cfg.hydra.mode == RunMode.MULTIRUN:
        raise ConfigError("hydra.mode: the configuration is a sweep; call sweep(...) instead of run(...)")
    if (mode := OmegaConf.select(cfg, "job.mode")) not in ("run", None):
        raise ConfigError(f"job.mode={mode}: trains nothing and leaves no results to return; use the command clrun")
    target = OmegaConf.select(cfg, "task_order._target_")
    if not sweep and target == "clrun.data.order_search.adversarial":
        raise ConfigError("task_order=adversarial: a search is many runs; call sweep(...) instead of run(...)")


def settings_of(arguments: Sequence[str], values: Mapping[str, Any]) -> list[str]:
    """Return overrides for the values that are not None.

    Raises:
        ConfigError: the arguments set one of these keys, too.
    """
    found = []
    for key, value in values.items():
        if value is None:
            continue
        if _given(arguments, key):
            raise ConfigError(f"{key}: given as an override and as a parameter; leave out one of them")
        found.append(f"{key}={text_of(value, key)}")
    return found


def _given(arguments: Sequence[str], key: str) -> bool:
    return any(argument.lstrip("+").partition("=")[0] == key for argument in arguments)


def _frame(data: Any, **options: Any) -> "pd.DataFrame":
    frame: pd.DataFrame = libraries.load("pandas").DataFrame(data, **options)
    return frame


def _flat(task: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of a task's cost: parameters by kind, bytes in total, no record of a search."""
    flat: dict[str, Any] = {}
    for key, value in task.items():
        if key == "parameters":
            flat |= {f"{key}_{kind}": number for kind, number in value.items()}
        elif key == "state_bytes":
            flat[key] = value.get("total")
        elif not isinstance(value, Mapping):
            flat[key] = value
    return flat


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else ()


def _tasks(record: RunRecord) -> tuple[TaskInfo, ...]:
    names, classes = _texts(record.stored.get("task_names")), record.stored.get("task_classes")
    groups = classes if isinstance(classes, list) else []
    return tuple(
        TaskInfo(
            position,
            task,
            names[position] if position < len(names) else str(task),
            tuple(groups[position]) if position < len(groups) else (),
        )
        for position, task in enumerate(record.order)
    )


def _cost(stored: Mapping[str, Any]) -> Cost:
    tasks = tuple(stored.get("tasks") or ())
    parameters, state_bytes, train_seconds = cost_totals(stored)
    moved = tasks[-1].get("parameters") if tasks else None
    return Cost(
        train_seconds=train_seconds,
        eval_seconds=stored.get("eval_seconds"),
        parameters=parameters,
        trainable=(moved or {}).get("trainable"),
        state_bytes=state_bytes,
        flops_per_image=stored.get("flops_per_image"),
        tasks=tasks,
    )
