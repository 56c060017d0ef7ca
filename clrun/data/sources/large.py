"""Benchmarks of more than a million image files, with their official lists."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from clrun.data.decode import Decoding
from clrun.data.sources.assemble import Published
from clrun.data.sources.benchmark import Benchmark, Content, grouped, labelled, lines, load, torchvision
from clrun.data.sources.listing import class_folders, list_classes
from clrun.data.stream import Dataset
from clrun.system.errors import Fraction

RANKS_2021 = {"kingdom": 1, "class": 3}  # position in the folder names of iNaturalist 2021


def places365(
    *, root: str, download: bool, images: Decoding, val_fraction: Fraction, seed: int, augment: list[Any]
) -> Dataset:
    """Return Places365-Standard (Zhou et al. 2017) at 256x256 pixels: 1803460 + 36500 photographs of 365 scenes.

    The official validation images are the test images: the labels of the official test images are not public.

    Raises:
        ConfigError: the files are not there, or downloading failed.
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
    return load(
        benchmark, root=root, download=download, images=images, val_fraction=val_fraction, seed=seed, augment=augment
    )


def _places365(home: Path) -> Content:
    place = home / "places365"
    classes = dict(line.rsplit(" ", 1) for line in lines(place / "categories_places365.txt"))
    names = sorted(classes, key=lambda name: int(classes[name]))

    def part(name: str, folder: str) -> list[tuple[str, int]]:
        rows = (line.rsplit(" ", 1) for line in lines(place / f"places365_{name}.txt"))
        return [(f"{folder}/{image.lstrip('/')}", int(label)) for image, label in rows]

    train, test = part("train_standard", "data_256_standard"), part("val", "val_256")
    return Content(labelled(place, train), labelled(place, test), [name[3:].replace("_", " ") for name in names])


def inaturalist(
    *,
    root: str,
    version: Literal[2018, 2021, "2021_mini"],
    download: bool,
    images: Decoding,
    val_fraction: Fraction,
    seed: int,
    augment: list[Any],
) -> Dataset:
    """Return iNaturalist (Van Horn et al. 2018, arXiv 1707.06642): photographs of thousands of species, unevenly many.

    The official validation images are the test images.

    Args:
        root: folder of all data sets.
        version: 2018, 437513 + 24426 images of 8142 species, group "supercategory"; 2021, 2686843 + 100000 images of
            10000 species, groups "kingdom" and "class"; "2021_mini", 50 training images of each of these.
        download: fetch what is missing; the two lists of 2018 come by hand.
        images: how they are decoded.
        val_fraction: share of each class's training images to set aside for validation.
        seed: of the validation images.
        augment: training augmentations.

    Raises:
        ConfigError: the files are not there, or downloading failed.
    """
    if version == 2018:
        layout = "inaturalist/ with 2018/ (its supercategories), train2018.json and val2018.json"
        fetch = torchvision("INaturalist", {"version": "2018"}, folder="inaturalist")
        benchmark = Benchmark("inaturalist", layout, Published(437513, 24426, 8142), _inaturalist_2018, fetch)
    else:
        train, images_of_it = ("2021_train", 2686843) if version == 2021 else ("2021_train_mini", 500000)
        published = Published(images_of_it, 100000, 10000)
        layout = f"inaturalist/{train}/ and inaturalist/2021_valid/ with a folder a species"
        fetch = torchvision("INaturalist", {"version": train}, {"version": "2021_valid"}, folder="inaturalist")
        benchmark = Benchmark("inaturalist", layout, published, lambda home: _inaturalist_2021(home, train), fetch)
    return load(
        benchmark, root=root, download=download, images=images, val_fraction=val_fraction, seed=seed, augment=augment
    )


def _inaturalist_2018(home: Path) -> Content:
    place = home / "inaturalist"
    parts = [json.loads((place / f"{part}2018.json").read_text()) for part in ("train", "val")]
    categories = sorted(parts[0]["categories"], key=lambda category: int(category["id"]))
    ids = {category["id"]: label for label, category in enumerate(categories)}

    def rows(part: dict[str, Any]) -> list[tuple[str, int]]:
        files = {image["id"]: image["file_name"].partition("/")[2] for image in part["images"]}
        return [(f"2018/{files[a['image_id']]}", ids[a["category_id"]]) for a in part["annotations"]]

    names = [str(category["name"]) for category in categories]
    groups = {"supercategory": grouped([str(category["supercategory"]) for category in categories])}
    return Content(labelled(place, rows(parts[0])), labelled(place, rows(parts[1])), names, groups)


def _inaturalist_2021(home: Path, part: str) -> Content:
    place = home / "inaturalist"
    folders = class_folders(place / part)
    words: Sequence[list[str]] = [name.split("_") for name in folders]  # number, six ranks and the species
    train = list_classes(place / part, folders, root=place)
    test = list_classes(place / "2021_valid", folders, root=place)
    groups = {rank: grouped([own[k] for own in words]) for rank, k in RANKS_2021.items()}
    return Content(train, test, [" ".join(own[-2:]) for own in words], groups)


def imagenet(*, root: str, images: Decoding, val_fraction: Fraction, seed: int, augment: list[Any]) -> Dataset:
    """Return ILSVRC 2012 (Russakovsky et al. 2015, arXiv 1409.0575): 1281167 + 50000 photographs of 1000 classes.

    The official validation images are the test images. Class ids follow the sorted WordNet ids, as everywhere.

    Raises:
        ConfigError: the files are not there.
    """
    benchmark = Benchmark(
        "imagenet",
        "imagenet/train/ and imagenet/val/ with a folder a class",
        Published(1281167, 50000, 1000),
        _imagenet,
    )
    return load(
        benchmark, root=root, download=False, images=images, val_fraction=val_fraction, seed=seed, augment=augment
    )


def _imagenet(home: Path) -> Content:
    place = home / "imagenet"
    classes = class_folders(place / "train")
    train = list_classes(place / "train", classes, root=place)
    return Content(train, list_classes(place / "val", classes, root=place), classes)
