"""Rows kept for replay, and the rules that choose them.

Symbols: `M` capacity, `n` rows offered so far. A buffer stores raw inputs as the split stores them (uint8 images)
and 8 bytes of bookkeeping a row (label and task position as int32): M (s + 8) bytes for s bytes a raw row; logits,
where a method keeps them, add 4 C.
"""

from typing import Literal

import torch
from torch import Tensor

from clrun.blocks.params import Carrier
from clrun.data.split import Batch, TensorSplit, Transform


def share(total: int, *, rank: int, world: int) -> int:
    """Return the part of `total` that belongs to process `rank` of `world`; the parts add up to `total`."""
    return total // world + (rank < total % world)


class Buffer(Carrier):
    """Storage common to all rules; a rule says in `_place` where an offered row goes.

    Args:
        capacity: M, the largest number of rows.

    Attributes:
        tasks: how many tasks will share the rows; a learner sets it for `RingBuffer`.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.tasks = 1
        self.filled = 0
        self.x = torch.empty(0)
        self.y = torch.empty(0, dtype=torch.int32)
        self.t = torch.empty(0, dtype=torch.int32)
        self.logits: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of rows stored."""
        return self.filled

    def add(self, batch: Batch, *, generator: torch.Generator, logits: Tensor | None = None) -> None:
        """Offer rows, one after the other.

        Args:
            batch: raw rows.
            generator: chooses; on the CPU.
            logits: [B, C], kept beside the rows. Either every call of a buffer brings them or none.
        """
        writer = {slot: row for row, slot in enumerate(self._place(batch, generator)) if slot >= 0}
        if not writer:
            return
        self._grow(max(writer) + 1, batch.x, logits)
        into = torch.tensor(list(writer), device=batch.x.device)
        rows = torch.tensor(list(writer.values()), device=batch.x.device)
        self.x[into] = batch.x[rows]
        self.y[into] = batch.y[rows].int()
        self.t[into] = batch.t[rows].int()
        if self.logits is not None and logits is not None:
            self.logits[into] = logits[rows].detach().float()
        self.filled = max(self.filled, max(writer) + 1)

    def draw(self, size: int, generator: torch.Generator) -> Tensor:
        """Return [k] long, k = min(size, stored rows) different slots, uniformly."""
        return torch.randperm(self.filled, generator=generator)[:size].to(self.x.device)

    def read(self, slots: Tensor) -> Batch:
        """Return the raw rows in these slots; their `i` is -1."""
        return Batch(self.x[slots], self.y[slots].long(), self.t[slots].long(), torch.full_like(slots, -1))

    def sample(self, size: int, generator: torch.Generator) -> Batch:
        """Return min(size, stored rows) different raw rows, uniformly."""
        return self.read(self.draw(size, generator))

    def _place(self, batch: Batch, generator: torch.Generator) -> list[int]:
        """Return the slot of each offered row; -1 drops it. Slots are taken into use in order: 0, 1, 2, ..."""
        raise NotImplementedError

    def _grow(self, rows: int, x: Tensor, logits: Tensor | None) -> None:
        """Make room for `rows` rows like `x`, at least doubling what is there, up to the capacity."""
        room = len(self.y)
        if rows <= room:
            return
        more = max(rows, min(2 * room, self.capacity)) - room
        kept = self.x if room else x[:0]
        self.x = torch.cat([kept, x.new_zeros(more, *x.shape[1:])])
        self.y, self.t = (torch.cat([c.to(x.device), c.new_zeros(more, device=x.device)]) for c in (self.y, self.t))
        if logits is not None:
            stored = logits.new_zeros(0, logits.shape[1]).float() if self.logits is None else self.logits
            self.logits = torch.cat([stored, stored.new_zeros(more, logits.shape[1])])


class ReservoirBuffer(Buffer):
    """A uniform sample of all rows offered (Vitter, 1985, algorithm R).

    Row number n (from 1) is stored when n <= M; later it draws j uniformly from the n numbers 0 ... n - 1 and replaces
    row j if j < M, so that each of n rows is kept with probability M / n. Drawing from n + 1 or n - 1 numbers, as two
    published codes do, is measurably not uniform. What is kept depends on the generator and the order of the rows, not
    on how they are cut into batches.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.offered = 0

    def _place(self, batch: Batch, generator: torch.Generator) -> list[int]:
        number = self.offered + torch.arange(1, len(batch) + 1, dtype=torch.float64)
        drawn = (torch.rand(len(batch), dtype=torch.float64, generator=generator) * number).floor()
        self.offered += len(batch)
        slot = torch.where(number <= self.capacity, number - 1, drawn)
        return torch.where(slot < self.capacity, slot, -1).long().tolist()


class RingBuffer(Buffer):
    """The last M / T rows of each of T tasks (GEM, Lopez-Paz and Ranzato, NeurIPS 2017).

    The rows of a task must be offered together: once the next task has begun, the ring of the last one is closed.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.start, self.offered, self.task = 0, 0, -1

    def _place(self, batch: Batch, generator: torch.Generator) -> list[int]:
        slots, ring = [], self.capacity // self.tasks
        for task in batch.t.tolist():
            if task != self.task:
                self.start += min(self.offered, ring)
                self.offered, self.task = 0, task
            slots.append(self.start + self.offered % ring if ring else -1)
            self.offered += 1
        return slots


class ClassBalancedBuffer(Buffer):
    """A sample of M rows that is as balanced over the classes as the stream allows, uniform within each class.

    Class-balancing reservoir sampling (Chrysakis and Moens, ICML 2020, algorithm 1): a class is full from the moment
    it holds the most rows of all classes in a full memory. A row of a class that is not full replaces a row of the
    largest class; one of a full class is kept as in a reservoir of that class alone.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.slots: dict[int, list[int]] = {}  # by class
        self.offered: dict[int, int] = {}
        self.full: set[int] = set()

    def _place(self, batch: Batch, generator: torch.Generator) -> list[int]:
        draws = torch.rand(len(batch), 2, dtype=torch.float64, generator=generator).tolist()
        return [self._place_one(label, *draw) for label, draw in zip(batch.y.tolist(), draws, strict=True)]

    def _place_one(self, label: int, keep: float, which: float) -> int:
        """Return the slot of a row of class `label`; `keep` and `which` are uniform on [0, 1)."""
        own = self.slots.setdefault(label, [])
        self.offered[label] = self.offered.get(label, 0) + 1
        stored = sum(map(len, self.slots.values()))
        if stored < self.capacity:
            own.append(stored)
            return stored
        largest = max(map(len, self.slots.values()))
        if not largest:
            return -1
        self.full |= {c for c, slots in self.slots.items() if len(slots) == largest}
        if label in self.full:
            return own[int(which * len(own))] if keep < len(own) / self.offered[label] else -1
        victim = self.slots[max(self.slots, key=lambda c: len(self.slots[c]))]
        slot = victim.pop(int(which * len(victim)))
        own.append(slot)
        return slot


class Exemplars(Buffer):
    """Ordered sets of rows, one a class or one a task: of each set the first rows can be kept and the others dropped.

    Nothing is drawn: a method says which rows, in which order. With several processes each holds all of them.

    Args:
        by: what makes a set, the label ("y") or the task ("t").
    """

    def __init__(self, by: Literal["y", "t"]) -> None:
        super().__init__(2**62)
        self.by = by

    def append(self, batch: Batch) -> None:
        """Put raw rows behind those of their sets, in order."""
        if not self.filled:
            self.x, self.y, self.t = batch.x[:0], batch.y[:0].int(), batch.t[:0].int()
        self.x = torch.cat([self.x, batch.x])
        self.y, self.t = torch.cat([self.y, batch.y.int()]), torch.cat([self.t, batch.t.int()])
        self.filled = len(self.y)

    def truncate(self, limit: int) -> None:
        """Keep the first `limit` rows of each set."""
        if not self.filled:
            return
        keep = torch.cat([self.set(int(group))[:limit] for group in torch.unique(self.groups())]).sort().values
        self.x, self.y, self.t, self.filled = self.x[keep], self.y[keep], self.t[keep], len(keep)

    def set(self, group: int) -> Tensor:
        """Return [k] long, the slots of a class or a task, in order."""
        return (self.groups() == group).nonzero()[:, 0]

    def groups(self) -> Tensor:
        """Return [n], the class or the task of every row."""
        return self.y if self.by == "y" else self.t

    def split(self, transform: Transform) -> TensorSplit:
        """Return the rows as a split."""
        return TensorSplit(self.x, self.y.long(), positions=self.t.long(), transform=transform)


def herd(features: Tensor, count: int) -> Tensor:
    """Return [m] long, m = min(count, n): rows whose mean, after each further one, is closest to the mean of all.

    Herding without replacement (Welling 2009; iCaRL, Rebuffi et al., CVPR 2017, algorithm 4): row k minimises
    |mu - (f_j + sum of the rows before) / k|. The choice for a smaller count is the beginning of that for a larger one.

    Args:
        features: f [n, D].
        count: rows to choose.
    """
    features = features.double()
    mean, square = features.mean(dim=0), features.square().sum(dim=1)
    chosen: list[int] = []
    total = torch.zeros_like(mean)
    open_ = torch.ones(len(features), dtype=torch.bool, device=features.device)
    for k in range(1, min(count, len(features)) + 1):
        score = 2 * features @ (k * mean - total) - square  # |f_j|^2 - 2 <f_j, k mu - sum>, negated
        best = int(score.masked_fill(~open_, float("-inf")).argmax())
        chosen.append(best)
        total = total + features[best]
        open_[best] = False
    return torch.tensor(chosen, dtype=torch.long, device=features.device)
