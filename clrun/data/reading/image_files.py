"""Data sets of image files: from lists of files to a `Dataset`, with a warning or an error about unusable files."""

from collections.abc import Sequence

import torch

from clrun.data.decode import Decoding, FileList
from clrun.data.images import FileImages, ImageSplit, unreadable
from clrun.data.reading.assemble import Domains, Groups, assemble
from clrun.data.reading.listing import Listing, printable, some
from clrun.data.reading.options import ImageReading, OwnReading
from clrun.data.stream import Dataset
from clrun.system.errors import ConfigError, warn


def joined(listings: Sequence[Listing]) -> Listing:
    """Return several listings with the same root as one."""
    rows = [(name, label) for part in listings for name, label in zip(part.names, part.labels, strict=True)]
    skipped = tuple(name for part in listings for name in part.skipped)
    names, labels = tuple(name for name, _ in rows), tuple(label for _, label in rows)
    return Listing(listings[0].root, names, labels, skipped, found=all(part.found for part in listings))


def numbered(listings: Sequence[Listing]) -> torch.Tensor:
    """Return [N] long: for each row of the joined listings, the number of the listing that it comes from."""
    return torch.arange(len(listings)).repeat_interleave(torch.tensor([len(part) for part in listings]))


def from_files(
    name: str,
    train: Listing,
    test: Listing,
    *,
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
        class_names: C names; the position is the class id.
        channels: 3 for colour, 1 for grey.
        mean: mean of each channel, in [0, 1] units; [] leaves pixels in [0, 1].
        std: standard deviation of each channel, likewise.
        reading: how images are decoded, validation rows, seed and training augmentations.
        groups: named partitions of the classes.
        domains: the domains that the data set consists of.
        complete: whether every class must have training images.

    Raises:
        ConfigError: a class has no training images; or as `assemble`.
    """
    images = reading.images
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
        reading=reading,
        domains=domains,
    )


def _usable(
    name: str, train: Listing, test: Listing, domains: Domains | None, images: Decoding, channels: int
) -> tuple[Listing, Listing, Domains | None]:
    """Return the usable files, with a warning about the others."""
    skipped = sorted({*train.skipped, *test.skipped})
    if skipped:
        warn(f"{name}: {len(skipped)} files are left out because their names are not those of images: {some(skipped)}")
    if images.unreadable == "error":
        return train, test, domains
    kept = [_readable(name, part, images, channels) for part in (train, test)]
    if domains is not None:
        tested = None if domains.test is None else domains.test[kept[1]]
        domains = Domains(domains.names, domains.train[kept[0]], tested)
    return train.selected(kept[0].tolist()), test.selected(kept[1].tolist()), domains


def _split(listing: Listing, images: Decoding, channels: int, part: str) -> ImageSplit:
    """Return the images of a listing as a split."""
    stored = FileImages(FileList(listing.root, listing.names), images, channels=channels, part=part)
    return ImageSplit(stored, torch.tensor(listing.labels, dtype=torch.long))


def _readable(name: str, listing: Listing, images: Decoding, channels: int) -> torch.Tensor:
    """Return [N] bool: whether each image can be decoded. A warning names those that cannot."""
    problems = unreadable(FileImages(FileList(listing.root, listing.names), images, channels=channels, part=""))
    if problems:
        warn(f"{name}: {len(problems)} files are left out because they cannot be decoded: {some([*problems.values()])}")
    kept = torch.ones(len(listing), dtype=torch.bool)
    kept[list(problems)] = False
    return kept


def check_classes(name: str, train: Sequence[int], test: Sequence[int], class_names: Sequence[str], where: str) -> None:
    """Refuse classes without training images; warn about classes without test images.

    Args:
        name: as in `dataset=NAME`.
        train: labels of the training images.
        test: labels of the test images.
        class_names: C names.
        where: folder or data set, for the message.

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
