"""CUB-200-2011: photographs of birds."""

from pathlib import Path
from typing import Literal

from clrun.data.reading.assemble import Published
from clrun.data.reading.benchmark import Benchmark, Content, labelled, lines, load, two_folders
from clrun.data.reading.options import ImageReading, loader
from clrun.data.stream import Dataset


@loader
def cub200(reading: ImageReading, *, split: Literal["official", "folders"]) -> Dataset:
    """Return CUB-200-2011 (Wah et al. 2011): photographs of 200 kinds of birds.

    Args:
        reading: the common options.
        split: "official", 5994 + 5794 images as listed in CUB_200_2011/train_test_split.txt; "folders", cub200/train
            and cub200/test, which as PILOT and its relatives prepare them hold 9430 + 2358 images.

    Raises:
        ConfigError: files are missing.
    """
    if split == "official":
        layout = "CUB_200_2011/ with images/, images.txt, image_class_labels.txt, train_test_split.txt and classes.txt"
        benchmark = Benchmark("cub200", layout, Published(5994, 5794, 200), _cub200)
    else:
        benchmark = two_folders("cub200", "cub200", Published(9430, 2358, 200))
    return load(benchmark, reading)


def _cub200(home: Path) -> Content:
    place = home / "CUB_200_2011"
    files, labels, training = (
        dict(line.split() for line in lines(place / f"{name}.txt"))
        for name in ("images", "image_class_labels", "train_test_split")
    )
    rows = {key: (f"images/{file}", int(labels[key]) - 1) for key, file in files.items()}
    train, test = ([rows[key] for key in files if training[key] == part] for part in ("1", "0"))
    names = [line.split()[1].partition(".")[2].replace("_", " ") for line in lines(place / "classes.txt")]
    return Content(labelled(place, train), labelled(place, test), names)
