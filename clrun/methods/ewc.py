"""EWC: quadratic penalty weighted by a diagonal Fisher (Kirkpatrick et al., PNAS 2017, arXiv 1612.00796).

Memory between tasks: 2 P floats (importance and anchor) for the P parameters of the backbone. Task id: not needed.

Verified: strength 0 is finetuning bit for bit, a linear-Gaussian model is learned as by joint training, and proximal
steps freeze weights where the gradient form diverges (test_methods_curvature, test_methods_others).
"""

from typing import Literal

from torch import nn

from clrun.blocks.curvature import Curvature, Labels, QuadraticPenalty, diagonal_fisher, normalised, require_exact
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.losses import Compete
from clrun.methods.anchored import Anchored, Norm, Solver
from clrun.system.errors import Fraction, NonNegative, PositiveInt


class Ewc(Anchored):
    """loss = CE + strength * 1/2 sum_i F_i (theta_i - theta*_i)^2 on the backbone; the head is not penalised.

    F is the diagonal of the Fisher information of earlier tasks, and theta* are the weights at the end of a task.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        strength: lambda, for F as the mean over samples; 0 is finetuning. Published values that omit the 1/2 are half
            as large for the same penalty; those for F of gradients averaged over a batch are larger by about the batch
            size.
        decay: gamma of F <- gamma F + F_task, applied when a task ends and not in the loss. 1 accumulates; below 1 is
            online EWC (Schwarz et al., ICML 2018, arXiv 1805.06370).
        mode: "online": all tasks are anchored at the latest weights. "separate": each task at its own (the original,
            which counts earlier tasks twice, see Huszar, PNAS 2018). Both take 2 P floats.
        labels: how the labels of the Fisher information are chosen: exact, sampled, empirical, predicted or batched;
            see `clrun.blocks.curvature.estimate`.
        samples: number of rows of the task that the estimate uses; null for all.
        top_k: with labels=exact, the number of most probable classes summed over; null for all.
        normalise: divide the F of each task by its "mean" or "max" (Progress & Compress), or do not ("none").
        solver: "grad" adds the penalty to the loss; training diverges when learning rate * strength * F_i exceeds 2.
            "proximal" takes a step on the cross-entropy alone, then theta_i <- (theta_i + c_i theta*_i) / (1 + c_i)
            with c = learning rate * strength * F; it is stable for every strength and needs torch.optim.SGD.
        norm: what happens to the running statistics of batch normalisation, which no penalty protects: "train" updates
            them in every task, "freeze_after_first" only in the first one.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        strength: NonNegative,
        decay: Fraction,
        mode: Literal["online", "separate"],
        labels: Labels,
        samples: PositiveInt | None,
        top_k: PositiveInt | None,
        normalise: Literal["none", "mean", "max"],
        solver: Solver,
        norm: Norm,
        compete: Compete,
    ) -> None:
        require_exact(labels, top_k)
        penalty = QuadraticPenalty(decay, mode)
        super().__init__(
            backbone, num_classes, strength=strength, solver=solver, norm=norm, penalty=penalty, compete=compete
        )
        self.labels = labels
        self.samples, self.top_k, self.normalise = samples, top_k, normalise

    def curvature(self, task: Task, ctx: Context) -> Curvature:
        fisher = diagonal_fisher(
            self, task.train, ctx, of=self.backbone, labels=self.labels, samples=self.samples, top_k=self.top_k
        )
        return normalised(fisher, self.normalise)
