"""Kronecker factors of linear and convolutional layers from their inputs and the gradients at their outputs.

A layer that is applied to R positions of a row (tokens, patches) shares its weight among them. There are two
factorisations for such a layer (Eschenhagen et al., NeurIPS 2023, arXiv 2311.00636): "expand" treats positions as
independent, "reduce" aggregates the positions of a row before the outer products.

Shapes: `B` rows of a batch, `R` positions, `I` inputs (including the constant 1 if the bias is trained), `O` outputs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from clrun.learning.heads import GrowingHead

Sharing = Literal["expand", "reduce"]
Groups = Literal["skip", "average"]
Layer = nn.Linear | nn.Conv2d | GrowingHead


def layers_of(
    module: nn.Module, *, modules: Sequence[str] = ("*",), largest: int | None = None, groups: Groups = "skip"
) -> dict[str, Layer]:
    """Return the linear layers (including growing heads) and convolutions with a trainable weight, by name.

    Args:
        module: the module whose submodules are searched, at any depth.
        modules: shell-style patterns; a layer's name must match at least one.
        largest: largest number of inputs and of outputs of a layer; None for no limit.
        groups: "skip" leaves out convolutions with several groups, "average" treats the groups as positions.
    """
    found: dict[str, Layer] = {}
    for name, layer in module.named_modules():
        # The type is compared exactly because a subclass may compute something else.
        if type(layer) in (nn.Linear, nn.Conv2d, GrowingHead) and any(fnmatchcase(name, p) for p in modules):
            assert isinstance(layer, Layer)
            grouped = isinstance(layer, nn.Conv2d) and layer.groups > 1 and groups == "skip"
            if layer.weight.requires_grad and not grouped and (largest is None or max(sides(layer)) <= largest):
                found[name] = layer
    return found


def has_bias(layer: Layer) -> bool:
    """Return whether the layer has a trainable bias."""
    return layer.bias is not None and layer.bias.requires_grad


def sides(layer: Layer) -> tuple[int, int]:
    """Return the numbers O of outputs and I of inputs."""
    return len(layer.weight), prod(layer.weight.shape[1:]) + has_bias(layer)


def inputs(layer: Layer, x: Tensor, rows: int) -> Tensor:
    """Return the inputs [B, R, I] of a layer called with x: the vectors that [W, b] multiplies at each position.

    Args:
        layer: the layer; the groups of a convolution are further positions.
        x: the argument of the call.
        rows: B.
    """
    x = x.to(layer.weight.dtype)
    if isinstance(layer, nn.Conv2d):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        patches = F.unfold(x, layer.kernel_size, layer.dilation, stride=layer.stride)
        x = patches.transpose(1, 2).reshape(rows, -1, patches.shape[1] // layer.groups)
    x = x.reshape(rows, -1, x.shape[-1])
    return F.pad(x, (0, 1), value=1.0) if has_bias(layer) else x


def outputs(layer: Layer, grad: Tensor, rows: int) -> Tensor:
    """Return the gradients [B, R, O] at each position, from the gradient at the output of the layer.

    Args:
        layer: the layer.
        grad: in the shape of the output.
        rows: B.
    """
    grad = grad.to(layer.weight.dtype)
    grad = grad.flatten(2).transpose(1, 2) if isinstance(layer, nn.Conv2d) else grad
    return grad.reshape(rows, -1, grad.shape[-1])


def inner_sum(x: Tensor, sharing: Sharing) -> Tensor:
    """Return the sum [I, I] over rows n of A_n, from inputs a [B, R, I].

    "expand": A_n is the mean over positions of a a'. "reduce": A_n is the outer product of the mean of a.
    """
    if sharing == "reduce":
        x = x.mean(dim=1)
        return x.T @ x
    flat = x.flatten(0, 1)
    return flat.T @ flat / x.shape[1]


def outer_sum(grad: Tensor, sharing: Sharing) -> Tensor:
    """Return the sum [O, O] over rows n of G_n, from gradients d [B, R, O].

    "expand": G_n is the sum over positions of d d'. "reduce": G_n is the outer product of the sum of d.
    """
    flat = grad.sum(dim=1) if sharing == "reduce" else grad.flatten(0, 1)
    return flat.T @ flat


@dataclass
class Tape:
    """A recording of the layer calls in the last forward pass of a network.

    Attributes:
        layers: the recorded layers by name.
        calls: by layer name, the input of each call and the place of its output in the autograd graph. Layers that were
            not called, or whose output depends on no trainable parameter, are missing.
        training: only calls of layers in this mode (training or evaluation) are recorded.
        on: whether calls are recorded at present.
    """

    layers: Mapping[str, Layer]
    training: bool = False
    calls: dict[str, list[tuple[Tensor, GradientEdge]]] = field(default_factory=dict)
    on: bool = True

    @contextmanager
    def recording(self) -> Iterator["Tape"]:
        """Record the calls of the layers within the `with` block; the record is dropped at its end."""
        handles = [layer.register_forward_hook(self._hook(name)) for name, layer in self.layers.items()]
        try:
            yield self
        finally:
            self.calls.clear()
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        """Return the forward hook that records the calls of the layer with this name."""

        def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if self.on and module.training == self.training and output.requires_grad:
                # Not the output itself: an in-place activation would make it refer to a later place in the graph.
                self.calls.setdefault(name, []).append((args[0].detach(), get_gradient_edge(output)))

        return record

    def inner(self, sharing: Sharing, rows: int) -> dict[str, Tensor]:
        """Return the sum of A_n over rows n by layer name; several calls of one layer count as further positions.

        Args:
            sharing: see `inner_sum`.
            rows: B.
        """
        found = {}
        for name, calls in self.calls.items():
            parts = [inputs(self.layers[name], x, rows) for x, _ in calls]
            found[name] = inner_sum(torch.cat(parts, dim=1) if len(parts) > 1 else parts[0], sharing)
        return found

    def outer(self, values: Tensor, directions: Tensor, sharing: Sharing, *, keep: bool) -> dict[str, Tensor]:
        """Return the sum of G_n over rows n by layer name, for the gradient of sum(values * directions).

        Args:
            values: [B, C], the output of the network.
            directions: [B, C].
            sharing: see `outer_sum`.
            keep: whether to keep the autograd graph for another call.
        """
        edges = [edge for calls in self.calls.values() for _, edge in calls]
        grads = iter(torch.autograd.grad(values, edges, directions, retain_graph=keep, allow_unused=True))
        found = {}
        for name, calls in self.calls.items():
            parts = [g for g in (next(grads) for _ in calls) if g is not None]
            parts = [outputs(self.layers[name], g, len(values)) for g in parts]
            if parts:
                found[name] = outer_sum(torch.cat(parts, dim=1) if len(parts) > 1 else parts[0], sharing)
        return found
