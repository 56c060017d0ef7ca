"""BatchEnsemble: each task rescales the rows and columns of shared weights (Wen et al., ICLR 2020, arXiv 2002.06715).

Memory between tasks: the base, and per task m + n numbers for each layer of shape [m, n], biases, normalisation layers
and a head. Task id: needed.

Verified: a task's weight is the base times an outer product, and learned tasks stay the same bit for bit
(test_methods_low_rank).
"""

from typing import Literal

from torch import nn

from clrun.blocks.low_rank import copy_for_task, install, layers_of
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.method import freeze
from clrun.methods.task_networks import TaskNetworks


class Batchensemble(TaskNetworks):
    """W_t = W0 * (r_t s_t^T), with W0 trained by the first task and frozen.

    r_t and s_t are vectors of task t that scale the rows and columns of W0; they start at 1, so that a task starts from
    the base itself (the paper draws random signs for ensembles, whose members should differ). Biases and normalisation
    layers belong to the task and start from those of the base.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        base: "first_task": the first task trains W0. "backbone": W0 is the backbone as it was loaded, for example
            pre-trained.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, *, base: Literal["first_task", "backbone"]) -> None:
        super().__init__(backbone, num_classes)
        self.base = base
        self.order_invariant = base == "backbone"
        if base == "backbone":
            freeze(self.backbone)

    def new_network(self, task: Task, ctx: Context) -> nn.Module:
        if self.base == "first_task" and task.index == 0:
            return self.backbone
        network = copy_for_task(self.backbone)
        parts = {}
        for name, layer in layers_of(network).items():
            weight = layer.weight.detach()
            ones = {"rows": weight.new_ones(weight.shape[0]), "columns": weight.new_ones(weight.shape[1])}
            none = {"left": weight.new_zeros(weight.shape[0], 0), "right": weight.new_zeros(0, weight.shape[1])}
            parts[name] = ones | none
        install(network, self.backbone, parts)
        return network
