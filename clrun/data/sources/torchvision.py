"""Small benchmarks that torchvision reads: held in memory as uint8, once a process."""

import pickle
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clrun import libraries
from clrun.data.sources.assemble import Groups, Rows, assemble
from clrun.data.sources.embedded import DIGIT_GROUPS
from clrun.data.stream import Dataset
from clrun.errors import ConfigError, Fraction

LAYOUT = {
    "MNIST": "MNIST/raw/ with train-images-idx3-ubyte, train-labels-idx1-ubyte and the same of t10k",
    "FashionMNIST": "FashionMNIST/raw/ with the four idx files of MNIST's names",
    "CIFAR10": "cifar-10-batches-py/ with data_batch_1 to data_batch_5, test_batch and batches.meta",
    "CIFAR100": "cifar-100-python/ with train, test and meta",
}
SUPERCLASSES: Groups = {
    "superclass": (
        (4, 30, 55, 72, 95),
        (1, 32, 67, 73, 91),
        (54, 62, 70, 82, 92),
        (9, 10, 16, 28, 61),
        (0, 51, 53, 57, 83),
        (22, 39, 40, 86, 87),
        (5, 20, 25, 84, 94),
        (6, 7, 14, 18, 24),
        (3, 42, 43, 88, 97),
        (12, 17, 37, 68, 76),
        (23, 33, 49, 60, 71),
        (15, 19, 21, 31, 38),
        (34, 63, 64, 66, 75),
        (26, 45, 77, 79, 99),
        (2, 11, 35, 46, 98),
        (27, 29, 44, 78, 93),
        (36, 50, 65, 74, 80),
        (47, 52, 56, 59, 96),
        (8, 13, 48, 58, 90),
        (41, 69, 81, 85, 89),
    )
}
UNREADABLE = (RuntimeError, OSError, EOFError, ValueError, KeyError, AssertionError, pickle.UnpicklingError)


def mnist(*, root: str, download: bool, val_fraction: Fraction, seed: int, augment: list[Any]) -> Dataset:
    """Return MNIST (LeCun et al. 1998): 60000 + 10000 grey 28x28 images of 10 digits.

    Groups: "parity" (even, odd) and "lookalike" (five pairs that are easily confused).

    Raises:
        ConfigError: the files are not under `root`, or downloading failed.
    """
    facts = _Facts("mnist", "MNIST", (0.1307,), (0.3081,), DIGIT_GROUPS)
    return _dataset(facts, root, download, val_fraction=val_fraction, seed=seed, augment=augment)


def fashion_mnist(*, root: str, download: bool, val_fraction: Fraction, seed: int, augment: list[Any]) -> Dataset:
    """Return Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747): 60000 + 10000 grey 28x28 images of 10 garments.

    Raises:
        ConfigError: the files are not under `root`, or downloading failed.
    """
    facts = _Facts("fashion_mnist", "FashionMNIST", (0.2860,), (0.3530,))
    return _dataset(facts, root, download, val_fraction=val_fraction, seed=seed, augment=augment)


def cifar10(*, root: str, download: bool, val_fraction: Fraction, seed: int, augment: list[Any]) -> Dataset:
    """Return CIFAR-10 (Krizhevsky 2009): 50000 + 10000 colour 32x32 images of 10 classes.

    Groups: "kind" (vehicles, animals).

    Raises:
        ConfigError: the files are not under `root`, or downloading failed.
    """
    kinds = {"kind": ((0, 1, 8, 9), (2, 3, 4, 5, 6, 7))}
    facts = _Facts("cifar10", "CIFAR10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2615), kinds)
    return _dataset(facts, root, download, val_fraction=val_fraction, seed=seed, augment=augment)


def cifar100(*, root: str, download: bool, val_fraction: Fraction, seed: int, augment: list[Any]) -> Dataset:
    """Return CIFAR-100 (Krizhevsky 2009): 50000 + 10000 colour 32x32 images of 100 classes, ids in alphabetical order.

    Groups: "superclass", the 20 coarse classes of 5 fine ones, by ascending coarse label.

    Raises:
        ConfigError: the files are not under `root`, or downloading failed.
    """
    facts = _Facts("cifar100", "CIFAR100", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), SUPERCLASSES)
    return _dataset(facts, root, download, val_fraction=val_fraction, seed=seed, augment=augment)


@dataclass(frozen=True)
class _Facts:
    """What torchvision does not know of a data set: our name, its class, constants per channel, named groups."""

    name: str
    kind: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    groups: Groups = field(default_factory=dict)


def _dataset(
    facts: _Facts, root: str, download: bool, *, val_fraction: float, seed: int, augment: list[Any]
) -> Dataset:
    """Return the assembled data set."""
    train, test, names = _read(facts.kind, root, download)
    return assemble(
        facts.name,
        train,
        test,
        class_names=names,
        mean=facts.mean,
        std=facts.std,
        groups=facts.groups,
        val_fraction=val_fraction,
        seed=seed,
        augment=augment,
    )


def _read(kind: str, root: str, download: bool) -> tuple[Rows, Rows, tuple[str, ...]]:
    """Return training rows, test rows and class names of a torchvision data set."""
    folder = Path(root).expanduser().absolute()
    try:
        if download:
            _parts(kind, folder, True)
        return _load(kind, folder)
    except UNREADABLE as error:
        remedy = "downloading failed" if download else "or set dataset.download=true"
        raise ConfigError(
            f"dataset.root: {kind} cannot be read from {root}: expected {LAYOUT[kind]}; set dataset.root or CLRUN_DATA "
            f"to the folder that holds it, {remedy} ({_reason(error)})"
        ) from error


@cache
def _load(kind: str, folder: Path) -> tuple[Rows, Rows, tuple[str, ...]]:
    """Return the rows of a folder, read once a process."""
    train, test = _parts(kind, folder, False)
    names = tuple(name.split(" - ")[0] for name in train.classes)  # MNIST's are "0 - zero", ...
    return _rows(train), _rows(test), names


def _parts(kind: str, folder: Path, download: bool) -> tuple[Any, Any]:
    """Return torchvision's training and test part."""
    read = getattr(libraries.load("torchvision.datasets"), kind)
    return read(folder, train=True, download=download), read(folder, train=False, download=download)


def _rows(part: Any) -> Rows:
    """Return images [N, C, H, W] uint8 and labels [N] long of a torchvision data set in memory."""
    images: Tensor = torch.as_tensor(part.data)
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return images, torch.as_tensor(part.targets).long()


def _reason(error: Exception) -> str:
    """Return the first sentence of an error's text."""
    return (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
