"""STL-10: photographs of 96x96 pixels."""

from clrun.data.reading.arrays import ArrayBenchmark, load, splits
from clrun.data.reading.assemble import Published
from clrun.data.reading.options import ArrayReading, loader
from clrun.data.stream import Dataset

STL10 = ArrayBenchmark(
    "stl10",
    "STL10",
    splits("STL10"),
    "stl10_binary/ with train_X.bin, train_y.bin, test_X.bin, test_y.bin and class_names.txt",
    Published(5000, 8000, 10),
    (0.4467, 0.4398, 0.4066),
    (0.2603, 0.2566, 0.2713),
)


@loader
def stl10(reading: ArrayReading) -> Dataset:
    """Return STL-10 (Coates et al. 2011): 5000 + 8000 labelled colour 96x96 images of 10 classes.

    Raises:
        ConfigError: the files are not under `root`, or downloading failed.
    """
    return load(STL10, reading)
