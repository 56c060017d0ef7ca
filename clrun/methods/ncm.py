"""NCM: nearest class mean on frozen features (Mensink et al., TPAMI 2013), Euclidean distance.

Memory between tasks: 8 D bytes of sums and 8 bytes of count per class (twice as much once a class comes in a second
domain) and 4 D bytes of mean per class; with kept task statistics, the sums and counts once more for every task. Task
id: not needed.

Verified: the predicted class is the one with the nearest mean, AOPD is 0, and unlearning is exact to 1e-9
(test_methods_closed_form).
"""

from torch import nn

from clrun.methods.simplecil import Simplecil
from clrun.system.errors import Count


class Ncm(Simplecil):
    """Predict the class whose mean feature is nearest: `Simplecil` with the Euclidean metric. Nothing is trained.

    Args:
        backbone: identity of width D; the engine feeds features.
        num_classes: C.
        normalise: scale features and class means to length 1, as iCaRL's nearest mean of exemplars does (Rebuffi et
            al., CVPR 2017, equation 2), here over all rows of a class.
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
        super().__init__(
            backbone,
            num_classes,
            metric="euclidean",
            normalise_before_mean=normalise,
            forget_tasks=forget_tasks,
            keep_task_statistics=keep_task_statistics,
        )
