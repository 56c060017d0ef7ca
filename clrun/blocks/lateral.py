"""Lateral connections: blocks of one network that read the same blocks of another, through hooks.

A pass of the other network with a `Note` at each block keeps what the blocks put out; in a pass of the first one
`Reads` adds to each block what its adaptor makes of that (progress & compress, Schwarz et al., ICML 2018).
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clrun.blocks.inject import Injector, Plan
from clrun.blocks.params import eval_mode


class Lateral(nn.Module):
    """alpha * U relu(V h + c), for h with its channels in dimension 1 of four, or else in the last.

    Args:
        width: channels.
        bottleneck: r.
        largest: alpha begins uniform in [0, largest].
    """

    def __init__(self, width: int, bottleneck: int, largest: float) -> None:
        super().__init__()
        down, up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width, bias=False)
        self.down, self.shift, self.up = down.weight, down.bias, up.weight
        self.alpha = nn.Parameter(torch.rand(width) * largest)

    def forward(self, h: Tensor) -> Tensor:
        """Return the same shape as h."""
        last = h.movedim(1, -1) if h.dim() == 4 else h
        out: Tensor = self.alpha * F.linear(F.linear(last, self.down, self.shift).relu(), self.up)
        return out.movedim(-1, 1) if h.dim() == 4 else out


class Note(nn.Module):
    """Hands on what it is given, and keeps it."""

    def forward(self, h: Tensor) -> Tensor:
        """Return h."""
        self.seen = h
        return h


class Reads(nn.Module):
    """What an adaptor makes of another network's block, whatever passes here.

    Args:
        adaptor: of the block.
        other: output of the other network's block.
    """

    def __init__(self, adaptor: nn.Module, other: Tensor) -> None:
        super().__init__()
        self.adaptor, self.other = adaptor, other

    def forward(self, h: Tensor) -> Tensor:
        """Return what is added to h."""
        added: Tensor = self.adaptor(self.other)
        return added


def block_widths(backbone: nn.Module, x: Tensor) -> dict[str, int]:
    """Return the number of channels that each block of a backbone puts out, by path.

    Blocks are those of a transformer, or the layers with weight matrices in the order of a convolutional network (its
    `layers`, or itself).

    Args:
        backbone: not changed.
        x: [1, ...] prepared row to look with.
    """
    notes: dict[str, Any] = {path: Note() for path in block_paths(backbone)}
    with torch.no_grad(), eval_mode(backbone), Injector().use(backbone, Plan(scaled=notes)):
        backbone(x)
    return {path: note.seen.shape[1 if note.seen.dim() == 4 else -1] for path, note in notes.items()}


def block_paths(backbone: nn.Module) -> Iterator[str]:
    """Yield the path of each block."""
    for home in ("blocks", "layers", ""):
        module = getattr(backbone, home, None) if home else backbone
        if isinstance(module, nn.Module) and (not home or isinstance(module, nn.Sequential | nn.ModuleList)):
            for name, child in module.named_children():
                if any(p.dim() > 1 for p in child.parameters()):
                    yield f"{home}.{name}" if home else name
            return


__all__ = ["Lateral", "Note", "Reads", "block_paths", "block_widths"]
