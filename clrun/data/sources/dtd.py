"""Describable Textures: photographs of 47 kinds of textures."""

from pathlib import Path
from typing import Annotated

from clrun.data.reading.assemble import Published
from clrun.data.reading.benchmark import Benchmark, Content, labelled, lines, load, torchvision
from clrun.data.reading.options import DownloadReading, loader
from clrun.data.stream import Dataset
from clrun.system.errors import Range


@loader
def dtd(reading: DownloadReading, *, partition: Annotated[int, Range(minimum=1, maximum=10)]) -> Dataset:
    """Return the Describable Textures (Cimpoi et al. 2014): 3760 + 1880 photographs of 47 kinds.

    Training images are the official training and validation parts.

    Args:
        reading: the common options.
        partition: number of one of the ten official splits.

    Raises:
        ConfigError: the files are missing, or downloading failed.
    """

    def read(home: Path) -> Content:
        place = home / "dtd" / "dtd"
        parts = {part: lines(place / "labels" / f"{part}{partition}.txt") for part in ("train", "val", "test")}
        classes = sorted({path.partition("/")[0] for path in parts["train"]})

        def rows(*keys: str) -> list[tuple[str, int]]:
            paths = [path for key in keys for path in parts[key]]
            return [(f"images/{path}", classes.index(path.partition("/")[0])) for path in paths]

        return Content(labelled(place, rows("train", "val")), labelled(place, rows("test")), classes)

    benchmark = Benchmark(
        "dtd", "dtd/dtd/ with images/ and labels/", Published(3760, 1880, 47), read, torchvision("DTD")
    )
    return load(benchmark, reading)
