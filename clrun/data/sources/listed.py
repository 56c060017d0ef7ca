"""Benchmarks of image files in the folders that torchvision makes, with the official lists of their parts.

The lists are read here and not by torchvision's classes, which keep them private, need seconds to import, and in the
case of Omniglot number the classes as the file system happens to list them. Where a set has an official validation
part, it belongs to the training images; `dataset.val_fraction` cuts validation images of its own.
"""

import csv
import json
from pathlib import Path
from typing import Annotated, Any

from clrun.data.decode import Decoding
from clrun.data.sources.assemble import Published
from clrun.data.sources.benchmark import Benchmark, Content, grouped, labelled, lines, load, matlab, torchvision
from clrun.data.sources.listing import class_folders, in_test, list_classes
from clrun.data.stream import Dataset
from clrun.system import libraries
from clrun.system.errors import Fraction, Range

DRAWINGS = 20  # of each character of Omniglot


def omniglot(
    *,
    root: str,
    download: bool,
    test_drawings: Annotated[int, Range(minimum=1, maximum=19)],
    images: Decoding,
    val_fraction: Fraction,
    seed: int,
    augment: list[Any],
) -> Dataset:
    """Return Omniglot (Lake et al. 2015): 1623 characters of 50 alphabets, black on white, 20 drawings each, in memory.

    The background and the evaluation set together; the published split into these two has other classes in each, so
    training and test images are told apart by the person who drew them. Group: "alphabet".

    Args:
        root: folder of all data sets.
        download: fetch what is missing.
        test_drawings: drawings of each character that are test images, the last ones.
        images: how they are decoded.
        val_fraction: share of each class's training images to set aside for validation.
        seed: of the validation images.
        augment: training augmentations.

    Raises:
        ConfigError: the files are not there.
    """
    benchmark = Benchmark(
        "omniglot",
        "omniglot-py/images_background and omniglot-py/images_evaluation, unpacked",
        Published(1623 * (DRAWINGS - test_drawings), 1623 * test_drawings, 1623),
        lambda home: _omniglot(home, DRAWINGS - test_drawings),
        torchvision("Omniglot", {"background": True}, {"background": False}),
        channels=1,
        mean=(0.9221,),
        std=(0.2681,),
        memory=True,
    )
    return load(
        benchmark, root=root, download=download, images=images, val_fraction=val_fraction, seed=seed, augment=augment
    )


def _omniglot(home: Path, last: int) -> Content:
    """Return the drawings of every character; those after the `last` training one are test images."""
    place = home / "omniglot-py"
    found = sorted(
        (alphabet, character, part)
        for part in ("images_background", "images_evaluation")
        for alphabet in class_folders(place / part)
        for character in class_folders(place / part / alphabet)
    )
    train: list[tuple[str, int]] = []
    test: list[tuple[str, int]] = []
    for label, (alphabet, character, part) in enumerate(found):
        for name in list_classes(place / part / alphabet, [character], root=place).names:
            drawing = int(Path(name).stem.rpartition("_")[2])  # 0001_07.png is the 7th drawing
            (test if drawing > last else train).append((name, label))
    names = [f"{alphabet} {character.removeprefix('character')}" for alphabet, character, _ in found]
    groups = {"alphabet": grouped([alphabet for alphabet, _, _ in found])}
    return Content(labelled(place, train), labelled(place, test), names, groups)


def flowers102(
    *, root: str, download: bool, images: Decoding, val_fraction: Fraction, seed: int, augment: list[Any]
) -> Dataset:
    """Return Oxford Flowers (Nilsback and Zisserman 2008): 2040 + 6149 photographs of 102 kinds.

    Training images are the official training and validation parts.

    Raises:
        ConfigError: the files are not there, or downloading failed.
    """
    benchmark = Benchmark(
        "flowers102",
        "flowers-102/ with jpg/, imagelabels.mat and setid.mat",
        Published(2040, 6149, 102),
        _flowers102,
        torchvision("Flowers102"),
    )
    return load(
        benchmark, root=root, download=download, images=images, val_fraction=val_fraction, seed=seed, augment=augment
    )


def _flowers102(home: Path) -> Content:
    place = home / "flowers-102"
    labels, ids = matlab(place / "imagelabels.mat")["labels"], matlab(place / "setid.mat")

    def part(*keys: str) -> list[tuple[str, int]]:
        numbers = [int(number) for key in keys for number in ids[key]]
        return [(f"jpg/image_{number:05d}.jpg", int(labels[number - 1]) - 1) for number in numbers]

    names = getattr(libraries.load("torchvision.datasets").Flowers102, "classes", None)
    names = names or [f"flower {label + 1}" for label in range(102)]
    return Content(labelled(place, part("trnid", "valid")), labelled(place, part("tstid")), names)


def food101(
    *, root: str, download: bool, images: Decoding, val_fraction: Fraction, seed: int, augment: list[Any]
) -> Dataset:
    """Return Food-101 (Bossard et al. 2014): 75750 + 25250 photographs of 101 dishes.

    Raises:
        ConfigError: the files are not there, or downloading failed.
    """
    benchmark = Benchmark(
        "food101", "food-101/ with images/ and meta/", Published(75750, 25250, 101), _food101, torchvision("Food101")
    )
    return load(
        benchmark, root=root, download=download, images=images, val_fraction=val_fraction, seed=seed, augment=augment
    )


def _food101(home: Path) -> Content:
    place = home / "food-101"
    meta = [json.loads((place / "meta" / f"{part}.json").read_text()) for part in ("train", "test")]
    classes = sorted(meta[0])
    parts = [[(f"images/{path}.jpg", classes.index(name)) for name in part for path in part[name]] for part in meta]
    return Content(labelled(place, parts[0]), labelled(place, parts[1]), [name.replace("_", " ") for name in classes])


def dtd(
    *,
    root: str,
    download: bool,
    partition: Annotated[int, Range(minimum=1, maximum=10)],
    images: Decoding,
    val_fraction: Fraction,
    seed: int,
    augment: list[Any],
) -> Dataset:
    """Return the Describable Textures (Cimpoi et al. 2014): 3760 + 1880 photographs of 47 kinds.

    Training images are the official training and validation parts.

    Args:
        root: folder of all data sets.
        download: fetch what is missing.
        partition: which of the ten official splits.
        images: how they are decoded.
        val_fraction: share of each class's training images to set aside for validation.
        seed: of the validation images.
        augment: training augmentations.

    Raises:
        ConfigError: the files are not there, or downloading failed.
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
    return load(
        benchmark, root=root, download=download, images=images, val_fraction=val_fraction, seed=seed, augment=augment
    )


def eurosat(
    *,
    root: str,
    download: bool,
    test_fraction: Fraction,
    images: Decoding,
    val_fraction: Fraction,
    seed: int,
    augment: list[Any],
) -> Dataset:
    """Return EuroSAT (Helber et al. 2019, arXiv 1709.00029): 27000 colour satellite images of 64x64 pixels, 10 kinds.

    Args:
        root: folder of all data sets.
        download: fetch what is missing.
        test_fraction: share of test images, told by the hash of their names: there is no official split.
        images: how they are decoded.
        val_fraction: share of each class's training images to set aside for validation.
        seed: of the validation images.
        augment: training augmentations.

    Raises:
        ConfigError: the files are not there, or downloading failed.
    """

    def read(home: Path) -> Content:
        place = home / "eurosat" / "2750"
        classes = class_folders(place)
        every = list_classes(place, classes)
        chosen = [in_test(name, test_fraction) for name in every.names]
        return Content(every.where([not test for test in chosen]), every.where(chosen), classes)

    benchmark = Benchmark(
        "eurosat", "eurosat/2750/ with a folder a class", Published(None, None, 10, 27000), read, torchvision("EuroSAT")
    )
    return load(
        benchmark, root=root, download=download, images=images, val_fraction=val_fraction, seed=seed, augment=augment
    )


def gtsrb(
    *, root: str, download: bool, images: Decoding, val_fraction: Fraction, seed: int, augment: list[Any]
) -> Dataset:
    """Return the German Traffic Signs (Stallkamp et al. 2012): 26640 + 12630 photographs of 43 signs.

    Raises:
        ConfigError: the files are not there, or downloading failed.
    """
    benchmark = Benchmark(
        "gtsrb",
        "gtsrb/ with GTSRB/Training/, GTSRB/Final_Test/Images/ and GT-final_test.csv",
        Published(26640, 12630, 43),
        _gtsrb,
        torchvision("GTSRB", {"split": "train"}, {"split": "test"}),
    )
    return load(
        benchmark, root=root, download=download, images=images, val_fraction=val_fraction, seed=seed, augment=augment
    )


def _gtsrb(home: Path) -> Content:
    place = home / "gtsrb"
    classes = class_folders(place / "GTSRB" / "Training")
    train = list_classes(place / "GTSRB" / "Training", classes, root=place)
    with (place / "GT-final_test.csv").open(newline="") as file:
        table = csv.DictReader(file, delimiter=";", skipinitialspace=True)
        test = [(f"GTSRB/Final_Test/Images/{row['Filename']}", int(row["ClassId"])) for row in table]
    return Content(train, labelled(place, test), [f"sign {int(name)}" for name in classes])


def fgvc_aircraft(*, root: str, images: Decoding, val_fraction: Fraction, seed: int, augment: list[Any]) -> Dataset:
    """Return FGVC-Aircraft (Maji et al. 2013, arXiv 1306.5151): 6667 + 3333 photographs of 100 variants.

    Training images are the official training and validation parts.

    Raises:
        ConfigError: the files are not there.
    """
    benchmark = Benchmark(
        "fgvc_aircraft",
        "fgvc-aircraft-2013b/data/ with images/, variants.txt and images_variant_{trainval,test}.txt",
        Published(6667, 3333, 100),
        _fgvc_aircraft,
    )
    return load(
        benchmark, root=root, download=False, images=images, val_fraction=val_fraction, seed=seed, augment=augment
    )


def _fgvc_aircraft(home: Path) -> Content:
    place = home / "fgvc-aircraft-2013b" / "data"
    classes = lines(place / "variants.txt")

    def part(name: str) -> list[tuple[str, int]]:
        rows = (line.split(" ", 1) for line in lines(place / f"images_variant_{name}.txt"))
        return [(f"images/{image}.jpg", classes.index(variant)) for image, variant in rows]

    return Content(labelled(place, part("trainval")), labelled(place, part("test")), classes)


def oxford_pets(
    *, root: str, download: bool, images: Decoding, val_fraction: Fraction, seed: int, augment: list[Any]
) -> Dataset:
    """Return the Oxford-IIIT Pets (Parkhi et al. 2012): 3680 + 3669 photographs of 37 breeds. Group: "species".

    Raises:
        ConfigError: the files are not there, or downloading failed.
    """
    benchmark = Benchmark(
        "oxford_pets",
        "oxford-iiit-pet/ with images/ and annotations/",
        Published(3680, 3669, 37),
        _oxford_pets,
        torchvision("OxfordIIITPet"),
    )
    return load(
        benchmark, root=root, download=download, images=images, val_fraction=val_fraction, seed=seed, augment=augment
    )


def _oxford_pets(home: Path) -> Content:
    place = home / "oxford-iiit-pet"
    parts = [[line.split() for line in lines(place / "annotations" / f"{p}.txt")] for p in ("trainval", "test")]
    breeds = {int(label) - 1: image.rpartition("_")[0] for part in parts for image, label, _, _ in part}
    species = {int(label) - 1: ("cat", "dog")[int(kind) - 1] for part in parts for _, label, kind, _ in part}
    train, test = ([(f"images/{image}.jpg", int(label) - 1) for image, label, _, _ in part] for part in parts)
    names = [breeds[label].replace("_", " ").title() for label in range(len(breeds))]
    groups = {"species": grouped([species[label] for label in range(len(breeds))])}
    return Content(labelled(place, train), labelled(place, test), names, groups)
