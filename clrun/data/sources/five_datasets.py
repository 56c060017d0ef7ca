"""Five data sets of ten classes as one: CIFAR-10, MNIST, SVHN, Fashion-MNIST and notMNIST."""

from dataclasses import replace

from clrun.data.decode import Decoding
from clrun.data.reading.assemble import one_fraction
from clrun.data.reading.options import ArrayReading, loader
from clrun.data.reading.sequence import on_canvas, sequence
from clrun.data.sources.cifar import cifar10
from clrun.data.sources.mnist import fashion_mnist, mnist
from clrun.data.sources.notmnist import notmnist
from clrun.data.sources.svhn import svhn
from clrun.data.stream import Dataset

LETTERS = Decoding(
    size=28,
    fit="crop",
    interpolation="bilinear",
    exif=False,
    max_pixels=100_000_000,
    unreadable="skip",
    memory=512,
    cache=False,
    range="auto",
    verify="none",
)  # as `dataset=notmnist` decodes


@loader
def five_datasets(reading: ArrayReading) -> Dataset:
    """Return CIFAR-10, MNIST, SVHN, Fashion-MNIST and notMNIST as one data set of 50 classes (HALRP, WSN, L2P).

    Grey images of 28x28 pixels lie in the middle of 32x32 black ones, their grey repeated; each part has normalisation
    constants of its own, those of the published code.

    Args:
        reading: the common options; a download fetches all but notMNIST.

    Raises:
        ConfigError: a data set is not under `root`, or downloading failed.
    """
    one_fraction(reading)
    options = vars(reading)
    parts = [load(**options) for load in (cifar10, mnist, svhn, fashion_mnist)]
    by_hand = {name: value for name, value in options.items() if name != "download"}
    parts.append(notmnist(test_fraction=0.1, images=LETTERS, **by_hand))
    own = {"mnist": (0.1, 0.2752), "fashion_mnist": (0.2190, 0.3318)}  # of the squares, with their black frames
    framed = []
    for part in parts:
        mean, std = ((own[part.name][0],), (own[part.name][1],)) if part.name in own else (part.mean, part.std)
        framed.append(on_canvas(replace(part, mean=mean, std=std), channels=3, side=32))
    return sequence("five_datasets", framed)
