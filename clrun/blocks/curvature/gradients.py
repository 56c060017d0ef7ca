"""Estimates made of the gradients of single rows: diagonals, and sums of outer products."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vjp, vmap

from clrun.blocks.curvature.forms import Diagonal
from clrun.blocks.curvature.gram import GramLowRank
from clrun.blocks.curvature.target import Target
from clrun.blocks.params import Params, flatten, shapes_of
from clrun.data.split import Batch

# Per-sample gradients held at once: how many (more are not faster), and of how many numbers together (4 bytes each).
GRADIENTS = {"cpu": 64, "cuda": 512}
NUMBERS = {"cpu": 2**25, "cuda": 2**28}


def diagonal(target: Target, *, batched: bool, magnitude: Callable[[Tensor], Tensor] = Tensor.square) -> Diagonal:
    """Return 1/N sum_n sum_s magnitude(J_n' s), J_n the Jacobian of the logits and s the columns of row n.

    Args:
        target: rows, parameters and columns.
        batched: take the magnitude of sums over whole batches (of the budget's size), one backward each.
        magnitude: elementwise.
    """
    if not target.params:
        return Diagonal({}, torch.zeros(0))
    weights = {name: p.detach().contiguous() for name, p in target.params.items()}
    rows = _Rows(target, weights, magnitude)
    total = {name: torch.zeros_like(p) for name, p in weights.items()}
    with target.still():
        for batch, mask, noise in target.batches(target.ctx.budget.batch_size if batched else rows.at_once()[0]):
            part = rows.batched(batch, mask, noise) if batched else rows.summed(batch, mask, noise)
            for name, value in part.items():
                total[name] += value
    return Diagonal.of({target.names[name]: value / len(target.split) for name, value in total.items()})


def gram(target: Target, *, batched: bool, limit: int | None) -> GramLowRank:
    """Return 1/N sum g g' over the gradients g of all rows and columns, or of whole batches.

    Args:
        target: rows, parameters and columns.
        batched: one row for the sum of the gradients of each batch (of the budget's size).
        limit: most rows kept; None for all, which are N K (or N / B) P numbers.
    """
    if not target.params:
        return GramLowRank({}, torch.zeros(0, 0), limit)
    weights = {name: p.detach().contiguous() for name, p in target.params.items()}
    rows = _Rows(target, weights, lambda g: g)
    shapes = {target.names[name]: shape for name, shape in shapes_of(weights).items()}
    found = GramLowRank(shapes, next(iter(weights.values())).new_zeros(0, sum(p.numel() for p in weights.values())))
    with target.still():
        for batch, mask, noise in target.batches(target.ctx.budget.batch_size if batched else rows.at_once()[0]):
            part = flatten(rows.batched(batch, mask, noise))[None] if batched else rows.stacked(batch, mask, noise)
            new = GramLowRank(shapes, part / len(target.split) ** 0.5, limit)
            found = new.add(found)
    return found


@dataclass(frozen=True)
class _Rows:
    """Gradients of the rows of a batch.

    Attributes:
        target: rows, parameters and columns, of a learner in eval mode.
        weights: the parameters without gradient and in plain memory order, which functorch's convolutions like best.
        magnitude: elementwise, applied to each gradient.
    """

    target: Target
    weights: Params
    magnitude: Callable[[Tensor], Tensor]

    def at_once(self) -> tuple[int, int]:
        """Return of how many rows, and of how many columns of each, the gradients are held together."""
        kind = next(iter(self.weights.values())).device.type
        numbers = sum(p.numel() for p in self.weights.values())
        gradients = max(1, min(GRADIENTS[kind], NUMBERS[kind] // numbers))
        columns = min(self.target.count, gradients)
        return gradients // columns, columns

    def summed(self, batch: Batch, mask: Tensor, noise: Tensor) -> Params:
        """Return the magnitudes, summed over rows and columns."""
        # Gradients of parameters outside `weights` would keep a graph alive.
        with torch.no_grad():
            found = vmap(self._one)(batch.x, batch.y, mask, noise)
            return {name: value.sum(dim=0) for name, value in found.items()}

    def batched(self, batch: Batch, mask: Tensor, noise: Tensor) -> Params:
        """Return the magnitude of the gradient summed over the batch, of one column a row."""
        params = self.target.params
        with torch.enable_grad():
            logits = self.target.logits(dict(params), batch.x)
            columns = self.target.directions(logits.detach(), batch.y, mask, noise)[:, 0]
            grads = torch.autograd.grad(logits, list(params.values()), columns, materialize_grads=True)
        return {name: self.magnitude(grad) for name, grad in zip(params, grads, strict=True)}

    def stacked(self, batch: Batch, mask: Tensor, noise: Tensor) -> Tensor:
        """Return [B K, P], the gradients one below the other."""

        def one(x: Tensor, y: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
            logits, pull = vjp(lambda p: self.target.logits(p, x[None])[0], self.weights)  # type: ignore[misc]
            found = vmap(pull)(self.target.directions(logits, y, mask, noise))[0]
            return torch.cat([grad.flatten(1) for grad in found.values()], dim=1)

        with torch.no_grad():
            return vmap(one)(batch.x, batch.y, mask, noise).flatten(0, 1)

    def _one(self, x: Tensor, y: Tensor, mask: Tensor, noise: Tensor) -> Params:
        """Return the magnitudes of one row, summed over its columns."""
        logits, pull = vjp(lambda p: self.target.logits(p, x[None])[0], self.weights)  # type: ignore[misc]
        columns = self.target.directions(logits, y, mask, noise)
        if len(columns) == 1:
            return {name: self.magnitude(grad) for name, grad in pull(columns[0])[0].items()}
        total = {name: torch.zeros_like(p) for name, p in self.weights.items()}
        for part in torch.split(columns, self.at_once()[1]):
            for name, grad in vmap(pull)(part)[0].items():
                total[name] = total[name] + self.magnitude(grad).sum(dim=0)
        return total
