"""The progress of the running fit, and the interface of what keeps it, so that a task can go on in its middle."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


@dataclass
class Progress:
    """The progress of the running fit; updated by `fit`.

    Attributes:
        phase: name of the fit.
        epoch: number of the pass over the split, from 0 or from the `passed` of the fit.
        step: number of steps done in this fit.
        total: number of steps of this fit.
        lr: learning rate of the first parameter group in the current step.
        trained: the parameters that the fits of this task have trained.
    """

    phase: str = ""
    epoch: int = 0
    step: int = 0
    total: int = 0
    lr: float = 0.0
    trained: set[nn.Parameter] = field(default_factory=set)


@dataclass(frozen=True)
class Running:
    """A fit that is about to take its first step, with everything that its steps can change.

    Attributes:
        method: the learner.
        further: what the fit uses besides the learner: objective, parameters and split.
        optimizer: new, with the parameters that are trained.
        schedule: of the learning rate; None for a constant one.
        progress: of the fit; `step` is 0.
        generators: of the context, by purpose.
    """

    method: Any
    further: tuple[Any, ...]
    optimizer: Optimizer
    schedule: LRScheduler | None
    progress: Progress
    generators: dict[tuple[str | int, ...], torch.Generator]


class Keeper:
    """Keeps the results of the fits of a task and the position of the running one; this base keeps nothing.

    `fit` calls it. The fits of a task come in the same order whenever the task is learned from the same state, so that
    their number names them.
    """

    def begin(self, running: Running) -> bool:
        """Take over what was kept of this fit; return whether the fit is finished by that.

        Method, optimizer, schedule, generators and progress are then as they were at the position that was kept.
        """
        return False

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Let signals that ask the run to stop wait, within the block, for `after_step`."""
        yield

    @contextmanager
    def drawing(self, running: Running, *, again: bool) -> Iterator[None]:
        """Hold the generators, within the block, as they were when the current pass over the split began.

        Args:
            running: the fit.
            again: False where the pass begins: the generators are noted; True where a kept position lies within it.
        """
        yield

    def after_step(self, running: Running) -> None:
        """Keep the position where that is due.

        Raises:
            Stopped: a signal has asked the run to stop, and the position is kept.
        """

    def end(self, running: Running) -> None:
        """Keep the result of the fit."""
