"""Finetuning with full or partial memory: the baselines R-FM and R-PM (De Lange et al., TPAMI 2021, 1909.08383).

Memory between tasks: for each stored row the s bytes of the input and 8 bytes for its label and task. With memory=full
there are per_task rows times the number T of all tasks, with memory=partial per_task rows per task so far. Task id: not
needed.

Verified: with all rows in memory it comes close to joint training, the memory is divided among tasks or grows with
them, and the loss equals values computed by hand (test_methods_exemplars).
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
    """loss = CE on rows of the task + mean over earlier tasks of the CE on their exemplars.

    A batch of B rows has ceil(B r) exemplars with r = n / (N + n), where N is the number of rows of the task and n that
    of the memory. They are distributed evenly over the earlier tasks; a remainder goes to tasks drawn at random. An
    epoch is a pass over the rows of the task. The classes that compete in the loss of an exemplar are those of its own
    task. Exemplars are a random sample of the rows of their task in random order; when the memory is divided again, the
    first ones stay. With several processes, each process stores all exemplars and replays a part of them.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        memory: "full": per_task * T rows from the first task on, divided among the tasks so far (R-FM). "partial":
            per_task rows per task (R-PM).
        per_task: number of rows per task; 0 is plain finetuning.
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
        self.depends_on_task_count = memory == "full"
        self.memory = Exemplars("t")
        self.replayed = 0  # number of exemplars in a batch, over all processes

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        self.memory.truncate(self._rows_per_task(task, ctx))

    def learn(self, task: Task, ctx: Context) -> None:
        size, rows = ctx.budget.batch_size, len(task.train)
        stored = self._total(ctx) if self.policy == "full" else self.per_task * task.index
        ratio = stored / max(1, rows + stored) if len(self.memory) else 0.0
        self.replayed = min(math.ceil(size * ratio), size - 1)
        fit(self, task.train, ctx, budget=replace(ctx.budget, batch_size=size - self.replayed))

    def end_task(self, task: Task, ctx: Context) -> None:
        order = torch.randperm(len(task.train), generator=ctx.generator("exemplars"))
        chosen = order[: self._rows_per_task(task, ctx)].to(task.train.y.device)
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
        """Return the number of rows of a full memory."""
        return self.per_task * len(ctx.stream.tasks)

    def _rows_per_task(self, task: Task, ctx: Context) -> int:
        """Return the number of rows that each task has in memory from `task` on."""
        return self._total(ctx) // (task.index + 1) if self.policy == "full" else self.per_task

    def _drawn(self, ctx: Context) -> Tensor:
        """Return the slots [replayed] long of the exemplars of a step, the same on all processes."""
        generator, tasks = ctx.generator("replay"), ctx.task.index
        each, rest = divmod(self.replayed, tasks)
        with_one_more = set(torch.randperm(tasks, generator=generator)[:rest].tolist())
        parts = []
        for task in range(tasks):
            slots = self.memory.set(task)
            drawn = torch.randperm(len(slots), generator=generator)[: each + (task in with_one_more)]
            parts.append(slots[drawn.to(slots.device)])
        return torch.cat(parts)
