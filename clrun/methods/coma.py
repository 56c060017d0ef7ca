"""CoMA: continual model averaging on top of SLCA (Marouf et al., ECCV 2024, arXiv 2312.08977; code IemProg/CoFiMA).

Memory between tasks: that of SLCA, and the anchor of the next average, 4 P bytes for the P trained parameters of the
backbone. Task id: not needed.

Verified: weight 1 is SLCA and weight 0 keeps the first task's backbone bit for bit, weight 1 / t is the arithmetic
mean, and averages lie between what is averaged (test_methods_coma).
"""

import copy
from typing import Literal

import torch
from torch import nn

from clrun.blocks.gaussian import Alignment
from clrun.blocks.merging import Evidence, Interpolate, estimate_statistics
from clrun.blocks.params import select
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.heads import GrowingHead
from clrun.learning.losses import Compete
from clrun.methods.slca import Slca
from clrun.system.errors import Fraction, NonNegative


class Coma(Slca):
    """SLCA whose backbone becomes alpha theta + (1 - alpha) theta_a after each task, from which the next task starts.

    theta are the trained parameters of the backbone after stage 1, and theta_a those after the average of the task
    before (in the first task there is nothing to average). The Gaussians of the task's classes are those of the
    averaged backbone. The running statistics of batch normalisation, which no average has, are estimated anew on the
    rows of the task.

    The alignment starts from the head of stage 1. In the public code it starts from an average with the aligned head of
    the task before, as with merge_heads=true; there the rows of new classes, which have no other head to be averaged
    with, are multiplied by their Fisher information and nearly vanish, but here they stay as they are.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        alpha: weight of the new parameters; null for 1 / t after t tasks, which is the mean over all tasks.
        anchor: theta_a: "previous", the average of the task before, or "initial", the backbone before the first task
            (an ablation of the paper).
        merge_heads: whether the alignment starts from alpha W + (1 - alpha) W_a for the rows of earlier classes, with
            the rows W_a of the aligned head of the task before.
        backbone_lr_scale: learning rate of the backbone, relative to that of the budget; see `Slca` for this and all
            following options.
        mean_shrink: largest reduction of the means of old classes.
        alignment: options of stage 2, see `clrun.blocks.gaussian.Alignment`.
        reset_final_norm: begin with a new last normalisation, as the public code does.
        compete: classes that compete in the training loss of stage 1, see `clrun.learning.losses`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        alpha: Fraction | None,
        anchor: Literal["previous", "initial"],
        merge_heads: bool,
        backbone_lr_scale: NonNegative,
        mean_shrink: Fraction,
        alignment: Alignment,
        reset_final_norm: bool,
        compete: Compete,
    ) -> None:
        super().__init__(
            backbone,
            num_classes,
            backbone_lr_scale=backbone_lr_scale,
            mean_shrink=mean_shrink,
            alignment=alignment,
            reset_final_norm=reset_final_norm,
            compete=compete,
        )
        self.alpha, self.merge_heads = alpha, merge_heads
        self.rule = Interpolate(alpha=alpha, anchor=anchor, fisher=False, floor=1e-8, clip=None)
        self.aligned: GrowingHead | None = None  # during a task, the aligned head of the task before

    def begin_task(self, task: Task, ctx: Context) -> None:
        if task.index == 0:
            self.rule.begin(select(self.backbone), exact=False)
        if self.merge_heads and task.index > 0:
            self.aligned = copy.deepcopy(self.head)
        super().begin_task(task, ctx)

    def evidence(self, task: Task, ctx: Context) -> Evidence | None:
        """Return the statistics of the backbone after stage 1 that the average weights parameters with."""
        return None

    def combine(self, task: Task, ctx: Context) -> None:
        params = select(self.backbone)
        self.rule.add(params, self.evidence(task, ctx), key=task.id)
        average = self.rule.value()
        if any(not torch.equal(params[name], value) for name, value in average.items()):
            with torch.no_grad():
                for name, value in average.items():
                    params[name].copy_(value)
            estimate_statistics(self.backbone, task.train)
        if self.aligned is not None:
            self._average_heads(self.aligned, task)
            self.aligned = None

    @torch.no_grad()
    def _average_heads(self, before: GrowingHead, task: Task) -> None:
        """Average the rows of earlier classes with those of the aligned head of the task before."""
        rows = ((self.latest >= 0) & (self.latest < task.index)).nonzero()[:, 0]
        weight = 1 / (task.index + 1) if self.alpha is None else self.alpha
        for parameter, other in zip(self.head.parameters(), before.parameters(), strict=True):
            parameter[rows] = torch.lerp(other[rows], parameter[rows], weight)
