"""SimpleCIL: cosine prototypes on frozen features (Zhou et al., IJCV 2024, arXiv 2303.07338).

Memory between tasks: C (8 D + 8) bytes of sums and counts (domain-incremental: for each domain), 4 C D of prototypes.
Task id: not needed.
"""

from typing import Literal

import torch.nn.functional as F
from torch import nn

from clrun.blocks.heads import PrototypeHead
from clrun.blocks.statistics import ClassStats, extract
from clrun.data.stream import Task
from clrun.method import Method
from clrun.training import Context


class Simplecil(Method):
    """The classifier row of a class is the mean of its features; the score is the cosine. Nothing is trained.

    A class that comes in several domains gets the mean over all of them. The sums do not depend on the task order,
    not even in the last bit (see `ClassStats`).

    Args:
        backbone: identity of width D; the engine feeds features.
        num_classes: C.
        metric: "cosine"; "euclidean" is the nearest class mean.
        normalise_before_mean: scale features to length 1 before averaging them (as iCaRL does; not SimpleCIL).
    """

    uses_frozen_features = True
    order_invariant = True

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        metric: Literal["cosine", "euclidean"],
        normalise_before_mean: bool,
    ) -> None:
        super().__init__(backbone, num_classes)
        width = int(backbone.num_features)  # type: ignore[arg-type]
        self.normalise_before_mean = normalise_before_mean
        self.head: PrototypeHead = PrototypeHead(width, num_classes, metric=metric)
        self.stats = ClassStats(width, num_classes)

    def learn(self, task: Task, ctx: Context) -> None:
        features, y = extract(self, task.train)
        if self.normalise_before_mean:
            features = F.normalize(features, dim=1)
        self.stats.update(features, y, source=task.id)
        self.head.prototypes.copy_(self.stats.means())
