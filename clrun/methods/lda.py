"""LDA: linear discriminant analysis on frozen features, class by class (Hayes and Kanan, CVPRW 2020, arXiv 1909.01520).

Memory between tasks: 8 D^2 + C (8 D + 8) bytes of sums, 8 C D of weights; kept task statistics T times the sums. Task
id: not needed.

Verified: golden discriminants, AOPD 0, unlearning to 1e-9 (test_methods_closed_form).
"""

from typing import Literal

from torch import nn

from clrun.blocks.statistics import ClassStats, lda
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.heads import SolvedHead
from clrun.methods.closed_form import ClosedForm
from clrun.system.errors import Count, Fraction, NonNegative


class Lda(ClosedForm):
    """Gaussian classes with one covariance: score_c = mu_c' S^-1 f - mu_c' S^-1 mu_c / 2 + log prior_c.

    The covariance is the scatter about the class means of all rows so far over their number, which is the same however
    they are dealt to tasks. Deep SLDA's running estimate (weights by the number of classes, means as they were) is not
    reproduced; its fixed shrinkage is shrinkage=1e-4 with the features' mean variance as unit.

    Args:
        backbone: identity of width D; the engine feeds features.
        num_classes: C.
        shrinkage: of the covariance towards the identity of the same trace, 0 to 1; "oas": the oracle-approximating
            estimate (Chen et al., IEEE TSP 2010) from the statistics of all rows so far.
        ridge: added to the diagonal of the covariance, in units of the features squared.
        priors: of the classes: "equal", or "empirical" (their share of the rows so far).
        forget_tasks: ids of tasks to unlearn at the end.
        keep_task_statistics: keep the sums of each task as well; see `ClosedForm`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        shrinkage: Fraction | Literal["oas"],
        ridge: NonNegative,
        priors: Literal["equal", "empirical"],
        forget_tasks: list[Count],
        keep_task_statistics: bool,
    ) -> None:
        super().__init__(backbone, num_classes, forget_tasks=forget_tasks, keep_task_statistics=keep_task_statistics)
        self.shrinkage: float | Literal["oas"] = shrinkage
        self.ridge = ridge
        self.priors: Literal["equal", "empirical"] = priors
        self.head: SolvedHead = SolvedHead(self.width, num_classes)

    def empty(self) -> dict[str, ClassStats]:
        return {"features": ClassStats(self.width, self.num_classes, moments="pooled")}

    def solve(self, task: Task, ctx: Context) -> None:
        weight, bias = lda(self.stats("features"), shrinkage=self.shrinkage, ridge=self.ridge, priors=self.priors)
        self.head.weight.copy_(weight)
        self.head.bias.copy_(bias)
