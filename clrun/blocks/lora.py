"""Low-rank updates of linear layers beside frozen weights (LoRA, Hu et al., ICLR 2022, arXiv 2106.09685).

An update is a module whose output is added to that of a linear layer for the same input x: scale * B A x, where A is
always the map down and B the map up. `Plan.parallel` of `clrun.blocks.inject` adds it during a pass; the layer itself
is never changed. B begins at 0, so that a new update does nothing.

Shapes: `r` rank, `D` width, `m` outputs and `n` inputs of a layer.
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Protocol, Self, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clrun.system.errors import ConfigError


@runtime_checkable
class Update(Protocol):
    """An update of a linear layer that can be written as a change to its weight."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return the change of the output [..., m] for the input x [..., n]."""

    def delta(self) -> Tensor:
        """Return the change [m, n] to the weight that has the same effect."""


class LinearLoRA(nn.Module):
    """The update scale * B A x of one linear layer; on the fused `qkv` it is one pair for queries, keys and values.

    A begins as in `nn.Linear` (uniform, 1/sqrt(n)), B at 0.

    Args:
        inputs: n.
        outputs: m.
        rank: r; A is [r, n], B is [m, r].
        scale: constant factor.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, *, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Parameter(torch.empty(rank, inputs))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)
        self.up = nn.Parameter(torch.zeros(outputs, rank))

    @classmethod
    def beside(cls, layer: nn.Linear, rank: int, *, scale: float = 1.0) -> Self:
        """Return a new update for a linear layer."""
        return cls(layer.in_features, layer.out_features, rank, scale=scale)

    def trains(self, *, down: bool, up: bool) -> Self:
        """Choose which of A and B is trained."""
        self.down.requires_grad_(down)
        self.up.requires_grad_(up)
        return self

    @torch.no_grad()
    def align_with(self, weight: Tensor) -> None:
        """Set A to the first r right singular vectors of `weight` [m, n], computed in float64.

        Their signs are those of the library. They have no effect: if a row of A changes its sign, the column of B that
        belongs to it is trained to the other sign.
        """
        rows = torch.linalg.svd(weight.detach().double(), full_matrices=False).Vh
        self.down.copy_(rows[: len(self.down)])

    def forward(self, x: Tensor) -> Tensor:
        """Return the change of the output [..., m] for the input x [..., n]."""
        return F.linear(self.scale * F.linear(x, self.down), self.up)  # scaled where there are r numbers, not m

    def delta(self) -> Tensor:
        """Return the change [m, n] to the weight that has the same effect."""
        return self.scale * (self.up @ self.down)


class QkvLoRA(nn.Module):
    """Updates of some of the queries, keys and values in a fused `qkv` [3 D, D], each with an A and a B of its own.

    Args:
        width: D.
        rank: r; for each part A is [r, D] and B is [D, r].
        parts: which of "q", "k" and "v" are updated, in this order; the others stay as they are.
        learn_scale: whether there is a trained factor per part, which begins at 1.
    """

    def __init__(self, width: int, rank: int, parts: str, *, learn_scale: bool = False) -> None:
        super().__init__()
        self.parts = parts
        self.down = nn.Parameter(torch.empty(len(parts), rank, width))
        for part in self.down:
            nn.init.kaiming_uniform_(part, a=5**0.5)
        self.up = nn.Parameter(torch.zeros(len(parts), width, rank))
        self.scale: nn.Parameter | None
        self.register_parameter("scale", nn.Parameter(torch.ones(len(parts))) if learn_scale else None)

    def forward(self, x: Tensor) -> Tensor:
        """Return the change to the output of `qkv` [..., 3 D] for its input x [..., D]."""
        found = {part: self._scaled(k, F.linear(F.linear(x, self.down[k]), self.up[k])) for k, part in self._numbered}
        zero = torch.zeros_like(next(iter(found.values())))
        return torch.cat([found.get(part, zero) for part in "qkv"], dim=-1)

    def delta(self) -> Tensor:
        """Return the change [3 D, D] to the weight of `qkv` that has the same effect."""
        found = {part: self._scaled(k, self.up[k] @ self.down[k]) for k, part in self._numbered}
        zero = torch.zeros_like(next(iter(found.values())))
        return torch.cat([found.get(part, zero) for part in "qkv"])

    @property
    def _numbered(self) -> list[tuple[int, str]]:
        return list(enumerate(self.parts))

    def _scaled(self, number: int, change: Tensor) -> Tensor:
        return change if self.scale is None else self.scale[number] * change


class Summed(nn.Module):
    """The sum of several updates of one layer, computed as one update of their ranks together.

    sum_i g_i B_i A_i = [g_1 B_1 ... g_t B_t] [A_1; ...; A_t] takes two products instead of two per update. Updates of
    earlier tasks are frozen by `freeze`.

    Args:
        updates: updates of the same layer.
        gains: g_i, one factor per update, which may be parameters; None for 1.
    """

    def __init__(self, updates: Sequence[LinearLoRA], gains: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.updates = nn.ModuleList(updates)
        self.gains = [torch.ones(())] * len(updates) if gains is None else list(gains)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return the maps down [sum of ranks, n] and up [m, sum of ranks], with scales and gains in the map up."""
        parts: list[LinearLoRA] = list(self.updates)  # type: ignore[arg-type]
        up = [gain.to(part.up) * part.scale * part.up for gain, part in zip(self.gains, parts, strict=True)]
        return torch.cat([part.down for part in parts]), torch.cat(up, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the change of the output [..., m] for the input x [..., n]."""
        down, up = self._factors()
        return F.linear(F.linear(x, down), up)

    def delta(self) -> Tensor:
        """Return the change [m, n] to the weight that has the same effect."""
        down, up = self._factors()
        return up @ down


def merged(network: nn.Module, updates: Mapping[str, Update]) -> nn.Module:
    """Return a copy of `network` whose weights contain the updates; outputs agree to rounding.

    Args:
        network: it is not changed.
        updates: by path of the linear layer.
    """
    result = copy.deepcopy(network)
    with torch.no_grad():
        for path, update in updates.items():
            weight = result.get_submodule(path).weight
            assert isinstance(weight, Tensor)
            weight += update.delta().to(weight)
    return result


def linear_at(network: nn.Module, path: str, method: str) -> nn.Linear:
    """Return the linear layer at a path.

    Args:
        network: the backbone.
        path: as in `nn.Module.get_submodule`.
        method: name of the method, for the message.

    Raises:
        ConfigError: there is none.
    """
    layer: nn.Module | None = None
    with suppress(AttributeError):
        layer = network.get_submodule(path)
    if isinstance(layer, nn.Linear):
        return layer
    found = "no layer" if layer is None else f"a {type(layer).__name__}"
    raise ConfigError(
        f"backbone: {method} needs a linear layer {path}, but {type(network).__name__} has {found} there; "
        "use the backbones vit_*, glyph_vit or timm with a VisionTransformer"
    )


__all__ = ["LinearLoRA", "QkvLoRA", "Summed", "Update", "linear_at", "merged"]
