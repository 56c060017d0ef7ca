"""DER and DER++: replay of inputs with the logits of their time (Buzzega et al., NeurIPS 2020, arXiv 2004.07211).

Memory between tasks: M (s + 8 + 4 C) bytes, M = capacity, s bytes a stored input. Task id: not needed.

Verified: both weights 0 are finetuning bit for bit, terms by hand, logits are those from before the update
(test_methods_replay).
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from clrun.blocks.buffers import ReservoirBuffer, per_process
from clrun.data.split import Batch
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.knobs import Knob
from clrun.learning.losses import masked_cross_entropy
from clrun.learning.method import Method
from clrun.system.errors import Count, NonNegative


class Der(Method):
    """loss = CE(x, y) + alpha * MSE(z(x'), z') + beta * CE(x'', y''), with two independent draws from the memory.

    z' are the logits of the training step that stored the row: of its augmented view, in training mode, before the
    update. The row itself is stored raw and augmented anew; this mismatch is the published recipe. beta = 0 is DER,
    beta > 0 DER++; a term with coefficient 0 costs no pass, and with both 0 this is finetuning.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        capacity: M, rows in memory over all processes.
        replay_size: rows of each draw, over all processes; null for as many as the batch size.
        alpha: weight of the logit term.
        beta: weight of the label term.
        store: when rows are offered to the memory. "every_epoch", as published: logits from all along the training, a
            row may be stored more than once. "first_epoch" and "last_epoch": each row once, with the logits of an
            early or of a trained network (the last steps that make one epoch).
        match: columns compared by the logit term. "fixed": all C, as published, where the heads of all tasks exist
            from the start; classes unseen when the row was stored are thereby held at logit 0 for it. "seen": only
            those seen when the row was stored. The mean is over the compared elements.
    """

    knobs = (Knob("alpha"), Knob("beta"))
    seen: Tensor  # [tasks so far, C]

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        capacity: Count,
        replay_size: Count | None,
        alpha: NonNegative,
        beta: NonNegative,
        store: Literal["every_epoch", "first_epoch", "last_epoch"],
        match: Literal["seen", "fixed"],
    ) -> None:
        super().__init__(backbone, num_classes)
        self.capacity, self.replay_size = capacity, replay_size
        self.alpha, self.beta, self.store, self.match = alpha, beta, store, match
        self.memory = ReservoirBuffer(capacity)
        self.register_buffer("seen", torch.zeros(0, num_classes, dtype=torch.bool), persistent=False)

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        # Row t: the classes seen once task t has begun.
        self.seen = torch.stack([ctx.stream.candidates(t + 1, "cil")[t] for t in range(task.index + 1)])
        self.memory.capacity = per_process(self.capacity, rank=ctx.hardware.rank, world=ctx.hardware.world)

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        logits = self(batch.x)
        loss = masked_cross_entropy(logits, batch.y, ctx.mask(batch.t))
        if self.alpha and len(self.memory):
            loss = loss + self.alpha * self._logit_term(self._draw(ctx), ctx)
        if self.beta and len(self.memory):
            old = self.memory.read(self._draw(ctx))
            loss = loss + self.beta * masked_cross_entropy(self(ctx.augment(old.x)), old.y, ctx.mask(old.t))
        # Both draws are done, hence no row meets itself in the step that brings it.
        if self._storing(ctx):
            assert batch.raw is not None
            raw = Batch(batch.raw, batch.y, batch.t, batch.i)
            self.memory.add(raw, generator=ctx.generator("reservoir", ctx.hardware.rank), logits=logits)
        return loss

    def _storing(self, ctx: Context) -> bool:
        """Whether the rows of this step are offered to the memory."""
        if self.store == "last_epoch":
            return ctx.progress.step >= ctx.progress.total - math.ceil(len(ctx.task.train) / ctx.budget.batch_size)
        return self.store == "every_epoch" or ctx.progress.epoch == 0

    def _draw(self, ctx: Context) -> Tensor:
        """Return slots of the memory."""
        rank, world = ctx.hardware.rank, ctx.hardware.world
        size = ctx.budget.batch_size if self.replay_size is None else self.replay_size
        return self.memory.draw(per_process(size, rank=rank, world=world), ctx.generator("replay", rank))

    def _logit_term(self, slots: Tensor, ctx: Context) -> Tensor:
        """Return the mean squared difference between the logits of now and those stored in `slots`."""
        old, stored = self.memory.read(slots), self.memory.logits
        assert stored is not None
        square: Tensor = (self(ctx.augment(old.x)) - stored[slots]).square()
        if self.match == "fixed":
            return square.mean()
        compared = self.seen[old.t]
        return (square * compared).sum() / compared.sum()
