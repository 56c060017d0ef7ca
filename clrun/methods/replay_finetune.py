"""Finetuning with full or partial memory: the baselines R-FM and R-PM (De Lange et al., TPAMI 2021, 1909.08383).

Memory between tasks: M (s + 8) bytes, M = per_task T rows of s bytes (partial: per_task for each task so far). Task id:
not needed.

Verified: a memory of everything is nearly joint, the memory is divided or grows as told, loss by hand
(test_methods_exemplars).
"""

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from clrun.blocks.buffers import Exemplars
from clrun.data.split import Batch
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.losses import Compete, masked_cross_entropy, task_mean_cross_entropy
from clrun.learning.method import Method
from clrun.learning.training import fit
from clrun.system.errors import Count


class ReplayFinetune(Method):
    """loss = CE of the task's rows + mean over earlier tasks of the CE of their exemplars, in batches shared fairly.

    A batch of B rows has ceil(B r) exemplars, r = n / (N + n) for N rows of the task and a memory of n, spread evenly
    over the earlier tasks, a remainder going to tasks drawn at random; an epoch is a pass over the task's rows. Each
    exemplar is judged among the classes that compete for its own task. Exemplars are a random sample of their task's
    rows in random order, of which the first stay when the memory is divided anew. With several processes each holds all
    exemplars and replays its share.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        memory: "full": per_task T rows from the first task on, divided among the tasks so far (R-FM). "partial":
            per_task rows of each task (R-PM).
        per_task: m; 0 is finetuning.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        memory: Literal["full", "partial"],
        per_task: Count,
        compete: Compete,
    ) -> None:
        super().__init__(backbone, num_classes, compete=compete)
        self.policy, self.per_task = memory, per_task
        self.memory = Exemplars("t")
        self.replayed = 0  # exemplars in a batch, over all processes

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        self.memory.truncate(self._share(task, ctx))

    def learn(self, task: Task, ctx: Context) -> None:
        size, rows = ctx.budget.batch_size, len(task.train)
        held = self._total(ctx) if self.policy == "full" else self.per_task * task.index
        ratio = held / max(1, rows + held) if len(self.memory) else 0.0
        self.replayed = min(math.ceil(size * ratio), size - 1)
        fit(self, task.train, ctx, budget=replace(ctx.budget, batch_size=size - self.replayed))

    def end_task(self, task: Task, ctx: Context) -> None:
        order = torch.randperm(len(task.train), generator=ctx.generator("exemplars"))
        chosen = order[: self._share(task, ctx)].to(task.train.y.device)
        for batch in task.train.select(chosen).batches(256, view="raw"):
            self.memory.append(batch)

    def mix(self, batch: Batch, ctx: Context) -> Batch:
        if not self.replayed:
            return batch
        mine = self._drawn(ctx)[ctx.hardware.rank :: ctx.hardware.world]
        return Batch.cat(batch, self.memory.read(mine)) if len(mine) else batch

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        logits, mask, old = self(batch.x), self.competing(batch.t, ctx), batch.i < 0
        if not self.replayed or not bool(old.any()):
            return masked_cross_entropy(logits, batch.y, mask)
        past = task_mean_cross_entropy(logits[old], batch.y[old], batch.t[old], mask[old])
        return masked_cross_entropy(logits[~old], batch.y[~old], mask[~old]) + past

    def _total(self, ctx: Context) -> int:
        """Return the rows of a full memory."""
        return self.per_task * len(ctx.stream.tasks)

    def _share(self, task: Task, ctx: Context) -> int:
        """Return the rows that each task may have in memory once `task` has come."""
        return self._total(ctx) // (task.index + 1) if self.policy == "full" else self.per_task

    def _drawn(self, ctx: Context) -> Tensor:
        """Return [replayed] long, slots of the exemplars of a step, the same on all processes."""
        generator, tasks = ctx.generator("replay"), ctx.task.index
        each, rest = divmod(self.replayed, tasks)
        lucky = set(torch.randperm(tasks, generator=generator)[:rest].tolist())
        parts = []
        for task in range(tasks):
            slots = self.memory.set(task)
            drawn = torch.randperm(len(slots), generator=generator)[: each + (task in lucky)]
            parts.append(slots[drawn.to(slots.device)])
        return torch.cat(parts)
