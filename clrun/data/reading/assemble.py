"""The last steps of every loader: compare published sizes, cut the validation rows, make the `Dataset`."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from clrun.data.captions import Captions, captions
from clrun.data.reading.class_names import composed
from clrun.data.reading.options import Reading, TextReading
from clrun.data.reading.task_schema import check_parts, class_strings
from clrun.data.reading.text import some
from clrun.data.schema import Schema
from clrun.data.split import Split, TensorSplit
from clrun.data.stream import Dataset, Modality
from clrun.system.errors import ConfigError, did_you_mean, warn
from clrun.system.seeding import derive

Rows = tuple[Tensor, Tensor]  # images [N, C, H, W] uint8 (or rows of another kind), labels [N] long
OTHERS = "others"  # stands for all classes without a fraction of their own
KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*|0|[1-9][0-9]*")  # keys of mappings on the command line, but for NO_KEYS
NO_KEYS = ("true", "false", "null", "nan", "inf")
Groups = Mapping[str, tuple[tuple[int, ...], ...]]


@dataclass(frozen=True)
class Domains:
    """The domains of a data set's rows.

    Attributes:
        names: names of the D domains.
        train: [N] long, the domain of each training row.
        test: likewise for the test rows; None if every domain is tested on all test rows.
        val: likewise for the rows of a validation part; None without one.
    """

    names: Sequence[str]
    train: Tensor
    test: Tensor | None
    val: Tensor | None = None


@dataclass(frozen=True)
class Published:
    """The published numbers of rows and classes of a data set; None for a number that is not fixed.

    Attributes:
        train: number of training rows.
        test: number of test rows.
        classes: number of classes.
        total: number of rows of both parts.
    """

    train: int | None = None
    test: int | None = None
    classes: int | None = None
    total: int | None = None


def check_counts(name: str, published: Published, dataset: Dataset, where: str) -> Dataset:
    """Return the data set; warn if its numbers of rows and classes are not the published ones.

    Args:
        name: as in `dataset=NAME`.
        published: the published numbers.
        dataset: the data set as read.
        where: folder that it was read from.
    """
    train = len(dataset.train) + (0 if dataset.val is None else len(dataset.val))
    found = Published(train, len(dataset.test), dataset.num_classes, train + len(dataset.test))
    words = {"train": "training images", "test": "test images", "classes": "classes", "total": "images"}
    for key, what in words.items():
        expected, got = getattr(published, key), getattr(found, key)
        if expected is not None and got != expected:
            warn(f"dataset={name}: {got} {what} in {where}, published with {expected}")
    return dataset


def assemble(
    name: str,
    train: Rows | Split,
    test: Rows | Split,
    *,
    class_names: Sequence[str],
    mean: Iterable[float],
    std: Iterable[float],
    reading: Reading,
    val: Rows | Split | None = None,
    groups: Groups | None = None,
    group_names: Mapping[str, tuple[str, ...]] | None = None,
    domains: Domains | None = None,
    modality: Modality | None = None,
) -> Dataset:
    """Return the data set of these rows.

    Args:
        name: as in `dataset=NAME`.
        train: training rows, or images and labels in memory; the validation rows are taken from them.
        test: test rows, likewise.
        class_names: C names; the position is the class id.
        mean: mean of each channel over the training images, in [0, 1] units.
        std: standard deviation of each channel, likewise.
        reading: validation rows, seed and training augmentations.
        val: validation rows, likewise, of a data set that has such a part; None to take them from the training rows.
        groups: named partitions of the classes, for `scenario=fixed_groups`.
        group_names: names of the groups of some of these partitions.
        domains: the domains of the data set; validation rows are then taken from each class of each domain.
        modality: what kind of data the rows are; None for images [N, C, H, W], and for rows of numbers [N, D].

    Raises:
        ConfigError: `reading.val_fraction` leaves a class without training rows, there is a validation part already, or
            the schema of the task does not suit the classes or the domains.
    """
    _refuse_second_validation(val is not None, reading, class_names)
    check_parts(_schema(reading), () if domains is None else domains.names)
    rows = _stored(train)
    strata = rows.y if domains is None else domains.train * len(class_names) + rows.y
    kept, held_out = cut_validation(strata, reading.val_fraction, reading.seed, class_names=class_names)
    taken = None if held_out is None else rows.select(held_out)
    whole = Dataset(
        name=name,
        train=rows if held_out is None else rows.select(kept),
        test=_stored(test),
        val=taken if val is None else _stored(val),
        num_classes=len(class_names),
        class_names=tuple(class_names),
        shape=tuple(rows.images.shape[1:]),
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
        augment=tuple(reading.augment),
        groups=groups or {},
        group_names=group_names or {},
        seed=reading.seed,
        captions=_captions(name, class_names, reading, modality),
        modality=modality,
        schema=_schema(reading),
    )
    return whole if domains is None else replace(whole, parts=_domain_parts(whole, domains, kept, held_out))


def _stored(part: Rows | Split) -> Split:
    """Return rows as a split."""
    return part if isinstance(part, Split) else TensorSplit(*part)


def _refuse_second_validation(given: bool, reading: Reading, class_names: Sequence[str]) -> None:
    """Refuse to take validation rows from the training rows of a data set that has a validation part (`given`).

    Raises:
        ConfigError: see above.
    """
    if given and any(_fractions(reading.val_fraction, class_names).values()):
        raise ConfigError(
            "dataset.val_fraction: the data set has a validation part already; set dataset.val_fraction=0, or leave "
            "the part out of dataset.splits, as in dataset.splits={train: train, test: test}"
        )


def _schema(reading: Reading) -> Schema | None:
    """Return the schema of a data set of texts; None for other data."""
    return reading.schema if isinstance(reading, TextReading) else None


def _captions(name: str, class_names: Sequence[str], reading: Reading, modality: Modality | None) -> Captions:
    """Return the captions of the classes; a text is compared with the name of a class itself, not with a caption.

    Raises:
        ConfigError: the words of the classes do not suit their names.
    """
    plain = ("{}",) if modality is not None and modality.unit == "text" else None
    templates = plain if reading.templates is None else reading.templates
    strings = class_strings(_schema(reading), class_names)
    return captions(name, class_names, templates=templates, words=reading.class_names, strings=strings)


def _domain_parts(whole: Dataset, domains: Domains, kept: Tensor, held_out: Tensor | None) -> tuple[Dataset, ...]:
    """Return each domain of a data set as a data set.

    Args:
        whole: the data set.
        domains: its domains.
        kept: [k] long, the training rows that are left after the validation rows were taken.
        held_out: likewise the validation rows that were taken; None without any.
    """
    trained, validated = domains.train[kept], domains.val if held_out is None else domains.train[held_out]
    parts = []
    for k, domain in enumerate(domains.names):
        test = whole.test if domains.test is None else whole.test.select(_of(k, domains.test))
        val = None if whole.val is None or validated is None else whole.val.select(_of(k, validated))
        parts.append(replace(whole, name=domain, train=whole.train.select(_of(k, trained)), test=test, val=val))
    return tuple(parts)


def _of(domain: int, domains: Tensor) -> Tensor:
    """Return the rows of one domain, [k] long."""
    return (domains == domain).nonzero()[:, 0]


def cut_validation(
    labels: Tensor, fraction: float | Mapping[str, float], seed: int, *, class_names: Sequence[str] = ()
) -> tuple[Tensor, Tensor | None]:
    """Return the rows to train on and those to validate on (None for fraction 0), both [k] long and ascending.

    Of each class the rounded fraction is set aside, but at least one row; a class with one row keeps it, and a warning
    names it. The rows are drawn by (seed, class) alone with NumPy's RandomState, whose stream is the same in all
    versions.

    Args:
        labels: [N] long, class ids; or domain * C + class id to take the fraction from each class of each domain.
        fraction: fraction of each class; or fractions by names of classes, see `Reading.val_fraction`.
        seed: `dataset.seed`.
        class_names: C names.

    Raises:
        ConfigError: a class would have no training rows left, or there is no class of a given name.
    """
    fractions = _fractions(fraction, class_names)
    if not any(fractions.values()):
        return torch.arange(len(labels)), None
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    single, empty = [], []
    for label in sorted(set(labels.tolist())):
        rows = (labels == label).nonzero()[:, 0]
        name = class_names[label % len(class_names)] if class_names else str(label)
        own = fractions.get(name, fractions[OTHERS])
        count = max(1, round(own * len(rows))) if own else 0
        if len(rows) == count == 1 and own < 1:
            single.append(name)
            continue
        if count >= len(rows):
            empty.append((name, own, len(rows)))
            continue
        shuffled = np.random.RandomState(derive(seed, "validation", label) % 2**32).permutation(len(rows))
        held_out[rows[torch.from_numpy(shuffled[:count])]] = True
    if empty:
        name, own, rows_of = empty[0]
        more = f" and {len(empty) - 1} more classes" if len(empty) > 1 else ""
        raise ConfigError(
            f"dataset.val_fraction: {own:g} leaves class {name}{more} no training rows (it has {rows_of}); choose a "
            f"smaller fraction{'' if more else _for_one(name, fractions)}"
        )
    if single:
        warn(f"dataset.val_fraction: no validation rows of {some(single)}, with one training row each")
    return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]


def _fractions(fraction: float | Mapping[str, float], class_names: Sequence[str]) -> dict[str, float]:
    """Return the fraction of each class that is named, and that of all others under `OTHERS`.

    Raises:
        ConfigError: there is no class of a given name.
    """
    if not isinstance(fraction, Mapping):
        return {OTHERS: fraction}
    given = {composed(str(name)): value for name, value in fraction.items()}
    for name in given:
        if name != OTHERS and name not in class_names:
            hint = did_you_mean(name, class_names)
            raise ConfigError(f"dataset.val_fraction: there is no class {name!r}{hint} ({some(class_names)})")
    return {OTHERS: 0.0} | given


def _for_one(name: str, fractions: Mapping[str, float]) -> str:
    """Return how a class gets a fraction of its own; "" where the command line has no way to write its name."""
    if not KEY.fullmatch(name) or name.casefold() in NO_KEYS:
        return ""
    return f", for this class alone as in 'dataset.val_fraction={{{name}: 0, others: {fractions[OTHERS]:g}}}'"


def one_fraction(reading: Reading) -> None:
    """Refuse fractions by class for a sequence of data sets, whose classes may have equal names.

    Raises:
        ConfigError: see above.
    """
    if isinstance(reading.val_fraction, Mapping):
        raise ConfigError(
            "dataset.val_fraction: fractions by class are for a single data set, and this one consists of several; set "
            "it to one number"
        )
