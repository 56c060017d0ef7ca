"""Entity linking on the Human Phenotype Ontology: a mention of a finding -> its concept; tasks are organ systems."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from clrun.data.reading.hpo import Ontology, Term, ontology
from clrun.data.reading.options import PackageReading, loader
from clrun.data.reading.recipe import from_recipe, key
from clrun.data.stream import Dataset
from clrun.data.texts import fold

TASKS: Mapping[str, str] = {
    "HP:0000707": "nervous system",
    "HP:0000152": "head and neck",
    "HP:0033127": "musculoskeletal",
    "HP:0001939": "metabolism",
    "HP:0000478": "eye",
    "HP:0000119": "genitourinary",
    "HP:0001574": "integument",
    "HP:0001626": "cardiovascular",
}
SELECTIONS: Mapping[str, tuple[tuple[str, ...], int | None]] = {  # branches in task order; concepts of each
    "hpo_linking": (tuple(TASKS), None),
    "hpo_linking_3": (tuple(TASKS)[:3], None),
    "hpo_linking_small": (("HP:0000707", "HP:0033127", "HP:0000152"), 100),
}
TEST = 0.3  # fraction of a concept's mentions that are test rows, at least one
MENTIONS = 2  # fewest of a concept
Part = Literal["train", "test"]


@loader
def hpo_linking(reading: PackageReading, *, selection: Literal["eight", "three", "small"]) -> Dataset:
    """Return mentions of medical findings, each with its concept in the Human Phenotype Ontology as class.

    A class name is the name of the concept. Group "branch": the organ systems, which are the tasks of
    `scenario=fixed_groups scenario.groups=branch`.

    Args:
        reading: the common options.
        selection: "eight" organ systems with 2026 concepts, the first "three" of them with 1136, or "small", three
            organ systems with 100 concepts each.

    Raises:
        ConfigError: `hp.obo` is not installed, or another release.
    """
    names = {"eight": "hpo_linking", "three": "hpo_linking_3", "small": "hpo_linking_small"}
    name = names[selection]
    found = _found(name, reading.root)
    branches = [TASKS[branch] for branch in SELECTIONS[name][0]]
    tasks = [task for _, _, task in found.concepts]
    return from_recipe(
        name,
        [(text, label, part) for text, label, _, part, _ in found.rows],
        class_names=[concept for _, concept, _ in found.concepts],
        reading=reading,
        groups={"branch": {name: [k for k, own in enumerate(tasks) if own == t] for t, name in enumerate(branches)}},
    )


@cache
def _found(name: str, root: str | None) -> "Linking":
    """Return the benchmark of this name, made once per process."""
    return linking(ontology(root), *SELECTIONS[name])


@dataclass(frozen=True)
class Linking:
    """A benchmark of entity linking.

    Attributes:
        concepts: id, name and task of each class.
        rows: text, class, task, part and type of synonym ("" for none) of each mention, by class.
    """

    concepts: Sequence[tuple[str, str, int]]
    rows: Sequence[tuple[str, int, int, Part, str]]


def linking(ontology: Ontology, branches: Sequence[str], limit: int | None = None) -> Linking:
    """Return the benchmark on these branches.

    A concept is a term that lies in one branch alone, is not that branch, and has a name whose fold is that of no other
    term. Its mentions are the EXACT synonyms whose folds are not empty, not the name's, not an earlier mention's and
    those of no other term. Concepts with fewer than two mentions are left out. Of the mentions of a concept, in the
    order of their keys, the first round(0.3 n) are test rows, but at least one.

    Args:
        ontology: the terms.
        branches: ids of the branches in the order of the tasks.
        limit: largest number of concepts of a branch, the first by key; None for all.
    """
    mentions = {term.id: own for term in ontology.terms.values() if (own := _mentions(ontology, term))}
    concepts: list[tuple[str, str, int]] = []
    rows: list[tuple[str, int, int, Part, str]] = []
    for task, branch in enumerate(branches):
        ids = [name for name in mentions if ontology.branches[name] == {branch}]
        chosen = sorted(ids, key=lambda name: key("hpo1", "concept", name))[:limit]
        for name in sorted(chosen):
            own = sorted(mentions[name], key=lambda mention: key("hpo1", "mention", name, mention[0]))  # noqa: B023
            held_out = max(1, round(TEST * len(own)))
            parts: list[Part] = ["test" if k < held_out else "train" for k in range(len(own))]
            rows += [(text, len(concepts), task, part, kind) for (text, kind), part in zip(own, parts, strict=True)]
            concepts.append((name, ontology.terms[name].name, task))
    return Linking(concepts, rows)


def _mentions(ontology: Ontology, term: Term) -> list[tuple[str, str]]:
    """Return text and type of the mentions of a concept, by text; none of a term that is no concept."""

    def own(text: str) -> bool:
        return ontology.owners[text] == {term.id}

    alone = len(ontology.branches[term.id]) == 1 and term.id not in ontology.roots
    if not alone or not own(fold(term.name)):
        return []
    seen, found = {"", fold(term.name)}, []
    for synonym in term.synonyms:
        folded = fold(synonym.text)
        if synonym.scope == "EXACT" and folded not in seen and own(folded):
            seen.add(folded)
            found.append((synonym.text, synonym.kind))
    return found if len(found) >= MENTIONS else []
