"""Kronecker-factored estimates of the Fisher information of a method's layers."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from clrun.blocks.curvature.forms import Composite, Curvature
from clrun.blocks.curvature.gradients import diagonal
from clrun.blocks.curvature.kronecker import KroneckerFactored, KroneckerTable
from clrun.blocks.curvature.layers import Groups, Sharing, Tape, has_bias, layers_of, sides, tables_of
from clrun.blocks.curvature.target import Target

ROWS = 32  # rows per forward pass; the patches that a convolution sees are all in memory at once


def kronecker(
    target: Target,
    of: nn.Module,
    sharing: Sharing,
    *,
    modules: Sequence[str],
    largest: int | None,
    groups: Groups,
    tables: bool = False,
) -> Composite:
    """Return a Kronecker product per layer, and a diagonal for all other parameters; see `estimate`.

    The diagonal also covers a layer that is never called (torch's own attention reads the weight of its output layer
    without calling it) and a layer that shares its weight with an earlier one.
    """
    method_names = {name: method_name for method_name, name in target.names.items()}
    layers = layers_of(of, modules=modules, largest=largest, groups=groups)
    embeddings = tables_of(of, modules=modules, largest=largest) if tables else {}
    own = {path: [f"{path}.weight", *([f"{path}.bias"] if has_bias(layers[path]) else [])] for path in layers}
    own |= {path: [f"{path}.weight"] for path in embeddings}
    own = {path: names for path, names in own.items() if method_names.keys() >= set(names)}
    layers = {path: layer for path, layer in layers.items() if path in own}
    embeddings = {path: table for path, table in embeddings.items() if path in own}
    sums = _sums(target, Tape(layers, of, embeddings), sharing) if own else {}
    parts: list[Curvature] = []
    for path, (outer, inner) in sums.items():
        shapes = {name: tuple(target.params[method_names.pop(name)].shape) for name in own[path]}
        kind, part = (KroneckerTable, embeddings[path]) if path in embeddings else (KroneckerFactored, layers[path])
        factors = ((total / len(target.split)).to(part.weight.dtype) for total in (outer, inner))
        parts.append(kind(shapes, *factors))
    if method_names:
        others = {method_name: name for method_name, name in target.names.items() if name in method_names}
        rest = replace(target, params={name: p for name, p in target.params.items() if name in others}, names=others)
        parts.append(diagonal(rest, batched=target.columns == "batched"))
    return Composite.of(parts)


def _sums(target: Target, tape: Tape, sharing: Sharing) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the sums over the rows of G_n and of A_n, float64, of each layer and table that a forward pass calls.

    A_n of a table of embeddings is diagonal: a vector [V].
    """

    def zeros(name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        table = tape.tables.get(name)
        outer, inner = (table.embedding_dim, table.num_embeddings) if table else sides(tape.layers[name])
        shape = (inner,) if table else (inner, inner)
        totals = (torch.zeros(s, dtype=torch.float64, device=device) for s in ((outer, outer), shape))
        return next(totals), next(totals)

    totals: dict[str, tuple[Tensor, Tensor]] = {}
    with target.evaluating(), torch.enable_grad(), tape.recording():
        for batch, mask, noise in target.batches(ROWS):
            tape.calls.clear()
            logits = target.logits({}, batch.x)
            columns = target.directions(logits.detach(), batch.y, mask, noise)
            for name, part in tape.inner(sharing, len(batch)).items():
                if name not in totals:
                    totals[name] = zeros(name, part.device)
                totals[name][1].add_(part)
            for k in range(target.count if tape.calls else 0):
                for name, part in tape.outer(logits, columns[:, k], sharing, keep=k + 1 < target.count).items():
                    totals[name][0].add_(part)
    return totals


__all__ = ["kronecker"]
