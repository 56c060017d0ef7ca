"""The handwritten digits that come with scikit-learn: no download, no folder."""

import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
import torch

from clrun.data.reading.arrays import DIGIT_GROUPS
from clrun.data.reading.assemble import Rows, assemble
from clrun.data.reading.options import Reading, loader
from clrun.data.stream import Dataset
from clrun.system import libraries


@loader
def digits(reading: Reading) -> Dataset:
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
        reading=reading,
    )


@cache
def _digits() -> tuple[Rows, Rows]:
    """Return training and test rows, read once per process."""
    table = _table()  # [1797, 65]: 64 grey levels, then the label
    levels = torch.from_numpy(table[:, :-1]).float().view(-1, 1, 8, 8)
    images = (levels * 255 / 16).round().to(torch.uint8)
    labels = torch.from_numpy(table[:, -1]).long()
    rank = torch.empty_like(labels)  # how many rows of the same class come before
    for label in range(10):
        rows = labels == label
        rank[rows] = torch.arange(int(rows.sum()))
    test = rank % 5 == 4
    return (images[~test], labels[~test]), (images[test], labels[test])


def _table() -> "np.ndarray[tuple[int, int], np.dtype[np.uint8]]":
    """Return scikit-learn's table of digits, one row per image.

    Its file is read without importing scikit-learn, which takes a second. A release that keeps the file elsewhere is
    asked for its content.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    spec = importlib.util.find_spec("sklearn")
    for folder in (spec and spec.submodule_search_locations) or ():
        file = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            return np.loadtxt(file, delimiter=",", dtype=np.uint8)
    bunch = libraries.load("sklearn.datasets").load_digits()
    return np.column_stack([bunch.data, bunch.target]).astype(np.uint8)
