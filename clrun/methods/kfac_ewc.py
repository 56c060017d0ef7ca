"""EWC with Kronecker factors, or online structured Laplace (Ritter et al., NeurIPS 2018, arXiv 1805.07810).

McInerney et al. (arXiv 2111.06012) report that it about halves the forgetting of EWC on text. Memory between tasks: the
two Kronecker factors of each layer, in^2 + out^2 floats for a layer of `in` inputs (including the constant of its bias)
and `out` outputs; one float for every other parameter; and the anchor, P floats for P backbone parameters. With
add=list there are separate factors for each task. Task id: not needed.

Verified: the factors of one linear layer give the exact block of the curvature, a linear-Gaussian model is learned as
by joint training, and with diagonal factors the method equals ewc (test_methods_curvature, test_curvature_kfac).
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
    """loss = CE + strength / 2 sum_l tr(D_l' G_l D_l A_l), D_l = [W_l, b_l] - [W_l, b_l]* for each backbone layer l.

    [W_l, b_l]* are the weights after the last task, and G_l and A_l are the Kronecker factors of the Fisher information
    F of all earlier tasks (K-FAC). Parameters that are not in a linear or convolutional layer have a diagonal F. The
    head has no penalty. F is a mean over rows: the Bayesian weight of an earlier task with N_k rows in a task with N
    rows is strength = N_k / N.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        strength: lambda; 0 is plain finetuning.
        decay: factor of F when the F of a task is added: F <- decay F + F_task.
        labels: how the labels of F are chosen: exact, sampled, empirical or predicted; see `estimate`.
        samples: number of rows of the task for the estimate; null for all.
        top_k: for labels=exact, the number of most probable classes that are summed over; null for all.
        sharing: treatment of positions (tokens, patches) that share a weight. "expand": independent; use it if in doubt
            and for networks with a class token. "reduce": aggregated; for networks that average over positions.
        add: how the sum of two Kronecker products is approximated by one: "kl" (Kao et al., NeurIPS 2021), "additive"
            (overestimates the trace by a factor of up to 2), "rank1" (closest in the Frobenius norm); or "list": the
            exact sum, which stores all products and multiplies memory and cost of a step by the number of tasks.
        modules: shell-style patterns; layers whose name matches one have Kronecker factors.
        largest: largest number of inputs or outputs of such a layer; its factors hold the square of that many numbers.
        groups: convolutions with several groups: "skip" estimates a diagonal, "average" treats groups as positions.
        tables: tables of embeddings, which are linear layers on one-hot vectors: "diagonal", as all that is no layer;
            "kronecker", diag(frequencies of the tokens) and one factor G, V + D^2 numbers for V entries of width D.
        prior: tau; the prior precision tau I is added to F when the first task ends.
        solver: "grad": the penalty is part of the loss; training diverges if learning rate * strength * the largest
            eigenvalue of F exceeds 2. "proximal": a step on CE alone, and then the exact proximal step on the penalty
            in the eigenbases of the factors; it is stable for any strength, but needs torch.optim.SGD and an add other
            than list.
        norm: running statistics of batch normalisation, which have no penalty: "train" updates them in every task,
            "freeze_after_first" in the first task only.
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
        tables: Literal["diagonal", "kronecker"],
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
        self.fisher = KroneckerFisher(
            labels, samples, top_k, sharing, modules, largest, groups, tables=tables == "kronecker"
        )
        self.fisher.check(backbone)
        self.prior = prior

    def curvature(self, task: Task, ctx: Context) -> Curvature:
        fisher = self.fisher(self, task, ctx)
        if self.prior and self.penalty.curvature is None:
            return isotropic(fisher, self.prior).add(fisher, self.penalty.how)
        return fisher
