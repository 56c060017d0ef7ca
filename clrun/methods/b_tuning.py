"""B-Tuning: a student follows read-outs of frozen teachers, weighted by LogME (You et al., JMLR 2022, 2110.10545).

Memory between tasks: the frozen teachers (with self_teacher=initial also P floats for a student of P parameters); with
anchor=seen also C times the sum of the feature widths of student and teachers. Task id: not needed.

Verified: golden values; weights sum to 1 and have their limits; a teacher that equals the student gives no loss and no
gradient; strength 0 is finetuning bit for bit; rotated teachers and permuted teachers change nothing; targets that are
stored equal those computed anew; bad nodes are refused in one line (test_methods_b_tuning).
"""

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clrun.blocks.logme import read_out
from clrun.blocks.params import Carrier
from clrun.blocks.statistics import ClassStats
from clrun.data.split import Batch
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.heads import GrowingHead
from clrun.learning.knobs import Knob
from clrun.learning.losses import Compete, masked_cross_entropy
from clrun.learning.method import Method
from clrun.learning.networks import Factory, FrozenNetwork
from clrun.system.errors import ConfigError, NonNegative, Positive, PositiveInt

ROWS = 256  # rows per forward pass over a task


class BTuning(Method):
    """loss = CE + strength * mean_{b, c} (m_c . f(x_b) - sum_k zeta_k m_{k,c} . f_k(x_b))^2 over rows b and classes c.

    f are the features of the student and f_k those of frozen teacher k, of the same augmented images. The read-outs m
    and m_k are the posterior mean weights of Bayesian linear models from features to one-hot labels (see
    `clrun.blocks.logme`): in the space of the labels networks of different widths can be compared. When a task begins,
    the read-outs and LogME scores of the student as it is and of every teacher are computed from the task's training
    rows without augmentation; the k teachers with the best scores count, with the weights zeta = softmax(LogME /
    temperature). They stay fixed while the task is learned. Only the student and its head learn, and only they predict.

    anchor=current compares the classes of the task. anchor=seen also those of earlier tasks, with the read-outs and
    weights of their task: the teachers' answers never change, so that they are a memory without data.

    Teachers read the pixels that the student sees, resized and normalised for each of them. Without augmentation their
    answers to the rows of a task are computed once.

    Published for a single task with three teachers; the continual form is this project's own. With fixed strength the
    pull per class falls as one over the number of classes under reduction=mean, which is published. The published code
    keeps a student that is not among its teachers and drops the last short batch of every epoch.

    Args:
        backbone: maps prepared images to features [B, D]; the student.
        num_classes: C.
        teachers: factories of networks, called with the shape of the stored images; a list or by name.
        self_teacher: "initial": a frozen copy of the student as loaded is one more teacher. "previous": one of the
            student when the task begins, which needs anchor=current. "none": neither.
        k: largest number of teachers that count.
        temperature: tau of the softmax.
        strength: lambda; 0 is finetuning.
        anchor: "current" or "seen".
        reduction: "mean" over rows and classes, or "sum_classes": the sum over classes, averaged over rows.
        clip_norm: largest norm of the gradient while there are read-outs; None does not clip. It is not published:
            features that have adapted to earlier tasks may hardly differ between the classes of a new one, so that
            their read-outs and with them the gradients are large.
        head_lr_factor: learning rate of the head relative to that of the budget.
        head_std: standard deviation of new rows of the head, whose biases are 0; None initialises them as `nn.Linear`.
        compete: classes that compete in the cross-entropy, see `clrun.learning.losses`.
    """

    knobs = (Knob("strength"),)

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        teachers: list[Factory] | dict[str, Factory] | None,
        self_teacher: Literal["none", "initial", "previous"],
        k: PositiveInt,
        temperature: Positive,
        strength: NonNegative,
        anchor: Literal["current", "seen"],
        reduction: Literal["mean", "sum_classes"],
        clip_norm: Positive | None,
        head_lr_factor: NonNegative,
        head_std: NonNegative | None,
        compete: Compete,
    ) -> None:
        super().__init__(backbone, num_classes, compete=compete)
        self.head: GrowingHead = GrowingHead(int(backbone.num_features), num_classes)  # type: ignore[arg-type]
        self.self_teacher, self.k, self.temperature, self.strength = self_teacher, k, temperature, strength
        self.anchor, self.reduction, self.clip_norm = anchor, reduction, clip_norm
        self.head_lr_factor, self.head_std = head_lr_factor, head_std
        self.teachers: list[FrozenNetwork] = []
        if self_teacher == "initial":
            self.teachers.append(FrozenNetwork("initial student", copy.deepcopy(backbone)))
        self.read_outs: ReadOuts | None = None
        self.answers: Tensor | None = None  # [n, known classes], during a task without augmentation

    @classmethod
    def further_networks(cls, options: Mapping[str, Any]) -> Mapping[str, Factory]:
        teachers = options["teachers"] or {}
        if callable(teachers):
            raise ConfigError("method.teachers: expected a list of backbones, got one; write [...] around it")
        if isinstance(teachers, Mapping):
            return {f"method.teachers.{name}": factory for name, factory in teachers.items()}
        return {f"method.teachers[{number}]": factory for number, factory in enumerate(teachers)}

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        if options["self_teacher"] == "none" and not options["teachers"] and options["strength"]:
            raise ConfigError("method.teachers: there are none; list backbones, or set method.self_teacher=initial")
        if options["self_teacher"] == "previous" and options["anchor"] == "seen":
            raise ConfigError(
                "method.self_teacher=previous: the student before an earlier task is not kept, and method.anchor=seen "
                "needs it; set method.anchor=current or method.self_teacher=initial"
            )

    def receive(self, networks: Mapping[str, FrozenNetwork]) -> None:
        self.teachers = [*networks.values(), *self.teachers]

    def loaded_networks(self) -> dict[str, nn.Module]:
        kept = {f"teacher {k}": teacher.network for k, teacher in enumerate(self.teachers) if teacher.name != PREVIOUS}
        return super().loaded_networks() | kept

    # --- a task

    def begin_task(self, task: Task, ctx: Context) -> None:
        head, before = self.head, self.head.initialised.clone()
        super().begin_task(task, ctx)
        new = head.initialised & ~before
        if self.head_std is not None:
            with torch.no_grad():
                head.weight[new] = (self.head_std * torch.randn(int(new.sum()), head.weight.shape[1])).to(head.weight)
                assert head.bias is not None
                head.bias[new] = 0.0
        if self.strength:
            self._ask(task, ctx)

    def _ask(self, task: Task, ctx: Context) -> None:
        """Compute the read-outs of student and teachers on `task`, choose the teachers, and store their answers."""
        student = FrozenNetwork(PREVIOUS, copy.deepcopy(self.backbone))
        if self.self_teacher == "previous":
            self.teachers.append(student)
        own = self._measure(student, task, ctx)
        found = [own if t is student else self._measure(t, task, ctx) for t in self.teachers]
        weights = teacher_weights([score for score, _ in found], self.k, self.temperature)
        if self.read_outs is None or self.anchor == "current":
            self.read_outs = ReadOuts(self.num_classes, student.width, sum(t.width for t in self.teachers))
            ctx.hardware.place(self.read_outs)
        rows = torch.cat([w * read for w, (_, read) in zip(weights, found, strict=True)], dim=1)
        self.read_outs.update(task.classes, own[1], rows)
        for teacher, weight, (score, _) in zip(self.teachers, weights, found, strict=True):
            ctx.log({"phase": "teachers", "teacher": teacher.name, "logme": score, "weight": weight})
        self.answers = None
        if not ctx.stream.transform.augments:
            parts = [self._answer(batch.x, ctx) for batch in task.train.batches(ROWS)]
            self.answers = torch.cat(parts)

    def _measure(self, network: FrozenNetwork, task: Task, ctx: Context) -> tuple[float, Tensor]:
        """Return the LogME of a network's features of the rows of `task`, and its read-outs [C, D_k] float64."""
        stats = ClassStats(network.width, self.num_classes, moments="pooled")
        view = network.view(task.train.transform)
        with torch.no_grad():
            for batch in task.train.batches(ROWS):
                with ctx.hardware.autocast():
                    features = network.network(ctx.hardware.layout(view(batch.x)))
                stats.update(features.float(), batch.y)
        return read_out(stats)

    def _answer(self, x: Tensor, ctx: Context) -> Tensor:
        """Return sum_k zeta_k m_k . f_k(x) [B, known classes] of the teachers for images x prepared for the student."""
        assert self.read_outs is not None, "begin_task makes them"
        rows, start = self.read_outs.of_teachers(), 0
        total = x.new_zeros(len(x), len(rows))
        for teacher in self.teachers:
            part = rows[:, start : start + teacher.width]
            start += teacher.width
            if part.any():
                view = teacher.view(ctx.task.train.transform)
                with torch.no_grad():
                    total = total + teacher.network(ctx.hardware.layout(view(x))).float() @ part.T
        return total

    def end_task(self, task: Task, ctx: Context) -> None:
        self.answers = None
        self.teachers = [teacher for teacher in self.teachers if teacher.name != PREVIOUS]
        if self.anchor == "current":
            self.read_outs = None

    # --- a step

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        features: Tensor = self.backbone(batch.x)
        loss = masked_cross_entropy(self.head(features), batch.y, self.competing(batch.t, ctx))
        if self.read_outs is None:
            return loss
        target = self._answer(batch.x, ctx) if self.answers is None else self.answers[batch.i]
        error = (features.float() @ self.read_outs.of_student().T - target).square()
        distance = error.mean() if self.reduction == "mean" else error.sum(dim=1).mean()
        return loss + self.strength * distance

    def adjust_gradients(self, ctx: Context) -> None:
        if self.clip_norm is not None and self.read_outs is not None:
            nn.utils.clip_grad_norm_(self.parameters(), self.clip_norm)

    def trainable(self) -> Any:
        if self.head_lr_factor == 1:
            return super().trainable()
        head = {"params": list(self.head.parameters()), "lr_factor": self.head_lr_factor}
        return [{"params": list(self.backbone.parameters())}, head]


PREVIOUS = "student before the task"


class ReadOuts(Carrier):
    """The read-outs of the student, and those of all teachers side by side, each times the teacher's weight.

    Args:
        num_classes: C.
        width: D of the student.
        widths: the sum of the D_k of all teachers.
    """

    def __init__(self, num_classes: int, width: int, widths: int) -> None:
        super().__init__()
        self.known = torch.zeros(num_classes, dtype=torch.bool)
        self.student, self.teachers = torch.zeros(num_classes, width), torch.zeros(num_classes, widths)

    def update(self, classes: Tensor, student: Tensor, teachers: Tensor) -> None:
        """Set the rows of `classes` [k] from read-outs [C, D] and [C, sum of D_k]."""
        self.known[classes] = True
        self.student[classes] = student[classes].to(self.student)
        self.teachers[classes] = teachers[classes].to(self.teachers)

    def of_student(self) -> Tensor:
        """Return the rows [known classes, D] of the student, in the order of their ids."""
        return self.student[self.known]

    def of_teachers(self) -> Tensor:
        """Return the rows [known classes, sum of D_k] of the teachers."""
        return self.teachers[self.known]


def teacher_weights(scores: list[float], k: int, temperature: float) -> list[float]:
    """Return softmax(score / temperature) over the k best scores, the first ones among equals; 0 for all others."""
    best = sorted(range(len(scores)), key=lambda number: -scores[number])[:k]
    weights = (torch.tensor([scores[number] for number in best], dtype=torch.float64) / temperature).softmax(dim=0)
    chosen = dict(zip(best, weights.tolist(), strict=True))
    return [chosen.get(number, 0.0) for number in range(len(scores))]
