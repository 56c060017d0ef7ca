"""Zero-shot CLIP as a continual learner (Radford et al., ICML 2021, arXiv 2103.00020; Continual-CLIP, 2210.03114).

p(k|x) = softmax_k(kappa n(g_i(x)) . w_k) with w_k = n(mean_m n(g_t(t_{k,m}))) over the templates of the data set
(`dataset.templates`).

Memory between tasks: one text row per class, 4 C d bytes. Task id: not needed.

Verified: towers and rows are the same bit for bit after a stream, AOPD is 0, and a permutation of the classes permutes
the logits (test_two_towers).
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.method import Method
from clrun.learning.names import NamesHead


class ZeroShot(Method):
    """Score images by their cosine with the texts of the class names; no image is used for training.

    Args:
        backbone: passes on features of a frozen image tower; has a `joint` space with a text tower.
        num_classes: C.
    """

    needs_text: ClassVar[bool] = True
    order_invariant = True

    def __init__(self, backbone: nn.Module, num_classes: int) -> None:
        super().__init__(backbone, num_classes)
        self.head = NamesHead(backbone, num_classes, names="fixed")

    @classmethod
    def reads_features(cls, options: Mapping[str, Any]) -> bool:
        return True

    def learn(self, task: Task, ctx: Context) -> None:
        """Learn nothing: the rows of the task's classes are known from their names."""
