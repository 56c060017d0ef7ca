"""Kronecker-factored estimates of the Fisher information of a method's layers."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from clrun.blocks.curvature.forms import Composite, Curvature
from clrun.blocks.curvature.gradients import diagonal
from clrun.blocks.curvature.kronecker import KroneckerFactored
from clrun.blocks.curvature.layers import Groups, Layer, Sharing, Tape, has_bias, layers_of, sides
from clrun.blocks.curvature.target import Target

ROWS = 32  # rows per forward pass; the patches that a convolution sees are all in memory at once


def kronecker(
    target: Target, of: nn.Module, sharing: Sharing, *, modules: Sequence[str], largest: int | None, groups: Groups
) -> Composite:
    """Return a Kronecker product per layer, and a diagonal for all other parameters; see `estimate`.

    The diagonal also covers a layer that is never called (torch's own attention reads the weight of its output layer
    without calling it) and a layer that shares its weight with an earlier one.
    """
    method_names = {name: method_name for method_name, name in target.names.items()}
    layers = layers_of(of, modules=modules, largest=largest, groups=groups)
    own = {path: [f"{path}.weight", *([f"{path}.bias"] if has_bias(layers[path]) else [])] for path in layers}
    layers = {path: layer for path, layer in layers.items() if method_names.keys() >= set(own[path])}
    sums = _sums(target, layers, sharing) if layers else {}
    parts: list[Curvature] = []
    for path, (outer, inner) in sums.items():
        shapes = {name: tuple(target.params[method_names.pop(name)].shape) for name in own[path]}
        factors = ((total / len(target.split)).to(layers[path].weight.dtype) for total in (outer, inner))
        parts.append(KroneckerFactored(shapes, *factors))
    if method_names:
        others = {method_name: name for method_name, name in target.names.items() if name in method_names}
        rest = replace(target, params={name: p for name, p in target.params.items() if name in others}, names=others)
        parts.append(diagonal(rest, batched=target.columns == "batched"))
    return Composite.of(parts)


def _sums(target: Target, layers: dict[str, Layer], sharing: Sharing) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the sums over the rows of G_n and of A_n, float64, of each layer that a forward pass calls."""

    def zeros(size: int, like: Tensor) -> Tensor:
        return torch.zeros(size, size, dtype=torch.float64, device=like.device)

    totals: dict[str, tuple[Tensor, Tensor]] = {}
    tape = Tape(layers)
    with target.evaluating(), torch.enable_grad(), tape.recording():
        for batch, mask, noise in target.batches(ROWS):
            tape.calls.clear()
            logits = target.logits({}, batch.x)
            columns = target.directions(logits.detach(), batch.y, mask, noise)
            for name, part in tape.inner(sharing, len(batch)).items():
                if name not in totals:
                    out_size, in_size = sides(layers[name])
                    totals[name] = zeros(out_size, part), zeros(in_size, part)
                totals[name][1].add_(part)
            for k in range(target.count if tape.calls else 0):
                for name, part in tape.outer(logits, columns[:, k], sharing, keep=k + 1 < target.count).items():
                    totals[name][0].add_(part)
    return totals


__all__ = ["kronecker"]
