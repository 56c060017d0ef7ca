"""L2 transfer: stay close to the weights of the task before (baseline of APD, Yoon et al., ICLR 2020, 1902.09432).

Memory between tasks: P floats, P = backbone parameters. Task id: not needed.
"""

from torch import Tensor, nn

from clrun.blocks.params import Params, clone, select
from clrun.data.split import Batch
from clrun.data.stream import Task
from clrun.errors import NonNegative
from clrun.method import Method
from clrun.training import Context


class L2Transfer(Method):
    """loss = CE + strength / 2 |theta - theta_(t-1)|^2 on the backbone; the head is free.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        strength: lambda; 0 is finetuning. Gradient descent diverges when learning rate * strength exceeds 2.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, *, strength: NonNegative) -> None:
        super().__init__(backbone, num_classes)
        self.strength = strength
        self.anchor: Params = {}

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        loss = super().loss(batch, ctx)
        if not self.anchor or not self.strength:
            return loss
        now = select(self.backbone)
        return loss + self.strength / 2 * sum((now[name] - old).square().sum() for name, old in self.anchor.items())

    def end_task(self, task: Task, ctx: Context) -> None:
        self.anchor = clone(select(self.backbone))
