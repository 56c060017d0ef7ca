"""STL: single-task learning, a separate network per task (baseline of APD, Yoon et al., ICLR 2020, arXiv 1902.09432).

Memory between tasks: one whole network per task. Task id: needed.

Verified: a task is learned exactly as in a stream without other tasks (test_methods_low_rank).
"""

from copy import deepcopy

from torch import nn

from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.method import freeze
from clrun.methods.task_networks import TaskNetworks


class Stl(TaskNetworks):
    """Each task trains a copy of the initial backbone, and no information passes between tasks.

    The result does not depend on the task order. A variation between orders with another method is therefore due to
    that method.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
    """

    order_invariant = True

    def __init__(self, backbone: nn.Module, num_classes: int) -> None:
        super().__init__(backbone, num_classes)
        self.trained = [name for name, p in backbone.named_parameters() if p.requires_grad]
        freeze(self.backbone)

    def new_network(self, task: Task, ctx: Context) -> nn.Module:
        network = deepcopy(self.backbone)
        for name in self.trained:
            network.get_parameter(name).requires_grad_(True)
        return network
