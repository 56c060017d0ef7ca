"""The one training loop: what a fit may spend (`Budget`), what a method may know (`Context`), and `fit` itself."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from clrun.data.split import Batch, Split
from clrun.data.stream import Setting, Stream, Task
from clrun.errors import ConfigError, Count, NumericalError, Positive, PositiveInt, Range
from clrun.hardware import Hardware
from clrun.seeding import generator, seed_all

if TYPE_CHECKING:
    from clrun.method import Method

Loss = Callable[[Batch, "Context"], Tensor]
Parameters = Iterable[nn.Parameter] | list[dict[str, Any]]
CHECK_EVERY = 50  # steps between two looks at the loss: each look waits for the device


@dataclass(frozen=True)
class Budget:
    """What one fit may spend, and with which optimizer.

    Attributes:
        optimizer: called with the parameters (or parameter groups) of each fit. One with a method `watch(method, ctx)`,
            a context manager, sees the learner too: `fit` holds it open while it runs (`clrun.optimizers`).
        epochs: passes over the split; null when `steps` is given.
        steps: optimizer steps; null when `epochs` is given.
        batch_size: rows of a step, over all processes together.
        schedule: called as schedule(optimizer, total_steps) and stepped once a step; null keeps the learning rate.
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
        """Check that the length of a fit has one definition."""
        if (self.epochs is None) == (self.steps is None):
            raise ConfigError("budget: give exactly one of epochs and steps (set the other to null)")

    def total_steps(self, rows: int) -> int:
        """Return the optimizer steps of a fit on `rows` rows."""
        if self.steps is not None:
            return self.steps if rows else 0
        assert self.epochs is not None
        return self.epochs * math.ceil(rows / self.batch_size)


def cosine(optimizer: Optimizer, total_steps: int, *, warmup: Annotated[float, Range(0, 1)]) -> LRScheduler:
    """Return a schedule that rises linearly over the share `warmup` of the steps and then falls to 0 along a cosine."""
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


@dataclass
class Progress:
    """Where the running fit stands; updated by `fit` before each step.

    Attributes:
        phase: name of the fit.
        epoch: pass over the split, from 0.
        step: steps done in this fit.
        total: steps of this fit.
        lr: learning rate of the step being taken, of the first parameter group.
        moved: the parameters that the fits of this task have moved.
    """

    phase: str = ""
    epoch: int = 0
    step: int = 0
    total: int = 0
    lr: float = 0.0
    moved: set[nn.Parameter] = field(default_factory=set)


@dataclass(frozen=True)
class Context:
    """What a method may know about the run while it lives through one task.

    Attributes:
        stream: all tasks; a method reads the data of the current one only, unless its definition says otherwise.
        task: the current task.
        budget: what `fit` spends by default.
        hardware: device, precision and processes.
        seed: seed of the run.
        log: records numbers of training (loss, penalties) in metrics.jsonl and the trackers.
        on_step: called after each optimizer step.
        max_steps: upper limit of the steps of any fit; None for no limit.
        progress: where the running fit stands.
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
    _generators: dict[tuple[str | int, ...], torch.Generator] = field(default_factory=dict, repr=False)
    _masks: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def mask(self, t: Tensor, setting: Setting | None = None) -> Tensor:
        """Return [B, C] bool, the classes competing for samples of the tasks at positions `t` ([B] long).

        The current task counts as learned. `setting` defaults to the stream's.
        """
        key = setting or self.stream.setting
        if key not in self._masks:
            self._masks[key] = self.stream.candidates(self.task.index + 1, setting).to(self.hardware.device)
        return self._masks[key][t]

    def generator(self, *purpose: str | int) -> torch.Generator:
        """Return this task's generator for `purpose`: the same object, hence a continuing stream, at every call."""
        if purpose not in self._generators:
            self._generators[purpose] = generator(self.seed, "task", self.task.id, *purpose)
        return self._generators[purpose]

    def augment(self, x: Tensor) -> Tensor:
        """Return stored images as prepared, augmented floats (the train view)."""
        view = self.stream.transform.train(x, self.generator("augment", self.hardware.rank))
        return self.hardware.layout(view)


def fit(
    method: "Method",
    split: Split,
    ctx: Context,
    *,
    loss: Loss | None = None,
    params: Parameters | None = None,
    budget: Budget | None = None,
    name: str = "fit",
) -> None:
    """Minimise `loss(batch, ctx)` over `split`. The only place that owns an optimizer.

    One step: raw batch, `method.mix`, augment, loss, zero gradients, backward, average gradients over the processes,
    `method.adjust_gradients`, clip, optimizer step, schedule step, `method.after_step`. Optimizer and schedule are new
    for every fit.

    Args:
        method: the learner; its hooks run inside each step.
        split: rows to train on; every process reads its share of each batch.
        ctx: context of the current task.
        loss: objective; default `method.loss`.
        params: parameters or parameter groups to move; default `method.trainable()`.
        budget: length and optimizer; default the run's.
        name: keys the generators of shuffling, augmentation and dropout: two phases of a task differ.

    Raises:
        NumericalError: the loss is not finite; looked at every 50 steps and after the last one.
    """
    budget = budget or ctx.budget
    groups = list(method.trainable() if params is None else params)
    total = min(budget.total_steps(len(split)), ctx.max_steps if ctx.max_steps is not None else 2**62)
    if not groups or not total:
        return
    optimizer = budget.optimizer(groups)
    schedule = None if budget.schedule is None else budget.schedule(optimizer, total)
    view = ctx.generator("augment", name, ctx.hardware.rank)
    step = _Step(method, split, ctx, loss or method.loss, optimizer, budget.clip_norm, view)
    ctx.progress.moved.update(step.parameters)
    seed_all(ctx.seed, "task", ctx.task.id, name, ctx.hardware.rank)
    method.train()
    watch = getattr(optimizer, "watch", None)  # an optimizer that must see more than gradients
    with nullcontext() if watch is None else watch(method, ctx):
        for rows, share in _epochs(split, ctx, budget.batch_size, total, name):
            value = step(rows, share)
            if schedule is not None:
                schedule.step()
            method.after_step(ctx)
            ctx.progress.step += 1
            if ctx.progress.step % CHECK_EVERY == 0 or ctx.progress.step == total:
                _look(value, ctx)
            ctx.on_step(ctx.progress)
    optimizer.zero_grad(set_to_none=True)
    ctx.hardware.average_buffers(method)


def _epochs(split: Split, ctx: Context, size: int, total: int, name: str) -> Iterator[tuple[Batch, float]]:
    """Yield `total` raw batches with this process's weight in the mean over the global batch, epoch after epoch.

    The weight is 1 when the rows divide evenly, and 0 with no rows when a last batch has fewer rows than processes.
    """
    hardware, progress = ctx.hardware, ctx.progress
    progress.phase, progress.epoch, progress.step, progress.total = name, 0, 0, total
    order = ctx.generator("shuffle", name)
    while True:
        for start, batch in zip(
            range(0, len(split), size),
            split.batches(size, view="raw", shuffle=order, shard=(hardware.rank, hardware.world)),
            strict=True,
        ):
            rows = min(size, len(split) - start)
            yield batch, len(batch) * hardware.world / rows
            if progress.step == total:
                return
        progress.epoch += 1


@dataclass(frozen=True)
class _Step:
    """Gradient and update of one batch.

    Attributes:
        method: the learner.
        split: where the batches come from; its transform prepares them.
        ctx: context of the task.
        loss: objective.
        optimizer: owns the parameters that move.
        clip_norm: largest norm of the whole gradient; None does not clip.
        augmentation: source of the training view.
    """

    method: "Method"
    split: Split
    ctx: Context
    loss: Loss
    optimizer: Optimizer
    clip_norm: float | None
    augmentation: torch.Generator
    nothing: Tensor = field(default_factory=lambda: torch.zeros(()), init=False)

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that move."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def __call__(self, rows: Batch, share: float) -> Tensor:
        """Update the parameters; return the loss ([], detached) of this process's raw `rows`, 0 without any.

        `share` is the weight of the rows in the mean over the processes.
        """
        hardware, optimizer = self.ctx.hardware, self.optimizer
        value = self.nothing
        if share:
            batch = self._prepared(self.method.mix(rows, self.ctx))
            with hardware.autocast():
                value = self.loss(batch, self.ctx)
        for parameter in self.parameters:
            parameter.grad = None  # as optimizer.zero_grad does, without its bookkeeping
        if share:
            (value if share == 1 else value * share).backward()  # type: ignore[no-untyped-call]
        hardware.average_gradients(self.parameters)
        self.method.adjust_gradients(self.ctx)
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.ctx.progress.lr = float(optimizer.param_groups[0]["lr"])
        optimizer.step()
        return value.detach()

    def _prepared(self, raw: Batch) -> Batch:
        """Return the batch as the network sees it, with the raw rows beside."""
        x = self.split.transform.train(raw.x, self.augmentation)
        return Batch(self.ctx.hardware.layout(x), raw.y, raw.t, raw.i, raw.x)


def _look(value: Tensor, ctx: Context) -> None:
    """Log the loss and stop a run that has left the numbers."""
    progress, loss = ctx.progress, value.item()
    if not math.isfinite(loss):
        raise NumericalError(
            f"the loss is {loss} in task {ctx.task.id} ({ctx.task.name}), phase {progress.phase}, "
            f"step {progress.step}; a smaller learning rate or budget.clip_norm may help"
        )
    names = ("phase", "epoch", "step", "lr")
    ctx.log({**{name: getattr(progress, name) for name in names}, "loss": loss})
