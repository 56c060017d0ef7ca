"""EWC with Kronecker factors, or online structured Laplace (Ritter et al., NeurIPS 2018, arXiv 1805.07810).

With forgetting about halved against EWC on text: McInerney et al., arXiv 2111.06012. Memory between tasks: for a layer
of `in` inputs (with the constant of its bias) and `out` outputs in^2 + out^2 floats, 1 float for every other parameter,
and the anchor, P floats, P = backbone parameters; with add=list as many factors for each task. Task id: not needed.

Verified: one linear layer's factors are the exact block, a linear-Gaussian model is learned as jointly, diagonal
factors are ewc (test_methods_curvature, test_curvature_kfac).
"""

from typing import Literal

from torch import nn

from clrun.blocks.curvature import Curvature, KroneckerFisher, QuadraticPenalty, isotropic
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.losses import Compete
from clrun.methods.anchored import Anchored, Norm, Solver
from clrun.system.errors import ConfigError, Fraction, NonNegative, PositiveInt


class KfacEwc(Anchored):
    """loss = CE + strength / 2 sum_l tr(D_l' G_l D_l A_l) on the backbone, D_l = [W, b] - [W, b]*; the head is free.

    K-FAC for linear and convolutional layers, the diagonal for all other parameters. F is the per-sample mean; the
    Bayesian weight of a task of N_k rows in a task of N rows is strength = N_k / N.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        strength: lambda; 0 is finetuning.
        decay: F <- decay F + F_task when a task ends.
        labels: how the Fisher's labels are chosen: exact, sampled, empirical or predicted; see `estimate`.
        samples: rows of the task used for the estimate; null for all.
        top_k: with labels=exact, the most probable classes summed over; null for all.
        sharing: what positions (tokens, patches) that share a weight are to each other: "expand": independent; the
            safe choice, and that of class tokens. "reduce": added up; that of networks that average over positions.
        add: how two tasks' products become one: "kl" (Kao et al., NeurIPS 2021), "additive" (up to twice too stiff),
            "rank1" (Frobenius norm), or "list": all are kept, exact, T times the memory and the cost of a step.
        modules: patterns of the shell; layers whose name matches one have Kronecker factors.
        largest: most inputs or outputs of such a layer: its factors have that many numbers squared.
        groups: convolutions with several groups: "skip" gives them a diagonal, "average" takes groups as positions.
        prior: tau of the prior precision tau I, which joins F when the first task ends.
        solver: "grad": the penalty is part of the loss; diverges when learning rate * strength * the largest eigenvalue
            exceeds 2. "proximal": after the step on CE alone, the exact step on the penalty, in the eigenbases of the
            factors: stable for any strength; needs torch.optim.SGD and add other than list.
        norm: running statistics of batch normalisation, which no penalty holds: "train" updates them in every task,
            "freeze_after_first" stops after the first one.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        strength: NonNegative,
        decay: Fraction,
        labels: Literal["exact", "sampled", "empirical", "predicted"],
        samples: PositiveInt | None,
        top_k: PositiveInt | None,
        sharing: Literal["expand", "reduce"],
        add: Literal["kl", "additive", "rank1", "list"],
        modules: list[str],
        largest: PositiveInt,
        groups: Literal["skip", "average"],
        prior: NonNegative,
        solver: Solver,
        norm: Norm,
        compete: Compete,
    ) -> None:
        if solver == "proximal" and add == "list":
            raise ConfigError("method.add=list: method.solver=proximal needs one product; use add=kl or solver=grad")
        penalty = QuadraticPenalty(decay, how=add)
        super().__init__(
            backbone, num_classes, strength=strength, solver=solver, norm=norm, penalty=penalty, compete=compete
        )
        self.fisher = KroneckerFisher(labels, samples, top_k, sharing, modules, largest, groups)
        self.fisher.check(backbone)
        self.prior = prior

    def curvature(self, task: Task, ctx: Context) -> Curvature:
        fisher = self.fisher(self, task, ctx)
        if self.prior and self.penalty.curvature is None:
            return isotropic(fisher, self.prior).add(fisher, self.penalty.how)
        return fisher
