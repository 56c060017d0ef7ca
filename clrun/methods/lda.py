"""LDA: linear discriminant analysis on frozen features, class by class (Hayes and Kanan, CVPRW 2020, arXiv 1909.01520).

Memory between tasks: the sum of products of features, 8 D^2 bytes; a sum of features and a count per class,
C (8 D + 8) bytes; and the weights, 8 C D bytes. With keep_task_statistics=true the sums of each task in addition. Task
id: not needed.

Verified: discriminants equal values computed by hand, AOPD is 0, and unlearning a task equals never having learned it
to 1e-9 (test_methods_closed_form).
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
    """Gaussian classes with one covariance S: score_c = mu_c' S^-1 f - mu_c' S^-1 mu_c / 2 + log prior_c.

    f [D] are the features of a row and mu_c [D] is the mean feature of class c. S is the scatter of all rows so far
    around their class means, divided by their number, which does not depend on the division into tasks.

    Deviation: Deep SLDA estimates S from a running average (weighted by the number of classes, with the class means at
    that time). Its fixed shrinkage corresponds to shrinkage=1e-4 if the features have a mean variance of 1.

    Args:
        backbone: an identity of width D, because the inputs of this method are features.
        num_classes: C.
        shrinkage: weight, from 0 to 1, of the multiple of the identity with the same trace in the covariance; "oas":
            the oracle-approximating estimate of it (Chen et al., IEEE TSP 2010) from the statistics of all rows so far.
        ridge: added to the diagonal of the covariance, in units of squared features.
        priors: class probabilities: "equal", or "empirical": proportional to the number of rows so far.
        forget_tasks: ids of tasks to unlearn at the end.
        keep_task_statistics: store the sums of each task as well; see `ClosedForm`.
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
