"""Data sets that are never learned and whose images and captions methods compare with, as ZSCL does.

Shapes: `N` reference images, `R` reference texts, `d` width of the joint space.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clrun.data.features import fingerprint
from clrun.data.modality import modality_of
from clrun.data.split import Split
from clrun.data.stream import Dataset, Stream
from clrun.learning.context import Context
from clrun.system.errors import ConfigError, first_line
from clrun.system.hardware import Hardware
from clrun.system.seeding import generator

Loader = Callable[..., Dataset]
ROWS = 256  # images of a pass over all of them


class Reference:
    """Training images of data sets, without their labels, prepared for a backbone; and texts.

    It is read when it is first needed. Copies and checkpoints hold the names of the data sets and no image.

    Args:
        loaders: of the data sets.
        rows: largest number of images of each data set, drawn once, the same in every run; None for all.
        texts: file with one text per line; None for the captions of the classes of the data sets.
        option: path of the option that lists the data sets, for messages.
    """

    not_state = ("_parts",)  # images, which are read again, are no memory of a method

    def __init__(self, loaders: Sequence[Loader], *, rows: int | None, texts: str | None, option: str) -> None:
        self.loaders, self.rows, self.file, self.option = tuple(loaders), rows, texts, option
        self._parts: tuple[Split, ...] | None = None
        self._texts: tuple[str, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without images and texts, which are read again."""
        return {**self.__dict__, "_parts": None, "_texts": ()}

    def open(self, backbone: nn.Module, learned: Stream) -> None:
        """Read the data sets, unless they have been read.

        Args:
            backbone: the network that the images are prepared for.
            learned: the tasks, to make sure that they are of another data set.

        Raises:
            ConfigError: a data set or the file cannot be read, does not suit the backbone, or is the one that is
                learned.
        """
        if self._parts is not None:
            return
        parts: list[Split] = []
        texts: list[str] = []
        for number, load in enumerate(self.loaders):
            try:
                dataset = load()
                dataset, transform, *_ = modality_of(dataset).fit(dataset, backbone)
            except ConfigError as error:
                raise ConfigError(f"{self.option}[{number}]: {error}") from error
            if any(_same(dataset.train, task.train) for task in learned.tasks):
                raise ConfigError(
                    f"{self.option}[{number}]: {dataset.name} is the data set that is learned; name others"
                )
            chosen = torch.randperm(len(dataset.train), generator=generator(0, "reference", number))[: self.rows]
            split = dataset.train.select(chosen.sort().values.to(dataset.train.labels.device))
            parts.append(replace(split, transform=transform))
            texts += [text for label in range(dataset.num_classes) for text in dataset.texts.of(label)]
        self._parts, self._texts = tuple(parts), tuple(texts) if self.file is None else read_texts(self.file)

    def place(self, hardware: Hardware) -> None:
        """Let the images be delivered on the device."""
        assert self._parts is not None, "open reads the data sets"
        self._parts = tuple(part.to(hardware.device, workers=hardware.workers or 0) for part in self._parts)

    def __len__(self) -> int:
        """Return N; the data sets have been read."""
        assert self._parts is not None, "open reads the data sets"
        return sum(map(len, self._parts))

    @property
    def texts(self) -> tuple[str, ...]:
        """The R texts; the data sets have been read."""
        return self._texts

    def take(self, rows: Tensor) -> Tensor:
        """Return prepared images [B, ...] of these rows ([B] long), on their device, in this order."""
        assert self._parts is not None, "open reads the data sets"
        found, order, start = [], [], 0
        for part in self._parts:
            own = ((rows >= start) & (rows < start + len(part))).nonzero()[:, 0]
            if len(own):
                split = part.select((rows[own] - start).to(part.labels.device))
                found.append(next(split.batches(len(own))).x)
                order.append(own)
            start += len(part)
        return torch.cat(found)[torch.cat(order).argsort().to(found[0].device)]

    def images(self) -> Iterator[Tensor]:
        """Yield all N prepared images in batches [B, ...], in order."""
        for rows in torch.split(torch.arange(len(self)), ROWS):
            yield self.take(rows)

    def sample(self, size: int, ctx: Context) -> Tensor:
        """Return the rows [B] long of the next batch: epoch after epoch, each in an order of its own.

        Args:
            size: rows of a batch over all processes, at most N; this process gets its share.
            ctx: context of the task; its progress says which batch is the next one.
        """
        size = min(size, len(self))
        per_epoch = len(self) // size
        epoch, place = divmod(ctx.progress.step, per_epoch)
        order = torch.randperm(len(self), generator=generator(ctx.seed, "task", ctx.task.id, "reference", epoch))
        batch = order[place * size : (place + 1) * size]
        return batch[ctx.hardware.rank :: ctx.hardware.world]


def _same(a: Split, b: Split) -> bool:
    """Return whether two splits store the same images."""
    return len(a.labels) == len(b.labels) and fingerprint(a) == fingerprint(b)


def read_texts(file: str) -> tuple[str, ...]:
    """Return the lines of a file that are not empty.

    Raises:
        ConfigError: the file cannot be read or has no text.
    """
    path = Path(file).expanduser()
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"method.reference_texts: {path} cannot be read ({first_line(error)})") from error
    texts = tuple(line.strip() for line in lines if line.strip())
    if not texts:
        raise ConfigError(f"method.reference_texts: {path} has no text; write one caption per line")
    return texts


__all__ = ["Loader", "Reference", "read_texts"]
