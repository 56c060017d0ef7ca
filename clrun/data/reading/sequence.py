"""Several data sets as one whose parts they are, each with classes of its own, for `scenario=dataset_sequence`."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F

from clrun.data.captions import joined
from clrun.data.decode import Pixels
from clrun.data.images import ImageSplit, JoinedImages, Rows
from clrun.data.split import Split, TensorSplit
from clrun.data.stream import Dataset


def sequence(name: str, parts: Sequence[Dataset]) -> Dataset:
    """Return data sets of equal image shape as one; the classes of each follow those of the one before.

    The parts keep their normalisation constants, and the whole has their mean. A class name that occurs in several
    parts is preceded by the name of its part. Nothing is copied: the rows of the whole are read from the parts.

    Args:
        name: name of the whole.
        parts: at least one data set; seed and augmentations of the whole are those of the first.
    """
    assert len({part.shape for part in parts}) == 1
    starts = [0, *accumulate(part.num_classes for part in parts)]
    counts = Counter(label for part in parts for label in part.class_names)
    names = [f"{p.name} {label}" if counts[label] > 1 else label for p in parts for label in p.class_names]
    facts: dict[str, Any] = {"num_classes": len(names), "class_names": tuple(names), "groups": {}}
    facts["captions"] = joined([part.texts for part in parts])
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
        reading="; ".join(dict.fromkeys(part.reading for part in parts if part.reading)),
    )


def _average(constants: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    """Return the mean of each channel's constants."""
    return tuple(sum(values) / len(values) for values in zip(*constants, strict=True))


def _moved(part: Dataset, start: int) -> Dataset:
    """Return a part with `start` added to its labels."""

    def move(split: Split) -> Split:
        return replace(split, labels=split.labels + start)

    return replace(part, train=move(part.train), test=move(part.test), val=part.val and move(part.val))


def _joined(splits: Sequence[Split]) -> Split:
    """Return the rows of several splits as one, without copying them."""
    return ImageSplit(JoinedImages(splits), torch.cat([split.y for split in splits]))


def on_canvas(dataset: Dataset, *, channels: int, side: int) -> Dataset:
    """Return a data set in memory with its images in the middle of black squares; grey is repeated.

    Args:
        dataset: a data set with images of at most `side` pixels.
        channels: channels of the squares.
        side: side of the squares in pixels.
    """
    _, height, width = dataset.shape
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
        shape=(channels, side, side),
        mean=dataset.mean * (channels // len(dataset.mean)),
        std=dataset.std * (channels // len(dataset.std)),
    )


class Resized(JoinedImages):
    """The rows of a split with square images in memory, resized when they are read; grey is repeated.

    Args:
        split: the rows.
        channels: channels of the resized images.
        side: their side in pixels.
        interpolation: how they are resized, with antialiasing.
    """

    def __init__(self, split: Split, *, channels: int, side: int, interpolation: str) -> None:
        super().__init__([split])
        self.shape = (len(split), channels, side, side)
        self.interpolation = interpolation

    def fill(self, rows: Rows, out: Pixels) -> None:
        """Write the images of `rows` [B] into `out` [B, S, S, C]."""
        found = self.splits[0].select(torch.from_numpy(rows))
        stored = next(found.batches(len(found), view="raw")).x.float()
        x = F.interpolate(stored, self.shape[2:], mode=self.interpolation, antialias=True)
        out[:] = x.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()

    def fingerprint(self) -> str:
        """Return a digest of the stored images and of how they are resized."""
        return hashlib.sha256(f"{super().fingerprint()} {self.shape} {self.interpolation}".encode()).hexdigest()


def resized(dataset: Dataset, *, channels: int, side: int, interpolation: str) -> Dataset:
    """Return a data set with images of this shape; one that has them already is returned as it is.

    Args:
        dataset: a data set with square images.
        channels: channels of the images; grey is repeated.
        side: side of the images in pixels.
        interpolation: how they are resized, with antialiasing.
    """
    if dataset.shape == (channels, side, side):
        return dataset

    def larger(split: Split) -> Split:
        images = Resized(split, channels=channels, side=side, interpolation=interpolation)
        return ImageSplit(images, split.y)

    copies = channels // len(dataset.mean)
    return replace(
        dataset,
        train=larger(dataset.train),
        test=larger(dataset.test),
        val=dataset.val and larger(dataset.val),
        shape=(channels, side, side),
        mean=dataset.mean * copies,
        std=dataset.std * copies,
    )


def with_quarter_turns(dataset: Dataset) -> Dataset:
    """Return a data set in memory with every image four times, turned by 0, 90, 180 and 270 degrees.

    Training and test images are turned separately, so that no drawing is in both parts.
    """

    def turned(split: Split) -> Split:
        assert isinstance(split, TensorSplit)
        images = split.images if split.rows is None else split.images[split.rows]
        return TensorSplit(torch.cat([images.rot90(k, (2, 3)) for k in range(4)]), split.y.repeat(4))

    return replace(
        dataset, train=turned(dataset.train), test=turned(dataset.test), val=dataset.val and turned(dataset.val)
    )
