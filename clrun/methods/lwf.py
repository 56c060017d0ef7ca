"""LwF: the outputs of the former self on the new data are kept (Li & Hoiem, TPAMI 2017, arXiv 1606.09282).

Memory between tasks: none; a frozen copy of the network during a task. Task id: not needed.

Verified: nothing is added before the network moves, distillation by hand, the first task is finetuning
(test_methods_distillation).
"""

import torch
from torch import Tensor, nn

from clrun.blocks.distillation import Teacher, distillation_loss, head_groups
from clrun.blocks.params import clone, frozen
from clrun.data.split import Batch
from clrun.data.stream import Task
from clrun.learning.budget import Budget
from clrun.learning.context import Context
from clrun.learning.knobs import Knob
from clrun.learning.losses import Compete, masked_cross_entropy
from clrun.learning.method import Method
from clrun.learning.training import fit
from clrun.system.errors import NonNegative, Positive


class Lwf(Method):
    """loss = CE + strength * sum over old heads of KL(softmax(z_old / tau) || softmax(z / tau)), on the task's rows.

    The teacher is the network as the task finds it, in eval mode; both see the same augmented images.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        strength: lambda_0; 0 is finetuning.
        tau: temperature. No factor tau^2 (the original): with one, divide by tau^2.
        per_head: a softmax for each old task's classes, as published; false: one over all old classes together.
        compete: classes that compete in the cross-entropy, see `clrun.learning.losses`. Except for "current", the
            cross-entropy pushes down the outputs of old classes in class-incremental streams, while the distillation
            holds them.
        warmup: budget of a phase that comes before, from the second task on, in which only the rows of the new classes
            learn and the rest of the network stands still; 0 epochs for none.
    """

    knobs: tuple[Knob, ...] = (Knob("strength"),)

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        strength: NonNegative,
        tau: Positive,
        per_head: bool,
        compete: Compete,
        warmup: Budget,
    ) -> None:
        super().__init__(backbone, num_classes, compete=compete)
        self.strength, self.tau, self.per_head, self.warmup = strength, tau, per_head, warmup
        self.teacher: Teacher | None = None
        self.groups: list[Tensor] = []

    def wants_teacher(self) -> bool:
        """Whether any term asks for the former network."""
        return self.strength > 0

    def begin_task(self, task: Task, ctx: Context) -> None:
        if task.index and self.wants_teacher():
            self.teacher = Teacher(self.backbone, self.head)
            members = ctx.stream.members[: task.index].to(ctx.hardware.device)
            self.groups = head_groups(members, per_head=self.per_head)
        super().begin_task(task, ctx)

    def learn(self, task: Task, ctx: Context) -> None:
        if task.index:
            self._warm_up(task, ctx)
        fit(self, task.train, ctx)

    def end_task(self, task: Task, ctx: Context) -> None:
        self.teacher, self.groups = None, []

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        features = self.backbone(batch.x)
        logits: Tensor = self.head(features)
        loss = masked_cross_entropy(logits, batch.y, self.competing(batch.t, ctx))
        return loss if self.teacher is None else loss + self.preservation(batch.x, features, logits)

    def preservation(self, x: Tensor, features: Tensor, logits: Tensor) -> Tensor:
        """Return the weighted terms [] that hold features [B, D] and logits [B, C] of x to the teacher's."""
        assert self.teacher is not None
        return self.distilled(logits, self.teacher(x)[1])

    def distilled(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the weighted distance [] of logits [B, C] from the teacher's."""
        if not self.strength:
            return logits.new_zeros(())
        return self.strength * distillation_loss(logits, target, self.groups, tau=self.tau)

    def _warm_up(self, task: Task, ctx: Context) -> None:
        """Train the rows of the new classes on the features as they are."""
        new = torch.zeros(self.num_classes, dtype=torch.bool, device=ctx.hardware.device)
        new[task.classes] = True
        new &= ~ctx.stream.members[: task.index].any(dim=0).to(new.device)
        if not new.any():
            return  # domain-incremental: no class is new

        def loss(batch: Batch, ctx: Context) -> Tensor:
            return masked_cross_entropy(self(batch.x), batch.y, ctx.mask(batch.t, "current"))

        before = clone(dict(self.head.named_parameters()))
        with frozen(self.backbone):
            fit(self, task.train, ctx, loss=loss, params=self.head.parameters(), budget=self.warmup, name="warmup")
        with torch.no_grad():  # the loss does not involve the other rows, but weight decay may have moved them
            for name, parameter in self.head.named_parameters():
                parameter[~new] = before[name][~new]
