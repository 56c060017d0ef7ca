"""Additive decomposition of a task's weights into gated shared weights and a sparse task-specific part.

Source: APD (Yoon et al., ICLR 2020, arXiv 1902.09432). Symbols: a layer has shared weights sigma [m, ...] for m
outputs. A task has a gate sigmoid(v) [m], one number per output, and a task-specific part tau in the shape of sigma.
Its weight is theta = sigma * gate + tau. The tasks of one group may have a common part tau~ in the shape of sigma,
which is stored once and added to theta.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clrun.blocks.low_rank import Layer

KMEANS_ROUNDS = 100  # most iterations of k-means


class Additive(nn.Module):
    """A linear or convolutional layer of a task with the weight theta; each task has its own bias.

    In eval mode entries of tau and tau~ with absolute values up to `threshold`, and gates up to `gate_threshold`, are
    replaced by 0. The attributes `weight` and `bias` are those of the task, for code that reads them instead of calling
    the layer.

    Args:
        layer: the task's layer; its weight is sigma, the same tensor for all tasks.
        logits: v [m].
        threshold: largest absolute value of an entry of tau or tau~ that counts as 0.
        gate_threshold: largest gate that counts as 0.
    """

    common: nn.Parameter | None

    def __init__(self, layer: Layer, *, logits: Tensor, threshold: float, gate_threshold: float) -> None:
        super().__init__()
        self.layer = layer
        self.logits = nn.Parameter(logits)
        self.own = nn.Parameter(layer.weight.detach().clone())
        self.register_parameter("common", None)
        self.threshold, self.gate_threshold = threshold, gate_threshold

    def theta(self) -> Tensor:
        """Return theta [m, ...] without thresholds, as used in training."""
        total: Tensor = self.layer.weight * self._shaped(self.logits.sigmoid()) + self.own
        return total if self.common is None else total + self.common

    @property
    def weight(self) -> Tensor:
        """The weight theta [m, ...], with thresholds in eval mode and without them in training mode."""
        if self.training:
            return self.theta()
        gate = sparse(self.logits.sigmoid(), self.gate_threshold)
        total: Tensor = self.layer.weight * self._shaped(gate) + sparse(self.own, self.threshold)
        return total if self.common is None else total + sparse(self.common, self.threshold)

    @property
    def bias(self) -> Tensor | None:
        """The bias [m] of the task, or None."""
        bias: Tensor | None = self.layer.bias
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the layer for its input x, with theta as weight."""
        if isinstance(self.layer, nn.Conv2d):
            convolved: Tensor = self.layer._conv_forward(x, self.weight, self.bias)
            return convolved
        return F.linear(x, self.weight, self.bias)

    def _shaped(self, gate: Tensor) -> Tensor:
        """Return the gate [m] in the shape [m, 1, ...], which multiplies the rows of the weight."""
        return gate.view(-1, *(1,) * (self.layer.weight.dim() - 1))


def sparse(values: Tensor, threshold: float) -> Tensor:
    """Return `values` with entries of absolute value up to `threshold` set to 0."""
    return torch.where(values.abs() > threshold, values, torch.zeros_like(values))


def additive_layers(network: nn.Module) -> dict[str, Additive]:
    """Return all `Additive` layers of `network` by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, Additive)}


def consolidate(layers: Sequence[Additive], groups: Sequence[int], *, gap: float) -> None:
    """Move the entries on which the task-specific parts of a group agree into a common part that is stored once.

    Where the entries of tau of all tasks of a group differ by at most `gap`, tau~ becomes the middle of their range,
    and their tau becomes 0. No weight changes by more than gap / 2. Earlier common parts are first added back to tau. A
    group of one task has no common part.

    Args:
        layers: one layer per task, all with the same sigma.
        groups: the group of each task.
        gap: beta of the paper.
    """
    fold(layers)
    for group in set(groups):
        members = [layer for layer, g in zip(layers, groups, strict=True) if g == group]
        if len(members) == 1:
            continue
        parts = torch.stack([layer.own.detach() for layer in members])
        highest, lowest = parts.amax(dim=0), parts.amin(dim=0)
        agreed = highest - lowest <= gap
        common = nn.Parameter(torch.where(agreed, (highest + lowest) / 2, 0.0), requires_grad=False)
        for layer in members:
            layer.own.detach().masked_fill_(agreed, 0.0)
            layer.common = common


def fold(layers: Sequence[Additive]) -> None:
    """Add the common parts tau~ back to the task-specific parts tau, and drop them."""
    for layer in layers:
        if layer.common is not None:
            layer.own.detach().add_(layer.common)
            layer.common = None


def cluster(rows: Tensor, count: int, *, before: Sequence[int]) -> list[int]:
    """Return the group of each row by k-means, without random numbers.

    The first centroids are the means of the groups of an earlier clustering. Further centroids are chosen one by one:
    each is the row farthest from its nearest centroid so far.

    Args:
        rows: [N, P].
        count: number of groups; at most N are used.
        before: groups of the first rows in an earlier clustering; empty if there was none.
    """
    earlier = torch.tensor(before, dtype=torch.long, device=rows.device)
    centroids = [rows[: len(before)][earlier == group].mean(dim=0) for group in sorted(set(before))][:count]
    if not centroids:
        centroids.append(rows[0])
    while len(centroids) < min(count, len(rows)):
        centroids.append(rows[_distances(rows, torch.stack(centroids)).amin(dim=1).argmax()])
    means = torch.stack(centroids)
    groups = torch.full((len(rows),), -1, device=rows.device)
    for _ in range(KMEANS_ROUNDS):
        nearest = _distances(rows, means).argmin(dim=1)
        if torch.equal(nearest, groups):
            break
        groups = nearest
        for group in sorted(set(groups.tolist())):
            means[group] = rows[groups == group].mean(dim=0)
    found: list[int] = groups.tolist()
    return found


def _distances(rows: Tensor, centroids: Tensor) -> Tensor:
    """Return the squared distances [N, K] between rows [N, P] and centroids [K, P].

    They are sums of squared differences, not differences of inner products: rows of nearly equal tasks would cancel.
    """
    return torch.stack([(rows - centroid).square().sum(dim=1) for centroid in centroids], dim=1)


__all__ = ["Additive", "additive_layers", "cluster", "consolidate", "fold", "sparse"]
