"""Data sets that come with installed packages: no download, no folder."""

from functools import cache
from typing import Any

import torch

from clrun.data.sources.assemble import Groups, Rows, assemble
from clrun.data.stream import Dataset
from clrun.system import libraries
from clrun.system.errors import Fraction

DIGIT_GROUPS: Groups = {
    "parity": ((0, 2, 4, 6, 8), (1, 3, 5, 7, 9)),
    "lookalike": ((0, 6), (1, 7), (2, 5), (3, 8), (4, 9)),
}


def digits(*, val_fraction: Fraction, seed: int, augment: list[Any]) -> Dataset:
    """Return scikit-learn's handwritten digits: 1797 real 8x8 grey images of 10 classes (UCI optdigits, test part).

    The split into 1442 training and 355 test images is the same for every seed: of each class, every fifth image in
    file order is a test image. The 17 grey levels 0..16 are stored as 0..255. Groups: "parity" (even, odd) and
    "lookalike" (five pairs that are easily confused).
    """
    train, test = _digits()
    return assemble(
        "digits",
        train,
        test,
        class_names=[str(digit) for digit in range(10)],
        mean=(0.3052,),
        std=(0.3760,),
        groups=DIGIT_GROUPS,
        val_fraction=val_fraction,
        seed=seed,
        augment=augment,
    )


@cache
def _digits() -> tuple[Rows, Rows]:
    """Return training and test rows, read once a process."""
    bunch = libraries.load("sklearn.datasets").load_digits()
    levels = torch.from_numpy(bunch.images).float()
    images = (levels * 255 / 16).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    rank = torch.empty_like(labels)  # how many rows of the same class come before
    for label in range(10):
        rows = labels == label
        rank[rows] = torch.arange(int(rows.sum()))
    test = rank % 5 == 4
    return (images[~test], labels[~test]), (images[test], labels[test])
