"""TUNA: the surest of the task adapters and one that is fused of all (Wang et al., ICCV 2025, arXiv 2508.08165).

Memory between tasks, for T tasks, C classes, D features and n blocks of width w: (T + 1) n (2 w r + r + w) floats of
adapters and of the fused ones; Gaussians, 8 C D + 4 C D^2 bytes, in domain-incremental streams for every domain; the
head. A prediction takes T + 1 passes. Task id: not needed.

Verified: stored adapters stand still, fusion is that of the paper in values, order and limits, the loss is the masked
cross-entropy of 20 cos, the least entropy is found per image, and the first task is not affected (test_methods_tuna).
"""

import copy
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clrun.blocks.merging import SignedMax
from clrun.blocks.params import Params, clone
from clrun.blocks.task_gaussians import TaskAlignment
from clrun.data.split import Batch
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.heads import CosineHead
from clrun.learning.losses import Compete
from clrun.learning.method import freeze
from clrun.methods.task_adapters import Start, TaskAdapters, log_scores, probabilities
from clrun.system.errors import Fraction, NonNegative, Positive, PositiveInt


class Tuna(TaskAdapters):
    """An adapter set per task, chosen by the least entropy, and a universal set that is fused of all of them.

    Training: logits are scale * cos(w_c, f), from which scale * margin is subtracted at the true class; loss = CE +
    ortho exp(-T) sum over earlier tasks i of the mean over the blocks of |mean of all entries of U_t U_i'|, with U the
    weights [w, r] of an adapter's upper map, rows of length 1, and T the number of tasks so far. Then the Gaussians of
    the task's classes are measured with its adapters, and the head is aligned to those of all classes.

    Fusion, entry by entry over all sets: the value of largest magnitude among those with the sign of the mean (see
    `clrun.blocks.merging.SignedMax`). It is made anew of the stored sets after each task.

    Prediction: p_i is the softmax over all classes so far with the adapters of task i, i* the task of least entropy of
    p_i, and the score p_{i*} + p of the universal set. After the first task it is p_0 alone. `forward` returns the
    logarithm, normalised.

    Deviations from the public code. There the fused set is never evaluated: the identifier that the test asks for
    selects the newest adapters, which `universal=newest` does here. Stored sets are in its optimizer, and drift by
    weight decay; here they stand still. `mean_factor=inverted` multiplies the mean of the k-th class so far (from 0, in
    the order of the tasks) by 0.9 + 0.1 (1 - ceil(k / n)) / T in the alignment, with n the number of classes of the
    newest task: the code divides by known minus all classes, so that the newest classes, not the oldest, are shrunk
    most. The code's schedule of the alignment is `clrun.learning.budget.returning_cosine`.

    Args:
        backbone: a vision transformer of timm with `blocks`, frozen.
        num_classes: C.
        bottleneck: r, width of the adapters.
        adapter_scale: factor of an adapter's output; it is not trained.
        dropout: fraction of an adapter's activations that is dropped in training.
        scale: factor of the cosines.
        margin: subtracted from the cosine of the true class in the training loss.
        ortho: weight of the term that keeps the adapters of tasks apart; 0 for none.
        start: adapters of a task begin as those of the task before ("previous", public code), or new ("fresh").
        universal: "fused" of all adapters, as in the paper, or "newest", as the public code is evaluated.
        mean_factor: factor of means in the alignment: "none", or "inverted", see above.
        alignment: options of the alignment, see `clrun.blocks.task_gaussians.TaskAlignment`.
        task_id: "inferred", or "given" at test time: the adapters of that task instead of the surest ones, and its
            classes alone in both softmaxes.
        lr_scale: factor of the budget's learning rate.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    head: CosineHead

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        bottleneck: PositiveInt,
        adapter_scale: float,
        dropout: Fraction,
        scale: Positive,
        margin: NonNegative,
        ortho: NonNegative,
        start: Start,
        universal: Literal["fused", "newest"],
        mean_factor: Literal["none", "inverted"],
        alignment: TaskAlignment,
        task_id: Literal["inferred", "given"],
        lr_scale: Positive,
        compete: Compete,
    ) -> None:
        super().__init__(
            backbone,
            num_classes,
            bottleneck=bottleneck,
            adapter_scale=adapter_scale,
            dropout=dropout,
            start=start,
            alignment=alignment,
            task_id=task_id,
            lr_scale=lr_scale,
            compete=compete,
        )
        self.scale, self.margin, self.ortho = float(scale), margin, ortho
        self.universal, self.mean_factor = universal, mean_factor
        self.head = CosineHead(self.features_width, num_classes, scale=self.scale)
        self.head.scale.requires_grad_(False)
        self.fused = nn.ModuleDict()  # by block; made anew after each task
        self.directions = torch.zeros(0)  # [tasks, blocks, r], mean rows of the earlier adapters in `ortho`

    # --- training

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        if task.index == 0 and self.universal == "fused":
            self.fused = copy.deepcopy(self.of(0))
            freeze(self.fused)
        earlier = [direction(self.of(place)).detach() for place in range(len(self.adapters) - 1)]
        self.directions = torch.stack(earlier) if earlier else torch.zeros(0)

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        newest = self.of(len(self.adapters) - 1)
        logits: Tensor = self.head(self.with_adapters(newest, batch.x))
        if self.margin:
            logits = logits - self.scale * self.margin * F.one_hot(batch.y, self.num_classes)
        loss = self.classification_loss(logits, batch, ctx)
        if not (self.ortho and len(self.directions)):
            return loss
        weight = self.ortho * math.exp(-len(self.adapters))
        return loss + weight * apart(direction(newest), self.directions)

    def settle(self, task: Task, ctx: Context) -> None:
        self.directions = torch.zeros(0)
        if self.universal == "newest":
            return
        sets = [clone(dict(self.of(place).named_parameters())) for place in range(len(self.adapters))]
        merged = fuse(sets)
        self.fused.load_state_dict(merged)
        ctx.log({"phase": "fusion", **{f"share/{place}": share for place, share in enumerate(shares(sets, merged))}})

    def mean_factors(self, task: Task) -> Tensor | None:
        if self.mean_factor == "none":
            return None
        pairs = torch.stack([self.gaussians.positions, self.gaussians.labels], dim=1)
        number = torch.unique_consecutive(pairs, dim=0, return_inverse=True)[1]  # of the class, in the order of arrival
        return inverted_factors(number, len(task.classes), len(self.adapters))

    # --- prediction

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        if self.needs_task_id and task is not None:
            classes = self.owner == task
            own = probabilities(self.head(self.inside(task, x)), classes)
        else:
            classes = self.owner >= 0
            each = probabilities(self.scored(self.in_all(x)), classes)
            own = each[surest(each), torch.arange(len(x), device=x.device)]
        if len(self.adapters) == 1:
            return log_scores(own, classes)
        last = self.fused if self.universal == "fused" else self.of(len(self.adapters) - 1)
        return log_scores(own + probabilities(self.head(self.with_adapters(last, x).float()), classes), classes)

    def choices(self, x: Tensor) -> Tensor | None:
        if self.needs_task_id:
            return None
        each = probabilities(self.scored(self.in_all(x)), self.owner >= 0)
        return F.one_hot(surest(each), len(self.adapters))


def surest(each: Tensor) -> Tensor:
    """Return the position [B] long of the distribution of least entropy for each image, of [T, B, C]."""
    return (-each * (each + 1e-10).log()).sum(dim=2).argmin(dim=0)


def direction(adapters: nn.ModuleDict) -> Tensor:
    """Return the mean [blocks, r] of the rows of the upper maps [w, r] of adapters, each of length 1."""
    ups = [adapter.up.weight for adapter in adapters.values()]  # type: ignore[union-attr]
    return torch.stack([F.normalize(up, dim=1).mean(dim=0) for up in ups])  # type: ignore[arg-type]


def apart(own: Tensor, earlier: Tensor) -> Tensor:
    """Return the sum over earlier tasks of the mean over the blocks of |mean of the entries of U U_i'|, [].

    The mean of the entries of U U_i' is the product of the mean rows of U and U_i.

    Args:
        own: [blocks, r], see `direction`.
        earlier: [tasks, blocks, r].
    """
    return (own * earlier).sum(dim=2).abs().mean(dim=1).sum()


def fuse(sets: list[Params]) -> Params:
    """Return the fusion of several sets of parameters of the same names and shapes."""
    rule = SignedMax()
    for each in sets:
        rule.add(each)
    return rule.value()


def shares(sets: list[Params], merged: Params) -> list[float]:
    """Return the fraction of the entries of a fusion that equal the entry of each set; equal entries count in each."""
    total = sum(value.numel() for value in merged.values())
    return [sum(int((each[name] == value).sum()) for name, value in merged.items()) / total for each in sets]


def inverted_factors(number: Tensor, size: int, tasks: int) -> Tensor:
    """Return the factors [E] float64 of the public code for the means of classes.

    Args:
        number: [E] long, number k of the class in the order of arrival, from 0.
        size: n, number of classes of the newest task.
        tasks: T, number of tasks so far.
    """
    return 0.9 + 0.1 * (1 - torch.ceil(number.double() / size)) / tasks
