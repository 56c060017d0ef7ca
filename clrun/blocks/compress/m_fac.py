"""Pruning by the empirical Fisher matrix of few gradients, across layers.

Source: M-FAC, Frantar, Kurtic and Alistarh, NeurIPS 2021, arXiv 2107.03356. The weights of the chosen layers that are
kept form one vector w, cut into consecutive blocks; each block has F = damping I + 1/m sum_i g_i g_i' of m gradients of
batches. The weights of the smallest w_i^2 / (2 [F^-1]_ii) are removed, and the others of the block move.

Deviations: `update=joint` (default) moves them to the minimiser of the quadratic model whose removed weights are all 0;
the published update adds up the moves of single removals and can be worse than none. All m gradients are used, where
the public code leaves the last row at 0.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from clrun.blocks.compress.base import Compressed, Evidence
from clrun.blocks.compress.forms import Sparse
from clrun.blocks.compress.prune import Pruner, lowest
from clrun.blocks.curvature import BlockInverse
from clrun.blocks.params import Params, eval_mode, flatten, unflatten
from clrun.data.split import Batch
from clrun.learning.losses import masked_cross_entropy
from clrun.system.errors import Positive, PositiveInt

Update = Literal["joint", "simultaneous", "none"]


def scores_of(weights: Tensor, inverse: BlockInverse) -> Tensor:
    """Return w_i^2 / (2 [F^-1]_ii) of blocks of weights [blocks, size]."""
    return weights.square() / (2 * inverse.diagonal())


def removed_from(weights: Tensor, inverse: BlockInverse, mask: Tensor, update: Update) -> Tensor:
    """Return blocks of weights [blocks, size] float64 with those of the mask set to 0 and the others moved.

    Args:
        weights: w.
        inverse: of F.
        mask: [blocks, size] bool, the weights to remove.
        update: "joint": w - [F^-1]_:S ([F^-1]_SS)^-1 w_S for the removed S. "simultaneous": the sum of the moves of
            single removals, as published. "none": no move.
    """
    moved = weights.clone()
    for number, own in enumerate(mask if update != "none" else ()):
        gone = own.nonzero()[:, 0]
        if len(gone):
            columns = inverse.block(number)[:, gone]
            square, values = columns[gone], weights[number, gone]
            amounts = torch.linalg.solve(square, values) if update == "joint" else values / square.diagonal()
            moved[number] -= columns @ amounts
    return moved.masked_fill(mask, 0.0)


@dataclass(frozen=True, kw_only=True)
class MfacPrune(Pruner):
    """Pruning by M-FAC (see the module); with scope=layer each layer loses the same share.

    Attributes:
        gradients: m; more need m floats per weight.
        batch_size: rows per gradient.
        block: weights of a block of F.
        damping: of F.
        rounds: steps in which the weights are removed, with new gradients in each; their shares of kept weights form a
            geometric sequence.
        update: how the weights that are kept move: joint, simultaneous (published) or none.
    """

    gradients: PositiveInt
    batch_size: PositiveInt
    block: PositiveInt
    damping: Positive
    rounds: PositiveInt
    update: Update

    @property
    def differentiates(self) -> bool:
        """Always: its scores are made of gradients."""
        return True

    def prune(self, gone: Mapping[str, Tensor], evidence: Evidence) -> dict[str, Compressed]:
        """Return the pruned layers."""
        weights = {name: evidence.weight(name).clone() for name in gone}
        masks = dict(gone)
        for number in range(1, self.rounds + 1):
            masks, weights = self._round(weights, masks, number, evidence)
        return {name: Compressed(Sparse(tuple(weight.shape), ~masks[name]), weight) for name, weight in weights.items()}

    def _round(
        self, weights: Params, gone: Mapping[str, Tensor], number: int, evidence: Evidence
    ) -> tuple[dict[str, Tensor], Params]:
        """Return masks of removed weights and the weights after one of the rounds."""
        kept = ~flatten(gone)
        vector = flatten(weights).double()[kept]
        rows = torch.stack([flatten(g)[kept] for g in self._gradients(weights, evidence)])
        size = min(self.block, len(vector))
        room = -len(vector) % size
        blocks = F.pad(vector, (0, room)).view(-1, size)
        inverse = BlockInverse(F.pad(rows, (0, room)).view(len(rows), -1, size).transpose(0, 1), self.damping)
        scores = torch.full((len(kept),), -1.0, dtype=torch.float64, device=vector.device)
        scores[kept] = scores_of(blocks, inverse).flatten()[: len(vector)]
        masks = self._removed_by(number, unflatten(scores, {n: tuple(w.shape) for n, w in weights.items()}), gone)
        drop = F.pad(flatten(masks)[kept], (0, room)).view(-1, size)
        moved = torch.zeros_like(scores)
        moved[kept] = removed_from(blocks, inverse, drop, self.update).flatten()[: len(vector)]
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        return masks, {name: value.float() for name, value in unflatten(moved, shapes).items()}

    def _removed_by(self, number: int, scores: Params, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return which weights are removed by the end of a round, those of `before` included."""

        def count(total: int, gone: int) -> int:
            kept, last = total - gone, min(total - gone, total - self.removed(total))
            left = self.rounds - number + 1
            share = (max(last, 1) / max(kept, 1)) ** (1 / left)
            return total - (last if left == 1 else max(last, round(kept * share)))

        if self.scope == "layer":
            return {n: lowest(s, count(s.numel(), int(before[n].sum()))) for n, s in scores.items()}
        total, gone = sum(s.numel() for s in scores.values()), sum(int(mask.sum()) for mask in before.values())
        pooled = lowest(flatten(scores), count(total, gone))
        return unflatten(pooled, {name: tuple(score.shape) for name, score in scores.items()})

    def _gradients(self, weights: Params, evidence: Evidence) -> Iterator[Params]:
        """Yield m gradients of batches at these weights, the network in eval mode."""
        names = {name: f"backbone.{name}.weight" for name in weights}
        at = {names[name]: weight.clone().requires_grad_(True) for name, weight in weights.items()}
        with eval_mode(evidence.method), torch.enable_grad():
            for batch in self._batches(evidence):
                x = evidence.ctx.hardware.layout(batch.x)
                position = (evidence.ctx.task.index,) if evidence.method.needs_task_id else ()
                logits = functional_call(evidence.method, at, (x, *position))
                loss = masked_cross_entropy(logits, batch.y, evidence.method.competing(batch.t, evidence.ctx))
                found = torch.autograd.grad(loss, list(at.values()), allow_unused=True)
                pairs = zip(weights.items(), found, strict=True)
                yield {name: torch.zeros_like(w) if g is None else g.detach() for (name, w), g in pairs}

    def _batches(self, evidence: Evidence) -> Iterator[Batch]:
        """Yield m batches, pass after pass over the rows of the task in a new order."""
        generator, count = evidence.ctx.generator("compress", "gradients"), 0
        while True:
            for batch in evidence.split.batches(self.batch_size, shuffle=generator):
                yield batch
                count += 1
                if count == self.gradients:
                    return


__all__ = ["MfacPrune", "removed_from", "scores_of"]
