"""Optimal brain surgery row by row: removing or rounding one weight after the other, exactly.

Source: Optimal Brain Compression, Frantar, Singh and Alistarh, NeurIPS 2022, arXiv 2208.11580 (written from the paper's
equations; the public code has no licence).

Symbols: a row w [d] of a weight matrix, its inputs X [d, positions] on n rows of data, H = 2/n X X' [d, d]. With this H
the error 1/2 (w - w')' H (w - w') is the squared output error per row of data. All rows of a layer share H and are
independent of each other. `B` rows are processed at once.

Removing weight p with the least loss increase: the score is w_p^2 / (2 [H^-1]_pp), all other weights move by
-(w_p / [H^-1]_pp) [H^-1]_:p, and H^-1 becomes the inverse of H without row and column p. Rounding to q(w_p) is the same
with w_p - q(w_p) in the place of w_p.

The inverse after k removals is not formed. It is H^-1 - U' U with one row of U [k, d] per removal, so that a removal
reads k d numbers instead of writing d^2: d^3 operations per row in all, as the paper counts.

Deviations: everything is in float64. Inputs that are always 0 are damped as all others are and not set to 0 at once,
because they may be used by earlier tasks. The sequence of increments, which need not grow, is replaced by its running
maximum before the increments of all rows are compared.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from clrun.blocks.compress.grid import Grid
from clrun.system.errors import ConfigError

ROWS = 32  # rows that are processed at once


def damped(hessian: Tensor, damping: float) -> Tensor:
    """Return H + damping mean(diag H) I; with a mean of 0, I."""
    mean = float(hessian.diagonal().mean())
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return hessian + damping * mean * identity if mean else identity


def inverse_of(hessian: Tensor, layer: str) -> Tensor:
    """Return H^-1.

    Raises:
        ConfigError: H is singular in double precision.
    """
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if int(failed):
        raise ConfigError(
            f"compress.damping: the inputs of layer {layer} depend on each other so much that their second moments "
            "have no inverse; use a larger damping"
        )
    return torch.cholesky_inverse(factor)


class _Rows:
    """The rows of a chunk while their weights are taken away one by one.

    Args:
        weights: w of each row [B, d], float64; a copy is changed.
        inverse: H^-1 [d, d].
        steps: most removals of a row.
    """

    def __init__(self, weights: Tensor, inverse: Tensor, steps: int) -> None:
        count, width = weights.shape
        self.weights, self.inverse = weights.clone(), inverse
        self.diagonal = inverse.diagonal().expand(count, width).clone()
        self.left = torch.ones(count, width, dtype=torch.bool, device=weights.device)
        self.removed = weights.new_zeros(count, steps, width)  # U
        self.taken = 0
        self.index = torch.arange(count, device=weights.device)

    def take(self, chosen: Tensor, change: Tensor) -> Tensor:
        """Take away weight `chosen` [B] of each row, whose value falls by `change` [B]; return the increments [B]."""
        k = self.taken
        column = self.inverse[chosen]
        if k:
            before = self.removed[:, :k]
            own = before.gather(2, chosen[:, None, None].expand(-1, k, 1))  # [B, k, 1]
            column = column - torch.bmm(own.mT, before)[:, 0]
        pivot = column[self.index, chosen]
        self.weights -= (change / pivot)[:, None] * column
        scaled = column / pivot.sqrt()[:, None]
        self.removed[:, k] = scaled
        self.diagonal -= scaled.square()
        self.left[self.index, chosen] = False
        self.taken = k + 1
        return change.square() / (2 * pivot)

    def scores(self, change: Tensor) -> Tensor:
        """Return the loss increase [B, d] of taking away each weight, infinite for those that are gone."""
        return (change.square() / (2 * self.diagonal)).masked_fill(~self.left, torch.inf)


def removal_order(weights: Tensor, inverse: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
    """Return the order in which the weights of each row are removed, and their increments of the error.

    Args:
        weights: W [n, d] float64.
        inverse: H^-1.
        gone: [n, d] bool, the weights that are removed already (0); they come first, with increments of 0.

    Returns:
        Indices [n, d] long and increments [n, d] float64, both in the order of removal.
    """
    orders, increments = [], []
    for some, without in zip(torch.split(weights, ROWS), torch.split(gone, ROWS), strict=True):
        rows = _Rows(some, inverse, some.shape[1])
        own_order, own_increments = [], []
        for _ in range(some.shape[1]):
            scores = rows.scores(rows.weights).masked_fill(without & rows.left, -1.0)
            chosen = scores.argmin(dim=1)
            own_increments.append(rows.take(chosen, rows.weights[rows.index, chosen]))
            own_order.append(chosen)
        orders.append(torch.stack(own_order, dim=1))
        increments.append(torch.stack(own_increments, dim=1))
    return torch.cat(orders), torch.cat(increments)


def removal_in_groups(weights: Tensor, inverse: Tensor, gone: Tensor, pattern: tuple[int, int]) -> Tensor:
    """Return which weights are kept [n, d] when exactly N of every M consecutive ones of a row are.

    One weight is removed after the other, and a group that has lost M - N of them loses no more.

    Args:
        weights: W [n, d] float64; d is a multiple of M.
        inverse: H^-1.
        gone: [n, d] bool, weights that are removed already, at most M - N of a group.
        pattern: (N, M).
    """
    n, m = pattern
    kept = []
    for some, without in zip(torch.split(weights, ROWS), torch.split(gone, ROWS), strict=True):
        steps = some.shape[1] // m * (m - n)
        rows = _Rows(some, inverse, steps)
        for _ in range(steps):
            lost = (~rows.left).view(len(some), -1, m).sum(dim=2) >= m - n
            closed = lost.repeat_interleave(m, dim=1)
            scores = rows.scores(rows.weights).masked_fill(closed, torch.inf).masked_fill(without & rows.left, -1.0)
            chosen = scores.argmin(dim=1)
            rows.take(chosen, rows.weights[rows.index, chosen])
        kept.append(rows.left)
    return torch.cat(kept)


@dataclass(frozen=True)
class BlockRemoval:
    """The order in which blocks of consecutive weights are removed from each row, and their increments of the error.

    Attributes:
        order: [n, blocks] long.
        increments: [n, blocks] float64, in the order of removal.
    """

    order: Tensor
    increments: Tensor


def removal_of_blocks(weights: Tensor, inverse: Tensor, gone: Tensor, size: int) -> BlockRemoval:
    """Return the order of removal of blocks P of `size` weights by the score 1/2 w_P' ([H^-1]_PP)^-1 w_P.

    Args:
        weights: W [n, d] float64; d is a multiple of the size.
        inverse: H^-1.
        gone: [n, blocks] bool, the blocks that are removed already.
        size: weights of a block.
    """
    width = weights.shape[1]
    places = torch.arange(width, device=weights.device).view(-1, size)
    orders, increments = [], []
    for start, without in zip(weights, gone, strict=True):  # each row has an inverse of its own
        row, own = start.clone(), inverse.clone()
        left = torch.ones(len(places), dtype=torch.bool, device=row.device)
        order, steps = [], []
        for _ in range(len(places)):
            squares = own[places[:, :, None], places[:, None, :]]
            squares[~left] = torch.eye(size, dtype=row.dtype, device=row.device)
            solved = torch.linalg.solve(squares, row[places])
            scores = 0.5 * (solved * row[places]).sum(dim=1)
            chosen = int(scores.masked_fill(~left, torch.inf).masked_fill(without & left, -1.0).argmin())
            block = places[chosen]
            columns, solved_block = own[:, block], solved[chosen]
            steps.append(scores[chosen].clone())
            row = row - columns @ solved_block
            own = own - columns @ torch.linalg.solve(squares[chosen], columns.T)
            left[chosen] = False
            order.append(chosen)
        orders.append(torch.tensor(order, device=row.device))
        increments.append(torch.stack(steps))
    return BlockRemoval(torch.stack(orders), torch.stack(increments))


def refit(weights: Tensor, inverse: Tensor, kept: Tensor) -> Tensor:
    """Return the rows of least error whose removed weights are 0: what any order of removing these leads to.

    w - H^-1_:S ([H^-1]_SS)^-1 w_S for the removed places S of each row.

    Args:
        weights: W [n, d] float64.
        inverse: H^-1.
        kept: [n, d] bool.
    """
    fitted = []
    for row, own in zip(weights, kept, strict=True):
        gone = (~own).nonzero()[:, 0]
        if len(gone):
            columns = inverse[:, gone]
            row = (row - columns @ torch.linalg.solve(columns[gone], row[gone])).masked_fill(~own, 0.0)
        fitted.append(row)
    return torch.stack(fitted)


def error_of(change: Tensor, hessian: Tensor) -> Tensor:
    """Return the squared output error per row of data of each row [n] of a change of the weights [n, d]."""
    return 0.5 * ((change @ hessian) * change).sum(dim=1)


def rounded(weights: Tensor, inverse: Tensor, grid: Grid) -> Tensor:
    """Return the rows after all weights were rounded one by one, each error being absorbed by those that are left.

    Weights that are exactly 0 are rounded first, so that a pruned layer keeps its zeros. If a weight has drifted beyond
    the end of the grid, so that its error is larger than half a step, the weight of the largest error comes first.

    Args:
        weights: W [n, d] float64.
        inverse: H^-1.
        grid: the grid of each row, which stays as it is.
    """
    count, width = weights.shape
    result = torch.empty_like(weights)
    for start in range(0, count, ROWS):
        chunk = slice(start, min(start + ROWS, count))
        own = grid.rows(chunk)
        rows = _Rows(weights[chunk], inverse, width)
        zeros = weights[chunk] == 0
        limit = own.steps[:, None] / 2 * (1 + 1e-9)
        for _ in range(width):
            values = own.nearest(rows.weights)
            change = (rows.weights - values).masked_fill(~rows.left, 0.0)
            scores = rows.scores(change).masked_fill(zeros & rows.left, -1.0)
            chosen = scores.argmin(dim=1)
            beyond = ((change.abs() > limit) & ~zeros).any(dim=1) & ~(zeros & rows.left).any(dim=1)
            chosen = torch.where(beyond, change.abs().argmax(dim=1), chosen)
            value = values[rows.index, chosen]
            rows.take(chosen, change[rows.index, chosen])
            result[chunk][rows.index, chosen] = value
    return result


__all__ = [
    "BlockRemoval",
    "damped",
    "error_of",
    "inverse_of",
    "refit",
    "removal_in_groups",
    "removal_of_blocks",
    "removal_order",
    "rounded",
]
