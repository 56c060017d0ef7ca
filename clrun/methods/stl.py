"""STL: single-task learning, a network of its own for each task (baseline of APD, Yoon et al., ICLR 2020, 1902.09432).

Memory between tasks: a whole network a task. Task id: needed.

Verified: each task is learned as if it were alone (test_methods_low_rank).
"""

from copy import deepcopy

from torch import nn

from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.method import freeze
from clrun.methods.task_networks import TaskNetworks


class Stl(TaskNetworks):
    """Each task trains a copy of the initial backbone, and nothing passes from one task to another.

    Nothing depends on the order of the tasks: what varies between orders of another method and not here is the
    method's. All tasks begin from the same weights.

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
