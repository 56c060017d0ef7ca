"""Food-101: photographs of dishes."""

import json
from pathlib import Path

from clrun.data.reading.assemble import Published
from clrun.data.reading.benchmark import Benchmark, Content, labelled, load, torchvision
from clrun.data.reading.options import DownloadReading, loader
from clrun.data.stream import Dataset


@loader
def food101(reading: DownloadReading) -> Dataset:
    """Return Food-101 (Bossard et al. 2014): 75750 + 25250 photographs of 101 dishes.

    Raises:
        ConfigError: the files are missing, or downloading failed.
    """
    benchmark = Benchmark(
        "food101", "food-101/ with images/ and meta/", Published(75750, 25250, 101), _food101, torchvision("Food101")
    )
    return load(benchmark, reading)


def _food101(home: Path) -> Content:
    place = home / "food-101"
    meta = [json.loads((place / "meta" / f"{part}.json").read_text()) for part in ("train", "test")]
    classes = sorted(meta[0])
    parts = [[(f"images/{path}.jpg", classes.index(name)) for name in part for path in part[name]] for part in meta]
    return Content(labelled(place, parts[0]), labelled(place, parts[1]), [name.replace("_", " ") for name in classes])
