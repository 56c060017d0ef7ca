"""German Traffic Signs."""

import csv
from pathlib import Path

from clrun.data.reading.assemble import Published
from clrun.data.reading.benchmark import Benchmark, Content, labelled, load, torchvision
from clrun.data.reading.listing import class_folders, list_classes
from clrun.data.reading.options import DownloadReading, loader
from clrun.data.stream import Dataset


@loader
def gtsrb(reading: DownloadReading) -> Dataset:
    """Return the German Traffic Signs (Stallkamp et al. 2012): 26640 + 12630 photographs of 43 signs.

    Raises:
        ConfigError: the files are missing, or downloading failed.
    """
    benchmark = Benchmark(
        "gtsrb",
        "gtsrb/ with GTSRB/Training/, GTSRB/Final_Test/Images/ and GT-final_test.csv",
        Published(26640, 12630, 43),
        _gtsrb,
        torchvision("GTSRB", {"split": "train"}, {"split": "test"}),
    )
    return load(benchmark, reading)


def _gtsrb(home: Path) -> Content:
    place = home / "gtsrb"
    classes = class_folders(place / "GTSRB" / "Training")
    train = list_classes(place / "GTSRB" / "Training", classes, root=place)
    with (place / "GT-final_test.csv").open(newline="") as file:
        table = csv.DictReader(file, delimiter=";", skipinitialspace=True)
        test = [(f"GTSRB/Final_Test/Images/{row['Filename']}", int(row["ClassId"])) for row in table]
    return Content(train, labelled(place, test), [f"sign {int(name)}" for name in classes])
