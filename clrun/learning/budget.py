"""The budget of one fit: its length, batch size, optimizer and learning-rate schedule."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from clrun.system.errors import ConfigError, Count, NonNegative, Positive, PositiveInt, Range, did_you_mean


@dataclass(frozen=True)
class Budget:
    """The length and the optimizer of one fit.

    Attributes:
        optimizer: called with the parameters (or parameter groups) of each fit. One with a method `watch(method, ctx)`,
            a context manager, sees the learner too: `fit` holds it open while it runs (`clrun.blocks.optimizers`).
        epochs: passes over the split; null when `steps` is given.
        steps: optimizer steps; null when `epochs` is given.
        batch_size: rows per step, over all processes together.
        schedule: called as schedule(optimizer, total_steps) and stepped once per step; null keeps the learning rate.
        clip_norm: largest norm of the whole gradient; null does not clip.

    Raises:
        ConfigError: not exactly one of epochs and steps is given.
    """

    optimizer: Callable[..., Optimizer]
    epochs: Count | None = None
    steps: Count | None = None
    batch_size: PositiveInt = 32
    schedule: Callable[..., LRScheduler] | None = None
    clip_norm: Positive | None = None

    def __post_init__(self) -> None:
        """Check that exactly one of epochs and steps is given."""
        if (self.epochs is None) == (self.steps is None):
            raise ConfigError("budget: give exactly one of epochs and steps (set the other to null)")

    def total_steps(self, rows: int) -> int:
        """Return the number of optimizer steps of a fit on `rows` rows."""
        if self.steps is not None:
            return self.steps if rows else 0
        assert self.epochs is not None
        return self.epochs * math.ceil(rows / self.batch_size)

    def lr_factor(self, task: str) -> float:
        """Return the factor of the learning rate in the task of this name."""
        return 1.0

    def check_tasks(self, names: Collection[str]) -> None:
        """Refuse a budget for tasks that the stream does not have; `names` are those of its tasks."""


@dataclass(frozen=True)
class TaskBudget(Budget):
    """A budget whose learning rate depends on the task, as published where the tasks are data sets of their own.

    Attributes:
        lr_factors: factor of the learning rate by the name of the task; 1 for tasks that are not named.
    """

    lr_factors: Mapping[str, Positive] = field(default_factory=dict)

    def lr_factor(self, task: str) -> float:
        """Return the factor of the learning rate in the task of this name."""
        return self.lr_factors.get(task, 1.0)

    def check_tasks(self, names: Collection[str]) -> None:
        """Refuse a budget for tasks that the stream does not have; `names` are those of its tasks.

        Raises:
            ConfigError: see above.
        """
        for name in self.lr_factors:
            if name not in names:
                raise ConfigError(
                    f"budget.lr_factors: the stream has no task named '{name}'{did_you_mean(name, names)} (it has: "
                    f"{', '.join(names)})"
                )


def cosine(optimizer: Optimizer, total_steps: int, *, warmup: Annotated[float, Range(0, 1)]) -> LRScheduler:
    """Return a schedule that rises linearly over the fraction `warmup` of the steps, then falls to 0 along a cosine."""
    rise = round(warmup * total_steps)

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / (rise + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total_steps - rise)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def quarter_cosine(optimizer: Optimizer, total_steps: int) -> LRScheduler:
    """Return a schedule that falls to 0 along the first quarter of a cosine, as in the code of CODA-Prompt."""

    def factor(step: int) -> float:
        return math.cos(0.5 * math.pi * min(1.0, step / max(1, total_steps)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def stepped_cosine(optimizer: Optimizer, total_steps: int, *, levels: PositiveInt) -> LRScheduler:
    """Return a schedule that falls along a cosine in `levels` equal parts, with a constant rate within each.

    With as many levels as epochs this is a cosine that is stepped once per epoch: with five levels the factors of the
    learning rate are 1, 0.9045, 0.6545, 0.3455 and 0.0955.
    """

    def factor(step: int) -> float:
        level = min(levels - 1, step * levels // max(1, total_steps))
        return 0.5 * (1 + math.cos(math.pi * level / levels))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def returning_cosine(
    optimizer: Optimizer, total_steps: int, *, levels: PositiveInt, half_period: PositiveInt
) -> LRScheduler:
    """Return a schedule along a cosine in `levels` equal parts that is at its lowest after each odd half period.

    This is a cosine that is stepped once per epoch and was made for fewer epochs than there are: with 30 levels and a
    half period of 5 the rate falls to 0 and returns three times, as in the alignment of the public code of TUNA.
    """

    def factor(step: int) -> float:
        level = min(levels - 1, step * levels // max(1, total_steps))
        return 0.5 * (1 + math.cos(math.pi * level / half_period))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def floor_cosine(optimizer: Optimizer, total_steps: int, *, floor: NonNegative) -> LRScheduler:
    """Return a schedule that falls along a cosine to the learning rate `floor`, which is the same for all groups.

    A group whose rate is 0 stays at 0.
    """

    def of(rate: float) -> Callable[[int], float]:
        share = floor / rate if rate else 1.0
        return lambda step: share + (1 - share) * 0.5 * (1 + math.cos(math.pi * step / max(1, total_steps)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, [of(float(g["lr"])) for g in optimizer.param_groups])


def milestones(
    optimizer: Optimizer, total_steps: int, *, at: list[Annotated[float, Range(0, 1)]], factor: Positive
) -> LRScheduler:
    """Return a schedule that multiplies the learning rate by `factor` at each of the fractions `at` of all steps."""

    def product(step: int) -> float:
        return float(factor ** sum(step >= place * total_steps for place in at))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, product)
