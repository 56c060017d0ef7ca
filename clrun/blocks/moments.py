"""Second moments of what layers read: sums of x x' over the inputs x of linear and convolutional layers.

Shapes: `I` inputs of a layer, for a convolution those of one patch; `I + 1` with the constant input of a bias.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clrun.blocks.curvature.layers import Layer, has_bias, inputs, real_of
from clrun.blocks.params import eval_mode


@dataclass(frozen=True)
class Gram:
    """The second moments of what a layer reads.

    Attributes:
        matrix: [I, I] float64, the sum over positions of x x'. If the bias is merged with the weight, x has a constant
            1 as its last entry. [G, I, I] where the G groups of a convolution are separate.
        rows: the number of positions that are summed over: images times the positions (tokens, patches) of each.
    """

    matrix: Tensor
    rows: int

    def mean(self) -> Tensor:
        """Return the second moments per position [I, I] float64."""
        return self.matrix / max(1, self.rows)


def second_moments(
    network: nn.Module,
    layers: Mapping[str, Layer],
    batches: Iterable[Tensor],
    *,
    bias: bool,
    forward: Callable[[Tensor], Any] | None = None,
    groups: Literal["average", "separate"] = "average",
) -> dict[str, Gram]:
    """Return the second moments of the inputs of layers, summed in float64 in eval mode without gradients.

    No rows are stored, and a split that is read in other batches gives the same sums to rounding. A layer that is not
    called has no entry. Padding of texts does not count (`positions` of the network, `clrun.blocks.curvature.layers`).

    Args:
        network: the network, which is not changed.
        layers: its layers to look at, by name. Convolutions read patches.
        batches: prepared inputs [B, ...].
        bias: whether a layer with a trainable bias reads a constant 1 as its last input.
        forward: the pass; None for that of the network.
        groups: "average" treats the groups of a convolution as positions; "separate" has a matrix for each of them, and
            one for a layer without groups.
    """
    found: dict[str, Gram] = {}
    positions = getattr(network, "positions", None)
    real: list[Tensor | None] = [None]  # of the rows that the network reads at present
    recorders = {
        name: _recorder(found, name, layer, bias, real, separate=groups == "separate") for name, layer in layers.items()
    }
    handles = [layer.register_forward_hook(recorders[name]) for name, layer in layers.items()]
    try:
        with torch.no_grad(), eval_mode(network), _eager(network):
            for x in batches:
                real[0] = positions(x) if callable(positions) else None
                (forward or network)(x)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _eager(network: nn.Module) -> AbstractContextManager[object]:
    """Return a context in which compiled parts of a network run as they are written: compiled code ignores hooks."""
    compiled = any(module._compiled_call_impl is not None for module in network.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _recorder(
    found: dict[str, Gram],
    name: str,
    layer: Layer,
    bias: bool,
    real: Sequence[Tensor | None],
    *,
    separate: bool,
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """Return the forward hook that adds the inputs of a call to the second moments of the layer."""
    constant = bias and has_bias(layer)

    def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs(layer, args[0].detach(), len(args[0]), constant=constant).double()
        mask = real_of(x, real[0])
        rows = x.flatten(0, 1) if mask is None else x[mask]
        width = rows.shape[1]
        if separate:  # the groups of a position follow each other
            count = int(getattr(layer, "groups", 1))
            rows = rows.view(-1, count, width).transpose(0, 1)
        if name not in found:
            found[name] = Gram(rows.new_zeros(*rows.shape[:-2], width, width), 0)
        total = found[name].matrix.add_(rows.mT @ rows) if separate else found[name].matrix.addmm_(rows.t(), rows)
        found[name] = Gram(total, found[name].rows + rows.shape[-2])

    return record


__all__ = ["Gram", "second_moments"]
