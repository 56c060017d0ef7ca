"""NCL: natural continual learning, a penalty whose gradients are preconditioned (Kao et al., NeurIPS 2021, 2106.08085).

Memory between tasks: the two Kronecker factors of each layer, in^2 + out^2 floats for a layer of `in` inputs and `out`
outputs; one float for every other parameter; and the anchor, P floats for P backbone parameters. Task id: not needed.

Verified: a linear-Gaussian model converges to the mode of the posterior, and with an isotropic prior it equals SGD with
a pull towards the anchor (test_methods_curvature).
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
    """theta <- theta - lr Lambda^-1 (grad CE + strength Lambda (theta - theta*)) / N0, with the prior precision Lambda.

    This is online Laplace approximation in which every gradient is multiplied by the prior covariance Lambda^-1: steps
    are large in directions that do not matter for earlier tasks, and small in those that do. Before the first task
    Lambda = I / N0 and the anchor theta* is 0 or the initial weights. After each task Lambda <- Lambda + F_task, where
    F_task is the Fisher information as a mean over rows, and theta* <- theta. Linear and convolutional layers have
    Kronecker factors (K-FAC), all other parameters of the backbone a diagonal. The head has no penalty and plain SGD
    steps. Momentum is applied to the preconditioned gradient, which is equivalent because Lambda is constant during a
    task.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        strength: lambda; 1 is the Bayesian weight if all tasks have the same number of rows.
        prior_rows: N0, the number of rows after which the data count as much as the prior. The division by N0 also
            makes the steps of the first task those of SGD.
        prior_mean: anchor of the first task: "zero" as published, or "initial": the initial weights of the backbone,
            for pre-trained backbones.
        damping: alpha; Lambda is inverted as the trace-balanced sum of its factors and (alpha I, alpha I).
        labels: how the labels of the Fisher information are chosen: exact, sampled, empirical or predicted; see
        `estimate`.
        samples: number of rows of the task for the estimate; null for all.
        top_k: for labels=exact, the number of most probable classes that are summed over; null for all.
        sharing: treatment of positions (tokens, patches) that share a weight. "expand": independent. "reduce":
            aggregated; for networks that average over positions.
        add: how the sum of the Kronecker products of prior and task is approximated by one: "kl" as published,
            "additive" or "rank1"; see `KroneckerFactored.add`.
        modules: shell-style patterns; layers whose name matches one have Kronecker factors.
        largest: largest number of inputs or outputs of such a layer; its factors hold the square of that many numbers.
        groups: convolutions with several groups: "skip" estimates a diagonal, "average" treats groups as positions.
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
        self.covariance: Curvature | None = None  # damped inverse of Lambda; only during a task

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
