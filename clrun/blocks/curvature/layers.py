"""Kronecker factors of linear and convolutional layers from their inputs and the gradients at their outputs.

A layer that sees R positions of a row (tokens, patches) shares its weight among them. Two factorisations (Eschenhagen
et al., NeurIPS 2023, arXiv 2311.00636): "expand" takes positions as independent, "reduce" adds them up first.

Shapes: `B` rows of a batch, `R` positions, `I` inputs (with the constant 1 of a trained bias), `O` outputs.
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
    """Return the linear (growing heads too) and convolutional layers of `module` with a trainable weight, by name.

    Args:
        module: searched at any depth.
        modules: patterns of the shell; a layer's name must match one.
        largest: most inputs and most outputs of a layer; None for no limit.
        groups: convolutions with several groups: "skip" leaves them out, "average" takes the groups as positions.
    """
    found: dict[str, Layer] = {}
    for name, layer in module.named_modules():
        # Subclasses may compute something else.
        if type(layer) in (nn.Linear, nn.Conv2d, GrowingHead) and any(fnmatchcase(name, p) for p in modules):
            assert isinstance(layer, Layer)
            grouped = isinstance(layer, nn.Conv2d) and layer.groups > 1 and groups == "skip"
            if layer.weight.requires_grad and not grouped and (largest is None or max(sides(layer)) <= largest):
                found[name] = layer
    return found


def has_bias(layer: Layer) -> bool:
    """Whether the layer has a bias that is trained."""
    return layer.bias is not None and layer.bias.requires_grad


def sides(layer: Layer) -> tuple[int, int]:
    """Return O and I."""
    return len(layer.weight), prod(layer.weight.shape[1:]) + has_bias(layer)


def inputs(layer: Layer, x: Tensor, rows: int) -> Tensor:
    """Return [B, R, I], what multiplies [W, b] at each position, for `rows` = B; the groups of a convolution too."""
    x = x.to(layer.weight.dtype)
    if isinstance(layer, nn.Conv2d):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        patches = F.unfold(x, layer.kernel_size, layer.dilation, stride=layer.stride)
        x = patches.transpose(1, 2).reshape(rows, -1, patches.shape[1] // layer.groups)
    x = x.reshape(rows, -1, x.shape[-1])
    return F.pad(x, (0, 1), value=1.0) if has_bias(layer) else x


def outputs(layer: Layer, grad: Tensor, rows: int) -> Tensor:
    """Return [B, R, O], the gradients at each position, for `rows` = B."""
    grad = grad.to(layer.weight.dtype)
    grad = grad.flatten(2).transpose(1, 2) if isinstance(layer, nn.Conv2d) else grad
    return grad.reshape(rows, -1, grad.shape[-1])


def inner_sum(x: Tensor, sharing: Sharing) -> Tensor:
    """Return sum_n A_n [I, I] of inputs [B, R, I]: A_n = mean_r a a', or the outer product of mean_r a."""
    if sharing == "reduce":
        x = x.mean(dim=1)
        return x.T @ x
    flat = x.flatten(0, 1)
    return flat.T @ flat / x.shape[1]


def outer_sum(grad: Tensor, sharing: Sharing) -> Tensor:
    """Return sum_n G_n [O, O] of gradients [B, R, O]: G_n = sum_r d d', or the outer product of sum_r d."""
    flat = grad.sum(dim=1) if sharing == "reduce" else grad.flatten(0, 1)
    return flat.T @ flat


@dataclass
class Tape:
    """What the layers of a network saw in the last forward pass.

    Attributes:
        layers: by name.
        calls: input, and place of the output in the graph, of each call of each layer; layers that were not called,
            or whose output depends on nothing that is trained, are missing.
        training: record layers in this mode only.
        on: whether anything is recorded.
    """

    layers: Mapping[str, Layer]
    training: bool = False
    calls: dict[str, list[tuple[Tensor, GradientEdge]]] = field(default_factory=dict)
    on: bool = True

    @contextmanager
    def recording(self) -> Iterator["Tape"]:
        """Watch the layers within the block."""
        handles = [layer.register_forward_hook(self._hook(name)) for name, layer in self.layers.items()]
        try:
            yield self
        finally:
            self.calls.clear()
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        """Return the hook of a layer."""

        def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if self.on and module.training == self.training and output.requires_grad:
                # The edge, not the tensor: an activation that works in place would move the tensor along the graph.
                self.calls.setdefault(name, []).append((args[0].detach(), get_gradient_edge(output)))

        return note

    def inner(self, sharing: Sharing, rows: int) -> dict[str, Tensor]:
        """Return sum_n A_n of each layer that was called; several calls in one pass are so many more positions."""
        found = {}
        for name, calls in self.calls.items():
            parts = [inputs(self.layers[name], x, rows) for x, _ in calls]
            found[name] = inner_sum(torch.cat(parts, dim=1) if len(parts) > 1 else parts[0], sharing)
        return found

    def outer(self, values: Tensor, directions: Tensor, sharing: Sharing, *, keep: bool) -> dict[str, Tensor]:
        """Return sum_n G_n of each layer that was called, for the gradient of sum(values * directions).

        Args:
            values: [B, C], the network's output.
            directions: [B, C].
            sharing: of positions.
            keep: keep the graph for another gradient.
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
