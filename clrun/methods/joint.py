"""Joint training on the data of all tasks so far, or of all tasks: the upper bound (De Lange et al., arXiv 1909.08383).

Memory between tasks: the data of all tasks; with restart=true also the initial weights of the backbone. Task id: not
needed.

Verified: with restart each task starts from the initial weights, and with mode=once nothing is forgotten
(test_methods_others).
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from clrun.blocks.params import clone
from clrun.data.split import concatenate
from clrun.data.stream import Stream, Task
from clrun.learning.context import Context
from clrun.learning.losses import Compete
from clrun.learning.method import Method
from clrun.learning.names import new_head
from clrun.learning.training import fit


class Joint(Method):
    """Train on the union of tasks; an epoch of the budget is a pass over the union.

    Mode "incremental" trains again for each task t, on tasks 1 ... t. Row t of the accuracy matrix is then the bound
    for a method that has seen t tasks. Mode "once" trains one model on all tasks at the first task, with all classes
    competing, and never again. Row t is then the accuracy of this model on the first t tasks, among the classes of
    these tasks. Its last row is the usual upper bound. Earlier rows are easier than for any continual method:
    task-incremental forgetting is 0, and class-incremental forgetting comes only from the growing number of classes.
    Data, initial weights and all random numbers of "once" depend on task and class ids, so that its result is the same
    in every task order.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        mode: "incremental" or "once".
        restart: only for "incremental": start each task from the initial weights and a new head instead of the present
            ones.
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
        self.order_invariant = self.depends_on_task_count = mode == "once"
        self.initial = clone(backbone.state_dict()) if self.restart else {}

    def begin_task(self, task: Task, ctx: Context) -> None:
        if self.mode == "once":
            union = _union(ctx)
            self.grow(self.head, union.task.classes, union.generator("head"))
            return
        if self.restart and task.index:
            self.backbone.load_state_dict(self.initial)
            self.head = new_head(self.backbone, self.num_classes)
            self.read_names(ctx.stream.captions)
        self.grow(self.head, _classes(ctx.stream, task.index + 1))

    def learn(self, task: Task, ctx: Context) -> None:
        if self.mode == "incremental":
            fit(self, concatenate([t.train for t in ctx.stream.tasks[: task.index + 1]]), ctx)
        elif task.index == 0:
            union = _union(ctx)
            fit(self, union.task.train, union)


def _classes(stream: Stream, learned: int) -> torch.Tensor:
    """Return the ids [k] long of the classes of the first `learned` tasks, ascending."""
    return stream.candidates(learned, "cil")[0].nonzero()[:, 0]


def _union(ctx: Context) -> Context:
    """Return the context of a task that is the union of all tasks, the same in every task order."""
    tasks = ctx.stream.tasks
    train = concatenate([task.train for task in sorted(tasks, key=lambda task: task.id)])
    union = Task(len(tasks) - 1, -1, "all tasks", _classes(ctx.stream, len(tasks)), train, ctx.task.test)
    return replace(ctx, task=union, generators={}, _masks={})
