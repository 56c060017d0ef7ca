"""The features of a backbone with the modules of one task, and the prototypes of classes in this feature space.

Shapes: `D` feature width, `C` classes, `B` rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from clrun.blocks.inject import Plan
from clrun.blocks.statistics import ClassStats
from clrun.data.stream import Task
from clrun.learning.heads import PrototypeHead


class TaskFeatures(nn.Module):
    """Modules of one task, and the class means of all classes whose images were measured with them.

    Memory: 8 C D bytes of sums (twice as much once a class comes in a second domain), 8 C of counts, and 4 C D of
    prototypes, beside the modules.

    Args:
        adapters: adapters beside the MLP by block; empty for the plain model, or where `plan` is not used.
        width: D.
        num_classes: C.

    Attributes:
        own: [C] bool, the classes of its task; set by the method.
        head: the cosines with the prototypes, which are class means of un-normalised features.
    """

    own: Tensor

    def __init__(self, adapters: nn.ModuleDict, width: int, num_classes: int) -> None:
        super().__init__()
        self.adapters = adapters
        self.stats = ClassStats(width, num_classes)
        self.head = PrototypeHead(width, num_classes, metric="cosine")
        self.register_buffer("own", torch.zeros(num_classes, dtype=torch.bool))

    @property
    def real(self) -> Tensor:
        """[C] bool: the classes whose images were measured here."""
        return self.stats.counts() > 0

    def plan(self) -> Plan:
        """Return the plan that adds the adapters to the blocks."""
        return Plan(beside_mlp={int(block): adapter for block, adapter in self.adapters.items()})

    def measure(self, features: Callable[[Tensor], Tensor], task: Task) -> None:
        """Add the training rows of a task, without augmentation, and update the prototypes of its classes.

        Args:
            features: returns the features [B, D] of prepared images with the modules of this task; the caller has
                switched off gradients and training mode.
            task: the task whose rows are measured.
        """
        own = self.stats.empty()
        for batch in task.train.batches(256):
            own.update(features(batch.x).float(), batch.y)
        self.stats.merge(own)
        self.head.prototypes[self.real] = self.stats.means()[self.real].float()


__all__ = ["TaskFeatures"]
