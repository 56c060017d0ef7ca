"""SWA and SWAG: averaged SGD iterates, a Gaussian around them (Izmailov et al., 1803.05407; Maddox et al., 1902.02476).

Memory between tasks, for P parameters that are averaged: nothing with predict=swa, whose mean is the network itself.
With predict=swag (rank + 1) P floats (deviations and variances), and the running statistics of each of the samples;
with strength > 0 2 floats (importance and anchor) for every parameter of the backbone. Task id: not needed.

Settings for continual learning are this project's own: there are no published ones.

Verified: golden values, one or equal snapshots give no variance, the mean is the arithmetic mean, samples have the
covariance of the definition, and with lr_ratio=1 and no snapshots but the last it is finetuning bit for bit
(test_methods_swag, test_methods).
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from clrun.blocks.curvature import Curvature, Diagonal, QuadraticPenalty, normalised
from clrun.blocks.iterates import Iterates
from clrun.blocks.merging import estimate_statistics
from clrun.blocks.params import Params, clone
from clrun.data.stream import Task
from clrun.learning.budget import Budget
from clrun.learning.context import Context
from clrun.learning.knobs import Knob
from clrun.learning.losses import Compete
from clrun.learning.training import fit
from clrun.methods.anchored import Anchored, Norm, Solver
from clrun.system.errors import ConfigError, Fraction, NonNegative, Positive, PositiveInt
from clrun.system.seeding import generator


class Swag(Anchored):
    """Each task ends with a tail of constant learning rate, whose iterates are averaged; the mean goes on.

    The learning rate is that of the budget up to half of the steps before the tail, falls linearly to lr_ratio of it at
    90 % of them, and stays there. Snapshots theta_1, theta_2, ... are taken in the tail; without any, the last weights
    are the only one. When the task ends, theta <- their mean, and the running statistics of batch normalisation are
    estimated anew on the rows of the task.

    predict=swag fits N(mean, Sigma) with Sigma = scale (diag(v) + D D' / (K - 1)): v are the variances of the
    snapshots, and the columns of D are the deviations of the last K <= rank snapshots from the mean as it was then.
    Predictions are the logarithms of the mean probability under `samples` draws, each with running statistics of its
    own. In the task-incremental setting, too, these are probabilities over all classes with initialised rows in the
    head.

    strength > 0 adds strength / 2 sum_i p_i (theta_i - theta*_i)^2 on the backbone, with the weights theta* after the
    last task and the precisions p = 1 / (v + damping) of all earlier ones, as Laplace's method would have from a Fisher
    information. With a single snapshot all variances are 0 and all p are the same.

    Deviations: K counts the snapshots that exist, where the public code (wjmaddox/swa_gaussian) divides by rank - 1
    also when there are fewer; variances are summed up around the running mean (Welford), because the difference of the
    mean square and the squared mean has no correct digit in float32 when the mean is large; the learning rate changes
    at every step and not once per epoch; running statistics are those of images without augmentation. A sample is drawn
    anew from its seed for every batch, instead of keeping `samples` networks.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        predict: "swa" or "swag".
        modules: shell-style patterns; parameters whose name ("backbone....", "head....") matches one are averaged. All
            parameters are trained.
        start_fraction: fraction of the steps of a fit before the tail.
        lr_ratio: learning rate of the tail relative to that of the budget.
        collect_every: epochs from one snapshot to the next, at least one step.
        rank: largest number of deviations that are kept.
        scale: factor of the covariance; 1/2 is the published one.
        samples: number of draws for predict=swag.
        strength: lambda; 0 for no penalty.
        damping: added to the variances before they are inverted.
        decay: factor of the importance when that of a task is added.
        normalise: divide the precisions of each task by their "mean" or "max", or do not ("none").
        solver: see `Anchored`.
        norm: see `Anchored`.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    own_weights = "predicts with averages of the weights over many steps"
    knobs: tuple[Knob, ...] = ()  # strength, unless it is 0: then there is no penalty to weaken

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        predict: Literal["swa", "swag"],
        modules: list[str],
        start_fraction: Fraction,
        lr_ratio: Positive,
        collect_every: Positive,
        rank: PositiveInt,
        scale: NonNegative,
        samples: PositiveInt,
        strength: NonNegative,
        damping: Positive,
        decay: Fraction,
        normalise: Literal["none", "mean", "max"],
        solver: Solver,
        norm: Norm,
        compete: Compete,
    ) -> None:
        penalty = QuadraticPenalty(decay)
        super().__init__(
            backbone, num_classes, strength=strength, solver=solver, norm=norm, penalty=penalty, compete=compete
        )
        self.knobs = Anchored.knobs if strength else ()
        self.predict, self.patterns, self.rank = predict, list(modules), rank
        self.start_fraction, self.lr_ratio, self.collect_every = start_fraction, lr_ratio, collect_every
        self.scale, self.samples, self.damping, self.normalise = scale, samples, damping, normalise
        self.iterates: Iterates | None = None  # of the current task, with predict=swag of the last one
        self.ensemble: list[Params] = []  # running statistics of each sample, while predictions are those of samples
        self.draw_seed: tuple[int, int] = (0, 0)  # of the run, and the id of the last task
        for pattern in self.patterns:
            if not any(fnmatchcase(name, pattern) for name, _ in self.named_parameters()):
                raise ConfigError(f"method.modules: no parameter matches '{pattern}'; try 'backbone.*' or 'head.*'")

    def check_budget(self, budget: Budget) -> None:
        super().check_budget(budget)
        if budget.schedule is not None:
            raise ConfigError("budget.schedule: swag brings its own learning rates; set budget.schedule=null")

    # --- a task

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        self.iterates, self.ensemble = Iterates(self.rank if self.predict == "swag" else 0), []

    def learn(self, task: Task, ctx: Context) -> None:
        schedule = partial(tail, start_fraction=self.start_fraction, lr_ratio=self.lr_ratio)
        fit(self, task.train, ctx, budget=replace(ctx.budget, schedule=schedule))

    def after_step(self, ctx: Context) -> None:
        super().after_step(ctx)
        epoch = math.ceil(len(ctx.task.train) / ctx.budget.batch_size)
        every, done = max(1, round(self.collect_every * epoch)), ctx.progress.step + 1
        beyond = done - round(self.start_fraction * ctx.progress.total)
        if beyond > 0 and beyond % every == 0:
            self._collect()

    def averaged(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are averaged, by name."""
        named = self.named_parameters()
        return {name: p for name, p in named if any(fnmatchcase(name, pattern) for pattern in self.patterns)}

    def _collect(self) -> None:
        assert self.iterates is not None, "begin_task makes it"
        self.iterates.add(self.averaged())

    def end_task(self, task: Task, ctx: Context) -> None:
        iterates = self.iterates
        assert iterates is not None, "begin_task makes it"
        averaging = iterates.count > 0
        if not averaging:
            self._collect()
        ctx.log({"phase": "swag", "snapshots": iterates.count})
        mean, refit = iterates.mean(), averaging and (self.norm == "train" or not task.index)
        if self.predict == "swag":
            self.draw_seed = ctx.seed, task.id
            self.ensemble = [self._statistics_of(self.draw(k, mean), task, refit=refit) for k in range(self.samples)]
        self._set(mean)
        if refit:
            estimate_statistics(self.backbone, task.train)
        if self.strength:
            super().end_task(task, ctx)
        iterates.drop_mean()  # from now on it is the weights of the network
        if self.predict == "swa":
            self.iterates = None

    def _statistics_of(self, sample: Params, task: Task, *, refit: bool) -> Params:
        """Return the running statistics that belong to sampled weights; empty if they are those of the network."""
        if not refit:
            return {}
        self._set(sample)
        found = estimate_statistics(self.backbone, task.train)
        buffers = {f"backbone.{name}": b for name, b in self.backbone.named_buffers() if b.is_floating_point()}
        return clone(buffers) if found else {}

    def curvature(self, task: Task, ctx: Context) -> Curvature:
        assert self.iterates is not None, "end_task calls this before it drops the snapshots"
        found = {name.removeprefix("backbone."): v for name, v in self.iterates.variance().items()}
        own = {name: found[name] for name, _ in self.backbone.named_parameters() if name in found}
        precision = {name: 1 / (variance + self.damping) for name, variance in own.items()}
        return normalised(Diagonal.of(precision), self.normalise)

    def _set(self, params: Mapping[str, Tensor]) -> None:
        """Give parameters of the method these values."""
        own = dict(self.named_parameters())
        with torch.no_grad():
            for name, value in params.items():
                own[name].copy_(value)

    # --- prediction

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        if self.training or not self.ensemble:
            return super().forward(x, task)
        unseen = ~self.head.initialised  # type: ignore[operator]
        mean, total = self.averaged(), torch.zeros((), device=x.device)
        for number, statistics in enumerate(self.ensemble):
            weights = {**self.draw(number, mean), **statistics}
            features = functional_call(self.backbone, _part(weights, "backbone."), (x,))
            logits = functional_call(self.head, _part(weights, "head."), (features,))
            total = total + logits.float().masked_fill(unseen, -torch.inf).softmax(dim=1)
        mean_probability = (total / len(self.ensemble)).clamp_min(torch.finfo(torch.float32).tiny)
        return mean_probability.log().masked_fill(unseen, 0.0)

    def draw(self, number: int, mean: Mapping[str, Tensor]) -> Params:
        """Return the parameters of a sample around their `mean`: for a number the same ones until a task ends."""
        assert self.iterates is not None, "there are samples with predict=swag only"
        return self.iterates.sample(mean, generator(*self.draw_seed, "swag", number), self.scale)


def tail(optimizer: Optimizer, total_steps: int, *, start_fraction: float, lr_ratio: float) -> LRScheduler:
    """Return the schedule of the public code: constant, falling between half and 90 % of the way to the tail, constant.

    Args:
        optimizer: whose learning rates are multiplied.
        total_steps: of the fit.
        start_fraction: fraction of the steps before the tail.
        lr_ratio: factor of the learning rate in the tail.
    """
    start = start_fraction * total_steps

    def factor(step: int) -> float:
        way = step / start if start else 1.0
        return 1 - (1 - lr_ratio) * min(1.0, max(0.0, (way - 0.5) / 0.4))

    return LambdaLR(optimizer, factor)


def _part(weights: Params, prefix: str) -> Params:
    """Return the tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
