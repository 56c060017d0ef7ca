"""Lateral connections: blocks of one network that read the outputs of the same blocks of another network.

A forward pass of the other network with a `StoreOutput` at each block stores the outputs of the blocks. In a forward
pass of the first network `LateralInput` adds to each block what an adaptor computes from the stored output (Progress &
Compress, Schwarz et al., ICML 2018).
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clrun.blocks.inject import Injector, Plan
from clrun.blocks.params import eval_mode


class Lateral(nn.Module):
    """The adaptor alpha * U relu(V h + c) of a block output h.

    The channels of h are dimension 1 if h has four dimensions, and the last dimension otherwise.

    Args:
        width: number D of channels; alpha is [D].
        bottleneck: number r of hidden units; V is [r, D] and U is [D, r].
        largest: the initial values of alpha are uniform in [0, largest].
    """

    def __init__(self, width: int, bottleneck: int, largest: float) -> None:
        super().__init__()
        down, up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width, bias=False)
        self.down, self.shift, self.up = down.weight, down.bias, up.weight
        self.alpha = nn.Parameter(torch.rand(width) * largest)

    def forward(self, h: Tensor) -> Tensor:
        """Return the output of the adaptor in the shape of h."""
        last = h.movedim(1, -1) if h.dim() == 4 else h
        out: Tensor = self.alpha * F.linear(F.linear(last, self.down, self.shift).relu(), self.up)
        return out.movedim(-1, 1) if h.dim() == 4 else out


class StoreOutput(nn.Module):
    """The identity, which stores its argument as `seen`."""

    def forward(self, h: Tensor) -> Tensor:
        """Return h."""
        self.seen = h
        return h


class LateralInput(nn.Module):
    """A module for `Plan.sequential` that ignores its argument and returns what an adaptor computes.

    Args:
        adaptor: the adaptor of the block.
        other: output of the same block of the other network.
    """

    def __init__(self, adaptor: nn.Module, other: Tensor) -> None:
        super().__init__()
        self.adaptor, self.other = adaptor, other

    def forward(self, h: Tensor) -> Tensor:
        """Return the tensor to be added to the block output h, in the shape of h.

        Of texts, a network in training mode may have cut off columns that are padding in all rows, and the other
        network not: tokens [B, L, D] of another L are cut or filled up with zeros.
        """
        other = self.other
        if h.dim() == 3 and other.shape[1] != h.shape[1]:
            other = F.pad(other, (0, 0, 0, h.shape[1] - other.shape[1]))
        added: Tensor = self.adaptor(other)
        return added


def block_widths(backbone: nn.Module, x: Tensor) -> dict[str, int]:
    """Return the number of output channels of each block of a backbone, by path.

    Args:
        backbone: the backbone, which is not changed.
        x: a prepared row [1, ...] for a forward pass.
    """
    stores: dict[str, Any] = {path: StoreOutput() for path in block_paths(backbone)}
    with torch.no_grad(), eval_mode(backbone), Injector().use(backbone, Plan(scaled=stores)):
        backbone(x)
    return {path: store.seen.shape[1 if store.seen.dim() == 4 else -1] for path, store in stores.items()}


def block_paths(backbone: nn.Module) -> Iterator[str]:
    """Yield the path of each block in order.

    Blocks are the children of `blocks` (a transformer), of `layers` or of the backbone itself (a chain of layers),
    whichever exists first, if they have a parameter with more than one dimension.
    """
    for parent in ("blocks", "layers", ""):
        module = getattr(backbone, parent, None) if parent else backbone
        if isinstance(module, nn.Module) and (not parent or isinstance(module, nn.Sequential | nn.ModuleList)):
            for name, child in module.named_children():
                if any(p.dim() > 1 for p in child.parameters()):
                    yield f"{parent}.{name}" if parent else name
            return


__all__ = ["Lateral", "LateralInput", "StoreOutput", "block_paths", "block_widths"]
