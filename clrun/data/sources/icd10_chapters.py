"""Texts of ICD-10-CM -> their chapter: 21 classes that come one after the other."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Literal

from clrun.data.reading.icd10 import Chapter, Entry, chapters
from clrun.data.reading.options import PackageReading, loader
from clrun.data.reading.recipe import from_recipe, key
from clrun.data.stream import Dataset
from clrun.data.texts import fold

LEFT_OUT = 22  # codes for special purposes, five of them
LENGTH = 4  # characters without the point of the longest code whose title counts
TRAIN, TEST = 150, 50  # rows of each class
THREE = 3  # chapters of a task
Row = tuple[str, int, Literal["train", "test"]]


@loader
def icd10_chapters(reading: PackageReading) -> Dataset:
    """Return titles and inclusion terms of diagnoses, each with its chapter of ICD-10-CM as class: 3150 + 1045 texts.

    A class name is the title of the chapter. Group "three": chapters 1 to 3, 4 to 6, ..., which are the seven tasks of
    `scenario=fixed_groups scenario.groups=three`.

    Raises:
        ConfigError: the tabular list is not installed, or another release.
    """
    found = classes(chapters(reading.root))
    titles = [chapter.title for chapter in found]
    tasks = [range(k, min(k + THREE, len(titles))) for k in range(0, len(titles), THREE)]
    return from_recipe(
        "icd10_chapters",
        _found(reading.root),
        class_names=titles,
        reading=reading,
        groups={"three": {f"chapters {own[0] + 1}-{own[-1] + 1}": list(own) for own in tasks}},
    )


@cache
def _found(root: str | None) -> list[Row]:
    """Return the rows, made once per process."""
    return chapter_rows(chapters(root))


def classes(found: Mapping[int, Chapter]) -> list[Chapter]:
    """Return the chapters that are classes, by class id."""
    return [chapter for number, chapter in found.items() if number != LEFT_OUT]


def chapter_rows(found: Mapping[int, Chapter]) -> list[Row]:
    """Return text, class and part of each row: by class, training rows first.

    Texts of a chapter are the inclusion terms of all codes and the titles of codes of at most four characters. A text
    counts if its fold occurs in one chapter alone, over all titles and inclusion terms, and once: the first in file
    order. All texts of a category (three characters of the code) are in one part: near-duplicates never straddle it.

    Args:
        found: chapters by number.
    """
    homes: dict[str, set[int]] = {}
    for chapter in found.values():
        for entry in chapter.entries:
            homes.setdefault(fold(entry.text), set()).add(chapter.number)
    rows: list[Row] = []
    for label, chapter in enumerate(classes(found)):
        kept: dict[str, Entry] = {}
        for entry in chapter.entries:
            folded = fold(entry.text)
            if (not entry.title or len(entry.code.replace(".", "")) <= LENGTH) and len(homes[folded]) == 1 and folded:
                kept.setdefault(folded, entry)
        ranked = sorted(kept.values(), key=lambda entry: key("icd1", entry.text))
        rows += [(text, label, "train") for text in _of(ranked, test=False)[:TRAIN]]
        rows += [(text, label, "test") for text in _of(ranked, test=True)[:TEST]]
    return rows


def _of(entries: Sequence[Entry], *, test: bool) -> list[str]:
    """Return the texts of a part, which a hash of the category decides."""
    return [entry.text for entry in entries if (key("icd1", "category", entry.code[:3]) % 4 == 0) == test]
