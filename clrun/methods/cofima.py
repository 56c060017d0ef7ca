"""CoFiMA: averages weighted by Fisher information (Marouf et al., ECCV 2024, arXiv 2312.08977; code IemProg/CoFiMA).

Memory between tasks: that of CoMA, and the Fisher information of the task before, 4 P bytes for the P trained
parameters of the backbone. Task id: not needed.

Verified: equal Fisher information is CoMA, averages equal values computed by hand and lie between what is averaged, and
weights 0 and 1 are the limits (test_methods_coma).
"""

from typing import Literal

import torch
from torch import nn

from clrun.blocks.gaussian import Alignment
from clrun.blocks.merging import Evidence, Interpolate, evidence_of
from clrun.blocks.params import Params, eval_mode, hold_statistics, select
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.losses import Compete, masked_cross_entropy
from clrun.learning.method import Method
from clrun.methods.coma import Coma
from clrun.system.errors import Fraction, NonNegative, Positive, PositiveInt
from clrun.system.seeding import seed_all

Fisher = Literal["exact", "sampled", "empirical", "batch_squared"]


class Cofima(Coma):
    """CoMA with coefficients per entry: alpha F theta + (1 - alpha) F_a theta_a, divided by alpha F + (1 - alpha) F_a.

    F is the diagonal of the Fisher information of the backbone after stage 1 on the task's rows, and F_a that of the
    task before, both clipped to [floor, clip]. Where neither exceeds the floor this is the average of CoMA. F_a is the
    information of one task and no sum, so that earlier tasks fade geometrically, unless accumulate=true.

    fisher=batch_squared is the public code: the mean over batches of the squared gradient of a batch's mean loss, with
    true labels, augmentation and dropout. It is smaller than the mean of the rows' squared gradients by about the batch
    size, and then clipped at 1e-4. Its cross-entropy is over all classes seen so far; that of the other kinds is
    over the classes that compete in stage 1. The other kinds are means over rows without augmentation (see
    `clrun.blocks.curvature.estimate`): clip is then best null.

    Deviations from the public code: those of `Coma`; entries without Fisher information are averaged instead of being
    0 / 0; running statistics do not change while F is estimated.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        fisher: how F is estimated: "exact" (expectation over labels), "sampled" (labels drawn from predictions),
            "empirical" (true labels), or "batch_squared".
        samples: number of rows of the estimate, drawn without replacement; null for all.
        clip: largest entry of F; null for no limit.
        floor: smallest entry of F.
        accumulate: whether F_a is the sum over all earlier tasks.
        alpha: weight of the new parameters; null for 1 / t after t tasks.
        merge_heads: whether the alignment starts from averaged heads; see `Coma`.
        backbone_lr_scale: learning rate of the backbone, relative to that of the budget; see `Slca` for this and all
            following options.
        mean_shrink: largest reduction of the means of old classes.
        alignment: options of stage 2, see `clrun.blocks.gaussian.Alignment`.
        reset_final_norm: begin with a new last normalisation, as the public code does.
        compete: classes that compete in the training loss of stage 1, see `clrun.learning.losses`.
    """

    samples_names = False  # `batch_squared` has passes in training mode

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        fisher: Fisher,
        samples: PositiveInt | None,
        clip: Positive | None,
        floor: Positive,
        accumulate: bool,
        alpha: Fraction | None,
        merge_heads: bool,
        backbone_lr_scale: NonNegative,
        mean_shrink: Fraction,
        alignment: Alignment,
        reset_final_norm: bool,
        compete: Compete,
    ) -> None:
        super().__init__(
            backbone,
            num_classes,
            alpha=alpha,
            anchor="previous",
            merge_heads=merge_heads,
            backbone_lr_scale=backbone_lr_scale,
            mean_shrink=mean_shrink,
            alignment=alignment,
            reset_final_norm=reset_final_norm,
            compete=compete,
        )
        self.fisher: Fisher = fisher
        self.samples, self.accumulate = samples, accumulate
        self.rule = Interpolate(alpha=alpha, anchor="previous", fisher=True, floor=floor, clip=clip)

    def evidence(self, task: Task, ctx: Context) -> Evidence:
        if self.fisher == "batch_squared":
            return Evidence(fisher=batch_squared(self, task, ctx, samples=self.samples))
        return evidence_of(self.rule.needs, self, task.train, ctx, labels=self.fisher, samples=self.samples)

    def combine(self, task: Task, ctx: Context) -> None:
        before = self.rule.information
        super().combine(task, ctx)
        if self.accumulate and task.index > 0:
            self.rule.information = self.rule.information + before


def batch_squared(method: Method, task: Task, ctx: Context, *, samples: int | None) -> Params:
    """Return the mean over batches of the squared gradient of a batch's mean cross-entropy, by backbone parameter.

    The batches are those of one epoch with augmentation and dropout; running statistics do not change.

    Args:
        method: the method; it is not changed.
        task: the task whose training rows are read.
        ctx: its context.
        samples: number of rows, drawn without replacement; None for all.
    """
    params, rows, order = select(method.backbone), task.train, ctx.generator("fisher")
    if samples is not None:
        rows = rows.select(torch.randperm(len(rows), generator=order)[:samples].to(rows.y.device))
    sums = {name: torch.zeros_like(p) for name, p in params.items()}
    batches = 0
    seed_all(ctx.seed, "task", task.id, "fisher")
    with eval_mode(method):
        method.train()
        hold_statistics(method)
        for batch in rows.batches(ctx.budget.batch_size, view="train", shuffle=order):
            loss = masked_cross_entropy(method(ctx.hardware.layout(batch.x)), batch.y, ctx.mask(batch.t))
            found = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
            for total, gradient in zip(sums.values(), found, strict=True):
                total += gradient.square()
            batches += 1
    return {name: total / batches for name, total in sums.items()}
