"""Chooses hyper-parameters from the data of the current task alone: the stability-plasticity framework.

De Lange et al., "A continual learning survey: Defying forgetting in classification tasks", TPAMI 2021, arXiv
1909.08383. Deviations: every training has the run's budget, whose length is fixed (there: until validation accuracy
stalls); each method learns its own first task (there: all from one network).
"""

import copy
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import Annotated, Any

from clrun.blocks.compress.base import FORMS
from clrun.data.stream import Task
from clrun.learning.budget import Budget
from clrun.learning.knobs import Values, decays, read, write
from clrun.learning.method import Method
from clrun.running.engine import Engine
from clrun.running.evaluation import Evaluation
from clrun.system.errors import ConfigError, Fraction, NumericalError, Positive, PositiveInt, Range
from clrun.system.seeding import derive

Record = dict[str, Any]


@dataclass(frozen=True)
class StabilityDecay:
    """Maximal plasticity search, then stability decay, for each task; data of other tasks are not used.

    Plasticity: the network as the task finds it is finetuned with every learning rate of the grid; the best validation
    accuracy of the task is A*. Stability: the method learns the task from the same state with the best learning rate;
    while its own accuracy stays below (1 - drop) A*, its knobs are decayed and it learns the task again, from the same
    state. The last training is kept, converged or not, and the next task begins with its knobs. If `max_attempts`
    trainings did not converge, the knobs are decayed once more before the next task.

    A method without knobs has the first phase only: it learns the task itself, instead of finetuning, and the best
    training is kept. Only the learning rate of `budget` is searched, not those of budgets among a method's options.
    Accuracy is that of the run's setting, measured after the method's `end_task`.

    Attributes:
        lrs: the grid of learning rates; of equal accuracies, the first in the list wins.
        first_lrs: learning rates tried before the grid, on the first task only.
        repeats: r, number of seeds over which the accuracy of a learning rate is averaged; the first is the run's own.
        drop: p, the relative drop below A* that is accepted.
        decay: a, the factor of each decay.
        max_attempts: largest number of trainings in the second phase.
        reset: whether every task begins with the configured knobs instead of those that the task before left.
    """

    lrs: list[Positive]
    first_lrs: list[Positive]
    repeats: PositiveInt
    drop: Fraction
    decay: Annotated[float, Range(above=0, maximum=1)]
    max_attempts: PositiveInt
    reset: bool

    def __post_init__(self) -> None:
        """Check what the declared ranges do not cover."""
        if not self.lrs:
            raise ConfigError("job.tuning.lrs: empty; give at least one learning rate")
        if self.decay == 1:
            raise ConfigError("job.tuning.decay: a factor of 1 leaves the knobs unchanged; use a factor below 1")

    def check(self, budget: Budget) -> None:
        """Check that there is a learning rate to search.

        Raises:
            ConfigError: the optimizer has no option `lr`.
        """
        if "lr" not in getattr(budget.optimizer, "keywords", {}):
            raise ConfigError("job.tuning: budget.optimizer has no option lr, whose value could be searched")

    def trainings(self, method: Method, task: Task) -> int:
        """Return the smallest number of trainings of `task`."""
        return len(self._grid(task)) * self.repeats + bool(method.knobs)

    def _grid(self, task: Task) -> list[float]:
        """Return the learning rates tried on `task`."""
        return [*([] if task.index else self.first_lrs), *self.lrs]

    def __call__(self, engine: Engine, method: Method, task: Task) -> tuple[Method, float, Record]:
        """Search while learning `task`.

        Args:
            engine: does the trainings; of their steps, those of the training that is kept count for the run.
            method: the learner before the task; it must not be used afterwards.
            task: the current task.

        Returns:
            The learner that has learned the task, the seconds of the kept training, and a record of all trainings.
        """
        start = read(method, method.knobs)
        if self.reset and engine.state.costs:
            start = engine.state.costs[0]["tuning"]["start"]
        write(method, start)
        trials = _Trials(engine, method, task)
        kept, plasticity = self._plasticity(trials)
        record: Record = {"start": start, "plasticity": plasticity, "stability": None}
        if method.knobs:
            kept, record["stability"] = self._stability(trials, start, plasticity)
        if kept.error is not None:
            raise kept.error
        engine.state.steps = trials.steps + kept.steps
        return kept.method, kept.seconds, record

    def _plasticity(self, trials: "_Trials") -> tuple["_Trial", Record]:
        """Return the best training over the learning rates, and the record of all."""
        begun, grid = time.perf_counter(), list[Record]()
        best: tuple[_Trial, Record] | None = None
        for lr in self._grid(trials.task):
            runs = [trials.run(lr, repeat=i, plain=bool(trials.method.knobs)) for i in range(self.repeats)]
            grid.append({"lr": lr, "accuracy": fmean(run.accuracy for run in runs)})
            if best is None or grid[-1]["accuracy"] > best[1]["accuracy"]:
                best = runs[0], grid[-1]
        assert best is not None
        return best[0], {**best[1], "grid": grid, "seconds": _since(begun)}

    def _stability(self, trials: "_Trials", start: Values, plasticity: Record) -> tuple["_Trial", Record]:
        """Return the last training of the method, with the knobs set for the next task, and the record of all."""
        begun, attempts, converged = time.perf_counter(), list[Record](), False
        threshold = (1 - self.drop) * plasticity["accuracy"]
        values: Iterator[Values] = decays(start, trials.method.knobs, self.decay)
        following: Values | None = next(values)
        while following is not None and not converged and len(attempts) < self.max_attempts:
            trained = following
            trial = trials.run(plasticity["lr"], knobs=trained)
            attempts.append({"knobs": trained, "accuracy": trial.accuracy})
            converged = trial.error is None and trial.accuracy >= threshold
            following = trained if converged else next(values, None)
        carried = trained if following is None else following
        write(trial.method, carried)
        record = {"threshold": threshold, "attempts": attempts, "converged": converged}
        return trial, {**record, "trained": trained, "carried": carried, "seconds": _since(begun)}


@dataclass(frozen=True)
class _Trial:
    """One training of the task.

    Attributes:
        method: the learner after the training.
        accuracy: on the task's validation rows, a fraction; 0 when the loss was not finite.
        steps: number of optimizer steps.
        seconds: time of learning.
        error: the error of a training whose loss was not finite; else None.
    """

    method: Method
    accuracy: float
    steps: int
    seconds: float
    error: NumericalError | None = None


@dataclass
class _Trials:
    """Trainings of one task, each from the same state and with the same random numbers.

    Attributes:
        engine: does the trainings.
        method: the learner before the task; every training uses a copy.
        task: the task.
        steps: number of optimizer steps of the run before the task.
        count: number of trainings so far.
        evaluation: evaluates validation rows, otherwise as the run does.
    """

    engine: Engine
    method: Method
    task: Task
    steps: int = field(init=False)
    count: int = field(default=0, init=False)
    evaluation: Evaluation = field(init=False)

    def __post_init__(self) -> None:
        """Take the number of steps and the evaluation from the engine."""
        self.steps = self.engine.state.steps
        self.evaluation = replace(self.engine.evaluation, split="val")

    def run(self, lr: float, *, repeat: int = 0, plain: bool = False, knobs: Values | None = None) -> _Trial:
        """Learn the task, from the state before it.

        Args:
            lr: learning rate of the budget.
            repeat: 0 for the seed of the run.
            plain: finetune the network instead of training the method.
            knobs: values for the method's knobs; None leaves them unchanged.
        """
        engine = self.engine
        method = _finetuning(self.method) if plain else copy.deepcopy(self.method)
        write(method, knobs or {})
        if engine.hardware.compile:
            method.backbone.compile()
        seed = derive(engine.seed, "repeat", repeat) if repeat else engine.seed
        number, self.count = self.count, self.count + 1
        engine.state.steps = self.steps
        budget = replace(engine.budget, optimizer=partial(engine.budget.optimizer, lr=lr))
        context = engine.context(method, self.task)

        def log(record: Mapping[str, Any]) -> None:
            context.log({"trial": number, **record})

        try:
            ctx = replace(context, budget=budget, seed=seed, log=log)
            seconds = engine.train(method, ctx, initial=not plain and not repeat)
        except NumericalError as error:
            if engine.hardware.world > 1:
                raise  # the other processes may not have seen it and would wait
            return _Trial(method, 0.0, engine.state.steps - self.steps, math.nan, error)
        accuracy = self.evaluation.accuracy(method, engine.stream, self.task)
        return _Trial(method, accuracy, engine.state.steps - self.steps, seconds)


def _finetuning(method: Method) -> Method:
    """Return a learner that finetunes a copy of the network of `method`."""
    plain = Method(copy.deepcopy(method.backbone), method.num_classes, compete=method.compete)
    plain.head = copy.deepcopy(method.head)
    if hasattr(method, FORMS):
        setattr(plain, FORMS, copy.deepcopy(getattr(method, FORMS)))
    return plain


def _since(begun: float) -> float:
    """Return the seconds since `begun`, a value of time.perf_counter."""
    return time.perf_counter() - begun
