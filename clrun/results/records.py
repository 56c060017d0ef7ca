"""The files of one run, written so that a kill or a full disk never damages the content that was there before.

Columns of accuracy.csv: `step` (optimizer steps so far), `position` (number of tasks learned at this evaluation; 0 =
untrained), `after` (id of the last learned task; -1 at position 0), `task` (id of the evaluated task), `task_position`
(its position, from 0), `split`, `setting`, `correct` and `total` (numbers of samples), `task_correct` (number of
samples whose predicted class belongs to their task), `nll` (mean negative log-likelihood), `phase` ("end" of a task or
"during" it; with compression also "dense", just before it, and "compressed", between it and its fine-tuning).
"""

import csv
import io
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

import yaml

from clrun.results.metrics import AccuracyMatrix, Row
from clrun.results.schema import SETTINGS, SPLITS, run_problem
from clrun.system.errors import ConfigError, first_line
from clrun.system.files import (
    append_text,
    csv_text,
    json_text,
    make_folder,
    refuse_links,
    replace_text,
    replacing,
)
from clrun.system.locks import folder_locked
from clrun.system.reading import MB, read_json, read_lines, read_regular

SCHEMA = 1
FOLDERS = (".hydra", "logits", "tensorboard")  # folders in the folder of a run
RUN_LIMIT = 256 * MB  # bytes of run.json that are read
ROWS_LIMIT = 512 * MB  # bytes of accuracy.csv that are read
LOG_LIMIT = 256 * MB  # bytes of metrics.jsonl that are read
PREDICTIONS_LIMIT = 512 * MB  # bytes of predictions.csv that are read
BLOCK = 10_000  # lines of accuracy.csv that are held as text at the same time
ALWAYS = 1_000_000  # cells of a matrix that is made for any number of rows
CELLS_PER_ROW = 64  # cells per row of accuracy.csv in a larger matrix; a matrix with all its rows has about 2
COLUMNS = (
    "step",
    "position",
    "after",
    "task",
    "task_position",
    "split",
    "setting",
    "correct",
    "total",
    "task_correct",
    "nll",
    "phase",
)
CELL = ("position", "task_position", "task", "correct", "total")
INTEGERS = ("step", "position", "after", "task", "task_position", "correct", "total", "task_correct")


@dataclass(frozen=True)
class RunFolder:
    """Writes the files of one run. A file that cannot be written raises a `ConfigError` with its path and the reason.

    Attributes:
        path: folder of the run.
    """

    path: Path

    def create(self) -> None:
        """Create the folder and its parents."""
        make_folder(self.path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder and lock it for this process while the block runs (see `clrun.system.locks`).

        Folders that were created for this and are empty at the end are removed, as are temporary files of a run that
        was killed.

        Raises:
            ConfigError: another living process holds the folder; it cannot be written; or a folder of FOLDERS in it, or
                its log or metrics.jsonl, is a symbolic link.
        """
        with folder_locked(self.path, "lock", cleaned=FOLDERS):
            refuse_links(*(self.path / name for name in (*FOLDERS, "clrun.log", "metrics.jsonl")))
            yield

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write config.yaml: the resolved configuration in plain types."""
        text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=120)
        self._replace("config.yaml", text, flush=False)

    def write_run(self, run: Mapping[str, Any]) -> None:
        """Write run.json; the content of an ended run also survives a loss of power."""
        self._replace("run.json", json_text(run, indent=1), flush=run["status"] != "running")

    def read_run(self) -> dict[str, Any] | None:
        """Return the content of run.json; None when there is none.

        Raises:
            ConfigError: the file cannot be read or was not written by this version of clrun.
        """
        return read_run(self.path) if _is_there(self.path / "run.json") else None

    def append_rows(self, rows: Iterable[Row]) -> None:
        """Append rows to accuracy.csv, sorted by (position, task_position, setting); a new file gets a header."""
        path = self.path / "accuracy.csv"
        append_text(path, ("" if _size(path) else _header()) + _lines(rows))

    def write_rows(self, rows: Iterable[Row]) -> None:
        """Replace accuracy.csv; `rows` are in the order in which they were appended."""
        self._replace("accuracy.csv", _header() + csv_text(map(_cells, rows)), flush=False)

    def append_log(self, record: Mapping[str, Any]) -> None:
        """Append one record to metrics.jsonl."""
        append_text(self.path / "metrics.jsonl", json_text(record))

    def truncate_log(self, learned: int) -> None:
        """Cut metrics.jsonl before the first record of the task at position `learned`, or before an incomplete line."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            path.unlink(missing_ok=True)  # a link to a file that does not exist
            return
        kept = []
        for line in read_lines(path, LOG_LIMIT):
            try:
                ended = line.endswith(b"\n") and json.loads(line).get("position", 0) < learned
            except (ValueError, AttributeError, TypeError, RecursionError):  # incomplete, or not of clrun
                break
            if not ended:
                break
            kept.append(line)
        with replacing(path) as file:
            file.write(b"".join(kept))

    def _replace(self, name: str, text: str, *, flush: bool) -> None:
        replace_text(self.path / name, text, flush=flush)


@dataclass(frozen=True)
class RunRecord:
    """The content of a run folder, read without unpickling or importing anything.

    Attributes:
        folder: folder of the run.
        name: `name` of the configuration.
        config: resolved configuration in plain types.
        status: "running", "completed", "failed" or "interrupted", as stored.
        error: the error that ended the run; "" without one.
        choices: choice in each configuration group, e.g. {"method": "er"}.
        seed: seed of the run.
        order: task ids by position; () when the run ended before its stream was built.
        matrices: counts by (split, setting).
        cost: parameters, state bytes and times, as stored.
        versions: versions and device, as stored.
        stored: all of run.json.
        logme: LogME of the frozen features over all training samples; None when not recorded.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    status: str
    error: str
    choices: dict[str, str]
    seed: int
    order: tuple[int, ...]
    matrices: dict[tuple[str, str], AccuracyMatrix]
    cost: dict[str, Any]
    versions: dict[str, Any]
    stored: dict[str, Any]
    logme: float | None

    @classmethod
    def load(cls, run_dir: Path) -> Self:
        """Read run.json and accuracy.csv of `run_dir`.

        Raises:
            ConfigError: a file is damaged, was not written by clrun, or the files contradict each other.
        """
        run = read_run(run_dir)
        order = tuple(run["task_order"] or ())
        path = run_dir / "accuracy.csv"
        matrices = _matrices(path, order) if order and _is_there(path) else {}
        return cls(
            folder=run_dir,
            name=str(run["name"]),
            config=run["config"],
            status=run["status"],
            error=str(run.get("error") or ""),
            choices={str(k): str(v) for k, v in (run.get("choices") or {}).items()},
            seed=run["seed"],
            order=order,
            matrices=matrices,
            cost=run.get("cost") or {},
            versions=run.get("versions") or {},
            stored=run,
            logme=_number((run.get("logme") or {}).get("all")),
        )


def read_run(run_dir: Path) -> dict[str, Any]:
    """Return the content of run.json after checking the types that its readers rely on.

    Raises:
        ConfigError: the file cannot be read or was not written by this version of clrun.
    """
    path = run_dir / "run.json"
    run = read_json(path, remedy="remove it to run again", limit=RUN_LIMIT)
    if not isinstance(run, dict) or run.get("schema") != SCHEMA:
        raise ConfigError(f"{path}: not written by this version of clrun (schema {SCHEMA}); remove it to run again")
    if problem := run_problem(run):
        raise ConfigError(f"{path}: {problem}; remove it to run again")
    return {"name": "", "task_order": None, **run}


def _matrices(path: Path, order: tuple[int, ...]) -> dict[tuple[str, str], AccuracyMatrix]:
    """Return the counts at the ends of tasks in an accuracy.csv by (split, setting).

    A matrix has as many cells as the square of the number of tasks. Beyond `ALWAYS` cells it is made only for a
    proportionate number of rows, so that memory is linear in the size of the file.

    Raises:
        ConfigError: the file cannot be read, has other columns, or contradicts the order.
    """
    try:
        groups = _cells_by_group(path)
        tasks = len(order)
        for (split, setting), cells in groups.items():
            rows = len(cells) // len(CELL)
            if (tasks + 1) * tasks > max(ALWAYS, CELLS_PER_ROW * rows):
                raise ValueError(
                    f"{rows} rows of {split} {setting} are too few for a matrix of {tasks} tasks; read it again when "
                    "more tasks are learned"
                )
        width = len(CELL)
        return {
            key: AccuracyMatrix.from_cells((cells[i : i + width] for i in range(0, len(cells), width)), order=order)
            for key, cells in groups.items()
        }
    except (OSError, ValueError, OverflowError, csv.Error) as error:
        raise ConfigError(f"{path}: cannot be read ({first_line(error)})") from error


def _cells_by_group(path: Path) -> dict[tuple[str, str], "array[int]"]:
    """Return the columns `CELL` of the rows at the ends of tasks, one row after the other, by (split, setting).

    An incomplete last line, which a kill may leave, is left out.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no text, has other columns, or a value of another type.
    """
    data = read_regular(path, ROWS_LIMIT)
    lines = io.TextIOWrapper(io.BytesIO(data[: data.rfind(b"\n") + 1]), encoding="utf-8", newline="")
    reader = csv.reader(lines, strict=True)
    if tuple(next(reader, ())) != COLUMNS:
        raise ValueError("its first line is not the header of accuracy.csv")
    groups: dict[tuple[str, str], array[int]] = {}
    while block := list(islice(reader, BLOCK)):
        for split, setting, phase, *cell in _typed(block):
            if phase == "end":
                groups.setdefault((split, setting), array("q")).extend(cell)
    return groups


def _typed(block: list[list[str]]) -> Iterator[tuple[Any, ...]]:
    """Return (split, setting, phase, *CELL) of each row, after the types of all columns were checked.

    Columns and not rows are converted, because a report reads a million rows.
    """
    texts = dict(zip(COLUMNS, zip(*block, strict=True), strict=True))
    columns: dict[str, Any] = {name: list(map(int, texts[name])) for name in INTEGERS}
    list(map(float, texts["nll"]))
    if unknown := (set(texts["split"]) - set(SPLITS)) | (set(texts["setting"]) - set(SETTINGS)):
        raise ValueError(f"'{min(unknown)[:40]}' is no split and no setting")
    named = ("split", "setting", "phase")
    return zip(*(texts[name] for name in named), *(columns[name] for name in CELL), strict=True)


def _header() -> str:
    return ",".join(COLUMNS) + "\n"


def _lines(rows: Iterable[Row]) -> str:
    return csv_text(map(_cells, sorted(rows, key=lambda row: (row["position"], row["task_position"], row["setting"]))))


def _cells(row: Row) -> list[Any]:
    return [format(row[name], ".9g") if name == "nll" else row[name] for name in COLUMNS]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _is_there(path: Path) -> bool:
    """Return whether something has this name, be it a link to nothing."""
    return os.path.lexists(path)
