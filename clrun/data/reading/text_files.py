"""Tables of texts in files: CSV, TSV and JSON Lines, read as they are written and never guessed."""

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clrun.data.reading.text import printable, some
from clrun.data.reading.text_rows import Intake
from clrun.data.texts import pair
from clrun.system.errors import ConfigError, did_you_mean, first_line
from clrun.system.reading import MB

LIMIT = 2048 * MB  # bytes of a file
LINE = re.compile(r"[^\r\n]*(?:\r\n|\n|\r)|[^\r\n]+")
DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
JSON = (".jsonl", ".ndjson")
Record = tuple[int, Mapping[str, object]]  # number of its first line, and its values by column


@dataclass(frozen=True)
class Columns:
    """The names of the columns of a table.

    Attributes:
        text: column of the texts.
        text_b: column of second texts, such as the hypothesis of a pair; None without.
        label: column of the classes.
        split: column of the parts; None for a column "split", if there is one.
        domain: column of the domains; None for a column "domain", if there is one.
        group: column of the groups of classes; None for a column "group", if there is one.
    """

    text: str
    text_b: str | None
    label: str
    split: str | None
    domain: str | None
    group: str | None

    def of(self, there: Sequence[str], file: Path) -> dict[str, str]:
        """Return the column of each role that the table has.

        Raises:
            ConfigError: a named column is missing.
        """
        found = {}
        for role in ("text", "text_b", "label", "split", "domain", "group"):
            name = getattr(self, role)
            if name is not None and name not in there:
                raise ConfigError(
                    f"{file} has no column '{name}' (columns: {some(there)}){did_you_mean(name, there)}; set "
                    f"dataset.{role}"
                )
            if name is None and role in there and role != "text_b":
                name = role
            if name is not None:
                found[role] = name
        return found


def read_text(path: Path, encoding: str) -> str:
    """Return the text of a file, without a byte order mark.

    Raises:
        ConfigError: it is missing, too large, in another encoding, or holds the character U+0000.
    """
    try:
        if (size := path.stat().st_size) > LIMIT:
            raise ConfigError(f"{path}: has {size / MB:,.0f} MB, at most {LIMIT / MB:,.0f} MB are read")
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({first_line(error)})") from error
    try:
        text = content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        other = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin-1"
        shown = "UTF-8" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding
        raise ConfigError(
            f"{path}, byte {error.start:,}: not {shown}; set dataset.encoding={other} if that is what it is"
        ) from error
    if (place := text.find("\0")) >= 0:
        line = text.count("\n", 0, place) + 1
        raise ConfigError(f"{path}, line {line}: holds a NUL character (U+0000), which no text has; remove it")
    return text


def read_table(
    file: Path, taken: Intake, columns: Columns, *, delimiter: str | None, quote: str | None, encoding: str
) -> None:
    """Let `taken` take the rows of a table.

    Args:
        file: CSV or TSV with a first line of names, or one JSON object per line, by its suffix.
        taken: takes the rows.
        columns: names of the columns.
        delimiter: between the columns of a CSV file; None for the one of the suffix.
        quote: around texts that hold delimiters, quotes or line ends; None if quotes are letters.
        encoding: of the file.

    Raises:
        ConfigError: the file cannot be read, lacks a column, or a row is wrong; names the file and the line.
    """
    suffix = file.suffix.lower()
    if suffix not in DELIMITERS and suffix not in JSON and delimiter is None:
        known = ", ".join([*DELIMITERS, *JSON])
        raise ConfigError(f"dataset.file: {file} is none of {known}; rename it, or set dataset.delimiter")
    if not file.is_file():
        raise ConfigError(f"dataset.file: there is no file {file}; set it to a table of texts (text,label)")
    text = read_text(file, encoding)
    records = _objects(file, text) if suffix in JSON else _records(file, text, delimiter or DELIMITERS[suffix], quote)
    before = csv.field_size_limit(LIMIT)  # by default longer fields than 131,072 characters are refused
    try:
        _take(file, records, taken, columns)
    finally:
        csv.field_size_limit(before)


def _take(file: Path, records: Iterator[Record], taken: Intake, columns: Columns) -> None:
    """Let `taken` take the rows; the columns are those of the first one."""
    roles: dict[str, str] = {}
    for line, record in records:
        roles = roles or columns.of([*record], file)
        values = {role: _value(record.get(name), role, f"{file}, line {line}") for role, name in roles.items()}
        if "text_b" in values:
            values["text"] = pair(values["text"], values.pop("text_b"))
        taken.add(line, values.pop("text"), values.pop("label"), **values)


def _records(file: Path, text: str, delimiter: str, quote: str | None) -> Iterator[Record]:
    """Yield the rows of a table with a first line of names; empty lines are passed over.

    Raises:
        ConfigError: a row has more fields than there are names, or quotes do not match.
    """
    options: dict[str, Any] = {"delimiter": delimiter, "strict": True}
    options |= {"quoting": csv.QUOTE_NONE} if quote is None else {"quotechar": quote}
    start, names = 1, None
    try:
        reader = csv.reader((found[0] for found in LINE.finditer(text)), **options)
        for fields in reader:
            line, start = start, reader.line_num + 1
            if not fields:
                continue
            if names is None:
                names = _names(file, fields)
                continue
            if len(fields) > len(names):
                raise ConfigError(
                    f"{file}, line {line}: has {len(fields)} fields, expected {len(names)} ({', '.join(names)}); put "
                    "texts that hold the delimiter into quotes"
                )
            yield line, dict(zip(names, fields, strict=False))
    except csv.Error as error:
        raise ConfigError(
            f"{file}, line {start}: cannot be read ({error}); set dataset.quote=null if quotes are part of the texts"
        ) from error
    if names is None:
        raise ConfigError(f"{file}: is empty; expected a first line of names, such as text,label")


def _names(file: Path, fields: Sequence[str]) -> list[str]:
    """Return the names of the columns in the first line.

    Raises:
        ConfigError: there is a single one that holds another delimiter, or one occurs twice.
    """
    names = [name.strip() for name in fields]
    if len(names) == 1 and (other := next((mark for mark in ";\t,|" if mark in names[0]), None)):
        shown = "'\\t'" if other == "\t" else f"'{other}'"
        raise ConfigError(f"{file}: one column '{printable(names[0])}'; set dataset.delimiter={shown}")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"{file}: two columns are called '{printable(twice[0])}'; rename one")
    return names


def _objects(file: Path, text: str) -> Iterator[Record]:
    """Yield the objects of a file with one JSON object per line; empty lines are passed over.

    Raises:
        ConfigError: a line holds something else.
    """
    for line, found in enumerate(LINE.finditer(text), 1):
        if not found[0].strip():
            continue
        try:
            value = json.loads(found[0])
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file}, line {line}: no JSON object ({first_line(error)})") from error
        if not isinstance(value, dict):
            raise ConfigError(f"{file}, line {line}: no JSON object (a {type(value).__name__}); expected {{...}}")
        yield line, value


def _value(value: object, role: str, where: str) -> str:
    """Return a value of a row as text; "" for a text or a label that is missing.

    Raises:
        ConfigError: it is of another kind, or the row lacks a value that all rows must have.
    """
    if role in ("text", "text_b"):
        if value is None or isinstance(value, str):
            return value or ""
        raise ConfigError(f"{where}: the {role} is no string ({value!r:.40})")
    if value is None or value == "":
        if role == "label":
            return ""
        raise ConfigError(f"{where}: no {role}; fill in the column in every row, or remove it")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ConfigError(f"{where}: the {role} is neither a string nor a whole number ({value!r:.40})")
    return str(value).strip()
