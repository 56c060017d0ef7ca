"""Rows of labelled images: the batch, the split, and the split that keeps its rows in memory.

Shapes: `B` batch, `N` rows of a split, `M` stored rows. Labels are data-set class ids everywhere.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from clrun.data.contents import StoredRows, tensor_rows, text_digest
from clrun.system.digests import tensor_digest

View = Literal["eval", "train", "raw"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples of one step or one evaluation.

    Attributes:
        x: [B, ...] float, prepared; or as stored (uint8 images) in the raw view.
        y: [B] long, data-set class ids.
        t: [B] long, position in the stream of the task each sample belongs to.
        i: [B] long, row in the split the sample came from; -1 for a replayed sample.
        raw: un-augmented x of the same rows, set by `fit`.
    """

    x: Tensor
    y: Tensor
    t: Tensor
    i: Tensor
    raw: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.y)

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch with every tensor on `device`."""
        raw = None if self.raw is None else self.raw.to(device)
        return Batch(self.x.to(device), self.y.to(device), self.t.to(device), self.i.to(device), raw)

    @staticmethod
    def cat(*parts: "Batch") -> "Batch":
        """Concatenate batches along the samples; `raw` is dropped."""
        columns = ([getattr(p, name) for p in parts] for name in ("x", "y", "t", "i"))
        return Batch(*(torch.cat(column) for column in columns))


class Transform(Protocol):
    """How stored images become network input; one object per stream, see `clrun.data.transforms`."""

    @property
    def augments(self) -> bool:
        """Whether the train view differs from the eval view."""

    def eval(self, x: Tensor) -> Tensor:
        """Return stored images as prepared floats, deterministically and per sample."""

    def train(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return stored images as prepared, augmented floats."""


class Plain:
    """The transform of rows that are network input already (features, generated vectors)."""

    augments = False

    def eval(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x

    def train(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return `x`."""
        return x


@dataclass(frozen=True)
class Split(ABC):
    """Labelled rows that can be read in batches; any number of splits share what stores the rows.

    `TensorSplit` stores them in memory, `clrun.data.images.ImageSplit` in files. Code that reads every stored row once
    (frozen features, a picture of the data) relies on this: two splits store the same rows if their `images` are the
    same object, and show them alike if their `shift` is the same too; `whole()` has all M stored rows; and
    `fingerprint()` identifies their content.

    Attributes:
        images: the storage of M rows.
        labels: [M] long, on the device that batches are delivered on.
        rows: [N] long, which of the M stored rows belong to this split, in order; None for all.
        positions: position in the stream of the task of each row, [N] long; or one number for all rows.
        transform: how stored rows become network input.
        shift: change of the stored images that makes a domain (permutation, rotation); None for none.
    """

    images: Any
    labels: Tensor
    rows: Tensor | None = None
    positions: int | Tensor = 0
    transform: Transform = field(default_factory=Plain)
    shift: Callable[[Tensor], Tensor] | None = None

    @property
    def y(self) -> Tensor:
        """[N] long, data-set class ids."""
        return self.labels if self.rows is None else self.labels[self.rows]

    def __len__(self) -> int:
        """Return the number of rows N."""
        return len(self.labels if self.rows is None else self.rows)

    def select(self, rows: Tensor) -> Self:
        """Return the split of these rows ([k] long), in this order, sharing the stored images."""
        positions = self.positions if isinstance(self.positions, int) else self.positions[rows]
        return replace(self, rows=rows if self.rows is None else self.rows[rows], positions=positions)

    def whole(self) -> Self:
        """Return the split of all M stored rows, in stored order, shown as this one shows them."""
        return replace(self, rows=None, positions=0)

    def batches(
        self,
        size: int,
        *,
        view: View = "eval",
        shuffle: torch.Generator | None = None,
        shard: tuple[int, int] = (0, 1),
        skip: int = 0,
    ) -> Iterator[Batch]:
        """Return an iterator over batches of `size` rows (the last may be smaller); the order is drawn at once.

        Args:
            size: rows per batch, over all shards together.
            view: "eval" for prepared rows, "train" for augmented ones (needs `shuffle`, which also drives the
                augmentation), "raw" for rows as stored.
            shuffle: generator of the row order; None keeps the order of the split.
            shard: (k, n) yields every n-th row of each batch, beginning with the k-th, so that n processes share a
                batch.
            skip: number of batches at the beginning that are left out; their rows are not read.
        """
        assert view != "train" or shuffle is not None, "the train view draws its augmentation from `shuffle`"
        whole = self._rows(None if shuffle is None else torch.randperm(len(self), generator=shuffle))
        starts = range(skip * size, len(self), size)
        parts = [slice(start + shard[0], min(start + size, len(self)), shard[1]) for start in starts]
        images = self._read(whole.x[part] for part in parts)

        def prepared() -> Iterator[Batch]:
            for part, x in zip(parts, images, strict=True):
                if self.shift is not None:
                    x = self.shift(x)
                if view == "eval":
                    x = self.transform.eval(x)
                elif view == "train" and shuffle is not None:
                    x = self.transform.train(x, shuffle)
                yield Batch(x, whole.y[part], whole.t[part], whole.i[part])

        return prepared()

    def _rows(self, order: Tensor | None) -> Batch:
        """Return labels, positions and rows of the whole split in `order`; x holds the numbers of the stored rows."""
        device = self.labels.device
        local = torch.arange(len(self), device=device) if order is None else order.to(device)
        stored = local if self.rows is None else self.rows[local]
        at = self.positions
        positions = torch.full_like(local, at) if isinstance(at, int) else at[local]
        return Batch(stored, self.labels[stored], positions, local)

    @abstractmethod
    def _read(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the images as stored of each of the `parts` ([B] long, stored rows), on the device of the labels."""

    @abstractmethod
    def to(self, device: torch.device | str, *, workers: int = 0) -> Self:
        """Return the split with its tensors on `device`; images in files are decoded by `workers` threads."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hexadecimal digest of the M stored images; two processes that see the same data agree on it."""

    def stored_rows(self) -> StoredRows:
        """Return what identifies the M stored rows; it depends neither on times nor on where they lie.

        A storage that cannot tell its rows apart is identified as a whole.
        """
        return StoredRows((), np.full(len(self.labels), text_digest(self.fingerprint()), dtype=np.uint64))

    @classmethod
    @abstractmethod
    def joined(cls, parts: Sequence["Split"]) -> "Split":
        """Return one split with the rows of several, in order; at least one of them is of this class."""


@dataclass(frozen=True)
class TensorSplit(Split):
    """A split whose images lie in one tensor, shared by every selection made from it.

    Attributes:
        images: [M, ...] stored images (uint8 [M, C, H, W]) or feature rows (float [M, D]).
    """

    images: Tensor

    def to(self, device: torch.device | str, *, workers: int = 0) -> Self:
        """Return the split with its tensors on `device`."""
        rows = None if self.rows is None else self.rows.to(device)
        positions = self.positions if isinstance(self.positions, int) else self.positions.to(device)
        images, labels = self.images.to(device), self.labels.to(device)
        return replace(self, images=images, labels=labels, rows=rows, positions=positions)

    def fingerprint(self) -> str:
        """Return a digest of shape, type and bytes of the stored images."""
        return tensor_digest(self.images)

    def stored_rows(self) -> StoredRows:
        """Return digests of the rows; rows in memory have no names."""
        return tensor_rows(self.images)

    def _read(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        return (self.images[rows] for rows in parts)

    @classmethod
    def joined(cls, parts: Sequence[Split]) -> Split:
        """Return one split in memory with the rows of several, with the shifts of their domains applied."""
        reads = [(part, part._rows(None)) for part in parts]
        images = [part._shown(rows.x) for part, rows in reads if isinstance(part, TensorSplit)]
        return replace(
            parts[0],
            images=torch.cat(images),
            labels=torch.cat([rows.y for _, rows in reads]),
            rows=None,
            positions=torch.cat([rows.t for _, rows in reads]),
            shift=None,
        )

    def _shown(self, rows: Tensor) -> Tensor:
        """Return these stored rows ([k] long) with the shift of the domain applied."""
        return self.images[rows] if self.shift is None else self.shift(self.images[rows])


def concatenate(splits: Sequence[Split]) -> Split:
    """Return one split with the rows of several, in order; splits with the same storage are joined without copying."""
    first = splits[0]
    if len(splits) == 1:
        return first
    if all(p.images is first.images and torch.equal(p.labels, first.labels) and p.shift is None for p in splits):
        every = [p._rows(None) for p in splits]
        return replace(first, rows=torch.cat([p.x for p in every]), positions=torch.cat([p.t for p in every]))
    kind = next((type(p) for p in splits if not isinstance(p, TensorSplit)), TensorSplit)
    return kind.joined(splits)
