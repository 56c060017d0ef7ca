"""Kronecker-factored estimates of the Fisher information of a learner's layers."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from clrun.blocks.curvature.forms import Composite, Curvature
from clrun.blocks.curvature.gradients import diagonal
from clrun.blocks.curvature.kronecker import KroneckerFactored
from clrun.blocks.curvature.layers import Groups, Layer, Sharing, Tape, has_bias, layers_of, sides
from clrun.blocks.curvature.target import Target

ROWS = 32  # of a forward pass: the patches of a convolution are held at once


def kronecker(
    target: Target, of: nn.Module, sharing: Sharing, *, modules: Sequence[str], largest: int | None, groups: Groups
) -> Composite:
    """Return a Kronecker product for each layer and a diagonal for every other parameter; see `estimate`.

    A layer that is bypassed (torch's own attention reads the weight of its last layer without calling it), or of which
    only a part counts, is among the others.
    """
    home = {name: key for key, name in target.names.items()}
    layers = layers_of(of, modules=modules, largest=largest, groups=groups)
    own = {name: [f"{name}.weight", *([f"{name}.bias"] if has_bias(layer) else [])] for name, layer in layers.items()}
    layers = {name: layer for name, layer in layers.items() if home.keys() >= set(own[name])}
    sums = _sums(target, layers, sharing) if layers else {}
    parts: list[Curvature] = []
    for name, (outer, inner) in sums.items():
        weight = layers[name].weight
        shapes = {n: tuple(target.params[home.pop(n)].shape) for n in own[name]}
        parts.append(KroneckerFactored(shapes, *((s / len(target.split)).to(weight.dtype) for s in (outer, inner))))
    if home:
        rest = replace(
            target,
            params={key: target.params[key] for key in target.params if target.names[key] in home},
            names={key: name for key, name in target.names.items() if name in home},
        )
        parts.append(diagonal(rest, batched=target.columns == "batched"))
    return Composite.of(parts)


def _sums(target: Target, layers: dict[str, Layer], sharing: Sharing) -> dict[str, tuple[Tensor, Tensor]]:
    """Return sum_n G_n and sum_n A_n over the rows, float64, of each layer that a forward pass calls."""

    def zeros(size: int, like: Tensor) -> Tensor:
        return torch.zeros(size, size, dtype=torch.float64, device=like.device)

    totals: dict[str, tuple[Tensor, Tensor]] = {}
    tape = Tape(layers)
    with target.still(), torch.enable_grad(), tape.recording():
        for batch, mask, noise in target.batches(ROWS):
            tape.calls.clear()
            logits = target.logits({}, batch.x)
            columns = target.directions(logits.detach(), batch.y, mask, noise)
            for name, part in tape.inner(sharing, len(batch)).items():
                if name not in totals:
                    outside, inside = sides(layers[name])
                    totals[name] = zeros(outside, part), zeros(inside, part)
                totals[name][1].add_(part)
            for k in range(target.count if tape.calls else 0):
                for name, part in tape.outer(logits, columns[:, k], sharing, keep=k + 1 < target.count).items():
                    totals[name][0].add_(part)
    return totals
