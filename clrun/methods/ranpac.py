"""RanPAC: ridge regression on randomly projected frozen features (McDonnell et al., NeurIPS 2023, arXiv 2307.02251).

Memory between tasks: the projection, 4 D M bytes; the sum of products of features, 8 M^2 bytes, and a sum of features
and a count per class, C (8 M + 8) bytes (these sums twice for rule=heldout); and the weights, 8 C M bytes. With
keep_task_statistics=true the sums of each task in addition. After a phase 1 also its parameters in a transformer of n
blocks, 4 bytes each: L D for "vpt_shallow", n L D for "vpt_deep", 22 D n + 4 D for "ssf" and n (2 D r + r + D) for
"adapter". Task id: not needed.

Verified: without projection it equals joint ridge regression, weights equal values computed by hand, AOPD is 0, and
unlearning a task equals never having learned it to 1e-9 (test_methods_closed_form).
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
    """Ridge regression of one-hot labels on h = ReLU(f W) over all rows so far, with a fixed random matrix W [D, M].

    f are the features of the backbone. The published code chooses the strength of the ridge on the last task only and
    uses it for all tasks (rule "author"), so that the result depends on the task order. By default the strength is
    chosen on one fifth of all rows so far, which are selected by a hash of their index in the data set, with the
    squared error computed from sums. The weights are then fitted to all rows.

    In the published phase 1 the first task trains adapters, scales and shifts, or prompts with the budget of the run,
    as in APER. Then they are frozen, and sums and predictions are those of the adapted model. The result then depends
    on which task comes first, and the first task cannot be unlearned.

    Args:
        backbone: without phase 1 an identity of width D, because the inputs of this method are features; with phase 1 a
            frozen timm vision transformer.
        num_classes: C.
        phase1: the parameters that the first task trains; "none" for no phase 1.
        length: L, the number of prompts for "vpt_shallow", or of prompts per block for "vpt_deep"; they start at 0.
        bottleneck: r, the width of adapters.
        adapter_scale: constant factor of the output of an adapter.
        dropout: probability with which an activation of an adapter is dropped in training.
        ssf_std: standard deviation of the initial scales around 1 and of the initial shifts around 0.
        cosine_scale: initial value of the trained factor of the cosine head.
        m: M, the width of the projection; 0 is ridge regression on the features themselves.
        projection_seed: seed of W, independent of the seed of the run.
        rule: how the strength of the ridge is chosen: "heldout"; "gcv" (generalised cross-validation on all rows so
            far); "fixed" (the first of `strengths`); "author" (one fifth of the current task, drawn by the seed).
        strengths: the strengths to choose from; a strength is added to the diagonal of the Gram matrix.
        held_out: fraction of the rows on which the rules "heldout" and "author" choose the strength.
        forget_tasks: ids of tasks to unlearn at the end.
        keep_task_statistics: store the sums of each task as well; see `ClosedForm`.
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
        assert self.adaptation is not None, "only phase 1 has a loss"
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
        held_out = uniform(rows) < self.held_out
        statistics["fitted"].update(lifted[~held_out], y[~held_out])
        statistics["held_out"].update(lifted[held_out], y[held_out])

    def solve(self, task: Task, ctx: Context) -> None:
        fitted = self.stats("fitted")
        if self.rule == "gcv":
            strength, weights = best_by_gcv(fitted, self.strengths)
        elif self.rule == "heldout":
            held_out = self.stats("held_out")
            if not (fitted.total() and held_out.total()):
                total = fitted.total() + held_out.total()
                raise ConfigError(f"method.held_out: {total} rows cannot be split; change it, or take method.rule=gcv")
            strength = best_held_out(fitted, held_out, self.strengths)
            weights = ridge(strength, fitted, held_out)
        else:
            strength = self.strengths[0] if self.rule == "fixed" else self._by_author(task, ctx)
            weights = ridge(strength, fitted)
        ctx.log({"phase": "solve", "strength": strength})
        self.head.weight.copy_(weights.t())

    def _by_author(self, task: Task, ctx: Context) -> float:
        """Return the strength with the smallest error on some rows of the current task, fitted to its other rows."""
        parts = [(features, batch.y) for features, batch in self.read(task.train, ctx)]
        features, y = (torch.cat(part) for part in zip(*parts, strict=True))
        lifted, targets = self.lift(features).double(), F.one_hot(y, self.num_classes).double()
        order = torch.randperm(len(y), generator=generator(ctx.seed, "task", task.id, "ridge")).to(y.device)
        count = int(self.held_out * len(y))
        if not count:
            raise ConfigError(f"method.held_out: no row of the {len(y)} of task {task.id}; take a larger share")
        rest, held_out = order[count:], order[:count]
        if len(rest) < lifted.shape[1]:
            spectrum = Spectrum.dual(lifted[rest], targets[rest])
        else:
            stats = ClassStats(lifted.shape[1], self.num_classes, moments="pooled")
            stats.update(lifted[rest], y[rest])
            spectrum = Spectrum.of(stats)

        def error(strength: float) -> float:
            return float((lifted[held_out] @ spectrum.weights(strength) - targets[held_out]).square().mean())

        return min(self.strengths, key=error)


def uniform(rows: Tensor) -> Tensor:
    """Return a number in [0, 1) for each row index [N] long, which depends on nothing but the index.

    It is a hash, the finaliser of SplitMix64 (Steele et al., OOPSLA 2014).
    """

    def shift_right(x: Tensor, bits: int) -> Tensor:
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    x = (rows + 1) * -0x61C8864680B583EB
    x = (x ^ shift_right(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ shift_right(x, 27)) * -0x6B2FB644ECCEEE15
    return shift_right(x ^ shift_right(x, 31), 11).double() / 2**53
