"""The user's own images, named by a list in a CSV, TSV or text file."""

import os
import posixpath
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from clrun.data.reading.class_names import Sort, composed, distinct, in_order, match
from clrun.data.reading.image_files import from_files, with_note
from clrun.data.reading.listing import Listing
from clrun.data.reading.options import OwnReading, loader, user_path
from clrun.data.reading.row_parts import class_groups, row_domains, row_parts
from clrun.data.reading.rows import Row, read_rows
from clrun.data.reading.text import some
from clrun.data.stream import Dataset
from clrun.system.errors import ConfigError, warn

Parts = dict[str, tuple[Row, ...]]


@loader
def list(
    reading: OwnReading,
    *,
    name: str,
    file: str,
    root: str | None,
    columns: Sequence[str] | None,
    splits: dict[str, str | None] | None,
    sort: Sort,
) -> Dataset:
    """Return the images that a list names: path, label, and perhaps split, and domain or task.

    Class ids follow the sorted names of the classes. Without splits, the hash of a path as written decides whether it
    is a test image. Domains become the parts of the data set; tasks become the groups of classes "task", for
    `scenario=fixed_groups scenario.groups=task`.

    Args:
        reading: the common options.
        name: name of the data set, part of the identity of a run.
        file: the list.
        root: folder that the paths start from; None for the folder of the list.
        columns: names of the columns in order (path, label, split, domain, task; - for one to ignore), for a list
            without a first line of names; None to find them.
        sort: order of the names of classes and tasks: "text" by code point, "natural" with numbers in names as numbers.
        splits: names of the parts in the column of splits, as {train: a, test: b, val: c}; None to find them.

    Raises:
        ConfigError: the list cannot be read, a class is in another part alone, an image has two labels or cannot be
            read; names the file and the line.
    """
    listed = user_path(file, "dataset.file")
    home = listed.parent if root is None else user_path(root, "dataset.root")
    rows, special = _regular(home, _distinct(listed, home, read_rows(listed, columns)))
    parts, said = _parts(listed, rows, splits, reading.test_fraction)
    classes = in_order(distinct((row.label for row in parts["train"]), str(listed)), sort)
    for part, own in parts.items():
        match(classes, distinct((row.label for row in own), str(listed)), where=str(listed), part=f"the {part} part")
    listings = {part: _listing(home, own, classes) for part, own in parts.items()}
    listings["train"] = replace(listings["train"], special=special)
    tasks = class_groups(str(listed), ((row.line, row.label, row.task) for row in rows), classes, sort)
    dataset = from_files(
        Path(name).stem or "list",
        listings["train"],
        listings["test"],
        val=listings.get("val"),
        class_names=classes,
        channels=reading.channels,
        mean=reading.mean,
        std=reading.std,
        reading=reading,
        groups={"task": tuple(own for _, own in tasks)} if tasks else {},
        domains=row_domains({part: [row.domain for row in own] for part, own in parts.items()}),
    )
    return with_note(replace(dataset, sort=sort), said)


def _distinct(file: Path, home: Path, rows: Sequence[Row]) -> tuple[Row, ...]:
    """Return the rows with their paths as they are stored, each file once; a warning names lines that repeat one.

    Two paths name one file also when they differ in "..", lead through links, or are absolute in one line alone.

    Raises:
        ConfigError: a file has two labels.
    """
    found: dict[str, Row] = {}
    again = []
    folders: dict[str, str] = {}
    for row in rows:
        row = replace(row, path=_stored(home, row.path))
        other = found.setdefault(_real(home, row.path, folders), row)
        if composed(other.label) != composed(row.label):
            same = "it" if other.path == row.path else f"{row.path}, the same file,"
            raise ConfigError(
                f"{file}: line {other.line} says that {other.path} is '{other.label}', and line {row.line} that {same} "
                f"is '{row.label}'; remove one"
            )
        if other is not row:
            again.append(row.path)
    if again:
        warn(f"{file}: {len(again)} paths are named again, and count once, where they are first: {some(again)}")
    return tuple(found.values())


def _stored(home: Path, path: str) -> str:
    """Return a path as it is stored, from `home` on where it lies there.

    Lists of Windows programs have backslashes in place of slashes.
    """
    if "\\" in path and not (home / path).exists():
        path = path.replace("\\", "/")
    if os.path.isabs(path):
        start = os.path.join(os.path.abspath(home), "")
        return path.removeprefix(start).lstrip("/") if path.startswith(start) else path
    return posixpath.normpath(path) if ".." not in path.split("/") else path


def _real(home: Path, path: str, folders: dict[str, str]) -> str:
    """Return the path of a file with links resolved; `folders` keeps the real paths of folders."""
    place, name = os.path.split(os.path.join(home, path))
    if place not in folders:
        folders[place] = os.path.realpath(place)
    found = os.path.join(folders[place], name)
    return os.path.realpath(found) if os.path.islink(found) else found


def _regular(home: Path, rows: Sequence[Row]) -> tuple[tuple[Row, ...], tuple[str, ...]]:
    """Return the rows without pipes, sockets and devices, which may never be opened, and the paths of these."""
    special = {row.path for row in rows if _is_special(home / row.path)}
    return tuple(row for row in rows if row.path not in special), tuple(sorted(special))


def _parts(file: Path, rows: Sequence[Row], splits: dict[str, str | None] | None, fraction: float) -> tuple[Parts, str]:
    """Return the rows of each part, and a word on what is tested on where it is not simply a test part.

    Raises:
        ConfigError: it is unclear which rows are training rows.
    """
    splits_of, names = [row.split for row in rows], [row.path for row in rows]
    found, said = row_parts(str(file), splits_of, names, splits, fraction)
    return {part: tuple(rows[k] for k in own) for part, own in found.items()}, said


def _listing(home: Path, rows: Sequence[Row], classes: Sequence[str]) -> Listing:
    """Return the images of some rows."""
    ids = {name: label for label, name in enumerate(classes)}
    return Listing(home, tuple(row.path for row in rows), tuple(ids[composed(row.label)] for row in rows))


def _is_special(path: Path) -> bool:
    """Return whether a path is that of a pipe, a socket or a device, which may never be opened."""
    return path.exists() and not path.is_file() and not path.is_dir()
