"""L2: a penalty on the distance to the weights after the previous task (L2 transfer in IMM, Lee et al., NeurIPS 2017).

It is a baseline of IMM (arXiv 1703.08475) and APD (Yoon et al., ICLR 2020, arXiv 1902.09432). Memory between tasks: the
anchor, P floats for P backbone parameters. Task id: not needed.

Verified: it equals ewc with all importances 1, and strength 0 is bitwise finetuning (test_methods_curvature).
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
    """loss = CE + strength / 2 |theta - theta_(t-1)|^2 for the backbone parameters theta; the head has no penalty.

    theta_(t-1) are the parameters after the previous task. This is EWC with a Fisher information of 1 everywhere.
    Unlike weight decay it pulls the weights towards those of the previous task, not towards 0.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        strength: lambda; 0 is plain finetuning.
        solver: "grad": the penalty is part of the loss; training diverges if learning rate * strength exceeds 2.
            "proximal": a step on CE alone, and then theta <- (theta + c theta_(t-1)) / (1 + c) with
            c = learning rate * strength; it is stable for any strength, but needs torch.optim.SGD.
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
