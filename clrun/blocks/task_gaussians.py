"""Gaussians of the features of all classes so far, each measured with the modules of the task that brought the class.

A class that comes in several tasks (domains) has Gaussians of its own in each of them. `clrun.blocks.gaussian` has the
single Gaussians and the loop of the alignment.

Shapes: `D` feature width, `C` classes, `E` Gaussians, `N` rows, `B` rows of a batch.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from clrun.blocks.additive import cluster
from clrun.blocks.gaussian import Alignment, Covariance, Features, GaussianReplay, Sampler, Target
from clrun.blocks.params import Carrier
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.method import Method
from clrun.system.errors import PositiveInt

Replay = Literal["full", "diagonal", "centroids"]


@dataclass(frozen=True)
class TaskAlignment(Alignment):
    """The alignment of a classifier to features that each have the modules of their own task.

    Attributes:
        covariance: "full": a matrix per class. "diagonal": the variances of each class. "centroids": k-means divides
            the rows of a class, and each part has its mean and variances, as in HiDe-Prompt.
        jitter: added to the diagonal of each covariance.
        rows_per_class: N, number of features drawn per Gaussian and epoch, hence per centroid with "centroids".
        temperature: of `clrun.blocks.gaussian.normalised_logits`; null for the cross-entropy of the plain logits.
        budget: length and optimizer; with 0 epochs there is no alignment.
        centroids: number of parts of a class with covariance=centroids; a class with fewer rows has as many as rows.
    """

    covariance: Replay  # type: ignore[assignment]
    centroids: PositiveInt

    def gaussians(self, num_features: int, num_classes: int) -> "TaskGaussians":
        """Return Gaussians without rows."""
        return TaskGaussians(num_features, num_classes, self.covariance, jitter=self.jitter, centroids=self.centroids)

    def align(
        self,
        method: Method,
        head: nn.Module,
        ctx: Context,
        gaussians: "TaskGaussians",
        *,
        mean_factors: Tensor | None = None,
        name: str = "align",
    ) -> None:
        """Train `head` on features drawn from all Gaussians, anew for every epoch.

        Args:
            method: the method.
            head: maps features [B, D] to logits [B, C]; its parameters with `requires_grad` are trained.
            ctx: context of the current task.
            gaussians: of all classes so far.
            mean_factors: [E], by which the means are multiplied; None for 1.
            name: name of the fit, and of the random numbers.
        """
        if self.budget.total_steps(1):
            sampler, generator = gaussians.sampler(mean_factors), ctx.generator(name)
            self.fit(
                method,
                head,
                ctx,
                draw=lambda: sampler(self.rows_per_class, generator),
                groups=gaussians.latest(),
                labels=gaussians.labels,
                name=name,
            )


class Centroids(Carrier):
    """Means and variances of the parts into which k-means divides the rows of each class (HiDe-Prompt).

    Memory: 16 D bytes per centroid. The variances are divided by the number of rows. k-means starts from rows that are
    far from each other (`clrun.blocks.additive.cluster`), so that nothing is drawn at random.

    Args:
        num_features: D.
        count: parts of each class.
        jitter: added to each variance when features are drawn.
    """

    def __init__(self, num_features: int, count: int, *, jitter: float) -> None:
        super().__init__()
        self.count, self.jitter = count, jitter
        self.means = torch.zeros(0, num_features, dtype=torch.float64)
        self.variances = torch.zeros(0, num_features, dtype=torch.float64)

    def add(self, rows: Tensor) -> int:
        """Add the rows [N, D] of one class; return the number of its centroids."""
        groups = torch.tensor(cluster(rows.double(), self.count, before=()), device=rows.device)
        parts = [rows[groups == group].double() for group in torch.unique(groups)]
        self.means = torch.cat([self.means.to(rows.device), *(part.mean(dim=0)[None] for part in parts)])
        spreads = (part.var(dim=0, unbiased=False)[None] for part in parts)
        self.variances = torch.cat([self.variances.to(rows.device), *spreads])
        return len(parts)

    def sampler(self) -> Sampler:
        """Return a sampler of all centroids, in the order in which they came."""
        return Sampler(self.means, [*(self.variances + self.jitter).sqrt()])


class TaskGaussians(Carrier):
    """The Gaussians of all classes so far, in the order in which they were measured.

    Memory, beside 16 bytes per Gaussian: that of `GaussianReplay`, once more for every further task in which classes
    come again; or that of `Centroids`.

    Args:
        num_features: D.
        num_classes: C.
        covariance: kind, see `TaskAlignment`.
        jitter: added to the diagonals when features are drawn.
        centroids: parts of each class for "centroids".

    Attributes:
        labels: [E] long, the class of each Gaussian.
        positions: [E] long, the position of the task that it was measured in.
    """

    def __init__(
        self, num_features: int, num_classes: int, covariance: Replay, *, jitter: float, centroids: int
    ) -> None:
        super().__init__()
        self.num_features, self.num_classes, self.jitter = num_features, num_classes, jitter
        self.covariance: Replay = covariance
        self.labels, self.positions = (torch.zeros(0, dtype=torch.long) for _ in range(2))
        self.parts = nn.ModuleList()  # one; in several domains one of each
        self.known: list[list[int]] = []  # classes of each part, in the order of its Gaussians
        self.centroids = Centroids(num_features, centroids, jitter=jitter)

    def measure(self, features: Features, task: Task, *, target: Target = lambda batch: batch.y) -> None:
        """Measure the training rows of a task, without augmentation.

        Args:
            features: returns the features [B, D] of prepared images; the caller has switched off gradients and training
                mode.
            task: the task.
            target: returns the class [B] of each row of a batch.
        """
        if self.covariance == "centroids":
            batches = [(features(batch.x).float(), target(batch)) for batch in task.train.batches(256)]
            rows, y = (torch.cat(column) for column in zip(*batches, strict=True))
            labels = [label for label in torch.unique(y).tolist() for _ in range(self.centroids.add(rows[y == label]))]
        else:
            labels = self._measure(self.covariance, features, task, target)
        device = task.train.y.device
        new = torch.tensor(labels, dtype=torch.long, device=device)
        self.labels = torch.cat([self.labels.to(device), new])
        self.positions = torch.cat([self.positions.to(device), torch.full_like(new, task.index)])

    def _measure(self, covariance: Covariance, features: Features, task: Task, target: Target) -> list[int]:
        """Add one Gaussian per class, and return their labels."""
        replay = GaussianReplay(self.num_features, self.num_classes, covariance=covariance, jitter=self.jitter)
        own = replay.measured(features, task.train, target)
        labels: list[int] = own.counts().nonzero()[:, 0].tolist()
        if not self.known or set(self.known[-1]) & set(labels):
            self.parts.append(replay.to(own.rows.device))
            self.known.append([])
        self.known[-1] += labels
        newest = self.parts[-1]
        assert isinstance(newest, GaussianReplay)
        newest.add(own)
        return labels

    def means(self) -> Tensor:
        """Return the means [E, D] float32."""
        if self.covariance == "centroids":
            return self.centroids.means.float()
        found = [part.means[known] for part, known in zip(self.parts, self.known, strict=True)]  # type: ignore[index]
        return torch.cat(found).float() if found else torch.zeros(0, self.num_features)

    def latest(self) -> Tensor:
        """Return [C] long, the position of the latest task of each class; -1 for a class without Gaussians."""
        found = torch.full((self.num_classes,), -1, device=self.labels.device)
        return found.scatter_reduce(0, self.labels, self.positions, "amax")

    def sampler(self, mean_factors: Tensor | None = None) -> Sampler:
        """Return a sampler of all Gaussians.

        Args:
            mean_factors: [E], by which the means are multiplied; None for 1.
        """
        if self.covariance == "centroids":
            whole = self.centroids.sampler()
        else:
            parts = [part.sampler(torch.tensor(known)) for part, known in zip(self.parts, self.known, strict=True)]  # type: ignore[operator]
            whole = Sampler(torch.cat([part.means for part in parts]), [f for part in parts for f in part.factors])
        if mean_factors is None:
            return whole
        return Sampler(whole.means * mean_factors.to(whole.means)[:, None], whole.factors)


__all__ = ["Centroids", "TaskAlignment", "TaskGaussians"]
