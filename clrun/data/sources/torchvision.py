"""Small benchmarks in torchvision's files, which hold arrays: in memory as uint8, read once a process."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from clrun.data.sources.assemble import Groups, Published, Rows, assemble, check_counts
from clrun.data.sources.embedded import DIGIT_GROUPS
from clrun.data.sources.pickles import read_arrays
from clrun.data.stream import Dataset
from clrun.system import libraries
from clrun.system.errors import ConfigError, Fraction, first_line

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


def mnist(*, root: str, download: bool, val_fraction: Fraction, seed: int, augment: list[Any]) -> Dataset:
    """Return MNIST (LeCun et al. 1998): 60000 + 10000 grey 28x28 images of 10 digits.

    Groups: "parity" (even, odd) and "lookalike" (five pairs that are easily confused).

    Raises:
        ConfigError: the files are not under `root`, or downloading failed.
    """
    return _dataset(MNIST, root, download, val_fraction=val_fraction, seed=seed, augment=augment)


def fashion_mnist(*, root: str, download: bool, val_fraction: Fraction, seed: int, augment: list[Any]) -> Dataset:
    """Return Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747): 60000 + 10000 grey 28x28 images of 10 garments.

    Raises:
        ConfigError: the files are not under `root`, or downloading failed.
    """
    return _dataset(FASHION_MNIST, root, download, val_fraction=val_fraction, seed=seed, augment=augment)


def kmnist(*, root: str, download: bool, val_fraction: Fraction, seed: int, augment: list[Any]) -> Dataset:
    """Return Kuzushiji-MNIST (Clanuwat et al. 2018, arXiv 1812.01718): 60000 + 10000 grey 28x28 images of 10 hiragana.

    Raises:
        ConfigError: the files are not under `root`, or downloading failed.
    """
    return _dataset(KMNIST, root, download, val_fraction=val_fraction, seed=seed, augment=augment)


def emnist(
    *,
    root: str,
    split: Literal["letters", "balanced"],
    download: bool,
    val_fraction: Fraction,
    seed: int,
    augment: list[Any],
) -> Dataset:
    """Return EMNIST (Cohen et al. 2017, arXiv 1702.05373): grey 28x28 handwritten letters, or letters and digits.

    The images stand upright; the files hold them mirrored at the diagonal.

    Args:
        root: folder of all data sets.
        split: "letters", 124800 + 20800 images of 26 letters, upper and lower case together; "balanced", 112800 + 18800
            images of 10 digits and 37 letters.
        download: fetch what is missing.
        val_fraction: share of each class's training rows to set aside for validation.
        seed: of the validation rows.
        augment: training augmentations.

    Raises:
        ConfigError: the files are not under `root`, or downloading failed.
    """
    facts = {"letters": EMNIST_LETTERS, "balanced": EMNIST_BALANCED}[split]
    return _dataset(facts, root, download, val_fraction=val_fraction, seed=seed, augment=augment)


def svhn(*, root: str, download: bool, val_fraction: Fraction, seed: int, augment: list[Any]) -> Dataset:
    """Return SVHN (Netzer et al. 2011): 73257 + 26032 colour 32x32 images of 10 digits cut from house numbers.

    Groups: "parity" (even, odd) and "lookalike" (five pairs that are easily confused).

    Raises:
        ConfigError: the files are not under `root`, or downloading failed.
    """
    return _dataset(SVHN, root, download, val_fraction=val_fraction, seed=seed, augment=augment)


def cifar10(*, root: str, download: bool, val_fraction: Fraction, seed: int, augment: list[Any]) -> Dataset:
    """Return CIFAR-10 (Krizhevsky 2009): 50000 + 10000 colour 32x32 images of 10 classes.

    Groups: "kind" (vehicles, animals).

    Raises:
        ConfigError: the files are not under `root`, or downloading failed.
    """
    return _dataset(CIFAR10, root, download, val_fraction=val_fraction, seed=seed, augment=augment)


def cifar100(*, root: str, download: bool, val_fraction: Fraction, seed: int, augment: list[Any]) -> Dataset:
    """Return CIFAR-100 (Krizhevsky 2009): 50000 + 10000 colour 32x32 images of 100 classes, ids in alphabetical order.

    Groups: "superclass", the 20 coarse classes of 5 fine ones, by ascending coarse label.

    Raises:
        ConfigError: the files are not under `root`, or downloading failed.
    """
    return _dataset(CIFAR100, root, download, val_fraction=val_fraction, seed=seed, augment=augment)


def stl10(*, root: str, download: bool, val_fraction: Fraction, seed: int, augment: list[Any]) -> Dataset:
    """Return STL-10 (Coates et al. 2011): 5000 + 8000 labelled colour 96x96 images of 10 classes.

    Raises:
        ConfigError: the files are not under `root`, or downloading failed.
    """
    return _dataset(STL10, root, download, val_fraction=val_fraction, seed=seed, augment=augment)


# --- reading


def _halves(kind: str, **options: Any) -> Callable[[Path, bool], tuple[Any, Any]]:
    """Return a reader of the two parts of a torchvision class that is told them by `train`."""

    def read(folder: Path, download: bool) -> tuple[Any, Any]:
        cls = getattr(libraries.load("torchvision.datasets"), kind)
        train, test = (cls(folder, train=train, download=download, **options) for train in (True, False))
        return train, test

    return read


def _splits(kind: str) -> Callable[[Path, bool], tuple[Any, Any]]:
    """Return a reader of the two parts of a torchvision class that is told them by `split`."""

    def read(folder: Path, download: bool) -> tuple[Any, Any]:
        cls = getattr(libraries.load("torchvision.datasets"), kind)
        train, test = (cls(folder, split=split, download=download) for split in ("train", "test"))
        return train, test

    return read


@dataclass(frozen=True)
class _Batches:
    """One part of CIFAR, as torchvision's classes show it."""

    data: np.ndarray[Any, Any]
    targets: list[int]
    classes: list[str]


def _cifar(kind: str) -> Callable[[Path, bool], tuple[Any, Any]]:
    """Return a reader of CIFAR's pickles that compares their checksums and runs none of their code."""

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
    """Return the content of some of CIFAR's pickles as one part."""
    labels = [label for batch in batches for label in batch["labels" if "labels" in batch else "fine_labels"]]
    return _Batches(np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32), labels, list(names))


@dataclass(frozen=True)
class Facts:
    """What torchvision does not know of a data set.

    Attributes:
        name: as in `dataset=NAME`.
        title: what to call it in errors.
        read: returns training and test part, given folder and whether to download.
        layout: what must lie under the folder.
        published: rows and classes.
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


def _upright(images: Tensor, labels: Tensor) -> Rows:
    """Return EMNIST's images as they were written."""
    return images.transpose(-1, -2).contiguous(), labels


def _letters(images: Tensor, labels: Tensor) -> Rows:
    """Return EMNIST's letters upright, with labels from 0 on."""
    return images.transpose(-1, -2).contiguous(), labels - 1


MNIST_FILES = "train-images-idx3-ubyte, train-labels-idx1-ubyte and the same of t10k"
EMNIST_FILES = "emnist-{0}-train-images-idx3-ubyte, emnist-{0}-train-labels-idx1-ubyte and the same of test"
MNIST = Facts(
    "mnist",
    "MNIST",
    _halves("MNIST"),
    f"MNIST/raw/ with {MNIST_FILES}",
    Published(60000, 10000, 10),
    (0.1307,),
    (0.3081,),
    DIGIT_GROUPS,
)
FASHION_MNIST = Facts(
    "fashion_mnist",
    "FashionMNIST",
    _halves("FashionMNIST"),
    f"FashionMNIST/raw/ with {MNIST_FILES}",
    Published(60000, 10000, 10),
    (0.2860,),
    (0.3530,),
)
KMNIST = Facts(
    "kmnist",
    "KMNIST",
    _halves("KMNIST"),
    f"KMNIST/raw/ with {MNIST_FILES}",
    Published(60000, 10000, 10),
    (0.1918,),
    (0.3483,),
)
EMNIST_LETTERS = Facts(
    "emnist",
    "EMNIST letters",
    _halves("EMNIST", split="letters"),
    f"EMNIST/raw/ with {EMNIST_FILES.format('letters')}",
    Published(124800, 20800, 26),
    (0.1722,),
    (0.3309,),
    fix=_letters,
)
EMNIST_BALANCED = Facts(
    "emnist",
    "EMNIST balanced",
    _halves("EMNIST", split="balanced"),
    f"EMNIST/raw/ with {EMNIST_FILES.format('balanced')}",
    Published(112800, 18800, 47),
    (0.1751,),
    (0.3332,),
    fix=_upright,
)
SVHN = Facts(
    "svhn",
    "SVHN",
    _splits("SVHN"),
    "train_32x32.mat and test_32x32.mat",
    Published(73257, 26032, 10),
    (0.4377, 0.4438, 0.4728),
    (0.1980, 0.2010, 0.1970),
    DIGIT_GROUPS,
)
CIFAR10 = Facts(
    "cifar10",
    "CIFAR10",
    _cifar("CIFAR10"),
    "cifar-10-batches-py/ with data_batch_1 to data_batch_5, test_batch and batches.meta",
    Published(50000, 10000, 10),
    (0.4914, 0.4822, 0.4465),
    (0.2470, 0.2435, 0.2615),
    {"kind": ((0, 1, 8, 9), (2, 3, 4, 5, 6, 7))},
)
CIFAR100 = Facts(
    "cifar100",
    "CIFAR100",
    _cifar("CIFAR100"),
    "cifar-100-python/ with train, test and meta",
    Published(50000, 10000, 100),
    (0.5071, 0.4867, 0.4408),
    (0.2675, 0.2565, 0.2761),
    SUPERCLASSES,
)
STL10 = Facts(
    "stl10",
    "STL10",
    _splits("STL10"),
    "stl10_binary/ with train_X.bin, train_y.bin, test_X.bin, test_y.bin and class_names.txt",
    Published(5000, 8000, 10),
    (0.4467, 0.4398, 0.4066),
    (0.2603, 0.2566, 0.2713),
)


def _dataset(facts: Facts, root: str, download: bool, *, val_fraction: float, seed: int, augment: list[Any]) -> Dataset:
    """Return the assembled data set.

    Raises:
        ConfigError: the files are not under `root`, or downloading failed.
    """
    folder = Path(root).expanduser().absolute()
    try:
        if download:
            facts.read(folder, True)
        train, test, names = _load(facts, folder)
    except ConfigError:
        raise
    except Exception as error:  # readers of damaged files raise almost anything
        remedy = "downloading failed" if download else "or set dataset.download=true"
        reason = first_line(error).partition(". ")[0]
        raise ConfigError(
            f"dataset.root: {facts.title} cannot be read from {root}: expected {facts.layout}; set dataset.root or "
            f"CLRUN_DATA to the folder that holds it, {remedy} ({reason})"
        ) from error
    dataset = assemble(
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
    return check_counts(facts.name, facts.published, dataset, root)


@cache
def _load(facts: Facts, folder: Path) -> tuple[Rows, Rows, tuple[str, ...]]:
    """Return training rows, test rows and class names, read once a process."""
    train, test = facts.read(folder, False)
    return facts.fix(*_rows(train)), facts.fix(*_rows(test)), _class_names(train, facts)


def _class_names(part: Any, facts: Facts) -> tuple[str, ...]:
    """Return the names of the classes: torchvision's without their frills, digits where it has none."""
    names = getattr(part, "classes", None) or [str(label) for label in range(facts.published.classes or 0)]
    return tuple(name.split(" - ")[0] for name in names if name != "N/A")  # MNIST's are "0 - zero", ...


def _rows(part: Any) -> Rows:
    """Return images [N, C, H, W] uint8 and labels [N] long of a part in memory."""
    images: Tensor = torch.as_tensor(np.ascontiguousarray(part.data))
    labels = part.targets if hasattr(part, "targets") else part.labels
    return images.unsqueeze(1) if images.ndim == 3 else images, torch.as_tensor(labels).long()
