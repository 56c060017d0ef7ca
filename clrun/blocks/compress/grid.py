"""Grids of b-bit integers for the rows of a weight.

Source: Optimal Brain Compression (see `obs`). q(x) = step (clamp(round(x / step) + zero, 0, 2^b - 1) - zero), where
rounding is half to even. Each output channel has a step and a zero of its own.

Deviations: with a symmetric grid the lower end is minus the upper one also for channels without negative weights, where
the public code clips the upper half of the range.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Fit = Literal["mse", "minmax"]
SHRINKS = [1 - k / 100 for k in range(80)]  # factors of the range that the search tries: 1 to 0.21
NORM = 2.4  # power of the errors that it sums


@dataclass(frozen=True)
class Grid:
    """The grid of each row of a matrix.

    Attributes:
        bits: b.
        steps: [n] float64, positive; each is a float32 number.
        zeros: [n] float64, whole numbers from 0 to 2^b - 1.
    """

    bits: int
    steps: Tensor
    zeros: Tensor

    def rows(self, some: slice) -> "Grid":
        """Return the grids of some rows."""
        return Grid(self.bits, self.steps[some], self.zeros[some])

    def codes(self, matrix: Tensor) -> Tensor:
        """Return the integers [n, m] of the nearest values of the grid, float64."""
        return (torch.round(matrix / self.steps[:, None]) + self.zeros[:, None]).clamp(0, 2**self.bits - 1)

    def nearest(self, matrix: Tensor) -> Tensor:
        """Return the nearest values of the grid [n, m]."""
        return self.steps[:, None] * (self.codes(matrix) - self.zeros[:, None])

    def error(self, matrix: Tensor) -> Tensor:
        """Return the sum of |q(x) - x|^2.4 of each row [n]."""
        return (self.nearest(matrix) - matrix).abs().pow(NORM).sum(dim=1)


def grid_of(matrix: Tensor, bits: int, *, symmetric: bool, fit: Fit = "mse") -> Grid:
    """Return the grid of each row of a matrix [n, m], float64.

    Args:
        matrix: the weights.
        bits: b.
        symmetric: whether the range is the same on both sides of 0; else it is that of the row, widened to contain 0.
        fit: "minmax" takes the whole range; "mse" shrinks both ends by the factor with the smallest sum of errors.
    """
    low, high = matrix.amin(dim=1).clamp_max(0), matrix.amax(dim=1).clamp_min(0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    empty = high == low
    low, high = low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)
    best = _scaled(low, high, 1.0, bits, symmetric=symmetric)
    if fit == "minmax":
        return best
    least = best.error(matrix)
    for factor in SHRINKS[1:]:
        other = _scaled(low, high, factor, bits, symmetric=symmetric)
        error = other.error(matrix)
        better = error < least
        best = Grid(bits, torch.where(better, other.steps, best.steps), torch.where(better, other.zeros, best.zeros))
        least = torch.minimum(error, least)
    return best


def _scaled(low: Tensor, high: Tensor, factor: float, bits: int, *, symmetric: bool) -> Grid:
    """Return the grid of a range whose ends are multiplied by a factor."""
    tiny = torch.finfo(torch.float32).tiny
    steps = (factor * (high - low) / (2**bits - 1)).float().double().clamp_min(tiny)
    zeros = torch.full_like(steps, 2 ** (bits - 1)) if symmetric else torch.round(-factor * low / steps)
    return Grid(bits, steps, zeros.clamp(0, 2**bits - 1))


__all__ = ["Fit", "Grid", "grid_of"]
