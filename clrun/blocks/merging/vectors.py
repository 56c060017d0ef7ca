"""Rules on task vectors tau_t = theta_t - theta_0: task arithmetic, TIES, DARE and MagMax.

The merged weights are theta* = theta_0 + scale * merged vector. Sums are folded, never merged results: merging a merged
vector with the next one would count earlier vectors again at every step.
"""

from typing import Annotated, Literal, Self

import torch
from torch import Tensor

from clrun.blocks.merging.base import Evidence, Merge, Total
from clrun.blocks.params import unflatten
from clrun.system.errors import ConfigError, Count, Fraction, NonNegative, Range
from clrun.system.seeding import generator

Share = Annotated[float, Range(above=0, maximum=1)]

VOTES = 255  # models that counts of one byte can hold


class TaskVectors(Merge):
    """A rule that folds task vectors.

    Args:
        scale: factor of the merged vector; None for 1 / T with T the number of models.
    """

    reads_initial = True

    def __init__(self, *, scale: NonNegative | None) -> None:
        super().__init__()
        self.scale = scale

    def _add(self, model: Tensor, evidence: Evidence, key: int, weight: float) -> None:
        self.add_vector(weight * (model.double() - self.initial.double()), key)

    def _value(self, newest: Tensor | None) -> Tensor:
        scale = 1 / self.models if self.scale is None else self.scale
        merged: Tensor = self.initial.double() + scale * self.merged().double()
        return merged

    def add_vector(self, vector: Tensor, key: int) -> None:
        """Fold in the task vector [P] float64 of the task with this id."""
        raise NotImplementedError

    def merged(self) -> Tensor:
        """Return the merged vector [P]."""
        raise NotImplementedError


class TaskArithmetic(TaskVectors):
    """theta* = theta_0 + scale * sum_t tau_t (Ilharco et al., ICLR 2023, arXiv 2212.04089).

    With scale=None it is the mean of the models. State beside theta_0: one sum of P entries.
    """

    def _begin(self, size: int) -> None:
        self.sum = Total(size, exact=self.exact)

    def add_vector(self, vector: Tensor, key: int) -> None:
        """Add the vector to the sum."""
        self.sum.plus(vector)

    def merged(self) -> Tensor:
        """Return the sum of the vectors [P]."""
        return self.sum.value()


class Ties(TaskVectors):
    """Trim, elect signs, merge what agrees (TIES, Yadav et al., NeurIPS 2023, arXiv 2306.01708).

    Of each vector exactly the fraction `keep` of entries with the largest magnitude stays, over all parameters
    together. The elected sign of an entry is that of the sum of the trimmed vectors; if they cancel, the sign that the
    majority of entries has. The merged entry is the mean (or sum) of the trimmed values with this sign. State beside
    theta_0: the sums of positive and of negative values, and their counts in one byte each (4 bytes beyond 255 models).

    Deviation: widely copied code keeps one entry more than asked.

    Args:
        keep: fraction of entries, above 0.
        combine: mean or sum of the agreeing values.
        scale: see `TaskVectors`.
    """

    def __init__(self, *, keep: Share, combine: Literal["mean", "sum"], scale: NonNegative | None) -> None:
        super().__init__(scale=scale)
        self.keep, self.combine = keep, combine

    def _begin(self, size: int) -> None:
        self.positive, self.negative = (Total(size, exact=self.exact) for _ in range(2))
        self.above, self.below = (torch.zeros(size, dtype=torch.uint8) for _ in range(2))

    def add_vector(self, vector: Tensor, key: int) -> None:
        """Trim the vector, and add its positive and its negative entries to their sums."""
        trimmed = trim(vector, self.keep)
        self.positive.plus(trimmed.clamp(min=0))
        self.negative.plus(trimmed.clamp(max=0))
        if self.models == VOTES:
            self.above, self.below = self.above.int(), self.below.int()
        self.above = self.above + (trimmed > 0).to(self.above.dtype)
        self.below = self.below + (trimmed < 0).to(self.below.dtype)

    def merged(self) -> Tensor:
        """Return the mean, or sum, of the values that agree with the elected sign [P]."""
        positive, negative = self.positive.value(), self.negative.value()
        sign = (positive + negative).sign()
        sign = torch.where(sign == 0, sign.sum().sign(), sign)
        if self.combine == "mean":
            positive, negative = positive / self.above.clamp(min=1), negative / self.below.clamp(min=1)
        return torch.where(sign > 0, positive, torch.where(sign < 0, negative, torch.zeros_like(positive)))


def trim(vector: Tensor, keep: float) -> Tensor:
    """Return the vector [P] with the entries set to 0 that are not among the round(keep * P) largest in magnitude."""
    count = max(1, round(keep * len(vector))) if len(vector) else 0
    if count >= len(vector):
        return vector
    kept = vector.abs().topk(count, sorted=False).indices
    return torch.zeros_like(vector).index_copy(0, kept, vector[kept])


class Dare(TaskVectors):
    """Drop entries of each task vector at random, and rescale the others (DARE, Yu et al., arXiv 2311.03099).

    tau <- m * tau / (1 - p) with m Bernoulli(1 - p), then the rule `inner`. The expectation is tau, the variance
    tau^2 p / (1 - p). A mask depends on the seed, the id of the task and the name of the parameter: the same task has
    the same mask in every order.

    Args:
        drop: p, below 1.
        inner: the rule for the vectors, whose scale is used; `with_rule` provides it.
        seed: of the masks.

    Raises:
        ConfigError: everything would be dropped.
    """

    def __init__(self, *, drop: Fraction, inner: Literal["task_arithmetic", "ties", "magmax"], seed: Count) -> None:
        super().__init__(scale=1.0)
        if drop == 1:
            raise ConfigError("method.dare.drop: 1 would drop every change; choose a fraction below 1")
        self.drop, self.seed, self.name = drop, seed, inner

    def with_rule(self, inner: TaskVectors) -> Self:
        """Set the unused rule that the vectors are handed to, and return this rule."""
        self.inner, self.scale, self.commutes = inner, inner.scale, inner.commutes
        return self

    def _begin(self, size: int) -> None:
        self.inner.shapes, self.inner.linear, self.inner.exact = self.shapes, self.linear, self.exact
        self.inner._begin(size)

    def add_vector(self, vector: Tensor, key: int) -> None:
        """Drop entries of the vector, and hand it to the inner rule."""
        if self.drop:
            vector = vector.clone()
            for name, part in unflatten(vector, self.shapes).items():
                draw = torch.rand(part.shape, generator=generator(self.seed, "dare", key, name))
                part *= (draw >= self.drop).to(part) / (1 - self.drop)
        self.inner.add_vector(vector, key)
        self.inner.models += 1

    def merged(self) -> Tensor:
        """Return the merged vector of the inner rule [P]."""
        return self.inner.merged()


class MagMax(TaskVectors):
    """Entry by entry the task vector with the largest magnitude; a later one wins ties.

    Source: MagMax (Marczak et al., ECCV 2024, arXiv 2407.06322, equation 2). The paper trains tasks one after another
    without merging in between, with tau_t = theta_t - theta_0 and scale 0.5. State beside theta_0: one vector of P.
    """

    commutes = False  # a tie between opposite signs goes to the later model

    def _begin(self, size: int) -> None:
        self.largest = torch.zeros(size, dtype=self.kind)

    def add_vector(self, vector: Tensor, key: int) -> None:
        """Replace the entries whose magnitude the vector reaches."""
        vector = vector.to(self.largest.dtype)
        self.largest = torch.where(vector.abs() >= self.largest.abs(), vector, self.largest)

    def merged(self) -> Tensor:
        """Return the entries of largest magnitude [P]."""
        return self.largest


__all__ = ["Dare", "MagMax", "TaskArithmetic", "TaskVectors", "Ties", "trim"]
