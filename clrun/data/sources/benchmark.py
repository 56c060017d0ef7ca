"""What the published sets of image files have in common: a reader of their lists, their sizes, one clear error."""

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clrun.data.decode import Decoding
from clrun.data.images import ImageSplit, in_memory
from clrun.data.sources.assemble import Domains, Groups, Published, check_counts
from clrun.data.sources.folders import from_files
from clrun.data.sources.listing import Listing, entries, some
from clrun.data.stream import Dataset
from clrun.system import libraries
from clrun.system.errors import ConfigError, one_line

UNREADABLE = (ConfigError, OSError, ValueError, KeyError, IndexError, TypeError, RuntimeError, csv.Error)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
Download = Callable[[Path], None]


@dataclass(frozen=True)
class Content:
    """What a published data set holds.

    Attributes:
        train: training images.
        test: test images.
        class_names: C names by class id.
        groups: named partitions of the classes.
        domains: the domains that it consists of; None for one.
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
        layout: what must lie in the folder of all data sets.
        published: rows and classes.
        read: returns the content, given the folder of all data sets.
        download: fetches it there, with its checksum compared; None where that cannot be done.
        channels: 3 for colour, 1 for grey.
        mean: mean of each channel, in [0, 1] units; ImageNet's where the literature takes these.
        std: standard deviation of each channel, likewise.
        memory: decode all images at once and keep them in memory.
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


def load(
    benchmark: Benchmark,
    *,
    root: str,
    download: bool,
    images: Decoding,
    val_fraction: float,
    seed: int,
    augment: list[Any],
) -> Dataset:
    """Return a published data set; warn when it has not the published size.

    Args:
        benchmark: which.
        root: folder of all data sets.
        download: fetch it there when it is missing.
        images: how images are decoded.
        val_fraction: share of each class's training images to set aside for validation.
        seed: `dataset.seed`.
        augment: training augmentations.

    Raises:
        ConfigError: it is not there, parts of it are missing, or downloading failed.
    """
    home = Path(root).expanduser()
    fetch = benchmark.download if download else None
    try:
        if fetch is not None:
            fetch(home)
        content = benchmark.read(home)
    except UNREADABLE as error:
        remedy = "downloading failed" if fetch is not None else ""
        remedy = remedy or ("or set dataset.download=true" if benchmark.download else "or prepare it as its YAML says")
        reason = one_line(error)
        raise ConfigError(
            f"dataset.root: {benchmark.name} cannot be read from {root}: expected {benchmark.layout}; set dataset.root "
            f"or CLRUN_DATA to the folder that holds it, {remedy} ({reason})"
        ) from error
    for what, part in (("training", content.train), ("test", content.test)):
        if not len(part):
            raise ConfigError(f"dataset={benchmark.name}: no {what} images in {root}; expected {benchmark.layout}")
        _refuse_missing(benchmark.name, part)
    dataset = from_files(
        benchmark.name,
        replace(content.train, skipped=()),
        replace(content.test, skipped=()),
        class_names=content.class_names,
        channels=benchmark.channels,
        images=images,
        mean=benchmark.mean,
        std=benchmark.std,
        val_fraction=val_fraction,
        seed=seed,
        augment=augment,
        groups=content.groups,
        domains=content.domains,
        complete=False,  # parts of a published set are told by its counts
    )
    dataset = check_counts(benchmark.name, benchmark.published, dataset, root)
    return _in_memory(dataset) if benchmark.memory else dataset


def _in_memory(dataset: Dataset) -> Dataset:
    """Return a data set without domains with its images decoded."""
    train, test, val = (
        in_memory(split) if isinstance(split, ImageSplit) else split
        for split in (dataset.train, dataset.test, dataset.val)
    )
    assert train is not None and test is not None
    return replace(dataset, train=train, test=test, val=val)


def _refuse_missing(name: str, listing: Listing) -> None:
    """Refuse lists of files that are not there; each folder is read once."""
    if listing.seen:
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


def torchvision(kind: str, *calls: dict[str, Any], folder: str = "") -> Download:
    """Return a function that lets a torchvision class download itself, which compares checksums.

    Args:
        kind: name of the class.
        *calls: arguments, one call each (the parts of the data set).
        folder: where to, in the folder of all data sets.
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
    """Return the class ids with equal keys together; groups are in the order of their sorted keys."""
    return tuple(tuple(label for label, own in enumerate(keys) if own == key) for key in sorted(set(keys)))


def labelled(root: Path, rows: Iterable[tuple[str, int]]) -> Listing:
    """Return the listing of (path from `root`, class id) pairs."""
    pairs = list(rows)
    return Listing(root, tuple(name for name, _ in pairs), tuple(int(label) for _, label in pairs))


def matlab(path: Path) -> dict[str, Any]:
    """Return the variables of a .mat file (MATLAB 5); structures come as arrays with named fields.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it cannot be read or is damaged.
    """
    try:
        content: dict[str, Any] = libraries.load("scipy.io").loadmat(str(path), squeeze_me=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # damaged files raise almost anything
        raise ValueError(f"{path.name} is damaged: {error}") from error
    return content
