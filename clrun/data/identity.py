"""The identity of a data set: names of classes, rows, labels and contents, so that a run knows what it has seen.

It does not depend on where the data lie or on times of files, but on the order of rows, which decides how they are
shuffled. `clrun.data.contents` says how far contents count. It describes the whole data set, whichever part of it a
run learns, so that runs of different lengths and orders can be compared.

The record of run.json, by part ("train", "test", and "val" or None):
    rows: number of rows.
    digest: of names, contents and labels of all rows in order.
    by_class: one text per class id, "NUMBER NAMES CONTENTS": number of rows, and the sums of the digests of their names
        (0 for rows in memory) and of their contents modulo 2^64, which depend neither on the order of the rows nor on
        the class id, and can be added over parts.
and beside them the number of the `rule` by which digests are computed, the `digest` of the whole, `classes` (`count`,
`digest`, and the `names` by class id), and `per_task`, the digest of all rows of each task by task id.
"""

import base64
import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clrun.data.contents import row_digests, tensor_rows
from clrun.data.split import Split
from clrun.data.stream import Dataset, Stream, Task
from clrun.system.checksums import RULE

PARTS = ("train", "test", "val")
KINDS = ("<u8", "<i4")  # of the digests and labels of packed rows
HEX = 12  # digits of a digest in the record
Record = dict[str, Any]
Rows = dict[str, dict[str, str]]
LARGEST = 2**31  # bytes of a column that is unpacked
IN_MEMORY = " in memory"  # end of a text on changed rows that are in no file
CHECKED = 256  # rows in memory that are copied at once


@dataclass(frozen=True)
class Identity:
    """The identity of a data set and of the tasks into which it was cut.

    Attributes:
        record: for run.json; see the head of this module.
        rows: for the checkpoint: by part the `names` of the rows, the digests of their `contents` and their `labels`,
            as texts that `unpacked` reads; {} for rows in memory, which have no names.
    """

    record: Record
    rows: Rows = field(default_factory=dict)


def identify(dataset: Dataset, stream: Stream) -> Identity:
    """Return the identity of a data set.

    Args:
        dataset: as loaded, on the CPU.
        stream: the tasks into which the scenario has cut it, on the CPU.

    Raises:
        ConfigError: a file cannot be read.
    """
    splits = {part: getattr(dataset, part) for part in PARTS}
    record: Record = {"rule": RULE, "digest": "", "classes": _classes(dataset)}
    record |= {part: None if s is None else _part(s, dataset.num_classes) for part, s in splits.items()}
    whole = [record["classes"]["digest"], *(record[part]["digest"] for part in PARTS if record[part])]
    record["digest"] = _digest(" ".join(whole).encode())
    record["per_task"] = {str(task.id): _task_digest(task) for task in stream.tasks}
    rows = {part: found for part, s in splits.items() if s is not None and (found := _named_rows(s))}
    return Identity(record, rows)


def changed_rows(tasks: tuple[Task, ...], position: int) -> list[str]:
    """Return what has changed since the data set was loaded, of the rows that one task has used: one text each.

    Images in files: the names of changed files. Only files of another size or time are read. The test images of all
    tasks up to this one count, because it was evaluated on them.

    Rows in memory, which only code of the run or a defect of the machine can change: how many rows have changed. They
    are digested again; the test rows of the task itself count, and after the last task those of all tasks, so that the
    time is linear in the number of rows.

    Args:
        tasks: of the stream, by position; `remember_rows` has seen them before the first was learned.
        position: of the task.
    """
    task, last = tasks[position], position == len(tasks) - 1
    found: dict[str, None] = {}
    tests = [other.test for other in tasks[: position + 1]]
    for split in (task.train, task.val, *tests):
        if split is not None and not isinstance(split.images, Tensor):
            stored = split.stored_rows()
            found |= dict.fromkeys(stored.changed(_numbers(split)) if stored.stamps is not None else ())
    for part, splits in (
        ("training", [task.train]),
        ("validation", [task.val]),
        ("test", tests if last else tests[-1:]),
    ):
        count = sum(_changed_in_memory(split) for split in splits if split is not None)
        if count:
            found[f"{count} {part} row{'' if count == 1 else 's'}{IN_MEMORY}"] = None
    return list(found)


def _changed_in_memory(split: Split) -> int:
    """Return how many rows of a split have changed since `remember_rows`; 0 for images in files."""
    images = split.images
    if not isinstance(images, Tensor):
        return 0
    rows, changed = _numbers(split), 0
    before = tensor_rows(images).contents[rows]
    for start in range(0, len(rows), CHECKED):
        own = rows[start : start + CHECKED]
        if images.device.type == "cpu" and images.dtype != torch.bfloat16:  # less time than torch's threads need
            part = torch.from_numpy(images.numpy()[own])
        else:
            part = images[torch.from_numpy(own).to(images.device)]
        changed += int((row_digests(part) != before[start : start + CHECKED]).sum())
    return changed


def remember_rows(tasks: tuple[Task, ...]) -> None:
    """Digest the rows in memory of a stream as they are now, for `changed_rows`; the same rows are digested once."""
    for task in tasks:
        for split in (task.train, task.val, task.test):
            if split is not None and isinstance(split.images, Tensor):
                tensor_rows(split.images)


def unpacked(rows: Mapping[str, str]) -> tuple[list[str], list[int], list[int]]:
    """Return names, digests of contents and labels of the rows of a part, from `Identity.rows`.

    Raises:
        ValueError: they are malformed.
    """
    found = []
    for name in ("names", "contents", "labels"):
        try:
            reader = zlib.decompressobj()
            found.append(reader.decompress(base64.b64decode(rows[name]), LARGEST))
        except (KeyError, TypeError, zlib.error) as error:
            raise ValueError(f"its {name} cannot be unpacked") from error
    names = found[0].decode(errors="surrogateescape").split("\0")
    contents, labels = (np.frombuffer(part, dtype=kind).tolist() for part, kind in zip(found[1:], KINDS, strict=True))
    if not len(names) == len(contents) == len(labels):
        raise ValueError("its columns have different lengths")
    return names, contents, labels


def _packed(content: bytes) -> str:
    """Return bytes as a short text."""
    return base64.b64encode(zlib.compress(content, 1)).decode()


def _classes(dataset: Dataset) -> Record:
    """Return the record of the classes."""
    names = list(dataset.class_names)
    return {"count": dataset.num_classes, "digest": _digest("\0".join(names).encode()), "names": names}


def _part(split: Split, num_classes: int) -> Record:
    """Return the record of a part."""
    names, contents, labels = _columns(split)
    order = np.argsort(labels, kind="stable")
    ends = np.searchsorted(labels[order], np.arange(num_classes), side="right").tolist()
    by_class = []
    for start, end in zip([0, *ends], ends, strict=False):
        own = order[start:end]
        by_class.append(f"{end - start} {int(names[own].sum()):016x} {int(contents[own].sum()):016x}")
    return {"rows": len(labels), "digest": _digest(names, contents, labels), "by_class": by_class}


def _task_digest(task: Task) -> str:
    """Return the digest of all rows of a task."""
    splits = [task.train, task.test, *([task.val] if task.val is not None else [])]
    return _digest(*(column for split in splits for column in _columns(split)))


def _columns(split: Split) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return the digests of the names, those of the contents, and the labels of the N rows of a split."""
    stored, rows = split.stored_rows(), _numbers(split)
    return stored.name_digests[rows], stored.contents[rows], split.y.cpu().numpy()


def _numbers(split: Split) -> NDArray[np.int64]:
    """Return which of the stored rows the split has, [N]."""
    rows = torch.arange(len(split)) if split.rows is None else split.rows.cpu()
    found: NDArray[np.int64] = rows.numpy()
    return found


def _named_rows(split: Split) -> dict[str, str] | None:
    """Return names, contents and labels of the rows of a split; None for rows without names."""
    stored, rows = split.stored_rows(), _numbers(split)
    if not stored.names:
        return None
    text = "\0".join(stored.names[row] for row in rows.tolist()).encode(errors="surrogateescape")
    columns = (stored.contents[rows], split.y.cpu().numpy())
    contents, labels = (_packed(column.astype(kind).tobytes()) for column, kind in zip(columns, KINDS, strict=True))
    return {"names": _packed(text), "contents": contents, "labels": labels}


def _digest(*parts: bytes | NDArray[Any]) -> str:
    """Return the first digits of the digest of bytes or arrays."""
    digest = hashlib.blake2b()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:HEX]
