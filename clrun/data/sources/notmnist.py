"""notMNIST: letters A to J of many fonts."""

from pathlib import Path

from clrun.data.reading.assemble import Published
from clrun.data.reading.benchmark import Benchmark, Content, load, two_folders
from clrun.data.reading.listing import by_hash, class_folders, list_classes
from clrun.data.reading.options import ImageReading, loader
from clrun.data.stream import Dataset
from clrun.system.errors import Fraction


@loader
def notmnist(reading: ImageReading, *, test_fraction: Fraction) -> Dataset:
    """Return notMNIST (Bulatov 2011): 18724 readable grey 28x28 letters A to J of many fonts, in memory.

    Args:
        reading: the common options.
        test_fraction: fraction of test images in notMNIST_small/, chosen by the hash of their names. If notmnist/train
            and notmnist/test (16853 + 1873 images) exist, they are used instead.

    Raises:
        ConfigError: files are missing.
    """
    home = reading.home
    two = two_folders("notmnist", "notmnist", Published(16853, 1873, 10))
    prepared = (home / "notmnist" / "train").is_dir()

    def read(home: Path) -> Content:
        if prepared:
            return two.read(home)
        place = home / "notMNIST_small"
        classes = class_folders(place)
        return Content(*by_hash(list_classes(place, classes), test_fraction), classes)

    benchmark = Benchmark(
        "notmnist",
        "notmnist/train/ and notmnist/test/, or notMNIST_small/, with folders A/ to J/",
        two.published if prepared else Published(None, None, 10, 18724),
        read,
        channels=1,
        mean=(0.4254,),
        std=(0.4501,),
        memory=True,
    )
    return load(benchmark, reading)
