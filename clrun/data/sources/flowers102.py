"""Oxford Flowers: photographs of 102 kinds of flowers."""

from pathlib import Path

from clrun.data.reading.assemble import Published
from clrun.data.reading.benchmark import Benchmark, Content, labelled, load, matlab, torchvision
from clrun.data.reading.options import DownloadReading, loader
from clrun.data.stream import Dataset
from clrun.system import libraries


@loader
def flowers102(reading: DownloadReading) -> Dataset:
    """Return Oxford Flowers (Nilsback and Zisserman 2008): 2040 + 6149 photographs of 102 kinds.

    Training images are the official training and validation parts.

    Raises:
        ConfigError: the files are missing, or downloading failed.
    """
    benchmark = Benchmark(
        "flowers102",
        "flowers-102/ with jpg/, imagelabels.mat and setid.mat",
        Published(2040, 6149, 102),
        _flowers102,
        torchvision("Flowers102"),
    )
    return load(benchmark, reading)


def _flowers102(home: Path) -> Content:
    place = home / "flowers-102"
    labels, ids = matlab(place / "imagelabels.mat")["labels"], matlab(place / "setid.mat")

    def part(*keys: str) -> list[tuple[str, int]]:
        numbers = [int(number) for key in keys for number in ids[key]]
        return [(f"jpg/image_{number:05d}.jpg", int(labels[number - 1]) - 1) for number in numbers]

    names = getattr(libraries.load("torchvision.datasets").Flowers102, "classes", None)
    names = names or [f"flower {label + 1}" for label in range(102)]
    return Content(labelled(place, part("trnid", "valid")), labelled(place, part("tstid")), names)
