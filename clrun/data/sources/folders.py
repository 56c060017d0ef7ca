"""Your own images: folders of classes, and domains of such folders.

Rules for what is found there: the classes are the folders, sorted by name, and their images may lie in folders within.
Links are followed, except back to where they came from. Hidden files are passed over, and files that are no images by
their names are left out with a warning. How images of any kind are decoded: `clrun.data.decode.Decoding`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from clrun.data.decode import Decoding, FileList
from clrun.data.images import FileImages, ImageSplit, unreadable
from clrun.data.sources.archives import unpack
from clrun.data.sources.assemble import Domains, Groups, assemble
from clrun.data.sources.listing import (
    Listing,
    class_folders,
    entries,
    hidden,
    in_test,
    list_classes,
    printable,
    some,
)
from clrun.data.stream import Dataset
from clrun.system.errors import ConfigError, Fraction, warn

LAYOUT = "expected train/ and test/ with a folder for each class, or folders of classes alone"


def folder(
    *,
    name: str,
    root: str,
    archive: str | None,
    sha256: str | None,
    test_fraction: Fraction,
    channels: Literal[1, 3],
    images: Decoding,
    mean: list[float],
    std: list[float],
    val_fraction: Fraction,
    seed: int,
    augment: list[Any],
) -> Dataset:
    """Return the images of a folder: train/ and test/ with a folder for each class, or folders of classes alone.

    Without train/ and test/, the hash of an image's path (from the class's folder on, class included) decides whether
    it is a test image, so that images added later move no other one from one part to the other.

    Args:
        name: what to call the data; part of the identity of a run, where `root` is not.
        root: the folder.
        archive: zip or tar file that is unpacked to `root` when there is no such folder; None for none.
        sha256: checksum that the archive must have; None for any.
        test_fraction: share of test images, where there is no folder of them.
        channels: 3 for colour, 1 for grey.
        images: how they are decoded.
        mean: mean of each channel, in [0, 1] units; [] leaves pixels in [0, 1].
        std: standard deviation of each channel, likewise.
        val_fraction: share of each class's training images to set aside for validation.
        seed: of the validation images.
        augment: training augmentations.

    Raises:
        ConfigError: no images, a class that is only in test/, two classes that differ only in case, or an image that
            cannot be read; names the file or folder.
    """
    home = Path(root).expanduser()
    if archive is not None:
        unpack(Path(archive).expanduser(), home, sha256=sha256)
    tree = _tree(home)
    train, test = tree.parts(tree.classes, home, test_fraction)
    return from_files(
        Path(name).name or "folder",
        train,
        test,
        class_names=tree.classes,
        channels=channels,
        images=images,
        mean=mean,
        std=std,
        val_fraction=val_fraction,
        seed=seed,
        augment=augment,
    )


def folder_domains(
    *,
    name: str,
    root: str,
    archive: str | None,
    sha256: str | None,
    domains: list[str] | None,
    test_fraction: Fraction,
    channels: Literal[1, 3],
    images: Decoding,
    mean: list[float],
    std: list[float],
    val_fraction: Fraction,
    seed: int,
    augment: list[Any],
) -> Dataset:
    """Return the images of several domains: folders in `root`, each as `folder` describes, with the same classes.

    Args:
        name: what to call the data; part of the identity of a run, where `root` is not.
        root: holds a folder for each domain.
        archive: zip or tar file that is unpacked to `root` when there is no such folder; None for none.
        sha256: checksum that the archive must have; None for any.
        domains: which folders, by task id; None for all, sorted by name.
        test_fraction: share of test images, in domains that have no folder of them.
        channels: 3 for colour, 1 for grey.
        images: how they are decoded.
        mean: mean of each channel, in [0, 1] units; [] leaves pixels in [0, 1].
        std: standard deviation of each channel, likewise.
        val_fraction: share of the training images of each class of each domain to set aside for validation.
        seed: of the validation images.
        augment: training augmentations.

    Raises:
        ConfigError: as `folder`; or a domain that does not exist.
    """
    home = Path(root).expanduser()
    if archive is not None:
        unpack(Path(archive).expanduser(), home, sha256=sha256)
    chosen = domains or subfolders(home)
    _refuse_unknown(home, chosen)
    trees = [_tree(home / domain) for domain in chosen]
    names = sorted({label for tree in trees for label in tree.classes})
    parts = [tree.parts(names, home, test_fraction) for tree in trees]
    trains, tests = [train for train, _ in parts], [test for _, test in parts]
    return from_files(
        Path(name).name or "folder",
        joined(trains),
        joined(tests),
        class_names=names,
        channels=channels,
        images=images,
        mean=mean,
        std=std,
        val_fraction=val_fraction,
        seed=seed,
        augment=augment,
        domains=Domains(chosen, numbered(trains), numbered(tests)),
    )


def subfolders(home: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted; hidden ones do not count.

    Raises:
        ConfigError: the folder cannot be read, or holds none.
    """
    if not home.is_dir():
        raise ConfigError(f"dataset.root: there is no folder {home}; expected one with a folder for each part")
    found = [entry.name for entry in entries(home) if entry.is_dir() and not hidden(entry.name)]
    if not found:
        raise ConfigError(f"dataset.root: {home} holds no folders; expected one for each part")
    return found


def _refuse_unknown(home: Path, domains: Sequence[str]) -> None:
    """Refuse domains without folder."""
    found = subfolders(home)
    for domain in domains:
        if domain not in found:
            raise ConfigError(f"dataset.domains: no folder {domain!r} in {home} (there are: {some(found)})")


@dataclass(frozen=True)
class Tree:
    """A folder of classes, or two of them.

    Attributes:
        train: folder of the classes, or of their training images.
        test: folder of their test images; None when there is none.
        classes: names of the classes.
    """

    train: Path
    test: Path | None
    classes: list[str]

    def parts(self, classes: Sequence[str], root: Path, fraction: float) -> tuple[Listing, Listing]:
        """Return training and test images; `classes` give the ids, and names begin at `root`.

        Raises:
            ConfigError: a folder cannot be read.
        """
        train = list_classes(self.train, classes, root=root)
        if self.test is not None:
            return train, list_classes(self.test, classes, root=root)
        start = len(self.train.relative_to(root).as_posix()) + 1 if self.train != root else 0
        chosen = [in_test(name[start:], fraction) for name in train.names]
        return train.where([not test for test in chosen]), train.where(chosen)


def _tree(home: Path) -> Tree:
    """Return what kind of folder `home` is.

    Raises:
        ConfigError: it is neither kind, or classes are missing.
    """
    if not home.is_dir():
        raise ConfigError(f"dataset.root: there is no folder {home}; {LAYOUT}")
    train, test = home / "train", home / "test"
    if not train.is_dir():
        classes = class_folders(home)
        if not classes:
            raise ConfigError(f"{home}: holds no folders; {LAYOUT}")
        return Tree(home, None, classes)
    if not test.is_dir():
        raise ConfigError(f"{home}: holds train/ but no test/; {LAYOUT}")
    classes = class_folders(train)
    alone = sorted(set(class_folders(test)) - set(classes))
    for name in alone:
        twin = next((c for c in classes if c.casefold() == name.casefold()), None)
        if twin is not None:
            raise ConfigError(f"{home}: the classes train/{twin} and test/{name} differ only in case; rename one")
    if alone:
        raise ConfigError(f"{home}: only test/ has the classes {some(alone)}; add training images or remove them")
    if not classes:
        raise ConfigError(f"{train}: holds no folders of classes; {LAYOUT}")
    return Tree(train, test, classes)


def joined(listings: Sequence[Listing]) -> Listing:
    """Return listings of one root as one."""
    rows = [(name, label) for part in listings for name, label in zip(part.names, part.labels, strict=True)]
    skipped = tuple(name for part in listings for name in part.skipped)
    names, labels = tuple(name for name, _ in rows), tuple(label for _, label in rows)
    return Listing(listings[0].root, names, labels, skipped, seen=all(part.seen for part in listings))


def numbered(listings: Sequence[Listing]) -> torch.Tensor:
    """Return [N] long, which of the listings each row of them all is from."""
    return torch.arange(len(listings)).repeat_interleave(torch.tensor([len(part) for part in listings]))


def from_files(
    name: str,
    train: Listing,
    test: Listing,
    *,
    class_names: Sequence[str],
    channels: int,
    images: Decoding,
    mean: Sequence[float],
    std: Sequence[float],
    val_fraction: float,
    seed: int,
    augment: Sequence[Any],
    groups: Groups | None = None,
    domains: Domains | None = None,
    complete: bool = True,
) -> Dataset:
    """Return the data set of image files.

    Args:
        name: as in `dataset=NAME`.
        train: training images.
        test: test images.
        class_names: C names; the position is the class id.
        channels: 3 for colour, 1 for grey.
        images: how they are decoded.
        mean: mean of each channel, in [0, 1] units; [] leaves pixels in [0, 1].
        std: standard deviation of each channel, likewise.
        val_fraction: share of each class's training images to set aside for validation.
        seed: `dataset.seed`.
        augment: training augmentations.
        groups: named partitions of the classes.
        domains: the domains that the data set consists of.
        complete: whether to insist on training images of every class.

    Raises:
        ConfigError: a class has no training images; or as `assemble`.
    """
    train, test, domains = _usable(name, train, test, domains, images, channels)
    if complete:
        check_classes(name, train.labels, test.labels, class_names, str(train.root))
    return assemble(
        name,
        _split(train, images, channels, "train"),
        _split(test, images, channels, "test"),
        class_names=[printable(label) for label in class_names],
        mean=tuple(mean),
        std=tuple(std),
        groups=groups or {},
        val_fraction=val_fraction,
        seed=seed,
        augment=augment,
        domains=domains,
    )


def _usable(
    name: str, train: Listing, test: Listing, domains: Domains | None, images: Decoding, channels: int
) -> tuple[Listing, Listing, Domains | None]:
    """Return what can be used of the files, with a warning about the rest."""
    skipped = sorted({*train.skipped, *test.skipped})
    if skipped:
        warn(f"{name}: {len(skipped)} files are no images by their names and are left out: {some(skipped)}")
    if images.unreadable == "error":
        return train, test, domains
    kept = [_readable(name, part, images, channels) for part in (train, test)]
    if domains is not None:
        tested = None if domains.test is None else domains.test[kept[1]]
        domains = Domains(domains.names, domains.train[kept[0]], tested)
    return train.where(kept[0].tolist()), test.where(kept[1].tolist()), domains


def _split(listing: Listing, images: Decoding, channels: int, part: str) -> ImageSplit:
    """Return the rows of a listing."""
    stored = FileImages(FileList(listing.root, listing.names), images, channels=channels, part=part)
    return ImageSplit(stored, torch.tensor(listing.labels, dtype=torch.long))


def _readable(name: str, listing: Listing, images: Decoding, channels: int) -> torch.Tensor:
    """Return [N] bool, which images can be decoded; the others are named in a warning."""
    problems = unreadable(FileImages(FileList(listing.root, listing.names), images, channels=channels, part=""))
    if problems:
        warn(f"{name}: {len(problems)} files cannot be decoded and are left out: {some([*problems.values()])}")
    kept = torch.ones(len(listing), dtype=torch.bool)
    kept[list(problems)] = False
    return kept


def check_classes(name: str, train: Sequence[int], test: Sequence[int], class_names: Sequence[str], where: str) -> None:
    """Refuse classes without training images; warn of classes without test images.

    Args:
        name: as in `dataset=NAME`.
        train: labels of the training images.
        test: labels of the test images.
        class_names: C names.
        where: they come from.

    Raises:
        ConfigError: a class has no training images.
    """
    trained, tested = set(train), set(test)
    untrained = [title for label, title in enumerate(class_names) if label not in trained]
    if untrained:
        raise ConfigError(
            f"{where}: no training images of {some(untrained)}; add some, remove the class, or set a smaller "
            "dataset.test_fraction"
        )
    untested = [title for label, title in enumerate(class_names) if label not in tested]
    if untested:
        warn(f"{name}: no test images of {some(untested)} in {where}")
