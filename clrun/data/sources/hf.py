"""Image data sets of the Hugging Face Hub, or of a folder that its library reads. Their own code is never run."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clrun.data.contents import Digests, StoredRows, bytes_digest, file_digest
from clrun.data.images import FileImages, ImageSplit
from clrun.data.reading.assemble import assemble
from clrun.data.reading.class_names import distinct, match
from clrun.data.reading.hub import hub_tables, label_column, listed, pick
from clrun.data.reading.image_files import PARTS, check_classes, renumbered, usable, with_note
from clrun.data.reading.listing import in_test
from clrun.data.reading.options import OwnReading, loader, user_path
from clrun.data.reading.text import printable
from clrun.data.stream import Dataset
from clrun.system import libraries
from clrun.system.errors import ConfigError

BATCH = 1000  # rows that are read at once for their digests


_digests: dict[str, Digests] = {}  # by table and column


@dataclass(frozen=True)
class HubFiles:
    """Encoded images in a column of a table.

    Attributes:
        table: a split of `datasets`, its images not decoded.
        column: name of the column.
        title: name of the table in messages.
        rows: row numbers in the table.
    """

    table: Any
    column: str
    title: str
    rows: tuple[int, ...]

    @property
    def place(self) -> str:
        """The table."""
        return self.title

    def __len__(self) -> int:
        """Return the number of images M."""
        return len(self.rows)

    def name(self, row: int) -> str:
        """Return the table and the number of the row there."""
        return f"{self.title}, row {self.rows[row]}"

    def content(self, row: int) -> Path | bytes:
        """Return the path or the content of an image."""
        cell = self.table[self.rows[row]][self.column]
        if cell is None:
            raise ConfigError(f"{self.name(row)}: there is no image; remove the row")
        return Path(cell["path"]) if cell["bytes"] is None else bytes(cell["bytes"])

    def stamp(self, row: int) -> tuple[int, int]:
        """Return 0 for the size, and a digest of the table in place of the time."""
        return 0, int.from_bytes(hashlib.sha256(self.table._fingerprint.encode()).digest()[:7])

    def stored_rows(self) -> StoredRows:
        """Return row numbers and digests of the encoded images.

        Raises:
            ConfigError: a file that the table names cannot be read.
        """
        every = _cell_digests(self.table, self.column)
        names = tuple(f"row {row}" for row in self.rows)
        return StoredRows(names, every[np.array(self.rows, dtype=np.int64)])


def _cell_digests(table: Any, column: str) -> Digests:
    """Return the digest [N] of the encoded image in each row of a table; computed once per process and table."""
    key = f"{table._fingerprint} {column}"
    if key not in _digests:
        found: list[int] = []
        for batch in table.select_columns([column]).with_format("arrow").iter(batch_size=BATCH):
            for cells in batch.column(column).chunks:
                paths = cells.field("path").to_pylist()
                for content, path in zip(cells.field("bytes"), paths, strict=True):
                    buffer = content.as_buffer() if content.is_valid else None
                    found.append(_cell_digest(buffer, path))
        _digests[key] = np.array(found, dtype=np.uint64)
    return _digests[key]


def _cell_digest(content: Any, path: str | None) -> int:
    """Return the digest of an image given as an Arrow buffer or by its path; 0 for an empty cell."""
    if content is not None:
        return bytes_digest(memoryview(content))
    return file_digest(path) if path else 0


@loader
def hf(
    reading: OwnReading,
    *,
    path: str,
    config: str | None,
    revision: str | None,
    train: str,
    test: str | None,
    val: str | None,
    image: str | None,
    label: str | None,
) -> Dataset:
    """Return an image data set that the library `datasets` reads.

    Classes of the splits are matched by name. A split whose classes are numbers without names has those of the training
    split.

    Args:
        reading: the common options; the hash of a row's number decides whether it is a test row.
        path: a name on the Hub ("owner/name"), or a folder: of images, of Parquet files, or made by `save_to_disk`.
        config: name of the configuration; None if there is only one.
        revision: commit or tag on the Hub; None for the newest.
        train: split with the training images.
        test: split with the test images; None to cut them from the training images.
        val: split with validation images; None for none.
        image: column of the images (images, their bytes, or structs of bytes and path); None if there is only one.
        label: column of the classes; None for the only column of the type ClassLabel, else the only other column.

    Raises:
        ConfigError: the library is missing or too old; the data set cannot be loaded or contains a program; there is no
            such split or column; an image has no class; a class is in another split alone; images cannot be decoded.
    """
    user_path(path, "dataset.path")
    columns = _Columns(path, hub_tables("hf", path, config, revision), image, label)
    parts, names = columns.parts(train, test, val, reading.test_fraction)
    images, readable, note = usable("hf", [files for files, _ in parts], reading.images, reading.channels)
    parts = [_kept(files, labels, keep) for (files, labels), keep in zip(parts, readable, strict=True)]
    ids = check_classes("hf", [labels for _, labels in parts], names, path, empty=reading.empty_classes)
    names, _ = renumbered(names, {}, ids)
    splits = []
    for (files, labels), part in zip(parts, PARTS, strict=False):
        files, labels = _kept(files, [ids[label] for label in labels], [ids[label] >= 0 for label in labels])
        stored = FileImages(files, images, channels=reading.channels, part=part)
        splits.append(ImageSplit(stored, torch.tensor(labels, dtype=torch.long)))
    dataset = assemble(
        "hf",
        splits[0],
        splits[1],
        val=splits[2] if val is not None else None,
        class_names=names,
        mean=reading.mean,
        std=reading.std,
        reading=reading,
    )
    return with_note(dataset, note)


def _kept(files: HubFiles, labels: Sequence[int], keep: Sequence[bool]) -> tuple[HubFiles, list[int]]:
    """Return the rows marked in `keep` with their labels."""
    rows = tuple(row for row, wanted in zip(files.rows, keep, strict=True) if wanted)
    return replace(files, rows=rows), [label for label, wanted in zip(labels, keep, strict=True) if wanted]


@dataclass(frozen=True)
class _Columns:
    """The columns of a data set with its images and classes.

    Attributes:
        path: path of the data set.
        tables: its splits by name.
        image: column of the images; None if there is only one.
        label: column of the classes; None for the only ClassLabel, else the only other column.
    """

    path: str
    tables: Any
    image: str | None
    label: str | None

    def parts(
        self, train: str, test: str | None, val: str | None, fraction: float
    ) -> tuple[list[tuple[HubFiles, list[int]]], list[str]]:
        """Return files and labels of the training, the test and perhaps the validation part, and the class names."""
        chosen = {"train": train, "test": train if test is None else test} | ({} if val is None else {"val": val})
        tables = [pick(self.tables, name, option) for option, name in chosen.items()]
        image = _image_column(tables[0], self.image)
        label = label_column(tables[0], self.label, image)
        names, labels = _classes(tables, label, self.path, list(chosen.values()))
        rows: list[Sequence[int]] = [range(len(own)) for own in labels]
        if test is None:
            tested = [in_test(str(row), fraction) for row in rows[0]]
            rows[0], rows[1] = ([row for row in rows[0] if tested[row] is part] for part in (False, True))
        undecoded = libraries.load("datasets").Image(decode=False)
        parts = []
        for table, name, own, every in zip(tables, chosen.values(), rows, labels, strict=True):
            files = HubFiles(table.cast_column(image, undecoded), image, f"{self.path} {name}", tuple(own))
            parts.append((files, [every[row] for row in own]))
        return parts, names


def _holds_images(feature: Any) -> bool:
    """Return whether a column may hold encoded images: as such, as bytes, or as structs of bytes and path."""
    if isinstance(feature, dict):
        return "bytes" in feature
    return type(feature).__name__ == "Image" or getattr(feature, "dtype", "") in ("binary", "large_binary")


def _image_column(table: Any, name: str | None) -> str:
    """Return the column `name`, or the only one with images."""
    if name is not None:
        if name not in table.features or not _holds_images(table.features[name]):
            raise ConfigError(f"dataset.image: there is no column of images '{name}' (there are: {listed(table)})")
        return name
    declared = [column for column, feature in table.features.items() if type(feature).__name__ == "Image"]
    found = declared or [column for column, feature in table.features.items() if _holds_images(feature)]
    if len(found) != 1:
        raise ConfigError(f"dataset.image: name the column; {len(found)} hold images (of: {listed(table)})")
    return str(found[0])


def _labels(table: Any, column: str, path: str) -> list[int | str]:
    """Return the values of the column of classes."""
    if column not in table.features:
        raise ConfigError(f"{path}: there is no column '{column}' (there are: {listed(table)})")
    values = list(table[column])
    for row, value in enumerate(values):
        if not isinstance(value, int | str) or value == -1:
            raise ConfigError(f"{path}, row {row}: the column '{column}' names no class (it holds {value!r})")
    return values


def _classes(tables: Sequence[Any], column: str, path: str, parts: Sequence[str]) -> tuple[list[str], list[list[int]]]:
    """Return the names of the classes, and the class id of each row of each table; classes are matched by name.

    Args:
        tables: the training table, then others.
        column: the column of the classes.
        path: path of the data set, for messages.
        parts: name of the split of each table, for messages.

    Raises:
        ConfigError: a row has no class, or a class has no training rows.
    """
    own = [getattr(table.features.get(column), "names", None) for table in tables]
    values = [_labels(table, column, f"{path}, split {part}") for table, part in zip(tables, parts, strict=True)]
    known = own[0]
    if known is None:
        known = [str(v) for v in sorted(set(values[0]), key=lambda value: (isinstance(value, str), value))]
    names = distinct(known, path)
    labels = []
    for part, titles, found in zip(parts, own, values, strict=True):
        titles = titles if titles is not None else own[0]
        present = list(dict.fromkeys(found))
        shown = [_title(value, titles, f"{path}, split {part}") for value in present]
        ids = dict(zip(present, match(names, shown, where=path, part=f"the split {part}"), strict=True))
        labels.append([ids[value] for value in found])
    return [printable(name) for name in names], labels


def _title(value: int | str, names: Sequence[str] | None, where: str) -> str:
    """Return the name of a class."""
    if names is None or isinstance(value, str):
        return str(value)
    if not 0 <= value < len(names):
        raise ConfigError(f"{where}: there is no class {value}, for there are {len(names)} names of classes")
    return str(names[value])
