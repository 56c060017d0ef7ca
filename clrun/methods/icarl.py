"""iCaRL: herded exemplars, nearest mean of exemplars, distillation (Rebuffi et al., CVPR 2017, arXiv 1611.07725).

Memory between tasks: M (s + 8) bytes, M = exemplars of all classes, s bytes a stored input, and C D floats of class
means; a frozen copy of the network during a task. Task id: not needed.

Verified: herding is the greedy choice, classes are those of the nearest mean of exemplars, targets by hand
(test_methods_exemplars).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clrun.blocks.buffers import Exemplars, herd
from clrun.blocks.distillation import Teacher, distillation_loss, head_groups
from clrun.blocks.params import eval_mode
from clrun.data.split import Batch, Split, concatenate
from clrun.data.stream import Stream, Task
from clrun.learning.context import Context
from clrun.learning.heads import PrototypeHead
from clrun.learning.knobs import Knob
from clrun.learning.losses import Compete, masked_binary_cross_entropy, masked_cross_entropy
from clrun.learning.method import Method
from clrun.learning.training import fit
from clrun.system.errors import ConfigError, Count, NonNegative, Positive


class Icarl(Method):
    """Train on the task's rows and the exemplars together; classify by the nearest mean of a class's exemplars.

    The means are those of unit features under the network of now, scaled to length 1; scores are cosines, whose order
    is that of the distances. While a task is being learned, and without exemplars, predictions are the head's.

    In the task-incremental setting a row's label is judged among the classes of its own task, and the outputs of old
    classes are distilled on every row all the same. With several processes each holds all exemplars.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        capacity: M, exemplars of all classes together, floor(M / classes) each; or of each class. 0 keeps none.
        per_class: whether `capacity` is that of each class.
        selection: which rows become exemplars: "herding", or "random".
        classifier: "nme", nearest mean of exemplars; "head", the network's outputs.
        loss: "bce": sigmoids with the label for new classes and the teacher's outputs for old ones, as published. "ce":
            cross-entropy + strength * distillation at temperature tau, a softmax for each task (De Lange et al.).
        reduction: "bce" only: over classes, "sum", or "mean", which divides the learning rate by their number (the
            published rate of 2 is meant for it).
        strength: "ce" only: weight of the distillation.
        tau: "ce" only: temperature.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    settings = frozenset({"til", "cil"})

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        capacity: Count,
        per_class: bool,
        selection: Literal["herding", "random"],
        classifier: Literal["nme", "head"],
        loss: Literal["bce", "ce"],
        reduction: Literal["sum", "mean"],
        strength: NonNegative,
        tau: Positive,
        compete: Compete,
    ) -> None:
        super().__init__(backbone, num_classes, compete=compete)
        self.capacity, self.per_class, self.selection, self.classifier = capacity, per_class, selection, classifier
        self.kind, self.reduction, self.strength, self.tau = loss, reduction, strength, tau
        self.knobs = (Knob("strength"),) if loss == "ce" else ()
        self.memory = Exemplars("y")
        self.means = PrototypeHead(int(backbone.num_features), num_classes, metric="cosine")  # type: ignore[arg-type]
        self.ready = False  # whether the means are those of the network of now
        self.teacher: Teacher | None = None
        self.old: Tensor | None = None  # [C] bool, classes of earlier tasks, while a task is learned
        self.groups: list[Tensor] = []

    def check(self, stream: Stream) -> None:
        classes = int(stream.members.any(dim=0).sum())
        if not self.per_class and 0 < self.capacity < classes:
            raise ConfigError(f"method.capacity={self.capacity}: less than one exemplar for each of {classes} classes")

    # --- a task

    def begin_task(self, task: Task, ctx: Context) -> None:
        self.ready = False
        if task.index and (self.kind == "bce" or self.strength):
            members = ctx.stream.members[: task.index].to(ctx.hardware.device)
            self.teacher, self.old = Teacher(self.backbone, self.head), members.any(dim=0)
            self.groups = head_groups(members, per_head=True)
        super().begin_task(task, ctx)

    def learn(self, task: Task, ctx: Context) -> None:
        parts: list[Split] = [task.train]
        if len(self.memory):
            parts.append(self.memory.split(task.train.transform))
        fit(self, concatenate(parts), ctx)

    def end_task(self, task: Task, ctx: Context) -> None:
        self.teacher, self.old, self.groups = None, None, []
        seen = int(ctx.stream.candidates(task.index + 1, "cil")[0].sum())
        share = self.capacity if self.per_class else self.capacity // seen
        self.memory.truncate(share)
        with eval_mode(self), torch.no_grad():
            self._choose(task, ctx, share)
            self._average(ctx)
        self.ready = self.classifier == "nme" and len(self.memory) > 0

    def _choose(self, task: Task, ctx: Context, count: int) -> None:
        """Take `count` exemplars of each class of `task`, in the order of their choice."""
        if not count:
            return
        y = task.train.y
        herding = self.selection == "herding"
        features = self._unit_features(task.train, ctx) if herding else None
        chosen = []
        for label in task.classes.tolist():
            rows = (y == label).nonzero()[:, 0]
            order = torch.randperm(len(rows), generator=ctx.generator("exemplars", label))[:count].to(rows.device)
            chosen.append(rows[order if features is None else herd(features[rows], count)])
        for batch in task.train.select(torch.cat(chosen)).batches(256, view="raw"):
            self.memory.append(batch)

    def _average(self, ctx: Context) -> None:
        """Set the class means."""
        self.means.prototypes.zero_()
        if len(self.memory):
            features = self._unit_features(self.memory.split(ctx.stream.transform), ctx)
            for label in torch.unique(self.memory.y).tolist():
                self.means.prototypes[label] = F.normalize(features[self.memory.set(label)].mean(dim=0), dim=0)

    def _unit_features(self, split: Split, ctx: Context) -> Tensor:
        """Return the features [N, D] of the eval view of all rows, scaled to length 1."""
        batches = (self.backbone(ctx.hardware.layout(batch.x)) for batch in split.batches(256))
        return torch.cat([F.normalize(features.float(), dim=1) for features in batches])

    # --- a step

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        logits: Tensor = self.head(self.backbone(batch.x))
        mask = self.competing(batch.t, ctx)
        target = None if self.teacher is None else self.teacher(batch.x)[1]
        if self.kind == "ce":
            loss = masked_cross_entropy(logits, batch.y, mask)
            if target is None:
                return loss
            return loss + self.strength * distillation_loss(logits, target, self.groups, tau=self.tau)
        wanted = F.one_hot(batch.y, self.num_classes).float()
        if target is not None and self.old is not None:
            wanted, mask = torch.where(self.old, target.float().sigmoid(), wanted), mask | self.old
        return masked_binary_cross_entropy(logits, wanted, mask, reduction=self.reduction)

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        features = self.backbone(x)
        scores: Tensor = self.means(features) if self.ready and not self.training else self.head(features)
        return scores
