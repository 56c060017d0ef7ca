"""SimpleCIL: cosine prototypes on frozen features (Zhou et al., IJCV 2024, arXiv 2303.07338).

Memory between tasks: 8 D bytes of sums and 8 bytes of count per class (twice as much once a class comes in a second
domain) and 4 D bytes of prototype per class; with kept task statistics, the sums and counts once more for every task.
Task id: not needed.

Verified: the scores are cosines computed by hand, AOPD is 0, and unlearning is exact to 1e-9
(test_methods_closed_form).
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

    With the Euclidean metric this is the nearest class mean (`clrun.methods.ncm`).

    Args:
        backbone: identity of width D; the engine feeds features.
        num_classes: C.
        metric: "cosine", or "euclidean": minus the squared distance.
        normalise_before_mean: scale features to length 1 before averaging them, then the means and the features that
            are classified. SimpleCIL does not; iCaRL does.
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
        self.normalise = normalise_before_mean
        self.head: PrototypeHead = PrototypeHead(self.width, num_classes, metric=metric)

    def empty(self) -> dict[str, ClassStats]:
        return {"features": ClassStats(self.width, self.num_classes)}

    def lift(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=1) if self.normalise else features

    def solve(self, task: Task, ctx: Context) -> None:
        self.head.prototypes.copy_(self.lift(self.stats("features").means()))
