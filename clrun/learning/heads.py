"""Classifier heads. Logits are [B, C] over all classes of the data set; the column of a class without a row is 0."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GrowingHead(nn.Module):
    """A linear classifier whose rows are initialised when their classes come.

    The rows of all C classes are allocated at once and are 0 until `grow` initialises them, so that growing changes no
    shape and a checkpoint needs no special code. A class without an initialised row has the constant logit 0, receives
    no gradient through a masked loss, and is not changed by weight decay or momentum. With `compete=all` (see
    `clrun.learning.losses`) a method grows the rows of all classes in its first task.

    Args:
        num_features: D, width of the features.
        num_classes: C.
        bias: whether each class has a bias.

    Attributes:
        initialised: [C] bool, the classes with an initialised row.
    """

    initialised: Tensor
    bias: nn.Parameter | None

    def __init__(self, num_features: int, num_classes: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_classes, num_features))
        self.register_parameter("bias", nn.Parameter(torch.zeros(num_classes)) if bias else None)
        self.register_buffer("initialised", torch.zeros(num_classes, dtype=torch.bool))

    def grow(self, classes: Tensor, generator: torch.Generator | None = None) -> None:
        """Initialise the rows of those `classes` that have none yet, as `nn.Linear` does (uniform, 1/sqrt(D)).

        Args:
            classes: [k] long, class ids.
            generator: source of the random numbers, on the CPU; None takes the global one, which the engine seeds with
                the identity of the task.
        """
        classes = classes.to(self.initialised.device)
        new = classes[~self.initialised[classes]]
        bound = 1 / math.sqrt(self.weight.shape[1])
        draw = torch.rand(len(new), self.weight.shape[1] + 1, generator=generator) * 2 * bound - bound
        with torch.no_grad():
            self.weight[new] = draw[:, :-1].to(self.weight)
            if self.bias is not None:
                self.bias[new] = draw[:, -1].to(self.bias)
            self.initialised[new] = True

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [B, C] of features [B, D]."""
        return F.linear(features, self.weight, self.bias)


class CosineHead(GrowingHead):
    """A growing classifier whose logits are scaled cosines between features and class rows, without bias.

    Cosines keep new classes from outgrowing old ones (LUCIR, Hou et al., CVPR 2019, equation 4).

    Args:
        num_features: D.
        num_classes: C.
        scale: initial value of the learned factor of the cosines.
    """

    def __init__(self, num_features: int, num_classes: int, *, scale: float) -> None:
        super().__init__(num_features, num_classes, bias=False)
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [B, C] of features [B, D]."""
        return self.scale * F.linear(F.normalize(features, dim=1), F.normalize(self.weight, dim=1))


class PrototypeHead(nn.Module):
    """Scores of features against one prototype per class, which is not trained. A class without prototype scores 0.

    Args:
        num_features: D.
        num_classes: C.
        metric: "cosine", the cosine; "euclidean", minus the squared distance, without the term |f|^2, which is the
            same for all classes.
    """

    prototypes: Tensor

    def __init__(self, num_features: int, num_classes: int, *, metric: Literal["cosine", "euclidean"]) -> None:
        super().__init__()
        self.metric = metric
        self.register_buffer("prototypes", torch.zeros(num_classes, num_features))

    def forward(self, features: Tensor) -> Tensor:
        """Return scores [B, C] of features [B, D]."""
        if self.metric == "cosine":
            return F.linear(F.normalize(features, dim=1), F.normalize(self.prototypes, dim=1))
        return 2 * F.linear(features, self.prototypes) - self.prototypes.square().sum(dim=1)


class SolvedHead(nn.Module):
    """Linear scores of a closed-form solution, in float64. A class without solution scores 0.

    Args:
        num_features: D.
        num_classes: C.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(num_classes, num_features, dtype=torch.float64))
        self.register_buffer("bias", torch.zeros(num_classes, dtype=torch.float64))

    def forward(self, features: Tensor) -> Tensor:
        """Return scores [B, C] float32 of features [B, D]."""
        return F.linear(features.double(), self.weight, self.bias).float()


class TaskHead(nn.Module):
    """A linear classifier of one task's classes, initialised as `nn.Linear` is. The columns of other classes are 0.

    Args:
        num_features: D.
        classes: [k] long, class ids of the task.
        num_classes: C.
    """

    classes: Tensor

    def __init__(self, num_features: int, classes: Tensor, num_classes: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(num_features)
        self.weight = nn.Parameter(torch.empty(len(classes), num_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(len(classes)).uniform_(-bound, bound))
        self.num_classes = num_classes
        self.register_buffer("classes", classes.detach().clone())

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [B, C] of features [B, D]."""
        own = F.linear(features, self.weight, self.bias)
        return own.new_zeros(len(own), self.num_classes).index_copy(1, self.classes, own)
