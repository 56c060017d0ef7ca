"""Stanford Cars: photographs of 196 models."""

from pathlib import Path

from clrun.data.reading.assemble import Published
from clrun.data.reading.benchmark import Benchmark, Content, labelled, load, matlab
from clrun.data.reading.options import ImageReading, loader
from clrun.data.stream import Dataset


@loader
def stanford_cars(reading: ImageReading) -> Dataset:
    """Return Stanford Cars (Krause et al. 2013): 8144 + 8041 photographs of 196 models.

    Raises:
        ConfigError: files are missing.
    """
    benchmark = Benchmark(
        "stanford_cars",
        "stanford_cars/ with cars_train/, cars_test/, cars_test_annos_withlabels.mat, devkit/cars_train_annos.mat and "
        "devkit/cars_meta.mat",
        Published(8144, 8041, 196),
        _stanford_cars,
    )
    return load(benchmark, reading)


def _stanford_cars(home: Path) -> Content:
    place = home / "stanford_cars"

    def part(path: str, folder: str) -> list[tuple[str, int]]:
        return [(f"{folder}/{row['fname']}", int(row["class"]) - 1) for row in matlab(place / path)["annotations"]]

    train = part("devkit/cars_train_annos.mat", "cars_train")
    test = part("cars_test_annos_withlabels.mat", "cars_test")
    names = [str(name) for name in matlab(place / "devkit" / "cars_meta.mat")["class_names"]]
    return Content(labelled(place, train), labelled(place, test), names)
