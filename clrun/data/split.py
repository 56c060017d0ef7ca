"""Rows of labelled images: the batch, the split protocol, and the split that keeps its rows in memory.

Shapes: `B` batch, `N` rows of a split. Labels are data-set class ids everywhere.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, Self

import torch
from torch import Tensor

View = Literal["eval", "train", "raw"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples that travel together.

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
    """How stored images become network input; one object a stream, see `clrun.data.transforms`."""

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


class Split(Protocol):
    """Labelled rows that can be read in batches; implemented in memory here."""

    @property
    def y(self) -> Tensor:
        """[N] long, data-set class ids."""

    @property
    def transform(self) -> Transform:
        """How stored rows become network input."""

    def __len__(self) -> int: ...

    def select(self, rows: Tensor) -> "Split":
        """Return the split of these rows ([k] long), in this order, sharing storage."""

    def batches(
        self, size: int, *, view: View = "eval", shuffle: torch.Generator | None = None, shard: tuple[int, int] = (0, 1)
    ) -> Iterator[Batch]:
        """Yield batches of `size` rows; see `TensorSplit.batches`."""


@dataclass(frozen=True)
class TensorSplit:
    """A split whose images lie in one tensor, shared by every selection made from it.

    Attributes:
        images: [M, ...] stored images (uint8 [M, C, H, W]) or feature rows (float [M, D]).
        labels: [M] long.
        rows: [N] long, which of the M stored rows belong to this split, in order; None for all.
        positions: position of the rows' task in the stream, one for all or [N] long.
        transform: how stored images become network input.
        shift: change of the stored images that makes a domain (permutation, rotation); None for none.
    """

    images: Tensor
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

    def to(self, device: torch.device | str) -> Self:
        """Return the split with its tensors on `device`."""
        rows = None if self.rows is None else self.rows.to(device)
        positions = self.positions if isinstance(self.positions, int) else self.positions.to(device)
        images, labels = self.images.to(device), self.labels.to(device)
        return replace(self, images=images, labels=labels, rows=rows, positions=positions)

    def batches(
        self, size: int, *, view: View = "eval", shuffle: torch.Generator | None = None, shard: tuple[int, int] = (0, 1)
    ) -> Iterator[Batch]:
        """Yield batches of `size` rows (the last may be smaller).

        Args:
            size: rows of a batch over all shards together.
            view: "eval" for prepared rows, "train" for augmented ones (needs `shuffle`, which also drives the
                augmentation), "raw" for rows as stored.
            shuffle: generator of the row order; None keeps the order of the split.
            shard: (k, n) yields every n-th row of each batch beginning with the k-th, so that n readers share a batch.
        """
        assert view != "train" or shuffle is not None, "the train view draws its augmentation from `shuffle`"
        whole = self._rows(None if shuffle is None else torch.randperm(len(self), generator=shuffle))
        for start in range(0, len(self), size):
            raw = self._read(whole, slice(start + shard[0], min(start + size, len(self)), shard[1]))
            if view == "raw":
                yield raw
            elif view == "eval":
                yield Batch(self.transform.eval(raw.x), raw.y, raw.t, raw.i)
            elif shuffle is not None:
                yield Batch(self.transform.train(raw.x, shuffle), raw.y, raw.t, raw.i)

    def _rows(self, order: Tensor | None) -> Batch:
        """Return labels, positions and rows of the whole split in `order`; x says where the images are stored."""
        device = self.labels.device
        local = torch.arange(len(self), device=device) if order is None else order.to(device)
        stored = local if self.rows is None else self.rows[local]
        if isinstance(self.positions, int):
            positions = torch.full_like(local, self.positions)
        else:
            positions = self.positions[local]
        return Batch(stored, self.labels[stored], positions, local)

    def _read(self, whole: Batch, part: slice) -> Batch:
        """Return a part of the rows `whole` as stored, as a domain shows them."""
        x = self.images[whole.x[part]]
        return Batch(x if self.shift is None else self.shift(x), whole.y[part], whole.t[part], whole.i[part])


def concatenate(splits: Sequence[Split]) -> Split:
    """Return one split with the rows of several, in order; splits of one storage share it.

    Raises:
        TypeError: a split is not held in memory.
    """
    parts = []
    for split in splits:
        if not isinstance(split, TensorSplit):
            raise TypeError(f"cannot concatenate a {type(split).__name__}")
        parts.append(split)
    if len(parts) == 1:
        return parts[0]
    positions = torch.cat([torch.as_tensor(p.positions).expand(len(p)).to(p.labels.device) for p in parts])
    first = parts[0]
    if all(p.images is first.images and p.shift is None for p in parts):
        rows = torch.cat([torch.arange(len(p.labels)) if p.rows is None else p.rows for p in parts])
        return replace(first, rows=rows, positions=positions)
    reads = [p._read(p._rows(None), slice(None)) for p in parts]
    return replace(
        first,
        images=torch.cat([r.x for r in reads]),
        labels=torch.cat([r.y for r in reads]),
        rows=None,
        positions=positions,
        shift=None,
    )
