"""MOS: merged adapters, and each image retrieves its own (Sun et al., AAAI 2025, arXiv 2412.09441; AAAI25-MOS).

Memory between tasks, for T tasks, C classes, D features and n blocks of width w: (T + 1) n (2 w r + r + w) floats of
adapters and their mean; Gaussians, 8 C D + 4 C D^2 bytes (with alignment.covariance=diagonal 12 C D); sums and
prototypes of the first adapters, 12 C D bytes; the head. A prediction takes T passes. Task id: not needed.

Verified: stored adapters stand still in training and in evaluation, the pull has its closed form, the contrast equals a
value computed by hand, prototypes are those of the first adapters, retrieval ends in a fixed point or after its last
round, and untrained adapters give SimpleCIL (test_methods_mos).
"""

import copy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clrun.blocks.contrast import Space, contrast
from clrun.blocks.params import eval_mode, rate_groups
from clrun.blocks.task_features import TaskFeatures
from clrun.blocks.task_gaussians import TaskAlignment
from clrun.data.split import Batch
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.losses import Compete
from clrun.learning.method import freeze
from clrun.methods.task_adapters import TaskAdapters, log_scores, probabilities
from clrun.system.errors import Count, Fraction, NonNegative, Positive, PositiveInt


class Mos(TaskAdapters):
    """An adapter set per task, kept near the mean of the earlier ones; each test image looks for its own set.

    Training: adapters A_t begin as A_{t-1}; loss = CE + contrast R, where R pushes the features of the batch away from
    each other and from the means of all earlier classes (`clrun.blocks.contrast.contrast`). After every step from the
    second task on, A_t <- (1 - m) A_t + m mean(A_0 ... A_{t-1}) with m = momentum, on all weights and biases. Then the
    Gaussians of the task's classes are measured with A_t, and the head is aligned to those of all classes.

    Prediction: o_c is the cosine of the features with A_0 and the mean p_c of class c, which is measured with A_0 for
    every class. The first guess is the task j of the largest o_c; then the task of the largest logit z of the head on
    the features with A_j is the next guess, until it is j again, or z was computed `rounds` times. The score is
    softmax(z) + softmax(T o) after T tasks. `forward` returns its logarithm, normalised.

    Deviations from the public code. There the pull is also part of every forward pass, in tests too, once per block,
    and it overwrites the stored adapters: with 12 blocks the effective momentum of training is 1 - 0.9^13 = 0.75, and
    ten test batches move a stored set onto the mean of its predecessors, with predictions that depend on the test
    batches. Here stored adapters stand still. `pulls_per_step=13` has that momentum, and `stored=mean_of_earlier` what
    that evaluation converges to: after training, A_t is replaced by the mean of the earlier sets as they were trained,
    before its classes are measured, and the next task begins from there.

    A class of several tasks has no adapters of its own, so that domain-incremental streams are refused.

    Args:
        backbone: a vision transformer of timm with `blocks`, frozen.
        num_classes: C.
        bottleneck: r, width of the adapters.
        adapter_scale: factor of an adapter's output; it is not trained.
        dropout: fraction of an adapter's activations that is dropped in training.
        momentum: m, of the pull to the mean of the earlier adapters.
        pulls_per_step: how often the adapters are pulled after a step.
        stored: "own" adapters, as in the paper, or "mean_of_earlier", see above.
        contrast: weight of R.
        contrast_space: "raw" features, as published, or "cosine"; see `clrun.blocks.contrast.contrast`.
        rounds: how often z is computed at most.
        ensemble: add the softmax of the prototypes to the score.
        head_lr_scale: learning rate of the head, relative to that of the adapters.
        alignment: options of the alignment, see `clrun.blocks.task_gaussians.TaskAlignment`.
        task_id: "inferred", or "given" at test time: the logits with the adapters of that task.
        lr_scale: factor of the budget's learning rate.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    settings = frozenset({"til", "cil"})

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        bottleneck: PositiveInt,
        adapter_scale: float,
        dropout: Fraction,
        momentum: Fraction,
        pulls_per_step: Count,
        stored: Literal["own", "mean_of_earlier"],
        contrast: NonNegative,
        contrast_space: Space,
        rounds: PositiveInt,
        ensemble: bool,
        head_lr_scale: NonNegative,
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
            start="previous",
            alignment=alignment,
            task_id=task_id,
            lr_scale=lr_scale,
            compete=compete,
        )
        self.momentum, self.pulls_per_step, self.stored = momentum, pulls_per_step, stored
        self.contrast, self.contrast_space = contrast, contrast_space
        self.rounds, self.ensemble, self.head_lr_scale = rounds, ensemble, head_lr_scale
        self.mean = nn.ModuleDict()  # of the adapters of all tasks that are over, as they were trained
        self.first = TaskFeatures(nn.ModuleDict(), self.features_width, num_classes)  # prototypes with A_0
        self.earlier = torch.zeros(0, self.features_width)  # class means in the contrast of the current task

    # --- training

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        if task.index == 0:
            self.mean = copy.deepcopy(self.of(0))
            freeze(self.mean)
        self.earlier = self.gaussians.means()

    def trainable(self) -> list[dict[str, Any]]:
        return rate_groups((self.adapters[-1].parameters(), 1.0), (self.head.parameters(), self.head_lr_scale))

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        features = self.with_adapters(self.of(len(self.adapters) - 1), batch.x)
        loss = self.classification_loss(self.head(features), batch, ctx)
        if not self.contrast:
            return loss
        return loss + self.contrast * contrast(features, self.earlier, space=self.contrast_space)

    def after_step(self, ctx: Context) -> None:
        super().after_step(ctx)
        if ctx.progress.phase == "fit" and len(self.adapters) > 1:
            pull(self.adapters[-1], self.mean, 1 - (1 - self.momentum) ** self.pulls_per_step)

    # --- the end of a task

    def settle(self, task: Task, ctx: Context) -> None:
        newest, count = self.adapters[-1], len(self.adapters)
        before = {name: tensor.clone() for name, tensor in self.mean.state_dict().items()}
        pull(self.mean, newest, 1 / count)
        if self.stored == "mean_of_earlier" and count > 1:
            newest.load_state_dict(before)

    def end_task(self, task: Task, ctx: Context) -> None:
        super().end_task(task, ctx)
        self.earlier = self.earlier.new_zeros(0, self.features_width)
        self.first.own[task.classes.to(self.first.own.device)] = True
        with torch.no_grad(), eval_mode(self):
            self.first.measure(lambda x: self.inside(0, x), task)
            self._log(task, ctx)

    def _log(self, task: Task, ctx: Context) -> None:
        """Record the mean norm of the task's features and the contrast of a batch, whose gradient may vanish."""
        for batch in task.train.batches(ctx.budget.batch_size):
            features = self.inside(len(self.adapters) - 1, batch.x)
            value = float(contrast(features, features[:0], space=self.contrast_space))
            ctx.log({"phase": "contrast", "feature_norm": float(features.norm(dim=1).mean()), "contrast": value})
            return

    # --- prediction

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        if self.needs_task_id and task is not None:
            logits: Tensor = self.head(self.inside(task, x))
            return logits
        features = self.in_all(x)
        z, seen = self.scored(features), self.owner >= 0
        with torch.autocast(x.device.type, enabled=False):
            o = self.first.head(features[0])
        chosen = self.retrieved(z, o)
        scores = probabilities(z[chosen, torch.arange(len(x), device=x.device)], seen)
        if self.ensemble:
            scores = scores + probabilities(len(self.adapters) * o, seen)
        return log_scores(scores, seen)

    def choices(self, x: Tensor) -> Tensor | None:
        if self.needs_task_id:
            return None
        features = self.in_all(x)
        chosen = self.retrieved(self.scored(features), self.first.head(features[0]))
        return F.one_hot(chosen, len(self.adapters))

    def retrieved(self, z: Tensor, o: Tensor) -> Tensor:
        """Return the position [B] long of the task whose adapters each image has.

        Args:
            z: [T, B, C], the logits of the head with the adapters of each task.
            o: [B, C], the cosines with the prototypes.
        """
        unseen = self.owner < 0
        nearest = self.owner[o.masked_fill(unseen, float("-inf")).argmax(dim=1)]
        following = self.owner[z.masked_fill(unseen, float("-inf")).argmax(dim=2)]  # [T, B], the guess after each guess
        rows = torch.arange(len(o), device=o.device)
        for _ in range(self.rounds - 1):
            nearest = following[nearest, rows]
        return nearest


@torch.no_grad()
def pull(module: nn.Module, target: nn.Module, weight: float) -> None:
    """Move all parameters of a module the fraction `weight` of the way to those of another one, in place."""
    for own, other in zip(module.parameters(), target.parameters(), strict=True):
        own.lerp_(other, weight)
