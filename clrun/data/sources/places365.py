"""Places365: photographs of scenes."""

from pathlib import Path

from clrun.data.reading.assemble import Published
from clrun.data.reading.benchmark import Benchmark, Content, labelled, lines, load, torchvision
from clrun.data.reading.options import DownloadReading, loader
from clrun.data.stream import Dataset


@loader
def places365(reading: DownloadReading) -> Dataset:
    """Return Places365-Standard (Zhou et al. 2017) at 256x256 pixels: 1803460 + 36500 photographs of 365 scenes.

    The official validation images are the test images: the labels of the official test images are not public.

    Raises:
        ConfigError: the files are missing, or downloading failed.
    """
    benchmark = Benchmark(
        "places365",
        "places365/ with data_256_standard/, val_256/, categories_places365.txt, places365_train_standard.txt and "
        "places365_val.txt",
        Published(1803460, 36500, 365),
        _places365,
        torchvision(
            "Places365",
            {"split": "train-standard", "small": True},
            {"split": "val", "small": True},
            folder="places365",
        ),
    )
    return load(benchmark, reading)


def _places365(home: Path) -> Content:
    place = home / "places365"
    classes = dict(line.rsplit(" ", 1) for line in lines(place / "categories_places365.txt"))
    names = sorted(classes, key=lambda name: int(classes[name]))

    def part(name: str, folder: str) -> list[tuple[str, int]]:
        rows = (line.rsplit(" ", 1) for line in lines(place / f"places365_{name}.txt"))
        return [(f"{folder}/{image.lstrip('/')}", int(label)) for image, label in rows]

    train, test = part("train_standard", "data_256_standard"), part("val", "val_256")
    return Content(labelled(place, train), labelled(place, test), [name[3:].replace("_", " ") for name in names])
