"""FGVC-Aircraft: photographs of 100 variants of aircraft."""

from pathlib import Path

from clrun.data.reading.assemble import Published
from clrun.data.reading.benchmark import Benchmark, Content, labelled, lines, load
from clrun.data.reading.options import ImageReading, loader
from clrun.data.stream import Dataset


@loader
def fgvc_aircraft(reading: ImageReading) -> Dataset:
    """Return FGVC-Aircraft (Maji et al. 2013, arXiv 1306.5151): 6667 + 3333 photographs of 100 variants.

    Training images are the official training and validation parts.

    Raises:
        ConfigError: files are missing.
    """
    benchmark = Benchmark(
        "fgvc_aircraft",
        "fgvc-aircraft-2013b/data/ with images/, variants.txt and images_variant_{trainval,test}.txt",
        Published(6667, 3333, 100),
        _fgvc_aircraft,
    )
    return load(benchmark, reading)


def _fgvc_aircraft(home: Path) -> Content:
    place = home / "fgvc-aircraft-2013b" / "data"
    classes = lines(place / "variants.txt")

    def part(name: str) -> list[tuple[str, int]]:
        rows = (line.split(" ", 1) for line in lines(place / f"images_variant_{name}.txt"))
        return [(f"images/{image}.jpg", classes.index(variant)) for image, variant in rows]

    return Content(labelled(place, part("trainval")), labelled(place, part("test")), classes)
