"""Finetuning of CLIP with class names as classifier: the lower bound of vision-language learners (ZSCL's "CL").

L = CE(kappa n(g_i(x)) . n(g_t(t_k)), y) with label smoothing, k over the classes of the current task, t_k their first
template; predictions use all templates (Zheng et al., ICCV 2023, arXiv 2303.06628, baseline of table 1).

Memory between tasks: none beyond the model, and one text row per class, 4 C d bytes. Task id: not needed.

Deviation: none known; the scale kappa is frozen, as it is in ZSCL, whose optimizer leaves it out.

Verified: gradients reach both towers and not the scale, and rows of the head are the texts of the trained tower
(test_two_towers).
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from clrun.data.split import Batch
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.losses import Compete, smoothed_cross_entropy
from clrun.learning.method import Method
from clrun.learning.names import NamesHead
from clrun.system.errors import Fraction


class ClipFinetune(Method):
    """Train both towers on each task as it comes; the classifier is the texts of the class names.

    Args:
        backbone: two towers.
        num_classes: C.
        text: train the text tower too; without it the texts are constant and encoded once.
        label_smoothing: share of the target that is spread over the classes that compete; ZSCL has 0.2.
        compete: classes that compete in the training loss, see `clrun.learning.losses`. Their captions are encoded in
            every step.
    """

    needs_text: ClassVar[bool] = True
    needs_towers: ClassVar[bool] = True
    head: NamesHead

    def __init__(
        self, backbone: nn.Module, num_classes: int, *, text: bool, label_smoothing: Fraction, compete: Compete
    ) -> None:
        super().__init__(backbone, num_classes, compete=compete)
        self.label_smoothing = label_smoothing
        joint = backbone.joint
        (joint if text else joint.image_projection).requires_grad_(True)  # type: ignore[union-attr]
        joint.logit_scale.requires_grad_(False)  # type: ignore[union-attr]
        self.head = NamesHead(backbone, num_classes, names="live" if text else "fixed")

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        competing = ctx.mask(torch.tensor([task.index]), self.compete)[0]
        self.head.active = competing.nonzero()[:, 0].tolist()

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        competing = self.competing(batch.t, ctx)
        return smoothed_cross_entropy(self(batch.x), batch.y, competing, self.label_smoothing)
