"""Finetuning: the lower bound (De Lange et al., TPAMI 2021, arXiv 1909.08383).

Memory between tasks: none. Task id: not needed.

Verified: classes out of competition keep their rows bit for bit (test_methods_others).
"""

from typing import Literal

from torch import Tensor, nn

from clrun.data.split import Batch
from clrun.learning.context import Context
from clrun.learning.losses import masked_cross_entropy
from clrun.learning.method import Method


class Finetune(Method):
    """Train backbone and head on each task as it comes.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        heads: which classes compete in the training loss. "all": those of the setting (class-incremental: every class
            seen so far, whose rows are then pushed down). "current": those of the task alone, whatever the setting, so
            that the rows of earlier classes stay untouched.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, *, heads: Literal["all", "current"]) -> None:
        super().__init__(backbone, num_classes)
        self.heads = heads

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        mask = ctx.mask(batch.t, "til") if self.heads == "current" else ctx.mask(batch.t)
        return masked_cross_entropy(self(batch.x), batch.y, mask)
