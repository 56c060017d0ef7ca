"""Published data sets that are stored as arrays in the files that torchvision reads; kept in memory as uint8."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clrun.data.reading.assemble import Groups, Published, Rows, assemble, check_counts
from clrun.data.reading.options import ArrayReading
from clrun.data.stream import Dataset
from clrun.system import libraries
from clrun.system.errors import ConfigError, first_line

DIGIT_GROUPS: Groups = {
    "parity": ((0, 2, 4, 6, 8), (1, 3, 5, 7, 9)),
    "lookalike": ((0, 6), (1, 7), (2, 5), (3, 8), (4, 9)),
}


@dataclass(frozen=True)
class ArrayBenchmark:
    """A published data set of arrays.

    Attributes:
        name: as in `dataset=NAME`.
        title: name of the data set in errors.
        read: returns the training and the test part, given `root` and whether to download.
        layout: the files and folders that `root` must hold, in words.
        published: published numbers of rows and classes.
        mean: mean of each channel over the training images, in [0, 1] units.
        std: standard deviation of each channel, likewise.
        groups: named partitions of the classes.
        fix: correction of the images and labels of a part.
    """

    name: str
    title: str
    read: Callable[[Path, bool], tuple[Any, Any]]
    layout: str
    published: Published
    mean: tuple[float, ...]
    std: tuple[float, ...]
    groups: Groups = field(default_factory=dict)
    fix: Callable[[Tensor, Tensor], Rows] = lambda images, labels: (images, labels)

    def __hash__(self) -> int:
        """Hash the name, for the cache of what was read."""
        return hash(self.name)


def halves(kind: str, **options: Any) -> Callable[[Path, bool], tuple[Any, Any]]:
    """Return a reader of the two parts of a torchvision class with the parameter `train`."""

    def read(folder: Path, download: bool) -> tuple[Any, Any]:
        cls = getattr(libraries.load("torchvision.datasets"), kind)
        train, test = (cls(folder, train=train, download=download, **options) for train in (True, False))
        return train, test

    return read


def splits(kind: str) -> Callable[[Path, bool], tuple[Any, Any]]:
    """Return a reader of the two parts of a torchvision class with the parameter `split`."""

    def read(folder: Path, download: bool) -> tuple[Any, Any]:
        cls = getattr(libraries.load("torchvision.datasets"), kind)
        train, test = (cls(folder, split=split, download=download) for split in ("train", "test"))
        return train, test

    return read


def load(benchmark: ArrayBenchmark, reading: ArrayReading) -> Dataset:
    """Return a published data set of arrays; warn when its size is not the published one.

    Raises:
        ConfigError: the files are not under `reading.root`, or downloading failed.
    """
    folder = reading.home.absolute()
    try:
        if reading.download:
            benchmark.read(folder, True)
        train, test, names = _load(benchmark, folder)
    except ConfigError:
        raise
    except Exception as error:  # readers of damaged files raise almost anything
        remedy = "downloading failed" if reading.download else "or set dataset.download=true"
        raise ConfigError(
            f"dataset.root: {benchmark.title} cannot be read from {reading.root}: expected {benchmark.layout}; set "
            f"dataset.root or CLRUN_DATA to the folder that holds it, {remedy} ({first_line(error).partition('. ')[0]})"
        ) from error
    dataset = assemble(
        benchmark.name,
        train,
        test,
        class_names=names,
        mean=benchmark.mean,
        std=benchmark.std,
        groups=benchmark.groups,
        reading=reading,
    )
    return check_counts(benchmark.name, benchmark.published, dataset, reading.root)


@cache
def _load(benchmark: ArrayBenchmark, folder: Path) -> tuple[Rows, Rows, tuple[str, ...]]:
    """Return training rows, test rows and class names, read once per process."""
    train, test = benchmark.read(folder, False)
    return benchmark.fix(*_rows(train)), benchmark.fix(*_rows(test)), _class_names(train, benchmark)


def _class_names(part: Any, benchmark: ArrayBenchmark) -> tuple[str, ...]:
    """Return the names of the classes: those of torchvision without additions, or digits if it has none."""
    names = getattr(part, "classes", None) or [str(label) for label in range(benchmark.published.classes or 0)]
    return tuple(name.split(" - ")[0] for name in names if name != "N/A")  # MNIST's are "0 - zero", ...


def _rows(part: Any) -> Rows:
    """Return images [N, C, H, W] uint8 and labels [N] long of a part in memory."""
    images: Tensor = torch.as_tensor(np.ascontiguousarray(part.data))
    labels = part.targets if hasattr(part, "targets") else part.labels
    return images.unsqueeze(1) if images.ndim == 3 else images, torch.as_tensor(labels).long()
