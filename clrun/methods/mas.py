"""MAS: a penalty whose importance is the sensitivity of the outputs (Aljundi et al., ECCV 2018, arXiv 1711.09601).

Memory between tasks: importance and anchor, 2 P floats for P backbone parameters. Task id: not needed.

Verified: the importance of a linear map equals its closed form, labels have no effect, and the step of the penalty is
an interpolation (test_methods_importance).
"""

from torch import nn

from clrun.blocks.curvature import Curvature, Labels, QuadraticPenalty, estimate
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.losses import Compete
from clrun.methods.anchored import Anchored, Norm, Solver
from clrun.system.errors import Fraction, NonNegative, PositiveInt


class Mas(Anchored):
    """loss = CE + strength / 2 sum_i Omega_i (theta_i - theta*_i)^2 over backbone parameters; the head has no penalty.

    theta* are the parameters after the previous task. When a task ends, the mean over its rows of |d |f(x)|^2 / d
    theta| is added to Omega, where f(x) are the logits of the classes that compete (in the task-incremental setting
    those of the task). No labels are needed.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        strength: lambda; published values omit the 1/2 and must be doubled; 0 is plain finetuning.
        decay: factor of Omega when the importance of a task is added; 1 as published.
        per_sample: take the absolute value of the gradient of each row. false: of the gradient of a batch, in which
            rows cancel, as in the published and all other public code; Omega then depends on the batch size.
        samples: number of rows of the task for the estimate; null for all.
        solver: "grad": the penalty is part of the loss; training diverges if learning rate * strength * Omega_i exceeds
            2. "proximal": a step on CE alone, and then the exact proximal step on the penalty; it is stable for any
            strength, but needs torch.optim.SGD.
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
        labels: Labels = "sampled" if self.per_sample else "batched"  # chooses rows or batches; no labels are used
        return estimate("abs_output", self, task.train, ctx, of=self.backbone, labels=labels, samples=self.samples)
