"""L2: stay close to the weights of the task before, all weights alike (L2 transfer in IMM, Lee et al., NeurIPS 2017).

Baseline of IMM (arXiv 1703.08475) and APD (Yoon et al., ICLR 2020, arXiv 1902.09432). Memory between tasks: P floats
(P = backbone parameters). Task id: not needed.

Verified: it is ewc with importance 1, strength 0 is finetuning bit for bit (test_methods_curvature).
"""

from torch import nn

from clrun.blocks.curvature import Curvature, Identity, QuadraticPenalty
from clrun.blocks.params import select, shapes_of
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.losses import Compete
from clrun.methods.anchored import Anchored, Norm, Solver
from clrun.system.errors import NonNegative


class L2(Anchored):
    """loss = CE + strength / 2 |theta - theta_(t-1)|^2 on the backbone; the head is free.

    EWC with a Fisher of 1 everywhere. Unlike weight decay it pulls to the last weights, not to 0.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        strength: lambda; 0 is finetuning.
        solver: "grad": the penalty is part of the loss; diverges when learning rate * strength exceeds 2. "proximal":
            after the step on CE alone, theta <- (theta + c theta*) / (1 + c) with c = learning rate * strength: stable
            for any strength; needs torch.optim.SGD.
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
        solver: Solver,
        norm: Norm,
        compete: Compete,
    ) -> None:
        penalty = QuadraticPenalty(decay=0.0)
        super().__init__(
            backbone, num_classes, strength=strength, solver=solver, norm=norm, penalty=penalty, compete=compete
        )

    def curvature(self, task: Task, ctx: Context) -> Curvature:
        return Identity(shapes_of(select(self.backbone)))
