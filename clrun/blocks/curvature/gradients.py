"""Diagonal estimates of curvature from the gradients of single rows or of whole batches."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vjp, vmap

from clrun.blocks.curvature.forms import Diagonal
from clrun.blocks.curvature.target import Target
from clrun.blocks.params import Params
from clrun.data.split import Batch

# Per-row gradients in memory at once: their number (more is not faster) and their total size in numbers of 4 bytes.
GRADIENTS = {"cpu": 64, "cuda": 512}
NUMBERS = {"cpu": 2**25, "cuda": 2**28}


def diagonal(target: Target, *, batched: bool, magnitude: Callable[[Tensor], Tensor] = Tensor.square) -> Diagonal:
    """Return 1/N sum_n sum_s magnitude(J_n' s), where J_n is the Jacobian of the logits of row n and s its columns.

    Args:
        target: rows, parameters and columns.
        batched: take the magnitude of the gradient summed over a batch (of the budget's size), which needs one backward
            pass per batch.
        magnitude: elementwise function.
    """
    if not target.params:
        return Diagonal({}, torch.zeros(0))
    weights = {name: p.detach().contiguous() for name, p in target.params.items()}
    gradients = _Gradients(target, weights, magnitude)
    total = {name: torch.zeros_like(p) for name, p in weights.items()}
    with target.evaluating():
        for batch, mask, noise in target.batches(target.ctx.budget.batch_size if batched else gradients.at_once()[0]):
            part = gradients.of_batch(batch, mask, noise) if batched else gradients.of_rows(batch, mask, noise)
            for name, value in part.items():
                total[name] += value
    return Diagonal.of({target.names[name]: value / len(target.split) for name, value in total.items()})


@dataclass(frozen=True)
class _Gradients:
    """Magnitudes of the gradients J_n' s of a method's rows, by parameter name.

    Attributes:
        target: rows, parameters and columns, of a method in eval mode.
        weights: the detached parameters, contiguous because functorch's convolutions are fastest on these.
        magnitude: elementwise function that is applied to each gradient.
    """

    target: Target
    weights: Params
    magnitude: Callable[[Tensor], Tensor]

    def at_once(self) -> tuple[int, int]:
        """Return the number of rows, and of columns per row, whose gradients are in memory at once."""
        kind = next(iter(self.weights.values())).device.type
        numbers = sum(p.numel() for p in self.weights.values())
        gradients = max(1, min(GRADIENTS[kind], NUMBERS[kind] // numbers))
        columns = min(self.target.count, gradients)
        return gradients // columns, columns

    def of_rows(self, batch: Batch, mask: Tensor, noise: Tensor) -> Params:
        """Return the sum over rows and columns of the magnitude of each single gradient."""
        # Without no_grad the parameters outside `weights` would keep an autograd graph alive.
        with torch.no_grad():
            found = vmap(self._of_row)(batch.x, batch.y, mask, noise)
            return {name: value.sum(dim=0) for name, value in found.items()}

    def of_batch(self, batch: Batch, mask: Tensor, noise: Tensor) -> Params:
        """Return the magnitude of the gradient summed over the rows of a batch, with one column per row."""
        params = self.target.params
        with torch.enable_grad():
            logits = self.target.logits(dict(params), batch.x)
            columns = self.target.directions(logits.detach(), batch.y, mask, noise)[:, 0]
            grads = torch.autograd.grad(logits, list(params.values()), columns, materialize_grads=True)
        return {name: self.magnitude(grad) for name, grad in zip(params, grads, strict=True)}

    def _of_row(self, x: Tensor, y: Tensor, mask: Tensor, noise: Tensor) -> Params:
        """Return the sum over the columns of one row of the magnitude of each gradient."""
        logits, pull = vjp(lambda p: self.target.logits(p, x[None])[0], self.weights)  # type: ignore[misc]
        columns = self.target.directions(logits, y, mask, noise)
        if len(columns) == 1:
            return {name: self.magnitude(grad) for name, grad in pull(columns[0])[0].items()}
        total = {name: torch.zeros_like(p) for name, p in self.weights.items()}
        for part in torch.split(columns, self.at_once()[1]):
            for name, grad in vmap(pull)(part)[0].items():
                total[name] = total[name] + self.magnitude(grad).sum(dim=0)
        return total


__all__ = ["diagonal"]
