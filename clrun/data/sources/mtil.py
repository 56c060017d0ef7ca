"""The eleven data sets of MTIL, the benchmark of continual learners on image and text towers."""

from collections.abc import Callable
from typing import Any

from clrun.data.reading.assemble import one_fraction
from clrun.data.reading.options import DownloadReading, loader
from clrun.data.reading.sequence import resized, sequence
from clrun.data.sources.caltech101 import caltech101
from clrun.data.sources.cifar import cifar100
from clrun.data.sources.dtd import dtd
from clrun.data.sources.eurosat import eurosat
from clrun.data.sources.fgvc_aircraft import fgvc_aircraft
from clrun.data.sources.flowers102 import flowers102
from clrun.data.sources.food101 import food101
from clrun.data.sources.mnist import mnist
from clrun.data.sources.oxford_pets import oxford_pets
from clrun.data.sources.stanford_cars import stanford_cars
from clrun.data.sources.sun397 import sun397
from clrun.data.stream import Dataset
from clrun.system.errors import Fraction

# In alphabetical order, which is the order of the ids: each loader, and which kind of options it takes.
PARTS: tuple[tuple[Callable[..., Dataset], str], ...] = (
    (fgvc_aircraft, "by hand"),
    (caltech101, "by hash"),
    (cifar100, "arrays"),
    (dtd, "partition"),
    (eurosat, "by hash"),
    (flowers102, "download"),
    (food101, "download"),
    (mnist, "arrays"),
    (oxford_pets, "download"),
    (stanford_cars, "by hand"),
    (sun397, "by hash"),
)


@loader
def mtil(reading: DownloadReading, *, test_fraction: Fraction) -> Dataset:
    """Return the eleven data sets of MTIL (Zheng et al., ICCV 2023, arXiv 2303.06628) as one of 1201 classes.

    Images of CIFAR-100 and MNIST are resized to the side of the others when they are read; grey is repeated.

    Args:
        reading: the common options; a download fetches all but FGVC-Aircraft and Stanford Cars.
        test_fraction: fraction of test images of Caltech-101, EuroSAT and SUN397, which have no official split.

    Raises:
        ConfigError: a data set is not under `root`, or downloading failed.
    """
    one_fraction(reading)
    options = vars(reading)
    side, interpolation = reading.images.size, reading.images.interpolation

    def without(name: str) -> dict[str, Any]:
        return {key: value for key, value in options.items() if key != name}

    own = {
        "arrays": without("images"),
        "by hand": without("download"),
        "by hash": {**options, "test_fraction": test_fraction},
        "partition": {**options, "partition": 1},
        "download": options,
    }
    parts = [load(**own[kind]) for load, kind in PARTS]
    return sequence("mtil", [resized(part, channels=3, side=side, interpolation=interpolation) for part in parts])
