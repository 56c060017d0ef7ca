"""Reads run folders and keeps what tables and statistics need."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clrun.reporting.tables import cost_totals, network_bytes
from clrun.results.data_record import data_digest
from clrun.results.identity import with_digests
from clrun.results.metrics import AccuracyMatrix, Floats, summary
from clrun.results.records import CELLS_PER_ROW, RunRecord
from clrun.system.errors import ConfigError, printable
from clrun.system.locks import lock_holder


@dataclass(frozen=True)
class Run:
    """The part of a run's files that tables and figures need.

    Attributes:
        folder: folder of the run.
        label: path of the folder as shown, relative to the folder that the report is about.
        name: `name` of the configuration.
        status: as stored, but "interrupted" for a running one whose process no longer exists.
        error: the error that ended the run; "" without one.
        method: choice in the configuration group, else the last part of the target.
        backbone: likewise.
        dataset: likewise.
        seed: seed of the run.
        order: task ids by position; () when the run ended before its stream was built.
        config: flattened configuration.
        metrics: metrics by setting and name.
        finals: final accuracy of each task id, by setting; only settings in which every task was evaluated.
        matrices: accuracies [T, T] by setting; row i is after i + 1 tasks, a column is a position; NaN = not evaluated.
            A setting in which next to nothing was evaluated is left out.
        task_names: names by task id, as far as stored.
        overrides: overrides of the command line that started the run.
        versions: versions and device, as stored.
        finished: time at which the run ended; "" when unknown.
        parameters: number of parameters after the last task; None when unknown.
        state_bytes: bytes of stored state after the last task; None when unknown.
        train_seconds: training time of all tasks; None when unknown.
        logme: LogME of the frozen features over all training samples; None when not recorded.
        searched: whether a search for the worst order chose the order.
        data: digest of the data that the run has seen; "" when not recorded.
        modules: number of modules at each place after each task, for a method that adds them by need; else ().
        network_bytes: bytes of the backbone, dense and as its last compression stores it; None without compression.
        start: how the run went on from another one, where no uninterrupted run has its result; else "".
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
    data: str = ""
    modules: tuple[Mapping[str, int], ...] = ()
    network_bytes: tuple[int, int] | None = None
    start: str = ""


def run_folders(root: Path) -> Iterator[Path]:
    """Yield every folder at or below `root` that has a run.json, in sorted order.

    Hidden folders are skipped and links are not followed: a link could lead out of `root` or into a circle.
    """
    for path, folders, files in os.walk(root):
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        if "run.json" in files and not (Path(path) / "run.json").is_symlink():
            yield Path(path)


def collect(roots: Sequence[Path]) -> tuple[list[Run], list[tuple[str, str]]]:
    """Read the runs below `roots`, each once.

    Returns:
        The runs, and (folder, reason) for each folder that cannot be read.
    """
    runs, skipped, seen = [], [], set()
    for root in roots:
        for folder in run_folders(root):
            if (real := folder.resolve()) in seen:
                continue
            seen.add(real)
            label = printable(folder.relative_to(root).as_posix() if len(roots) == 1 else folder.as_posix())
            try:
                runs.append(_reduced(RunRecord.load(folder), label))
            except ConfigError as error:
                skipped.append((label, str(error)))
    return runs, skipped


def _reduced(record: RunRecord, label: str) -> Run:
    """Return the part of a record that the report needs."""
    config = record.config
    interrupted = record.status == "running" and lock_holder(record.folder / "lock") is None
    matrices = dict(_evaluated(record))
    filled = {setting: matrix for setting, matrix in matrices.items() if _is_filled(matrix)}
    parameters, state_bytes, train_seconds = cost_totals(record.cost)
    return Run(
        folder=record.folder,
        label=label,
        name=record.name,
        status="interrupted" if interrupted else record.status,
        error=record.error,
        method=_choice(record, "method"),
        backbone=_choice(record, "backbone"),
        dataset=_choice(record, "dataset"),
        seed=record.seed,
        order=record.order,
        config=with_digests(config, record.stored.get("environment") or {}),
        metrics={setting: summary(matrix) for setting, matrix in matrices.items()},
        finals={setting: finals for setting, m in filled.items() if not _has_nan(finals := m.final())},
        matrices={setting: matrix.by_position()[1:] for setting, matrix in filled.items()},
        task_names=dict(zip(record.order, _strings(record, "task_names"), strict=False)),
        overrides=_strings(record, "overrides"),
        versions=record.versions,
        finished=str(record.stored.get("finished") or ""),
        parameters=parameters,
        state_bytes=state_bytes,
        train_seconds=train_seconds,
        logme=record.logme,
        searched=record.choices.get("task_order") == "adversarial",
        data=data_digest(record.stored),
        modules=tuple(task.get("modules") or {} for task in record.cost.get("tasks") or ()),
        network_bytes=network_bytes(record.cost),
        start=_start(record.stored.get("started_from")),
    )


def _evaluated(record: RunRecord) -> Iterable[tuple[str, AccuracyMatrix]]:
    """Yield (setting, accuracy matrix) of the split that the run evaluates on."""
    job = record.config.get("job")
    split = job.get("eval_split", "test") if isinstance(job, dict) else "test"
    return ((setting, matrix) for (name, setting), matrix in record.matrices.items() if name == split)


def _is_filled(matrix: AccuracyMatrix) -> bool:
    """Return whether a proportionate part of the cells was evaluated; a report does not keep other matrices."""
    return bool(np.count_nonzero(~np.isnan(matrix.correct)) * CELLS_PER_ROW >= matrix.correct.size)


def _start(stored: Any) -> str:
    """Return the lengths with which the first tasks of a run were learned that went on from another one."""
    if not stored or stored["identical"]:
        return ""
    old = " ".join(f"{key}={pair[0]}" for key, pair in sorted(stored["changed"].items()) if key != "job.max_tasks")
    return f"{stored['learned']} tasks with {old}"


def _has_nan(finals: Mapping[int, float]) -> bool:
    return any(math.isnan(value) for value in finals.values())


def _strings(record: RunRecord, key: str) -> tuple[str, ...]:
    value = record.stored.get(key)
    return tuple(map(str, value)) if isinstance(value, list) else ()


def _choice(record: RunRecord, group: str) -> str:
    """Return the choice in a configuration group, else the last part of the target."""
    if group in record.choices:
        return record.choices[group]
    node: Any = record.config.get(group)
    target = node.get("_target_") if isinstance(node, dict) else None
    return str(target or "").rpartition(".")[2]
