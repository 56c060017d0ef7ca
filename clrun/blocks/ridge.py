"""Ridge regression to one-hot labels from sums over rows, for all strengths from one decomposition; random projections.

Shapes: `n` rows, `D` width of the backbone's features, `M` width of the features after a projection, `C` classes, `R`
eigenvalues. H [n, M] are the features and Y [n, C] the one-hot labels of the rows. With G = H'H and Q = H'Y the
solution is W(strength) = (G + strength I)^-1 Q.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor, nn

from clrun.blocks.statistics import ClassStats, solve_positive
from clrun.system.seeding import generator


class RandomProjection(nn.Module):
    """The projection h = ReLU(f W) with a fixed random matrix W [D, M].

    Sources: RanPAC (McDonnell et al., NeurIPS 2023, section 4.1), whose matrix is normal; RAIL and ACIL, whose matrix
    is uniform. A strength gamma of the ridge with a uniform matrix is about the strength 3 D gamma with a normal one,
    because h is proportional to the scale of W.

    Args:
        num_features: D.
        width: M; 0 leaves the features as they are.
        seed: seed of W, which is drawn from a separate generator.
        kind: distribution of the entries of W: "normal", with mean 0 and variance 1; "uniform" between -1/sqrt(D) and
            1/sqrt(D), as the rows of `nn.Linear`.
    """

    weight: Tensor

    def __init__(
        self, num_features: int, width: int, *, seed: int, kind: Literal["normal", "uniform"] = "normal"
    ) -> None:
        super().__init__()
        self.num_features = width or num_features
        source = generator(seed, "random projection")
        if kind == "normal":
            draw = torch.randn(num_features, width, generator=source)
        else:
            draw = (2 * torch.rand(num_features, width, generator=source) - 1) / math.sqrt(num_features)
        self.register_buffer("weight", draw)

    def forward(self, features: Tensor) -> Tensor:
        """Return the projected features [B, M] of features [B, D]."""
        return (features @ self.weight).relu_() if self.weight.numel() else features


@dataclass(frozen=True)
class Spectrum:
    """The decomposition G = V diag(s) V' and z = V'Q, from which the solution for any strength follows.

    Attributes:
        values: the eigenvalues s [R] float64; all other eigenvalues are 0, and their part of z is 0.
        vectors: V [M, R].
        projected: z [R, C].
        rows: n.
    """

    values: Tensor
    vectors: Tensor
    projected: Tensor
    rows: int

    @classmethod
    def of(cls, stats: ClassStats) -> Self:
        """Decompose statistics with pooled moments, at the cost of an eigendecomposition of size min(M, n) or M.

        The smaller size n is used if 2 n < M.
        """
        gram, rows = stats.lower_gram(), stats.total()
        basis = None
        if 2 * rows < len(gram):
            gram, basis = _within_range(stats.gram(), rows)
        values, vectors = torch.linalg.eigh(gram, UPLO="L")
        vectors = vectors if basis is None else basis @ vectors
        return cls(values.clamp_(min=0), vectors, vectors.t() @ stats.sums.value().t(), rows)

    @classmethod
    def dual(cls, features: Tensor, targets: Tensor) -> Self:
        """Decompose HH' [n, n] instead of H'H, which has the same non-zero eigenvalues and is cheaper for n < M.

        Args:
            features: H [n, M] float64.
            targets: Y [n, C] float64.
        """
        values, vectors = torch.linalg.eigh(features @ features.t())
        roots = values.clamp_(min=0).sqrt()
        scale = torch.where(values > values.max() * 1e-15, 1 / roots, torch.zeros_like(roots))
        return cls(values, features.t() @ vectors * scale, roots[:, None] * (vectors.t() @ targets), len(features))

    def weights(self, strength: float) -> Tensor:
        """Return the solution W [M, C] for this strength."""
        return self.vectors @ (self.projected / (self.values + strength)[:, None])

    def residual(self, strength: float) -> float:
        """Return the squared error of the solution, summed over the n rows and the C columns."""
        s, z = self.values, self.projected.square().sum(dim=1)
        return self.rows - float((z * (s + 2 * strength) / (s + strength).square()).sum())

    def freedom(self, strength: float) -> float:
        """Return the effective degrees of freedom, the trace of G (G + strength I)^-1."""
        return float((self.values / (self.values + strength)).sum())

    def gcv(self, strength: float) -> float:
        """Return the generalised cross-validation score (Golub, Heath and Wahba, 1979)."""
        left = 1 - self.freedom(strength) / self.rows
        return self.residual(strength) / self.rows / left**2 if left > 0 else float("inf")


def _within_range(gram: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return B'GB [n, n] for an orthonormal basis B [M, n] of the range of G, and B itself.

    The dual form HH' needs the rows, which are not stored. Since G has rank n, n random combinations of its columns
    span its range, and the smaller matrix has the same non-zero eigenvalues (Halko, Martinsson and Tropp, SIAM Review
    2011).
    """
    draw = torch.randn(len(gram), rows, generator=generator(0, "range"), dtype=gram.dtype)
    basis: Tensor = torch.linalg.qr(gram @ draw.to(gram.device)).Q
    return basis.t() @ (gram @ basis), basis


def ridge(strength: float, *parts: ClassStats, ratio: int = 2) -> Tensor:
    """Return W [M, C] float64 for all rows of several statistics with pooled moments, by a Cholesky factor.

    Args:
        strength: added to the diagonal of G.
        *parts: the statistics.
        ratio: with less than M / `ratio` rows a matrix of the size n is factorised instead of one of the size M. With 2
            the smaller one is exact for every strength. Finding it takes longer than the larger factor unless n is
            below M / 12, so that 12 is the better choice where the strength makes G + strength I well-conditioned.
    """
    rows, sums = sum(part.total() for part in parts), parts[0].sums.value().t()
    for part in parts[1:]:
        sums = sums + part.sums.value().t()
    basis, few = None, ratio * rows < sums.shape[0]
    grams = [part.gram() if few else part.lower_gram() for part in parts]
    gram = torch.stack(grams).sum(dim=0) if len(grams) > 1 else grams[0].clone()
    if few:
        gram, basis = _within_range(gram, rows)
        sums = basis.t() @ sums
    gram.diagonal().add_(strength)
    weights = solve_positive(gram, sums)
    return weights if basis is None else basis @ weights


def held_out_error(weights: Tensor, gram: Tensor, sums: Tensor, rows: int) -> float:
    """Return the mean squared error on held-out rows, from sums over these rows.

    Args:
        weights: W [M, C] float64.
        gram: H'H [M, M] of the held-out rows.
        sums: Y'H [C, M] of the held-out rows.
        rows: number of held-out rows, which is the trace of YY' for one-hot labels.
    """
    error = (weights * (gram @ weights - 2 * sums.t())).sum()
    return (float(error) + rows) / (rows * weights.shape[1])


def best_by_gcv(stats: ClassStats, strengths: Sequence[float]) -> tuple[float, Tensor]:
    """Return the strength with the smallest generalised cross-validation score, and its solution W [M, C]."""
    spectrum = Spectrum.of(stats)
    best = min(strengths, key=spectrum.gcv)
    return best, spectrum.weights(best)


def best_held_out(fitted: ClassStats, held_out: ClassStats, strengths: Sequence[float]) -> float:
    """Return the strength whose solution for the rows of `fitted` has the smallest error on those of `held_out`."""
    spectrum, sums = Spectrum.of(fitted), (held_out.gram(), held_out.sums.value(), held_out.total())
    return min(strengths, key=lambda strength: held_out_error(spectrum.weights(strength), *sums))
