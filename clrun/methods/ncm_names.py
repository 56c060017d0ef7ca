"""Nearest mean of names and rows: a class is the mean of the encoded name and of its training rows, on frozen features.

    p_k = (weight w_k + sum_n n(g(f_n))) / (weight + N_k),   score = cos(g(f), p_k)

over the N_k training rows of class k; w_k is the encoded name of the class (the mean over its templates) and n scales
to length 1. Without rows it is the zero-shot classifier, with weight=0 the nearest class mean of `simplecil` on unit
features. It is the floor of entity linking and of learning from few rows, where a name says as much as a row: closed
form, without hyper-parameters that are fitted, and the same in every task order.

Memory between tasks: one text row per class, 4 C d bytes; 8 d bytes of sums, 8 bytes of count and 4 d bytes of mean per
class (sums and counts once more for every task with kept task statistics). Task id: not needed.

Verified: the scores equal those computed by hand, weight=0 equals simplecil on unit features, classes without rows
score as zero_shot does, and AOPD is 0 (test_methods_ncm_names, test_methods).
"""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from clrun.blocks.statistics import ClassStats
from clrun.data.captions import Captions
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.heads import PrototypeHead
from clrun.learning.names import NamesHead
from clrun.methods.closed_form import ClosedForm
from clrun.system.errors import Count, NonNegative


class NcmNames(ClosedForm):
    """The prototype of a class is the mean of its encoded name and its rows; the score is the cosine. No training.

    Args:
        backbone: passes on features of a frozen backbone; has a `joint` space that encodes names.
        num_classes: C.
        weight: how many rows a name counts as; 0 leaves it out.
        forget_tasks: ids of tasks to unlearn at the end.
        keep_task_statistics: keep the sums of each task as well; see `ClosedForm`.
    """

    needs_text: ClassVar[bool] = True

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        weight: NonNegative,
        forget_tasks: list[Count],
        keep_task_statistics: bool,
    ) -> None:
        super().__init__(backbone, num_classes, forget_tasks=forget_tasks, keep_task_statistics=keep_task_statistics)
        self.weight = weight
        self.names = NamesHead(backbone, num_classes, names="fixed")
        self.width = self.names.joint.dim
        self.head: PrototypeHead = PrototypeHead(self.width, num_classes, metric="cosine")

    def read_names(self, captions: Captions | None) -> None:
        self.names.read(captions)

    def meet(self, classes: Tensor) -> None:
        self.names.grow(classes)
        self._place()

    def score_names(self, x: Tensor, captions: Captions) -> Tensor:
        """Return the cosines [B, K] of prepared x with the encoded names of K other classes."""
        scores: Tensor = F.linear(self.lift(self.features(x)), self.names.rows_of(captions))
        return scores

    def empty(self) -> dict[str, ClassStats]:
        return {"features": ClassStats(self.width, self.num_classes)}

    def lift(self, features: Tensor) -> Tensor:
        return self.names.embed(features)

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        self.names.grow(task.classes)

    def solve(self, task: Task, ctx: Context) -> None:
        self._place()

    def _place(self) -> None:
        """Compute the prototypes of all classes whose names are known."""
        texts = self.weight * self.names.weight.detach().double()
        sums, count = texts, self.weight * self.names.initialised.double()
        if "features" in self.statistics:
            rows = self.stats("features").counts().to(texts.device)
            means = self.stats("features").means().to(texts)
            sums, count = texts + rows[:, None] * means, count + rows
        self.head.prototypes.copy_(sums / count.clamp(min=1e-12)[:, None])
