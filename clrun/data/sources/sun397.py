"""SUN397: photographs of scenes."""

from pathlib import Path

from clrun.data.reading.assemble import Published
from clrun.data.reading.benchmark import Benchmark, Content, lines, load, torchvision
from clrun.data.reading.listing import by_hash, list_classes
from clrun.data.reading.options import DownloadReading, loader
from clrun.data.stream import Dataset
from clrun.system.errors import Fraction


@loader
def sun397(reading: DownloadReading, *, test_fraction: Fraction) -> Dataset:
    """Return SUN397 (Xiao et al. 2010): 108754 photographs of 397 kinds of scenes.

    Args:
        reading: the common options.
        test_fraction: fraction of test images, chosen by the hash of their names. Ten official partitions of 100 images
            per class exist; the literature on image and text towers divides all images, as here.

    Raises:
        ConfigError: the files are missing, or downloading failed.
    """

    def read(home: Path) -> Content:
        place = home / "SUN397"
        paths = [line[1:] for line in lines(place / "ClassName.txt")]  # "/a/abbey", "/a/apse/indoor"
        found = list_classes(place, paths, by_path=True)
        names = [path.partition("/")[2].replace("/", " ").replace("_", " ") for path in paths]
        return Content(*by_hash(found, test_fraction), names)

    benchmark = Benchmark(
        "sun397",
        "SUN397/ with ClassName.txt and the folders of the classes, such as a/abbey/",
        Published(None, None, 397, 108754),
        read,
        torchvision("SUN397"),
    )
    return load(benchmark, reading)
