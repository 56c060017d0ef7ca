"""The base of methods that give each task a part of one network and need the task id at test time."""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn

from clrun.blocks.masks import Guard
from clrun.blocks.params import hold_statistics
from clrun.data.split import Batch
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.heads import GrowingHead
from clrun.learning.losses import masked_cross_entropy
from clrun.learning.method import Method


class Masked(Method):
    """Later tasks cannot change the logits of earlier tasks, which stay bitwise the same.

    The head has separate rows for each task, and those of earlier tasks are restored after every step. Logits of a task
    that has not begun are 0.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
    """

    own_weights = "gives each task weights of its own in the backbone"
    needs_task_id = True
    settings = frozenset({"til"})

    def __init__(self, backbone: nn.Module, num_classes: int) -> None:
        super().__init__(backbone, num_classes)
        self.begun = 0  # number of tasks that have begun
        self.guard: Guard | None = None  # restores protected weights; only during a fit

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        self.begun = task.index + 1

    def end_task(self, task: Task, ctx: Context) -> None:
        self.guard = None

    def protect(self, masks: Mapping[str, Tensor], task: Task) -> None:
        """Restrict the following fits to some entries of the backbone and to the rows of `task` in the head.

        Args:
            masks: masks of `Guard` by parameter name in the backbone; a parameter without a mask is not restricted.
            task: the current task.
        """
        assert isinstance(self.head, GrowingHead)
        rows = torch.zeros_like(self.head.initialised)
        rows[task.classes] = True
        heads = {
            f"head.{name}": (rows if p.dim() == 1 else rows[:, None]).expand_as(p)
            for name, p in self.head.named_parameters()
        }
        named = {f"backbone.{name}": mask for name, mask in masks.items()}
        self.guard = Guard(dict(self.named_parameters()), named | heads)

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        logits: Tensor = self.head(self.training_features(batch.x))
        return masked_cross_entropy(logits, batch.y, ctx.mask(batch.t))

    def adjust_gradients(self, ctx: Context) -> None:
        if self.guard is not None:
            self.guard.mask_gradients()

    def after_step(self, ctx: Context) -> None:
        if self.guard is not None:
            self.guard.restore()

    def holds_statistics(self) -> bool:
        """Return whether running statistics of batch normalisation are frozen; those of the first task are used."""
        return self.begun > 1

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if mode and self.holds_statistics():
            hold_statistics(self.backbone)
        return self

    def training_features(self, x: Tensor) -> Tensor:
        """Return the features [B, D] of prepared rows x with which the current task is trained."""
        features: Tensor = self.backbone(x)
        return features

    def features(self, x: Tensor, task: int) -> Tensor:
        """Return the features [B, D] of the task at position `task`, which has begun."""
        raise NotImplementedError

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        """Return the logits [B, C] of prepared rows x, all for the task at position `task`."""
        assert task is not None, "this method needs the task id"
        if task >= self.begun:
            return x.new_zeros(len(x), self.num_classes)
        logits: Tensor = self.head(self.features(x, task))
        return logits
