"""The only loop over optimizer steps: `fit` minimises a loss over the rows of a split."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clrun.data.split import Batch, Split
from clrun.learning.budget import Budget
from clrun.learning.context import Context
from clrun.learning.names import NamesHead
from clrun.learning.progress import Running
from clrun.system.errors import ConfigError, NumericalError
from clrun.system.seeding import seed_all

Loss = Callable[[Batch, Context], Tensor]
Parameters = Iterable[nn.Parameter] | list[dict[str, Any]]
CHECK_EVERY = 50  # number of steps between two checks that the loss is finite; each check waits for the device


class Learner(Protocol):
    """What `fit` needs of a method; `clrun.learning.method.Method` documents these hooks."""

    def mix(self, batch: Batch, ctx: Context) -> Batch:
        """Return the raw batch to train on."""

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        """Return the training loss [] of a prepared batch."""

    def adjust_gradients(self, ctx: Context) -> None:
        """Change the gradients after backward and before the optimizer step."""

    def after_step(self, ctx: Context) -> None:
        """Act after an optimizer step."""

    def trainable(self) -> Parameters:
        """Return the parameters, or parameter groups, that `fit` trains by default."""

    def train(self, mode: bool = True) -> Any:
        """Set the training mode."""

    def buffers(self) -> Iterator[Tensor]:
        """Return the buffers, which hold running statistics."""


def fit(
    method: Learner,
    split: Split,
    ctx: Context,
    *,
    loss: Loss | None = None,
    params: Parameters | None = None,
    budget: Budget | None = None,
    name: str = "fit",
    passed: int = 0,
) -> None:
    """Minimise `loss(batch, ctx)` over `split`. The only place that owns an optimizer.

    One step: raw batch, `method.mix`, augment, loss, zero gradients, backward, average gradients over the processes,
    `method.adjust_gradients`, clip, optimizer step, schedule step, `method.after_step`. Optimizer and schedule are new
    for every fit.

    Args:
        method: the learner; its hooks run inside each step.
        split: rows to train on; each process reads a part of every batch.
        ctx: context of the current task.
        loss: objective; default `method.loss`.
        params: parameters or parameter groups to train; default `method.trainable()`. The learning rate of a group with
            the key "lr_factor" is that of the budget times this factor, and times the budget's factor of the task.
        budget: length and optimizer; default is the budget of the run.
        name: name of the fit. Two fits of a task with different names shuffle and augment differently.
        passed: passes over the split that count as made before: the first epoch has this number. Rows of epoch 0 are
            offered to memories.

    Raises:
        NumericalError: the loss is NaN or infinite. It is checked every 50 steps and after the last step.
    """
    budget = budget or ctx.budget
    groups = list(method.trainable() if params is None else params)
    total = min(budget.total_steps(len(split)), ctx.max_steps if ctx.max_steps is not None else 2**62)
    if not groups or not total:
        return
    optimizer = budget.optimizer(groups)
    for group in optimizer.param_groups:
        group["lr"] *= group.get("lr_factor", 1.0) * budget.lr_factor(ctx.task.name)
    schedule = None if budget.schedule is None else budget.schedule(optimizer, total)
    view = ctx.generator("augment", name, ctx.hardware.rank)
    step = _Step(method, split, ctx, loss or method.loss, optimizer, budget.clip_norm, view)
    ctx.progress.trained.update(step.parameters)
    ctx.progress.phase, ctx.progress.epoch, ctx.progress.step, ctx.progress.total = name, passed, 0, total
    seed_all(ctx.seed, "task", ctx.task.id, name, ctx.hardware.rank)
    method.train()
    running = Running(method, (step.loss, groups, split), optimizer, schedule, ctx.progress, ctx.generators)
    if not ctx.keeper.begin(running):
        _steps(step, running, budget.batch_size, passed)
        optimizer.zero_grad(set_to_none=True)
        ctx.hardware.average_buffers(method.buffers())
        ctx.keeper.end(running)


def _steps(step: "_Step", running: Running, size: int, passed: int) -> None:
    """Take the steps of a fit that are left, in batches of `size` rows; `passed` is the number of its first epoch."""
    ctx, progress, schedule = step.ctx, running.progress, running.schedule
    watch = getattr(running.optimizer, "watch", None)  # of an optimizer that needs more than gradients
    with ctx.keeper.stepping(), nullcontext() if watch is None else watch(step.method, ctx):
        for rows, weight in _epochs(step.split, running, ctx, size, passed):
            value = step(rows, weight)
            if schedule is not None:
                schedule.step()
            step.method.after_step(ctx)
            progress.step += 1
            if progress.step % CHECK_EVERY == 0 or progress.step == progress.total:
                _check_loss(value, ctx)
            ctx.on_step(progress)
            ctx.keeper.after_step(running)


def _epochs(split: Split, running: Running, ctx: Context, size: int, passed: int) -> Iterator[tuple[Batch, float]]:
    """Yield the raw batches of this process that are left, epoch after epoch, each with its weight in the mean.

    The weight is 1 when all processes have equally many rows of the batch. When a last batch has fewer rows than there
    are processes, some of them get no rows and the weight 0.
    """
    hardware, progress = ctx.hardware, running.progress
    order, starts = ctx.generator("shuffle", progress.phase), range(0, len(split), size)
    while progress.step < progress.total:
        again, skip = divmod(progress.step, len(starts))
        progress.epoch = passed + again
        with ctx.keeper.drawing(running, again=skip > 0):
            batches = split.batches(size, view="raw", shuffle=order, shard=(hardware.rank, hardware.world), skip=skip)
        for start, batch in zip(starts[skip:], batches, strict=True):
            rows = min(size, len(split) - start)
            yield batch, len(batch) * hardware.world / rows
            if progress.step == progress.total:
                return


@dataclass(frozen=True)
class _Step:
    """Computes the gradient of one batch and updates the parameters.

    Attributes:
        method: the learner.
        split: the source of the batches; its transform prepares them.
        ctx: context of the task.
        loss: the objective.
        optimizer: owns the parameters that are trained.
        clip_norm: largest norm of the whole gradient; None does not clip.
        augmentation: generator of the random numbers of augmentation.
    """

    method: Learner
    split: Split
    ctx: Context
    loss: Loss
    optimizer: Optimizer
    clip_norm: float | None
    augmentation: torch.Generator
    no_loss: Tensor = field(default_factory=lambda: torch.zeros(()), init=False)

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def __call__(self, rows: Batch, weight: float) -> Tensor:
        """Update the parameters; return the loss ([], detached) of the raw `rows` of this process, 0 when it has none.

        `weight` is the weight of these rows in the mean over the processes.

        Raises:
            ConfigError: `mix` has returned something else than a batch.
        """
        hardware, optimizer = self.ctx.hardware, self.optimizer
        value = self.no_loss
        if weight:
            mixed = self.method.mix(rows, self.ctx)
            if not isinstance(mixed, Batch):
                raise ConfigError(
                    f"method: {type(self.method).__name__}.mix returned {type(mixed).__name__}, expected a "
                    "clrun.data.split.Batch; end it with 'return batch'"
                )
            batch = self._prepared(mixed)
            with hardware.autocast():
                value = self.loss(batch, self.ctx)
            _check_scalar(value, self.method)
        for parameter in self.parameters:
            parameter.grad = None  # what optimizer.zero_grad does, in less time
        if weight:
            (value if weight == 1 else value * weight).backward()  # type: ignore[no-untyped-call]
        hardware.average_gradients(self.parameters)
        self.method.adjust_gradients(self.ctx)
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.ctx.progress.lr = float(optimizer.param_groups[0]["lr"])
        optimizer.step()
        return value.detach()

    def _prepared(self, raw: Batch) -> Batch:
        """Return the prepared batch, which also holds the raw rows."""
        x = self.split.transform.train(raw.x, self.augmentation)
        return Batch(self.ctx.hardware.layout(x), raw.y, raw.t, raw.i, raw.x)


def _check_scalar(value: Any, method: Any) -> None:
    """Refuse a loss that cannot be minimised, before the first gradient.

    Raises:
        ConfigError: the head is trained alone, and its rows are fixed texts.
        TypeError: the loss is no scalar tensor, or nothing that is trained has a part in it.
    """
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        head = getattr(method, "head", None)
        if isinstance(value, Tensor) and isinstance(head, NamesHead) and head.names != "init":
            raise ConfigError(
                f"backbone.head: {type(method).__name__} trains its head alone at this point, and the rows of "
                f"'{head.names}' are not trained; set it to init or linear"
            )
        found = type(value).__name__
        if isinstance(value, Tensor):
            found = f"a tensor {list(value.shape)}" + ("" if value.requires_grad else " without a gradient")
        raise TypeError(f"the loss must be a scalar tensor with a gradient, got {found}")


def _check_loss(value: Tensor, ctx: Context) -> None:
    """Log the loss; stop a run whose loss is NaN or infinite."""
    progress, loss = ctx.progress, value.item()
    if not math.isfinite(loss):
        raise NumericalError(
            f"the loss is {loss} in task {ctx.task.id} ({ctx.task.name}), phase {progress.phase}, "
            f"step {progress.step}; a smaller learning rate or budget.clip_norm may help"
        )
    names = ("phase", "epoch", "step", "lr")
    ctx.log({**{name: getattr(progress, name) for name in names}, "loss": loss})
