"""Masks on weights: guards that keep weights of earlier tasks bitwise unchanged, owners of weights, sparse differences.

Symbols: the masked parameters have `P` entries together, a sparse difference has `k` entries.
"""

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor, nn

from clrun.blocks.params import Params, clone, flatten, shapes_of, unflatten

MOST_TASKS = 254  # an owner is stored in one byte, and 0 stands for no owner


class Guard:
    """Restricts the steps of any optimizer to some entries of the parameters.

    A gradient of 0 is not enough to keep a weight: momentum, Adam's averages and weight decay change it nevertheless.
    The gradient is therefore masked, so that its norm and the averages are right, and after the step all other entries
    are restored.

    A guard is made at the beginning of a fit and dropped at its end; it is not part of the state of the method.

    Args:
        params: parameters by name.
        masks: by name, the factor from 0 to 1 for the gradient of each entry, bool or float, in the shape of the
            parameter. Entries with factor 0 are restored after each step. Parameters without a mask are not guarded.
    """

    def __init__(self, params: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
        self.params = {name: params[name] for name in masks}
        self.masks = {name: mask.to(params[name].dtype) for name, mask in masks.items()}
        fixed = {name: mask == 0 for name, mask in self.masks.items()}
        self.fixed = {name: entries for name, entries in fixed.items() if entries.any()}
        self.original = clone({name: self.params[name] for name in self.fixed})

    def mask_gradients(self) -> None:
        """Multiply `.grad` by the masks; a missing gradient stays missing."""
        for name, parameter in self.params.items():
            if parameter.grad is not None:
                parameter.grad = parameter.grad * self.masks[name]

    @torch.no_grad()
    def restore(self) -> None:
        """Set the entries with mask 0 to the values they had when the guard was made."""
        for name, entries in self.fixed.items():
            parameter = self.params[name]
            torch.where(entries, self.original[name], parameter, out=parameter)


class OwnershipMask(nn.Module):
    """The task that owns each weight (PackNet, Mallya and Lazebnik, CVPR 2018): one byte per weight, up to 254 tasks.

    Args:
        params: the weights that tasks can own, by name.
    """

    owner: Tensor  # [P] uint8: the position of the owning task + 1, or 0 for a free weight

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.shapes = shapes_of(params)
        size = sum(map(prod, self.shapes.values()))
        self.register_buffer("owner", torch.zeros(size, dtype=torch.uint8))

    def claim(self, task: int) -> None:
        """Make the task at position `task` the owner of all free weights."""
        self.owner[self.owner == 0] = task + 1

    def owned(self, task: int) -> dict[str, Tensor]:
        """Return bool masks by name, True for the weights that the task at position `task` owns."""
        return unflatten(self.owner == task + 1, self.shapes)

    def free(self) -> float:
        """Return the fraction of all weights that are free."""
        return float((self.owner == 0).double().mean())

    @torch.no_grad()
    def prune(self, params: Mapping[str, Tensor], task: int, fraction: float) -> None:
        """Make the weights of a task with the smallest magnitudes in each parameter free, and set them to 0.

        Of the n weights of a parameter that the task owns, exactly floor(fraction * n) are freed, by a stable sort of
        the magnitudes. A threshold would free all weights of equal magnitude.

        Args:
            params: the weights by name, changed in place.
            task: position of the task.
            fraction: from 0 to 1.
        """
        for name, owner in unflatten(self.owner, self.shapes).items():  # views of `owner`
            weight = params[name]
            mine = (owner.flatten() == task + 1).nonzero()[:, 0]
            order = weight.flatten()[mine].abs().argsort(stable=True)
            released = mine[order[: int(fraction * len(mine) + 1e-9)]]
            owner.view(-1)[released] = 0
            mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
            mask[released] = True
            weight.masked_fill_(mask.view_as(weight), 0.0)

    def view(self, params: Mapping[str, Tensor], task: int) -> Params:
        """Return the weights that the task at position `task` uses: those that it or earlier tasks own, 0 elsewhere.

        The result is for `torch.func.functional_call`; the weights themselves are not changed.
        """
        used = unflatten((self.owner > 0) & (self.owner <= task + 1), self.shapes)
        return {name: params[name].detach() * mask for name, mask in used.items()}


class Snapshot(nn.Module):
    """Frozen copies of tensors, which are part of the weights of a method.

    Args:
        tensors: floating-point tensors by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.shapes = shapes_of(tensors)
        self.values = nn.Parameter(flatten(clone(tensors)), requires_grad=False)

    def read(self) -> Params:
        """Return the copies by name."""
        return unflatten(self.values, self.shapes)


class SparseDelta(nn.Module):
    """The values of a task for k entries of the weights: 4 bytes for each value and 4 for its index.

    Both are part of the weights of a method.

    Args:
        entries: indices [k] long in the vector [P] of all weights.
    """

    entries: Tensor  # [k] int32

    def __init__(self, entries: Tensor) -> None:
        super().__init__()
        assert not len(entries) or int(entries.max()) < 2**31
        self.register_buffer("entries", entries.int())
        self.values = nn.Parameter(torch.zeros(0), requires_grad=False)  # [k] after `take`

    def take(self, weights: Tensor) -> None:
        """Store the values of the entries, from all weights [P]."""
        self.values = nn.Parameter(weights[self.entries.long()].detach().clone(), requires_grad=False)

    def put(self, weights: Tensor) -> None:
        """Write the stored values into the weights [P]."""
        weights[self.entries.long()] = self.values.detach()


def largest(scores: Tensor, count: int) -> Tensor:
    """Return the indices [count] long of the largest scores [P], in ascending order; of equal scores the first.

    The indices for a smaller count are a subset of those for a larger one.
    """
    return scores.argsort(descending=True, stable=True)[:count].sort().values


__all__ = ["MOST_TASKS", "Guard", "OwnershipMask", "Snapshot", "SparseDelta", "largest"]
