"""Masks on weights that keep what belongs to earlier tasks bitwise as it was: owners, guards, sparse differences.

Symbols: `P` numbers in the masked parameters, `T` tasks, `k` entries of a mask.
"""

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor, nn

from clrun.blocks.params import Params, clone, flatten, shapes_of, unflatten

MOST_TASKS = 254  # owners are one byte, and 0 is nobody


class Guard:
    """Lets an optimizer move some entries of some parameters and no others, whatever the optimizer does.

    A gradient of 0 does not hold a weight: momentum, Adam's averages and weight decay move it all the same. So the
    gradient is masked for the sake of its norm and of the averages, and after the step every other entry is put back.

    Made at the beginning of a fit and dropped at its end; it is no part of the learner's state.

    Args:
        params: parameters by name.
        masks: by the same names, how much of the gradient each entry takes, [shape of the parameter], from 0 to 1;
            entries with 0 are put back. Bool or float.
    """

    def __init__(self, params: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
        self.params = {name: params[name] for name in masks}
        self.masks = {name: mask.to(params[name].dtype) for name, mask in masks.items()}
        held = {name: mask == 0 for name, mask in self.masks.items()}
        self.held = {name: entries for name, entries in held.items() if entries.any()}
        self.kept = clone({name: self.params[name] for name in self.held})

    def mask_gradients(self) -> None:
        """Multiply `.grad` by the masks; a missing one stays missing."""
        for name, parameter in self.params.items():
            if parameter.grad is not None:
                parameter.grad = parameter.grad * self.masks[name]

    @torch.no_grad()
    def restore(self) -> None:
        """Put the entries with mask 0 back to what they were when the guard was made."""
        for name, entries in self.held.items():
            parameter = self.params[name]
            torch.where(entries, self.kept[name], parameter, out=parameter)


class OwnershipMask(nn.Module):
    """Which task each weight belongs to (PackNet, Mallya and Lazebnik, CVPR 2018): P bytes for up to 254 tasks.

    Args:
        params: the weights that can be owned.
    """

    owner: Tensor  # [P] uint8, position of the task + 1; 0: free

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.shapes = shapes_of(params)
        size = sum(map(prod, self.shapes.values()))
        self.register_buffer("owner", torch.zeros(size, dtype=torch.uint8))

    def claim(self, task: int) -> None:
        """Give every free weight to the task at position `task`."""
        self.owner[self.owner == 0] = task + 1

    def owned(self, task: int) -> dict[str, Tensor]:
        """Return which weights belong to the task at position `task`, bool by name."""
        return unflatten(self.owner == task + 1, self.shapes)

    def free(self) -> float:
        """Return the share of the weights that belong to nobody."""
        return float((self.owner == 0).double().mean())

    @torch.no_grad()
    def prune(self, params: Mapping[str, Tensor], task: int, fraction: float) -> None:
        """Release the smallest weights of a task in each parameter, and set them to 0.

        Exactly floor(fraction * n) of the n weights that the task owns go, by a stable sort of their magnitudes: a
        threshold would take every weight of equal size.

        Args:
            params: the weights themselves, changed in place.
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
        """Return the weights that the task at position `task` sees: those of owners up to it, 0 elsewhere.

        The weights themselves are not touched: for `torch.func.functional_call`.
        """
        seen = unflatten((self.owner > 0) & (self.owner <= task + 1), self.shapes)
        return {name: params[name].detach() * mask for name, mask in seen.items()}


class Snapshot(nn.Module):
    """Copies of tensors at one moment, which count as weights and train no more.

    Args:
        tensors: by name; floating-point.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.shapes = shapes_of(tensors)
        self.values = nn.Parameter(flatten(clone(tensors)), requires_grad=False)

    def read(self) -> Params:
        """Return the copies by name."""
        return unflatten(self.values, self.shapes)


class SparseDelta(nn.Module):
    """The values that a task gave to a few entries of the weights, k (4 + 4) bytes; they count as weights.

    Args:
        entries: [k] long, places in the flat vector of all weights.
    """

    entries: Tensor  # [k] int32

    def __init__(self, entries: Tensor) -> None:
        super().__init__()
        assert not len(entries) or int(entries.max()) < 2**31
        self.register_buffer("entries", entries.int())
        self.values = nn.Parameter(torch.zeros(0), requires_grad=False)  # [k] once the task is learned

    def take(self, weights: Tensor) -> None:
        """Keep the values of the entries in `weights` [P]."""
        self.values = nn.Parameter(weights[self.entries.long()].detach().clone(), requires_grad=False)

    def put(self, weights: Tensor) -> None:
        """Write the values into `weights` [P]."""
        weights[self.entries.long()] = self.values.detach()


def largest(scores: Tensor, count: int) -> Tensor:
    """Return [count] long, the places of the largest scores [P] in ascending order; of equal ones the first.

    The places for a smaller count are among those for a larger one.
    """
    return scores.argsort(descending=True, stable=True)[:count].sort().values


__all__ = ["MOST_TASKS", "Guard", "OwnershipMask", "Snapshot", "SparseDelta", "largest"]
