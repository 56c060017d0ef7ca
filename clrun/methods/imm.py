"""IMM: the mean or the mode of the mixture of all tasks' posteriors (Lee et al., NeurIPS 2017, arXiv 1703.08475).

Memory between tasks, with P the parameters of the backbone: matching=mean one sum of P entries, matching=mode two; each
entry takes 4 bytes with sums=single and 8 to 16 with sums=exact. With transfer of any kind the last trained weights, 4
P bytes; with weight_transfer=false the initial ones, 4 P bytes. Task id: not needed.

Verified: without transfer it is `merge` with rule=imm_mean or imm_mode, dropped units compute with the last weights
and the expectation of a unit is its own, and the L2 transfer is `l2` with twice the strength (test_methods_merging).
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from clrun.blocks.curvature import Identity, Labels, QuadraticPenalty
from clrun.blocks.curvature.layers import layers_of
from clrun.blocks.merging import Evidence, ImmMean, ImmMode
from clrun.blocks.params import Params, clone, select, shapes_of
from clrun.data.split import Batch
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.knobs import Knob
from clrun.learning.losses import Compete
from clrun.methods.merged import Merged, Sums
from clrun.system.errors import Fraction, NonNegative, PositiveInt


class Imm(Merged):
    """Train a chain of networks with transfer from one to the next; predict with the moment of their mixture.

    The chain is never merged: task t starts from the weights theta_(t-1) as trained. Deviation: L2 and drop transfer
    begin with the second task; the published code uses 0 as the weights before the first one, which would destroy
    pre-trained weights.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        matching: "mean" (equation 3) or "mode" (equation 8, weighted by the diagonal Fisher information plus 1e-8).
        alpha: weight of the newest network, that of the others being (1 - alpha) / (t - 1) each; None for 1 / t.
        weight_transfer: start from theta_(t-1); otherwise from the initial weights.
        l2_transfer: lambda of the penalty lambda |theta - theta_(t-1)|^2 in the loss (no factor 1/2).
        drop_transfer: p. In every step each unit of a linear layer or channel of a convolution uses theta_(t-1) with
            probability p, for a whole image, and otherwise theta / (1 - p) - p / (1 - p) theta_(t-1), so that its
            expectation is that of theta: dropout around theta_(t-1) instead of around 0.
        modules: patterns for the parameters that are trained and merged, see `Merged`.
        labels: how the labels of the Fisher information are chosen, see `clrun.blocks.curvature.estimate`.
        samples: number of rows of the task for the Fisher information; None for all.
        sums: how sums are stored, "exact" or "single"; see `Merged`.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    knobs = (Knob("l2_transfer"),)
    samples_names = True

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        matching: Literal["mean", "mode"],
        alpha: Fraction | None,
        weight_transfer: bool,
        l2_transfer: NonNegative,
        drop_transfer: Fraction,
        modules: list[str],
        labels: Labels,
        samples: PositiveInt | None,
        sums: Sums,
        compete: Compete,
    ) -> None:
        super().__init__(
            backbone,
            num_classes,
            rule=ImmMean() if matching == "mean" else ImmMode(),
            train_from="previous" if weight_transfer else "initial",
            modules=modules,
            labels=labels,
            samples=samples,
            sums=sums,
            compete=compete,
        )
        self.alpha, self.l2_transfer, self.drop_transfer = alpha, l2_transfer, drop_transfer
        self.hooks_backbone = drop_transfer > 0
        self.kept: Params = {}  # theta_(t-1), as trained, where `start` does not hold it
        self.transfer = QuadraticPenalty(0.0)  # around theta_(t-1), during a task
        transfers = l2_transfer > 0 or drop_transfer > 0
        self.order_invariant = self.order_invariant and not transfers and alpha is None

    @property
    def last(self) -> Params:
        """theta_(t-1) by name, as trained; empty before the second task."""
        return self.start if self.train_from == "previous" else self.kept

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        self.transfer = QuadraticPenalty(0.0)
        self.kept = {name: value.to(ctx.hardware.device) for name, value in self.kept.items()}

    def end_task(self, task: Task, ctx: Context) -> None:
        self.transfer = QuadraticPenalty(0.0)
        super().end_task(task, ctx)

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        last = self.last
        with dropped_to(last, self.backbone, self.drop_transfer if last else 0.0):
            loss = super().loss(batch, ctx)
        if not last or not self.l2_transfer:
            return loss
        if not self.transfer.shapes:
            self.transfer.anchor_at(last, Identity(shapes_of(select(self.backbone))))
        total: Tensor = loss + 2 * self.l2_transfer * self.transfer(self.backbone)
        return total

    def merge(self, trained: Mapping[str, Tensor], found: Evidence, task: Task) -> Params:
        """Add the trained network, and return the moment of the mixture with the weight `alpha` of the newest one."""
        if self.train_from == "initial" and (self.l2_transfer or self.drop_transfer):
            self.kept = clone(trained)
        if self.alpha is None or not self.rule.models:
            return super().merge(trained, found, task)
        if self.alpha == 1:
            self.rule.add(trained, found, key=task.id)
            return clone(trained)
        weighted = copy.deepcopy(self.rule)
        weighted.add(trained, found, weight=self.alpha * self.rule.models / (1 - self.alpha))
        self.rule.add(trained, found, key=task.id)
        return weighted.value(trained)


@contextmanager
def dropped_to(last: Params, module: nn.Module, rate: float) -> Iterator[None]:
    """Let each unit of the module's layers use the weights `last` with probability `rate` within the block.

    Args:
        last: parameters of the module by name.
        module: the module; its linear layers and convolutions take part.
        rate: p; 0 changes nothing.
    """
    handles = []
    for name, layer in layers_of(module, groups="average").items() if rate else ():
        weight, bias = last[f"{name}.weight"], last.get(f"{name}.bias")
        handles.append(layer.register_forward_hook(partial(_dropped, weight=weight, bias=bias, rate=rate)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _dropped(layer: Any, args: tuple[Tensor, ...], output: Tensor, *, weight: Tensor, bias: Any, rate: float) -> Tensor:
    """Return the output of a layer with some units replaced by those of earlier weights, and the others scaled up."""
    if isinstance(layer, nn.Conv2d):
        before = layer._conv_forward(args[0], weight, bias)
        units = output.new_ones(len(output), output.shape[1], 1, 1)
    else:
        before = F.linear(args[0], weight, bias)
        units = output.new_ones(len(output), *[1] * (output.dim() - 2), output.shape[-1])
    dropped: Tensor = before + F.dropout(units, rate) * (output - before)
    return dropped
