"""The task loop: a learner learns the tasks of a stream in order and is evaluated after each of them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from clrun.blocks.compress.base import hold
from clrun.data.stream import Stream, Task
from clrun.learning.budget import Budget
from clrun.learning.context import Context
from clrun.learning.method import Method
from clrun.learning.progress import Keeper, Progress
from clrun.running.accounting import PeakMemory, learner_parameters, parameter_counts, state_bytes
from clrun.running.checkpoint import RunState
from clrun.running.compression import Stage
from clrun.running.evaluation import Evaluation, Row
from clrun.running.recorder import Recorder
from clrun.running.task_file import StoredFit
from clrun.running.task_fits import TaskFits
from clrun.system.hardware import Hardware
from clrun.system.seeding import seed_all


class Tuning(Protocol):
    """Learns a task several times to choose its hyper-parameters (`clrun.running.tuning`)."""

    def __call__(self, engine: "Engine", method: Method, task: Task) -> tuple[Method, float, dict[str, Any]]:
        """Return the method that has learned `task`, the seconds of the kept training, and the record for run.json."""


@dataclass
class Engine:
    """The loop over tasks.

    Attributes:
        stream: the tasks.
        budget: length and optimizer of a fit that brings no budget of its own.
        hardware: device and processes of the run.
        seed: seed of the run.
        evaluation: evaluates the learner.
        recorder: where to report to.
        eval_initial: evaluate the untrained learner, and each task before it is learned (domain-incremental only:
            elsewhere the classes of an unseen task do not compete yet).
        eval_unseen: evaluate all tasks every time, also before they are learned, and the untrained learner.
        held_out: evaluates the method on data sets that are never learned; None without such data sets.
        eval_every: number of optimizer steps between evaluations within a task; None evaluates after tasks only.
        max_steps: upper limit of the steps of any fit; None for none.
        tuning: chooses hyper-parameters task by task; None learns each task once, as configured.
        compression: makes the learner smaller after its tasks; None does not.
        fits: keeps the fits of a task, so that it can go on in its middle; None keeps nothing.
        backbone: as loaded; None leaves a backbone that the learner does not hold out of the counts of parameters.
        state: progress of the run; its results are added to it.
    """

    stream: Stream
    budget: Budget
    hardware: Hardware
    seed: int
    evaluation: Evaluation
    recorder: Recorder
    eval_initial: bool = False
    eval_unseen: bool = False
    held_out: Callable[[Method], dict[str, list[int]]] | None = None
    eval_every: int | None = None
    max_steps: int | None = None
    tuning: Tuning | None = None
    compression: Stage | None = None
    fits: TaskFits | None = None
    backbone: nn.Module | None = None
    state: RunState = field(default_factory=RunState)
    _evaluating: float = 0.0
    _earlier: float = 0.0  # seconds of training of this task that were spent before the run was resumed
    _trained: int = 0  # number of parameters that the fits of the last task have trained

    def run(self, method: Method) -> Method:
        """Let `method` learn the tasks that are not learned yet, in order.

        Returns:
            The learner after the last task: `method`, or with tuning the copy of it whose training was kept.
        """
        if self.fits is None:
            return self._learn(method)
        with self.fits.attached(self._replay, lambda: time.perf_counter() - self._evaluating):
            return self._learn(method)

    def _learn(self, method: Method) -> Method:
        """Let `method` learn them; see `run`."""
        self.hardware.place(method)
        if self.hardware.compile:
            method.backbone.compile()
        memory = PeakMemory(self.hardware)
        if self.state.learned == len(self.stream.tasks):  # the run stopped between its last task and its end
            self.evaluation(method, self.stream, self.state.learned)
        for task in self.stream.tasks[self.state.learned :]:
            self.recorder.begin_task(task)
            if self.fits is not None:
                self.fits.begin_task(self.state.learned, self.state.data)
            memory.reset()
            search: dict[str, Any] = {}
            if self.tuning is None:
                seconds = self.train(method, self.context(method, task))
            else:
                method, seconds, search["tuning"] = self.tuning(self, method, task)
            self.state.learned += 1
            steps = self.state.steps - (self.state.costs[-1]["steps"] if self.state.costs else 0)
            peak = memory.read()
            smaller = self._compress(method, task, memory)
            evaluation = self._timed(partial(self._evaluate, method, self.state.learned))
            modules = method.expansion()
            self.state.costs.append(
                {
                    "task": task.id,
                    "position": task.index,
                    "steps": self.state.steps,
                    "train_seconds": seconds,
                    "eval_seconds": evaluation,
                    "images": len(task.train),
                    "images_per_second": self._images(task, steps) / seconds if seconds else None,
                    "peak_memory_bytes": max(peak, memory.read()),
                    "parameters": self._parameters(method) | {"trainable": self._trained},
                    "state_bytes": state_bytes(method),
                    **({"modules": modules} if modules else {}),
                    **({"compression": smaller} if smaller else {}),
                    **search,
                }
            )
            self.recorder.end_task(task, method, self.state)
            if self.fits is not None:
                self.fits.end_task()
        return method

    def _compress(self, method: Method, task: Task, memory: PeakMemory) -> dict[str, Any]:
        """Compress the method after `task` where that is due; return the record, {} without one."""
        if self.compression is None or not self.compression.due(task, self.stream):
            return {}
        memory.reset()

        def evaluate(phase: str) -> list[Row]:
            return self._record(self.evaluation(method, self.stream, self.state.learned), phase)

        record = self.compression(method, self.context(method, task), evaluate)
        return {**record, "peak_memory_bytes": memory.read()}

    def _parameters(self, method: Method) -> dict[str, int]:
        """Return the parameter counts of the learner, a frozen backbone whose features it reads included."""
        return parameter_counts(method) if self.backbone is None else learner_parameters(method, self.backbone)

    def _images(self, task: Task, steps: int) -> int:
        """Return the number of training images that passed through the network: one pass when no step was taken."""
        return steps * min(self.budget.batch_size, len(task.train)) if steps else len(task.train)

    def train(self, method: Method, ctx: Context, *, initial: bool = True) -> float:
        """Let `method` learn the task of `ctx`.

        Args:
            method: the learner.
            ctx: context of the task.
            initial: evaluate the untrained learner before the first task, if the run does so and has not done it yet.

        Returns:
            The seconds of learning, without those of evaluations.
        """
        self._evaluating, self._earlier, task = 0.0, 0.0, ctx.task
        seed_all(ctx.seed, "task", task.id)
        method.begin_task(task, ctx)
        for part in method.new_parts():
            self.hardware.place(part)
        if self.eval_unseen:
            method.meet(torch.arange(self.stream.num_classes))
        if initial and not self.state.rows:
            self._evaluate_untrained(method)

        def work() -> None:
            method.learn(task, ctx)
            method.end_task(task, ctx)

        seconds = self._timed(work) - self._evaluating + self._earlier
        self._trained = sum(p.numel() for p in ctx.progress.trained)
        return seconds

    def _evaluate_untrained(self, method: Method) -> None:
        """Evaluate the method before its first task, where the run does so."""
        tasks = len(self.stream.tasks)
        if self.eval_unseen:
            self._record(self.evaluation(method, self.stream, 0, unseen=True), "end")
        elif self._initial:
            self._record(self.evaluation(method, self.stream, 0, candidates=1, tasks=tasks), "end")
        if self.held_out is not None and not self.state.extra:
            self.state.extra.append(self.held_out(method))

    @property
    def _initial(self) -> bool:
        """Whether tasks are evaluated before they are learned."""
        return self.eval_initial and self.stream.setting == "dil"

    def context(self, method: Method, task: Task) -> Context:
        """Return the context in which `method` learns `task`."""

        def on_step(progress: Progress) -> None:
            hold(method)
            self.state.steps += 1
            self.recorder.step(progress)
            if self.eval_every and self.state.steps % self.eval_every == 0:
                self._evaluating += self._timed(lambda: self._evaluate_during(method, task))

        def log(record: Any) -> None:
            self._log({"task": task.id, "position": task.index, **record})

        return Context(
            self.stream,
            task,
            self.budget,
            self.hardware,
            self.seed,
            log=log,
            on_step=on_step,
            max_steps=self.max_steps,
            keeper=self.fits or Keeper(),
        )

    def _replay(self, fit: StoredFit) -> None:
        """Report again what a fit has reported before the run was resumed."""
        self.state.steps += fit.steps
        self._earlier += fit.seconds
        self._report(fit.rows)
        for record in fit.records:
            self.recorder.log(record)

    def _log(self, record: dict[str, Any]) -> None:
        """Report numbers of training."""
        self.recorder.log(record)
        if self.fits is not None:
            self.fits.record(record)

    def _evaluate(self, method: Method, learned: int) -> None:
        """Evaluate the learned tasks, and the next one where the run evaluates tasks before they are learned."""
        ahead = min(learned + 1, len(self.stream.tasks)) if self._initial else learned
        self._record(self.evaluation(method, self.stream, learned, tasks=ahead, unseen=self.eval_unseen), "end")
        if self.held_out is not None:
            self.state.extra.append(self.held_out(method))

    def _evaluate_during(self, method: Method, task: Task) -> None:
        """Evaluate in the middle of `task`; its classes compete already."""
        self._record(self.evaluation(method, self.stream, task.index, candidates=task.index + 1), "during")

    def _record(self, rows: list[Row], phase: str) -> list[Row]:
        """Add rows to those of the checkpoint, report and return them."""
        rows = [{"step": self.state.steps, **row, "phase": phase} for row in rows]
        self._report(rows)
        return rows

    def _report(self, rows: list[Row]) -> None:
        """Add lines of accuracy.csv to those of the checkpoint and report them."""
        self.state.rows += rows
        self.recorder.rows(rows)
        if self.fits is not None:
            self.fits.rows(rows)

    def _timed(self, work: Callable[[], Any]) -> float:
        """Call `work` and return its wall time in seconds, finished work of the device included."""
        self.hardware.synchronize()
        start = time.perf_counter()
        work()
        self.hardware.synchronize()
        return time.perf_counter() - start
