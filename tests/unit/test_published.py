"""Published sets of image files: tiny copies in their true layout, read by our loaders and by torchvision's."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import decoding, write
from running import source

from clrun.data.decode import Decoding
from clrun.data.split import TensorSplit
from clrun.data.stream import Dataset
from clrun.system.errors import ConfigError, collecting_warnings

pytestmark = pytest.mark.exact  # whole numbers, bytes and texts alone

Write = Callable[[Path], None]


def load(loader: Callable[..., Dataset], root: Path, **changes: Any) -> tuple[Dataset, list[str]]:
    """Return a data set and the warnings on the way."""
    options: dict[str, Any] = {"images": decoding(), "val_fraction": 0.0, "seed": 0, "augment": []}
    notes: list[str] = []
    with collecting_warnings(notes):
        data = loader(root=str(root), **(options | changes))
    return data, notes


def rows(split: Any) -> list[tuple[str, int]]:
    """Return (file, label) of each row, in order."""
    stored = range(len(split)) if split.rows is None else split.rows.tolist()
    return [(str(split.images.files.content(row)), label) for row, label in zip(stored, split.y.tolist(), strict=True)]


def text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def matlab(path: Path, **content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pytest.importorskip("scipy.io").savemat(path, content)


def records(**columns: list[Any]) -> np.ndarray:
    """Return a struct array, as MATLAB's annotations are."""
    kinds = [(name, object) for name in columns]
    return np.array([tuple(row) for row in zip(*columns.values(), strict=True)], dtype=kinds)[None]


# --- tiny copies


def flowers102(root: Path) -> None:
    home = root / "flowers-102"
    for number in range(1, 9):
        write(home / "jpg" / f"image_{number:05d}.jpg", seed=number)
    matlab(home / "imagelabels.mat", labels=np.array([[3, 1, 2, 102, 3, 1, 2, 102]]))
    matlab(home / "setid.mat", trnid=np.array([[2, 7]]), valid=np.array([[5, 4]]), tstid=np.array([[1, 8, 6]]))


def food101(root: Path) -> None:
    meta = {"train": {"waffles": ["waffles/10", "waffles/11"], "apple_pie": ["apple_pie/7"]}}
    meta["test"] = {"waffles": ["waffles/12"], "apple_pie": ["apple_pie/8", "apple_pie/9"]}
    for part, content in meta.items():
        text(root / "food-101" / "meta" / f"{part}.json", json.dumps(content))
        for path in [path for paths in content.values() for path in paths]:
            write(root / "food-101" / "images" / f"{path}.jpg")


def dtd(root: Path) -> None:
    home = root / "dtd" / "dtd"
    parts = {
        "train": ["banded/a.jpg", "zigzagged/b.jpg"],
        "val": ["banded/c.jpg"],
        "test": ["zigzagged/d.jpg", "banded/e.jpg"],
    }
    for part, paths in parts.items():
        text(home / "labels" / f"{part}1.txt", *paths)
        text(home / "labels" / f"{part}3.txt", *paths[:1])
        for path in paths:
            write(home / "images" / path)
    text(home / "labels" / "train3.txt", *parts["train"])


def eurosat(root: Path) -> None:
    for label in ("Forest", "River"):
        for k in range(12):
            write(root / "eurosat" / "2750" / label / f"{label}_{k}.jpg")


def caltech101(root: Path) -> None:
    for label in ("BACKGROUND_Google", "Faces", "Faces_easy", "accordion", "car_side"):
        for k in range(1, 5):
            write(root / "caltech101" / "101_ObjectCategories" / label / f"image_{k:04d}.jpg")


def sun397(root: Path) -> None:
    home, classes = root / "SUN397", ("/a/abbey", "/a/apse/indoor", "/b/beach", "/b/bow_window/outdoor")
    text(home / "ClassName.txt", *classes)
    text(home / "README.txt", "no class")
    for name in classes:
        for k in range(4):
            write(home / name[1:] / f"sun_{k}.jpg")


def gtsrb(root: Path) -> None:
    home = root / "gtsrb"
    for label in range(3):
        for k in range(2):
            write(home / "GTSRB" / "Training" / f"{label:05d}" / f"{k}.ppm", side=5 + k)
        text(home / "GTSRB" / "Training" / f"{label:05d}" / f"GT-{label:05d}.csv", "not an image")
    with (home / "GT-final_test.csv").open("w", newline="") as file:
        table = csv.writer(file, delimiter=";")
        table.writerow(["Filename", "Width", "Height", "Roi.X1", "ClassId"])
        for k, label in enumerate((2, 0, 1)):
            write(home / "GTSRB" / "Final_Test" / "Images" / f"{k:05d}.ppm")
            table.writerow([f"{k:05d}.ppm", 6, 6, 1, label])


def fgvc_aircraft(root: Path) -> None:
    home = root / "fgvc-aircraft-2013b" / "data"
    text(home / "variants.txt", "707-320", "A340-300 x", "Yak-42")
    text(home / "images_variant_trainval.txt", "0034309 Yak-42", "0034958 707-320", "0034959 A340-300 x")
    text(home / "images_variant_test.txt", "1111111 A340-300 x", "2222222 Yak-42", "3333333 707-320")
    for name in ("0034309", "0034958", "0034959", "1111111", "2222222", "3333333"):
        write(home / "images" / f"{name}.jpg")


def oxford_pets(root: Path) -> None:
    home = root / "oxford-iiit-pet"
    text(home / "annotations" / "trainval.txt", "Abyssinian_100 1 1 1", "great_pyrenees_2 3 2 2", "beagle_1 2 2 1")
    text(home / "annotations" / "test.txt", "beagle_7 2 2 1", "Abyssinian_2 1 1 1", "great_pyrenees_9 3 2 2")
    for name in ("Abyssinian_100", "great_pyrenees_2", "beagle_1", "beagle_7", "Abyssinian_2", "great_pyrenees_9"):
        write(home / "images" / f"{name}.jpg")


def places365(root: Path) -> None:
    home = root / "places365"
    text(home / "categories_places365.txt", "/a/airfield 0", "/b/bar 1", "/c/car_interior 2")
    paths = ["/a/airfield/00000001.jpg 0", "/b/bar/00000002.jpg 1", "/c/car_interior/00000003.jpg 2"]
    text(home / "places365_train_standard.txt", *paths)
    text(home / "places365_val.txt", "Places365_val_00000001.jpg 2", "Places365_val_00000002.jpg 0")
    for path in paths:
        write(home / "data_256_standard" / path.split()[0][1:])
    for k in (1, 2):
        write(home / "val_256" / f"Places365_val_0000000{k}.jpg")


def inaturalist_2021(root: Path) -> None:
    kinds = ["00000_Animalia_Chordata_Aves_O_F_Larus_ridibundus", "00001_Plantae_X_Liliopsida_O_F_Lilium_regale"]
    for part, count in (("2021_train_mini", 2), ("2021_valid", 1)):
        for kind in kinds:
            for k in range(count):
                write(root / "inaturalist" / part / kind / f"{k}.jpg")


def inaturalist_2018(root: Path) -> None:
    home = root / "inaturalist"
    categories = [
        {"id": 1, "name": "Larus", "supercategory": "Aves"},
        {"id": 0, "name": "Lilium", "supercategory": "Plantae"},
    ]
    for part, count in (("train", 2), ("val", 1)):
        images, annotations = [], []
        for category in (0, 1):
            for k in range(count):
                place = f"{('Plantae', 'Aves')[category]}/{category}/{part}{k}.jpg"
                images.append({"id": 10 * category + k, "file_name": f"train_val2018/{place}"})
                annotations.append({"image_id": 10 * category + k, "category_id": category})
                write(home / "2018" / place)
        content = {"images": images[::-1], "annotations": annotations, "categories": categories}
        text(home / f"{part}2018.json", json.dumps(content))


def imagenet(root: Path) -> None:
    for part, count in (("train", 2), ("val", 1)):
        for label in ("n01443537", "n01440764"):
            for k in range(count):
                write(root / "imagenet" / part / label / f"{k}.JPEG")


def omniglot(root: Path) -> None:
    for part, alphabet, characters in (
        ("background", "Greek", 2),
        ("evaluation", "Avesta", 2),
        ("evaluation", "Tibetan", 1),
    ):
        for k in range(characters):
            for drawing in range(1, 21):
                name = f"{k + 7:04d}_{drawing:02d}.png"
                write(
                    root / "omniglot-py" / f"images_{part}" / alphabet / f"character{k + 1:02d}" / name,
                    grey=True,
                    seed=k,
                )


def stanford_cars(root: Path) -> None:
    home = root / "stanford_cars"
    matlab(home / "devkit" / "cars_meta.mat", class_names=np.array([["AM General", "Acura RL"]], dtype=object))
    for path, folder, labels in (
        ("devkit/cars_train_annos.mat", "cars_train", [2, 1, 1]),
        ("cars_test_annos_withlabels.mat", "cars_test", [1, 2]),
    ):
        names = [f"{k:05d}.jpg" for k in range(len(labels))]
        matlab(home / path, annotations=records(bbox_x1=[1] * len(labels), **{"class": labels}, fname=names))
        for name in names:
            write(home / folder / name)


# --- against torchvision


def flat(*datasets: Any) -> list[tuple[str, int]]:
    """Return (file, label) of each sample of torchvision's data sets, in order."""
    found: list[tuple[str, int]] = []
    for dataset in datasets:
        for files in ("samples", "imgs", "_samples"):
            if hasattr(dataset, files):
                found += [(str(file), int(label)) for file, label in getattr(dataset, files)]
                break
        else:
            files = dataset._images if hasattr(dataset, "_images") else dataset._image_files
            found += [(str(file), int(label)) for file, label in zip(files, dataset._labels, strict=True)]
    return found


CASES: dict[str, tuple[Callable[..., Dataset], Write, list[Any], list[Any], dict[str, Any]]] = {
    # name: loader, writer, torchvision's arguments of the training parts and of the test parts, options of the loader
    "Flowers102": (source("flowers102"), flowers102, ["train", "val"], ["test"], {"download": False}),
    "Food101": (source("food101"), food101, ["train"], ["test"], {"download": False}),
    "DTD": (source("dtd"), dtd, ["train", "val"], ["test"], {"download": False, "partition": 1}),
    "GTSRB": (source("gtsrb"), gtsrb, ["train"], ["test"], {"download": False}),
    "FGVCAircraft": (source("fgvc_aircraft"), fgvc_aircraft, ["trainval"], ["test"], {}),
    "OxfordIIITPet": (source("oxford_pets"), oxford_pets, ["trainval"], ["test"], {"download": False}),
    "StanfordCars": (source("stanford_cars"), stanford_cars, ["train"], ["test"], {}),
    "Places365": (source("places365"), places365, ["train-standard"], ["val"], {"download": False}),
}


@pytest.mark.parametrize("kind", CASES)
def test_files_and_labels_are_torchvisions(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    for module in ("flowers102", "places365"):
        monkeypatch.setattr(getattr(datasets, module), "check_integrity", lambda path, md5=None: Path(path).exists())
    monkeypatch.setattr(datasets.Flowers102, "_check_integrity", lambda self: True)
    loader, writer, train, test, options = CASES[kind]
    writer(tmp_path)
    data, notes = load(loader, tmp_path, **options)
    place = tmp_path / "places365" if kind == "Places365" else tmp_path
    more = {"small": True} if kind == "Places365" else {}
    theirs = [[getattr(datasets, kind)(str(place), split=part, **more) for part in parts] for parts in (train, test)]
    if kind == "GTSRB":
        theirs[0][0]._samples = sorted(theirs[0][0]._samples)
    assert rows(data.train) == flat(*theirs[0]) and rows(data.test) == flat(*theirs[1])
    names = getattr(theirs[0][0], "classes", None)
    if names is not None and kind not in ("Places365", "Flowers102", "Food101"):
        assert list(data.class_names) == list(names)
    assert len(next(data.train.batches(3, view="raw"))) == min(3, len(data.train))
    assert any(f"{len(data.train)} training images in {tmp_path}, published with " in note for note in notes)


def test_names_and_groups(tmp_path: Path) -> None:
    for writer in (flowers102, food101, oxford_pets, places365, eurosat, gtsrb):
        writer(tmp_path)
    options = {"download": False}
    assert load(source("food101"), tmp_path, **options)[0].class_names == ("apple pie", "waffles")
    pets, _ = load(source("oxford_pets"), tmp_path, **options)
    assert pets.class_names == ("Abyssinian", "Beagle", "Great Pyrenees") and pets.groups == {"species": ((0,), (1, 2))}
    places, _ = load(source("places365"), tmp_path, **options)
    assert places.class_names == ("airfield", "bar", "car interior")
    assert load(source("gtsrb"), tmp_path, **options)[0].class_names == ("sign 0", "sign 1", "sign 2")


def test_partitions_of_dtd(tmp_path: Path) -> None:
    dtd(tmp_path)
    data, _ = load(source("dtd"), tmp_path, download=False, partition=3)
    assert [Path(file).name for file, _ in rows(data.train)] == ["a.jpg", "b.jpg", "c.jpg"]
    assert [Path(file).name for file, _ in rows(data.test)] == ["d.jpg"]


def test_omniglot_is_split_by_drawing_and_not_by_alphabet(tmp_path: Path) -> None:
    omniglot(tmp_path)
    data, notes = load(source("omniglot"), tmp_path, download=False, test_drawings=5)
    assert data.class_names == (
        "Avesta 01",
        "Avesta 02",
        "Greek 01",
        "Greek 02",
        "Tibetan 01",
    )
    assert data.groups == {"alphabet": ((0, 1), (2, 3), (4,))}
    assert data.train.y.bincount().tolist() == [15] * 5 and data.test.y.bincount().tolist() == [5] * 5
    assert isinstance(data.train, TensorSplit) and data.shape == (1, 6, 6)
    assert notes[0] == f"dataset=omniglot: 75 training images in {tmp_path}, published with 24345"
    one, _ = load(source("omniglot"), tmp_path, download=False, test_drawings=1, val_fraction=0.1)
    assert len(one.test) == 5 and one.val is not None and len(one.train) + len(one.val) == 95


def test_eurosat_is_split_by_hash(tmp_path: Path) -> None:
    eurosat(tmp_path)
    data, notes = load(source("eurosat"), tmp_path, download=False, test_fraction=0.5)
    assert {file for file, _ in rows(data.train)}.isdisjoint(file for file, _ in rows(data.test))
    assert len(data.train) + len(data.test) == 24 and 4 < len(data.test) < 20
    assert notes == [f"dataset=eurosat: 2 classes in {tmp_path}, published with 10"] + [
        f"dataset=eurosat: 24 images in {tmp_path}, published with 27000"
    ]


@pytest.mark.parametrize(("kind", "writer"), [("Caltech101", caltech101), ("SUN397", sun397)])
def test_all_images_of_torchvision_are_divided_by_hash(tmp_path: Path, kind: str, writer: Write) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    writer(tmp_path)
    data, notes = load(source(kind.lower()), tmp_path, download=False, test_fraction=0.5)
    theirs = getattr(datasets, kind)(str(tmp_path))
    assert set(rows(data.train)).isdisjoint(rows(data.test)) and len(data.test) > 2 < len(data.train)
    if kind == "Caltech101":
        expected = {
            (theirs.categories[label], f"image_{k:04d}.jpg") for label, k in zip(theirs.y, theirs.index, strict=True)
        }
        found = {(data.class_names[label], Path(file).name) for file, label in rows(data.train) + rows(data.test)}
        assert data.texts.names == ("off-center face", "centered face", "accordion", "side of a car")
    else:
        expected, found = set(flat(theirs)), set(rows(data.train) + rows(data.test))
        assert data.class_names == ("abbey", "apse indoor", "beach", "bow window outdoor")
    assert found == expected
    assert notes[-1].startswith(f"dataset={kind.lower()}: 16 images in {tmp_path}, published with ")
    again, _ = load(source(kind.lower()), tmp_path, download=False, test_fraction=0.5, seed=1)
    assert rows(again.test) == rows(data.test)


def test_inaturalist_2021(tmp_path: Path) -> None:
    inaturalist_2021(tmp_path)
    data, _ = load(source("inaturalist"), tmp_path, version="2021_mini", download=False)
    assert data.class_names == ("Larus ridibundus", "Lilium regale") and data.train.y.tolist() == [0, 0, 1, 1]
    assert data.groups == {"kingdom": ((0,), (1,)), "class": ((0,), (1,))} and data.test.y.tolist() == [0, 1]
    datasets = pytest.importorskip("torchvision.datasets")
    theirs = datasets.INaturalist(str(tmp_path / "inaturalist"), version="2021_train_mini")
    found = {(f"{Path(file).parent.name}/{Path(file).name}", label) for file, label in rows(data.train)}
    assert found == {(f"{theirs.all_categories[label]}/{name}", label) for label, name in theirs.index}


def test_inaturalist_2018(tmp_path: Path) -> None:
    inaturalist_2018(tmp_path)
    data, notes = load(source("inaturalist"), tmp_path, version=2018, download=False)
    assert data.class_names == ("Lilium", "Larus") and data.groups == {"supercategory": ((1,), (0,))}
    found = [(file.removeprefix(f"{tmp_path}/inaturalist/"), label) for file, label in rows(data.train)]
    assert found == [(f"2018/{('Plantae', 'Aves')[c]}/{c}/train{k}.jpg", c) for c in (0, 1) for k in (0, 1)]
    assert "published with 437513" in notes[0] and len(data.test) == 2


def test_imagenet(tmp_path: Path) -> None:
    imagenet(tmp_path)
    data, _ = load(source("imagenet"), tmp_path)
    assert data.class_names == ("n01440764", "n01443537") and data.train.y.tolist() == [0, 0, 1, 1]
    assert [Path(file).parts[-3] for file, _ in rows(data.test)] == ["val", "val"]
    for file in (tmp_path / "imagenet" / "val").rglob("*.JPEG"):
        file.rename(tmp_path / "imagenet" / "val" / f"{file.parent.name}_{file.name}")  # as they come
    with pytest.raises(ConfigError, match="^dataset=imagenet: no test images in .*with one folder per class$"):
        load(source("imagenet"), tmp_path)


# --- prepared by hand


@pytest.mark.parametrize("sorted_by_hand", [False, True])
def test_tiny_imagenet(tmp_path: Path, sorted_by_hand: bool) -> None:
    home = tmp_path / "tiny-imagenet-200"
    text(home / "wnids.txt", "n02", "n01")
    text(home / "words.txt", "n01\tgoldfish, Carassius auratus", "n02\tbullfrog", "n03\tother")
    for label in ("n01", "n02"):
        for k in range(2):
            write(home / "train" / label / "images" / f"{label}_{k}.JPEG", grey=k == 1)
        text(home / "train" / label / f"{label}_boxes.txt", "a box")
    for k, label in enumerate(("n02", "n01")):
        write(home / "val" / (f"{label}/images" if sorted_by_hand else "images") / f"val_{k}.JPEG")
    if not sorted_by_hand:
        text(home / "val" / "val_annotations.txt", "val_0.JPEG\tn02\t0\t32\t44\t62", "val_1.JPEG\tn01\t0\t0\t1\t1")
    data, notes = load(source("tiny_imagenet"), tmp_path)
    assert data.class_names == ("goldfish", "bullfrog") and data.train.y.tolist() == [0, 0, 1, 1]
    assert {(Path(file).name, label) for file, label in rows(data.test)} == {("val_0.JPEG", 1), ("val_1.JPEG", 0)}
    assert notes == [
        f"dataset=tiny_imagenet: 4 training images in {tmp_path}, published with 100000",
        f"dataset=tiny_imagenet: 2 test images in {tmp_path}, published with 10000",
        f"dataset=tiny_imagenet: 2 classes in {tmp_path}, published with 200",
    ]


def test_cub200(tmp_path: Path) -> None:
    home = tmp_path / "CUB_200_2011"
    text(home / "classes.txt", "1 001.Black_footed_Albatross", "2 002.Laysan_Albatross")
    files = ["001.Black_footed_Albatross/a.jpg", "001.Black_footed_Albatross/b.jpg"]
    files += ["002.Laysan_Albatross/c.jpg", "002.Laysan_Albatross/d.jpg"]
    text(home / "images.txt", *(f"{k + 1} {file}" for k, file in enumerate(files)))
    text(home / "image_class_labels.txt", "1 1", "2 1", "3 2", "4 2")
    text(home / "train_test_split.txt", "1 0", "2 1", "3 1", "4 0")
    for file in files:
        write(home / "images" / file)
    data, notes = load(source("cub200"), tmp_path, split="official")
    assert data.class_names == ("Black footed Albatross", "Laysan Albatross") and "published with 5994" in notes[0]
    assert [(Path(file).name, label) for file, label in rows(data.train)] == [("b.jpg", 0), ("c.jpg", 1)]
    assert [(Path(file).name, label) for file, label in rows(data.test)] == [("a.jpg", 0), ("d.jpg", 1)]


@pytest.mark.parametrize(
    ("loader", "folder", "published", "options"),
    [
        (source("cub200"), "cub200", (9430, 2358), {"split": "folders"}),
        (source("imagenet_r"), "imagenet-r", (24000, 6000), {}),
        (source("imagenet_a"), "imagenet-a", (5981, 1519), {}),
        (source("notmnist"), "notmnist", (16853, 1873), {"test_fraction": 0.1}),
    ],
)
def test_two_folders(tmp_path: Path, loader: Any, folder: str, published: tuple[int, int], options: Any) -> None:
    for part, count in (("train", 3), ("test", 2)):
        for label in ("b", "a"):
            for k in range(count):
                write(tmp_path / folder / part / label / f"{k}.png")
    data, notes = load(loader, tmp_path, **options)
    assert data.class_names == ("a", "b") and data.train.y.tolist() == [0] * 3 + [1] * 3 and len(data.test) == 4
    assert [int(note.rpartition(" ")[2]) for note in notes[:2]] == list(published)
    write(tmp_path / folder / "test" / "c" / "0.png")
    with pytest.raises(ConfigError, match=r"dataset.root: \w+ cannot be read from .* \(only test/ has the class c\)"):
        load(loader, tmp_path, **options)


def test_notmnist_small_with_its_damaged_files(tmp_path: Path) -> None:
    for label in "AB":
        for k in range(20):
            write(tmp_path / "notMNIST_small" / label / f"{k}.png", grey=True, seed=k)
    (tmp_path / "notMNIST_small" / "A" / "RGVtb.png").write_bytes(b"")
    options: dict[str, Any] = {"test_fraction": 0.3, "images": decoding(unreadable="skip")}
    data, notes = load(source("notmnist"), tmp_path, **options)
    assert len(data.train) + len(data.test) == 40 and isinstance(data.train, TensorSplit)
    assert data.shape == (1, 6, 6) and any("RGVtb.png: cannot be decoded" in note for note in notes)
    assert notes[-1] == f"dataset=notmnist: 40 images in {tmp_path}, published with 18724"


def test_core50_has_eight_domains_with_one_test_set(tmp_path: Path) -> None:
    for session in range(1, 12):
        for number in range(1, 51):
            write(tmp_path / "core50_128x128" / f"s{session}" / f"o{number}" / f"C_{session:02d}_{number:02d}_000.png")
    data, _ = load(source("core50"), tmp_path)
    assert [part.name for part in data.parts] == ["s1", "s2", "s4", "s5", "s6", "s8", "s9", "s11"]
    assert data.num_classes == 50 and data.class_names[5] == "mobile phone 1" and len(data.groups["category"]) == 10
    for part in data.parts:
        assert {Path(file).parts[-3] for file, _ in rows(part.train)} == {part.name}
        assert part.test is data.test and part.train.y.tolist() == list(range(50))
    assert {Path(file).parts[-3] for file, _ in rows(data.test)} == {"s3", "s7", "s10"} and len(data.test) == 150
    (tmp_path / "core50_128x128" / "s7").rename(tmp_path / "gone")
    with pytest.raises(ConfigError, match="^dataset.root: core50 cannot be read from .*s7: cannot be read"):
        load(source("core50"), tmp_path)


def test_domainnet_reads_its_lists(tmp_path: Path) -> None:
    home = tmp_path / "domainnet"
    for domain in ("real", "sketch"):
        for part, lines in (
            ("train", ["apple/a.jpg 0", "zigzag/b.jpg 1"]),
            ("test", ["zigzag/c.jpg 1", "apple/d.jpg 0"]),
        ):
            text(home / f"{domain}_{part}.txt", *(f"{domain}/{line}" for line in lines))
            for line in lines:
                write(home / domain / line.split()[0])
    data, notes = load(source("domainnet"), tmp_path, domains=["sketch", "real"])
    assert [part.name for part in data.parts] == ["sketch", "real"] and data.class_names == ("apple", "zigzag")
    assert [Path(file).parts[-3:] for file, _ in rows(data.parts[1].test)] == [
        ("real", "zigzag", "c.jpg"),
        ("real", "apple", "d.jpg"),
    ]
    assert data.parts[0].train.y.tolist() == [0, 1] and notes == [
        f"dataset=domainnet: 2 classes in {tmp_path}, published with 345"
    ]
    with pytest.raises(ConfigError, match="^dataset.domains: DomainNet has no 'scetch'; did you mean 'sketch'"):
        load(source("domainnet"), tmp_path, domains=["scetch"])


# --- mistakes


WITHOUT = {"test_drawings": 5, "partition": 1, "test_fraction": 0.2, "version": 2018, "split": "official"}
LOADERS = [
    source(name)
    for name in (
        *("omniglot", "flowers102", "food101", "dtd", "eurosat", "gtsrb"),
        *("caltech101", "sun397"),
        *("fgvc_aircraft", "oxford_pets", "places365", "inaturalist", "imagenet"),
        *("tiny_imagenet", "cub200", "imagenet_r", "imagenet_a", "core50"),
        *("domainnet", "stanford_cars", "notmnist"),
    )
]


@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.__name__)
def test_missing_files_are_one_line_with_the_layout(tmp_path: Path, loader: Any) -> None:
    known = loader.__annotations__
    options = {key: value for key, value in {**WITHOUT, "download": False, "domains": ["real"]}.items() if key in known}
    with pytest.raises(ConfigError) as error:
        load(loader, tmp_path, **options)
    message = str(error.value)
    assert message.startswith(f"dataset.root: {loader.__name__} cannot be read from {tmp_path}: expected ")
    assert "CLRUN_DATA" in message and "\n" not in message and not list(tmp_path.iterdir())
    remedy = (
        "or set dataset.download=true"
        if "download" in known
        else f"or prepare it as conf/dataset/{loader.__name__}.yaml says"
    )
    assert remedy in message


def test_listed_images_that_are_missing_are_named(tmp_path: Path) -> None:
    food101(tmp_path)
    (tmp_path / "food-101" / "images" / "waffles" / "12.jpg").unlink()
    with pytest.raises(ConfigError) as error:
        load(source("food101"), tmp_path, download=False)
    expected = f"dataset=food101: 1 of 3 listed images are missing in {tmp_path}/food-101: images/waffles/12.jpg"
    assert str(error.value) == expected


def test_a_damaged_list(tmp_path: Path) -> None:
    food101(tmp_path)
    (tmp_path / "food-101" / "meta" / "test.json").write_text("{")
    with pytest.raises(ConfigError, match=r"^dataset.root: food101 cannot be read from .*\(Expecting property name"):
        load(source("food101"), tmp_path, download=False)


def test_a_damaged_matlab_file(tmp_path: Path) -> None:
    flowers102(tmp_path)
    file = tmp_path / "flowers-102" / "setid.mat"
    file.write_bytes(file.read_bytes()[:150])
    with pytest.raises(ConfigError, match=r"^dataset.root: flowers102 cannot be read .*\(setid.mat is damaged: "):
        load(source("flowers102"), tmp_path, download=False)


def test_downloading_is_left_to_torchvision_and_its_checksums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("torchvision.datasets.food101")
    asked: list[Any] = []

    def fetch(url: str, **options: Any) -> None:
        asked.append(options["md5"])
        food101(tmp_path)

    monkeypatch.setattr(module, "download_and_extract_archive", fetch)
    assert len(load(source("food101"), tmp_path, download=True)[0].train) == 3
    assert asked == [module.Food101._MD5]

    def offline(url: str, **options: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(module, "download_and_extract_archive", offline)
    with pytest.raises(ConfigError, match="^dataset.root: food101 .*downloading failed .*no route to host"):
        load(source("food101"), tmp_path / "empty", download=True)


def test_published_counts_are_silent_when_they_fit(tmp_path: Path) -> None:
    from clrun.data.reading.assemble import Published, check_counts

    food101(tmp_path)
    data, _ = load(source("food101"), tmp_path, download=False)
    with collecting_warnings(notes := []):
        check_counts("food101", Published(3, 3, 2, 6), data, "here")
    assert (
        notes == [] and isinstance(data.train.images.options, Decoding) and torch.equal(data.train.y, data.train.labels)
    )
