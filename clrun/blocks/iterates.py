"""The Gaussian around the iterates of an optimizer (SWAG, Maddox et al., NeurIPS 2019, arXiv 1902.02476)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from clrun.blocks.params import Carrier, Params, Shapes, flatten, shapes_of, unflatten


class Iterates(Carrier):
    """Running mean, variances and last deviations of the snapshots theta_1, ..., theta_n of P parameters.

    Args:
        rank: largest number of deviations that are kept; 0 for none.

    Attributes:
        total: [P] float64, the sum of the snapshots, in which n equal ones have themselves as the mean; empty before
            the first one and once the mean is not needed.
        squares: [P], the sum of (theta - mean before)(theta - mean after) over snapshots, n times the variance.
        deviations: [K, P], theta - mean after, of the last K snapshots.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.count = rank, 0
        self.total = torch.zeros(0, dtype=torch.float64)
        self.shapes: Shapes = {}
        self.squares = self.deviations = torch.zeros(0)

    @torch.no_grad()
    def add(self, snapshot: Mapping[str, Tensor]) -> None:
        """Add a snapshot, by parameter name; it is copied."""
        theta = flatten(snapshot)
        if not self.count:
            self.shapes, self.total = shapes_of(snapshot), torch.zeros_like(theta, dtype=torch.float64)
            self.squares, self.deviations = torch.zeros_like(theta), theta.new_zeros(0, len(theta))
        assert len(self.total), "the mean was dropped"
        before = self._mean() if self.count else theta
        self.total += theta
        self.count += 1
        deviation = theta - self._mean()
        self.squares.addcmul_(theta - before, deviation)
        if self.rank:
            self.deviations = torch.cat(
                [self.deviations[max(0, len(self.deviations) + 1 - self.rank) :], deviation[None]]
            )

    def _mean(self) -> Tensor:
        """Return the mean [P] in the type of the snapshots."""
        return (self.total / self.count).to(self.squares)

    def mean(self) -> Params:
        """Return the arithmetic mean of the snapshots by name."""
        assert len(self.total), "there is no snapshot, or the mean was dropped"
        return unflatten(self._mean(), self.shapes)

    def drop_mean(self) -> None:
        """Free the sum of the snapshots."""
        self.total = self.total[:0].clone()

    def variance(self) -> Params:
        """Return the variances of the snapshots by name, around their mean and divided by their number."""
        return unflatten(self.squares.clamp(min=0) / self.count, self.shapes)

    def sample(self, mean: Mapping[str, Tensor], draw: torch.Generator, scale: float) -> Params:
        """Return a draw from N(mean, scale (diag(v) + D D' / (K - 1))) by name; for K = 1 without the second term."""

        def noise(size: int) -> Tensor:
            return torch.randn(size, generator=draw).to(self.squares)

        spread = (scale * self.squares.clamp(min=0) / self.count).sqrt()
        change = spread * noise(len(self.squares))
        if len(self.deviations) > 1:
            columns = len(self.deviations)
            change = change + (scale / (columns - 1)) ** 0.5 * (noise(columns) @ self.deviations)
        return {name: mean[name].detach() + part for name, part in unflatten(change, self.shapes).items()}


__all__ = ["Iterates"]
