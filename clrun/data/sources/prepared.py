"""Benchmarks that no library fetches any more or that come without parts: read from folders prepared by hand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from clrun.data.decode import Decoding
from clrun.data.sources.assemble import Domains, Published
from clrun.data.sources.benchmark import Benchmark, Content, labelled, lines, load, matlab
from clrun.data.sources.folders import joined, numbered
from clrun.data.sources.listing import class_folders, in_test, list_classes
from clrun.data.stream import Dataset
from clrun.system.errors import ConfigError, Fraction, did_you_mean

CORE50_TRAIN = (1, 2, 4, 5, 6, 8, 9, 11)  # sessions; the others are the test images of every protocol
CORE50_TEST = (3, 7, 10)
CORE50_CATEGORIES = (
    "plug adapter",
    "mobile phone",
    "scissors",
    "light bulb",
    "can",
    "glasses",
    "ball",
    "marker",
    "cup",
    "remote control",
)
DOMAINNET = ("real", "quickdraw", "painting", "sketch", "infograph", "clipart")


def tiny_imagenet(*, root: str, images: Decoding, val_fraction: Fraction, seed: int, augment: list[Any]) -> Dataset:
    """Return Tiny ImageNet: 100000 + 10000 photographs of 64x64 pixels, 200 classes in the order of their WordNet ids.

    The official validation images are the test images: the labels of the official test images are not public.

    Raises:
        ConfigError: the files are not there.
    """
    benchmark = Benchmark(
        "tiny_imagenet",
        "tiny-imagenet-200/ with train/, val/, wnids.txt and words.txt",
        Published(100000, 10000, 200),
        _tiny_imagenet,
        mean=(0.4802, 0.4480, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
    )
    return load(
        benchmark, root=root, download=False, images=images, val_fraction=val_fraction, seed=seed, augment=augment
    )


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


def cub200(
    *,
    root: str,
    split: Literal["official", "folders"],
    images: Decoding,
    val_fraction: Fraction,
    seed: int,
    augment: list[Any],
) -> Dataset:
    """Return CUB-200-2011 (Wah et al. 2011): photographs of 200 kinds of birds.

    Args:
        root: folder of all data sets.
        split: "official", 5994 + 5794 images as listed in CUB_200_2011/train_test_split.txt; "folders", cub200/train
            and cub200/test, which as PILOT and its relatives prepare them hold 9430 + 2358 images.
        images: how they are decoded.
        val_fraction: share of each class's training images to set aside for validation.
        seed: of the validation images.
        augment: training augmentations.

    Raises:
        ConfigError: the files are not there.
    """
    if split == "official":
        layout = "CUB_200_2011/ with images/, images.txt, image_class_labels.txt, train_test_split.txt and classes.txt"
        benchmark = Benchmark("cub200", layout, Published(5994, 5794, 200), _cub200)
    else:
        benchmark = _two_folders("cub200", "cub200", Published(9430, 2358, 200))
    return load(
        benchmark, root=root, download=False, images=images, val_fraction=val_fraction, seed=seed, augment=augment
    )


def _cub200(home: Path) -> Content:
    place = home / "CUB_200_2011"
    files, labels, training = (
        dict(line.split() for line in lines(place / f"{name}.txt"))
        for name in ("images", "image_class_labels", "train_test_split")
    )
    rows = {key: (f"images/{file}", int(labels[key]) - 1) for key, file in files.items()}
    train, test = ([rows[key] for key in files if training[key] == part] for part in ("1", "0"))
    names = [line.split()[1].partition(".")[2].replace("_", " ") for line in lines(place / "classes.txt")]
    return Content(labelled(place, train), labelled(place, test), names)


def imagenet_r(*, root: str, images: Decoding, val_fraction: Fraction, seed: int, augment: list[Any]) -> Dataset:
    """Return ImageNet-R (Hendrycks et al. 2021, arXiv 2006.16241): 24000 + 6000 renditions of 200 classes of ImageNet.

    Raises:
        ConfigError: the files are not there.
    """
    benchmark = _two_folders("imagenet_r", "imagenet-r", Published(24000, 6000, 200))
    return load(
        benchmark, root=root, download=False, images=images, val_fraction=val_fraction, seed=seed, augment=augment
    )


def imagenet_a(*, root: str, images: Decoding, val_fraction: Fraction, seed: int, augment: list[Any]) -> Dataset:
    """Return ImageNet-A (Hendrycks et al. 2021, arXiv 1907.07174): 5981 + 1519 photographs that models mistake.

    Raises:
        ConfigError: the files are not there.
    """
    benchmark = _two_folders("imagenet_a", "imagenet-a", Published(5981, 1519, 200))
    return load(
        benchmark, root=root, download=False, images=images, val_fraction=val_fraction, seed=seed, augment=augment
    )


def _two_folders(name: str, folder: str, published: Published) -> Benchmark:
    """Return a data set that lies in train/ and test/ with a folder for each class."""

    def read(home: Path) -> Content:
        place = home / folder
        classes = class_folders(place / "train")
        strangers = sorted(set(class_folders(place / "test")) - set(classes))
        if strangers:
            raise ValueError(f"only test/ has the class {strangers[0]}")
        train = list_classes(place / "train", classes, root=place)
        return Content(train, list_classes(place / "test", classes, root=place), classes)

    return Benchmark(name, f"{folder}/train/ and {folder}/test/ with a folder a class", published, read)


def core50(*, root: str, images: Decoding, val_fraction: Fraction, seed: int, augment: list[Any]) -> Dataset:
    """Return CORe50 (Lomonaco and Maltoni 2017, arXiv 1705.03550): 119894 + 44972 frames of 50 objects.

    Consists of eight domains, the training sessions, each tested on all test images (sessions 3, 7 and 10). Group:
    "category", ten kinds of five objects.

    Raises:
        ConfigError: the files are not there.
    """
    benchmark = Benchmark(
        "core50", "core50_128x128/ with s1/ to s11/, each with o1/ to o50/", Published(119894, 44972, 50), _core50
    )
    return load(
        benchmark, root=root, download=False, images=images, val_fraction=val_fraction, seed=seed, augment=augment
    )


def _core50(home: Path) -> Content:
    place = home / "core50_128x128"
    objects = [f"o{k + 1}" for k in range(50)]
    names = [f"{category} {k + 1}" for category in CORE50_CATEGORIES for k in range(5)]

    def sessions(numbers: Sequence[int]) -> list[Any]:
        for number in numbers:
            class_folders(place / f"s{number}")  # a missing session is an error
        return [list_classes(place / f"s{number}", objects, root=place) for number in numbers]

    train, test = sessions(CORE50_TRAIN), sessions(CORE50_TEST)
    domains = Domains([f"s{number}" for number in CORE50_TRAIN], numbered(train), None)
    groups = {"category": tuple(tuple(range(k, k + 5)) for k in range(0, 50, 5))}
    return Content(joined(train), joined(test), names, groups, domains)


def domainnet(
    *, root: str, domains: list[str], images: Decoding, val_fraction: Fraction, seed: int, augment: list[Any]
) -> Dataset:
    """Return DomainNet (Peng et al. 2019, arXiv 1812.01754), cleaned: 409832 + 176743 images, 345 classes, 6 domains.

    Args:
        root: folder of all data sets.
        domains: which ones, by task id.
        images: how they are decoded.
        val_fraction: share of the training images of each class of each domain to set aside for validation.
        seed: of the validation images.
        augment: training augmentations.

    Raises:
        ConfigError: no such domain, or the files are not there.
    """
    for name in domains:
        if name not in DOMAINNET:
            hint = did_you_mean(name, DOMAINNET)
            raise ConfigError(f"dataset.domains: DomainNet has no '{name}'{hint} (has: {', '.join(DOMAINNET)})")

    def read(home: Path) -> Content:
        place = home / "domainnet"
        parts = {
            part: [[line.rsplit(" ", 1) for line in lines(place / f"{name}_{part}.txt")] for name in domains]
            for part in ("train", "test")
        }
        train, test = (
            [labelled(place, ((path, int(label)) for path, label in domain)) for domain in part]
            for part in parts.values()
        )
        known = {int(label): path.split("/")[1] for domain in parts["train"] for path, label in domain}
        names = [known.get(label, f"class {label}") for label in range(max(known) + 1)]
        return Content(joined(train), joined(test), names, {}, Domains(domains, numbered(train), numbered(test)))

    whole = sorted(domains) == sorted(DOMAINNET)
    benchmark = Benchmark(
        "domainnet",
        "domainnet/ with a folder and two lists (real_train.txt, real_test.txt) a domain",
        Published(409832, 176743, 345) if whole else Published(classes=345),
        read,
    )
    return load(
        benchmark, root=root, download=False, images=images, val_fraction=val_fraction, seed=seed, augment=augment
    )


def stanford_cars(*, root: str, images: Decoding, val_fraction: Fraction, seed: int, augment: list[Any]) -> Dataset:
    """Return Stanford Cars (Krause et al. 2013): 8144 + 8041 photographs of 196 models.

    Raises:
        ConfigError: the files are not there.
    """
    benchmark = Benchmark(
        "stanford_cars",
        "stanford_cars/ with cars_train/, cars_test/, cars_test_annos_withlabels.mat, devkit/cars_train_annos.mat and "
        "devkit/cars_meta.mat",
        Published(8144, 8041, 196),
        _stanford_cars,
    )
    return load(
        benchmark, root=root, download=False, images=images, val_fraction=val_fraction, seed=seed, augment=augment
    )


def _stanford_cars(home: Path) -> Content:
    place = home / "stanford_cars"

    def part(path: str, folder: str) -> list[tuple[str, int]]:
        return [(f"{folder}/{row['fname']}", int(row["class"]) - 1) for row in matlab(place / path)["annotations"]]

    train = part("devkit/cars_train_annos.mat", "cars_train")
    test = part("cars_test_annos_withlabels.mat", "cars_test")
    names = [str(name) for name in matlab(place / "devkit" / "cars_meta.mat")["class_names"]]
    return Content(labelled(place, train), labelled(place, test), names)


def notmnist(
    *,
    root: str,
    test_fraction: Fraction,
    images: Decoding,
    val_fraction: Fraction,
    seed: int,
    augment: list[Any],
) -> Dataset:
    """Return notMNIST (Bulatov 2011): 18724 readable grey 28x28 letters A to J of many fonts, in memory.

    Args:
        root: folder of all data sets.
        test_fraction: share of test images, told by the hash of their names, of notMNIST_small/; notmnist/train and
            notmnist/test, 16853 + 1873 images, come first where they are there.
        images: how they are decoded.
        val_fraction: share of each class's training images to set aside for validation.
        seed: of the validation images.
        augment: training augmentations.

    Raises:
        ConfigError: the files are not there.
    """
    home = Path(root).expanduser()
    two = _two_folders("notmnist", "notmnist", Published(16853, 1873, 10))
    prepared = (home / "notmnist" / "train").is_dir()

    def read(home: Path) -> Content:
        if prepared:
            return two.read(home)
        place = home / "notMNIST_small"
        classes = class_folders(place)
        every = list_classes(place, classes)
        chosen = [in_test(name, test_fraction) for name in every.names]
        return Content(every.where([not test for test in chosen]), every.where(chosen), classes)

    benchmark = Benchmark(
        "notmnist",
        "notmnist/train/ and notmnist/test/, or notMNIST_small/, with folders A/ to J/",
        two.published if prepared else Published(None, None, 10, 18724),
        read,
        channels=1,
        mean=(0.4254,),
        std=(0.4501,),
        memory=True,
    )
    return load(
        benchmark, root=root, download=False, images=images, val_fraction=val_fraction, seed=seed, augment=augment
    )
