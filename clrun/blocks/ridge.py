"""Ridge regression to one-hot labels from sums alone, for every strength from one decomposition; random projections.

Shapes: `n` rows, `M` width of the (lifted) features, `C` classes, `R` eigenvalues kept. With H [n, M] the features and
Y [n, C] the one-hot labels, G = H'H, Q = H'Y, and W(strength) = (G + strength I)^-1 Q.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from clrun.blocks.statistics import ClassStats, solve_positive
from clrun.system.seeding import generator


class RandomProjection(nn.Module):
    """h = ReLU(f W) with a fixed Gaussian W [D, M], unscaled (RanPAC, McDonnell et al., NeurIPS 2023, section 4.1).

    Args:
        num_features: D.
        width: M; 0 leaves the features as they are.
        seed: of W, drawn from a generator of its own.
    """

    weight: Tensor

    def __init__(self, num_features: int, width: int, *, seed: int) -> None:
        super().__init__()
        self.num_features = width or num_features
        draw = torch.randn(num_features, width, generator=generator(seed, "random projection"))
        self.register_buffer("weight", draw)

    def forward(self, features: Tensor) -> Tensor:
        """Return lifted features [B, M] of features [B, D]."""
        return (features @ self.weight).relu_() if self.weight.numel() else features


@dataclass(frozen=True)
class Spectrum:
    """G = V diag(s) V' and z = V'Q: what ridge solutions of every strength share.

    Attributes:
        values: [R] float64, the eigenvalues s; all others are 0, and so is their part of z.
        vectors: [M, R], V.
        projected: [R, C], z.
        rows: n.
    """

    values: Tensor
    vectors: Tensor
    projected: Tensor
    rows: int

    @classmethod
    def of(cls, stats: ClassStats) -> Self:
        """Decompose pooled statistics of n rows; the cost is that of M x M or, for n well below M, n x n."""
        gram, rows = stats.lower_gram(), stats.total()
        basis = None
        if 2 * rows < len(gram):
            gram, basis = _within_range(stats.gram(), rows)
        values, vectors = torch.linalg.eigh(gram, UPLO="L")
        vectors = vectors if basis is None else basis @ vectors
        return cls(values.clamp_(min=0), vectors, vectors.t() @ stats.sums.value().t(), rows)

    @classmethod
    def dual(cls, lifted: Tensor, targets: Tensor) -> Self:
        """Decompose the n x n matrix HH' instead of H'H: the same eigenvalues, cheaper for n < M.

        Args:
            lifted: H [n, M] float64.
            targets: Y [n, C] float64.
        """
        values, vectors = torch.linalg.eigh(lifted @ lifted.t())
        roots = values.clamp_(min=0).sqrt()
        scale = torch.where(values > values.max() * 1e-15, 1 / roots, torch.zeros_like(roots))
        return cls(values, lifted.t() @ vectors * scale, roots[:, None] * (vectors.t() @ targets), len(lifted))

    def weights(self, strength: float) -> Tensor:
        """Return W [M, C]."""
        return self.vectors @ (self.projected / (self.values + strength)[:, None])

    def residual(self, strength: float) -> float:
        """Return the squared error summed over the n rows and the C columns of one-hot targets."""
        s, z = self.values, self.projected.square().sum(dim=1)
        return self.rows - float((z * (s + 2 * strength) / (s + strength).square()).sum())

    def freedom(self, strength: float) -> float:
        """Return the effective degrees of freedom, tr G (G + strength I)^-1."""
        return float((self.values / (self.values + strength)).sum())

    def gcv(self, strength: float) -> float:
        """Return the generalised cross-validation score (Golub, Heath and Wahba, 1979)."""
        left = 1 - self.freedom(strength) / self.rows
        return self.residual(strength) / self.rows / left**2 if left > 0 else float("inf")


def _within_range(gram: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return G = H'H within its range [n, n], and an orthonormal basis of the range [M, n].

    What the dual form gains by n x n matrices is gained so without the rows, which nobody kept: G has rank n, and n
    random combinations of its columns span its range (Halko, Martinsson and Tropp, SIAM Review 2011).
    """
    draw = torch.randn(len(gram), rows, generator=generator(0, "range"), dtype=gram.dtype)
    basis: Tensor = torch.linalg.qr(gram @ draw.to(gram.device)).Q
    return basis.t() @ (gram @ basis), basis


def ridge(strength: float, *parts: ClassStats) -> Tensor:
    """Return W [M, C] float64 from the pooled statistics of all rows in `parts`, by Cholesky."""
    rows, sums = sum(part.total() for part in parts), parts[0].sums.value().t()
    for part in parts[1:]:
        sums = sums + part.sums.value().t()
    basis, few = None, 2 * rows < sums.shape[0]
    grams = [part.gram() if few else part.lower_gram() for part in parts]
    gram = torch.stack(grams).sum(dim=0) if len(grams) > 1 else grams[0].clone()
    if few:
        gram, basis = _within_range(gram, rows)
        sums = basis.t() @ sums
    gram.diagonal().add_(strength)
    weights = solve_positive(gram, sums)
    return weights if basis is None else basis @ weights


def held_out_error(weights: Tensor, gram: Tensor, sums: Tensor, rows: int) -> float:
    """Return the mean squared error of one-hot targets on held-out rows, from their sums alone.

    Args:
        weights: [M, C] float64.
        gram: [M, M], H'H of the held-out rows.
        sums: [C, M], Y'H.
        rows: how many; tr YY' for one-hot targets.
    """
    error = (weights * (gram @ weights - 2 * sums.t())).sum()
    return (float(error) + rows) / (rows * weights.shape[1])


def best_by_gcv(stats: ClassStats, strengths: Sequence[float]) -> tuple[float, Tensor]:
    """Return the strength with the smallest generalised cross-validation score, and W [M, C]."""
    spectrum = Spectrum.of(stats)
    best = min(strengths, key=spectrum.gcv)
    return best, spectrum.weights(best)


def best_held_out(fitted: ClassStats, held_out: ClassStats, strengths: Sequence[float]) -> float:
    """Return the strength whose W, fitted on some rows, has the smallest squared error on others."""
    spectrum, sums = Spectrum.of(fitted), (held_out.gram(), held_out.sums.value(), held_out.total())
    return min(strengths, key=lambda strength: held_out_error(spectrum.weights(strength), *sums))
