"""Joint training on the data of all tasks so far, or of all tasks: the upper bound (De Lange et al., arXiv 1909.08383).

Memory between tasks: the data of all tasks; with restart, P floats of initial weights. Task id: not needed.

Verified: each task begins from the initial weights, all tasks at once do not forget (test_methods_others).
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from clrun.blocks.params import clone
from clrun.data.split import concatenate
from clrun.data.stream import Stream, Task
from clrun.learning.context import Context
from clrun.learning.heads import GrowingHead
from clrun.learning.losses import Compete
from clrun.learning.method import Method
from clrun.learning.training import fit


class Joint(Method):
    """Train on the union of tasks; the budget's epochs count passes over the union, its steps are those of one fit.

    Mode "incremental" trains anew for each task, on tasks 1 ... t: row t of the accuracy matrix is the bound for a
    learner that has seen t tasks. Mode "once" trains one model on all tasks when the first one comes, all classes
    competing, and never again: row t is that model's accuracy on the first t tasks, read among the classes of these
    tasks. Its final row is the usual bound; earlier rows are easier than for any learner, task-incremental forgetting
    is 0, and class-incremental forgetting is only the growing choice of classes. Data, initial weights and all random
    numbers of "once" are keyed by task and class ids, so that no task order can change it.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        mode: "incremental" or "once".
        restart: "incremental" only: begin each task from the initial weights and a new head, else from those at hand.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        mode: Literal["incremental", "once"],
        restart: bool,
        compete: Compete,
    ) -> None:
        super().__init__(backbone, num_classes, compete=compete)
        self.mode, self.restart = mode, restart and mode == "incremental"
        self.order_invariant = mode == "once"
        self.initial = clone(backbone.state_dict()) if self.restart else {}

    def begin_task(self, task: Task, ctx: Context) -> None:
        if self.mode == "once":
            whole = _whole(ctx)
            self.grow(self.head, whole.task.classes, whole.generator("head"))
            return
        if self.restart and task.index:
            self.backbone.load_state_dict(self.initial)
            assert isinstance(self.head, GrowingHead)
            self.head = GrowingHead(self.head.weight.shape[1], self.num_classes)
        self.grow(self.head, _classes(ctx.stream, task.index + 1))

    def learn(self, task: Task, ctx: Context) -> None:
        if self.mode == "incremental":
            fit(self, concatenate([t.train for t in ctx.stream.tasks[: task.index + 1]]), ctx)
        elif task.index == 0:
            whole = _whole(ctx)
            fit(self, whole.task.train, whole)


def _classes(stream: Stream, learned: int) -> torch.Tensor:
    """Return the ids of the classes of the first `learned` tasks, ascending."""
    return stream.candidates(learned, "cil")[0].nonzero()[:, 0]


def _whole(ctx: Context) -> Context:
    """Return the context of one task made of all tasks, the same in every order."""
    tasks = ctx.stream.tasks
    train = concatenate([task.train for task in sorted(tasks, key=lambda task: task.id)])
    whole = Task(len(tasks) - 1, -1, "all tasks", _classes(ctx.stream, len(tasks)), train, ctx.task.test)
    return replace(ctx, task=whole, _generators={}, _masks={})
