"""Run folders, read and reduced to what tables and statistics need."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clrun.reporting.tables import cost_totals
from clrun.results.identity import flatten
from clrun.results.metrics import AccuracyMatrix, Floats, summary
from clrun.results.records import RunRecord
from clrun.system.errors import ConfigError
from clrun.system.files import holder


@dataclass(frozen=True)
class Run:
    """One run, as far as tables and figures need it.

    Attributes:
        folder: its folder.
        label: its folder as shown: relative to the folder that was asked about.
        name: `name` of its configuration.
        status: as stored, but "interrupted" for a running one whose process is dead.
        error: what ended it; "" for nothing.
        method: short name: the choice in the config group, else the last part of the target.
        backbone: likewise.
        dataset: likewise.
        seed: seed of the run.
        order: task ids by position; () when it ended before its stream was built.
        config: flattened configuration.
        metrics: by setting, by name.
        finals: by setting, the final accuracy of each task id; only where every cell is there.
        matrices: by setting, [T, T] accuracies by position, row = after i + 1 tasks; NaN where not evaluated.
        task_names: by task id, as far as stored.
        overrides: of the command line that started the run.
        versions: versions and device, as stored.
        finished: when it ended; "" when unknown.
        parameters: after the last task; None when unknown.
        state_bytes: after the last task; None when unknown.
        train_seconds: of all tasks; None when unknown.
        logme: of the frozen features, over all training rows; None where it is not recorded.
        searched: a search for the worst order chose the order.
    """

    folder: Path
    label: str
    name: str
    status: str
    error: str
    method: str
    backbone: str
    dataset: str
    seed: int
    order: tuple[int, ...]
    config: Mapping[str, object]
    metrics: Mapping[str, Mapping[str, float | None]]
    finals: Mapping[str, Mapping[int, float]]
    matrices: Mapping[str, Floats]
    task_names: Mapping[int, str]
    overrides: tuple[str, ...]
    versions: Mapping[str, object]
    finished: str
    parameters: int | None
    state_bytes: int | None
    train_seconds: float | None
    logme: float | None = None
    searched: bool = False


def run_folders(root: Path) -> Iterator[Path]:
    """Yield every folder at or below `root` that holds a run.json, in sorted order.

    Hidden folders and links are not followed: a link could lead out of `root` or into a circle.
    """
    for path, folders, files in os.walk(root):
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        if "run.json" in files and not (Path(path) / "run.json").is_symlink():
            yield Path(path)


def collect(roots: Sequence[Path]) -> tuple[list[Run], list[tuple[str, str]]]:
    """Read the runs below `roots`, each once.

    Returns:
        The runs, and (folder, reason) of those that cannot be read.
    """
    runs, skipped, seen = [], [], set()
    for root in roots:
        for folder in run_folders(root):
            if (real := folder.resolve()) in seen:
                continue
            seen.add(real)
            label = folder.relative_to(root).as_posix() if len(roots) == 1 else folder.as_posix()
            try:
                runs.append(_reduced(RunRecord.load(folder), label))
            except ConfigError as error:
                skipped.append((label, str(error)))
    return runs, skipped


def _reduced(record: RunRecord, label: str) -> Run:
    config = record.config
    dead = record.status == "running" and holder(record.folder / "lock") is None
    matrices = dict(_evaluated(record))
    parameters, state_bytes, train_seconds = cost_totals(record.cost)
    return Run(
        folder=record.folder,
        label=label,
        name=record.name,
        status="interrupted" if dead else record.status,
        error=record.error,
        method=_choice(record, "method"),
        backbone=_choice(record, "backbone"),
        dataset=_choice(record, "dataset"),
        seed=record.seed,
        order=record.order,
        config=flatten(config),
        metrics={setting: summary(matrix) for setting, matrix in matrices.items()},
        finals={setting: finals for setting, m in matrices.items() if not _lacking(finals := m.final())},
        matrices={setting: matrix.by_position()[1:] for setting, matrix in matrices.items()},
        task_names=dict(zip(record.order, _strings(record, "task_names"), strict=False)),
        overrides=_strings(record, "overrides"),
        versions=record.versions,
        finished=str(record.stored.get("finished") or ""),
        parameters=parameters,
        state_bytes=state_bytes,
        train_seconds=train_seconds,
        logme=record.logme,
        searched=record.choices.get("task_order") == "adversarial",
    )


def _evaluated(record: RunRecord) -> Iterable[tuple[str, AccuracyMatrix]]:
    """Yield (setting, matrix) of the split that the run evaluates on."""
    job = record.config.get("job")
    split = job.get("eval_split", "test") if isinstance(job, dict) else "test"
    return ((setting, matrix) for (name, setting), matrix in record.matrices.items() if name == split)


def _lacking(finals: Mapping[int, float]) -> bool:
    return any(value != value for value in finals.values())


def _strings(record: RunRecord, key: str) -> tuple[str, ...]:
    value = record.stored.get(key)
    return tuple(map(str, value)) if isinstance(value, list) else ()


def _choice(record: RunRecord, group: str) -> str:
    """Return the short name of what was chosen in a config group."""
    if group in record.choices:
        return record.choices[group]
    node: Any = record.config.get(group)
    target = node.get("_target_") if isinstance(node, dict) else None
    return str(target or "").rpartition(".")[2]
