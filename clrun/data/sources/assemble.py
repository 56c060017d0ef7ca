"""What all loaders share: validation rows and the finished `Dataset`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clrun.data.augment import parse_augmentations
from clrun.data.split import TensorSplit
from clrun.data.stream import Dataset
from clrun.errors import ConfigError
from clrun.seeding import derive

Rows = tuple[Tensor, Tensor]  # images [N, C, H, W] uint8, labels [N] long
Groups = Mapping[str, tuple[tuple[int, ...], ...]]


def assemble(
    name: str,
    train: Rows,
    test: Rows,
    *,
    class_names: Sequence[str],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    groups: Groups,
    val_fraction: float,
    seed: int,
    augment: Sequence[Any],
) -> Dataset:
    """Return the data set of rows in memory.

    Args:
        name: as in `dataset=NAME`.
        train: training images and labels; validation rows are cut from them.
        test: test images and labels.
        class_names: C names; the position is the class id.
        mean: mean of each channel over the training images, in [0, 1] units.
        std: standard deviation of each channel, likewise.
        groups: named partitions of the classes.
        val_fraction: share of each class's training rows to set aside for validation; 0 for none.
        seed: `dataset.seed`.
        augment: the training augmentations, as configured.

    Raises:
        ConfigError: `val_fraction` leaves a class without training rows, or an augmentation is unknown.
    """
    parse_augmentations(augment)  # a mistake is reported before any run begins
    rows = TensorSplit(*train)
    kept, held_out = cut_validation(rows.y, val_fraction, seed)
    return Dataset(
        name=name,
        train=rows if held_out is None else rows.select(kept),
        test=TensorSplit(*test),
        val=None if held_out is None else rows.select(held_out),
        num_classes=len(class_names),
        class_names=tuple(class_names),
        image_shape=tuple(train[0].shape[1:]),
        mean=mean,
        std=std,
        augment=tuple(augment),
        groups=groups,
        seed=seed,
    )


def cut_validation(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor | None]:
    """Return the rows to train on and those to validate on (None for fraction 0), both [k] long and ascending.

    Of each class the rounded `fraction` is set aside, at least one row, drawn by (seed, class) alone (with NumPy's
    RandomState, whose stream is frozen for all versions).

    Raises:
        ConfigError: a class keeps no training rows.
    """
    if fraction == 0:
        return torch.arange(len(labels)), None
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in sorted(set(labels.tolist())):
        rows = (labels == label).nonzero()[:, 0]
        count = max(1, round(fraction * len(rows)))
        if count >= len(rows):
            raise ConfigError(
                f"dataset.val_fraction: {fraction:g} leaves class {label} no training rows (it has {len(rows)}); "
                "choose a smaller fraction"
            )
        shuffled = np.random.RandomState(derive(seed, "validation", label) % 2**32).permutation(len(rows))
        held_out[rows[torch.from_numpy(shuffled[:count])]] = True
    return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
