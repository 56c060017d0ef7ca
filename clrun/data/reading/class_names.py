"""Names of classes: compared in one way wherever they come from, and matched by name between the parts of a data set.

Names count as one class if they are equal after composing their accents (Unicode NFC), because file systems and
programs differ in how they store "é". Names that differ only in case are refused: whether they are one class depends on
the file system.
"""

import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Literal

from clrun.data.reading.text import some
from clrun.system.errors import ConfigError

_TEXT = sys.maxsize  # more than the digits of any number
Sort = Literal["text", "natural"]


def in_order(names: Iterable[str], sort: Sort) -> list[str]:
    """Return names in order.

    Args:
        names: the names.
        sort: "text" sorts by code point (1, 10, 2); "natural" sorts numbers in names as numbers (1, 2, 10).
    """
    return sorted(names) if sort == "text" else sorted(names, key=_with_numbers)


def _with_numbers(name: str) -> tuple[list[tuple[int, str]], str]:
    """Return the texts and the numbers of a name in turn; numbers come before texts, as digits before letters."""
    parts = [part for part in re.split(r"([0-9]+)", name) if part]
    values = [part.lstrip("0") if part.isdecimal() else part for part in parts]
    sizes = [len(value) if part.isdecimal() else _TEXT for part, value in zip(parts, values, strict=True)]
    return list(zip(sizes, values, strict=True)), name


def composed(name: str) -> str:
    """Return a name with its accents composed (Unicode NFC)."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def distinct(names: Iterable[str], where: str) -> list[str]:
    """Return the names of classes, composed, each once, in the order of their first occurrence.

    Args:
        names: names as they are stored.
        where: folder, file or data set, for the message.

    Raises:
        ConfigError: two names differ only in case.
    """
    alike: dict[str, str] = {}
    for name in map(composed, names):
        other = alike.setdefault(name.casefold(), name)
        if other != name:
            raise ConfigError(
                f"{where}: the classes '{other}' and '{name}' differ only in case; rename one or merge them"
            )
    return list(alike.values())


def match(known: Sequence[str], names: Sequence[str], *, where: str, part: str, unit: str = "image") -> list[int]:
    """Return the class id of each name, by name and never by position.

    Args:
        known: C composed names of the classes of the training part, by class id.
        names: names of the classes of another part.
        where: folder, file or data set, for the message.
        part: the other part, for the message, such as "test/".
        unit: what one row is called, for the message.

    Raises:
        ConfigError: a name is not among the known ones, or differs from one only in case.
    """
    ids = {name: label for label, name in enumerate(known)}
    alone = [name for name in dict.fromkeys(map(composed, names)) if name not in ids]
    folded = {name.casefold(): name for name in known}
    for name in alone:
        if twin := folded.get(name.casefold()):
            raise ConfigError(
                f"{where}: the classes '{twin}' and '{name}' (in {part}) differ only in case; rename one or merge them"
            )
    if alone:
        raise ConfigError(f"{where}: only {part} has the classes {some(alone)}; add training {unit}s or remove them")
    return [ids[composed(name)] for name in names]
