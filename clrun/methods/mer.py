"""MER: Reptile on sequences of memory rows aligns the gradients of tasks (Riemer et al., ICLR 2019, arXiv 1810.11910).

Memory between tasks: M (s + 8) bytes, M = capacity, s bytes a stored input; copies of the parameters during a task.
Task id: not needed.

Verified: all the way without memory it is online SGD, no way it does not move, steps by hand (test_methods_gradients).
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
    """For each incoming row, steps on single rows one after the other, then a step back towards where they began.

    Algorithm 1: s sequences of the incoming row and k rows of the memory; after each, theta <- theta_W + beta (theta -
    theta_W), and after all of them theta <- theta_A + gamma (theta - theta_A), where W and A mark their beginnings.
    Algorithm 6: one sequence, the incoming row last, gamma only. Algorithm 7: one sequence, the incoming row at a
    random place and its loss times s, gamma only. One batched step instead of the sequence would be plain replay with
    a smaller learning rate: what aligns gradients is of second order in the steps.

    The steps are the budget's optimizer's, which should be plain SGD (`budget=online`); its learning rate is alpha.
    budget.batch_size has no effect, budget.steps counts single steps. Only parameters step back, no running statistics.
    Each row of a task is offered to the reservoir once, after its own sequence has been drawn.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        capacity: M, rows in memory over all processes.
        algorithm: 1, 6 or 7.
        sequences: s; for algorithm 7 the weight of the incoming row's loss; no effect in algorithm 6.
        draws: k, rows of the memory in a sequence.
        beta: step within, algorithm 1 only; 1 goes all the way.
        gamma: step across; 1 goes all the way, 0 does not move.
        chunk: rows that take the place of one row, incoming or drawn. 1 is MER; more is a deviation that saves time,
            and several processes need one row each. Where fewer rows are at hand their loss counts in proportion.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

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
        self.within: Params = {}  # theta_W and theta_A, while a task is learned
        self.across: Params = {}

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        if self.chunk < ctx.hardware.world:
            raise ConfigError(
                f"method.chunk={self.chunk}: {ctx.hardware.world} processes cannot share it; use hardware.processes=1"
            )
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
            return  # a dry run times a fit outside of `learn`
        done, last = ctx.progress.step + 1, ctx.progress.step + 1 == ctx.progress.total
        if self.algorithm == 1 and (done % self.length == 0 or last):
            self._step_back(self.within, self.beta)
            self.within = clone(select(self))
        if done % (self.rounds * self.length) == 0 or last:
            self._step_back(self.across, self.gamma)
            self.within = self.across = clone(select(self))

    @property
    def length(self) -> int:
        """Steps of a sequence."""
        return self.draws + 1

    @property
    def rounds(self) -> int:
        """Sequences of an incoming row."""
        return self.sequences if self.algorithm == 1 else 1

    def steps_of(self, incoming: Batch, ctx: Context) -> list[Batch]:
        """Return the batches of `chunk` rows that an incoming one brings about; empty where the memory has no row."""
        rank, world = ctx.hardware.rank, ctx.hardware.world
        size = per_process(self.chunk, rank=rank, world=world)
        steps: list[Batch] = []
        for _ in range(self.rounds):
            slots = self.memory.draw(self.draws * size, ctx.generator("replay", rank))
            parts = [self.memory.read(slots[k * size : (k + 1) * size]) for k in range(self.draws)]
            where = {1: 0, 6: self.draws}.get(self.algorithm)
            if where is None:
                where = int(torch.randint(self.draws + 1, (), generator=ctx.generator("place")))
            steps += [*parts[:where], incoming, *parts[where:]]
        if ctx.progress.epoch == 0:
            self.memory.add(incoming, generator=ctx.generator("reservoir", rank))
        return steps

    @torch.no_grad()
    def _step_back(self, start: Params, share_: float) -> None:
        """Put each parameter on the line from `start` to where it is."""
        for name, parameter in select(self).items():
            parameter.copy_(torch.lerp(start[name], parameter, share_))


@dataclass(frozen=True)
class _Sequences:
    """The rows of a task, each with all the steps it brings about, as `fit` reads a split: length, batches, transform.

    Attributes:
        source: the task's rows.
        learner: makes the steps.
        ctx: context of the task.
    """

    source: Split
    learner: Mer
    ctx: Context

    @property
    def transform(self) -> Transform:
        """How stored rows become network input."""
        return self.source.transform

    def __len__(self) -> int:
        """Return the rows of all steps, as if none were missing."""
        chunk = self.learner.chunk
        return math.ceil(len(self.source) / chunk) * self.learner.rounds * self.learner.length * chunk

    def batches(
        self, size: int, *, view: Literal["raw"], shuffle: torch.Generator, shard: tuple[int, int]
    ) -> Iterator[Batch]:
        """Yield one batch a step, made when the rows before it have been learned."""
        for incoming in self.source.batches(size, view=view, shuffle=shuffle, shard=shard):
            yield from self.learner.steps_of(incoming, self.ctx)
