"""Lists of images in text files: columns separated by commas, semicolons, tabs or spaces.

The first line may name the columns. A list has the columns path and label, and perhaps a part of the data set (split)
and a domain or a task. Files of spreadsheet programs are read as they are: a byte order mark, quotes, Windows line
ends, UTF-16.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clrun.data.reading.layout import part_of
from clrun.data.reading.text import some
from clrun.system.errors import ConfigError, first_line
from clrun.system.reading import MB

COLUMNS: dict[str, tuple[str, ...]] = {
    "path": ("path", "file", "filename", "filepath", "file_name", "file_path", "image", "image_path", "img"),
    "label": ("label", "class", "class_name", "category", "target"),
    "split": ("split", "part", "set", "subset", "partition"),
    "domain": ("domain",),
    "task": ("task", "task_id"),
}
LIMIT = 2048 * MB  # bytes of a list; 20 million images need that many
MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


@dataclass(frozen=True)
class Row:
    """A line of a list.

    Attributes:
        line: number of the line, from 1.
        path: path of the image as written.
        label: name of the class.
        split: name of the part; "" without such a column.
        domain: name of the domain; "" without such a column.
        task: name of the task; "" without such a column.
    """

    line: int
    path: str
    label: str
    split: str = ""
    domain: str = ""
    task: str = ""


def read_rows(file: Path, columns: Sequence[str] | None) -> list[Row]:
    """Return the rows of a list.

    Args:
        file: the list.
        columns: names of the columns in order, for a list without a first line of names; None to find them.

    Raises:
        ConfigError: the file is missing, is no text or has no rows; the columns are unclear; a row lacks a path or a
            label, or has another number of columns.
    """
    lines = [(number, cells) for number, cells in _cells(file) if any(cells)]
    if not lines:
        raise ConfigError(f"{file}: holds no rows; expected lines of path,label")
    names, start = _names(file, lines[0][1], [cells for _, cells in lines[1:3]], columns)
    rows = []
    for number, cells in lines[start:]:
        if len(cells) != len(names):
            raise ConfigError(
                f"{file}, line {number}: has {len(cells)} columns, expected {len(names)} ({', '.join(names)}); put "
                "values with commas into quotes"
            )
        values = {name: cell for name, cell in zip(names, cells, strict=True) if name in COLUMNS}
        lacking = [name for name, cell in values.items() if not cell]
        if lacking:
            raise ConfigError(f"{file}, line {number}: has no {lacking[0]}; add it or remove the line")
        rows.append(Row(number, **values))
    if not rows:
        raise ConfigError(f"{file}: holds no rows after its first line; expected lines of path,label")
    return rows


def _cells(file: Path) -> list[tuple[int, list[str]]]:
    """Return the number and the cells of each line that is not empty."""
    text = _text(file)
    first = next((line for line in text.splitlines() if line.strip()), "")
    separator = next((mark for mark in "\t,;" if mark in first), None)
    if separator is None:  # as in the lists of ImageNet; the path may hold spaces
        lines = [(k, line.strip()) for k, line in enumerate(text.splitlines(), 1)]
        return [(k, line.rsplit(None, 1)) for k, line in lines if line]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    found = []
    try:
        for cells in reader:
            found.append((reader.line_num, [cell.strip() for cell in cells]))
    except csv.Error as error:
        raise ConfigError(f"{file}, line {reader.line_num}: cannot be read ({error})") from error
    return found


def _text(file: Path) -> str:
    """Return the text of a file.

    Raises:
        ConfigError: it is missing or no text.
    """
    if not file.is_file():
        raise ConfigError(f"dataset.file: there is no file {file}; set it to a list of images (path,label)")
    try:
        if (size := file.stat().st_size) > LIMIT:
            raise ConfigError(f"{file}: has {size / MB:,.0f} MB, at most {LIMIT / MB:,.0f} MB of a list are read")
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({first_line(error)})") from error
    try:
        text = content.decode(MARKS.get(content[:2], "utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(f"{file}, line {line}: is no UTF-8 text; save the list as UTF-8") from error
    if "\0" in text:
        raise ConfigError(f"{file}: is no text file; expected a list of images (path,label)")
    return text


def _names(
    file: Path, first: Sequence[str], others: Sequence[Sequence[str]], columns: Sequence[str] | None
) -> tuple[list[str], int]:
    """Return the names of the columns, and the number of lines before the first row.

    Raises:
        ConfigError: a column is unclear, or there is no path or label.
    """
    found = [_column(cell) for cell in first]
    headed = "path" in found and "label" in found
    if columns is not None:
        wrong = [name for name in columns if _column(name) not in COLUMNS and name != "-"]
        if wrong:
            raise ConfigError(
                f"dataset.columns: there is no column '{wrong[0]}' ({', '.join(COLUMNS)}, or - for one to ignore)"
            )
        named = [_column(name) for name in columns]
    elif headed:
        named = found
    else:
        named = _guessed(file, [first, *others])
    twice = [name for name in COLUMNS if named.count(name) > 1]
    if twice or not {"path", "label"} <= set(named):
        what = f"two columns of {twice[0]}" if twice else "no column of paths or none of labels"
        raise ConfigError(f"{file}: has {what} ({', '.join(named)}); set dataset.columns, as in [path,label,split]")
    return named, int(headed)


def _column(name: str) -> str:
    """Return the column that a name stands for; the name itself for others."""
    plain = name.strip().casefold().replace(" ", "_")
    return next((column for column, names in COLUMNS.items() if plain in names), name)


def _guessed(file: Path, lines: Sequence[Sequence[str]]) -> list[str]:
    """Return the names of the columns of a list without a first line of names.

    Raises:
        ConfigError: a third column holds something else than names of parts, or there are more.
    """
    if len(lines[0]) == 2:
        return ["path", "label"]
    if len(lines[0]) == 3 and all(len(line) == 3 and part_of(line[2]) for line in lines):
        return ["path", "label", "split"]
    raise ConfigError(
        f"{file}: the columns of '{some(lines[0])}' are unclear; add a first line such as path,label,split, or set "
        "dataset.columns, as in [path,label,domain]"
    )
