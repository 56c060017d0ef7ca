"""HALRP: each task is the base network, rescaled, plus low-rank matrices (Li et al., TKDE 2024, arXiv 2311.15161).

Memory between tasks: the base; per task and layer [m, n], m + n + (m + n) r numbers for rank r (fewer after pruning),
and biases, normalisation layers and a head. `growth` bounds all of it. Task id: needed.

Verified: learned tasks stay the same bit for bit, growth counts everything that is stored, and with a frozen base every
order gives the same result (test_methods_low_rank).
"""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from clrun.blocks.low_rank import (
    LowRank,
    Residual,
    bits_bytes,
    copy_for_task,
    decompose,
    install,
    layer_curvature,
    layers_of,
    low_rank_layers,
    prune,
    select_ranks,
    stored_bytes,
)
from clrun.data.split import Batch
from clrun.data.stream import Stream, Task
from clrun.learning.budget import Budget
from clrun.learning.context import Context
from clrun.learning.heads import TaskHead
from clrun.learning.method import freeze
from clrun.learning.training import fit
from clrun.methods.task_networks import TaskNetworks
from clrun.system.errors import ConfigError, Count, Fraction, NonNegative, Positive, PositiveInt

BYTES = 4  # bytes per number


class Halrp(TaskNetworks):
    """A task warms up a full copy of the base, factorises it into few numbers, and fine-tunes these.

    Warm-up: a copy of the base learns the task by cross-entropy. Factorisation: the result is approximated in closed
    form, W_warm ~ D(R) W0 D(S) + U V, with the base's weights W0, diagonal matrices of the scales R and S, and low-rank
    factors U and V. Leaving out a singular value s of the residual in layer l costs about h_l cells_l s^2 of loss,
    where h_l is the layer's mean curvature and cells_l the number of window positions at which one entry of the
    residual is used (1 for a linear layer). The ranks of all layers are chosen together from these scores. Fine-tuning
    trains R, S, U, V, biases, normalisation layers and head on

        CE + l1 sum (|U|_1 + |V|_1) + l2 / 2 sum (|R - c|^2 + |S - c|^2 + |U|^2 + |V|^2).

    When the task ends, it is pruned once; a learned task is never changed again. A task depends on the base and its own
    data alone. Deviations from the public code: S solves its least-squares problem; l2 pulls the weights to those of
    the base and not to 0; curvature is measured on a sample of the training rows; earlier tasks are not pruned again,
    and each task has its share of the growth; steps on R and S are shortened (see `adjust_gradients`).

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        base: "first_task": the first task trains the base, on CE + l2 / 2 sum |W|^2. "backbone": the base is the
            backbone as it was loaded, for example pre-trained; then the order of the tasks has no effect at all.
        warmup: budget of the warm-up. The run's budget is spent on fine-tuning, and on the first task if it trains the
            base.
        ranks: "curvature": the largest scores whose sum is `share` of the total. "cost_aware": the largest scores per
            stored number, as many as `growth` has room for. "flat": the same rank in every layer, `highest_rank` or
            what there is room for.
        share: alpha, fraction of the estimated loss that is kept.
        lowest_rank: smallest rank of a layer.
        highest_rank: largest rank of a layer.
        curvature_data: rows that the curvature is measured on: "train", or "val", which the public code uses if there
            are any.
        curvature_samples: number of these rows, drawn without replacement; null for all.
        sweeps: number of alternations in the least-squares problem for R and S.
        conv: residual of a convolution: "mean" over the window (the paper), or "unfold", in which every position of the
            window has its own.
        l1: lambda_1, pulls U and V to 0.
        l2: lambda_2.
        l2_centre: c of the penalty on R and S: "one", or "zero", which weakens the base (the public code).
        growth: bytes that all tasks together may add, relative to the bytes of the base (with the first task's head, if
            it trained the base): scales, factors with the indices of their entries, biases, normalisation layers with
            their statistics, heads. Tasks share it equally. Null for no limit.
        threshold: entries of U and V of at most this absolute value become 0.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        base: Literal["first_task", "backbone"],
        warmup: Budget,
        ranks: Literal["curvature", "cost_aware", "flat"],
        share: Fraction,
        lowest_rank: Count,
        highest_rank: PositiveInt,
        curvature_data: Literal["train", "val"],
        curvature_samples: PositiveInt | None,
        sweeps: PositiveInt,
        conv: Literal["mean", "unfold"],
        l1: NonNegative,
        l2: NonNegative,
        l2_centre: Literal["one", "zero"],
        growth: Positive | None,
        threshold: NonNegative,
    ) -> None:
        super().__init__(backbone, num_classes)
        if lowest_rank > highest_rank:
            raise ConfigError(f"method.lowest_rank: must be at most method.highest_rank={highest_rank}")
        if ranks == "cost_aware" and growth is None:
            raise ConfigError("method.ranks=cost_aware: needs a budget; set method.growth")
        if not (warmup.epochs or warmup.steps):
            raise ConfigError("method.warmup: the ranks come from the warm-up; give it at least one epoch or step")
        self.base, self.warmup, self.ranks, self.share = base, warmup, ranks, share
        self.lowest_rank, self.highest_rank = lowest_rank, highest_rank
        self.curvature_data, self.curvature_samples = curvature_data, curvature_samples
        self.sweeps, self.unfold = sweeps, conv == "unfold"
        self.l1, self.l2, self.centre = l1, l2, 1.0 if l2_centre == "one" else 0.0
        self.growth, self.threshold = growth, threshold
        self.depends_on_task_count = growth is not None  # each task has its share
        self.order_invariant = base == "backbone"
        self.allowance: float | None = None  # bytes that one task may add
        self.added: list[tuple[int, int]] = []  # by each task but that of the base: bytes, and numbers
        self.stretches: list[tuple[LowRank, Tensor, Tensor]] = []  # of the scales, while a task is fine-tuned
        if base == "backbone":
            freeze(self.backbone)

    # --- a task

    def new_network(self, task: Task, ctx: Context) -> nn.Module:
        return self.backbone if self._is_base(task) else copy_for_task(self.backbone)

    def check(self, stream: Stream) -> None:
        super().check(stream)
        if self.curvature_data == "val" and self.ranks != "flat" and not all(task.val for task in stream.tasks):
            raise ConfigError("method.curvature_data=val: there are no validation rows; set dataset.val_fraction")
        if self.growth is not None:
            self._divide(stream, self.growth)

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        if task.index == 0 and self.growth is not None:
            self._divide(ctx.stream, self.growth)

    def learn(self, task: Task, ctx: Context) -> None:
        if self._is_base(task):
            fit(self, task.train, ctx, loss=self.first_loss)
            return
        fit(self, task.train, ctx, budget=self.warmup, name="warmup")
        self.install_residuals(task, ctx)
        fit(self, task.train, ctx, loss=self.fine_loss)

    def end_task(self, task: Task, ctx: Context) -> None:
        super().end_task(task, ctx)
        self.stretches = []
        if self._is_base(task):
            return
        self._prune(low_rank_layers(self.networks[-1]).values())
        self.added.append(self._added())
        ctx.log({"phase": "growth", **self.growth_of()})

    def trainable(self) -> Iterable[nn.Parameter]:
        """Return only the current task's trainable parameters: scanning earlier tasks would take time."""
        return (p for module in (self.networks[-1], self.heads[-1]) for p in module.parameters() if p.requires_grad)

    def _is_base(self, task: Task) -> bool:
        """Whether `task` trains the base."""
        return self.base == "first_task" and task.index == 0

    def adjust_gradients(self, ctx: Context) -> None:
        """Shorten the steps of R and S so that under SGD they move the weight no further than a step on it would.

        A step on R_o moves the row o of the weight by |W0[o] S|^2 times what a step on that row would move it; so do
        transformers with large weights diverge at learning rates that suit them. Adam does not notice.
        """
        for layer, rows, columns in self.stretches:
            for scale, stretch in ((layer.rows, rows), (layer.columns, columns)):
                if scale.grad is not None:
                    scale.grad /= stretch

    # --- losses

    def first_loss(self, batch: Batch, ctx: Context) -> Tensor:
        """Return the loss of the task that trains the base."""
        squares = [layer.weight.square().sum() for layer in layers_of(self.backbone).values()]
        return self.loss(batch, ctx) + self.l2 / 2 * torch.stack(squares).sum()

    def fine_loss(self, batch: Batch, ctx: Context) -> Tensor:
        """Return the loss of fine-tuning."""
        loss = self.loss(batch, ctx)
        for layer in low_rank_layers(self.networks[-1]).values():
            factors = (layer.left.value, layer.right.value)
            scales = (layer.rows - self.centre, layer.columns - self.centre)
            if self.l1:
                loss = loss + self.l1 * sum(f.abs().sum() for f in factors)
            if self.l2:
                loss = loss + self.l2 / 2 * sum(p.square().sum() for p in (*factors, *scales))
        return loss

    # --- ranks

    def install_residuals(self, task: Task, ctx: Context) -> None:
        """Turn the warmed-up network of the current task into the rescaled base plus low-rank matrices."""
        network = self.networks[-1]
        warm, base = layers_of(network), layers_of(self.backbone)
        curvature = self._curvature(task, ctx, {name: layer.weight for name, layer in warm.items()})
        residuals = {
            name: decompose(base[name].weight, warm[name].weight, sweeps=self.sweeps, unfold=self.unfold)
            for name in warm
        }
        ranks = self._ranks(residuals, curvature)
        install(network, self.backbone, {name: r.parts(ranks[name]) for name, r in residuals.items()})
        self.stretches = [(layer, *layer.stretches()) for layer in low_rank_layers(network).values()]
        ctx.log({"phase": "ranks", **{f"rank/{name}": rank for name, rank in ranks.items()}})

    def _curvature(self, task: Task, ctx: Context, weights: dict[str, Tensor]) -> dict[str, float]:
        """Return h of each layer."""
        if self.ranks == "flat":
            return dict.fromkeys(weights, 1.0)
        split = task.train if self.curvature_data == "train" else task.val
        assert split is not None  # checked
        rows = torch.randperm(len(split), generator=ctx.generator("curvature"))[: self.curvature_samples]
        split = split.select(rows.to(split.y.device))
        network, size = self.networks[-1], ctx.budget.batch_size
        return layer_curvature(network, split, ctx, loss=self.loss, weights=weights, batch_size=size)

    def _ranks(self, residuals: dict[str, Residual], curvature: dict[str, float]) -> dict[str, int]:
        """Return the rank of each layer."""
        numbers = {name: sum(r.matrix.shape) for name, r in residuals.items()}  # stored for one rank
        share = 1.0
        if self.ranks == "flat":  # the first values of all layers come first, whatever they are
            scores = {name: 1.0 / torch.arange(1, len(r.energy) + 1) for name, r in residuals.items()}
        else:
            scores = {name: curvature[name] * r.cells * r.energy for name, r in residuals.items()}
        if self.ranks == "curvature":
            share = self.share
        elif self.ranks == "cost_aware":
            scores = {name: score / numbers[name] for name, score in scores.items()}
        costs, room = None, math.inf
        if self.allowance is not None:
            # Either the factors fit as they are, or they are pruned, and the places of entries may take half the room.
            each = BYTES if self.ranks == "cost_aware" else 2 / 8
            costs = {name: each * number for name, number in numbers.items()}
            room = self._room() - BYTES * self.lowest_rank * sum(numbers.values())
        limits = {"lowest": self.lowest_rank, "highest": self.highest_rank}
        return select_ranks(scores, alpha=share, costs=costs, budget=room, **limits)

    # --- growth

    def _divide(self, stream: Stream, growth: float) -> None:
        """Give each task its share of the growth; refuse a growth that cannot hold what is never pruned."""
        tasks = [task for task in stream.tasks if not self._is_base(task)]
        network = copy_for_task(self.backbone)
        columns = sum(w[0].numel() if self.unfold else w.shape[1] for w in self._weights(network))
        rows = sum(len(w) for w in self._weights(network))
        least = self._unpruned_bytes(network) + BYTES * self.lowest_rank * (rows + columns)
        least += max(map(self._head_bytes, tasks), default=0)
        base = stored_bytes([self.backbone])  # the first head may not be there yet
        base += self._head_bytes(stream.tasks[0]) if self.base == "first_task" else 0
        self.allowance = growth * base / max(1, len(tasks))
        if least > self.allowance:
            raise ConfigError(
                f"method.growth={growth:g}: scales, biases, norms and heads of {len(tasks)} tasks take "
                f"{least * len(tasks) / base:.3f} of the base; use more, or null for no limit"
            )

    def _head_bytes(self, task: Task) -> int:
        """Return the bytes of the head of a task."""
        width = int(self.backbone.num_features)  # type: ignore[arg-type]
        return stored_bytes([TaskHead(width, task.classes, self.num_classes)])

    def _weights(self, network: nn.Module) -> list[Tensor]:
        """Return the weights of a network that has no residuals yet."""
        return [layer.weight.detach() for layer in layers_of(network).values()]

    def _unpruned_bytes(self, *modules: nn.Module) -> int:
        """Return the bytes of a task besides its factors, before its weights are replaced by scales and factors."""
        weights = self._weights(modules[0])
        own = stored_bytes(modules, without=self.backbone) - sum(w.nbytes for w in weights)
        return own + sum(BYTES * sum(w.shape[:2]) for w in weights)

    def _room(self) -> float:
        """Return the bytes that the factors of the current task may take, before they are installed."""
        assert self.allowance is not None
        return self.allowance - self._unpruned_bytes(self.networks[-1], self.heads[-1])

    def _prune(self, layers: Iterable[LowRank]) -> None:
        """Set small entries of the current task's factors to 0, as many as the growth demands, and store the others."""
        factors = [factor for layer in layers for factor in (layer.left, layer.right)]
        for factor in factors:
            small = factor.value.detach().abs() <= self.threshold
            factor.value.detach().masked_fill_(small, 0.0)
        taken = sum(factor.value.nbytes for factor in factors)
        stored = stored_bytes([self.networks[-1], self.heads[-1]], without=self.backbone)
        if self.allowance is not None and stored > self.allowance:
            places = sum(bits_bytes(factor.value.numel()) for factor in factors)
            prune(factors, entries=int(self.allowance - (stored - taken) - places) // BYTES)
        for factor in factors:
            factor.compress()

    def _base_modules(self) -> list[nn.Module]:
        """Return the modules whose size the growth is relative to."""
        return [self.backbone, *self.heads[:1]] if self.base == "first_task" else [self.backbone]

    def _base_bytes(self) -> int:
        """Return the bytes that the growth is relative to."""
        return stored_bytes(self._base_modules())

    def growth_of(self) -> dict[str, float]:
        """Return the growth caused by the tasks so far: in bytes, and in numbers as the paper counts them.

        The paper counts numbers: scales, factors without their zeros, norms and heads; neither the biases of layers,
        nor running statistics, nor where the entries of pruned factors belong.
        """
        base = sum(p.numel() for module in self._base_modules() for p in module.parameters())
        stored, numbers = (sum(column) for column in zip((0, 0), *self.added, strict=True))
        return {"growth": stored / self._base_bytes(), "growth_paper": numbers / base}

    def _added(self) -> tuple[int, int]:
        """Return the bytes of the current task, pruned, and its numbers as the paper counts them."""
        network, head = self.networks[-1], self.heads[-1]
        known = {id(p) for p in self.backbone.parameters()}
        own = {id(p): p for module in (network, head) for p in module.parameters() if id(p) not in known}
        biases = [layer.bias for layer in low_rank_layers(network).values()]
        numbers = sum(p.numel() for p in own.values()) - sum(b.numel() for b in biases if b is not None)
        return stored_bytes([network, head], without=self.backbone), numbers
