"""RanPAC: ridge regression on randomly projected frozen features (McDonnell et al., NeurIPS 2023, arXiv 2307.02251).

Memory between tasks: 4 D M bytes of projection, 8 M^2 + C (8 M + 8) of sums (both twice for the held-out rule), 8 C M
of weights; kept task statistics T times the sums. Task id: not needed.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clrun.blocks.heads import SolvedHead
from clrun.blocks.ridge import RandomProjection, Spectrum, best_by_gcv, best_held_out, ridge
from clrun.blocks.statistics import ClassStats, extract
from clrun.data.stream import Task
from clrun.errors import ConfigError, Count, Positive, Range
from clrun.methods.closed_form import ClosedForm
from clrun.seeding import generator
from clrun.training import Context

Rule = Literal["heldout", "gcv", "fixed", "author"]


class Ranpac(ClosedForm):
    """h = ReLU(f W) with a fixed random W [D, M]; ridge regression of one-hot labels on h over all rows so far.

    The published code chooses the strength on the last task alone and uses it for all (rule "author"): then the order
    of the tasks matters. By default it is chosen on one fifth of all rows so far, which are told by a hash of their
    place in the data set, with the squared error computed from sums; the weights are then fitted to all rows.

    The published first phase (an adapter, SSF or VPT trained on the first task) is not built; such a subclass would
    train its backbone in `learn` of the first task, set `uses_frozen_features` and `order_invariant` to False, and
    inherit all the rest.

    Args:
        backbone: identity of width D; the engine feeds features.
        num_classes: C.
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
        self.order_invariant = rule != "author"
        self.projection = RandomProjection(self.width, m, seed=projection_seed)
        self.head: SolvedHead = SolvedHead(self.projection.num_features, num_classes)

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
        features, y = extract(self, task.train)
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
