"""CORe50: frames of 50 objects in eleven sessions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clrun.data.reading.assemble import Domains, Published
from clrun.data.reading.benchmark import Benchmark, Content, load
from clrun.data.reading.image_files import joined, numbered
from clrun.data.reading.listing import class_folders, list_classes
from clrun.data.reading.options import ImageReading, loader
from clrun.data.stream import Dataset

CORE50_TRAIN = (1, 2, 4, 5, 6, 8, 9, 11)  # sessions; the others are the test images of every protocol
CORE50_TEST = (3, 7, 10)
CORE50_CATEGORIES = (
    "plug adapter",
    "mobile phone",
    "scissors",
    "light bulb",
    "can",
    "glasses",
    "ball",
    "marker",
    "cup",
    "remote control",
)


@loader
def core50(reading: ImageReading) -> Dataset:
    """Return CORe50 (Lomonaco and Maltoni 2017, arXiv 1705.03550): 119894 + 44972 frames of 50 objects.

    It consists of eight domains, the training sessions, and each is tested on all test images (sessions 3, 7 and 10).
    Group: "category", ten kinds of five objects.

    Raises:
        ConfigError: files are missing.
    """
    benchmark = Benchmark(
        "core50", "core50_128x128/ with s1/ to s11/, each with o1/ to o50/", Published(119894, 44972, 50), _core50
    )
    return load(benchmark, reading)


def _core50(home: Path) -> Content:
    place = home / "core50_128x128"
    objects = [f"o{k + 1}" for k in range(50)]
    names = [f"{category} {k + 1}" for category in CORE50_CATEGORIES for k in range(5)]

    def sessions(numbers: Sequence[int]) -> list[Any]:
        for number in numbers:
            class_folders(place / f"s{number}")  # a missing session is an error
        return [list_classes(place / f"s{number}", objects, root=place) for number in numbers]

    train, test = sessions(CORE50_TRAIN), sessions(CORE50_TEST)
    domains = Domains([f"s{number}" for number in CORE50_TRAIN], numbered(train), None)
    groups = {"category": tuple(tuple(range(k, k + 5)) for k in range(0, 50, 5))}
    return Content(joined(train), joined(test), names, groups, domains)
