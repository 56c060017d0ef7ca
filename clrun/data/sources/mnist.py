"""MNIST and the data sets that are stored like it: Fashion-MNIST, Kuzushiji-MNIST and EMNIST."""

from typing import Literal

from torch import Tensor

from clrun.data.reading.arrays import DIGIT_GROUPS, ArrayBenchmark, halves, load
from clrun.data.reading.assemble import Published, Rows
from clrun.data.reading.options import ArrayReading, loader
from clrun.data.stream import Dataset


@loader
def mnist(reading: ArrayReading) -> Dataset:
    """Return MNIST (LeCun et al. 1998): 60000 + 10000 grey 28x28 images of 10 digits.

    Groups: "parity" (even, odd) and "lookalike" (five pairs that are easily confused).

    Raises:
        ConfigError: the files are not under `root`, or downloading failed.
    """
    return load(MNIST, reading)


@loader
def fashion_mnist(reading: ArrayReading) -> Dataset:
    """Return Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747): 60000 + 10000 grey 28x28 images of 10 garments.

    Raises:
        ConfigError: the files are not under `root`, or downloading failed.
    """
    return load(FASHION_MNIST, reading)


@loader
def kmnist(reading: ArrayReading) -> Dataset:
    """Return Kuzushiji-MNIST (Clanuwat et al. 2018, arXiv 1812.01718): 60000 + 10000 grey 28x28 images of 10 hiragana.

    Raises:
        ConfigError: the files are not under `root`, or downloading failed.
    """
    return load(KMNIST, reading)


@loader
def emnist(reading: ArrayReading, *, split: Literal["letters", "balanced"]) -> Dataset:
    """Return EMNIST (Cohen et al. 2017, arXiv 1702.05373): grey 28x28 handwritten letters, or letters and digits.

    The images stand upright; the files hold them mirrored at the diagonal.

    Args:
        reading: the common options.
        split: "letters", 124800 + 20800 images of 26 letters, upper and lower case together; "balanced", 112800 + 18800
            images of 10 digits and 37 letters.

    Raises:
        ConfigError: the files are not under `root`, or downloading failed.
    """
    return load({"letters": EMNIST_LETTERS, "balanced": EMNIST_BALANCED}[split], reading)


def _upright(images: Tensor, labels: Tensor) -> Rows:
    """Return EMNIST's images as they were written."""
    return images.transpose(-1, -2).contiguous(), labels


def _letters(images: Tensor, labels: Tensor) -> Rows:
    """Return EMNIST's letters upright, with labels from 0 on."""
    return images.transpose(-1, -2).contiguous(), labels - 1


MNIST_FILES = "train-images-idx3-ubyte, train-labels-idx1-ubyte and the same of t10k"
EMNIST_FILES = "emnist-{0}-train-images-idx3-ubyte, emnist-{0}-train-labels-idx1-ubyte and the same of test"
MNIST = ArrayBenchmark(
    "mnist",
    "MNIST",
    halves("MNIST"),
    f"MNIST/raw/ with {MNIST_FILES}",
    Published(60000, 10000, 10),
    (0.1307,),
    (0.3081,),
    DIGIT_GROUPS,
)
FASHION_MNIST = ArrayBenchmark(
    "fashion_mnist",
    "FashionMNIST",
    halves("FashionMNIST"),
    f"FashionMNIST/raw/ with {MNIST_FILES}",
    Published(60000, 10000, 10),
    (0.2860,),
    (0.3530,),
)
KMNIST = ArrayBenchmark(
    "kmnist",
    "KMNIST",
    halves("KMNIST"),
    f"KMNIST/raw/ with {MNIST_FILES}",
    Published(60000, 10000, 10),
    (0.1918,),
    (0.3483,),
)
EMNIST_LETTERS = ArrayBenchmark(
    "emnist",
    "EMNIST letters",
    halves("EMNIST", split="letters"),
    f"EMNIST/raw/ with {EMNIST_FILES.format('letters')}",
    Published(124800, 20800, 26),
    (0.1722,),
    (0.3309,),
    fix=_letters,
)
EMNIST_BALANCED = ArrayBenchmark(
    "emnist",
    "EMNIST balanced",
    halves("EMNIST", split="balanced"),
    f"EMNIST/raw/ with {EMNIST_FILES.format('balanced')}",
    Published(112800, 18800, 47),
    (0.1751,),
    (0.3332,),
    fix=_upright,
)
