"""SimpleCIL: cosine prototypes on frozen features (Zhou et al., IJCV 2024, arXiv 2303.07338).

Memory between tasks: C (8 D + 8) bytes of counts and sums (twice that once a class comes in a second domain), 4 C D of
prototypes; kept task statistics T times as much. Task id: not needed.

Verified: golden cosines, AOPD 0, unlearning to 1e-9 (test_methods_closed_form).
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from clrun.blocks.statistics import ClassStats
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.heads import PrototypeHead
from clrun.methods.closed_form import ClosedForm
from clrun.system.errors import Count


class Simplecil(ClosedForm):
    """The classifier row of a class is the mean of its features; the score is the cosine. Nothing is trained.

    Args:
        backbone: identity of width D; the engine feeds features.
        num_classes: C.
        metric: "cosine"; "euclidean" is the nearest class mean.
        normalise_before_mean: scale features to length 1 before averaging them (as iCaRL does; not SimpleCIL).
        forget_tasks: ids of tasks to unlearn at the end.
        keep_task_statistics: keep the sums of each task as well; see `ClosedForm`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        metric: Literal["cosine", "euclidean"],
        normalise_before_mean: bool,
        forget_tasks: list[Count],
        keep_task_statistics: bool,
    ) -> None:
        super().__init__(backbone, num_classes, forget_tasks=forget_tasks, keep_task_statistics=keep_task_statistics)
        self.normalise_before_mean = normalise_before_mean
        self.head: PrototypeHead = PrototypeHead(self.width, num_classes, metric=metric)

    def empty(self) -> dict[str, ClassStats]:
        return {"features": ClassStats(self.width, self.num_classes)}

    def update(self, statistics: dict[str, ClassStats], features: Tensor, y: Tensor, rows: Tensor) -> None:
        statistics["features"].update(F.normalize(features, dim=1) if self.normalise_before_mean else features, y)

    def solve(self, task: Task, ctx: Context) -> None:
        self.head.prototypes.copy_(self.stats("features").means())
