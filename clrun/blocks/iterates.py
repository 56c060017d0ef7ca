"""The Gaussian around the iterates of an optimizer (SWAG, Maddox et al., NeurIPS 2019, arXiv 1902.02476)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from clrun.blocks.merging import Mean
from clrun.blocks.params import Carrier, Params, Shapes, flatten, shapes_of, unflatten


class Iterates(Carrier):
    """Running mean, variances and last deviations of the snapshots theta_1, ..., theta_n of P parameters.

    Args:
        rank: largest number of deviations that are kept; 0 for none.

    Attributes:
        average: the sum of the snapshots and their number; None before the first and once the mean is not needed.
        squares: [P], the sum of (theta - mean before)(theta - mean after) over snapshots, n times the variance.
        deviations: [K, P], theta - mean after, of the last K snapshots.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.count = rank, 0
        self.average: Mean | None = None
        self.shapes: Shapes = {}
        self.squares = self.deviations = torch.zeros(0)

    def add(self, snapshot: Params) -> None:
        """Add a snapshot, by parameter name."""
        if not self.count:
            self.average = Mean()  # in float64, so that the mean of equal snapshots is the snapshot
        assert self.average is not None, "the mean was dropped"
        theta = flatten(snapshot)
        before = flatten(self.mean()) if self.count else theta
        self.average.add(snapshot)
        self.count, self.shapes = self.count + 1, shapes_of(snapshot)
        deviation = theta - flatten(self.mean())
        squares = (theta - before) * deviation
        self.squares = squares if self.count == 1 else self.squares + squares
        if self.rank:
            kept = self.deviations[1 - self.rank :] if self.rank > 1 else self.deviations[:0]
            self.deviations = torch.cat([kept, deviation[None]]) if self.count > 1 else deviation[None]

    def mean(self) -> Params:
        """Return the arithmetic mean of the snapshots by name."""
        assert self.average is not None, "there is no snapshot, or the mean was dropped"
        return self.average.value()

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
