"""Replay memories of raw rows, and the rules that choose the rows to store.

Symbols: `M` capacity in rows, `n` rows offered so far, `B` rows of a batch, `C` classes. A row takes the bytes of the
raw input as the split stores it (uint8 images), 4 bytes for its label and 4 bytes for the position of its task, and
another 4 C bytes if the method stores logits.
"""

from typing import Literal

import torch
from torch import Tensor

from clrun.blocks.params import Carrier
from clrun.data.split import Batch, TensorSplit, Transform


def per_process(total: int, *, rank: int, world: int) -> int:
    """Return the part of `total` rows for process `rank` of `world` processes; the parts add up to `total`."""
    return total // world + (rank < total % world)


class Buffer(Carrier):
    """A replay memory; each subclass is a rule that chooses in `_place` where an offered row is stored.

    Args:
        capacity: M, the largest number of rows.

    Attributes:
        tasks: number of tasks among which the rows are divided; a method sets it for `RingBuffer`.
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
        """Offer rows to the memory, one after the other.

        Args:
            batch: raw rows.
            generator: random generator of the rule, on the CPU.
            logits: logits of the rows [B, C] to store with them. For each buffer either all calls pass logits or none.
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
        """Return min(size, stored rows) different slots, drawn uniformly, as a long tensor."""
        return torch.randperm(self.filled, generator=generator)[:size].to(self.x.device)

    def read(self, slots: Tensor) -> Batch:
        """Return the raw rows in these slots as a batch, whose row indices `i` are -1."""
        return Batch(self.x[slots], self.y[slots].long(), self.t[slots].long(), torch.full_like(slots, -1))

    def sample(self, size: int, generator: torch.Generator) -> Batch:
        """Return a batch of min(size, stored rows) different raw rows, drawn uniformly."""
        return self.read(self.draw(size, generator))

    def _place(self, batch: Batch, generator: torch.Generator) -> list[int]:
        """Return the slot of each offered row, -1 if it is not stored. New slots are used in the order 0, 1, 2, ..."""
        raise NotImplementedError

    def _grow(self, rows: int, x: Tensor, logits: Tensor | None) -> None:
        """Allocate space for at least `rows` rows like `x`; the space at least doubles, up to the capacity."""
        allocated = len(self.y)
        if rows <= allocated:
            return
        more = max(rows, min(2 * allocated, self.capacity)) - allocated
        present = self.x if allocated else x[:0]
        self.x = torch.cat([present, x.new_zeros(more, *x.shape[1:])])
        self.y, self.t = (torch.cat([c.to(x.device), c.new_zeros(more, device=x.device)]) for c in (self.y, self.t))
        if logits is not None:
            stored = logits.new_zeros(0, logits.shape[1]).float() if self.logits is None else self.logits
            self.logits = torch.cat([stored, stored.new_zeros(more, logits.shape[1])])


class ReservoirBuffer(Buffer):
    """A uniform sample of all rows offered (Vitter, 1985, algorithm R).

    Row number n (counted from 1) is stored if n <= M. Otherwise a number j is drawn uniformly from 0 ... n - 1, and the
    row replaces row j if j < M. Each of n rows is then in the memory with probability M / n. The stored rows depend on
    the generator and on the order of the offered rows, but not on the batches in which they are offered.

    Deviation: two published implementations draw from n + 1 or n - 1 numbers, which is measurably not uniform.
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

    All rows of a task must be offered before those of the next task, because the memory of a task then no longer
    changes.
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
    """A sample of M rows that is as balanced over the classes as the stream allows, and uniform within each class.

    This is class-balancing reservoir sampling (Chrysakis and Moens, ICML 2020, algorithm 1). A class becomes full, and
    stays so, when the memory is full and no other class has more rows in it. A row of a class that is not full replaces
    a random row of the largest class. A row of a full class is stored as in a reservoir of that class alone.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.slots: dict[int, list[int]] = {}  # by class
        self.offered: dict[int, int] = {}
        self.full: set[int] = set()

    def _place(self, batch: Batch, generator: torch.Generator) -> list[int]:
        draws = torch.rand(len(batch), 2, dtype=torch.float64, generator=generator).tolist()
        return [self._place_one(label, *draw) for label, draw in zip(batch.y.tolist(), draws, strict=True)]

    def _place_one(self, label: int, accept: float, choice: float) -> int:
        """Return the slot of a row of class `label`, or -1.

        Args:
            label: the class.
            accept: uniform random number from [0, 1), which decides whether a row of a full class is stored.
            choice: uniform random number from [0, 1), which chooses the row that is replaced.
        """
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
            return own[int(choice * len(own))] if accept < len(own) / self.offered[label] else -1
        victim = self.slots[max(self.slots, key=lambda c: len(self.slots[c]))]
        slot = victim.pop(int(choice * len(victim)))
        own.append(slot)
        return slot


class Exemplars(Buffer):
    """Ordered sets of rows, one set per class or per task, which can be shortened to their first rows.

    There is no random choice: the method appends rows in the order of their importance. With several processes, each
    process stores all rows.

    Args:
        by: "y": one set per class; "t": one set per task.
    """

    def __init__(self, by: Literal["y", "t"]) -> None:
        super().__init__(2**62)
        self.by = by

    def append(self, batch: Batch) -> None:
        """Append raw rows to their sets, in order."""
        if not self.filled:
            self.x, self.y, self.t = batch.x[:0], batch.y[:0].int(), batch.t[:0].int()
        self.x = torch.cat([self.x, batch.x])
        self.y, self.t = torch.cat([self.y, batch.y.int()]), torch.cat([self.t, batch.t.int()])
        self.filled = len(self.y)

    def truncate(self, limit: int) -> None:
        """Drop all rows of each set except the first `limit`."""
        if not self.filled:
            return
        first = torch.cat([self.set(int(group))[:limit] for group in torch.unique(self.groups())]).sort().values
        self.x, self.y, self.t, self.filled = self.x[first], self.y[first], self.t[first], len(first)

    def set(self, group: int) -> Tensor:
        """Return the slots [k] long of the set of a class or task, in order."""
        return (self.groups() == group).nonzero()[:, 0]

    def groups(self) -> Tensor:
        """Return the class or task [n] int32 of every row, which is the set it belongs to."""
        return self.y if self.by == "y" else self.t

    def split(self, transform: Transform) -> TensorSplit:
        """Return all rows as a split with this transform."""
        return TensorSplit(self.x, self.y.long(), positions=self.t.long(), transform=transform)


def herd(features: Tensor, count: int) -> Tensor:
    """Return the indices of min(count, n) rows, chosen one by one so that their mean approximates that of all rows.

    This is herding without replacement (Welling, 2009; iCaRL, Rebuffi et al., CVPR 2017, algorithm 4): with mu the mean
    of all features, choice number k is the row j that minimises |mu - (f_j + sum of the features chosen before) / k|.
    The choice for a smaller count is the beginning of the choice for a larger one.

    Args:
        features: f [n, D].
        count: number of rows to choose.
    """
    features = features.double()
    mean, square = features.mean(dim=0), features.square().sum(dim=1)
    chosen: list[int] = []
    total = torch.zeros_like(mean)
    available = torch.ones(len(features), dtype=torch.bool, device=features.device)
    for k in range(1, min(count, len(features)) + 1):
        score = 2 * features @ (k * mean - total) - square  # -(|f_j|^2 - 2 <f_j, k mu - total>)
        best = int(score.masked_fill(~available, float("-inf")).argmax())
        chosen.append(best)
        total = total + features[best]
        available[best] = False
    return torch.tensor(chosen, dtype=torch.long, device=features.device)
