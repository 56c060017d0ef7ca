"""The base of methods with a network and a head per task, which need the task id at test time."""

from collections.abc import Iterable
from typing import Self

from torch import Tensor, nn

from clrun.data.split import Batch
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.heads import TaskHead
from clrun.learning.losses import masked_cross_entropy
from clrun.learning.method import Method, freeze


class TaskNetworks(Method):
    """One network and one head per task, which are frozen when the task ends.

    Networks may share parameters with each other and with the backbone. Logits of a task that has not begun are 0.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
    """

    own_weights = "predicts with a network of its own for each task"
    needs_task_id = True
    settings = frozenset({"til"})

    def __init__(self, backbone: nn.Module, num_classes: int) -> None:
        super().__init__(backbone, num_classes)
        self.head = nn.Identity()  # each task has its own head in `heads`
        self.networks = nn.ModuleList()
        self.heads = nn.ModuleList()

    def new_network(self, task: Task, ctx: Context) -> nn.Module:
        """Return a new network for `task`."""
        raise NotImplementedError

    def begin_task(self, task: Task, ctx: Context) -> None:
        self.networks.append(self.new_network(task, ctx))
        num_features = int(self.backbone.num_features)  # type: ignore[arg-type]
        self.heads.append(TaskHead(num_features, task.classes, self.num_classes))

    def new_parts(self) -> Iterable[nn.Module]:
        return [self.networks[-1], self.heads[-1]]

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        return masked_cross_entropy(self(batch.x, ctx.task.index), batch.y, ctx.mask(batch.t, "current"))

    def end_task(self, task: Task, ctx: Context) -> None:
        freeze(self.networks[-1])
        freeze(self.heads[-1])
        self.networks[-1].eval()

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the current task's network; earlier networks are frozen and stay in eval mode."""
        self.training = mode
        for network in self.networks[-1:]:
            network.train(mode and any(p.requires_grad for p in network.parameters()))
        return self

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        """Return the logits [B, C] of prepared rows x, all for the task at position `task`."""
        assert task is not None, "this method needs the task id"
        if task >= len(self.networks):
            return x.new_zeros(len(x), self.num_classes)
        logits: Tensor = self.heads[task](self.networks[task](x))
        return logits
