"""NCL: weight regularisation and projected gradients in one (Kao et al., NeurIPS 2021, arXiv 2106.08085).

Memory between tasks: as kfac_ewc: in^2 + out^2 floats for a layer, 1 for every other parameter, and the anchor, P
floats, P = backbone parameters. Task id: not needed.

Verified: a linear-Gaussian model converges to the posterior mode, an isotropic prior is SGD with a pull
(test_methods_curvature).
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from clrun.blocks.curvature import Curvature, KroneckerFisher, QuadraticPenalty, isotropic
from clrun.blocks.optimizers import needs_sgd
from clrun.blocks.params import gradients
from clrun.data.stream import Task
from clrun.learning.budget import Budget
from clrun.learning.context import Context
from clrun.learning.knobs import Knob
from clrun.learning.losses import Compete
from clrun.learning.method import Method
from clrun.system.errors import NonNegative, Positive, PositiveInt


class Ncl(Method):
    """theta <- theta - lr Lambda^-1 (grad CE + strength Lambda (theta - theta*)) / N0, with Lambda the prior precision.

    Online Laplace whose every gradient is multiplied by the prior covariance: large steps where earlier tasks do not
    care, small ones where they do. Lambda = I / N0 before the first task, around 0 or the weights it begins with;
    Lambda <- Lambda + F_task after each one, around the latest weights, F the per-sample mean. K-FAC for linear and
    convolutional layers, the diagonal for all other parameters of the backbone; the head is free and takes plain
    steps. Momentum works on the preconditioned gradient: the same as before it, since Lambda stands still in a task.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        strength: lambda; 1 is the Bayesian weight, for tasks of equally many rows.
        prior_rows: N0: the data count as much as the prior after that many rows; also turns steps into those of SGD in
            the first task.
        prior_mean: "zero" (published), or "initial": the weights the backbone begins with, for pre-trained ones.
        damping: alpha: Lambda is inverted as the trace-balanced sum of its factors and (alpha I, alpha I).
        labels: how the Fisher's labels are chosen: exact, sampled, empirical or predicted; see `estimate`.
        samples: rows of the task used for the estimate; null for all.
        top_k: with labels=exact, the most probable classes summed over; null for all.
        sharing: what positions (tokens, patches) that share a weight are to each other: "expand": independent.
            "reduce": added up; that of networks that average over positions.
        add: how the products of prior and task become one: "kl" (published), "additive" or "rank1".
        modules: patterns of the shell; layers whose name matches one have Kronecker factors.
        largest: most inputs or outputs of such a layer: its factors have that many numbers squared.
        groups: convolutions with several groups: "skip" gives them a diagonal, "average" takes groups as positions.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    knobs = (Knob("strength"),)

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        strength: NonNegative,
        prior_rows: Positive,
        prior_mean: Literal["zero", "initial"],
        damping: NonNegative,
        labels: Literal["exact", "sampled", "empirical", "predicted"],
        samples: PositiveInt | None,
        top_k: PositiveInt | None,
        sharing: Literal["expand", "reduce"],
        add: Literal["kl", "additive", "rank1"],
        modules: list[str],
        largest: PositiveInt,
        groups: Literal["skip", "average"],
        compete: Compete,
    ) -> None:
        super().__init__(backbone, num_classes, compete=compete)
        self.strength, self.prior_rows, self.prior_mean, self.damping = strength, prior_rows, prior_mean, damping
        self.fisher = KroneckerFisher(labels, samples, top_k, sharing, modules, largest, groups)
        self.fisher.check(backbone)
        self.prior = QuadraticPenalty(1.0, how=add)
        self.covariance: Curvature | None = None  # within a task

    def check_budget(self, budget: Budget) -> None:
        needs_sgd(budget.optimizer, "method=ncl", weight_decay=0)

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        if self.prior.curvature is None:
            shape = replace(self.fisher, samples=1)(self, task, ctx)
            self.prior.replace(self.backbone, isotropic(shape, 1 / self.prior_rows))
            if self.prior_mean == "zero":
                self.prior.anchor = torch.zeros_like(self.prior.anchor)
        assert self.prior.curvature is not None
        self.covariance = self.prior.curvature.inverse(self.damping**2, "factored")

    def adjust_gradients(self, ctx: Context) -> None:
        assert self.covariance is not None
        self.prior.add_grad_(self.backbone, self.strength)
        params = dict(self.backbone.named_parameters())
        moved = self.covariance.mv(self.covariance.vector(gradients(params))) / self.prior_rows
        for name, gradient in self.covariance.params(moved).items():
            params[name].grad = gradient

    def end_task(self, task: Task, ctx: Context) -> None:
        self.covariance = None
        self.prior.update(self.backbone, self.fisher(self, task, ctx))
