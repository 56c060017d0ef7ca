"""Texts -> organ systems in five registers of language, from technical to lay: a domain-incremental benchmark."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

from clrun.data.reading.hpo import Ontology, ontology
from clrun.data.reading.icd10 import Chapter, chapters
from clrun.data.reading.options import PackageReading, loader
from clrun.data.reading.recipe import from_recipe, key
from clrun.data.stream import Dataset
from clrun.data.texts import fold

DOMAINS = ("icd_title", "icd_inclusion", "hpo_name", "hpo_synonym", "hpo_layperson")
ROWS = 80  # of each class of each domain
TEST = 0.25  # fraction of them that are test rows
Row = tuple[str, int, int, Literal["train", "test"]]


@dataclass(frozen=True)
class System:
    """An organ system.

    Attributes:
        name: name of the class.
        chapter: number of its chapter in ICD-10-CM.
        branches: ids of its branches in the Human Phenotype Ontology.
    """

    name: str
    chapter: int
    branches: frozenset[str]


SYSTEMS = tuple(
    System(name, chapter, frozenset(branches))
    for name, chapter, branches in (
        ("nervous system", 6, ("HP:0000707",)),
        ("eye", 7, ("HP:0000478",)),
        ("ear", 8, ("HP:0000598",)),
        ("circulatory system", 9, ("HP:0001626",)),
        ("respiratory system", 10, ("HP:0002086",)),
        ("digestive system", 11, ("HP:0025031",)),
        ("skin", 12, ("HP:0001574",)),
        ("musculoskeletal system", 13, ("HP:0033127",)),
        ("genitourinary system", 14, ("HP:0000119",)),
        ("blood and immune system", 3, ("HP:0001871", "HP:0002715")),
    )
)


@loader
def body_systems(reading: PackageReading) -> Dataset:
    """Return texts of ten organ systems in five domains, from technical to lay language: 2990 + 996 texts.

    Titles and inclusion terms are those of ICD-10-CM, names and synonyms those of the Human Phenotype Ontology.
    The domains are the parts for `scenario=dataset_sequence scenario.setting=dil`, and `task_order=body_systems` names
    the ways from technical to lay language and back.

    Args:
        reading: the common options; `root` is a folder with both files.

    Raises:
        ConfigError: one of the files is not installed, or another release.
    """
    rows = _found(reading.root)
    return from_recipe(
        "body_systems",
        [(text, label, part) for text, label, _, part in rows],
        class_names=[system.name for system in SYSTEMS],
        reading=reading,
        domains=(DOMAINS, [domain for _, _, domain, _ in rows]),
    )


@cache
def _found(root: str | None) -> list[Row]:
    """Return the rows, made once per process."""
    return system_rows(ontology(root), chapters(root))


def system_rows(terms: Ontology, found: Mapping[int, Chapter]) -> list[Row]:
    """Return text, class, domain and part of each row, by class and domain.

    Domains: titles and inclusion terms of the chapter of a class; names, EXACT synonyms that are not marked layperson,
    and EXACT synonyms that are, of the terms all of whose branches are the class's, without the branches themselves. A
    fold that occurs in several classes is dropped; one in several domains of a class stays in the first. Of each class
    and domain the first 80 by key are rows, and the first quarter of them test rows.

    Args:
        terms: the terms of the ontology.
        found: chapters by number.
    """
    texts = [list(_texts(system, terms, found)) for system in SYSTEMS]
    homes: dict[str, set[int]] = {}
    for label, own in enumerate(texts):
        for _, text in own:
            homes.setdefault(fold(text), set()).add(label)
    rows: list[Row] = []
    for label, own in enumerate(texts):
        kept: dict[str, tuple[int, str]] = {}
        for domain, text in own:
            if (folded := fold(text)) and len(homes[folded]) == 1:
                kept.setdefault(folded, (domain, text))
        for domain in range(len(DOMAINS)):
            of_domain = [text for d, text in kept.values() if d == domain]
            chosen = sorted(of_domain, key=lambda text: key("body1", domain, text))[:ROWS]  # noqa: B023
            held_out = round(TEST * len(chosen))
            rows += [(text, label, domain, "test" if k < held_out else "train") for k, text in enumerate(chosen)]
    return rows


def _texts(system: System, terms: Ontology, found: Mapping[int, Chapter]) -> Iterator[tuple[int, str]]:
    """Yield the domain and the text of all texts of a class, by domain."""
    entries = found[system.chapter].entries
    yield from ((0, entry.text) for entry in entries if entry.title)
    yield from ((1, entry.text) for entry in entries if not entry.title)
    own = [
        term
        for term in terms.terms.values()
        if (branches := terms.branches[term.id]) and branches <= system.branches and term.id not in terms.roots
    ]
    yield from ((2, term.name) for term in own)
    exact = [synonym for term in own for synonym in term.synonyms if synonym.scope == "EXACT"]
    yield from ((3, synonym.text) for synonym in exact if synonym.kind != "layperson")
    yield from ((4, synonym.text) for synonym in exact if synonym.kind == "layperson")
