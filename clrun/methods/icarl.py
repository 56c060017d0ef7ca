"""iCaRL: herded exemplars, nearest mean of exemplars, distillation (Rebuffi et al., CVPR 2017, arXiv 1611.07725).

Memory between tasks: M exemplars of all classes, each with the s bytes of a stored input and 8 bytes for its label and
task, M (s + 8) bytes together, and the class means, C D floats. During a task also a frozen copy of the network. Task
id: not needed.

Verified: herding equals a greedy search, predictions are the classes of the nearest mean of exemplars, and targets and
losses equal values computed by hand (test_methods_exemplars).
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
    """Train on the rows of the task and the exemplars together; classify by the nearest mean of a class's exemplars.

    A class mean is the mean of the exemplars' features, each scaled to length 1, under the present network, and is then
    scaled to length 1 itself. Scores are cosines between features and means, which have the same order as the
    distances. While a task is being learned, and if there are no exemplars, predictions are those of the head.

    In the task-incremental setting the loss of a row compares the classes of its own task only, but the outputs of old
    classes are distilled on all rows. With several processes, each process stores all exemplars.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        capacity: M, the number of exemplars of all classes together, floor(M / classes) per class. 0 stores none.
        per_class: whether `capacity` is the number of exemplars per class instead.
        selection: how exemplars are chosen: "herding" or "random".
        classifier: "nme": nearest mean of exemplars. "head": the outputs of the network.
        loss: "bce": binary cross-entropy of one sigmoid per class; the targets are the labels for new classes and the
            outputs of the teacher for old ones, as published. "ce": cross-entropy + strength * distillation at
            temperature tau with one softmax per task (De Lange et al.).
        reduction: only for "bce": "sum" or "mean" over classes. The mean divides the learning rate by the number of
            classes; the published rate of 2 is for the mean.
        strength: only for "ce": weight of the distillation.
        tau: only for "ce": temperature.
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
        self.means_current = False  # whether the means belong to the present network
        self.teacher: Teacher | None = None
        self.old: Tensor | None = None  # [C] bool, the classes of earlier tasks; only while a task is learned
        self.groups: list[Tensor] = []

    def check(self, stream: Stream) -> None:
        classes = int(stream.members.any(dim=0).sum())
        if not self.per_class and 0 < self.capacity < classes:
            raise ConfigError(f"method.capacity={self.capacity}: less than one exemplar for each of {classes} classes")

    # --- a task

    def begin_task(self, task: Task, ctx: Context) -> None:
        self.means_current = False
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
        per_class = self.capacity if self.per_class else self.capacity // seen
        self.memory.truncate(per_class)
        with eval_mode(self), torch.no_grad():
            self._choose(task, ctx, per_class)
            self._average(ctx)
        self.means_current = self.classifier == "nme" and len(self.memory) > 0

    def _choose(self, task: Task, ctx: Context, count: int) -> None:
        """Store `count` exemplars of each class of `task`, in the order in which they are chosen."""
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
        """Compute the class means from the exemplars."""
        self.means.prototypes.zero_()
        if len(self.memory):
            features = self._unit_features(self.memory.split(ctx.stream.transform), ctx)
            for label in torch.unique(self.memory.y).tolist():
                self.means.prototypes[label] = F.normalize(features[self.memory.set(label)].mean(dim=0), dim=0)

    def _unit_features(self, split: Split, ctx: Context) -> Tensor:
        """Return the features [N, D] of all rows without augmentation, scaled to length 1."""
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
        goal = F.one_hot(batch.y, self.num_classes).float()
        if target is not None and self.old is not None:
            goal, mask = torch.where(self.old, target.float().sigmoid(), goal), mask | self.old
        return masked_binary_cross_entropy(logits, goal, mask, reduction=self.reduction)

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        features = self.backbone(x)
        scores: Tensor = self.means(features) if self.means_current and not self.training else self.head(features)
        return scores
