"""ICD-10-CM, the diagnoses of the United States: titles and inclusion terms of all codes by chapter.

The tabular list is published by the Centers for Disease Control and Prevention and the Centers for Medicare & Medicaid
Services, and is a work of the United States government; the package that brings it is MIT-licensed. It is read from the
user's own copy, and no part of it comes with clrun.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from xml.etree import ElementTree

from clrun.data.reading.recipe import Source

SOURCE = Source(
    package="simple_icd_10_cm",
    inside="data/icd10c-tabular-April-1-2026.xml",
    sha256="f161f8182aff3ce3a2a78e202f8259c08eaee2c670a9e45b0072445c52302935",
    release="the tabular list of ICD-10-CM of April 2026",
    install="simple-icd-10-cm==1.5.0",
)
RANGE = re.compile(r"\s*\([^()]*-[^()]*\)\s*$")  # of codes, behind the title of a chapter


@dataclass(frozen=True)
class Entry:
    """A text of a code.

    Attributes:
        code: such as "A00.1".
        text: the text.
        title: whether it is the title of the code; else an inclusion term.
    """

    code: str
    text: str
    title: bool


@dataclass(frozen=True)
class Chapter:
    """A chapter.

    Attributes:
        number: from 1.
        title: without the range of its codes.
        entries: its texts in file order; the title of a code stands before its inclusion terms.
    """

    number: int
    title: str
    entries: Sequence[Entry]


def parse(content: bytes) -> Mapping[int, Chapter]:
    """Return the chapters of a tabular list by number."""
    chapters = (_chapter(node) for node in ElementTree.fromstring(content).iter("chapter"))
    return {chapter.number: chapter for chapter in sorted(chapters, key=lambda chapter: chapter.number)}


def _chapter(node: ElementTree.Element) -> Chapter:
    """Return the chapter of a node."""
    title = RANGE.sub("", node.findtext("desc", "").strip())
    return Chapter(int(node.findtext("name", "0")), title, tuple(_entries(node)))


def _entries(chapter: ElementTree.Element) -> Iterator[Entry]:
    """Yield the texts of all codes of a chapter."""
    for node in chapter.iter("diag"):
        code = node.findtext("name", "").strip()
        yield Entry(code, node.findtext("desc", "").strip(), True)
        for note in node.findall("inclusionTerm/note"):
            yield Entry(code, (note.text or "").strip(), False)


@cache
def chapters(root: str | None) -> Mapping[int, Chapter]:
    """Return the chapters of the file that `SOURCE` finds, read once per process.

    Raises:
        ConfigError: the file is missing or another release.
    """
    return parse(SOURCE.read(root))


__all__ = ["SOURCE", "Chapter", "Entry", "chapters", "parse"]
