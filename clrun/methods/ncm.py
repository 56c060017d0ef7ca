"""NCM: nearest class mean on frozen features (Mensink et al., TPAMI 2013), Euclidean distance.

Memory between tasks: C (8 D + 8) bytes of counts and sums (twice that once a class comes in a second domain), 4 C D of
means; kept task statistics T times as much. Task id: not needed.

Verified: the nearest mean is nearest, AOPD 0, unlearning to 1e-9 (test_methods_closed_form).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from clrun.blocks.statistics import ClassStats
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.heads import PrototypeHead
from clrun.methods.closed_form import ClosedForm
from clrun.system.errors import Count


class Ncm(ClosedForm):
    """The class whose mean feature is nearest. Nothing is trained.

    Args:
        backbone: identity of width D; the engine feeds features.
        num_classes: C.
        normalise: scale features and means to length 1, as iCaRL's nearest mean of exemplars does (Rebuffi et al.,
            CVPR 2017, equation 2), here over all rows of a class.
        forget_tasks: ids of tasks to unlearn at the end.
        keep_task_statistics: keep the sums of each task as well; see `ClosedForm`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        normalise: bool,
        forget_tasks: list[Count],
        keep_task_statistics: bool,
    ) -> None:
        super().__init__(backbone, num_classes, forget_tasks=forget_tasks, keep_task_statistics=keep_task_statistics)
        self.normalise = normalise
        self.head: PrototypeHead = PrototypeHead(self.width, num_classes, metric="euclidean")

    def empty(self) -> dict[str, ClassStats]:
        return {"features": ClassStats(self.width, self.num_classes)}

    def lift(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=1) if self.normalise else features

    def solve(self, task: Task, ctx: Context) -> None:
        self.head.prototypes.copy_(self.lift(self.stats("features").means()))
