"""Weights of a task as shared weights behind a gate plus a sparse part of its own, and what such parts have in common.

Source: APD (Yoon et al., ICLR 2020, arXiv 1902.09432). Symbols: a layer has shared weights sigma [m, ...], and for
each task a gate sigmoid(v) [m], one number an output, and tau of the shape of sigma: theta = sigma * gate + tau. Tasks
of one group also share tau~, stored once, which is added.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clrun.blocks.low_rank import Layer

KMEANS_ROUNDS = 100


class Additive(nn.Module):
    """A linear or convolution layer of a task with weight theta; the bias is the task's own.

    In eval mode entries of tau and tau~ up to `threshold` count as 0, and so does a gate up to `gate_threshold`. Code
    that reads `weight` and `bias` instead of calling the layer finds those of the task.

    Args:
        layer: the task's own layer; its weight is sigma, the same object for all tasks.
        logits: v [m].
        threshold: of entries of tau and tau~, absolute values.
        gate_threshold: of the gate.
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
        """Return the weight [m, ...] as training sees it."""
        total: Tensor = self.layer.weight * self._shaped(self.logits.sigmoid()) + self.own
        return total if self.common is None else total + self.common

    @property
    def weight(self) -> Tensor:
        """The weight [m, ...] of the current mode."""
        if self.training:
            return self.theta()
        gate = sparse(self.logits.sigmoid(), self.gate_threshold)
        total: Tensor = self.layer.weight * self._shaped(gate) + sparse(self.own, self.threshold)
        return total if self.common is None else total + sparse(self.common, self.threshold)

    @property
    def bias(self) -> Tensor | None:
        """[m], the task's own."""
        bias: Tensor | None = self.layer.bias
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer with this weight returns."""
        if isinstance(self.layer, nn.Conv2d):
            convolved: Tensor = self.layer._conv_forward(x, self.weight, self.bias)
            return convolved
        return F.linear(x, self.weight, self.bias)

    def _shaped(self, gate: Tensor) -> Tensor:
        """Return [m] so that it multiplies the rows of the weight."""
        return gate.view(-1, *(1,) * (self.layer.weight.dim() - 1))


def sparse(values: Tensor, threshold: float) -> Tensor:
    """Return `values` with entries of absolute value up to `threshold` set to 0."""
    return torch.where(values.abs() > threshold, values, torch.zeros_like(values))


def additive_layers(network: nn.Module) -> dict[str, Additive]:
    """Return the `Additive` layers of `network` by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, Additive)}


def consolidate(layers: Sequence[Additive], groups: Sequence[int], *, gap: float) -> None:
    """Give the tasks of each group what their parts agree on, stored once; no weight moves by more than gap / 2.

    Entries of tau that differ by at most `gap` within a group become the middle of their range, in tau~. What was
    shared before is first put back. A group of one keeps its tau.

    Args:
        layers: one layer of each task.
        groups: the group of each task.
        gap: beta.
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
    """Put what tasks share back into their own parts."""
    for layer in layers:
        if layer.common is not None:
            layer.own.detach().add_(layer.common)
            layer.common = None


def cluster(rows: Tensor, count: int, *, before: Sequence[int]) -> list[int]:
    """Return the group of each row by k-means (100 rounds or until nothing changes), without random numbers.

    Args:
        rows: [N, P].
        count: number of groups; at most N are used.
        before: groups of the first rows in an earlier clustering, whose means are the first centroids; further ones
            are the rows farthest from all centroids.
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
    """Return squared distances [N, K]."""
    return torch.stack([(rows - centroid).square().sum(dim=1) for centroid in centroids], dim=1)
