"""Published data sets of image files: how they are declared, downloaded, read and compared with published sizes."""

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clrun.data.images import ImageSplit, in_memory
from clrun.data.reading.assemble import Domains, Groups, Published, check_counts
from clrun.data.reading.image_files import from_files
from clrun.data.reading.listing import Listing, class_folders, entries, list_classes
from clrun.data.reading.options import DownloadReading, ImageReading
from clrun.data.reading.text import some
from clrun.data.stream import Dataset
from clrun.system import libraries
from clrun.system.errors import ConfigError, one_line

UNREADABLE = (ConfigError, OSError, ValueError, KeyError, IndexError, TypeError, RuntimeError, csv.Error)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
Download = Callable[[Path], None]


@dataclass(frozen=True)
class Content:
    """The images and classes of a published data set.

    Attributes:
        train: training images.
        test: test images.
        class_names: C names by class id.
        groups: named partitions of the classes.
        domains: the domains that the data set consists of; None for a single domain.
    """

    train: Listing
    test: Listing
    class_names: Sequence[str]
    groups: Groups = field(default_factory=dict)
    domains: Domains | None = None


@dataclass(frozen=True)
class Benchmark:
    """A published data set of image files.

    Attributes:
        name: as in `dataset=NAME`.
        layout: the files and folders that `root` must hold, in words.
        published: published numbers of rows and classes.
        read: returns the content, given `root`.
        download: downloads the data set to `root` and compares checksums; None if it must be prepared by hand.
        channels: 3 for colour, 1 for grey.
        mean: mean of each channel, in [0, 1] units; ImageNet's if the literature uses these.
        std: standard deviation of each channel, likewise.
        memory: whether to decode all images at once and hold them in memory.
    """

    name: str
    layout: str
    published: Published
    read: Callable[[Path], Content]
    download: Download | None = None
    channels: int = 3
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]
    memory: bool = False


def load(benchmark: Benchmark, reading: ImageReading) -> Dataset:
    """Return a published data set; warn when its size is not the published one.

    Args:
        benchmark: the data set.
        reading: where its files are and how they are read; a `DownloadReading` can ask for a download.

    Raises:
        ConfigError: the data set is not there, parts of it are missing, or downloading failed.
    """
    content = _content(benchmark, reading)
    for part_name, part in (("training", content.train), ("test", content.test)):
        if not len(part):
            raise ConfigError(
                f"dataset={benchmark.name}: no {part_name} images in {reading.root}; expected {benchmark.layout}"
            )
        _refuse_missing(benchmark.name, part)
    dataset = from_files(
        benchmark.name,
        replace(content.train, skipped=()),
        replace(content.test, skipped=()),
        class_names=content.class_names,
        channels=benchmark.channels,
        mean=benchmark.mean,
        std=benchmark.std,
        reading=reading,
        groups=content.groups,
        domains=content.domains,
        complete=False,  # the published counts, compared below, show whether parts are missing
    )
    dataset = check_counts(benchmark.name, benchmark.published, dataset, reading.root)
    return _in_memory(dataset) if benchmark.memory else dataset


def _content(benchmark: Benchmark, reading: ImageReading) -> Content:
    """Return the images and classes of a published data set, downloaded first if asked for."""
    download = benchmark.download if isinstance(reading, DownloadReading) and reading.download else None
    try:
        if download is not None:
            download(reading.home)
        return benchmark.read(reading.home)
    except UNREADABLE as error:
        if download is not None:
            remedy = "downloading failed"
        elif benchmark.download is not None:
            remedy = "or set dataset.download=true"
        else:
            remedy = f"or prepare it as conf/dataset/{benchmark.name}.yaml says"
        raise ConfigError(
            f"dataset.root: {benchmark.name} cannot be read from {reading.root}: expected {benchmark.layout}; set "
            f"dataset.root or CLRUN_DATA to the folder that holds it, {remedy} ({one_line(error)})"
        ) from error


def _in_memory(dataset: Dataset) -> Dataset:
    """Return a data set without domains with all its images decoded and in memory."""
    train, test, val = (
        in_memory(split) if isinstance(split, ImageSplit) else split
        for split in (dataset.train, dataset.test, dataset.val)
    )
    assert train is not None and test is not None
    return replace(dataset, train=train, test=test, val=val)


def _refuse_missing(name: str, listing: Listing) -> None:
    """Refuse lists that name missing files; each folder is read once."""
    if listing.found:
        return
    there: dict[str, set[str]] = {}
    missing = []
    for path in listing.names:
        folder, _, file = path.rpartition("/")
        if folder not in there:
            home = listing.root / folder
            there[folder] = {entry.name for entry in entries(home)} if home.is_dir() else set()
        if file not in there[folder]:
            missing.append(path)
    if missing:
        raise ConfigError(
            f"dataset={name}: {len(missing)} of {len(listing)} listed images are missing in {listing.root}: "
            f"{some(missing)}"
        )


def two_folders(name: str, folder: str, published: Published) -> Benchmark:
    """Return a data set that lies in train/ and test/ with one folder per class."""

    def read(home: Path) -> Content:
        place = home / folder
        classes = class_folders(place / "train")
        strangers = sorted(set(class_folders(place / "test")) - set(classes))
        if strangers:
            raise ValueError(f"only test/ has the class {strangers[0]}")
        train = list_classes(place / "train", classes, root=place)
        return Content(train, list_classes(place / "test", classes, root=place), classes)

    return Benchmark(name, f"{folder}/train/ and {folder}/test/ with one folder per class", published, read)


def torchvision(kind: str, *calls: dict[str, Any], folder: str = "") -> Download:
    """Return a function that downloads a data set by a class of torchvision, which compares checksums.

    Args:
        kind: name of the class.
        *calls: arguments of the class; one call per part of the data set.
        folder: target folder, relative to `root`.
    """

    def download(home: Path) -> None:
        cls = getattr(libraries.load("torchvision.datasets"), kind)
        for options in calls or ({},):
            cls(str(home / folder), download=True, **options)

    return download


def lines(path: Path) -> list[str]:
    """Return the lines of a text file that are not empty."""
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def grouped(keys: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Return groups of the class ids with equal keys, in the order of the sorted keys."""
    return tuple(tuple(label for label, own in enumerate(keys) if own == key) for key in sorted(set(keys)))


def labelled(root: Path, rows: Iterable[tuple[str, int]]) -> Listing:
    """Return the listing of (path from `root`, class id) pairs."""
    pairs = list(rows)
    return Listing(root, tuple(name for name, _ in pairs), tuple(int(label) for _, label in pairs))


def matlab(path: Path) -> dict[str, Any]:
    """Return the variables of a .mat file (MATLAB 5); structures come as arrays with named fields.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it cannot be read or is damaged.
    """
    try:
        content: dict[str, Any] = libraries.load("scipy.io").loadmat(str(path), squeeze_me=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # damaged files raise almost anything
        raise ValueError(f"{path.name} is damaged: {error}") from error
    return content
