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
and beside them `digest` of the whole, `classes` (`count`, `digest`, and the `names` by class id), and `per_task`, the
digest of all rows of each task by task id.
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

from clrun.data.contents import StoredRows
from clrun.data.split import Split
from clrun.data.stream import Dataset, Stream, Task

PARTS = ("train", "test", "val")
KINDS = ("<u8", "<i4")  # of the digests and labels of packed rows
HEX = 12  # digits of a digest in the record
Record = dict[str, Any]
Rows = dict[str, dict[str, str]]
LARGEST = 2**31  # bytes of a column that is unpacked


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
    record: Record = {"digest": "", "classes": _classes(dataset)}
    record |= {part: None if s is None else _part(s, dataset.num_classes) for part, s in splits.items()}
    whole = [record["classes"]["digest"], *(record[part]["digest"] for part in PARTS if record[part])]
    record["digest"] = _digest(" ".join(whole).encode())
    record["per_task"] = {str(task.id): _task_digest(task) for task in stream.tasks}
    rows = {part: found for part, s in splits.items() if s is not None and (found := _named_rows(s))}
    return Identity(record, rows)


def changed_files(tasks: tuple[Task, ...], position: int) -> list[str]:
    """Return the names of files that have changed since the data set was loaded, of those that one task has used.

    Args:
        tasks: of the stream, by position.
        position: of the task: its training and validation rows count, and the test rows of all tasks up to it.
    """
    task = tasks[position]
    used = [task.train, *([task.val] if task.val is not None else []), *(t.test for t in tasks[: position + 1])]
    found: dict[str, None] = {}
    for split in used:
        stored = _stored(split)
        if stored is not None and stored.stamps is not None:
            found |= dict.fromkeys(stored.changed(_numbers(split)))
    return list(found)


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


def _stored(split: Split) -> StoredRows | None:
    """Return what identifies the stored rows of a split in files; None for rows in memory."""
    return None if isinstance(split.images, Tensor) else split.stored_rows()


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
