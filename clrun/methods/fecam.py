"""FeCAM: Mahalanobis distances with a covariance a class on frozen features (Goswami et al., NeurIPS 2023, 2309.14062).

Memory between tasks: 8 D^2 + 8 D + 8 bytes of sums per class (with covariance "common" 8 D^2 for all classes together,
with "diagonal" 8 D per class in the place of 8 D^2; twice as much once sums are no longer exact; 8 D more per class for
the recipe "cnn"), and half as much for factors; with kept task statistics, the sums once more for every task. Task id:
not needed.

Verified: distances are computed by hand, shrunk to the identity it is the nearest mean, AOPD is 0, and unlearning is
exact to 1e-9 (test_methods_closed_form).
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clrun.blocks.statistics import ClassStats, Moments, cholesky, shrunk
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.methods.closed_form import ClosedForm
from clrun.system.errors import ConfigError, Count, NonNegative, PositiveInt, Range

MOMENTS: dict[str, Moments] = {"class": "class", "common": "pooled", "diagonal": "diagonal"}


class Fecam(ClosedForm):
    """The class with the smallest u' R^-1 u: u the difference of transformed feature and mean, R a correlation matrix.

    The covariance S of a class is shrunk to S + alpha1 V1 I + alpha2 V2 (11' - I), where V1 is the mean of the diagonal
    of S and V2 the mean of all other entries, and scaled to unit diagonal. The published code leaves zeros out of V2,
    which can make the result indefinite. Recipe "vit" uses features of length 1 and their means. Recipe "cnn", for
    features without negative entries, uses covariances of f^tukey and u = norm(norm(f)^tukey) - norm(mean(f)^tukey), as
    published, although means and covariances then belong to different spaces.

    Args:
        backbone: identity of width D; the engine feeds features.
        num_classes: C.
        recipe: "vit" or "cnn".
        covariance: "class": one per class. "common": that of all rows about their class means. "diagonal": the
            variances of each class, not scaled to unit diagonal, which would make them all 1.
        alpha1: shrinkage of the diagonal.
        alpha2: shrinkage off the diagonal.
        shrinkages: how many times the covariance is shrunk.
        tukey: exponent of the recipe "cnn".
        forget_tasks: ids of the tasks to unlearn after the last task.
        keep_task_statistics: keep the sums of each task as well; see `ClosedForm`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        recipe: Literal["vit", "cnn"],
        covariance: Literal["class", "common", "diagonal"],
        alpha1: NonNegative,
        alpha2: NonNegative,
        shrinkages: PositiveInt,
        tukey: Annotated[float, Range(above=0, maximum=1)],
        forget_tasks: list[Count],
        keep_task_statistics: bool,
    ) -> None:
        super().__init__(backbone, num_classes, forget_tasks=forget_tasks, keep_task_statistics=keep_task_statistics)
        self.recipe, self.covariance = recipe, covariance
        self.alpha1, self.alpha2, self.shrinkages, self.tukey = alpha1, alpha2, shrinkages, tukey
        self.head: MahalanobisHead = MahalanobisHead(self.width, num_classes, kind=covariance)
        self.solved = torch.zeros(num_classes, dtype=torch.long)  # rows behind the factor of each class

    def empty(self) -> dict[str, ClassStats]:
        statistics = {"spread": ClassStats(self.width, self.num_classes, moments=MOMENTS[self.covariance])}
        return statistics if self.recipe == "vit" else {**statistics, "raw": ClassStats(self.width, self.num_classes)}

    def lift(self, features: Tensor) -> Tensor:
        if self.recipe == "cnn":
            features = F.normalize(features, dim=1).clamp(min=0) ** self.tukey
        return F.normalize(features, dim=1)

    def update(self, statistics: dict[str, ClassStats], features: Tensor, y: Tensor, rows: Tensor) -> None:
        if self.recipe == "vit":
            statistics["spread"].update(self.lift(features), y)
            return
        if (features < 0).any():
            raise ConfigError("method.recipe=cnn: needs features without negative entries; take method.recipe=vit")
        statistics["raw"].update(features, y)
        statistics["spread"].update(features**self.tukey, y)

    def solve(self, task: Task, ctx: Context) -> None:
        spread = self.stats("spread")
        counts = spread.counts().cpu()
        present = counts.nonzero()[:, 0].tolist()
        self.head.means.copy_(spread.means() if self.recipe == "vit" else self.lift(self.stats("raw").means()))
        self.head.present = present
        if self.covariance == "common":
            pooled = spread.scatter() / max(1, spread.total() - len(present))
            self.head.factors[0] = self._factor(pooled)
            return
        for label in present:
            if counts[label] != self.solved[label]:
                self.head.factors[label] = self._factor(spread.class_covariance(label))
        self.solved = counts.clone()

    def _factor(self, covariance: Tensor) -> Tensor:
        """Return A with u' R^-1 u = |A u|^2: [D, D], or [D] to multiply entry by entry."""
        if covariance.dim() == 1:
            for _ in range(self.shrinkages):
                covariance = covariance + self.alpha1 * covariance.mean()
            return covariance.clamp(min=1e-12).rsqrt().float()
        for _ in range(self.shrinkages):
            covariance = shrunk(covariance, self.alpha1, self.alpha2)
        factor = cholesky(correlation(covariance))
        identity = torch.eye(len(factor)).to(factor)
        inverse: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
        return inverse.float()


def correlation(covariance: Tensor) -> Tensor:
    """Return the covariance scaled to unit diagonal; a feature that never varies is uncorrelated."""
    scale = covariance.diagonal().clamp(min=1e-30).rsqrt()
    result = covariance * scale * scale[:, None]
    result.fill_diagonal_(1.0)
    return result


class MahalanobisHead(nn.Module):
    """Minus the squared distance |A_c (x - mu_c)|^2 of each class that is present; 0 for the others.

    Args:
        num_features: D.
        num_classes: C.
        kind: A_c is a matrix for each class ("class"), the same for all ("common") or diagonal ("diagonal").
    """

    means: Tensor
    factors: Tensor

    def __init__(self, num_features: int, num_classes: int, *, kind: Literal["class", "common", "diagonal"]) -> None:
        super().__init__()
        square = (num_features, num_features)
        shapes = {"class": (num_classes, *square), "common": (1, *square), "diagonal": (num_classes, num_features)}
        self.register_buffer("means", torch.zeros(num_classes, num_features))
        self.register_buffer("factors", torch.zeros(shapes[kind]))
        self.present: list[int] = []

    def forward(self, features: Tensor) -> Tensor:
        """Return scores [B, C] of features [B, D]."""
        scores = features.new_zeros(len(features), len(self.means))
        for label in self.present:
            factor = self.factors[label if len(self.factors) > 1 else 0]
            away = features - self.means[label]
            away = away * factor if factor.dim() == 1 else F.linear(away, factor)
            scores[:, label] = -away.square().sum(dim=1)
        return scores
