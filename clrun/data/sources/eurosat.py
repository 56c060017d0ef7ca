"""EuroSAT: satellite images of land use."""

from pathlib import Path

from clrun.data.reading.assemble import Published
from clrun.data.reading.benchmark import Benchmark, Content, load, torchvision
from clrun.data.reading.listing import by_hash, class_folders, list_classes
from clrun.data.reading.options import DownloadReading, loader
from clrun.data.stream import Dataset
from clrun.system.errors import Fraction


@loader
def eurosat(reading: DownloadReading, *, test_fraction: Fraction) -> Dataset:
    """Return EuroSAT (Helber et al. 2019, arXiv 1709.00029): 27000 colour satellite images of 64x64 pixels, 10 kinds.

    Args:
        reading: the common options.
        test_fraction: fraction of test images, chosen by the hash of their names: there is no official split.

    Raises:
        ConfigError: the files are missing, or downloading failed.
    """

    def read(home: Path) -> Content:
        place = home / "eurosat" / "2750"
        classes = class_folders(place)
        return Content(*by_hash(list_classes(place, classes), test_fraction), classes)

    benchmark = Benchmark(
        "eurosat",
        "eurosat/2750/ with one folder per class",
        Published(None, None, 10, 27000),
        read,
        torchvision("EuroSAT"),
    )
    return load(benchmark, reading)
