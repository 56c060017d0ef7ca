"""Data sets of image files: from lists of files to a `Dataset`, with a warning or an error about unusable files."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from clrun.data.decode import Decoding, FileList, Files
from clrun.data.images import FileImages, ImageSplit
from clrun.data.reading.assemble import Domains, Groups, assemble
from clrun.data.reading.listing import Listing
from clrun.data.reading.options import ImageReading, OwnReading
from clrun.data.reading.text import printable, some
from clrun.data.stream import Dataset
from clrun.data.survey import ranged, survey
from clrun.system.errors import ConfigError, warn

PARTS = ("train", "test", "val")


def joined(listings: Sequence[Listing]) -> Listing:
    """Return several listings with the same root as one."""
    rows = [(name, label) for part in listings for name, label in zip(part.names, part.labels, strict=True)]
    names, labels = tuple(name for name, _ in rows), tuple(label for _, label in rows)
    return Listing(
        listings[0].root,
        names,
        labels,
        skipped=tuple(name for part in listings for name in part.skipped),
        unfollowed=tuple(name for part in listings for name in part.unfollowed),
        special=tuple(name for part in listings for name in part.special),
        linked={name: real for part in listings for name, real in part.linked.items()},
        found=all(part.found for part in listings),
    )


def numbered(listings: Sequence[Listing]) -> torch.Tensor:
    """Return [N] long: for each row of the joined listings, the number of the listing that it comes from."""
    return torch.arange(len(listings)).repeat_interleave(torch.tensor([len(part) for part in listings]))


def from_files(
    name: str,
    train: Listing,
    test: Listing,
    *,
    val: Listing | None = None,
    class_names: Sequence[str],
    channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    reading: ImageReading | OwnReading,
    groups: Groups | None = None,
    domains: Domains | None = None,
    complete: bool = True,
) -> Dataset:
    """Return the data set of image files.

    Args:
        name: as in `dataset=NAME`.
        train: training images.
        test: test images.
        val: images of a validation part; None without one.
        class_names: C names; the position is the class id.
        channels: 3 for colour, 1 for grey.
        mean: mean of each channel, in [0, 1] units; [] leaves pixels in [0, 1].
        std: standard deviation of each channel, likewise.
        reading: how images are decoded, validation rows, seed and training augmentations.
        groups: named partitions of the classes.
        domains: the domains that the data set consists of.
        complete: whether every class must have training images.

    Raises:
        ConfigError: a class has no training images; a file cannot be read; or as `assemble`.
    """
    parts = [train, test] if val is None else [train, test, val]
    parts, domains = _kept(parts, domains, _once(name, parts))
    say_left_out(name, parts)
    files = [FileList(part.root, part.names) for part in parts]
    images, readable, note = usable(name, files, reading.images, channels)
    parts, domains = _kept(parts, domains, readable)
    groups = groups or {}
    if complete:
        empty = reading.empty_classes if isinstance(reading, OwnReading) else "error"
        ids = check_classes(name, [part.labels for part in parts], class_names, str(train.root), empty=empty)
        parts, domains = _kept(parts, domains, [[ids[label] >= 0 for label in part.labels] for part in parts])
        parts = [replace(part, labels=tuple(ids[label] for label in part.labels)) for part in parts]
        class_names, groups = renumbered(class_names, groups, ids)
    splits: dict[str, Any] = {of: _split(part, images, channels, of) for part, of in zip(parts, PARTS, strict=False)}
    dataset = assemble(
        name,
        **splits,
        class_names=[printable(label) for label in class_names],
        mean=tuple(mean),
        std=tuple(std),
        groups=groups,
        group_names=None,
        reading=reading,
        domains=domains,
    )
    return with_note(dataset, note)


def _kept(
    parts: Sequence[Listing], domains: Domains | None, keep: Sequence[Sequence[bool]]
) -> tuple[list[Listing], Domains | None]:
    """Return the parts (training, test, perhaps validation) and their domains with the rows marked in `keep`."""
    found = [part.selected(own) for part, own in zip(parts, keep, strict=True)]
    if domains is None:
        return found, None
    of = dict(zip(PARTS, map(torch.tensor, keep), strict=False))
    changes = {part: getattr(domains, part)[rows] for part, rows in of.items() if getattr(domains, part) is not None}
    return found, replace(domains, **changes)


def _once(name: str, parts: Sequence[Listing]) -> list[list[bool]]:
    """Return which rows to keep so that a file that is reached twice through links counts once; a warning names others.

    The row that is not reached through a link is kept, else the first; the training part comes before the test part.
    """
    if not any(part.linked for part in parts):
        return [[True] * len(part) for part in parts]
    rows = [(k, row, real) for k, part in enumerate(parts) for row, real in enumerate(part.real_paths())]
    rows.sort(key=lambda item: parts[item[0]].names[item[1]] in parts[item[0]].linked)  # stable: links come last
    kept = [[True] * len(part) for part in parts]
    seen: set[str] = set()
    again = []
    for k, row, real in rows:
        if real in seen:
            kept[k][row] = False
            again.append(parts[k].names[row])
        seen.add(real)
    if again:
        warn(f"{name}: {len(again)} images are reached a second time through links, and count once: {some(again)}")
    return kept


def say_left_out(name: str, parts: Sequence[Listing], rows: str = "images") -> None:
    """Warn about files and links that were found and are not read; `rows` is what the others are called."""
    kinds = {
        "skipped": f"files are left out because their names are not those of {rows}",
        "unfollowed": "links are not followed because they lead to a folder around them or nowhere",
        "special": "pipes or devices are left out and were not opened",
    }
    for kind, words in kinds.items():
        if found := sorted({path for part in parts for path in getattr(part, kind)}):
            warn(f"{name}: {len(found)} {words}: {some(found)}")


def usable(
    name: str, parts: Sequence[Files], images: Decoding, channels: int
) -> tuple[Decoding, list[list[bool]], str]:
    """Look at all files; return how they are decoded, which can be, and a word on images with more than 8 bits.

    Args:
        name: as in `dataset=NAME`.
        parts: files of each part.
        images: how files are decoded; with `unreadable="skip"` a warning names files that cannot be.
        channels: 1 or 3.

    Raises:
        ConfigError: files cannot be read, and `images.unreadable` is "error".
    """
    surveys = [survey(files, images, channels) for files in parts]
    if images.unreadable == "error":
        _refuse([text for part in surveys for text in part.problems.values()])
    else:
        for part in surveys:
            if part.problems:
                listed = some([*part.problems.values()])
                warn(f"{name}: {len(part.problems)} files are left out because they cannot be decoded: {listed}")
    images, note = ranged(images, surveys)
    return images, [[k not in s.problems for k in range(len(f))] for f, s in zip(parts, surveys, strict=True)], note


def _refuse(problems: Sequence[str]) -> None:
    """Raise if there are problems of files."""
    if problems:
        more = f"; so are {len(problems) - 1} more files" if len(problems) > 1 else ""
        raise ConfigError(
            f"{problems[0]}{more}; repair or remove what cannot be read, or set dataset.images.unreadable=skip"
        )


def _split(listing: Listing, images: Decoding, channels: int, part: str) -> ImageSplit:
    """Return the images of a listing as a split."""
    stored = FileImages(FileList(listing.root, listing.names), images, channels=channels, part=part)
    return ImageSplit(stored, torch.tensor(listing.labels, dtype=torch.long))


def with_note(dataset: Dataset, note: str) -> Dataset:
    """Return a data set, and its parts, with a word on how its images were read."""
    if not note:
        return dataset
    parts = tuple(with_note(part, note) for part in dataset.parts)
    return replace(dataset, reading="; ".join(filter(None, (dataset.reading, note))), parts=parts)


def check_classes(
    name: str,
    labels: Sequence[Sequence[int]],
    class_names: Sequence[str],
    where: str,
    *,
    empty: Literal["error", "drop"],
    unit: str = "image",
) -> list[int]:
    """Return the class id of each class when those without training images are dropped; -1 for a dropped class.

    Warns about dropped classes and about classes without test images.

    Args:
        name: as in `dataset=NAME`.
        labels: class ids of the training images, of the test images, and perhaps of the validation images.
        class_names: C names.
        where: folder or data set, for the message.
        empty: "error" refuses classes without training images.
        unit: what one row is called, for the messages.

    Raises:
        ConfigError: a class has no training images and `empty` is "error"; or there are no test images at all.
    """
    trained, tested = set(labels[0]), set(labels[1])
    untrained = [title for label, title in enumerate(class_names) if label not in trained]
    if untrained and (empty == "error" or not trained):
        raise ConfigError(
            f"{where}: no training {unit}s of {some(untrained)}; add some, remove the class, set a smaller "
            "dataset.test_fraction, or set dataset.empty_classes=drop to leave such classes out"
        )
    if not tested & trained:
        raise ConfigError(f"{where}: there are no test {unit}s; add some, or set dataset.test_fraction above 0")
    if untrained:
        rows = sum(label not in trained for part in labels for label in part)
        also = f", and so are their {rows} other {unit}s" if rows else ""
        warn(f"{name}: classes without training {unit}s are left out{also}: {some(untrained)}")
    untested = [title for label, title in enumerate(class_names) if label in trained - tested]
    if untested:
        warn(f"{name}: no test {unit}s of {some(untested)} in {where}")
    kept = [label for label in range(len(class_names)) if label in trained]
    return [kept.index(label) if label in trained else -1 for label in range(len(class_names))]


def renumbered(class_names: Sequence[str], groups: Groups, ids: Sequence[int]) -> tuple[list[str], Groups]:
    """Return the names of the classes and their groups after some classes were dropped.

    Args:
        class_names: names by the old class ids.
        groups: named partitions of the old class ids.
        ids: new id by old id, -1 for a dropped class.
    """
    names = [name for name, label in zip(class_names, ids, strict=True) if label >= 0]
    kept = {
        title: tuple(own for group in parts if (own := tuple(ids[label] for label in group if ids[label] >= 0)))
        for title, parts in groups.items()
    }
    return names, kept
