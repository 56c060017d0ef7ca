"""Base of methods whose state is sums over features: learning a task adds to them, unlearning subtracts."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clrun.blocks.params import eval_mode
from clrun.blocks.statistics import ClassStats
from clrun.data.split import Batch, Split
from clrun.data.stream import Stream, Task
from clrun.learning.context import Context
from clrun.learning.method import Method
from clrun.system.errors import ConfigError, Count

ROWS = 1024  # batch size of a pass over features; the last bits of a sum depend on it
IMAGES = 256  # batch size of a pass over images
FAR_BELOW = 1e4  # how far the score of a forgotten class lies below all others


class ClosedForm(Method):
    """Learning a task is one pass over its features, which adds to the statistics; then the classifier is solved for.

    Sums over tasks do not depend on the order of the tasks, not even in the last bit (see `ExactSum`). A class that
    comes in several domains has the sums over all of them. The engine feeds features; a subclass that changes the
    backbone overrides `reads_features` and `features`, which then reads images.

    After the last task, the tasks in `forget_tasks` are unlearned: their statistics are subtracted, and the result is
    as if these tasks had never been seen. A class without any remaining row scores lower than every other class.

    Args:
        backbone: identity of width D; the engine feeds features.
        num_classes: C.
        forget_tasks: ids of the tasks to unlearn after the last task.
        keep_task_statistics: keep the statistics of each task as well, which takes as much memory again for every task.
            Unlearning then needs no data, and the remaining statistics are added up again, equal bit for bit. Otherwise
            the statistics of forgotten tasks are computed again from their data.
    """

    own_weights = "computes its classifier from features of a backbone that has to stay as it is"
    order_invariant = True

    def __init__(
        self, backbone: nn.Module, num_classes: int, *, forget_tasks: list[Count], keep_task_statistics: bool
    ) -> None:
        super().__init__(backbone, num_classes)
        self.width = int(backbone.num_features)  # type: ignore[arg-type]
        self.forget_tasks, self.keep_task_statistics = list(forget_tasks), keep_task_statistics
        self.depends_on_task_count = bool(forget_tasks)  # they are unlearned after the last task
        self.kept = nn.ModuleDict()
        self.statistics = nn.ModuleDict()
        self.lost: list[int] = []  # classes of forgotten tasks without any row left

    @classmethod
    def reads_features(cls, options: Mapping[str, Any]) -> bool:
        return True

    # --- hooks of a subclass

    def empty(self) -> dict[str, ClassStats]:
        """Return the statistics of no rows, by name."""
        raise NotImplementedError

    def features(self, x: Tensor) -> Tensor:
        """Return the features [N, D] of x as the engine feeds it: features, or prepared images."""
        features: Tensor = self.backbone(x)
        return features

    def lift(self, features: Tensor) -> Tensor:
        """Return the input [N, M] of the head for features [N, D]."""
        return features

    def update(self, statistics: dict[str, ClassStats], features: Tensor, y: Tensor, rows: Tensor) -> None:
        """Add features [N, D] with labels [N] of stored `rows` [N] to the statistics of a task."""
        statistics["features"].update(self.lift(features), y)

    def score_features(self, features: Tensor) -> Tensor:
        """Return scores [B, C] of features [B, D] fp32, as a new tensor, before forgotten classes are pushed down."""
        scores: Tensor = self.head(self.lift(features))
        return scores

    def solve(self, task: Task, ctx: Context) -> None:
        """Compute the head from `self.statistics`; `task` is the latest one."""
        raise NotImplementedError

    # --- learning and unlearning

    def check(self, stream: Stream) -> None:
        known = set(stream.order)
        if missing := sorted(set(self.forget_tasks) - known):
            raise ConfigError(f"method.forget_tasks: no task {missing[0]} (the stream has {sorted(known)})")
        if known == set(self.forget_tasks):
            raise ConfigError("method.forget_tasks: names every task; at least one must remain")

    def begin_task(self, task: Task, ctx: Context) -> None:
        if not self.statistics:
            self.statistics = nn.ModuleDict(self.empty())

    def learn(self, task: Task, ctx: Context) -> None:
        own = self.measure(task.train, ctx)
        self._merge(own)
        if self.keep_task_statistics:
            self.kept[str(task.id)] = nn.ModuleDict(own)
        self.solve(task, ctx)

    def end_task(self, task: Task, ctx: Context) -> None:
        if self.forget_tasks and task.index == len(ctx.stream.tasks) - 1:
            self._forget(ctx)
            self.solve(task, ctx)

    def measure(self, split: Split, ctx: Context) -> dict[str, ClassStats]:
        """Return the statistics of the rows of a split."""
        own = self.empty()
        for features, batch in self.read(split, ctx):
            rows = batch.i if split.rows is None else split.rows[batch.i]
            self.update(own, features, batch.y, rows)
        return own

    def read(self, split: Split, ctx: Context) -> Iterator[tuple[Tensor, Batch]]:
        """Yield the features [N, D] fp32 of the rows of a split with their batch, in the precision of predictions."""
        with torch.no_grad(), eval_mode(self):
            for batch in split.batches(ROWS if self.uses_frozen_features else IMAGES):
                with ctx.hardware.autocast():
                    features = self.features(ctx.hardware.layout(batch.x))
                yield features.float(), batch

    def stats(self, name: str) -> ClassStats:
        """Return the statistics of all rows so far."""
        found = self.statistics[name]
        assert isinstance(found, ClassStats)
        return found

    def _merge(self, own: Mapping[str, ClassStats] | nn.ModuleDict, *, sign: int = 1) -> None:
        """Add the statistics of a task or, with sign -1, subtract them."""
        for name in self.statistics:
            part = own[name]
            assert isinstance(part, ClassStats)
            self.stats(name).merge(part, sign=sign)

    def _forget(self, ctx: Context) -> None:
        """Subtract the statistics of the forgotten tasks, or add up those of the other tasks again."""
        tasks = {task.id: task for task in ctx.stream.tasks}
        if self.keep_task_statistics:
            for gone in set(self.forget_tasks):
                del self.kept[str(gone)]
            self.statistics = nn.ModuleDict(self.empty())
            ctx.hardware.place(self)
            for own in self.kept.values():
                assert isinstance(own, nn.ModuleDict)
                self._merge(own)
        else:
            for gone in sorted(set(self.forget_tasks)):
                self._merge(self.measure(tasks[gone].train, ctx), sign=-1)
        counts = torch.stack([self.stats(name).counts() for name in self.statistics]).sum(dim=0)
        self.lost = [c for gone in self.forget_tasks for c in tasks[gone].classes.tolist() if not counts[c]]

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        """Return scores [B, C], never in reduced precision; those of forgotten classes lie far below all others."""
        return self.scores(self.features(x))

    def scores(self, features: Tensor) -> Tensor:
        """Return scores [B, C] of features [B, D]."""
        with torch.autocast(features.device.type, enabled=False):
            scores = self.score_features(features.float())
        if self.lost:
            scores[:, self.lost] = scores.min(dim=1, keepdim=True).values - FAR_BELOW
        return scores
