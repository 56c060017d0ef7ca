"""Finetuning: the lower bound (De Lange et al., TPAMI 2021, arXiv 1909.08383).

Memory between tasks: none. Task id: not needed.

Verified: classes out of competition keep their rows bit for bit (test_methods_others).
"""

from torch import nn

from clrun.learning.losses import Compete
from clrun.learning.method import Method


class Finetune(Method):
    """Train backbone and head on each task as it comes, by cross-entropy.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        compete: classes that compete in the training loss, see `clrun.learning.losses`. With "current" the head's rows
            of earlier classes stay untouched; otherwise class-incremental training pushes them down.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, *, compete: Compete) -> None:
        super().__init__(backbone, num_classes, compete=compete)
