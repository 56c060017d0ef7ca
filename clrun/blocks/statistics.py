"""Statistics of features, class by class, and the pass that extracts features.

Shapes: `N` rows, `D` feature width, `C` classes, `R` entries (a class in a source).
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clrun.blocks.params import Carrier, eval_mode
from clrun.data.split import Split

if TYPE_CHECKING:
    from clrun.method import Method


def extract(method: "Method", split: Split, *, size: int = 256) -> tuple[Tensor, Tensor]:
    """Return the backbone's features [N, D] of the eval view of every row, and the labels [N].

    Backbone in eval mode, fp32, no gradients. Every process reads the whole split.

    Args:
        method: whose backbone; not changed.
        split: rows.
        size: rows of a forward pass; the last bits of a feature may depend on it.
    """
    features, labels = [], []
    with torch.no_grad(), eval_mode(method.backbone):
        for batch in split.batches(size):
            features.append(method.backbone(batch.x).float())
            labels.append(batch.y)
    return torch.cat(features), torch.cat(labels)


class ClassStats(Carrier):
    """Sums and counts of features, keyed by class id, in float64; means are formed on reading.

    A class may come from several sources (the domains of a domain-incremental stream). Its sum is kept for each and
    added up in the order of the sources' ids, so that neither the order of the tasks nor the classes in between show,
    not even in the last bit: float64 addition depends on its order.

    Args:
        num_features: D.
        num_classes: C.
    """

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.keys: list[tuple[int, int]] = []  # (class id, source) of each entry
        self.sums = torch.zeros(0, num_features, dtype=torch.float64)  # [R, D]
        self.rows = torch.zeros(0, dtype=torch.long)  # [R]

    def update(self, features: Tensor, y: Tensor, *, source: int = 0) -> None:
        """Add rows of features [N, D] with labels [N] long, seen in `source` (the id of a task)."""
        self.sums, self.rows = self.sums.to(features.device), self.rows.to(features.device)
        for label in torch.unique(y).tolist():
            own = features[y == label].double()
            if (label, source) not in self.keys:
                self.keys.append((label, source))
                self.sums = torch.cat([self.sums, self.sums.new_zeros(1, features.shape[1])])
                self.rows = torch.cat([self.rows, self.rows.new_zeros(1)])
            entry = self.keys.index((label, source))
            self.sums[entry] += own.sum(dim=0)
            self.rows[entry] += len(own)

    def counts(self) -> Tensor:
        """Return [C] long, the rows of each class."""
        counts = self.rows.new_zeros(self.num_classes)
        for (label, _), rows in zip(self.keys, self.rows, strict=True):
            counts[label] += rows
        return counts

    def means(self) -> Tensor:
        """Return [C, D] float64, the mean feature of each class; 0 for a class without rows."""
        total = self.sums.new_zeros(self.num_classes, self.sums.shape[1])
        for entry in sorted(range(len(self.keys)), key=self.keys.__getitem__):
            total[self.keys[entry][0]] += self.sums[entry]
        return total / self.counts().clamp(min=1)[:, None]
