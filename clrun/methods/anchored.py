"""Base of methods that keep the backbone near the weights of earlier tasks by one quadratic penalty."""

from abc import abstractmethod
from typing import Literal, Self

from torch import Tensor, nn

from clrun.blocks.curvature import Curvature, QuadraticPenalty
from clrun.blocks.optimizers import needs_sgd
from clrun.blocks.params import hold_statistics
from clrun.data.split import Batch
from clrun.data.stream import Task
from clrun.learning.budget import Budget
from clrun.learning.context import Context
from clrun.learning.knobs import Knob
from clrun.learning.losses import Compete
from clrun.learning.method import Method

Solver = Literal["grad", "proximal"]
Norm = Literal["train", "freeze_after_first"]


class Anchored(Method):
    """loss = CE + strength / 2 (theta - a)' K (theta - a), theta the weights of the backbone; the head is free.

    a are the anchor weights and K is the curvature, which a subclass estimates when a task ends.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        strength: lambda; 0 is finetuning.
        solver: "grad" adds the penalty to the loss; training diverges when learning rate * strength * the largest
            eigenvalue of K exceeds 2. "proximal" takes a step on the cross-entropy alone and then the exact step on the
            penalty; it is stable for every strength and needs torch.optim.SGD.
        norm: what happens to the running statistics of batch normalisation, which no penalty protects: "train" updates
            them in every task, "freeze_after_first" only in the first one.
        penalty: holds K and a.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    knobs: tuple[Knob, ...] = (Knob("strength"),)
    samples_names = True

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        strength: float,
        solver: Solver,
        norm: Norm,
        penalty: QuadraticPenalty,
        compete: Compete,
    ) -> None:
        super().__init__(backbone, num_classes, compete=compete)
        self.strength, self.solver, self.norm, self.penalty = strength, solver, norm, penalty

    @abstractmethod
    def curvature(self, task: Task, ctx: Context) -> Curvature:
        """Return the curvature that `task` adds to K, by the names of the backbone's parameters."""

    def check_budget(self, budget: Budget) -> None:
        if self.solver == "proximal":
            needs_sgd(budget.optimizer, "method.solver=proximal", instead="use budget=sgd or method.solver=grad")

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        loss = super().loss(batch, ctx)
        return loss if self.solver == "proximal" else loss + self.strength * self.penalty(self.backbone)

    def after_step(self, ctx: Context) -> None:
        if self.solver == "proximal":
            self.penalty.proximal_(self.backbone, ctx.progress.lr * self.strength)

    def end_task(self, task: Task, ctx: Context) -> None:
        self.penalty.update(self.backbone, self.curvature(task, ctx))

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if mode and self.norm == "freeze_after_first" and self.penalty.shapes:
            hold_statistics(self.backbone)
        return self
