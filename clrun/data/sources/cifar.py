"""CIFAR-10 and CIFAR-100."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clrun.data.reading.arrays import ArrayBenchmark, load
from clrun.data.reading.assemble import Groups, Published
from clrun.data.reading.options import ArrayReading, loader
from clrun.data.reading.pickles import read_arrays
from clrun.data.stream import Dataset
from clrun.system import libraries

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


@loader
def cifar10(reading: ArrayReading) -> Dataset:
    """Return CIFAR-10 (Krizhevsky 2009): 50000 + 10000 colour 32x32 images of 10 classes.

    Groups: "kind" (vehicles, animals).

    Raises:
        ConfigError: the files are not under `root`, or downloading failed.
    """
    return load(CIFAR10, reading)


@loader
def cifar100(reading: ArrayReading) -> Dataset:
    """Return CIFAR-100 (Krizhevsky 2009): 50000 + 10000 colour 32x32 images of 100 classes, ids in alphabetical order.

    Groups: "superclass", the 20 coarse classes of 5 fine ones, by ascending coarse label.

    Raises:
        ConfigError: the files are not under `root`, or downloading failed.
    """
    return load(CIFAR100, reading)


@dataclass(frozen=True)
class _Batches:
    """One part of CIFAR, with the attributes of torchvision's classes."""

    data: np.ndarray[Any, Any]
    targets: list[int]
    classes: list[str]


def _cifar(kind: str) -> Callable[[Path, bool], tuple[Any, Any]]:
    """Return a reader of CIFAR's pickles that compares their checksums and never runs code in them."""

    def read(folder: Path, download: bool) -> tuple[Any, Any]:
        cls = getattr(libraries.load("torchvision.datasets"), kind)
        utils = libraries.load("torchvision.datasets.utils")
        home = folder / cls.base_folder
        files = [*cls.train_list, *cls.test_list, (cls.meta["filename"], cls.meta["md5"])]
        if download and not all(utils.check_integrity(home / name, md5) for name, md5 in files):
            utils.download_and_extract_archive(cls.url, folder, filename=cls.filename, md5=cls.tgz_md5)
        for name, md5 in files:
            if not utils.check_integrity(home / name, md5):
                raise RuntimeError(f"{name} is missing or has another checksum")
        names = read_arrays(home / cls.meta["filename"])[cls.meta["key"]]
        parts = ([read_arrays(home / name) for name, _ in files] for files in (cls.train_list, cls.test_list))
        train, test = (_batches(part, names) for part in parts)
        return train, test

    return read


def _batches(batches: list[dict[str, Any]], names: list[str]) -> _Batches:
    """Return the content of several of CIFAR's pickles as one part."""
    labels = [label for batch in batches for label in batch["labels" if "labels" in batch else "fine_labels"]]
    return _Batches(np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32), labels, list(names))


CIFAR10 = ArrayBenchmark(
    "cifar10",
    "CIFAR10",
    _cifar("CIFAR10"),
    "cifar-10-batches-py/ with data_batch_1 to data_batch_5, test_batch and batches.meta",
    Published(50000, 10000, 10),
    (0.4914, 0.4822, 0.4465),
    (0.2470, 0.2435, 0.2615),
    {"kind": ((0, 1, 8, 9), (2, 3, 4, 5, 6, 7))},
)
CIFAR100 = ArrayBenchmark(
    "cifar100",
    "CIFAR100",
    _cifar("CIFAR100"),
    "cifar-100-python/ with train, test and meta",
    Published(50000, 10000, 100),
    (0.5071, 0.4867, 0.4408),
    (0.2675, 0.2565, 0.2761),
    SUPERCLASSES,
)
