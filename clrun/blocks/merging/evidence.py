"""What rules for merging measure on the rows of a task: Fisher information, second moments, running statistics."""

from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from clrun.blocks.curvature import Labels, diagonal_fisher
from clrun.blocks.curvature.layers import layers_of
from clrun.blocks.merging.base import Evidence
from clrun.blocks.moments import Gram, second_moments
from clrun.blocks.params import eval_mode
from clrun.data.split import Split
from clrun.learning.context import Context
from clrun.learning.method import Method

ROWS = 64  # rows per forward pass; the patches that a convolution reads are all in memory at once


def evidence_of(
    needs: Collection[str], method: Method, split: Split, ctx: Context, *, labels: Labels, samples: int | None
) -> Evidence:
    """Return the statistics of the method's backbone, as it is, on the rows of a task.

    Args:
        needs: of "fisher" (the diagonal, see `clrun.blocks.curvature.estimate`) and "grams".
        method: the method; it is not changed.
        split: the training rows of the task; the view without augmentation is read.
        ctx: context of the task; its generators draw the rows and the labels.
        labels: how the labels of the Fisher information are chosen.
        samples: number of rows, drawn without replacement; None for all.
    """
    fisher, grams = {}, {}
    if "fisher" in needs:
        found = diagonal_fisher(method, split, ctx, of=method.backbone, labels=labels, samples=samples)
        fisher = found.params(found.values)
    if "grams" in needs:
        if samples is not None and samples < len(split):
            rows = torch.randperm(len(split), generator=ctx.generator("grams"))[:samples]
            split = split.select(rows.to(split.y.device))
        eager: AbstractContextManager[object] = nullcontext()
        if ctx.hardware.compile:  # compiled code would not see the hooks
            eager = torch.compiler.set_stance("force_eager")
        with eager:
            grams = input_grams(method.backbone, (batch.x for batch in split.batches(ROWS)))
    return Evidence(fisher, grams)


def input_grams(module: nn.Module, batches: Iterable[Tensor]) -> dict[str, Gram]:
    """Return the second moments of the inputs of each linear and convolutional layer that a forward pass calls.

    They are summed in float64, in eval mode. A layer with a bias reads a constant 1 as its last input. Convolutions
    with several groups are left out, layers without a trainable weight, and the padding of texts, which a network with
    a method `positions` names (`clrun.blocks.curvature.layers`).

    Args:
        module: the network, which is not changed.
        batches: prepared inputs [B, ...].
    """
    return second_moments(module, layers_of(module), batches, bias=True)


def estimate_statistics(module: nn.Module, split: Split, *, size: int = 256) -> bool:
    """Estimate the running statistics of batch normalisation anew on the rows of `split`, without augmentation.

    Merged weights have activations of their own, for which no model's running statistics are right. Each statistic
    becomes the mean over the batches of rows, weighted by their sizes (`bn_update` of Izmailov et al., UAI 2018). The
    layers of batch normalisation see batches, all others are in eval mode; integer buffers stay as they are.

    Args:
        module: a network; without running statistics it is not changed.
        split: rows.
        size: rows per forward pass. A last batch of a single row is left out, because it has no variance.

    Returns:
        Whether the network has running statistics.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return False
    kept = [(norm.momentum, None if (t := norm.num_batches_tracked) is None else t.clone()) for norm in norms]
    seen = 0
    try:
        with torch.no_grad(), eval_mode(module):
            for norm in norms:
                norm.train()
            for batch in split.batches(size):
                if seen and len(batch) == 1:
                    continue
                seen += len(batch)
                for norm in norms:
                    norm.momentum = len(batch) / seen
                module(batch.x)
    finally:
        for norm, (momentum, tracked) in zip(norms, kept, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked = tracked
    return True


__all__ = ["estimate_statistics", "evidence_of", "input_grams"]
