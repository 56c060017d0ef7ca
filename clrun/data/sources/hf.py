"""Image data sets of the Hugging Face Hub, or of a folder that its library reads. Their own code is never run."""

import hashlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clrun.data.contents import Digests, StoredRows, bytes_digest, file_digest
from clrun.data.images import FileImages, ImageSplit, unreadable
from clrun.data.reading.assemble import assemble
from clrun.data.reading.image_files import check_classes
from clrun.data.reading.listing import in_test, printable, some
from clrun.data.reading.options import OwnReading, loader
from clrun.data.stream import Dataset
from clrun.system import libraries
from clrun.system.errors import ConfigError, did_you_mean, one_line, warn

OLDEST = 4  # from this version on the library refuses data sets with a program
BATCH = 1000  # rows that are read at once for their digests
SAVED = ("dataset_dict.json", "state.json")  # files that `save_to_disk` writes


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
    image: str | None,
    label: str | None,
) -> Dataset:
    """Return an image data set that the library `datasets` reads.

    Args:
        reading: the common options; the hash of a row's number decides whether it is a test row.
        path: a name on the Hub ("owner/name"), or a folder: of images, of Parquet files, or made by `save_to_disk`.
        config: name of the configuration; None if there is only one.
        revision: commit or tag on the Hub; None for the newest.
        train: split with the training images.
        test: split with the test images; None to cut them from the training images.
        image: column of the images; None if there is only one.
        label: column of the classes; None for the only column of the type ClassLabel.

    Raises:
        ConfigError: the library is missing or too old; the data set cannot be loaded or contains a program; there is no
            such split or column; an image has no class.
    """
    columns = _Columns(path, _tables(path, config, revision), image, label)
    parts, names = columns.parts(train, test, reading.test_fraction)
    splits = [
        _split(files, labels, reading, part) for (files, labels), part in zip(parts, ("train", "test"), strict=True)
    ]
    check_classes("hf", splits[0].y.tolist(), splits[1].y.tolist(), names, path)
    return assemble(
        "hf",
        *splits,
        class_names=names,
        mean=reading.mean,
        std=reading.std,
        reading=reading,
    )


@dataclass(frozen=True)
class _Columns:
    """The columns of a data set with its images and classes.

    Attributes:
        path: path of the data set.
        tables: its splits by name.
        image: column of the images; None if there is only one.
        label: column of the classes; None for the only ClassLabel.
    """

    path: str
    tables: Any
    image: str | None
    label: str | None

    def parts(
        self, train: str, test: str | None, fraction: float
    ) -> tuple[list[tuple[HubFiles, list[int]]], list[str]]:
        """Return files and labels (of all rows of the table) of the training and the test part, and the class names."""
        chosen = [train, train if test is None else test]
        tables = [_pick(self.tables, name, option) for name, option in zip(chosen, ("train", "test"), strict=True)]
        image = _column(tables[0], self.image, "image", "Image")
        label = _column(tables[0], self.label, "label", "ClassLabel")
        values = [_labels(table, label, self.path) for table in tables]
        names, numbers = _classes(tables[0], label, values)
        tested = [test is not None or in_test(str(row), fraction) for row in range(len(values[1]))]
        rows = (
            tuple(row for row in range(len(values[0])) if test is not None or not tested[row]),
            tuple(row for row, own in enumerate(tested) if own),
        )
        undecoded = libraries.load("datasets").Image(decode=False)
        parts = [
            (
                HubFiles(table.cast_column(image, undecoded), image, f"{self.path} {name}", own),
                [numbers[v] for v in every],
            )
            for table, name, own, every in zip(tables, chosen, rows, values, strict=True)
        ]
        return parts, names


def _split(files: HubFiles, labels: Sequence[int], reading: OwnReading, part: str) -> ImageSplit:
    """Return the rows of a table; with `unreadable=skip` without those that cannot be decoded."""
    images, channels = reading.images, reading.channels
    if images.unreadable == "skip":
        problems = unreadable(FileImages(files, images, channels=channels, part=""))
        if problems:
            named = some([*problems.values()])
            warn(f"dataset=hf: {len(problems)} images are left out because they cannot be decoded: {named}")
        kept = tuple(row for k, row in enumerate(files.rows) if k not in problems)
        files = HubFiles(files.table, files.column, files.title, kept)
    stored = FileImages(files, images, channels=channels, part=part)
    return ImageSplit(stored, torch.tensor([labels[row] for row in files.rows], dtype=torch.long))


def _tables(path: str, config: str | None, revision: str | None) -> Any:
    """Return the splits of a data set by name."""
    library = libraries.load("datasets")
    if int(library.__version__.split(".")[0]) < OLDEST:
        raise ConfigError(
            f"dataset=hf needs datasets {OLDEST} or newer, which run no code of a data set; found "
            f"{library.__version__}; run {libraries.pip_install('datasets', upgrade=True)}"
        )
    if not sys.stderr.isatty():
        library.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # the error below reports failed attempts
    home = Path(path).expanduser()
    try:
        if any((home / name).is_file() for name in SAVED):
            found = library.load_from_disk(str(home))
            return found if isinstance(found, dict) else {"train": found}
        return library.load_dataset(str(home) if home.is_dir() else path, config, revision=revision)
    except Exception as error:  # the library and the network below it have many kinds
        reason = one_line(error)[:300]
        raise ConfigError(
            f"dataset.path: {path} cannot be loaded ({reason}); set it to a name on the Hub that this machine can "
            "reach or has loaded before, or to a folder"
        ) from error


def _pick(tables: Any, name: str, option: str) -> Any:
    """Return the split `name`."""
    if name not in tables:
        hint = did_you_mean(name, tables) or f"; set dataset.{option}"
        raise ConfigError(f"dataset.{option}: there is no split '{name}'{hint} (there are: {', '.join(tables)})")
    return tables[name]


def _column(table: Any, name: str | None, option: str, kind: str) -> str:
    """Return the column `name`, or the only one of this kind."""
    columns: dict[str, str] = {column: type(feature).__name__ for column, feature in table.features.items()}
    listed = ", ".join(f"{column} ({feature})" for column, feature in columns.items())
    if name is not None:
        if name not in columns or (kind == "Image" and columns[name] != kind):
            what = "column of images" if kind == "Image" else "column"
            raise ConfigError(f"dataset.{option}: there is no {what} '{name}' (there are: {listed})")
        return name
    found = [column for column, feature in columns.items() if feature == kind]
    if len(found) != 1:
        raise ConfigError(f"dataset.{option}: name the column; {len(found)} are of the kind {kind} (of: {listed})")
    return found[0]


def _labels(table: Any, column: str, path: str) -> list[int | str]:
    """Return the values of the column of classes."""
    values = list(table[column])
    for row, value in enumerate(values):
        if not isinstance(value, int | str) or value == -1:
            raise ConfigError(f"{path}, row {row}: the column '{column}' names no class (it holds {value!r})")
    return values


def _classes(table: Any, column: str, values: Sequence[Sequence[int | str]]) -> tuple[list[str], dict[int | str, int]]:
    """Return the names of the classes and the class id of each value: as the table numbers them, else sorted."""
    names = getattr(table.features[column], "names", None)
    if names is not None:
        return [printable(name) for name in names], {label: label for label in range(len(names))}
    found = sorted({value for part in values for value in part}, key=lambda value: (isinstance(value, str), value))
    return [printable(str(value)) for value in found], {value: label for label, value in enumerate(found)}
