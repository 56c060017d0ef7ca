"""The base of methods with adapters for each task and one head, which replayed features align after each task."""

import copy
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from clrun.blocks.inject import Plan, mlp_adapters
from clrun.blocks.params import eval_mode
from clrun.blocks.task_gaussians import TaskAlignment
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.losses import Compete
from clrun.learning.method import freeze
from clrun.methods.prompted import Prompted

Start = Literal["previous", "fresh"]


class TaskAdapters(Prompted):
    """Each task trains adapters of its own beside the MLPs of all blocks, and one head.

    When a task ends its adapters are frozen, the Gaussians of its classes are measured with them, and the head is
    aligned to the Gaussians of all classes so far. A subclass says which adapters an image has in a prediction.

    Args:
        backbone: a vision transformer of timm with `blocks`, frozen.
        num_classes: C.
        bottleneck: r, width of the adapters.
        adapter_scale: factor of an adapter's output; it is not trained.
        dropout: fraction of an adapter's activations that is dropped in training.
        start: adapters of a task begin as those of the task before ("previous"), or new ("fresh").
        alignment: options of the alignment.
        task_id: "inferred", or "given" at test time.
        lr_scale: factor of the budget's learning rate.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.

    Attributes:
        owner: [C] long, position of the latest task of each class; -1 for a class that has not come.
    """

    owner: Tensor
    given_by: ClassVar[str] = "task_id=given"

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        bottleneck: int,
        adapter_scale: float,
        dropout: float,
        start: Start,
        alignment: TaskAlignment,
        task_id: Literal["inferred", "given"],
        lr_scale: float,
        compete: Compete,
    ) -> None:
        super().__init__(backbone, num_classes, lr_scale=lr_scale, compete=compete, tokens=False)
        self.bottleneck, self.adapter_scale, self.dropout, self.start = bottleneck, adapter_scale, dropout, start
        self.alignment = alignment
        self.needs_task_id = task_id == "given"
        self.features_width = int(backbone.num_features)  # type: ignore[arg-type]
        self.adapters = nn.ModuleList()  # by task: a ModuleDict by block
        self.gaussians = alignment.gaussians(self.features_width, num_classes)
        self.register_buffer("owner", torch.full((num_classes,), -1))

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        if len(self.adapters) and self.start == "previous":
            new: nn.Module = copy.deepcopy(self.adapters[-1])
            new.requires_grad_(True)
        else:
            depth = len(self.backbone.blocks)  # type: ignore[arg-type]
            new = mlp_adapters(depth, self.width, self.bottleneck, scale=self.adapter_scale, dropout=self.dropout)
        self.adapters.append(new)

    def end_task(self, task: Task, ctx: Context) -> None:
        freeze(self.adapters[-1])
        self.owner[task.classes.to(self.owner.device)] = task.index
        self.settle(task, ctx)
        newest = self.of(len(self.adapters) - 1)
        with torch.no_grad(), eval_mode(self):
            self.gaussians.measure(lambda x: self.with_adapters(newest, x), task)
        if task.index > 0:
            factors = self.mean_factors(task)
            self.alignment.align(self, self.head, ctx, self.gaussians, mean_factors=factors)

    def settle(self, task: Task, ctx: Context) -> None:
        """Act on the trained adapters of a task before its classes are measured."""

    def mean_factors(self, task: Task) -> Tensor | None:
        """Return the factors [E] of the means in the alignment after a task; None for 1."""
        return None

    def of(self, place: int) -> nn.ModuleDict:
        """Return the adapters of the task at this position, by block."""
        found = self.adapters[place]
        assert isinstance(found, nn.ModuleDict)
        return found

    def with_adapters(self, adapters: nn.ModuleDict, x: Tensor) -> Tensor:
        """Return the features [B, D] of images x with these adapters."""
        return self.features(x, Plan(beside_mlp={int(block): adapter for block, adapter in adapters.items()}))

    def inside(self, place: int, x: Tensor) -> Tensor:
        """Return the features [B, D] float32 of images x with the adapters of the task at this position."""
        return self.with_adapters(self.of(place), x).float()

    def in_all(self, x: Tensor) -> Tensor:
        """Return the features [T, B, D] float32 of images x with the adapters of each task."""
        return torch.stack([self.inside(place, x) for place in range(len(self.adapters))])

    def scored(self, features: Tensor) -> Tensor:
        """Return the logits [T, B, C] float32 of the head on features [T, B, D]."""
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = self.head(features.flatten(0, 1))
        return logits.view(*features.shape[:2], -1)


def probabilities(logits: Tensor, classes: Tensor) -> Tensor:
    """Return the softmax [..., C] of logits [..., C] over `classes` ([C] bool), 0 for all others."""
    return logits.float().masked_fill(~classes, float("-inf")).softmax(dim=-1)


def log_scores(scores: Tensor, classes: Tensor) -> Tensor:
    """Return the logarithm [B, C] of scores [B, C] over their sum for `classes` ([C] bool), 0 for all others."""
    share = scores / scores.sum(dim=1, keepdim=True)
    return share.clamp_min(1e-30).log().masked_fill(~classes, 0.0)
