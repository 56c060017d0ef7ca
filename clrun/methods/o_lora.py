"""O-LoRA: low-rank updates of orthogonal input spaces (Wang et al., Findings of EMNLP 2023, arXiv 2310.14152).

The public code is cmnfriend/O-LoRA (MIT). Memory between tasks, of T tasks: that of `lora` with growth=per_task. Task
id: not needed.

Verified: the penalty equals values computed by hand and has no gradient for B, it is 0 for orthogonal maps, orders of
tasks and of rows do not change it, and with orthogonality=0 this is IncLoRA bit for bit (test_methods_lora).
"""

from typing import Literal

import torch
from torch import Tensor, nn

from clrun.data.split import Batch
from clrun.learning.context import Context
from clrun.learning.knobs import Knob
from clrun.learning.losses import Compete
from clrun.methods.lora import Lora
from clrun.system.errors import ConfigError, Count, Fraction, NonNegative, PositiveInt


class OLora(Lora):
    """A low-rank update per task whose input directions are pushed to be orthogonal to those of the older ones.

    h = W x + b + scale sum_(i<=t) B_i A_i x. Only A_t and B_t are trained, and at the end of a task they are frozen.

        L = L_task + lambda_1 sum over layers and i < t of |A_i A_t'|_1 + lambda_2 sum of |A_t|_F and |B_t|_F

    |.|_1 is the sum of the absolute values of all entries. This is the public code, whose gradient does not fade near
    orthogonality; penalty=squares has squares instead, as the paper is said to write it (we could not check it). The
    penalty grows with the number of layers and tasks, with r^2, and with the size of A; penalty=cosine, the mean of
    absolute cosines of rows, does not. Orthogonal rows mean that inputs within the old A's row spaces pass the new
    update unchanged; they say nothing of other inputs of old tasks.

    The method was published for texts that answer in words. Here a head is trained on the features, and the loss of a
    task is the cross-entropy over its classes. We know no settings of the authors for images.

    Args:
        backbone: a transformer with numbered blocks, frozen.
        num_classes: C.
        parts: of queries, keys and values, those with updates; see `Lora` for this and the next options.
        layers: patterns of the paths of further linear layers with updates.
        blocks: numbers of the blocks with updates; null for all.
        rank: r.
        scale: constant factor of an update; published alpha = 32 with r = 8.
        dropout: probability with which an entry of x is dropped before A in training; published 0.1.
        orthogonality: lambda_1; published 0.5 for four tasks.
        schedule: factors of lambda_1 by the position of the task; the last one holds for all further tasks. The
            published run over 15 tasks has 0 for the first task, 0.5 for the next eight and 5 for the last six.
        penalty: "sum", "squares" or "cosine"; see above.
        norm_penalty: lambda_2; published 0 for four tasks, and up to 0.3 by hand for single ones of 15.
        lr_scale: learning rate of the updates, relative to that of the budget, which is the head's.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    knobs = (Knob("orthogonality"),)

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        parts: str,
        layers: list[str],
        blocks: list[Count] | None,
        rank: PositiveInt,
        scale: float,
        dropout: Fraction,
        orthogonality: NonNegative,
        schedule: list[NonNegative],
        penalty: Literal["sum", "squares", "cosine"],
        norm_penalty: NonNegative,
        lr_scale: NonNegative,
        compete: Compete,
    ) -> None:
        super().__init__(
            backbone,
            num_classes,
            growth="per_task",
            parts=parts,
            layers=layers,
            blocks=blocks,
            rank=rank,
            scale=scale,
            dropout=dropout,
            orthogonality=orthogonality,
            penalty=penalty,
            lr_scale=lr_scale,
            compete=compete,
        )
        if not schedule:
            raise ConfigError("method.schedule: must list at least one factor")
        self.schedule, self.norm_penalty = list(schedule), norm_penalty

    def strength(self, ctx: Context) -> float:
        return self.orthogonality * self.schedule[min(ctx.task.index, len(self.schedule) - 1)]

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        loss = super().loss(batch, ctx)
        if not self.norm_penalty:
            return loss
        norms = [factor.norm() for update in self.newest().values() for factor in (update.down, update.up)]
        return loss + self.norm_penalty * torch.stack(norms).sum()
