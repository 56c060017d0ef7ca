"""iNaturalist: photographs of species."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from clrun.data.reading.assemble import Published
from clrun.data.reading.benchmark import Benchmark, Content, grouped, labelled, load, torchvision
from clrun.data.reading.listing import class_folders, list_classes
from clrun.data.reading.options import DownloadReading, loader
from clrun.data.stream import Dataset

RANKS_2021 = {"kingdom": 1, "class": 3}  # position in the folder names of iNaturalist 2021


@loader
def inaturalist(reading: DownloadReading, *, version: Literal[2018, 2021, "2021_mini"]) -> Dataset:
    """Return iNaturalist (Van Horn et al. 2018, arXiv 1707.06642): photographs of thousands of species.

    The numbers of images per species are uneven. The official validation images are the test images.

    Args:
        reading: the common options.
        version: 2018, 437513 + 24426 images of 8142 species, group "supercategory"; 2021, 2686843 + 100000 images of
            10000 species, groups "kingdom" and "class"; "2021_mini", 50 training images of each of these.

    Raises:
        ConfigError: the files are missing, or downloading failed.
    """
    if version == 2018:
        layout = "inaturalist/ with 2018/ (its supercategories), train2018.json and val2018.json"
        fetch = torchvision("INaturalist", {"version": "2018"}, folder="inaturalist")
        benchmark = Benchmark("inaturalist", layout, Published(437513, 24426, 8142), _inaturalist_2018, fetch)
    else:
        train, images_of_it = ("2021_train", 2686843) if version == 2021 else ("2021_train_mini", 500000)
        published = Published(images_of_it, 100000, 10000)
        layout = f"inaturalist/{train}/ and inaturalist/2021_valid/ with one folder per species"
        fetch = torchvision("INaturalist", {"version": train}, {"version": "2021_valid"}, folder="inaturalist")
        benchmark = Benchmark("inaturalist", layout, published, lambda home: _inaturalist_2021(home, train), fetch)
    return load(benchmark, reading)


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
