"""DGC: a running estimate of the gradient on all past data, added to a replay method's (Lin et al., 2407.20956).

Memory between tasks: the memory of the host and 3 P floats (snapshot, estimate, accumulator) for P parameters. Task id:
not needed.

Verified: with weight 0 it is its host bit for bit, and with all rows in memory its estimate is the gradient on all past
data (test_methods_gradients).
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clrun.blocks.buffers import Buffer, per_process
from clrun.blocks.params import Carrier, Params, eval_mode, flatten, gradients, select, shapes_of, unflatten
from clrun.data.split import Batch
from clrun.data.stream import Stream, Task
from clrun.learning.budget import Budget
from clrun.learning.context import Context
from clrun.learning.knobs import Knob
from clrun.learning.losses import masked_cross_entropy, task_mean_cross_entropy
from clrun.learning.method import Method
from clrun.system.errors import ConfigError, NonNegative, PositiveInt

Mean = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Dgc(Method):
    """gradient <- that of the host + zeta * estimate of the gradient of the mean loss on all earlier tasks.

    Let d = grad l(theta) - grad l(snapshot) on rows of the host's memory, and h the gradient of the mean loss on all
    earlier data at the snapshot. When task t ends, one full pass in eval mode updates h <- ((t - 1) h + grad
    L_t(snapshot)) / t.

    Mode "svrg" is the variance-reduced estimate: every step adds h + d, with d on rows of earlier tasks and equal
    weight for each task; every `period` steps h <- h + d and snapshot <- theta. Mode "released" follows the published
    code: every step adds h alone, d on any rows of the memory is summed up in r, and every `period` steps
    h <- h + r / (period t), snapshot <- theta, r <- 0. We could not compare with the exact form in the paper.

    A row is judged among the classes that competed when its task was learned, because h was computed with them; the
    option `compete` of the host says which. Nothing happens in the first task. The sum is written into every gradient,
    also where the host left none.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        host: a replay method with a `memory`: er or der, with its options.
        zeta: weight of the estimate; 0 is the host. Published: 0.001.
        mode: "svrg" or "released".
        period: S, number of steps between two snapshots. Published: 200.
        memory_batch_size: number of memory rows that d is computed on, over all processes; null for all.
    """

    knobs = (Knob("zeta"),)

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        host: Callable[[nn.Module, int], Method],
        zeta: NonNegative,
        mode: Literal["svrg", "released"],
        period: PositiveInt,
        memory_batch_size: PositiveInt | None,
    ) -> None:
        super().__init__(backbone, num_classes)
        self.host = host(backbone, num_classes)
        self.samples_names = self.host.samples_names
        if not isinstance(getattr(self.host, "memory", None), Buffer):
            raise ConfigError(f"method.host: {type(self.host).__name__} has no memory to calibrate on; use er or der")
        for name, module in (("backbone", backbone), ("head", self.head)):
            delattr(self.host, name)  # the host reads them, but they are parts of this learner alone
            object.__setattr__(self.host, name, module)
        self.zeta, self.mode, self.period, self.memory_batch_size = zeta, mode, period, memory_batch_size
        self.past = Past()
        self.competed: Tensor | None = None  # [tasks so far, C] bool, while a task is learned

    def check(self, stream: Stream) -> None:
        self.host.check(stream)

    def check_budget(self, budget: Budget) -> None:
        self.host.check_budget(budget)

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        module, _, name = options["host"]["_target_"].rpartition(".")
        host = getattr(importlib.import_module(module), name)
        if isinstance(host, type) and issubclass(host, Method):
            host.check_options(options["host"])

    # --- hooks that are those of the host

    def begin_task(self, task: Task, ctx: Context) -> None:
        self.host.begin_task(task, ctx)
        self.competed = self._competed(ctx).to(ctx.hardware.device)

    def mix(self, batch: Batch, ctx: Context) -> Batch:
        return self.host.mix(batch, ctx)

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        return self.host.loss(batch, ctx)

    def competing(self, t: Tensor, ctx: Context) -> Tensor:
        return self.host.competing(t, ctx)

    def after_step(self, ctx: Context) -> None:
        self.host.after_step(ctx)

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        logits: Tensor = self.host(x)
        return logits

    # --- the calibration of its gradient

    def adjust_gradients(self, ctx: Context) -> None:
        self.host.adjust_gradients(ctx)
        if not self.zeta or ctx.task.index == 0:
            return
        params = select(self)
        current = gradients(params)
        for name, past in unflatten(self._estimate(ctx), shapes_of(params)).items():
            params[name].grad = current[name] + self.zeta * past

    def end_task(self, task: Task, ctx: Context) -> None:
        self.host.end_task(task, ctx)
        if self.zeta:
            if task.index == 0:
                self.past.begin(flatten(select(self)).detach())
            new = torch.zeros_like(self.past.gradient)
            for batch in task.train.batches(256):  # every process reads all rows
                new += len(batch) / len(task.train) * self._gradient(self.past.snapshot, batch, ctx, masked_mean)
            self.past.gradient = (task.index * self.past.gradient + new) / (task.index + 1)
        self.competed = None

    def _competed(self, ctx: Context) -> Tensor:
        """Return [tasks so far, C] bool: the classes that competed with the rows of each task when it was learned."""
        own = ctx.stream.members[: ctx.task.index + 1]
        if self.host.compete == "all":
            return torch.ones_like(own)
        return own if self.host.compete == "current" or ctx.stream.setting == "til" else own.cumsum(dim=0) > 0

    def _estimate(self, ctx: Context) -> Tensor:
        """Return the estimate [P] of the gradient on earlier data, and update its state."""
        past, now = self.past, flatten(select(self)).detach()
        difference = self._difference(now, ctx)
        new_snapshot = (ctx.progress.step + 1) % self.period == 0
        if self.mode == "svrg":
            estimate = past.gradient + difference
            if new_snapshot:
                past.gradient, past.snapshot = estimate, now.clone()
            return estimate
        past.total = past.total + difference
        if new_snapshot:
            past.gradient = past.gradient + past.total / (self.period * (ctx.task.index + 1))
            past.snapshot, past.total = now.clone(), torch.zeros_like(now)
        return past.gradient

    def _difference(self, now: Tensor, ctx: Context) -> Tensor:
        """Return d [P], the gradient on rows of the memory at `now` minus the one at the snapshot."""
        memory, rank, world = self.host.memory, ctx.hardware.rank, ctx.hardware.world
        assert isinstance(memory, Buffer)
        slots = torch.arange(len(memory), device=memory.t.device)
        if self.mode == "svrg":
            slots = slots[memory.t[: len(memory)] < ctx.task.index]
        if self.memory_batch_size is not None:
            drawn = torch.randperm(len(slots), generator=ctx.generator("calibration", rank))
            slots = slots[drawn[: per_process(self.memory_batch_size, rank=rank, world=world)].to(slots.device)]
        difference = torch.zeros_like(now)
        if len(slots):
            old = memory.read(slots)
            rows = Batch(ctx.stream.transform.eval(old.x), old.y, old.t, old.i)
            mean = task_mean_cross_entropy if self.mode == "svrg" else masked_mean
            difference = self._gradient(now, rows, ctx, mean) - self._gradient(self.past.snapshot, rows, ctx, mean)
        return ctx.hardware.sum(difference) / world

    def _gradient(self, weights: Tensor, rows: Batch, ctx: Context, mean: Mean) -> Tensor:
        """Return the gradient [P] of the mean loss of prepared rows at `weights` [P], in eval mode."""
        assert self.competed is not None
        params = select(self)
        at = {n: w.detach().clone().requires_grad_(True) for n, w in unflatten(weights, shapes_of(params)).items()}
        with eval_mode(self), torch.enable_grad(), ctx.hardware.autocast():
            features = functional_call(self.backbone, inside(at, "backbone."), (ctx.hardware.layout(rows.x),))
            logits = functional_call(self.head, inside(at, "head."), (features,))
            loss = mean(logits, rows.y, rows.t, self.competed[rows.t])
        return flatten(dict(zip(at, torch.autograd.grad(loss, list(at.values()), materialize_grads=True), strict=True)))


class Past(Carrier):
    """The gradient of the loss on all earlier data at a snapshot of the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.snapshot = torch.zeros(0)  # [P]
        self.gradient = torch.zeros(0)  # h [P]
        self.total = torch.zeros(0)  # r [P]

    def begin(self, weights: Tensor) -> None:
        """Take the first snapshot, when the first task ends."""
        self.snapshot = weights.clone()
        self.gradient, self.total = torch.zeros_like(weights), torch.zeros_like(weights)


def masked_mean(logits: Tensor, y: Tensor, t: Tensor, mask: Tensor) -> Tensor:
    """Return the mean cross-entropy [] over rows, with equal weights whatever their tasks."""
    return masked_cross_entropy(logits, y, mask)


def inside(params: Params, prefix: str) -> Params:
    """Return the parameters whose name begins with `prefix`, without it."""
    return {name.removeprefix(prefix): p for name, p in params.items() if name.startswith(prefix)}
