"""Generated texts whose difficulty and similarity between tasks are known, because they are options."""

from functools import lru_cache

import torch
from torch import Tensor

from clrun.data.modality import Texts
from clrun.data.reading.assemble import Domains, assemble
from clrun.data.reading.options import TextReading, loader
from clrun.data.split import TensorSplit
from clrun.data.stream import Dataset
from clrun.data.texts import to_bytes
from clrun.system.errors import Fraction, PositiveInt
from clrun.system.seeding import generator

OWN, COMMON = 8, 40  # words of each class, and those of all classes
SYLLABLES = tuple(c + v for c in "bdfgklmnprstvz" for v in "aeiou")


@loader
def text_synthetic(
    reading: TextReading,
    *,
    num_classes: PositiveInt,
    train_rows: PositiveInt,
    test_rows: PositiveInt,
    words: PositiveInt,
    difficulty: Fraction,
    similarity: Fraction,
    period: PositiveInt,
    domains: PositiveInt,
) -> Dataset:
    """Return texts of invented words: each class has words of its own, and some belong to all classes.

    A text has 1 to `words` words; each is one of all classes with the probability `difficulty`, and else one of the
    eight words of its class, but the first word is always the class's. Classes `period` apart share the fraction
    `similarity` of their words. In each domain all words have another ending.

    Args:
        reading: the common options; the seed also determines the texts.
        num_classes: C.
        train_rows: training texts of each class in each domain.
        test_rows: test texts, likewise.
        words: largest number of words of a text.
        difficulty: probability of a word that says nothing about the class.
        similarity: fraction of words that classes `period` apart have in common.
        period: distance of similar classes, normally the classes of a task.
        domains: number of domains, for `scenario=dataset_sequence`; 1 for none.

    Raises:
        ConfigError: `dataset.augment` names an augmentation of images.
    """
    shape = num_classes, train_rows, test_rows, words, difficulty, similarity, period, domains
    stored, labels, domain, tested = _generate(*shape, reading.seed)
    train, test = (~tested).nonzero()[:, 0], tested.nonzero()[:, 0]
    names = [f"domain {k}" for k in range(domains)]
    return assemble(
        "text_synthetic",
        TensorSplit(stored, labels, train),
        TensorSplit(stored, labels, test),
        class_names=[own_words(label, similarity, period)[0] for label in range(num_classes)],
        mean=(),
        std=(),
        reading=reading,
        domains=Domains(names, domain[train], domain[test]) if domains > 1 else None,
        modality=Texts(),
    )


@lru_cache(maxsize=8)
def _generate(
    num_classes: int,
    train_rows: int,
    test_rows: int,
    words: int,
    difficulty: float,
    similarity: float,
    period: int,
    domains: int,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return bytes [M, W], labels [M], domains [M] and which rows are test rows [M], made once per process."""
    texts, facts = [], []
    for domain in range(domains):
        for label in range(num_classes):
            own = own_words(label, similarity, period)
            for part, count in enumerate((train_rows, test_rows)):
                drawn = generator(seed, "text_synthetic", domain, label, part)
                texts += [_text(own, words, difficulty, domain, drawn) for _ in range(count)]
                facts += [(label, domain, part)] * count
    labels, domain_of, part_of = torch.tensor(facts).T.contiguous()
    return to_bytes(texts), labels, domain_of, part_of.bool()


def own_words(label: int, similarity: float, period: int) -> list[str]:
    """Return the eight words of a class; the last ones are those of the class `period` before, if similar."""
    shared = round(similarity * OWN) if label >= period else 0
    before = own_words(label - period, similarity, period)[:shared] if shared else []
    return [_word(COMMON + label * OWN + k) for k in range(OWN - shared)] + before


def _text(own: list[str], words: int, difficulty: float, domain: int, drawn: torch.Generator) -> str:
    """Return a text of 1 to `words` words."""
    count = int(torch.randint(1, words + 1, (1,), generator=drawn))
    common = torch.rand(count, generator=drawn) < difficulty
    choice = torch.randint(2**31, (count,), generator=drawn).tolist()
    found = [_word(c % COMMON) if common[k] and k else own[c % OWN] for k, c in enumerate(choice)]
    ending = SYLLABLES[-domain] if domain else ""
    return " ".join(word + ending for word in found)


def _word(number: int) -> str:
    """Return an invented word; different numbers give different words."""
    first, rest = number % len(SYLLABLES), number // len(SYLLABLES)
    return SYLLABLES[first] + (_word(rest - 1) if rest else "")
