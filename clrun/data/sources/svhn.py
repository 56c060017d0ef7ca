"""SVHN: digits of house numbers."""

from clrun.data.reading.arrays import DIGIT_GROUPS, ArrayBenchmark, load, splits
from clrun.data.reading.assemble import Published
from clrun.data.reading.options import ArrayReading, loader
from clrun.data.stream import Dataset

SVHN = ArrayBenchmark(
    "svhn",
    "SVHN",
    splits("SVHN"),
    "train_32x32.mat and test_32x32.mat",
    Published(73257, 26032, 10),
    (0.4377, 0.4438, 0.4728),
    (0.1980, 0.2010, 0.1970),
    DIGIT_GROUPS,
)


@loader
def svhn(reading: ArrayReading) -> Dataset:
    """Return SVHN (Netzer et al. 2011): 73257 + 26032 colour 32x32 images of 10 digits cut from house numbers.

    Groups: "parity" (even, odd) and "lookalike" (five pairs that are easily confused).

    Raises:
        ConfigError: the files are not under `root`, or downloading failed.
    """
    return load(SVHN, reading)
