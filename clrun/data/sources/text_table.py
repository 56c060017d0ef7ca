"""The user's own texts in a table: CSV, TSV or JSON Lines."""

from pathlib import Path

from clrun.data.reading.options import OwnTextReading, loader, user_path
from clrun.data.reading.text_files import Columns, read_table
from clrun.data.reading.text_rows import Intake, from_texts
from clrun.data.stream import Dataset
from clrun.system.errors import ConfigError


@loader
def text_table(
    reading: OwnTextReading,
    *,
    name: str,
    file: str,
    text: str,
    text_b: str | None,
    label: str,
    split: str | None,
    domain: str | None,
    group: str | None,
    splits: dict[str, str | None] | None,
    delimiter: str | None,
    quote: str | None,
) -> Dataset:
    """Return the texts of a table: text, label, and perhaps split, domain and group of classes.

    Class ids follow the sorted names of the classes. Without a column of splits, the hash of each text in lower case
    and without punctuation decides whether it is a test text, so that no text is in both parts. Domains become the
    parts of the data set; groups become the groups of classes "group", for `scenario=fixed_groups
    scenario.groups=group`.

    Args:
        reading: the common options.
        name: name of the data set, part of the identity of a run.
        file: the table: .csv or .tsv with names of columns in the first line, or .jsonl with one object per line.
        text: column of the texts.
        text_b: column of second texts, for pairs; None for single texts.
        label: column of the classes.
        split: column of the parts; None for a column "split", if there is one.
        domain: column of the domains; None for a column "domain", if there is one.
        group: column of the groups of classes; None for a column "group", if there is one.
        splits: names of the parts in the column of splits, as {train: a, test: b, val: c}; None to find them.
        delimiter: character between columns; None for a comma in .csv and a tab in .tsv.
        quote: character around texts that hold delimiters; None if quotes are part of the texts.

    Raises:
        ConfigError: the table cannot be read, or a row is wrong; names the file and the line.
    """
    between = None if delimiter is None else delimiter.replace("\\t", "\t")
    for option, mark in (("delimiter", between), ("quote", quote)):
        if mark is not None and len(mark) != 1:
            raise ConfigError(f"dataset.{option}: must be one character, got {mark!r}")
    table = user_path(file, "dataset.file")
    taken = Intake(reading, str(table), lambda line: f"{table}, line {line}")
    columns = Columns(text, text_b, label, split, domain, group)
    read_table(table, taken, columns, delimiter=between, quote=quote, encoding=reading.encoding)
    return from_texts(Path(name).stem or "text_table", taken, splits=splits)
