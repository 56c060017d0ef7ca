"""EWC: quadratic penalty weighted by a diagonal Fisher (Kirkpatrick et al., PNAS 2017, arXiv 1612.00796).

Memory between tasks: 2 P floats (importance, anchor), P = backbone parameters. Task id: not needed.
"""

from typing import Literal, Self

import torch
from torch import Tensor, nn

from clrun.blocks.curvature import Labels, QuadraticPenalty, diagonal_fisher, normalised
from clrun.blocks.params import hold_statistics
from clrun.data.split import Batch
from clrun.data.stream import Task
from clrun.errors import ConfigError, Fraction, NonNegative, PositiveInt
from clrun.method import Method
from clrun.training import Context


class Ewc(Method):
    """loss = CE + strength * 1/2 sum_i F_i (theta_i - theta*_i)^2 on the backbone; the head is free.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        strength: lambda, for F as per-sample mean; 0 is finetuning. Published values that omit the 1/2 are half as
            large for the same penalty, those for F of batch-mean gradients about the batch size larger.
        decay: gamma of F <- gamma F + F_task, applied when a task ends, not in the loss. 1 accumulates; below 1 is
            online EWC (Schwarz et al., ICML 2018, arXiv 1805.06370).
        mode: "online": all tasks are anchored at the latest weights. "separate": each at its own (the original;
            counts earlier tasks twice, see Huszar, PNAS 2018). Both take 2 P floats.
        labels: how the Fisher's labels are chosen: exact, sampled, true, predicted or batched; see `diagonal_fisher`.
        samples: rows of the task used for the estimate; null for all.
        top_k: with labels=exact, the most probable classes summed over; null for all.
        normalise: divide each task's F by its "mean" or "max" (Progress & Compress), or leave it ("none").
        solver: "grad": the penalty is part of the loss; diverges when learning rate * strength * F_i exceeds 2.
            "proximal": after the step on CE alone, theta_i <- (theta_i + c_i theta*_i) / (1 + c_i) with
            c = learning rate * strength * F: stable for any strength; needs torch.optim.SGD.
        norm: running statistics of batch normalisation, which no penalty holds: "train" updates them in every task,
            "freeze_after_first" stops after the first one.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        strength: NonNegative,
        decay: Fraction,
        mode: Literal["online", "separate"],
        labels: Literal[Labels, True],
        samples: PositiveInt | None,
        top_k: PositiveInt | None,
        normalise: Literal["none", "mean", "max"],
        solver: Literal["grad", "proximal"],
        norm: Literal["train", "freeze_after_first"],
    ) -> None:
        super().__init__(backbone, num_classes)
        self.strength, self.solver, self.norm = strength, solver, norm
        self.labels: Labels = "true" if labels is True else labels  # YAML reads the bare word as a boolean
        self.samples, self.top_k, self.normalise = samples, top_k, normalise
        self.penalty = QuadraticPenalty(decay, mode)

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        optimizer = getattr(ctx.budget.optimizer, "func", ctx.budget.optimizer)
        if self.solver == "proximal" and optimizer is not torch.optim.SGD:
            name = getattr(optimizer, "__name__", optimizer)
            raise ConfigError(f"method.solver=proximal: needs budget.optimizer=torch.optim.SGD, not {name}; use grad")

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        loss = super().loss(batch, ctx)
        return loss if self.solver == "proximal" else loss + self.strength * self.penalty(self.backbone)

    def after_step(self, ctx: Context) -> None:
        if self.solver == "proximal":
            self.penalty.proximal_(self.backbone, ctx.progress.lr * self.strength)

    def end_task(self, task: Task, ctx: Context) -> None:
        fisher = diagonal_fisher(
            self, task.train, ctx, of=self.backbone, labels=self.labels, samples=self.samples, top_k=self.top_k
        )
        self.penalty.update(self.backbone, normalised(fisher, self.normalise))

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if mode and self.norm == "freeze_after_first" and self.penalty.shapes:
            hold_statistics(self.backbone)
        return self
