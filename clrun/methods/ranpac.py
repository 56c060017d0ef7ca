"""RanPAC: ridge regression on randomly projected frozen features (McDonnell et al., NeurIPS 2023, arXiv 2307.02251).

Memory between tasks: 4 D M bytes of projection, 8 M^2 + C (8 M + 8) of sums (both twice for the held-out rule), 8 C M
of weights; kept task statistics T times the sums; after phase 1 what adapts, 4 bytes for each of L D, n L D, 22 D n + 4
D or n (2 D r + r + D) numbers. Task id: not needed.

Verified: without projection it is joint ridge regression, golden weights, AOPD 0, unlearning to 1e-9
(test_methods_closed_form).
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clrun.blocks.adaptation import Adaptation, Recipe
from clrun.blocks.ridge import RandomProjection, Spectrum, best_by_gcv, best_held_out, ridge
from clrun.blocks.statistics import ClassStats
from clrun.data.split import Batch
from clrun.data.stream import Stream, Task
from clrun.learning.context import Context
from clrun.learning.heads import SolvedHead
from clrun.learning.method import freeze
from clrun.learning.training import fit
from clrun.methods.closed_form import ClosedForm
from clrun.system.errors import ConfigError, Count, Fraction, NonNegative, Positive, PositiveInt, Range
from clrun.system.seeding import generator

Phase1 = Literal["none", "adapter", "ssf", "vpt_shallow", "vpt_deep"]
Rule = Literal["heldout", "gcv", "fixed", "author"]


class Ranpac(ClosedForm):
    """h = ReLU(f W) with a fixed random W [D, M]; ridge regression of one-hot labels on h over all rows so far.

    The published code chooses the strength on the last task alone and uses it for all (rule "author"): then the order
    of the tasks matters. By default it is chosen on one fifth of all rows so far, which are told by a hash of their
    place in the data set, with the squared error computed from sums; the weights are then fitted to all rows.

    In the published phase 1 the first task trains adapters, scales and shifts, or prompts with the run's budget, as
    APER does; everything is frozen from then on, and sums and predictions are those of the adapted model. What the
    first task holds then decides what is adapted: the order matters through it, and the first task cannot be unlearned.

    Args:
        backbone: identity of width D, the engine feeds features; with a phase 1, a timm vision transformer, frozen.
        num_classes: C.
        phase1: what the first task trains; "none" leaves the backbone as it is.
        length: prompts of "vpt_shallow", or of each block for "vpt_deep", which begin at 0.
        bottleneck: r, width of adapters.
        adapter_scale: factor of an adapter's output, not trained.
        dropout: share of an adapter's activations dropped in training.
        ssf_std: of the initial scales about 1 and shifts about 0.
        cosine_scale: initial value of the trained factor of the cosine head.
        m: M; 0 is ridge regression on the features themselves.
        projection_seed: of W, independent of the seed of the run.
        rule: how the strength of the ridge is chosen: "heldout"; "gcv" (generalised cross-validation on all rows so
            far); "fixed" (the first of `strengths`); "author" (one fifth of the current task, drawn by the seed).
        strengths: to choose from; they add to the diagonal of the Gram matrix.
        held_out: share of the rows that the rules "heldout" and "author" choose on.
        forget_tasks: ids of tasks to unlearn at the end.
        keep_task_statistics: keep the sums of each task as well; see `ClosedForm`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        phase1: Phase1,
        length: Count,
        bottleneck: PositiveInt,
        adapter_scale: float,
        dropout: Fraction,
        ssf_std: NonNegative,
        cosine_scale: Positive,
        m: Count,
        projection_seed: Count,
        rule: Rule,
        strengths: list[Positive],
        held_out: Annotated[float, Range(above=0, maximum=0.9)],
        forget_tasks: list[Count],
        keep_task_statistics: bool,
    ) -> None:
        super().__init__(backbone, num_classes, forget_tasks=forget_tasks, keep_task_statistics=keep_task_statistics)
        if not strengths:
            raise ConfigError("method.strengths: must list at least one strength")
        self.rule: Rule = rule
        self.strengths, self.held_out = list(strengths), held_out
        self.adaptation: Adaptation | None = None
        self.hooks_backbone = phase1 != "none"
        if phase1 != "none":
            freeze(backbone)
            recipe = Recipe(phase1, length, bottleneck, adapter_scale, dropout, ssf_std, cosine_scale)
            self.adaptation = Adaptation(backbone, num_classes, recipe, method=f"Ranpac with method.phase1={phase1}")
        self.phase1 = phase1
        self.order_invariant = rule != "author" and phase1 == "none"
        self.projection = RandomProjection(self.width, m, seed=projection_seed)
        self.head: SolvedHead = SolvedHead(self.projection.num_features, num_classes)

    @classmethod
    def reads_features(cls, options: Mapping[str, Any]) -> bool:
        return bool(options["phase1"] == "none")

    def check(self, stream: Stream) -> None:
        super().check(stream)
        if self.adaptation is not None and stream.order[0] in self.forget_tasks:
            raise ConfigError(
                f"method.forget_tasks: task {stream.order[0]} comes first and shapes the features for all others; "
                "it can be unlearned with method.phase1=none only"
            )

    # --- phase 1

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        if self.adaptation is not None and task.index == 0:
            self.adaptation.begin(task.classes)

    def learn(self, task: Task, ctx: Context) -> None:
        if self.adaptation is not None and task.index == 0:
            fit(self, task.train, ctx)
            self.adaptation.end()
        super().learn(task, ctx)

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        assert self.adaptation is not None, "nothing else is trained"
        return self.adaptation.loss(self.backbone, batch, ctx.mask(batch.t, "current"))

    def after_step(self, ctx: Context) -> None:
        if self.adaptation is not None:
            self.adaptation.release()

    def features(self, x: Tensor) -> Tensor:
        return super().features(x) if self.adaptation is None else self.adaptation.features(self.backbone, x)

    def constant(self, x: Tensor) -> Tensor | None:
        return self.features(x) if self.adaptation is not None and self.adaptation.done else None

    def forward_with(self, constant: Tensor, x: Tensor, task: int | None = None) -> Tensor:
        return self.scores(constant)

    # --- statistics and their solution

    def empty(self) -> dict[str, ClassStats]:
        names = ("fitted", "held_out") if self.rule == "heldout" else ("fitted",)
        return {name: ClassStats(self.projection.num_features, self.num_classes, moments="pooled") for name in names}

    def lift(self, features: Tensor) -> Tensor:
        lifted: Tensor = self.projection(features)
        return lifted

    def update(self, statistics: dict[str, ClassStats], features: Tensor, y: Tensor, rows: Tensor) -> None:
        lifted = self.lift(features)
        if self.rule != "heldout":
            statistics["fitted"].update(lifted, y)
            return
        apart = uniform(rows) < self.held_out
        statistics["fitted"].update(lifted[~apart], y[~apart])
        statistics["held_out"].update(lifted[apart], y[apart])

    def solve(self, task: Task, ctx: Context) -> None:
        fitted = self.stats("fitted")
        if self.rule == "gcv":
            strength, weights = best_by_gcv(fitted, self.strengths)
        elif self.rule == "heldout":
            apart = self.stats("held_out")
            if not (fitted.total() and apart.total()):
                total = fitted.total() + apart.total()
                raise ConfigError(f"method.held_out: {total} rows cannot be split; change it, or take method.rule=gcv")
            strength = best_held_out(fitted, apart, self.strengths)
            weights = ridge(strength, fitted, apart)
        else:
            strength = self.strengths[0] if self.rule == "fixed" else self._by_author(task, ctx)
            weights = ridge(strength, fitted)
        ctx.log({"phase": "solve", "strength": strength})
        self.head.weight.copy_(weights.t())

    def _by_author(self, task: Task, ctx: Context) -> float:
        """Return the strength with the smallest squared error on a share of the current task, fitted on the rest."""
        parts = [(features, batch.y) for features, batch in self.read(task.train, ctx)]
        features, y = (torch.cat(part) for part in zip(*parts, strict=True))
        lifted, targets = self.lift(features).double(), F.one_hot(y, self.num_classes).double()
        order = torch.randperm(len(y), generator=generator(ctx.seed, "task", task.id, "ridge")).to(y.device)
        count = int(self.held_out * len(y))
        if not count:
            raise ConfigError(f"method.held_out: no row of the {len(y)} of task {task.id}; take a larger share")
        rest, apart = order[count:], order[:count]
        if len(rest) < lifted.shape[1]:
            spectrum = Spectrum.dual(lifted[rest], targets[rest])
        else:
            stats = ClassStats(lifted.shape[1], self.num_classes, moments="pooled")
            stats.update(lifted[rest], y[rest])
            spectrum = Spectrum.of(stats)

        def error(strength: float) -> float:
            return float((lifted[apart] @ spectrum.weights(strength) - targets[apart]).square().mean())

        return min(self.strengths, key=error)


def uniform(rows: Tensor) -> Tensor:
    """Return a number in [0, 1) for each row index [N] long, the same whenever and wherever it is asked for.

    The finaliser of SplitMix64 (Steele et al., OOPSLA 2014).
    """

    def right(x: Tensor, bits: int) -> Tensor:
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    x = (rows + 1) * -0x61C8864680B583EB
    x = (x ^ right(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ right(x, 27)) * -0x6B2FB644ECCEEE15
    return right(x ^ right(x, 31), 11).double() / 2**53
