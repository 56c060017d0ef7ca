"""LwF: distillation of the previous network's outputs on the new data (Li and Hoiem, TPAMI 2017, arXiv 1606.09282).

Memory between tasks: none. During a task a frozen copy of the network. Task id: not needed.

Verified: the distillation loss is 0 before the first step of a task and equals values computed by hand, and the first
task is bitwise finetuning (test_methods_distillation).
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
    """loss = CE + strength * sum over old heads of KL(softmax(z_old / tau) || softmax(z / tau)), on rows of the task.

    z are the logits of the network and z_old those of the teacher, a copy of the network from the beginning of the task
    in eval mode. Both have the same augmented images as input.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        strength: lambda_0; 0 is plain finetuning.
        tau: temperature. As in the paper there is no factor tau^2; divide a strength for a loss with it by tau^2.
        per_head: one softmax per old task, as published; false: one softmax over all old classes.
        compete: classes that compete in the cross-entropy, see `clrun.learning.losses`. Except for "current", the
            cross-entropy lowers the outputs of old classes in class-incremental streams, and the distillation
            counteracts this.
        warmup: budget of a phase before the training of every task but the first, in which only the rows of the new
            classes are trained and the rest of the network is frozen; 0 epochs for no such phase.
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
        """Return whether any term of the loss needs the teacher."""
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
        """Return the weighted distance [] of the features [B, D] and logits [B, C] of x from those of the teacher."""
        assert self.teacher is not None
        return self.distilled(logits, self.teacher(x)[1])

    def distilled(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the weighted distillation loss [] of logits [B, C] for the logits `target` [B, C] of the teacher."""
        if not self.strength:
            return logits.new_zeros(())
        return self.strength * distillation_loss(logits, target, self.groups, tau=self.tau)

    def _warm_up(self, task: Task, ctx: Context) -> None:
        """Train the rows of the new classes on frozen features."""
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
