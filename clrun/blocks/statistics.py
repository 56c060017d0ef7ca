"""Sums over features, from which all closed-form methods compute their classifiers, and the extraction of features.

Shapes: `N` rows, `D` feature width, `C` classes. All statistics are sums in float64, which are normalised when they are
read. Tasks can therefore be added in any order, computed on several processes, and subtracted again.
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
TILE = 128  # an exact addition processes TILE^2 entries at once, so that its temporary copies stay in a CPU's cache
LARGE_TILE = 1024  # the same on other devices, where every operation costs its launch


def extract(method: Method, split: Split, *, size: int = 256) -> tuple[Tensor, Tensor]:
    """Return the backbone's features [N, D] float32 of all rows without augmentation, and their labels [N].

    The backbone is in eval mode and computes no gradients. Every process reads the whole split.

    Args:
        method: the method with the backbone, which is not changed.
        split: rows.
        size: rows per forward pass; the last bits of a feature may depend on it.
    """
    features, labels = [], []
    with torch.no_grad(), eval_mode(method.backbone):
        for batch in split.batches(size):
            features.append(method.backbone(batch.x).float())
            labels.append(batch.y)
    return torch.cat(features), torch.cat(labels)


class ExactSum(Carrier):
    """A sum of float64 tensors of the same shape that does not depend on the order of the terms.

    The rounding error is stored in addition to the rounded sum, so that the sum has about 106 bits (Knuth's TwoSum in
    the double-double arithmetic of Dekker, 1971). The first 53 bits, which are read, are then the same for every order
    of addition, and subtracting a term restores the sum without it.

    Args:
        shape: shape of the terms.
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.high = torch.zeros(shape, dtype=torch.float64)
        self.low = torch.zeros(0, dtype=torch.float64)  # the rounding error; empty if it is 0

    def value(self) -> Tensor:
        """Return the sum, float64. This is the stored tensor, which must not be changed."""
        return self.high

    def add(self, other: "ExactSum", *, sign: int = 1, places: list[int] | None = None) -> None:
        """Add another sum, or subtract it.

        Args:
            other: the other sum.
            sign: 1 to add, -1 to subtract.
            places: indices of the first dimension to which the entries of `other` are added; None if the shapes agree.
        """
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
        """Add a tensor, which may become part of the state."""
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
    """An exact sum of symmetric matrices [D, D] in the memory of one matrix.

    The lower triangle and the diagonal hold the sum, the upper triangle the rounding errors of the lower one.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.matrix = torch.zeros(width, width, dtype=torch.float64)
        self.error = torch.zeros(0, dtype=torch.float64)  # rounding errors of the diagonal; empty if all are 0

    def update(self, rows: Tensor) -> None:
        """Add H'H of rows H [N, D] float64 with rounding; only before the first call of `add`."""
        assert not self.error.numel(), "the upper triangle holds rounding errors"
        self.matrix.addmm_(rows.t(), rows)

    def value(self) -> Tensor:
        """Return the sum [D, D] float64 as a new tensor."""
        return self.matrix.tril() + self.matrix.tril(-1).t()

    def add(self, other: "SymmetricSum", *, sign: int = 1) -> None:
        """Add another sum, or subtract it for sign=-1; tile by tile on and below the diagonal."""
        assert other.matrix.shape == self.matrix.shape, "sums of different widths"
        diagonal, side = torch.zeros_like(self.matrix.diagonal()), _tile(self.matrix)
        blocks = [slice(start, start + side) for start in range(0, len(self.matrix), side)]
        for k, rows in enumerate(blocks):
            for columns in blocks[: k + 1]:
                high, low = self._tile(rows, columns)
                for term in other._tile(rows, columns)[: 2 if other.error.numel() else 1]:
                    _add_exactly(high, low, sign * term.to(high.device))
                if rows == columns:
                    diagonal[rows] = low.diagonal()
                    high = high.tril_().add_(low.tril_(-1).t())
                else:
                    self.matrix[columns, rows] = low.t()
                self.matrix[rows, columns] = high
        self.error = diagonal

    def _tile(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Return copies of a tile of the sum and of its rounding errors, valid on and below the diagonal."""
        high = self.matrix[rows, columns].clone(memory_format=torch.contiguous_format)
        if not self.error.numel():
            return high, torch.zeros_like(high)
        low = self.matrix[columns, rows].t().clone(memory_format=torch.contiguous_format)
        if rows == columns:
            low.diagonal().copy_(self.error[rows])
        return high, low


def _tile(tensor: Tensor) -> int:
    """Return the side of the tiles in which a tensor is added to."""
    return TILE if tensor.device.type == "cpu" else LARGE_TILE


def _add_exactly(high: Tensor, low: Tensor, term: Tensor) -> None:
    """Add `term` to `high` + `low` in place, block by block, because the arithmetic makes several temporary copies."""
    for a, b, c in zip(*(torch.split(t.view(-1), _tile(high) ** 2) for t in (high, low, term)), strict=True):
        total, lost = _two_sum(a, c)
        rounded, rest = _two_sum(total, lost + b)
        a.copy_(rounded)
        b.copy_(rest)


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the float64 sum of two tensors and its exact rounding error."""
    total = a + b
    virtual = total - a
    return total, (a - (total - virtual)) + (b - virtual)


class ClassStats(Carrier):
    """Counts and sums of features per class, and sums of products of features if the method needs them.

    Args:
        num_features: D.
        num_classes: C.
        moments: which products are summed. "none": no products. "pooled": one Gram matrix [D, D] over all rows.
            "class": one Gram matrix per class with rows (8 D^2 bytes each). "diagonal": the diagonals of these.
    """

    def __init__(self, num_features: int, num_classes: int, *, moments: Moments = "none") -> None:
        super().__init__()
        self.num_features, self.num_classes, self.moments = num_features, num_classes, moments
        self.rows = torch.zeros(num_classes, dtype=torch.long)
        self.sums = ExactSum(num_classes, num_features)
        self.pooled = SymmetricSum(num_features if moments == "pooled" else 0)
        self.products = ExactSum(0, *[num_features] * {"class": 2, "diagonal": 1}.get(moments, 0))
        self.slots: dict[int, int] = {}  # index in `products` by class id

    def empty(self) -> Self:
        """Return new statistics of the same kind without rows, on the same device."""
        return type(self)(self.num_features, self.num_classes, moments=self.moments).to(self.rows.device)

    def update(self, features: Tensor, y: Tensor) -> None:
        """Add rows with features [N, D] and labels y [N] long; the last bits depend on their order.

        This is for the rows of one task. `merge` then combines the statistics of tasks independently of their order.
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
        """Return the indices of classes in `products`; classes without an index get a new one."""
        new = [label for label in labels if label not in self.slots]
        if new:
            self.slots |= {label: len(self.slots) + k for k, label in enumerate(new)}
            self.products.grow(len(new))
        return [self.slots[label] for label in labels]

    def merge(self, other: "ClassStats", *, sign: int = 1) -> None:
        """Add other statistics of the same kind, or subtract them for sign=-1; no result depends on the order."""
        self.rows += sign * other.rows.to(self.rows.device)
        self.sums.add(other.sums, sign=sign)
        if self.moments in ("class", "diagonal"):
            self.products.add(other.products, sign=sign, places=self._places(list(other.slots)))
        elif self.moments == "pooled":
            self.pooled.add(other.pooled, sign=sign)

    # --- reading

    def counts(self) -> Tensor:
        """Return the number of rows of each class [C], long."""
        return self.rows

    def total(self) -> int:
        """Return the number of rows of all classes together."""
        return int(self.rows.sum())

    def means(self) -> Tensor:
        """Return the mean feature of each class [C, D] float64; 0 for a class without rows."""
        means = self.sums.value() / self.rows.clamp(min=1)[:, None]
        return means.masked_fill(self.rows[:, None] == 0, 0.0)

    def gram(self) -> Tensor:
        """Return the sum of f f' over the features f of all rows [D, D] float64, as a new tensor."""
        return self.pooled.value()

    def lower_gram(self) -> Tensor:
        """Return the stored tensor [D, D] whose lower triangle is that of `gram`; it must not be changed."""
        return self.pooled.matrix

    def scatter(self) -> Tensor:
        """Return the scatter matrix [D, D] float64 of all rows around the means of their classes."""
        means = self.means()
        return self.gram() - (means * self.rows[:, None]).t() @ means

    def class_covariance(self, label: int) -> Tensor:
        """Return the covariance [D, D] of a class of n rows, divided by n - 1, or its diagonal [D]; 0 for n = 1."""
        count, mean = int(self.rows[label]), self.means()[label]
        product = self.products.value()[self.slots[label]]
        spread = product - count * (torch.outer(mean, mean) if self.moments == "class" else mean.square())
        return spread / (count - 1) if count > 1 else torch.zeros_like(spread)


def together(*parts: ClassStats) -> ClassStats:
    """Return the statistics of the rows of several statistics."""
    total = parts[0].empty()
    for part in parts:
        total.merge(part)
    return total


def lda(
    stats: ClassStats, *, shrinkage: float | Literal["oas"], ridge: float, priors: Literal["equal", "empirical"]
) -> tuple[Tensor, Tensor]:
    """Return weights [C, D] and biases [C], float64, of linear discriminant analysis with a common covariance.

    With S = scatter / n, the covariance is (1 - shrinkage) S + shrinkage tr(S) / D I + ridge I. Weights and bias of a
    class without rows are 0.

    Args:
        stats: statistics with pooled moments.
        shrinkage: weight of the multiple of the identity with the same trace, from 0 to 1; "oas" computes it by `oas`.
        ridge: added to the diagonal, in units of squared features.
        priors: class probabilities: the same for all classes with rows, or proportional to their rows.
    """
    count = max(1, stats.total())
    covariance = stats.scatter() / count
    weight = oas(covariance, count - int((stats.counts() > 0).sum())) if shrinkage == "oas" else shrinkage
    mean_variance = float(covariance.diagonal().mean())
    covariance = (1 - weight) * covariance
    covariance.diagonal().add_(weight * mean_variance + ridge)
    present = stats.counts() > 0
    means = stats.means()
    weights = torch.zeros_like(means)
    weights[present] = solve_positive(covariance, means[present].t()).t()
    biases = -0.5 * (weights * means).sum(dim=1)
    probabilities = stats.counts() / count if priors == "empirical" else present / present.sum()
    biases += probabilities.double().clamp(min=1e-300).log()
    return weights, biases.masked_fill(~present, 0.0)


def oas(covariance: Tensor, rows: int) -> float:
    """Return the oracle-approximating shrinkage towards the identity (Chen et al., IEEE TSP 2010, equation 23).

    `sklearn.covariance.oas` needs the rows, takes their number as degrees of freedom and leaves out the terms 2 / D.

    Args:
        covariance: [D, D].
        rows: degrees of freedom of the covariance; 1 is returned for less than 1.
    """
    width = len(covariance)
    square, trace = float(covariance.square().sum()), float(covariance.trace()) ** 2
    denominator = (rows + 1 - 2 / width) * (square - trace / width)
    if rows < 1 or denominator <= 0:
        return 1.0
    return min(1.0, ((1 - 2 / width) * square + trace) / denominator)


def shrunk(covariance: Tensor, alpha1: float, alpha2: float) -> Tensor:
    """Return S + alpha1 V1 I + alpha2 V2 (11' - I): V1 the mean of the diagonal of S, V2 that off the diagonal.

    This is the shrinkage of FeCAM (Goswami et al., NeurIPS 2023, arXiv 2309.14062), which RAPF uses too.

    Args:
        covariance: S [D, D].
        alpha1: shrinkage of the diagonal.
        alpha2: shrinkage off the diagonal.
    """
    width, trace = len(covariance), covariance.trace()
    off = alpha2 * (covariance.sum() - trace) / max(1, width * (width - 1))
    result = covariance + off
    result.diagonal().add_(alpha1 * trace / width - off)
    return result


def solve_positive(matrix: Tensor, right: Tensor) -> Tensor:
    """Return matrix^-1 right [D, k] for a symmetric positive definite matrix [D, D], by its Cholesky factor.

    If rounding has made the matrix indefinite, 1e-12 of its trace is added to the diagonal, then 1e-11, and so on until
    it has a Cholesky factor.
    """
    return torch.cholesky_solve(right, cholesky(matrix))


def cholesky(matrix: Tensor) -> Tensor:
    """Return the lower Cholesky factor of a symmetric matrix [D, D], made positive definite as in `solve_positive`.

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


__all__ = [
    "ClassStats",
    "ExactSum",
    "SymmetricSum",
    "cholesky",
    "extract",
    "lda",
    "oas",
    "shrunk",
    "solve_positive",
    "together",
]
