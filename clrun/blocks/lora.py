"""Low-rank updates of linear layers beside frozen weights (LoRA, Hu et al., ICLR 2022, arXiv 2106.09685).

An update is a module whose output is added to that of a linear layer for the same input x: scale * B A x, where A is
always the map down and B the map up. `Plan.parallel` of `clrun.blocks.inject` adds it during a pass; the layer itself
is never changed. B begins at 0, so that a new update does nothing.

Shapes: `r` rank, `D` width, `m` outputs and `n` inputs of a layer; `G` parts of the layer's outputs, each with an
update of its own: those of a fused `qkv` [3 D, D] that are updated, and 1 for any other layer. All updates have their
factors in one form, A [G, r, n] and B [G, m / parts, r] (`factors`), so that sums of updates treat them alike.
"""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
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
        dropout: probability with which an entry of x is dropped before A in training.
    """

    parts: str | None = None  # of a fused layer; this update is of the whole layer

    def __init__(self, inputs: int, outputs: int, rank: int, *, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout
        self.down = nn.Parameter(torch.empty(rank, inputs))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)
        self.up = nn.Parameter(torch.zeros(outputs, rank))

    @classmethod
    def beside(cls, layer: nn.Linear, rank: int, *, scale: float = 1.0, dropout: float = 0.0) -> Self:
        """Return a new update for a linear layer."""
        return cls(layer.in_features, layer.out_features, rank, scale=scale, dropout=dropout)

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
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return F.linear(self.scale * F.linear(x, self.down), self.up)  # scaled where there are r numbers, not m

    def delta(self) -> Tensor:
        """Return the change [m, n] to the weight that has the same effect."""
        return self.scale * (self.up @ self.down)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A [1, r, n] and B [1, m, r], which has the scale as a factor."""
        return self.down[None], (self.up if self.scale == 1 else self.scale * self.up)[None]


class QkvLoRA(nn.Module):
    """Updates of some of the queries, keys and values in a fused `qkv` [3 D, D], each with a B of its own.

    Args:
        width: D.
        rank: r; A is [G, r, D] and B is [G, D, r], where G is the number of parts.
        parts: which of "q", "k" and "v" are updated, in this order; the others stay as they are.
        scale: constant factor, or with `learn_scale` the initial one.
        learn_scale: whether there is a trained factor per part.
        share_down: one A [1, r, D] for all parts instead of one per part.
        dropout: probability with which an entry of x is dropped before A in training.
    """

    def __init__(
        self,
        width: int,
        rank: int,
        parts: str,
        *,
        scale: float = 1.0,
        learn_scale: bool = False,
        share_down: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        assert parts in PARTS, parts
        self.parts: str = parts
        self.constant, self.dropout = 1.0 if learn_scale else scale, dropout
        self.down = nn.Parameter(torch.empty(1 if share_down else len(parts), rank, width))
        for part in self.down:
            nn.init.kaiming_uniform_(part, a=5**0.5)
        self.up = nn.Parameter(torch.zeros(len(parts), width, rank))
        self.scale: nn.Parameter | None
        self.register_parameter("scale", nn.Parameter(torch.full((len(parts),), scale)) if learn_scale else None)

    def trains(self, *, down: bool, up: bool) -> Self:
        """Choose which of A and B is trained."""
        self.down.requires_grad_(down)
        self.up.requires_grad_(up)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return the change to the output of `qkv` [..., 3 D] for its input x [..., D]."""
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        inner = [F.linear(x, down) for down in self.down]
        return fused([self._scaled(k, F.linear(inner[k % len(inner)], up)) for k, up in enumerate(self.up)], self.parts)

    def delta(self) -> Tensor:
        """Return the change [3 D, D] to the weight of `qkv` that has the same effect."""
        changes = [self._scaled(k, up @ self.down[k % len(self.down)]) for k, up in enumerate(self.up)]
        return fused(changes, self.parts, dim=0)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A [G, r, D] ([1, r, D] if it is shared) and B [G, D, r], which has the scale as a factor."""
        if self.scale is not None:
            return self.down, self.scale[:, None, None] * self.up
        return self.down, self.up if self.constant == 1 else self.constant * self.up

    def _scaled(self, number: int, change: Tensor) -> Tensor:
        if self.scale is not None:
            return self.scale[number] * change
        return change if self.constant == 1 else self.constant * change


PARTS = ("q", "k", "v", "qk", "qv", "kv", "qkv")


def fused(changes: Sequence[Tensor], parts: str, *, dim: int = -1) -> Tensor:
    """Return the changes of some parts of a fused `qkv`, each of width D along `dim`, with zeros for the others."""
    found = dict(zip(parts, changes, strict=True))
    zero = None if len(found) == 3 else torch.zeros_like(changes[0])
    return torch.cat([found.get(part, zero) for part in "qkv"], dim=dim)  # type: ignore[misc]


class Summed(nn.Module):
    """The sum of several updates of one layer, computed as one update of their ranks together.

    sum_i g_i B_i A_i = [g_1 B_1 ... g_t B_t] [A_1; ...; A_t] takes two products instead of two per update. The dropout
    of the updates themselves is not used, because all of them read the same x.

    Args:
        updates: updates of the same layer and of the same parts; further ones may be appended to `updates`.
        gains: g_i, one factor [] or [G] per update, which may be parameters; None for 1. They are only referred to: a
            method that trains them has them in a list of its own.
        dropout: probability with which an entry of x is dropped before all A in training.
    """

    def __init__(
        self,
        updates: Iterable[LinearLoRA | QkvLoRA] = (),
        gains: Sequence[Tensor] | None = None,
        *,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.updates = nn.ModuleList(updates)
        self._gains, self.dropout = (gains,), dropout

    def __iter__(self) -> Iterator[LinearLoRA | QkvLoRA]:
        """Yield the updates."""
        return iter(self.updates)  # type: ignore[arg-type]

    @property
    def parts(self) -> str | None:
        """The parts of a fused layer that are updated, or None for the whole layer."""
        return next(iter(self)).parts

    def gains(self) -> Sequence[Tensor] | None:
        """Return g_i, one factor [] or [G] per update; None for 1."""
        return self._gains[0]

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A [G or 1, sum of ranks, n] and B [G, m / parts, sum of ranks], with scales and gains in B."""
        downs, ups = zip(*(update.factors() for update in self), strict=True)
        gains = self.gains()
        if gains is not None:
            ups = tuple(g.to(up).reshape(-1, 1, 1) * up for g, up in zip(gains, ups, strict=True))
        if len(downs) == 1:
            return downs[0], ups[0]
        return torch.cat(downs, dim=1), torch.cat(ups, dim=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the change of the output [..., m] for the input x [..., n]."""
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        down, up = self.factors()
        inner = F.linear(x, down.flatten(0, 1)).chunk(len(down), dim=-1)
        if self.parts is None:
            return F.linear(inner[0], up[0])
        return fused([F.linear(inner[k % len(inner)], part) for k, part in enumerate(up)], self.parts)

    def delta(self) -> Tensor:
        """Return the change [m, n] to the weight that has the same effect."""
        down, up = self.factors()
        changes = up @ down
        return changes[0] if self.parts is None else fused([*changes], self.parts, dim=0)


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


# --- where updates go

LETTERS = {"q": ("query", "q_proj", "q_lin"), "k": ("key", "k_proj", "k_lin"), "v": ("value", "v_proj", "v_lin")}
NUMBERED = re.compile(r"(?:^|\.)(?:blocks|layers|layer)\.(\d+)\.")


def sites(
    network: nn.Module, method: str, *, parts: str, layers: Sequence[str] = (), blocks: Sequence[int] | None = None
) -> dict[str, str | None]:
    """Return where a transformer gets updates: the parts of a fused `qkv`, or None for a whole layer, by its path.

    Networks without a fused `qkv` have a linear layer per part (`query`, `key` and `value`, as BERT has). The text
    tower of a network with two towers is left out.

    Args:
        network: the backbone.
        method: name of the method, for the message.
        parts: letters of "qkv" in this order, or "" for none.
        layers: shell-style patterns of the paths of further linear layers, such as "*.mlp.fc1".
        blocks: numbers of the blocks; None for all.

    Raises:
        ConfigError: the letters are others, a pattern or a number finds no layer, or nothing is left.
    """
    if parts and parts not in PARTS:
        raise ConfigError(f"method.parts: {parts!r} is none of {', '.join(PARTS)} (or '' for none)")
    usable = _in_blocks(network, blocks)
    names = {path: path.rpartition(".")[2] for path in usable}
    chosen: dict[str, str | None] = {}
    if parts:
        separate = {name for letter in parts for name in LETTERS[letter]}
        chosen = {path: parts if name == "qkv" else None for path, name in names.items() if name in {"qkv", *separate}}
        if not chosen:
            raise ConfigError(
                f"backbone: {method} needs attention with linear layers qkv, or query, key and value, but "
                f"{type(network).__name__} has none in numbered blocks; use the backbones vit_*, glyph_vit, timm with "
                "a VisionTransformer, or a text encoder, or list layers in method.layers"
            )
    for pattern in layers:
        matching = [path for path in usable if fnmatchcase(path, pattern)]
        if not matching:
            raise ConfigError(
                f"method.layers: no linear layer in a block of {type(network).__name__} has a path like '{pattern}'; "
                f"there are {', '.join(usable[:4])}, ..."
            )
        if twice := [path for path in matching if path in chosen]:
            raise ConfigError(f"method.layers: '{pattern}' names {twice[0]} a second time; leave it out of one of both")
        chosen |= dict.fromkeys(matching)
    if not chosen:
        raise ConfigError("method.parts: no layer gets an update; name parts of qkv, or layers in method.layers")
    return chosen


def _in_blocks(network: nn.Module, blocks: Sequence[int] | None) -> list[str]:
    """Return the paths of linear layers in the blocks with these numbers (None: in any), in the order of the network.

    Raises:
        ConfigError: there is no block with one of the numbers.
    """
    linear = [n for n, m in network.named_modules() if isinstance(m, nn.Linear) and not n.startswith("joint.")]
    numbers = {path: int(match[1]) for path in linear if (match := NUMBERED.search(path))}
    for block in blocks or ():
        if block not in numbers.values():
            raise ConfigError(f"method.blocks: {type(network).__name__} has no block {block} with linear layers")
    return [path for path, number in numbers.items() if blocks is None or number in blocks]


def new_update(
    network: nn.Module, path: str, parts: str | None, rank: int, *, scale: float = 1.0, share_down: bool = False
) -> LinearLoRA | QkvLoRA:
    """Return a new update of the layer at a path of `sites`.

    Args:
        network: the backbone.
        path: of the linear layer.
        parts: of a fused `qkv`; None for the whole layer.
        rank: r.
        scale: constant factor.
        share_down: one A for all parts of a fused layer.
    """
    layer = network.get_submodule(path)
    assert isinstance(layer, nn.Linear)
    if parts is None:
        return LinearLoRA.beside(layer, rank, scale=scale)
    return QkvLoRA(layer.in_features, rank, parts, scale=scale, share_down=share_down)


__all__ = [
    "PARTS",
    "LinearLoRA",
    "QkvLoRA",
    "Summed",
    "Update",
    "fused",
    "linear_at",
    "merged",
    "new_update",
    "sites",
]
