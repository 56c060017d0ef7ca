"""EASE: an adapter for each task spans a subspace of its own (Zhou et al., CVPR 2024, arXiv 2403.12030).

Memory between tasks, for T tasks, C classes and n blocks: T n (2 D r + r + D) floats of adapters, T C (8 D + 8) bytes
of sums (twice as much once a class comes in a second domain) and 4 T C D bytes of prototypes. A prediction takes T
passes of the backbone. Task id: not needed.

Verified: prototypes and scores are those of the paper, new adapters leave the plain model unchanged, and a prediction
takes one pass per task (test_methods_prompts).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clrun.blocks.inject import mlp_adapters
from clrun.blocks.params import eval_mode
from clrun.blocks.task_features import TaskFeatures
from clrun.data.split import Batch
from clrun.data.stream import Setting, Task
from clrun.learning.context import Context
from clrun.learning.heads import CosineHead
from clrun.learning.losses import masked_cross_entropy
from clrun.learning.method import freeze
from clrun.methods.prompted import Prompted
from clrun.system.errors import Fraction, NonNegative, Positive, PositiveInt


class Ease(Prompted):
    """Each task trains adapters of its own beside the MLPs, with a cosine head that is discarded.

    The head has the classes of the task alone. Let f_i be the features with the adapters of task i, and mu[c, i] the
    prototype of class c in this subspace. After t tasks, a class c of task j has the score cos(f_j(x), mu[c, j]) +
    alpha / (t - 1) times the sum over the other subspaces i of cos(f_i(x), mu[c, i]).

    Prototypes are class means of un-normalised features in the eval view. A class whose task was over before subspace i
    was trained has no images there. Its prototype mu[c, i] is composed of those of the classes r that have one, with
    the weights softmax over r of cos(mu[c, j], mu[r, j]). In domain-incremental streams every class has real prototypes
    in every subspace, averaged over the domains since then, and belongs to all of them: no term is multiplied by alpha.

    Args:
        backbone: a vision transformer of timm with `blocks`, frozen.
        num_classes: C.
        bottleneck: r, width of the adapters.
        adapter_scale: factor of an adapter's output; it is not trained.
        dropout: fraction of an adapter's activations that is dropped in training.
        alpha: weight of the subspaces of other tasks.
        recompute: compose the missing prototypes of all subspaces again after each task, with the classes of all tasks;
            false composes those of the newest subspace only.
        plain_weight: weight of the cosine with the prototype of the plain model, which is added to the score; 0 saves
            this pass.
        cosine_scale: initial value of the trained factor of the cosine head. The published value of 1 gives very small
            gradients.
        task_id: "inferred", or "given" at test time: only the subspace of that task scores (task-incremental reading).
        lr_scale: factor of the budget's learning rate.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        bottleneck: PositiveInt,
        adapter_scale: float,
        dropout: Fraction,
        alpha: NonNegative,
        recompute: bool,
        plain_weight: NonNegative,
        cosine_scale: Positive,
        task_id: Literal["inferred", "given"],
        lr_scale: Positive,
    ) -> None:
        super().__init__(backbone, num_classes, lr_scale=lr_scale, compete="current", tokens=False)
        self.bottleneck, self.adapter_scale, self.dropout = bottleneck, adapter_scale, dropout
        self.alpha, self.recompute = alpha, recompute
        self.plain_weight, self.cosine_scale = plain_weight, float(cosine_scale)
        self.needs_task_id = task_id == "given"
        self.setting: Setting = "cil"
        self.subspaces = nn.ModuleList()
        self.head = CosineHead(self.width, num_classes, scale=self.cosine_scale)
        self.plain = TaskFeatures(nn.ModuleDict(), self.width, num_classes)

    def begin_task(self, task: Task, ctx: Context) -> None:
        self.setting = ctx.stream.setting
        depth = len(self.backbone.blocks)  # type: ignore[arg-type]
        adapters = mlp_adapters(depth, self.width, self.bottleneck, scale=self.adapter_scale, dropout=self.dropout)
        self.subspaces.append(TaskFeatures(adapters, self.width, self.num_classes))
        self.head = CosineHead(self.width, self.num_classes, scale=self.cosine_scale)
        self.head.grow(task.classes)

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        logits = self.head(self.inside(len(self.subspaces) - 1, batch.x))
        return masked_cross_entropy(logits, batch.y, ctx.mask(batch.t, "current"))

    def end_task(self, task: Task, ctx: Context) -> None:
        newest = len(self.subspaces) - 1
        freeze(self.space(newest))
        self.space(newest).own[task.classes] = True
        freeze(self.head)
        with torch.no_grad(), eval_mode(self):
            for place in range(len(self.subspaces)):
                self.measure(self.space(place), task)
            if self.plain_weight:
                self.measure(self.plain, task)
            for place in range(len(self.subspaces)):
                if self.recompute or place == newest:
                    self.complete(place)

    def measure(self, space: TaskFeatures, task: Task) -> None:
        """Add the rows of the task to the statistics of a subspace, and update its measured prototypes."""
        space.measure(lambda x: self.features(x, space.plan()), task)

    def complete(self, place: int) -> None:
        """Compose the prototypes of the classes whose tasks were over before the subspace at `place` was trained."""
        space = self.space(place)
        real = space.real
        for earlier in range(place):
            origin = self.space(earlier)
            missing = origin.own & ~real
            if missing.any():
                weights = similarity(origin.head.prototypes[missing], origin.head.prototypes[real])
                space.head.prototypes[missing] = weights @ space.head.prototypes[real]

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        if self.needs_task_id and task is not None:
            return self._cosines(self.space(task), x)
        others = len(self.subspaces) - 1
        weight = self.alpha / others if others else 0.0
        scores = torch.zeros(len(x), self.num_classes, device=x.device)
        for place in range(len(self.subspaces)):
            space = self.space(place)
            own = torch.ones_like(space.own) if self.setting == "dil" else space.own
            scores = scores + torch.where(own, 1.0, weight) * self._cosines(space, x)
        if self.plain_weight:
            scores = scores + self.plain_weight * self._cosines(self.plain, x)
        return scores

    def _cosines(self, space: TaskFeatures, x: Tensor) -> Tensor:
        """Return [B, C], the cosines with the prototypes of a subspace; 0 for a class without one."""
        features = self.features(x, space.plan())
        with torch.autocast(x.device.type, enabled=False):
            scores: Tensor = space.head(features.float())
        return scores

    def space(self, place: int) -> TaskFeatures:
        """Return the subspace of the task at position `place`."""
        found = self.subspaces[place]
        assert isinstance(found, TaskFeatures)
        return found

    def inside(self, place: int, x: Tensor) -> Tensor:
        """Return the features [B, D] with the adapters of the task at position `place` alone."""
        return self.features(x, self.space(place).plan())


def similarity(rows: Tensor, others: Tensor) -> Tensor:
    """Return [k, m], the softmax over `others` [m, D] of their cosines with each of `rows` [k, D]."""
    return F.linear(F.normalize(rows, dim=1), F.normalize(others, dim=1)).softmax(dim=1)
