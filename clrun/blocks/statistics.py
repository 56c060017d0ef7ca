"""Sums over features that all closed-form learners share, and the pass that extracts features.

Shapes: `N` rows, `D` feature width, `C` classes. Everything is a sum in float64, normalised when it is read: adding is
the only way to learn, so that tasks can come in any order, be spread over processes, and be taken back.
"""

import math
from collections.abc import Sequence
from typing import Literal, Self

import torch
from torch import Tensor

from clrun.blocks.params import Carrier, eval_mode
from clrun.data.split import Split
from clrun.learning.method import Method

Moments = Literal["none", "pooled", "class", "diagonal"]
BLOCK = 2**20  # numbers that an exact addition works on at once


def extract(method: Method, split: Split, *, size: int = 256) -> tuple[Tensor, Tensor]:
    """Return the backbone's features [N, D] of the eval view of every row, and the labels [N].

    Backbone in eval mode, fp32, no gradients. Every process reads the whole split.

    Args:
        method: whose backbone; not changed.
        split: rows.
        size: rows of a forward pass; the last bits of a feature may depend on it.
    """
    features, labels = [], []
    with torch.no_grad(), eval_mode(method.backbone):
        for batch in split.batches(size):
            features.append(method.backbone(batch.x).float())
            labels.append(batch.y)
    return torch.cat(features), torch.cat(labels)


class ExactSum(Carrier):
    """A sum of float64 tensors of one shape that shows no trace of the order in which they were added.

    Beside the rounded sum the rounding error is kept (Knuth's TwoSum, in the double-double arithmetic of Dekker, 1971):
    about 106 bits. The first 53 of them, which are read, are then the same for every order of addition, and what was
    added can be subtracted without a trace.

    Args:
        shape: of the terms.
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.high = torch.zeros(shape, dtype=torch.float64)
        self.low = torch.zeros(0, dtype=torch.float64)  # stays empty while all sums so far are exact

    def value(self) -> Tensor:
        """Return the sum, float64. It is the state itself: not to be changed."""
        return self.high

    def add(self, other: "ExactSum", *, sign: int = 1, places: list[int] | None = None) -> None:
        """Add (or, for sign -1, subtract) another sum; to these `places` of the first dimension only."""
        for term in (other.high, other.low):
            if not term.numel():
                continue
            if places is None:
                self._add(sign * term.to(self.high.device))
            else:
                part = ExactSum(0)
                part.high = self.high[places]
                part.low = self.low[places] if self.low.numel() else self.low
                part._add(sign * term.to(self.high.device))
                self.high[places] = part.high
                if part.low.numel() or self.low.numel():
                    self.low = self.low if self.low.numel() else torch.zeros_like(self.high)
                    self.low[places] = part.low if part.low.numel() else 0.0

    def _add(self, term: Tensor) -> None:
        """Add a tensor that nobody else keeps."""
        if not self.low.numel() and not self.high.any():
            self.high = term
            return
        low = self.low if self.low.numel() else torch.zeros_like(self.high)
        _add_exactly(self.high, low, term)
        self.low = low if low.any() else self.low.new_zeros(0)

    def grow(self, count: int) -> None:
        """Append `count` zeros along the first dimension."""
        self.high = torch.cat([self.high, self.high.new_zeros(count, *self.high.shape[1:])])
        if self.low.numel():
            self.low = torch.cat([self.low, self.low.new_zeros(count, *self.high.shape[1:])])


class SymmetricSum(Carrier):
    """An exact sum of symmetric matrices in the room of one: sums up to the diagonal, their rounding errors above it.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.matrix = torch.zeros(width, width, dtype=torch.float64)
        self.error = torch.zeros(0, dtype=torch.float64)  # of the diagonal; empty while there are no errors

    def update(self, rows: Tensor) -> None:
        """Add H'H of rows H [N, D] float64, rounded: for a sum that nothing was added to."""
        assert not self.error.numel(), "the upper triangle holds errors"
        self.matrix.addmm_(rows.t(), rows)

    def value(self) -> Tensor:
        """Return a copy of the sum [D, D], float64."""
        return self.matrix.tril() + self.matrix.tril(-1).t()

    def add(self, other: "SymmetricSum", *, sign: int = 1) -> None:
        """Add (or, for sign -1, subtract) another sum."""
        high, low = self.matrix, self._errors()
        _add_exactly(high, low, sign * other.matrix.to(high.device))  # what lies above the diagonal does not matter
        if other.error.numel():
            _add_exactly(high, low, sign * other._errors().to(high.device))
        self.error = low.diagonal().clone()
        high.tril_().add_(low.tril_(-1).t())

    def _errors(self) -> Tensor:
        """Return a copy of the rounding errors, [D, D] on and below the diagonal."""
        if not self.error.numel():
            return torch.zeros_like(self.matrix)
        errors = self.matrix.t().contiguous()
        errors.diagonal().copy_(self.error)
        return errors


def _add_exactly(high: Tensor, low: Tensor, term: Tensor) -> None:
    """Add `term` to `high` + `low` in place, in blocks: the arithmetic needs several temporary copies."""
    for a, b, c in zip(*(torch.split(t.view(-1), BLOCK) for t in (high, low, term)), strict=True):
        total, lost = _two_sum(a, c)
        rounded, rest = _two_sum(total, lost + b)
        a.copy_(rounded)
        b.copy_(rest)


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the float64 sum and its exact rounding error."""
    total = a + b
    virtual = total - a
    return total, (a - (total - virtual)) + (b - virtual)


class ClassStats(Carrier):
    """Counts and sums of features by class, and sums of their products where a learner needs them.

    Args:
        num_features: D.
        num_classes: C.
        moments: "none"; "pooled" keeps the Gram matrix of all rows [D, D]; "class" keeps one for each class that was
            seen (8 D^2 bytes each); "diagonal" keeps their diagonals only.
    """

    def __init__(self, num_features: int, num_classes: int, *, moments: Moments = "none") -> None:
        super().__init__()
        self.num_features, self.num_classes, self.moments = num_features, num_classes, moments
        self.rows = torch.zeros(num_classes, dtype=torch.long)
        self.sums = ExactSum(num_classes, num_features)
        self.pooled = SymmetricSum(num_features if moments == "pooled" else 0)
        self.products = ExactSum(0, *[num_features] * {"class": 2, "diagonal": 1}.get(moments, 0))
        self.slots: dict[int, int] = {}  # class id -> its place in `products`

    def empty(self) -> Self:
        """Return statistics of the same kind without rows, on the same device."""
        return type(self)(self.num_features, self.num_classes, moments=self.moments).to(self.rows.device)

    def update(self, features: Tensor, y: Tensor) -> None:
        """Add rows of features [N, D] with labels [N] long, one after the other: their order shows in the last bits.

        Statistics of each task are made by this; `merge` puts them together.
        """
        features = features.double()
        if self.rows.device != features.device:
            self.to(features.device)
        self.rows += torch.bincount(y, minlength=self.num_classes)
        self.sums.high.index_add_(0, y, features)
        if self.moments == "pooled":
            self.pooled.update(features)
        elif self.moments != "none":
            labels = torch.unique(y).tolist()
            for label, place in zip(labels, self._places(labels), strict=True):
                own = features[y == label]
                self.products.high[place] += own.t() @ own if self.moments == "class" else own.square().sum(dim=0)

    def _places(self, labels: Sequence[int]) -> list[int]:
        """Return the places of classes in `products`, new ones for those that have none."""
        new = [label for label in labels if label not in self.slots]
        if new:
            self.slots |= {label: len(self.slots) + k for k, label in enumerate(new)}
            self.products.grow(len(new))
        return [self.slots[label] for label in labels]

    def merge(self, other: "ClassStats", *, sign: int = 1) -> None:
        """Add the rows of other statistics of the same kind or, for sign -1, take them back; no order shows."""
        self.rows += sign * other.rows.to(self.rows.device)
        self.sums.add(other.sums, sign=sign)
        if self.moments in ("class", "diagonal"):
            self.products.add(other.products, sign=sign, places=self._places(list(other.slots)))
        elif self.moments == "pooled":
            self.pooled.add(other.pooled, sign=sign)

    # --- reading

    def counts(self) -> Tensor:
        """Return [C] long, the rows of each class."""
        return self.rows

    def total(self) -> int:
        """Return the rows of all classes together."""
        return int(self.rows.sum())

    def means(self) -> Tensor:
        """Return [C, D] float64, the mean feature of each class; 0 for a class without rows."""
        means = self.sums.value() / self.rows.clamp(min=1)[:, None]
        return means.masked_fill(self.rows[:, None] == 0, 0.0)

    def gram(self) -> Tensor:
        """Return [D, D] float64, the sum of f f' over all rows, as a copy."""
        return self.pooled.value()

    def lower_gram(self) -> Tensor:
        """Return the state itself, [D, D], which up to the diagonal is the Gram matrix: not to be changed."""
        return self.pooled.matrix

    def scatter(self) -> Tensor:
        """Return [D, D] float64, the scatter of all rows about the means of their classes."""
        means = self.means()
        return self.gram() - (means * self.rows[:, None]).t() @ means

    def class_covariance(self, label: int) -> Tensor:
        """Return the covariance [D, D] of a class, or its diagonal [D], with n - 1 below; 0 for a single row."""
        count, mean = int(self.rows[label]), self.means()[label]
        product = self.products.value()[self.slots[label]]
        spread = product - count * (torch.outer(mean, mean) if self.moments == "class" else mean.square())
        return spread / (count - 1) if count > 1 else torch.zeros_like(spread)


def together(*parts: ClassStats) -> ClassStats:
    """Return the statistics of the rows of all `parts`."""
    whole = parts[0].empty()
    for part in parts:
        whole.merge(part)
    return whole


def lda(
    stats: ClassStats, *, shrinkage: float | Literal["oas"], ridge: float, priors: Literal["equal", "empirical"]
) -> tuple[Tensor, Tensor]:
    """Return weights [C, D] and biases [C], float64, of linear discriminant analysis with one covariance.

    With S = scatter / n, the covariance is (1 - shrinkage) S + shrinkage tr(S)/D I + ridge I. Classes without rows get
    0.

    Args:
        stats: statistics with pooled moments.
        shrinkage: towards the identity of the same trace, 0 to 1; "oas" takes the value of `oas`.
        ridge: added to the diagonal, in the units of the features squared.
        priors: of the classes.
    """
    count = max(1, stats.total())
    covariance = stats.scatter() / count
    share = oas(covariance, count - int((stats.counts() > 0).sum())) if shrinkage == "oas" else shrinkage
    mean_variance = float(covariance.diagonal().mean())
    covariance = (1 - share) * covariance
    covariance.diagonal().add_(share * mean_variance + ridge)
    present = stats.counts() > 0
    means = stats.means()
    weights = torch.zeros_like(means)
    weights[present] = solve_positive(covariance, means[present].t()).t()
    biases = -0.5 * (weights * means).sum(dim=1)
    shares = stats.counts() / count if priors == "empirical" else present / present.sum()
    biases += shares.double().clamp(min=1e-300).log()
    return weights, biases.masked_fill(~present, 0.0)


def oas(covariance: Tensor, rows: int) -> float:
    """Return the oracle-approximating shrinkage towards the identity (Chen et al., IEEE TSP 2010, equation 23).

    Args:
        covariance: [D, D], estimated from `rows` degrees of freedom.
        rows: at least 1; fewer shrink fully.
    """
    width = len(covariance)
    square, trace = float(covariance.square().sum()), float(covariance.trace()) ** 2
    below = (rows + 1 - 2 / width) * (square - trace / width)
    return 1.0 if rows < 1 or below <= 0 else min(1.0, ((1 - 2 / width) * square + trace) / below)


def solve_positive(matrix: Tensor, right: Tensor) -> Tensor:
    """Return matrix^-1 right [D, k] for a symmetric positive definite matrix, by its Cholesky factor.

    Where rounding has made it indefinite, 1e-12 of its trace is added to the diagonal, then ten times as much, and so
    on.
    """
    return torch.cholesky_solve(right, cholesky(matrix))


def cholesky(matrix: Tensor) -> Tensor:
    """Return the lower Cholesky factor of a symmetric matrix, made positive definite as `solve_positive` says.

    Raises:
        ArithmeticError: the matrix is not finite.
    """
    added, trace = 0.0, float(matrix.diagonal().sum())
    while math.isfinite(trace) and math.isfinite(added):
        shifted = matrix
        if added:
            shifted = matrix.clone()
            shifted.diagonal().add_(added)
        factor: Tensor
        factor, info = torch.linalg.cholesky_ex(shifted)
        if not info:
            return factor
        added = 10 * added or 1e-12 * max(trace, 1e-30)
    raise ArithmeticError("a covariance or Gram matrix is not finite")


__all__ = ["ClassStats", "ExactSum", "SymmetricSum", "cholesky", "extract", "lda", "oas", "solve_positive", "together"]
