"""The user's own folders of images: one data set, several domains of the same classes, or a sequence of data sets.

There is one folder per class, and class ids follow the sorted names. Images may lie in folders within a class's folder.
Links are followed, except those that lead back to a folder around them. Hidden files are ignored, and other files whose
names are not those of images are left out with a warning. `clrun.data.decode.Decoding` says how images are decoded.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clrun.data.reading.archives import unpack
from clrun.data.reading.assemble import Domains
from clrun.data.reading.image_files import from_files, joined, numbered
from clrun.data.reading.listing import Listing, by_hash, class_folders, entries, hidden, list_classes, some
from clrun.data.reading.options import FolderReading, loader
from clrun.data.reading.sequence import sequence
from clrun.data.stream import Dataset
from clrun.system.errors import ConfigError, Positive

LAYOUT = "expected train/ and test/ with one folder per class, or only one folder per class"


@loader
def folder(reading: FolderReading, *, archive: str | None, sha256: str | None, archive_limit_gb: Positive) -> Dataset:
    """Return the images of a folder: train/ and test/ with one folder per class each, or only one folder per class.

    Without train/ and test/, the hash of an image's path (from the class's folder on, class included) decides whether
    it is a test image, so that images added later do not move others between the parts.

    Args:
        reading: the common options.
        archive: zip or tar file that is unpacked to `root` when there is no such folder; None for none.
        sha256: checksum that the archive must have; None for any.
        archive_limit_gb: largest size of the archive after unpacking in GB.

    Raises:
        ConfigError: no images, a class that is only in test/, two classes that differ only in case, or an image that
            cannot be read; names the file or folder.
    """
    if archive is not None:
        unpack(Path(archive).expanduser(), reading.home, sha256=sha256, limit_gb=archive_limit_gb)
    tree = _tree(reading.home)
    train, test = tree.parts(tree.classes, reading.home, reading.test_fraction)
    return _dataset(reading, train, test, tree.classes)


@loader
def folder_domains(
    reading: FolderReading,
    *,
    archive: str | None,
    sha256: str | None,
    archive_limit_gb: Positive,
    domains: list[str] | None,
) -> Dataset:
    """Return the images of several domains with the same classes; one folder per domain, each as `folder` describes.

    Args:
        reading: the common options; `root` holds the folders of the domains.
        archive: zip or tar file that is unpacked to `root` when there is no such folder; None for none.
        sha256: checksum that the archive must have; None for any.
        archive_limit_gb: largest size of the archive after unpacking in GB.
        domains: names of the folders to use, by task id; None for all, sorted by name.

    Raises:
        ConfigError: as `folder`; or a domain has no folder.
    """
    home = reading.home
    if archive is not None:
        unpack(Path(archive).expanduser(), home, sha256=sha256, limit_gb=archive_limit_gb)
    chosen = domains or subfolders(home)
    _refuse_unknown(home, chosen)
    trees = [_tree(home / domain) for domain in chosen]
    classes = sorted({label for tree in trees for label in tree.classes})
    parts = [tree.parts(classes, home, reading.test_fraction) for tree in trees]
    trains, tests = [train for train, _ in parts], [test for _, test in parts]
    return _dataset(
        reading, joined(trains), joined(tests), classes, domains=Domains(chosen, numbered(trains), numbered(tests))
    )


@loader
def folder_sequence(reading: FolderReading, *, sets: list[str] | None) -> Dataset:
    """Return the images of several folders, each a data set with classes of its own, as `folder` describes.

    Args:
        reading: the common options; `root` holds the folders of the data sets.
        sets: names of the folders to use, by task id; None for all, sorted by name.

    Raises:
        ConfigError: a data set has no folder; or as `folder`.
    """
    home = reading.home
    found = [entry.name for entry in entries(home) if entry.is_dir() and not hidden(entry.name)]
    for title in sets or ():
        if title not in found:
            there = some(found) or "none"
            raise ConfigError(f"dataset.sets: no folder {title!r} in {reading.root} (there are: {there})")
    parts = [
        folder(
            **(vars(reading) | {"name": title, "root": str(home / title)}),
            archive=None,
            sha256=None,
            archive_limit_gb=math.inf,
        )
        for title in sets or found
    ]
    if not parts:
        raise ConfigError(f"dataset.root: no folders in {reading.root}; expected one per data set")
    return sequence(Path(reading.name).name, parts)


def _dataset(
    reading: FolderReading, train: Listing, test: Listing, classes: Sequence[str], *, domains: Domains | None = None
) -> Dataset:
    """Return the data set of the listed images."""
    return from_files(
        Path(reading.name).name or "folder",
        train,
        test,
        class_names=classes,
        channels=reading.channels,
        mean=reading.mean,
        std=reading.std,
        reading=reading,
        domains=domains,
    )


def subfolders(home: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted, without hidden ones.

    Raises:
        ConfigError: the folder cannot be read, or contains no folders.
    """
    if not home.is_dir():
        raise ConfigError(f"dataset.root: there is no folder {home}; expected one with one folder per domain")
    found = [entry.name for entry in entries(home) if entry.is_dir() and not hidden(entry.name)]
    if not found:
        raise ConfigError(f"dataset.root: {home} contains no folders; expected one per domain")
    return found


def _refuse_unknown(home: Path, domains: Sequence[str]) -> None:
    """Refuse domains that have no folder."""
    found = subfolders(home)
    for domain in domains:
        if domain not in found:
            raise ConfigError(f"dataset.domains: no folder {domain!r} in {home} (there are: {some(found)})")


@dataclass(frozen=True)
class Tree:
    """A folder with one folder per class, or two such folders for training and test images.

    Attributes:
        train: folder of the classes, or of their training images.
        test: folder of their test images; None if there is none.
        classes: names of the classes.
    """

    train: Path
    test: Path | None
    classes: list[str]

    def parts(self, classes: Sequence[str], root: Path, fraction: float) -> tuple[Listing, Listing]:
        """Return training and test images; the position in `classes` is the class id, and paths start from `root`.

        Raises:
            ConfigError: a folder cannot be read.
        """
        train = list_classes(self.train, classes, root=root)
        if self.test is not None:
            return train, list_classes(self.test, classes, root=root)
        start = len(self.train.relative_to(root).as_posix()) + 1 if self.train != root else 0
        return by_hash(train, fraction, start=start)


def _tree(home: Path) -> Tree:
    """Return the class folders of `home`, which may be divided into train/ and test/.

    Raises:
        ConfigError: there are no class folders, or a class has no training images.
    """
    if not home.is_dir():
        raise ConfigError(f"dataset.root: there is no folder {home}; {LAYOUT}")
    train, test = home / "train", home / "test"
    if not train.is_dir():
        classes = class_folders(home)
        if not classes:
            raise ConfigError(f"{home}: contains no folders; {LAYOUT}")
        return Tree(home, None, classes)
    if not test.is_dir():
        raise ConfigError(f"{home}: contains train/ but no test/; {LAYOUT}")
    classes = class_folders(train)
    alone = sorted(set(class_folders(test)) - set(classes))
    for name in alone:
        twin = next((c for c in classes if c.casefold() == name.casefold()), None)
        if twin is not None:
            raise ConfigError(f"{home}: the classes train/{twin} and test/{name} differ only in case; rename one")
    if alone:
        raise ConfigError(f"{home}: only test/ has the classes {some(alone)}; add training images or remove them")
    if not classes:
        raise ConfigError(f"{train}: contains no class folders; {LAYOUT}")
    return Tree(train, test, classes)
