"""Curvature as a sum of few outer products, without its matrix (M-FAC, Frantar et al., NeurIPS 2021, 2107.03356).

Shapes: `m` rows, `P` parameters. Everything follows from one Cholesky factor of an m x m matrix; the published
recursions give the same numbers with worse conditioning.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from clrun.blocks.curvature.forms import Curvature, Damping, Operator, Sum
from clrun.blocks.params import Shapes, flatten, match, unflatten


@dataclass(frozen=True, eq=False)
class GramLowRank(Curvature):
    """K = R'R.

    Attributes:
        rows: R [m, P]; for the mean over m gradients g_i, row i is g_i / sqrt(m).
        limit: m never exceeds it: a sum of more rows keeps the closest matrix of that rank. None for no limit.
    """

    rows: Tensor
    limit: int | None = None

    @classmethod
    def mean(cls, shapes: Shapes, gradients: Tensor, *, limit: int | None = None) -> "GramLowRank":
        """Return the mean of the outer products of `gradients` [m, P]."""
        return cls(shapes, gradients / len(gradients) ** 0.5, limit)._compressed()

    def mv(self, vector: Tensor) -> Tensor:
        """Return R'R v."""
        return self.rows.T @ (self.rows @ vector)

    def inverse(self, damping: float, mode: Damping = "exact") -> "GramInverse":
        """Return (R'R + damping I)^-1 by Woodbury's identity; damping must be positive."""
        if damping <= 0:
            raise ValueError("a low-rank matrix has no inverse; the damping must be positive")
        return GramInverse(self.shapes, self.rows, _cholesky(_gram(self.rows), damping), damping)

    def diag(self) -> Tensor:
        """Return the diagonal."""
        return self.rows.square().sum(dim=0)

    def trace(self) -> Tensor:
        """Return |R|^2."""
        return self.rows.square().sum()

    def scale(self, factor: float) -> "GramLowRank":
        """Return sqrt(factor) R."""
        return GramLowRank(self.shapes, self.rows * factor**0.5, self.limit)

    def add(self, other: Curvature, how: Sum = "kl") -> "GramLowRank":
        """Return both sets of rows, or as many as the limit allows."""
        assert isinstance(other, GramLowRank)
        assert list(self.shapes.items()) == list(other.shapes.items())
        return GramLowRank(self.shapes, torch.cat([self.rows, other.rows]), self.limit)._compressed()

    def expand(self, shapes: Mapping[str, tuple[int, ...]]) -> "GramLowRank":
        """Return rows with zeros for what is new."""
        grown = []
        for row in self.rows:
            params = {name: row.new_zeros(shape) for name, shape in shapes.items()}
            for _, before, place in match(unflatten(row, self.shapes), params):
                place.copy_(before)
            grown.append(flatten(params))
        return GramLowRank(dict(shapes), torch.stack(grown), self.limit)

    def _compressed(self) -> "GramLowRank":
        """Return the closest matrix with `limit` rows."""
        if self.limit is None or len(self.rows) <= self.limit:
            return self
        _, vectors = torch.linalg.eigh(_gram(self.rows))
        lead = vectors[:, -self.limit :].to(self.rows.dtype)
        return GramLowRank(self.shapes, lead.T @ self.rows, self.limit)


@dataclass(frozen=True, eq=False)
class GramInverse(Operator):
    """(R'R + damping I)^-1 = (I - R' (damping I + R R')^-1 R) / damping.

    Attributes:
        rows: R [m, P].
        factor: [m, m] float64, lower Cholesky factor of damping I + R R'.
        damping: positive.
    """

    rows: Tensor
    factor: Tensor
    damping: float

    def mv(self, vector: Tensor) -> Tensor:
        """Return the inverse times v, O(m P)."""
        inside = torch.cholesky_solve((self.rows @ vector).double()[:, None], self.factor)[:, 0]
        return (vector - self.rows.T @ inside.to(self.rows.dtype)) / self.damping

    def diag(self) -> Tensor:
        """Return the diagonal."""
        inside: Tensor = torch.linalg.solve_triangular(self.factor.to(self.rows.dtype), self.rows, upper=False)
        return (1 - inside.square().sum(dim=0)) / self.damping


class GradientWindow:
    """The last m gradients, and the inverse of damping I + 1/m sum g g' at any moment: the dynamic form of M-FAC.

    Before m gradients were seen the missing ones count as zeros and the sum is still divided by m, as published: early
    steps are closer to gradient descent. Replacing a gradient costs O(m P) for a row of the Gram matrix and O(m^3) for
    its Cholesky factor.

    Args:
        length: m.
        size: P.
        damping: positive.
        like: gives dtype and device.
    """

    def __init__(self, length: int, size: int, damping: float, like: Tensor) -> None:
        self.gradients = like.new_zeros(length, size)
        self.gram = torch.zeros(length, length, dtype=torch.float64, device=like.device)
        self.damping, self.length, self.next = damping, length, 0

    def insert(self, gradient: Tensor) -> None:
        """Replace the oldest gradient by `gradient` [P]."""
        self.gradients[self.next] = gradient
        products = (self.gradients @ gradient).double()
        self.gram[self.next] = self.gram[:, self.next] = products
        self.next = (self.next + 1) % self.length

    def solve(self, vector: Tensor) -> Tensor:
        """Return (damping I + 1/m sum g g')^-1 v [P]."""
        factor = _cholesky(self.gram, self.length * self.damping)
        inside = torch.cholesky_solve((self.gradients @ vector).double()[:, None], factor)[:, 0]
        return (vector - self.gradients.T @ inside.to(vector.dtype)) / self.damping


def _gram(rows: Tensor) -> Tensor:
    """Return R R' in float64, a block of columns at a time."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for block in torch.split(rows, 2**16, dim=1):
        wide = block.double()
        total += wide @ wide.T
    return total


def _cholesky(gram: Tensor, damping: float) -> Tensor:
    """Return the lower Cholesky factor of damping I + `gram`."""
    factor: Tensor = torch.linalg.cholesky(gram + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    return factor
