"""Text data sets of the Hugging Face Hub, or of a folder that its library reads. Their own code is never run."""

from typing import Any

from clrun.data.reading.hub import hub_tables, label_column, listed, pick
from clrun.data.reading.options import OwnTextReading, loader, user_path
from clrun.data.reading.text_rows import Intake, from_texts
from clrun.data.stream import Dataset
from clrun.data.texts import pair
from clrun.system.errors import ConfigError, did_you_mean

STRINGS = ("string", "large_string", "string_view")  # types of columns of texts; which one depends on the file


@loader
def hf_text(
    reading: OwnTextReading,
    *,
    path: str,
    config: str | None,
    revision: str | None,
    train: str,
    test: str | None,
    val: str | None,
    text: str | None,
    text_b: str | None,
    label: str | None,
) -> Dataset:
    """Return a text data set that the library `datasets` reads.

    Classes are those of the column's ClassLabel, in its order, or the sorted values of the column. Without a test
    split, the hash of each text in lower case and without punctuation decides.

    Args:
        reading: the common options; `encoding` is not used.
        path: a name on the Hub ("owner/name"), or a folder: of Parquet files, or made by `save_to_disk`.
        config: name of the configuration; None if there is only one.
        revision: commit or tag on the Hub; None for the newest.
        train: split with the training texts.
        test: split with the test texts; None to cut them from the training texts.
        val: split with validation texts; None for none.
        text: column of the texts; None if there is only one column of strings beside the classes.
        text_b: column of second texts, for pairs; None for single texts.
        label: column of the classes; None for the only column of the type ClassLabel, else the only other column.

    Raises:
        ConfigError: the library is missing or too old; the data set cannot be loaded or contains a program; there is no
            such split or column; or a row is wrong; names the split and the row.
    """
    user_path(path, "dataset.path")
    tables = hub_tables("hf_text", path, config, revision)
    chosen = {part: name for part, name in (("train", train), ("test", test), ("val", val)) if name is not None}
    places: list[str] = []
    taken = Intake(reading, path, places.__getitem__)
    names: list[str] | None = None
    for part, name in chosen.items():
        table = pick(tables, name, part)
        columns = _Columns.of(table, text, text_b, label)
        own = getattr(table.features[columns.label], "names", None)
        names = own if part == "train" else names
        for row, record in enumerate(table):
            places.append(f"{path}, split {name}, row {row}")
            taken.add(len(places) - 1, *columns.read(record, own, places[-1]), split=part)
    return from_texts("hf_text", taken, splits={part: part for part in chosen}, classes=names)


class _Columns:
    """The columns of a table: of texts, of second texts, and of classes."""

    def __init__(self, text: str, text_b: str | None, label: str) -> None:
        self.text, self.text_b, self.label = text, text_b, label

    @classmethod
    def of(cls, table: Any, text: str | None, text_b: str | None, label: str | None) -> "_Columns":
        """Return the named columns, or those found by their types.

        Raises:
            ConfigError: a named column is missing, or it is unclear which is meant.
        """
        for option, name in (("text", text), ("text_b", text_b)):
            if name is not None and name not in table.features:
                hint = did_you_mean(name, table.features)
                raise ConfigError(f"dataset.{option}: there is no column '{name}'{hint} (there are: {listed(table)})")
        if text is None:
            strings = [name for name, kind in table.features.items() if getattr(kind, "dtype", "") in STRINGS]
            found = [name for name in strings if name not in (label, text_b)]
            if len(found) != 1:
                raise ConfigError(f"dataset.text: name the column; {len(found)} hold strings (of: {listed(table)})")
            text = found[0]
        return cls(text, text_b, label_column(table, label, text))

    def read(self, record: Any, names: list[str] | None, where: str) -> tuple[str, str]:
        """Return text and class of a row; "" for what is missing.

        Raises:
            ConfigError: a value is of another kind.
        """
        texts = [record[name] for name in (self.text, self.text_b) if name is not None]
        wrong = next((value for value in texts if not isinstance(value, str | None)), None)
        label = record[self.label]
        if wrong is not None or not isinstance(label, str | int | None):
            what = "label is no class" if wrong is None else "text is no string"
            raise ConfigError(f"{where}: the {what} ({label if wrong is None else wrong!r:.40})")
        if names is not None and isinstance(label, int):
            if not 0 <= label < len(names):
                raise ConfigError(
                    f"{where}: the label {label} names no class; choose a split whose labels are not hidden"
                )
            label = names[label]
        shown = [value or "" for value in texts]
        return pair(*shown) if len(shown) == 2 else shown[0], "" if label is None else str(label)
