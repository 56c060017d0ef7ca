"""The context of a method while it learns one task: stream, task, budget, device, random numbers and progress."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clrun.data.stream import Setting, Stream, Task
from clrun.learning.budget import Budget
from clrun.learning.losses import Compete
from clrun.learning.progress import Keeper, Progress
from clrun.system.hardware import Hardware
from clrun.system.seeding import generator


@dataclass(frozen=True)
class Context:
    """Everything about the run that a method may use while it learns one task.

    Attributes:
        stream: all tasks; a method reads the data of the current one only, unless its definition says otherwise.
        task: the current task.
        budget: length and optimizer of a fit that brings no budget of its own.
        hardware: device, precision and processes.
        seed: seed of the run.
        log: records numbers of training (loss, penalties) in metrics.jsonl and in the logger.
        on_step: called after each optimizer step.
        max_steps: upper limit of the steps of any fit; None for no limit.
        progress: the progress of the running fit.
        keeper: keeps the results of fits, so that a task that was stopped in its middle can go on there.
        generators: those of `generator` so far, by purpose.
    """

    stream: Stream
    task: Task
    budget: Budget
    hardware: Hardware
    seed: int
    log: Callable[[Mapping[str, float | int | str]], None] = lambda record: None
    on_step: Callable[[Progress], None] = lambda progress: None
    max_steps: int | None = None
    progress: Progress = field(default_factory=Progress)
    keeper: Keeper = field(default_factory=Keeper)
    generators: dict[tuple[str | int, ...], torch.Generator] = field(default_factory=dict, repr=False)
    _masks: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def mask(self, t: Tensor, compete: Compete = "seen") -> Tensor:
        """Return [B, C] bool: the classes that compete in the training loss of rows of some tasks.

        The current task counts as learned. With "seen", these are the candidates of an evaluation after this task.

        Args:
            t: [B] long, position of each row's task.
            compete: "current", "seen" or "all", as defined in `clrun.learning.losses`.
        """
        if compete not in self._masks:
            setting: Setting | None = "til" if compete == "current" else None
            classes = self.stream.candidates(self.task.index + 1, setting)
            self._masks[compete] = (torch.ones_like(classes) if compete == "all" else classes).to(self.hardware.device)
        return self._masks[compete][t]

    def generator(self, *purpose: str | int) -> torch.Generator:
        """Return this task's generator for `purpose`: the same object, hence a continuing stream, at every call."""
        if purpose not in self.generators:
            self.generators[purpose] = generator(self.seed, "task", self.task.id, *purpose)
        return self.generators[purpose]

    def augment(self, x: Tensor) -> Tensor:
        """Return stored images as prepared, augmented floats (the train view)."""
        view = self.stream.transform.train(x, self.generator("augment", self.hardware.rank))
        return self.hardware.layout(view)
