"""The file of a checkpoint inside a task: what its fits have given so far, and the position of the running one.

The format is that of `clrun.running.checkpoint_file` with another mark at the beginning: a header in JSON, every field
of which is verified, and then for each fit the state of each process. Two generations are kept, until the task ends.
"""

import json
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clrun.running.checkpoint_file import (
    HASH,
    PREFIX,
    Damaged,
    Wrong,
    cells_of,
    check_count,
    check_kind,
    check_pair,
    check_text,
    checked_rows,
    generations,
    read_header,
    write_parts,
    wrong_header,
)
from clrun.system.checksums import crc_of
from clrun.system.errors import ConfigError, first_line

SCHEMA = 1
MAGIC = b"clrun inner fits"
FIELDS = {"schema", "config_hash", "learned", "world", "data", "fits"}
AGAIN = "delete checkpoint.task*.pt in its folder to learn the task from its beginning"
OF_FIT = {"number", "name", "finished", "steps", "seconds", "rows", "records", "parts"}


@dataclass
class StoredFit:
    """What is kept of one fit.

    Attributes:
        number: of the fit within its task, from 0.
        name: of the fit.
        finished: whether it is over.
        steps: optimizer steps that it has taken.
        seconds: of its training, over all sessions.
        rows: lines of accuracy.csv that were evaluated while it ran.
        records: lines of metrics.jsonl that it has logged.
        parts: the packed state (`clrun.running.fit_state`) of each process; b"" where only one's own is read.
    """

    number: int
    name: str
    finished: bool = False
    steps: int = 0
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    parts: list[bytes] = field(default_factory=list)


@dataclass(frozen=True)
class TaskFile:
    """The content of the file.

    Attributes:
        config_hash: hash of the configuration.
        learned: tasks finished; the fits are those of the next one.
        data: identity of the data (`clrun.running.data_checks`).
        fits: in the order of their numbers; those that are missing run again. Only the last may be unfinished.
        world: number of processes.
    """

    config_hash: str
    learned: int
    data: dict[str, Any] | None
    fits: list[StoredFit]
    world: int


def write(path: Path, content: TaskFile, *, flush: bool) -> None:
    """Write the file; the one at `path` becomes the generation before it.

    Raises:
        ConfigError: the disk is full or the folder unwritable; one generation at least is left as it was.
    """
    fits = [
        {
            **{name: value for name, value in vars(fit).items() if name in OF_FIT},
            "rows": cells_of(fit.rows),
            "parts": [[len(part), zlib.crc32(part)] for part in fit.parts],
        }
        for fit in content.fits
    ]
    header = {**vars(content), "schema": SCHEMA, "fits": fits}
    write_parts(path, header, [part for fit in content.fits for part in fit.parts], flush=flush, magic=MAGIC)


def latest(path: Path, *, rank: int, main: bool, tasks: int) -> tuple[TaskFile | None, str | None]:
    """Return the newest generation that is intact, and why a newer one is not.

    Args:
        path: the file; it or the generation before it may exist.
        rank: number of the process.
        main: whether the states of all processes are read, because this one writes them.
        tasks: number of tasks of the stream.

    Raises:
        ConfigError: the checksums of a file are right and a field of its header is not; or it cannot be read.
    """
    damage = None
    for file in generations(path):
        try:
            return read(file, rank=rank, main=main, tasks=tasks), damage
        except Damaged as error:
            damage = damage or error.reason
    return None, damage


def read(path: Path, *, rank: int, main: bool, tasks: int) -> TaskFile:
    """Return the content of the file, all of it verified; see `latest`.

    Raises:
        Damaged: a checksum or a length is wrong, or the file is something else.
        ConfigError: see `latest`.
    """
    if not path.is_file():
        raise Damaged(path, "not a regular file")
    try:
        with path.open("rb") as file:
            size, text = os.fstat(file.fileno()).st_size, read_header(path, file, MAGIC)
            try:
                found, sizes = _checked(json.loads(text), tasks)
            except (ValueError, RecursionError, TypeError) as error:
                raise ConfigError(f"{path}: {wrong_header(error)}; {AGAIN}") from None
            if size != PREFIX.size + len(text) + sum(length for fit in sizes for length, _ in fit):
                raise Damaged(path, "it has another length than its header says")
            for fit, lengths in zip(found.fits, sizes, strict=True):
                for number, (length, crc) in enumerate(lengths):
                    wanted = main or number == rank
                    part = file.read(length) if wanted else b""
                    if (zlib.crc32(part) if wanted else crc_of(file, length)) != crc:
                        raise Damaged(path, "its checksum does not match its content")
                    fit.parts.append(part)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({first_line(error)})") from error
    return found


def _checked(content: Any, tasks: int) -> tuple[TaskFile, list[list[tuple[int, int]]]]:
    """Return the content without its states, and their lengths and checksums, after comparing every field.

    Raises:
        Wrong: one is missing, unknown or wrong.
    """
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or content.keys() != FIELDS:
        raise Wrong("schema", content.get("schema") if isinstance(content, dict) else content, str(SCHEMA))
    check_text("config_hash", content["config_hash"], HASH, "a hash")
    check_count("learned", content["learned"], 0, tasks - 1)
    check_count("world", content["world"], 1)
    check_kind("data", content["data"], (dict, type(None)), "a mapping or null")
    check_kind("fits", content["fits"], list, "a list")
    fits, sizes, before = [], [], -1
    for place, entry in enumerate(content["fits"]):
        where = f"fits[{place}]"
        check_kind(where, entry, dict, "a mapping")
        if entry.keys() != OF_FIT:
            raise Wrong(where, sorted(entry), f"a mapping with the keys {', '.join(sorted(OF_FIT))}")
        check_count(f"{where}.number", entry["number"], before + 1)
        before = entry["number"]
        last = place == len(content["fits"]) - 1
        fits.append(_checked_fit(where, entry, content["learned"], tasks, last=last))
        sizes.append(_checked_parts(f"{where}.parts", entry["parts"], content["world"]))
    return TaskFile(content["config_hash"], content["learned"], content["data"], fits, content["world"]), sizes


def _checked_fit(where: str, entry: dict[str, Any], learned: int, tasks: int, *, last: bool) -> StoredFit:
    """Return one fit without its states.

    Raises:
        Wrong: a field is wrong.
    """
    check_kind(f"{where}.name", entry["name"], str, "a text")
    check_count(f"{where}.steps", entry["steps"])
    check_kind(f"{where}.seconds", entry["seconds"], (int, float), "a number")
    if type(entry["finished"]) is not bool or not (entry["finished"] or last):
        raise Wrong(f"{where}.finished", entry["finished"], "true" if not last else "true or false")
    check_kind(f"{where}.records", entry["records"], list, "a list")
    for record in entry["records"]:
        plain = isinstance(record, dict) and all(isinstance(v, str | int | float | None) for v in record.values())
        if not plain:
            raise Wrong(f"{where}.records", record, "mappings of names to numbers and texts")
    rows = checked_rows(entry["rows"], learned, float("inf"), tasks)
    own = {name: entry[name] for name in ("number", "name", "finished", "steps", "seconds", "records")}
    return StoredFit(**own, rows=rows)


def _checked_parts(where: str, parts: Any, world: int) -> list[tuple[int, int]]:
    """Return length and checksum of the state of each process.

    Raises:
        Wrong: one is wrong, or there is another number of them than of processes.
    """
    if not isinstance(parts, list) or len(parts) != world:
        raise Wrong(where, parts, f"a list with one entry per process, of {world}")
    for number, pair in enumerate(parts):
        check_pair(f"{where}[{number}]", pair)
    return [(length, crc) for length, crc in parts]
