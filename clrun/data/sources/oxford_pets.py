"""Oxford-IIIT Pets: photographs of cats and dogs."""

from pathlib import Path

from clrun.data.reading.assemble import Published
from clrun.data.reading.benchmark import Benchmark, Content, grouped, labelled, lines, load, torchvision
from clrun.data.reading.options import DownloadReading, loader
from clrun.data.stream import Dataset


@loader
def oxford_pets(reading: DownloadReading) -> Dataset:
    """Return the Oxford-IIIT Pets (Parkhi et al. 2012): 3680 + 3669 photographs of 37 breeds. Group: "species".

    Raises:
        ConfigError: the files are missing, or downloading failed.
    """
    benchmark = Benchmark(
        "oxford_pets",
        "oxford-iiit-pet/ with images/ and annotations/",
        Published(3680, 3669, 37),
        _oxford_pets,
        torchvision("OxfordIIITPet"),
    )
    return load(benchmark, reading)


def _oxford_pets(home: Path) -> Content:
    place = home / "oxford-iiit-pet"
    parts = [[line.split() for line in lines(place / "annotations" / f"{p}.txt")] for p in ("trainval", "test")]
    breeds = {int(label) - 1: image.rpartition("_")[0] for part in parts for image, label, _, _ in part}
    species = {int(label) - 1: ("cat", "dog")[int(kind) - 1] for part in parts for _, label, kind, _ in part}
    train, test = ([(f"images/{image}.jpg", int(label) - 1) for image, label, _, _ in part] for part in parts)
    names = [breeds[label].replace("_", " ").title() for label in range(len(breeds))]
    groups = {"species": grouped([species[label] for label in range(len(breeds))])}
    return Content(labelled(place, train), labelled(place, test), names, groups)
