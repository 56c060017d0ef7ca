"""The user's own folders of images: one data set, several domains of the same classes, or a sequence of data sets.

There is one folder per class, and class ids follow the sorted names (`dataset.sort`). Images may lie in folders within
a class's folder. Links are followed, except those that lead back to a folder around them; a file that is reached twice
counts once. Hidden files and folders of file servers and archive programs are ignored, and other files whose names are
not those of images are left out with a warning. `clrun.data.reading.layout` finds parts and classes, and
`clrun.data.decode.Decoding` says how images are decoded.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from clrun.data.reading.archives import unpack
from clrun.data.reading.assemble import Domains, one_fraction
from clrun.data.reading.class_names import in_order
from clrun.data.reading.image_files import from_files, joined, numbered, with_note
from clrun.data.reading.layout import merged_classes, part_of, tree
from clrun.data.reading.listing import Listing, subfolders
from clrun.data.reading.options import FolderReading, loader, user_path
from clrun.data.reading.sequence import sequence
from clrun.data.reading.text import some
from clrun.data.stream import Dataset
from clrun.system.errors import ConfigError, Positive, warn


@loader
def folder(reading: FolderReading, *, archive: str | None, sha256: str | None, archive_limit_gb: Positive) -> Dataset:
    """Return the images of a folder: train/ and test/ with one folder per class each, or only one folder per class.

    The parts are found by their names (train, training, test, testing, val, valid, validation, dev; in any case), or
    named by `reading.splits`. Without parts, the hash of an image's path (from the class's folder on, class included)
    decides whether it is a test image, so that images added later do not move others between the parts.

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
        unpack(user_path(archive, "dataset.archive"), reading.home, sha256=sha256, limit_gb=archive_limit_gb)
    found = tree(reading.home, reading.splits, reading.classes)
    classes = in_order(found.classes, reading.sort)
    train, test, val = found.parts(classes, found.home, reading.test_fraction)
    return with_note(_dataset(reading, train, test, val, classes), found.said)


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
        unpack(user_path(archive, "dataset.archive"), home, sha256=sha256, limit_gb=archive_limit_gb)
    chosen = domains or in_order(_domains(home), reading.sort)
    _refuse_unknown(home, chosen)
    trees = [tree(home / domain, reading.splits, reading.classes) for domain in chosen]
    classes = in_order(merged_classes(trees, str(home)), reading.sort)
    parts = [found.parts(classes, home, reading.test_fraction) for found in trees]
    trains, tests = [train for train, _, _ in parts], [test for _, test, _ in parts]
    vals = [val or Listing(home, (), (), found=True) for _, _, val in parts]
    val = joined(vals) if any(val is not None for _, _, val in parts) else None
    of = Domains(chosen, numbered(trains), numbered(tests), None if val is None else numbered(vals))
    return _dataset(reading, joined(trains), joined(tests), val, classes, domains=of)


@loader
def folder_sequence(reading: FolderReading, *, sets: list[str] | None) -> Dataset:
    """Return the images of several folders, each a data set with classes of its own, as `folder` describes.

    Args:
        reading: the common options; `root` holds the folders of the data sets.
        sets: names of the folders to use, by task id; None for all, sorted by name.

    Raises:
        ConfigError: a data set has no folder; or as `folder`.
    """
    one_fraction(reading)
    home = reading.home
    found = in_order(subfolders(home), reading.sort)
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
    if len({part.val is None for part in parts}) > 1:
        lacking = some([part.name for part in parts if part.val is None])
        raise ConfigError(
            f"dataset.root: {lacking} in {reading.root} have no validation part, and others have one; add it or remove "
            "the others, or name the parts to use, as in dataset.splits={train: train, test: test}"
        )
    if not parts:
        raise ConfigError(f"dataset.root: no folders in {reading.root}; expected one per data set")
    return sequence(Path(reading.name).name, parts)


def _dataset(
    reading: FolderReading,
    train: Listing,
    test: Listing,
    val: Listing | None,
    classes: Sequence[str],
    *,
    domains: Domains | None = None,
) -> Dataset:
    """Return the data set of the listed images."""
    found = from_files(
        Path(reading.name).name or "folder",
        train,
        test,
        val=val,
        class_names=classes,
        channels=reading.channels,
        mean=reading.mean,
        std=reading.std,
        reading=reading,
        domains=domains,
    )
    return replace(found, sort=reading.sort)


def _domains(home: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted, without hidden ones; warn about names of parts.

    Raises:
        ConfigError: the folder cannot be read, or contains no folders.
    """
    if not home.is_dir():
        raise ConfigError(f"dataset.root: there is no folder {home}; expected one with one folder per domain")
    found = subfolders(home)
    if not found:
        raise ConfigError(f"dataset.root: {home} contains no folders; expected one per domain")
    if len(parts := [name for name in found if part_of(name) is not None]) > 1:
        warn(f"{home}: {some(parts)} are learned as domains; if they are parts of one data set, use dataset=folder")
    return found


def _refuse_unknown(home: Path, domains: Sequence[str]) -> None:
    """Refuse domains that have no folder."""
    found = _domains(home)
    for domain in domains:
        if domain not in found:
            raise ConfigError(f"dataset.domains: no folder {domain!r} in {home} (there are: {some(found)})")
