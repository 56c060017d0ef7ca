"""Caltech-101: photographs and drawings of things."""

from pathlib import Path

from clrun.data.reading.assemble import Published
from clrun.data.reading.benchmark import Benchmark, Content, load, torchvision
from clrun.data.reading.listing import by_hash, class_folders, list_classes
from clrun.data.reading.options import DownloadReading, loader
from clrun.data.stream import Dataset
from clrun.system.errors import Fraction

BACKGROUND = "BACKGROUND_Google"  # images of no class, which torchvision leaves out, too


@loader
def caltech101(reading: DownloadReading, *, test_fraction: Fraction) -> Dataset:
    """Return Caltech-101 (Fei-Fei et al. 2004): 8677 images of 101 kinds of things, without those of the background.

    Args:
        reading: the common options.
        test_fraction: fraction of test images, chosen by the hash of their names: there is no official split.

    Raises:
        ConfigError: the files are missing, or downloading failed.
    """

    def read(home: Path) -> Content:
        place = home / "caltech101" / "101_ObjectCategories"
        classes = [name for name in class_folders(place) if name != BACKGROUND]
        return Content(*by_hash(list_classes(place, classes), test_fraction), classes)

    benchmark = Benchmark(
        "caltech101",
        "caltech101/101_ObjectCategories/ with one folder per class",
        Published(None, None, 101, 8677),
        read,
        torchvision("Caltech101"),
    )
    return load(benchmark, reading)
