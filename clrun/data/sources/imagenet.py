"""ImageNet, and the data sets that are made of its classes: ImageNet-R, ImageNet-A, Tiny ImageNet."""

from pathlib import Path

from clrun.data.reading.assemble import Published
from clrun.data.reading.benchmark import Benchmark, Content, labelled, lines, load, two_folders
from clrun.data.reading.listing import class_folders, list_classes
from clrun.data.reading.options import ImageReading, loader
from clrun.data.stream import Dataset


@loader
def imagenet(reading: ImageReading) -> Dataset:
    """Return ILSVRC 2012 (Russakovsky et al. 2015, arXiv 1409.0575): 1281167 + 50000 photographs of 1000 classes.

    The official validation images are the test images. Class ids follow the sorted WordNet ids, as in other libraries.

    Raises:
        ConfigError: files are missing.
    """
    benchmark = Benchmark(
        "imagenet",
        "imagenet/train/ and imagenet/val/ with one folder per class",
        Published(1281167, 50000, 1000),
        _imagenet,
    )
    return load(benchmark, reading)


def _imagenet(home: Path) -> Content:
    place = home / "imagenet"
    classes = class_folders(place / "train")
    train = list_classes(place / "train", classes, root=place)
    return Content(train, list_classes(place / "val", classes, root=place), classes)


@loader
def imagenet_r(reading: ImageReading) -> Dataset:
    """Return ImageNet-R (Hendrycks et al. 2021, arXiv 2006.16241): 24000 + 6000 renditions of 200 classes of ImageNet.

    Raises:
        ConfigError: files are missing.
    """
    benchmark = two_folders("imagenet_r", "imagenet-r", Published(24000, 6000, 200))
    return load(benchmark, reading)


@loader
def imagenet_a(reading: ImageReading) -> Dataset:
    """Return ImageNet-A (Hendrycks et al. 2021, arXiv 1907.07174): 5981 + 1519 photographs that models misclassify.

    Raises:
        ConfigError: files are missing.
    """
    benchmark = two_folders("imagenet_a", "imagenet-a", Published(5981, 1519, 200))
    return load(benchmark, reading)


@loader
def tiny_imagenet(reading: ImageReading) -> Dataset:
    """Return Tiny ImageNet: 100000 + 10000 photographs of 64x64 pixels, 200 classes in the order of their WordNet ids.

    The official validation images are the test images: the labels of the official test images are not public.

    Raises:
        ConfigError: files are missing.
    """
    benchmark = Benchmark(
        "tiny_imagenet",
        "tiny-imagenet-200/ with train/, val/, wnids.txt and words.txt",
        Published(100000, 10000, 200),
        _tiny_imagenet,
        mean=(0.4802, 0.4480, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
    )
    return load(benchmark, reading)


def _tiny_imagenet(home: Path) -> Content:
    place = home / "tiny-imagenet-200"
    classes = sorted(lines(place / "wnids.txt"))
    words = dict(line.split("\t", 1) for line in lines(place / "words.txt"))
    train = list_classes(place / "train", classes, root=place)
    annotations = place / "val" / "val_annotations.txt"
    if annotations.is_file():
        rows = (line.split("\t")[:2] for line in lines(annotations))
        test = labelled(place, ((f"val/images/{name}", classes.index(wnid)) for name, wnid in rows))
    else:  # often sorted into folders by hand
        test = list_classes(place / "val", classes, root=place)
    return Content(train, test, [words.get(wnid, wnid).partition(",")[0] for wnid in classes])
