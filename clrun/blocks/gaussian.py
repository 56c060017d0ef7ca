"""Replay of features: one Gaussian per class in the place of stored rows, and the alignment of a classifier to them.

The statistics of a class are measured once, when its task ends, and never again, while the backbone may move on.

Shapes: `D` feature width, `C` classes, `k` classes to draw, `N` rows drawn per class, `B` rows of a batch.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from clrun.blocks.params import Carrier
from clrun.blocks.statistics import ClassStats, Moments, cholesky, shrunk
from clrun.data.split import Batch, Split, TensorSplit
from clrun.learning.budget import Budget
from clrun.learning.context import Context
from clrun.learning.losses import masked_cross_entropy
from clrun.learning.method import Method
from clrun.learning.training import fit
from clrun.system.errors import NonNegative, Positive, PositiveInt

Covariance = Literal["full", "diagonal", "shared"]
Features = Callable[[Tensor], Tensor]
Target = Callable[[Batch], Tensor]
MOMENTS: dict[Covariance, Moments] = {"full": "class", "diagonal": "diagonal", "shared": "pooled"}


class GaussianReplay(Carrier):
    """One Gaussian per class over features, keyed by class id.

    Rows of a class that come in several tasks are combined with their numbers as weights, so that mean and covariance
    are those of all rows together (Chan et al., 1979). Covariances are divided by the number of rows minus 1, computed
    in float64 and stored in float32.

    Memory: 8 C D bytes of means, 8 C of counts, and 4 D^2 per class with rows ("full"), 4 D per class with rows
    ("diagonal"), or 4 D^2 ("shared").

    Repair: fewer rows than features, or rounding, make a covariance singular or indefinite. `jitter` is added to its
    diagonal when features are drawn; if it still has no Cholesky factor, multiples of its trace are added as in
    `clrun.blocks.statistics.cholesky`. A class with a single row has the covariance jitter * I.

    Args:
        num_features: D.
        num_classes: C.
        covariance: "full": a matrix per class. "diagonal": the variances of each class. "shared": one matrix for all
            classes, that of all rows about the means of their classes.
        jitter: added to the diagonal of each covariance, in units of squared features.
        shrinkage: alpha1 and alpha2 of `clrun.blocks.statistics.shrunk`, which is applied to each covariance after the
            jitter when features are drawn; not for "diagonal".
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        *,
        covariance: Covariance,
        jitter: float,
        shrinkage: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.covariance: Covariance = covariance
        self.jitter, self.shrinkage = jitter, shrinkage
        self.rows = torch.zeros(num_classes, dtype=torch.long)
        self.means = torch.zeros(num_classes, num_features, dtype=torch.float64)
        square = 1 if covariance == "diagonal" else 2
        self.covariances = torch.zeros(int(covariance == "shared"), *[num_features] * square)
        self.slots: dict[int, int] = {}  # index in `covariances` by class id; not for "shared"

    def empty(self) -> ClassStats:
        """Return statistics without rows, of the kind that `add` reads, on the same device."""
        classes, width = self.means.shape
        return ClassStats(width, classes, moments=MOMENTS[self.covariance]).to(self.means.device)

    @property
    def classes(self) -> Tensor:
        """[k] long, the ids of the classes with rows, ascending."""
        return self.rows.nonzero()[:, 0]

    def measured(self, features: Features, split: Split, target: Target = lambda batch: batch.y) -> ClassStats:
        """Return the statistics of the rows of a split, without augmentation, in the form that `add` takes.

        Args:
            features: returns the features [B, D] of prepared images; the caller has switched off gradients and training
                mode.
            split: the rows.
            target: returns the class [B] of each row of a batch.
        """
        found = self.empty()
        for batch in split.batches(256):
            found.update(features(batch.x).float(), target(batch))
        return found

    def add(self, stats: ClassStats) -> None:
        """Add the rows of `stats`, whose moments are those of `empty`."""
        means, found = stats.means().to(self.means.device), stats.counts().to(self.rows.device)
        new = found.nonzero()[:, 0].tolist()
        if self.covariance == "shared":
            scatter = stats.scatter().to(self.means.device)
            for label in new:
                scatter = scatter + self._between(label, means[label], int(found[label]))
            degrees = self._degrees(self.rows)
            total = self._degrees(self.rows + found)
            self.covariances[0] = (self.covariances[0].double() * degrees + scatter) / max(1, total)
        else:
            for label in new:
                self._combine(label, means[label], int(found[label]), stats.class_covariance(label))
        total_rows = self.rows + found
        share = (found / total_rows.clamp(min=1))[:, None].double()
        self.means = self.means + share * (means - self.means)
        self.rows = total_rows

    def _combine(self, label: int, mean: Tensor, count: int, covariance: Tensor) -> None:
        """Combine the covariance of a class with that of `count` further rows of this mean and covariance."""
        before = int(self.rows[label])
        scatter = covariance.to(self.means.device) * (count - 1) + self._between(label, mean, count)
        if label not in self.slots:
            self.slots[label] = len(self.covariances)
            self.covariances = torch.cat([self.covariances, torch.zeros_like(scatter[None], dtype=torch.float32)])
        place = self.slots[label]
        if before:
            scatter = scatter + self.covariances[place].double() * (before - 1)
        self.covariances[place] = scatter / max(1, before + count - 1)

    def _between(self, label: int, mean: Tensor, count: int) -> Tensor:
        """Return the scatter of the means of a class's earlier rows and of `count` rows with another mean."""
        before, away = int(self.rows[label]), mean - self.means[label]
        spread = away.square() if self.covariance == "diagonal" else torch.outer(away, away)
        return spread * (before * count / (before + count))

    @staticmethod
    def _degrees(rows: Tensor) -> int:
        """Return the degrees of freedom of the scatter of all rows about the means of their classes."""
        return int(rows.sum()) - int((rows > 0).sum())

    def covariance_of(self, label: int) -> Tensor:
        """Return the covariance [D, D] of a class with rows ([D] for "diagonal"), float32, without jitter."""
        return self.covariances[0 if self.covariance == "shared" else self.slots[label]]

    def sampler(self, classes: Tensor, *, mean_factors: Tensor | None = None) -> "Sampler":
        """Return a sampler of the Gaussians of some classes, which holds their Cholesky factors.

        Args:
            classes: [k] long, ids of classes with rows.
            mean_factors: [k], by which the means are multiplied; None for 1.
        """
        means = self.means[classes]
        if mean_factors is not None:
            means = means * mean_factors.to(means)[:, None]
        if self.covariance == "shared":
            return Sampler(means, [self._factor(self.covariances[0])] * len(means))
        return Sampler(means, [self._factor(self.covariance_of(int(label))) for label in classes])

    def aged(self, classes: Tensor, ages: Tensor, ctx: Context, *, shrink: float) -> Callable[[int], Tensor]:
        """Return a function of N that draws features [k, N, D] of `classes` [k], whose means shrink with their age.

        Args:
            classes: their ids.
            ages: [k] float64, how many tasks ago the task of each class was; 0 for the current one.
            ctx: of the current task, which names the random numbers.
            shrink: the mean of a class of age a is multiplied by 1 - shrink a / T in the T-th task.
        """
        factors = 1 - shrink * ages / (ctx.task.index + 1)
        sampler, generator = self.sampler(classes, mean_factors=factors), ctx.generator("replay")
        return lambda rows: sampler(rows, generator)

    def _factor(self, covariance: Tensor) -> Tensor:
        """Return F with covariance + jitter I = F F', lower triangular [D, D], or the square root of a diagonal [D]."""
        covariance = covariance.double()
        if covariance.dim() == 1:
            return (covariance + self.jitter).clamp(min=0).sqrt()
        if self.jitter:
            covariance = covariance.clone()
            covariance.diagonal().add_(self.jitter)
        if self.shrinkage is not None:
            covariance = shrunk(covariance, *self.shrinkage)
        return cholesky(covariance) if covariance.any() else covariance


@dataclass(frozen=True)
class Sampler:
    """Gaussians to draw from.

    Attributes:
        means: [k, D] float64.
        factors: by Gaussian, its lower Cholesky factor [D, D], or its standard deviations [D].
    """

    means: Tensor
    factors: Sequence[Tensor]

    def of(self, places: Sequence[int]) -> "Sampler":
        """Return a sampler of the Gaussians at these places, in this order; a place may come several times."""
        return Sampler(self.means[list(places)], [self.factors[place] for place in places])

    def __call__(self, rows: int, generator: torch.Generator) -> Tensor:
        """Return [k, rows, D] float32: `rows` independent draws from each Gaussian.

        Args:
            rows: N.
            generator: on the CPU, so that the normal numbers behind the draws are the same on all devices.
        """
        shape = (len(self.means), rows, self.means.shape[1])
        noise = torch.randn(shape, generator=generator, dtype=torch.float64).to(self.means.device)
        drawn = torch.empty_like(noise)
        for own, mean, factor, out in zip(noise, self.means, self.factors, drawn, strict=True):
            if factor.dim() == 1:
                torch.addcmul(mean, own, factor, out=out)
            else:
                torch.addmm(mean, own, factor.t(), out=out)
        return drawn.float()


# --- alignment of a classifier


@dataclass(frozen=True)
class Drawn(TensorSplit):
    """Feature rows that are drawn anew for every pass over the split; no rows are stored.

    Attributes:
        images: not used.
        draw: returns new rows [M, D].
    """

    images: Tensor = field(default_factory=lambda: torch.empty(0), init=False)
    draw: Callable[[], Tensor] = field(kw_only=True)

    def _read(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        drawn = self.draw()
        return (drawn[rows] for rows in parts)


@dataclass(frozen=True)
class Alignment:
    """The alignment of a classifier: it is trained on features drawn from Gaussians of all classes so far.

    Features are drawn anew for every epoch, and the backbone is not used. Published settings differ in these options
    and in how features are drawn, which the method says: SLCA and CoFiMA normalise the logits, MOS and TUNA do not.

    Attributes:
        covariance: "full": a matrix per class. "diagonal": the variances of each class. "shared": one matrix for all.
        jitter: added to the diagonal of each covariance, which has no Cholesky factor otherwise if a class has fewer
            rows than features.
        rows_per_class: N, number of features drawn per Gaussian and epoch.
        temperature: kappa of `normalised_logits` in the loss; null for the cross-entropy of the plain logits.
        budget: length and optimizer; with 0 epochs there is no alignment. An epoch has as many steps as there are
            classes if the batch size is N.
    """

    covariance: Covariance
    jitter: NonNegative
    rows_per_class: PositiveInt
    temperature: Positive | None
    budget: Budget

    def replay(self, num_features: int, num_classes: int) -> GaussianReplay:
        """Return Gaussians without rows."""
        return GaussianReplay(num_features, num_classes, covariance=self.covariance, jitter=self.jitter)

    def loss(self, logits: Tensor, y: Tensor, groups: Tensor) -> Tensor:
        """Return the cross-entropy [] of logits [B, C] over the classes that belong to a task (`groups` >= 0)."""
        if self.temperature is not None:
            logits = normalised_logits(logits, groups, self.temperature)
        return masked_cross_entropy(logits, y, groups >= 0)

    def fit(
        self,
        method: Method,
        head: nn.Module,
        ctx: Context,
        *,
        draw: Callable[[], Tensor],
        groups: Tensor,
        labels: Tensor | None = None,
        name: str = "align",
    ) -> None:
        """Train `head` on the classes that belong to a task.

        Args:
            method: the method; of its hooks `adjust_gradients` and `after_step` run in each step.
            head: maps features [B, D] to logits [B, C]; its parameters with `requires_grad` are trained.
            ctx: context of the current task.
            draw: returns new rows [k, N, D], N from each of k Gaussians.
            groups: [C] long, position of the task of each class, or -1.
            labels: [k] long, the class of each Gaussian; None for the classes that belong to a task in ascending order.
            name: name of the fit.
        """
        classes = (groups >= 0).nonzero()[:, 0] if labels is None else labels
        drawn = Drawn(
            labels=classes.repeat_interleave(self.rows_per_class),
            positions=groups[classes].repeat_interleave(self.rows_per_class),
            draw=lambda: draw().flatten(0, 1),
        )

        def loss(batch: Batch, ctx: Context) -> Tensor:
            with torch.autocast(batch.x.device.type, enabled=False):
                return self.loss(head(batch.x), batch.y, groups)

        params = [parameter for parameter in head.parameters() if parameter.requires_grad]
        fit(method, drawn, ctx, loss=loss, params=params, budget=self.budget, name=name)


def normalised_logits(logits: Tensor, groups: Tensor, temperature: float) -> Tensor:
    """Return z / (nu temperature), where nu is the mean over the tasks of the norm of a row's logits of the task.

    The norms have 1e-7 added. The result does not depend on the scale of a row's logits (SLCA, Zhang et al., ICCV 2023,
    arXiv 2303.05118, section 3.3).

    Args:
        logits: z [B, C].
        groups: [C] long, the task to which a class belongs; classes with -1 belong to none and do not count.
        temperature: kappa.
    """
    present = torch.unique(groups[groups >= 0])
    member = (groups[:, None] == present).to(logits)  # [C, number of tasks]
    norms = (logits.square() @ member).clamp_min(1e-30).sqrt() + 1e-7
    normalised: Tensor = logits / (temperature * norms.mean(dim=1, keepdim=True))
    return normalised


__all__ = ["Alignment", "Covariance", "Drawn", "Features", "GaussianReplay", "Sampler", "Target", "normalised_logits"]
