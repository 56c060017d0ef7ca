"""Data sets of the user's own texts: rows are checked and cut, and become a `Dataset` of bytes.

Shapes: `N` rows.
"""

import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from clrun.data.modality import Texts
from clrun.data.reading.assemble import assemble
from clrun.data.reading.class_names import composed, distinct, in_order, match
from clrun.data.reading.image_files import check_classes, renumbered, with_note
from clrun.data.reading.options import OwnTextReading
from clrun.data.reading.row_parts import class_groups, row_domains, row_parts
from clrun.data.reading.text import printable
from clrun.data.split import TensorSplit
from clrun.data.stream import Dataset
from clrun.data.texts import cut, text_key, to_bytes
from clrun.system.errors import ConfigError, warn

PARTS = ("train", "test", "val")
BLANK = ("Zs", "Zl", "Zp", "Cc", "Cf")  # categories of Unicode: separators, control and format characters
FOLDED = 65_536  # characters of a text that count when texts are compared
EXAMPLE = 60  # characters of a text in a message


@dataclass(frozen=True)
class TextRow:
    """A text of a table or a folder.

    Attributes:
        line: number of the line in a table, from 1; or of the file in a folder.
        text: the text, cut to the most bytes that are stored.
        key: the folded text, which decides whether two texts are the same.
        label: name of the class.
        split: name of the part; "" without such a column.
        domain: name of the domain; "" without such a column.
        group: name of the group of classes; "" without such a column.
    """

    line: int
    text: str
    key: str
    label: str
    split: str = ""
    domain: str = ""
    group: str = ""


class Intake:
    """Checks texts one by one as they are read, cuts them, and remembers what is to be warned of.

    Args:
        reading: the options.
        where: the table or folder, for messages.
        place: names the place of a row in messages, such as "rows.csv, line 14".
    """

    def __init__(self, reading: OwnTextReading, where: str, place: Callable[[int], str]) -> None:
        self.reading, self.where, self.place = reading, where, place
        self.rows: list[TextRow] = []
        self.empty: list[int] = []
        self.long: list[int] = []  # bytes of the texts that are cut

    def add(self, line: int, text: str, label: str, *, split: str = "", domain: str = "", group: str = "") -> None:
        """Take a row.

        Args:
            line: number of the line or file.
            text: the text as read.
            label: name of its class.
            split: name of its part.
            domain: name of its domain.
            group: name of the group of its class.

        Raises:
            ConfigError: the text holds the character U+0000 or half of a surrogate pair, or there is no label.
        """
        label = label.strip()
        if not label:
            raise ConfigError(f"{self.place(line)}: no label")
        if "\0" in text:
            raise ConfigError(f"{self.place(line)}: the text holds a NUL character (U+0000); remove it")
        if all(unicodedata.category(c) in BLANK for c in text):
            self.empty.append(line)
            return
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"{self.place(line)}: the text holds half of a surrogate pair ({text[error.start]!r}); repair it"
            ) from error
        if size > self.reading.max_bytes:
            self.long.append(size)
        kept = cut(text, self.reading.max_bytes)
        self.rows.append(TextRow(line, kept, text_key(text[:FOLDED]), composed(label), split, domain, group))

    def finish(self) -> list[TextRow]:
        """Return the rows; warn of texts that were cut or left out.

        Raises:
            ConfigError: a text is empty and `dataset.empty` is "error", or no row is left.
        """
        if self.empty and self.reading.empty == "error":
            more = f" (so are {len(self.empty) - 1} more)" if len(self.empty) > 1 else ""
            raise ConfigError(
                f"{self.place(self.empty[0])}: the text is empty{more}; remove the row or set dataset.empty=skip"
            )
        if self.empty:
            warn(f"{self.where}: {len(self.empty)} empty texts are left out, first: {self.place(self.empty[0])}")
        if self.long:
            warn(
                f"{self.where}: {len(self.long)} texts are cut at dataset.max_bytes={self.reading.max_bytes}; the "
                f"longest has {max(self.long):,} bytes"
            )
        if not self.rows:
            raise ConfigError(f"{self.where}: holds no texts")
        return self.rows


def from_texts(
    name: str, taken: Intake, *, splits: Mapping[str, str | None] | None, classes: Sequence[str] | None = None
) -> Dataset:
    """Return the data set of the texts that were taken.

    All texts lie in one tensor.

    Args:
        name: name of the data set.
        taken: has taken all rows.
        splits: names of the parts, as {"train": "a", "test": "b"}; None to find them.
        classes: names of the classes by class id; None for the sorted ones of the training part.

    Raises:
        ConfigError: see `Intake.finish`; or the parts are unclear, a class is in another part alone or has no training
            texts, names of classes differ only in case or blanks, or a class is in two groups.
    """
    reading, where, rows = taken.reading, taken.where, taken.finish()
    _refuse_alike((row.label for row in rows), where)
    parts, said = row_parts(
        where, [r.split for r in rows], [r.key for r in rows], splits, reading.test_fraction, "text"
    )
    if not parts["train"]:
        raise ConfigError(f"{where}: there are no training texts; add some, or set a smaller dataset.test_fraction")
    if classes is None:
        classes = in_order(distinct((rows[k].label for k in parts["train"]), where), reading.sort)
    classes = [composed(label.strip()) for label in classes]
    for part, own in parts.items():
        match(classes, [rows[k].label for k in own], where=where, part=f"the {part} part", unit="text")
    _say_repeated(where, rows, parts)
    groups = class_groups(where, ((r.line, r.label, r.group) for r in rows), classes, reading.sort)
    ids = {label: k for k, label in enumerate(classes)}
    labels = [[ids[rows[k].label] for k in own] for own in (parts.get(part, []) for part in PARTS)]
    new = check_classes(name, labels, classes, where, empty=reading.empty_classes, unit="text")
    parts = {part: [k for k in own if new[ids[rows[k].label]] >= 0] for part, own in parts.items()}
    classes, named = renumbered(classes, {"group": tuple(own for _, own in groups)} if groups else {}, new)
    stored = to_bytes([row.text for row in rows])
    numbers = torch.tensor([new[ids[row.label]] if row.label in ids else -1 for row in rows])
    made = {part: TensorSplit(stored, numbers, torch.tensor(own, dtype=torch.long)) for part, own in parts.items()}
    dataset = assemble(
        name,
        made["train"],
        made["test"],
        val=made.get("val"),
        class_names=[printable(label) for label in classes],
        mean=(),
        std=(),
        groups=named,
        reading=reading,
        domains=row_domains({part: [rows[k].domain for k in own] for part, own in parts.items()}),
        modality=Texts(),
    )
    return with_note(replace(dataset, sort=reading.sort), said)


def _refuse_alike(labels: Iterable[str], where: str) -> None:
    """Refuse names of classes that differ only in case or blanks.

    Raises:
        ConfigError: two do.
    """
    alike: dict[str, str] = {}
    for label in labels:
        other = alike.setdefault("".join(label.casefold().split()), label)
        if other != label:
            raise ConfigError(
                f"{where}: the classes '{printable(other)}' and '{printable(label)}' differ only in case or blanks; "
                "rename one or merge them"
            )


def _say_repeated(where: str, rows: Sequence[TextRow], parts: Mapping[str, Sequence[int]]) -> None:
    """Warn of texts with several labels, and of texts that are in the training and in another part."""
    labels: dict[str, str] = {}
    unclear: dict[str, str] = {}
    for row in rows:
        if labels.setdefault(row.key, row.label) != row.label:
            unclear.setdefault(row.key, f"'{_short(row.text)}' is {labels[row.key]} and {row.label}")
    if unclear:
        warn(f"{where}: {len(unclear)} texts have several labels: {next(iter(unclear.values()))}")
    trained = {rows[k].key for k in parts["train"]}
    for part, own in parts.items():
        again = [k for k in own if part != "train" and rows[k].key in trained]
        if again:
            warn(f"{where}: {len(again)} {part} texts are training texts, too, such as '{_short(rows[again[0]].text)}'")


def _short(text: str) -> str:
    """Return the beginning of a text on one line."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= EXAMPLE else f"{line[:EXAMPLE]}..."
