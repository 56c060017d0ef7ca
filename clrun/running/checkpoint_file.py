"""The file of a checkpoint: a header in JSON, then the pickled methods, with checksums that are verified before use.

The file begins with 16 bytes "clrun checkpoint", the CRC-32 of the header (4 bytes, little-endian) and its length
(8 bytes). The header follows, then the pickled method of each process. The header has the length and CRC-32 of each
of them. Nothing is unpickled here: the header is JSON, and every field of it is compared with its type and range.

Two generations are kept: the file itself and the one that it replaced, `checkpoint.previous.pt`. Writing needs room for
two files: the older generation is removed before a new one is written.
"""

import json
import math
import os
import re
import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

from clrun.results.records import COLUMNS
from clrun.results.schema import EXTRA, START
from clrun.system.checksums import crc_of
from clrun.system.errors import ConfigError, first_line
from clrun.system.files import json_value, replacing, writing

SCHEMA = 2
PREFIX = struct.Struct("<16sIQ")
MAGIC = b"clrun checkpoint"
WORDS = {
    "split": ("test", "val"),
    "setting": ("cil", "dil", "til", "open"),
    "phase": ("during", "dense", "compressed", "end"),
}
DIGEST, HASH = re.compile(r"[0-9a-f]{64}"), re.compile(r"[\x20-\x7e]{0,100}")
LATER = ("data", "start", "predictions")  # fields that files of the same schema may lack
SHOWN = 60  # characters of a wrong value in a message


class Damaged(ConfigError):
    """The file is cut off, its checksum is wrong, or it is no checkpoint: the generation before it may serve.

    Attributes:
        reason: what is wrong with it.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: refused, nothing in it was run ({reason}); {remedy(path)}")
        self.reason = reason


@dataclass(frozen=True)
class Header:
    """The header of a checkpoint.

    Attributes:
        config_hash: hash of the configuration.
        learned: tasks finished.
        steps: optimizer steps so far.
        rows: lines of accuracy.csv. In the file they are lists in the order of `COLUMNS`.
        costs: one entry per finished task.
        referenced: digests of the tensors that are those of the backbone as loaded, by name.
        world: number of processes; each has its own method.
        methods: length and CRC-32 of the pickled method of each process.
        data: identity of the data (`clrun.running.data_checks`), which reads it with care; None in an older file.
        start: the run from which this one went on; None for none.
        predictions: number of bytes and CRC-32 of predictions.csv at that time; None in an older file.
        extra: counts on the data sets of `job.eval_extra`, before the first and after each task; [] for none.
    """

    config_hash: str
    learned: int
    steps: int
    rows: list[dict[str, Any]]
    costs: list[dict[str, Any]]
    referenced: dict[str, str]
    world: int
    methods: list[list[int]]
    data: dict[str, Any] | None = None
    start: dict[str, Any] | None = None
    predictions: list[int] | None = None
    extra: list[dict[str, list[int]]] = field(default_factory=list)


def previous(path: Path) -> Path:
    """Return the path of the generation before the checkpoint at `path`."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def generations(path: Path) -> list[Path]:
    """Return the checkpoints that exist: that at `path` and the one before it, newest first."""
    return [file for file in (path, previous(path)) if file.exists()]


def remove(path: Path) -> None:
    """Remove both generations.

    Raises:
        ConfigError: they cannot be removed.
    """
    with writing(path):
        for file in (previous(path), path):
            file.unlink(missing_ok=True)


def remedy(path: Path) -> str:
    """Return what to do about a checkpoint at `path` that cannot be used."""
    older = previous(path)
    return f"delete it to go on from {older.name}" if older.exists() else "delete it to start the run again"


def write(path: Path, header: dict[str, Any], methods: Sequence[bytes | memoryview], *, flush: bool) -> None:
    """Write a checkpoint; the one at `path` becomes the generation before it.

    Args:
        path: the file.
        header: the fields of `Header` except `world` and `methods`.
        methods: the pickled method of each process.
        flush: wait until the file is on the disk.

    Raises:
        ConfigError: the disk is full or the folder unwritable; one generation at least is left as it was.
    """
    sizes = [[len(data), zlib.crc32(data)] for data in methods]
    content = {**header, "rows": cells_of(header["rows"]), "world": len(methods), "methods": sizes}
    write_parts(path, {"schema": SCHEMA, **content}, methods, flush=flush)


def cells_of(rows: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """Return lines of accuracy.csv as lists in the order of `COLUMNS`."""
    return [[row[name] for name in COLUMNS] for row in rows]


def write_parts(
    path: Path, content: dict[str, Any], parts: Sequence[bytes | memoryview], *, flush: bool, magic: bytes = MAGIC
) -> None:
    """Write a file with a header in JSON, followed by `parts`; the one at `path` becomes the generation before it.

    Raises:
        ConfigError: the disk is full or the folder unwritable; one generation at least is left as it was.
    """
    text = json.dumps(content, separators=(",", ":"), default=json_value).encode()
    with writing(path):
        if path.exists():
            previous(path).unlink(missing_ok=True)
        with replacing(path, flush=flush) as file:
            file.write(PREFIX.pack(magic, zlib.crc32(text), len(text)))
            file.write(text)
            for data in parts:
                file.write(data)
            file.flush()
            if path.exists():  # from here to the rename the generation before is the only one
                os.replace(path, previous(path))


def read(path: Path, *, rank: int = 0, tasks: int | None = None) -> tuple[Header, bytes]:
    """Return the header of a checkpoint and the pickled method of one process, all of the file verified.

    Args:
        path: the file.
        rank: number of the process; the method is empty where the file has fewer.
        tasks: number of tasks of the stream; None where it is unknown.

    Raises:
        Damaged: a checksum or a length is wrong, or the file is something else.
        ConfigError: the checksums are right and a field of the header is not; or the file cannot be read.
    """
    if not path.is_file():
        raise Damaged(path, "not a regular file")
    try:
        with path.open("rb") as file:
            header = _header(path, file, tasks)
            method = b""
            for number, (size, crc) in enumerate(header.methods):
                if number == rank:
                    method = file.read(size)
                if (zlib.crc32(method) if number == rank else crc_of(file, size)) != crc:
                    raise Damaged(path, "its checksum does not match its content")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({first_line(error)})") from error
    return header, method


class Wrong(ValueError):
    """A field has another type or value than it must have."""

    def __init__(self, where: str, value: Any, must: str) -> None:
        text = ascii(value)
        shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
        super().__init__(f"the field {where} of its header is {shown}, and must be {must}")


def _header(path: Path, file: BinaryIO, tasks: int | None) -> Header:
    """Return the header of an open file, which is then positioned at the first method.

    Raises:
        Damaged: see `read`.
        ConfigError: see `read`.
    """
    size = os.fstat(file.fileno()).st_size
    text = read_header(path, file)
    try:
        header = _checked(json.loads(text), tasks)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {wrong_header(error)}; {remedy(path)}") from None
    if size != PREFIX.size + len(text) + sum(part for part, _ in header.methods):
        raise Damaged(path, "it has another length than its header says")
    return header


def wrong_header(error: Exception) -> str:
    """Return what is wrong with a header whose JSON text could not be read, or has a wrong field."""
    return str(error) if isinstance(error, Wrong) else f"its header is not JSON ({first_line(error)})"


def read_header(path: Path, file: BinaryIO, magic: bytes = MAGIC) -> bytes:
    """Return the verified text of the header of an open file, which is then positioned after it.

    Raises:
        Damaged: its checksum is wrong, it is cut off, or the file is something else.
    """
    size, prefix = os.fstat(file.fileno()).st_size, file.read(PREFIX.size)
    if len(prefix) < PREFIX.size or not prefix.startswith(magic):
        raise Damaged(path, "it is not a checkpoint of this version of clrun")
    _, crc, length = PREFIX.unpack(prefix)
    if length > size - PREFIX.size:
        raise Damaged(path, "it is cut off")
    text = file.read(length)
    if zlib.crc32(text) != crc:
        raise Damaged(path, "its checksum does not match its content")
    return text


def _checked(content: Any, tasks: int | None) -> Header:
    """Return the header after comparing every field with its type and range.

    Raises:
        Wrong: one is missing, unknown or wrong.
    """
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise Wrong("schema", content.get("schema") if isinstance(content, dict) else content, str(SCHEMA))
    content = dict.fromkeys(LATER) | {"extra": []} | content
    names = {"schema", *(found.name for found in fields(Header))}
    for name in sorted(names ^ content.keys()):
        raise Wrong(name, content[name], "absent") if name in content else Wrong(name, None, "present")
    check_count("learned", content["learned"], 0, math.inf if tasks is None else tasks)
    for name, low in (("steps", 0), ("world", 1)):
        check_count(name, content[name], low)
    check_text("config_hash", content["config_hash"], HASH, "a hash")
    _check_costs(content["costs"], content["learned"], content["steps"])
    check_kind("referenced", content["referenced"], dict, "a mapping of names to digests")
    for name, digest in content["referenced"].items():
        check_text(f"referenced[{ascii(name)}]", digest, DIGEST, "a digest of 64 hexadecimal digits")
    _check_methods(content["methods"], content["world"])
    for name in ("data", "start"):
        check_kind(name, content[name], (dict, type(None)), "a mapping or null")
    if content["predictions"] is not None:
        check_pair("predictions", content["predictions"])
    if content["start"] is not None and (problem := START(content["start"], "start")):
        raise Wrong("start", content["start"], f"the record of a run ({problem})")
    if content["extra"] and (problem := EXTRA(content["extra"], "extra")):
        raise Wrong("extra", content["extra"], f"counts on data sets ({problem})")
    rows = checked_rows(content["rows"], content["learned"], content["steps"], tasks)
    _check_complete(rows, content["learned"])
    return Header(**{name: content[name] for name in names - {"schema", "rows"}}, rows=rows)


def check_count(where: str, value: Any, low: float = 0, high: float = math.inf) -> None:
    """Check that the field `where` is a whole number within bounds.

    Raises:
        Wrong: it is not.
    """
    if type(value) is not int or not low <= value <= high:
        raise Wrong(where, value, f"a whole number {_range(low, high)}")


def _range(low: float, high: float) -> str:
    return f"from {low:g}" if high == math.inf else f"from {low:g} to {high:g}"


def check_kind(where: str, value: Any, kind: type | tuple[type, ...], must: str) -> None:
    """Check that the field `where` is of a `kind`, in words `must`.

    Raises:
        Wrong: it is not.
    """
    if not isinstance(value, kind) or isinstance(value, bool):
        raise Wrong(where, value, must)


def check_text(where: str, value: Any, pattern: re.Pattern[str], must: str) -> None:
    """Check that the field `where` is a text of a pattern, in words `must`.

    Raises:
        Wrong: it is not.
    """
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise Wrong(where, value, must)


def _check_methods(methods: Any, world: int) -> None:
    """Compare the lengths and checksums of the methods with their types.

    Raises:
        Wrong: one of them is wrong, or there is another number of them than of processes.
    """
    if not isinstance(methods, list) or len(methods) != world:
        raise Wrong("methods", methods, f"a list with one entry per process, of {world}")
    for number, entry in enumerate(methods):
        check_pair(f"methods[{number}]", entry)


def check_pair(where: str, entry: Any) -> None:
    """Check that the field `where` is a list of a length and a checksum.

    Raises:
        Wrong: it is not.
    """
    if not isinstance(entry, list) or len(entry) != 2:
        raise Wrong(where, entry, "a list of a length and a CRC-32")
    for value in entry:
        check_count(where, value)


def _check_costs(costs: Any, learned: int, steps: int) -> None:
    """Compare the costs of the finished tasks with their types.

    Raises:
        Wrong: one is wrong, or there is another number of them than of finished tasks.
    """
    if not isinstance(costs, list) or len(costs) != learned:
        raise Wrong("costs", costs, f"a list with one entry per finished task, of {learned}")
    before = 0
    for number, cost in enumerate(costs):
        where = f"costs[{number}]"
        check_kind(where, cost, dict, "a mapping")
        check_count(f"{where}.task", cost.get("task"))
        check_count(f"{where}.position", cost.get("position"), number, number)
        check_count(f"{where}.steps", cost.get("steps"), before, steps)
        before = cost["steps"]
        for name in ("train_seconds", "eval_seconds"):
            check_kind(f"{where}.{name}", cost.get(name), (int, float), "a number")
        for name in ("images", "peak_memory_bytes"):
            check_count(f"{where}.{name}", cost.get(name))
        for name in ("parameters", "state_bytes"):
            check_kind(f"{where}.{name}", cost.get(name), dict, "a mapping")
    if learned and before != steps:
        raise Wrong("steps", steps, f"{before}, as the last of the costs says")


def checked_rows(cells: Any, learned: int, steps: float, tasks: int | None) -> list[dict[str, Any]]:
    """Return the rows of accuracy.csv after comparing every cell with its type and range.

    Raises:
        Wrong: a cell is wrong.
    """
    check_kind("rows", cells, list, "a list")
    for number, row in enumerate(cells):
        if not isinstance(row, list) or len(row) != len(COLUMNS):
            raise Wrong(f"rows[{number}]", row, f"a list of {len(COLUMNS)} values")
    last = math.inf if tasks is None else tasks - 1
    bounds: dict[str, tuple[float, float]] = {"step": (0, steps), "position": (0, learned), "after": (-1, math.inf)}
    bounds |= {"task_position": (0, last), **{name: (0, math.inf) for name in ("task", "correct", "total")}}
    bounds |= {"task_correct": (0, math.inf)}
    for name, column in zip(COLUMNS, zip(*cells, strict=True), strict=False):
        for number, value in enumerate(column):
            if name in bounds:
                check_count(f"rows[{number}].{name}", value, *bounds[name])
            elif name == "nll":
                check_kind(f"rows[{number}].{name}", value, float, "a number")
            elif value not in WORDS[name]:
                raise Wrong(f"rows[{number}].{name}", value, " or ".join(WORDS[name]))
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in cells]
    for number, row in enumerate(rows):
        if max(row["correct"], row["task_correct"]) > row["total"]:
            raise Wrong(f"rows[{number}].correct", row["correct"], f"at most {row['total']}, the number of samples")
    return rows


def _check_complete(rows: list[dict[str, Any]], learned: int) -> None:
    """Raise unless every finished task was followed by one evaluation of each task so far, in every setting."""
    ends = [row for row in rows if row["phase"] == "end" and row["position"]]
    found = Counter((row["position"], row["task_position"]) for row in ends)
    settings = len({row["setting"] for row in ends})
    for position in range(1, learned + 1):
        for task in range(position):
            if found[position, task] != max(1, settings):
                raise Wrong(
                    "rows", f"{len(rows)} rows", f"those of {learned} finished tasks (see ({position}, {task}))"
                )
