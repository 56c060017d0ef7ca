"""MAS: importance is how much a weight moves the outputs (Aljundi et al., ECCV 2018, arXiv 1711.09601).

Memory between tasks: 2 P floats (importance, anchor), P = backbone parameters. Task id: not needed.

Verified: importance of a linear map in closed form, no labels used, the penalty's step is an interpolation
(test_methods_importance).
"""

from torch import nn

from clrun.blocks.curvature import Curvature, Labels, QuadraticPenalty, estimate
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.losses import Compete
from clrun.methods.anchored import Anchored, Norm, Solver
from clrun.system.errors import Fraction, NonNegative, PositiveInt


class Mas(Anchored):
    """loss = CE + strength / 2 sum_i Omega_i (theta_i - theta*_i)^2 on the backbone; the head is free.

    When a task ends, Omega grows by the mean over its rows of |d |f(x)|^2 / d theta|, f the logits of the classes that
    compete (task-incremental: of the task). No labels are needed.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        strength: lambda, twice the published values, which omit the 1/2; 0 is finetuning.
        decay: Omega <- decay Omega + that of the task; 1, published, accumulates.
        per_sample: false: the gradients of a batch cancel before the absolute value is taken, as in the published and
            all other public code; then Omega depends on the batch size.
        samples: rows of the task used for the estimate; null for all.
        solver: "grad": the penalty is part of the loss; diverges when learning rate * strength * Omega_i exceeds 2.
            "proximal": after the step on CE alone, the exact step on the penalty: stable for any strength; needs
            torch.optim.SGD.
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
        per_sample: bool,
        samples: PositiveInt | None,
        solver: Solver,
        norm: Norm,
        compete: Compete,
    ) -> None:
        penalty = QuadraticPenalty(decay)
        super().__init__(
            backbone, num_classes, strength=strength, solver=solver, norm=norm, penalty=penalty, compete=compete
        )
        self.per_sample, self.samples = per_sample, samples

    def curvature(self, task: Task, ctx: Context) -> Curvature:
        labels: Labels = "sampled" if self.per_sample else "batched"  # of no use here but for this difference
        return estimate("abs_output", self, task.train, ctx, of=self.backbone, labels=labels, samples=self.samples)
