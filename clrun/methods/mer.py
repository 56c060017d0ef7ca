"""MER: Reptile on sequences of memory rows aligns the gradients of tasks (Riemer et al., ICLR 2019, arXiv 1810.11910).

Memory between tasks: M rows, each with the s bytes of a stored input and 8 bytes for its label and task, M (s + 8)
bytes together. During a task also copies of the parameters. Task id: not needed.

Verified: with beta = gamma = 1 and no memory it equals online SGD, with gamma = 0 the weights do not move, and steps
equal those computed by hand (test_methods_gradients).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clrun.blocks.buffers import ReservoirBuffer, per_process
from clrun.blocks.params import Params, clone, select
from clrun.data.split import Batch, Split, Transform
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.losses import Compete
from clrun.learning.method import Method
from clrun.learning.training import fit
from clrun.system.errors import ConfigError, Count, Fraction, PositiveInt


class Mer(Method):
    """For each incoming row, train on sequences of single rows, then interpolate back towards the weights before them.

    Algorithm 1: there are s sequences of the incoming row and k rows of the memory. After each sequence
    theta <- theta_W + beta (theta - theta_W), where theta_W are the weights before the sequence, and after all of them
    theta <- theta_A + gamma (theta - theta_A), where theta_A are the weights before the first one. Algorithm 6: one
    sequence with the incoming row at its end, and only the step with gamma. Algorithm 7: one sequence with the incoming
    row at a random place, whose loss is multiplied by s, and only the step with gamma. A single step on the batch of
    these rows would be plain replay with a smaller learning rate, because the alignment of gradients is an effect of
    second order in the steps.

    Steps are made by the budget's optimizer, which should be plain SGD (`budget=online`); its learning rate is alpha of
    the paper. budget.batch_size has no effect, and budget.steps counts steps on single rows. Only parameters are
    interpolated, and not running statistics. Each row of a task is offered to the memory once, after the rows of its
    own sequence have been drawn.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        capacity: M, rows in memory over all processes.
        algorithm: 1, 6 or 7.
        sequences: s; for algorithm 7 the weight of the incoming row's loss; without effect for algorithm 6.
        draws: k, the number of rows of the memory in a sequence.
        beta: interpolation after a sequence, only for algorithm 1; with 1 the weights stay as they are.
        gamma: interpolation after all sequences; with 1 the weights stay as they are, with 0 nothing is learned.
        chunk: number of rows that replace each single row, incoming or drawn. 1 is MER; a larger number is a deviation
            that saves time, and with several processes each needs at least one row. The loss of a chunk with fewer rows
            counts in proportion.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    samples_names = True

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        capacity: Count,
        algorithm: Literal[1, 6, 7],
        sequences: PositiveInt,
        draws: Count,
        beta: Fraction,
        gamma: Fraction,
        chunk: PositiveInt,
        compete: Compete,
    ) -> None:
        super().__init__(backbone, num_classes, compete=compete)
        self.capacity, self.algorithm, self.sequences, self.draws = capacity, algorithm, sequences, draws
        self.beta, self.gamma, self.chunk = beta, gamma, chunk
        self.memory = ReservoirBuffer(capacity)
        self.within: Params = {}  # theta_W; only while a task is learned
        self.across: Params = {}  # theta_A; only while a task is learned
        self.steps: list[Batch] = []  # batches of all sequences of the rows that are learned at present

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        if self.chunk < ctx.hardware.world:
            raise ConfigError(f"method.chunk={self.chunk}: less than one row per process; use hardware.processes=1")
        self.memory.capacity = per_process(self.capacity, rank=ctx.hardware.rank, world=ctx.hardware.world)

    def learn(self, task: Task, ctx: Context) -> None:
        self.within = self.across = clone(select(self))
        sequences: Any = _Sequences(task.train, self, ctx)
        fit(self, sequences, ctx, budget=replace(ctx.budget, batch_size=self.chunk))
        self.within, self.across = {}, {}

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        loss = super().loss(batch, ctx)
        incoming = self.algorithm == 7 and bool((batch.i >= 0).any())
        return self.sequences * loss if incoming else loss

    def after_step(self, ctx: Context) -> None:
        if not self.across:
            return  # a dry run measures a fit without `learn`
        done, last = ctx.progress.step + 1, ctx.progress.step + 1 == ctx.progress.total
        if self.algorithm == 1 and (done % self.length == 0 or last):
            self._step_back(self.within, self.beta)
            self.within = clone(select(self))
        if done % (self.rounds * self.length) == 0 or last:
            self._step_back(self.across, self.gamma)
            self.within = self.across = clone(select(self))

    @property
    def length(self) -> int:
        """Number of steps of a sequence."""
        return self.draws + 1

    @property
    def rounds(self) -> int:
        """Number of sequences per incoming row."""
        return self.sequences if self.algorithm == 1 else 1

    def steps_of(self, incoming: Batch, ctx: Context) -> list[Batch]:
        """Return the batches of all sequences of an incoming batch, empty ones if the memory has too few rows."""
        rank, world = ctx.hardware.rank, ctx.hardware.world
        size = per_process(self.chunk, rank=rank, world=world)
        steps: list[Batch] = []
        for _ in range(self.rounds):
            slots = self.memory.draw(self.draws * size, ctx.generator("replay", rank))
            parts = [self.memory.read(slots[k * size : (k + 1) * size]) for k in range(self.draws)]
            place = {1: 0, 6: self.draws}.get(self.algorithm)
            if place is None:
                place = int(torch.randint(self.draws + 1, (), generator=ctx.generator("place")))
            steps += [*parts[:place], incoming, *parts[place:]]
        if ctx.progress.epoch == 0:
            self.memory.add(incoming, generator=ctx.generator("reservoir", rank))
        return steps

    @torch.no_grad()
    def _step_back(self, start: Params, weight: float) -> None:
        """Set each parameter theta to start + weight * (theta - start)."""
        for name, parameter in select(self).items():
            parameter.copy_(torch.lerp(start[name], parameter, weight))


@dataclass(frozen=True)
class _Sequences:
    """The batches of all sequences of a task's rows, with the interface of a split that `fit` uses.

    Attributes:
        source: the rows of the task.
        method: makes the sequences of a row.
        ctx: context of the task.
    """

    source: Split
    method: Mer
    ctx: Context

    @property
    def transform(self) -> Transform:
        """The transform from stored rows to network input."""
        return self.source.transform

    def __len__(self) -> int:
        """Return the number of rows of all steps if the memory had enough rows for all of them."""
        chunk = self.method.chunk
        return math.ceil(len(self.source) / chunk) * self.method.rounds * self.method.length * chunk

    def batches(
        self, size: int, *, view: Literal["raw"], shuffle: torch.Generator, shard: tuple[int, int], skip: int
    ) -> Iterator[Batch]:
        """Return an iterator over one batch per step; a sequence is drawn after the steps of the rows before it.

        Where steps are skipped, the method still has the batches of the rows that the first step left belongs to.
        """
        method = self.method
        rows, within = divmod(skip, method.rounds * method.length)
        source = self.source.batches(size, view=view, shuffle=shuffle, shard=shard, skip=rows)

        def steps() -> Iterator[Batch]:
            for number, incoming in enumerate(source):
                if number or not within:
                    method.steps = method.steps_of(incoming, self.ctx)
                yield from method.steps if number else method.steps[within:]
            method.steps = []

        return steps()
