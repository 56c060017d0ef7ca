"""Several data sets as one, whose parts they are: each with classes of its own, for `scenario=dataset_sequence`."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F

from clrun.data.decode import Decoding
from clrun.data.images import ImageSplit, JoinedImages
from clrun.data.sources.folders import folder
from clrun.data.sources.listed import omniglot
from clrun.data.sources.listing import entries, hidden, some
from clrun.data.sources.prepared import notmnist
from clrun.data.sources.torchvision import cifar10, fashion_mnist, mnist, svhn
from clrun.data.split import Split, TensorSplit
from clrun.data.stream import Dataset
from clrun.system.errors import ConfigError, Fraction, Range

CHARACTERS = 1200  # of Omniglot in the stream of rotations: 100 tasks of 12
LETTERS = Decoding(
    size=28,
    fit="crop",
    interpolation="bilinear",
    exif=False,
    max_pixels=100_000_000,
    unreadable="skip",
    memory=512,
    cache=False,
)  # as `dataset=notmnist` decodes


def sequence(name: str, parts: Sequence[Dataset]) -> Dataset:
    """Return data sets of equal image shape as one; the classes of each follow those of the one before.

    The parts keep their normalisation constants, and the whole has the mean of them. A class name that several parts
    have is preceded by the name of its part. Nothing is copied: the rows of the whole are read from the parts.

    Args:
        name: of the whole.
        parts: at least one; what they share otherwise (seed, augmentations) is that of the first.
    """
    assert len({part.image_shape for part in parts}) == 1
    starts = [0, *accumulate(part.num_classes for part in parts)]
    counts = Counter(label for part in parts for label in part.class_names)
    names = [f"{p.name} {label}" if counts[label] > 1 else label for p in parts for label in p.class_names]
    facts: dict[str, Any] = {"num_classes": len(names), "class_names": tuple(names), "groups": {}}
    moved = [replace(_moved(part, start), **facts) for part, start in zip(parts, starts, strict=False)]
    vals = [part.val for part in moved if part.val is not None]
    assert len(vals) in (0, len(parts)), "validation rows in some parts only"
    return replace(
        moved[0],
        name=name,
        train=_joined([part.train for part in moved]),
        test=_joined([part.test for part in moved]),
        val=_joined(vals) if vals else None,
        mean=_average([part.mean for part in parts]),
        std=_average([part.std for part in parts]),
        parts=tuple(moved),
    )


def _average(constants: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    """Return the mean of each channel's constants."""
    return tuple(sum(values) / len(values) for values in zip(*constants, strict=True))


def _moved(part: Dataset, start: int) -> Dataset:
    """Return a part with its labels moved up by `start`."""

    def move(split: Split) -> Split:
        return replace(split, labels=split.labels + start)

    return replace(part, train=move(part.train), test=move(part.test), val=part.val and move(part.val))


def _joined(splits: Sequence[Split]) -> Split:
    """Return the rows of several splits, which stay where they are."""
    return ImageSplit(JoinedImages(splits), torch.cat([split.y for split in splits]))


def on_canvas(dataset: Dataset, *, channels: int, side: int) -> Dataset:
    """Return a data set in memory with its images in the middle of black squares; grey is repeated.

    Args:
        dataset: images of at most `side` pixels.
        channels: of the squares.
        side: of the squares, in pixels.
    """
    _, height, width = dataset.image_shape
    above, left = (side - height) // 2, (side - width) // 2
    frame = (left, side - width - left, above, side - height - above)
    done: dict[int, torch.Tensor] = {}

    def framed(split: Split) -> Split:
        assert isinstance(split, TensorSplit) and split.shift is None
        if id(split.images) not in done:
            done[id(split.images)] = F.pad(split.images, frame).expand(-1, channels, -1, -1)
        return replace(split, images=done[id(split.images)])

    return replace(
        dataset,
        train=framed(dataset.train),
        test=framed(dataset.test),
        val=dataset.val and framed(dataset.val),
        image_shape=(channels, side, side),
        mean=dataset.mean * (channels // len(dataset.mean)),
        std=dataset.std * (channels // len(dataset.std)),
    )


def with_quarter_turns(dataset: Dataset) -> Dataset:
    """Return a data set in memory with every image four times, turned by 0, 90, 180 and 270 degrees.

    Training and test images are turned apart, so that no image of a drawing is tested on that was trained on.
    """

    def turned(split: Split) -> Split:
        assert isinstance(split, TensorSplit)
        images = split.images if split.rows is None else split.images[split.rows]
        return TensorSplit(torch.cat([images.rot90(k, (2, 3)) for k in range(4)]), split.y.repeat(4))

    return replace(
        dataset, train=turned(dataset.train), test=turned(dataset.test), val=dataset.val and turned(dataset.val)
    )


def five_datasets(*, root: str, download: bool, val_fraction: Fraction, seed: int, augment: list[Any]) -> Dataset:
    """Return CIFAR-10, MNIST, SVHN, Fashion-MNIST and notMNIST as one data set of 50 classes (HALRP, WSN, L2P).

    Grey images of 28x28 pixels lie in the middle of 32x32 black ones, their grey repeated; each part has normalisation
    constants of its own, those of the published code.

    Args:
        root: folder of all data sets.
        download: fetch what is missing, all but notMNIST.
        val_fraction: share of each class's training images to set aside for validation.
        seed: of the validation images.
        augment: training augmentations.

    Raises:
        ConfigError: a data set is not under `root`, or downloading failed.
    """
    common: dict[str, Any] = {"root": root, "val_fraction": val_fraction, "seed": seed, "augment": augment}
    letters = notmnist(test_fraction=0.1, images=LETTERS, **common)
    cifar, digits, numbers, clothes = (
        load(download=download, **common) for load in (cifar10, mnist, svhn, fashion_mnist)
    )
    own = {"mnist": (0.1, 0.2752), "fashion_mnist": (0.2190, 0.3318)}  # of the squares, with their black frames
    parts = []
    for part in (cifar, digits, numbers, clothes, letters):
        mean, std = ((own[part.name][0],), (own[part.name][1],)) if part.name in own else (part.mean, part.std)
        parts.append(on_canvas(replace(part, mean=mean, std=std), channels=3, side=32))
    return sequence("five_datasets", parts)


def omniglot_rotation(
    *,
    root: str,
    test_drawings: Annotated[int, Range(minimum=1, maximum=19)],
    download: bool,
    images: Decoding,
    val_fraction: Fraction,
    seed: int,
    augment: list[Any],
) -> Dataset:
    """Return the first 1200 characters of Omniglot, each drawing in four rotations (APD, Yoon et al. 2020; WSN).

    Deviations: characters are numbered by alphabet, where the public code takes them as the file system lists them;
    and drawings are told apart before they are turned, where WSN tests on turned copies of training images.

    Args:
        root: folder of all data sets.
        test_drawings: drawings of each character that are test images, the last of the 20.
        download: fetch what is missing.
        images: how they are decoded.
        val_fraction: share of each class's training drawings to set aside for validation.
        seed: of the validation drawings.
        augment: training augmentations.

    Raises:
        ConfigError: the files are not there, or downloading failed.
    """
    whole = omniglot(
        root=root,
        test_drawings=test_drawings,
        download=download,
        images=images,
        val_fraction=val_fraction,
        seed=seed,
        augment=augment,
    )

    def first(split: Split) -> Split:
        return split.select((split.y < CHARACTERS).nonzero()[:, 0])

    kept = replace(
        whole,
        name="omniglot_rotation",
        train=first(whole.train),
        test=first(whole.test),
        val=whole.val and first(whole.val),
        num_classes=CHARACTERS,
        class_names=whole.class_names[:CHARACTERS],
        groups={},
    )
    return with_quarter_turns(kept)


def folder_sequence(
    *,
    name: str,
    root: str,
    sets: list[str] | None,
    test_fraction: Fraction,
    channels: Literal[1, 3],
    images: Decoding,
    mean: list[float],
    std: list[float],
    val_fraction: Fraction,
    seed: int,
    augment: list[Any],
) -> Dataset:
    """Return the images of several folders, each a data set with classes of its own, as `dataset=folder` reads it.

    Args:
        name: what to call the data; part of the identity of a run, where `root` is not.
        root: holds a folder for each data set.
        sets: which folders, by task id; None for all, sorted by name.
        test_fraction: share of test images, in data sets that have no folder of them.
        channels: 3 for colour, 1 for grey.
        images: how they are decoded.
        mean: mean of each channel, in [0, 1] units; [] leaves pixels in [0, 1].
        std: standard deviation of each channel, likewise.
        val_fraction: share of the training images of each class to set aside for validation.
        seed: of the validation images.
        augment: training augmentations.

    Raises:
        ConfigError: a folder that does not exist; or as `folder`.
    """
    home = Path(root).expanduser()
    found = [entry.name for entry in entries(home) if entry.is_dir() and not hidden(entry.name)]
    for title in sets or ():
        if title not in found:
            raise ConfigError(f"dataset.sets: no folder {title!r} in {root} (there are: {some(found) or 'none'})")
    parts = [
        folder(
            name=title,
            root=str(home / title),
            archive=None,
            sha256=None,
            test_fraction=test_fraction,
            channels=channels,
            images=images,
            mean=mean,
            std=std,
            val_fraction=val_fraction,
            seed=seed,
            augment=augment,
        )
        for title in sets or found
    ]
    if not parts:
        raise ConfigError(f"dataset.root: no folders in {root}; expected one for each data set")
    return sequence(Path(name).name, parts)
