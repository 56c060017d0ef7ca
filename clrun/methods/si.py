"""SI: synaptic intelligence, each weight's share of the fall of the loss (Zenke et al., ICML 2017, arXiv 1703.04200).

Memory between tasks: 3 P floats (importance, anchor, path), P = backbone parameters; 2 P more during a task. Task id:
not needed.

Verified: the path sums to the fall of the loss, of a quadratic it is half the curvature, strength 0 is finetuning bit
for bit (test_methods_importance).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from clrun.blocks.curvature import Curvature, Diagonal, QuadraticPenalty
from clrun.blocks.params import Carrier, Shapes, flatten, gradients, select, shapes_of
from clrun.data.split import Batch
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.losses import Compete
from clrun.learning.method import Method
from clrun.methods.anchored import Anchored, Norm, Solver
from clrun.system.errors import NonNegative, Positive


class Si(Anchored):
    """loss = CE + strength / 2 sum_i Omega_i (theta_i - theta*_i)^2 on the backbone; the head is free.

    During a task omega_i sums -g_i (change of theta_i), g the gradient of CE alone, before clipping, and over all
    processes. When it ends, Omega <- max(0, Omega + omega / ((theta - theta*)^2 + xi)), omega <- 0, theta* <- theta.
    The gradient of the penalty is added to g without a second backward. Public code differs: it takes the gradient of
    the penalised loss, clips it first, or leaves out the maximum.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        strength: 2 c, twice the published values, which omit the 1/2; 0 is finetuning.
        xi: damping of the division, in squared units of a weight; published 1e-3 (CIFAR) and 0.1 (permuted MNIST).
        solver: "grad": diverges when learning rate * strength * Omega_i exceeds 2. "proximal": after the step on CE
            alone, the exact step on the penalty: stable for any strength; needs torch.optim.SGD.
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
        xi: Positive,
        solver: Solver,
        norm: Norm,
        compete: Compete,
    ) -> None:
        penalty = QuadraticPenalty(decay=1.0)
        super().__init__(
            backbone, num_classes, strength=strength, solver=solver, norm=norm, penalty=penalty, compete=compete
        )
        self.xi = xi
        self.path = Path()

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        if task.index == 0:
            self.path.begin(select(self.backbone))

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        return Method.loss(self, batch, ctx)  # the penalty comes after its gradient was taken

    def adjust_gradients(self, ctx: Context) -> None:
        self.path.begin_step(self.backbone)
        if self.solver == "grad":
            self.penalty.add_grad_(self.backbone, self.strength)

    def after_step(self, ctx: Context) -> None:
        super().after_step(ctx)
        self.path.end_step(self.backbone)

    def curvature(self, task: Task, ctx: Context) -> Curvature:
        start = self.penalty.anchor if self.penalty.shapes else self.path.origin
        change = self.path.now(self.backbone) - start
        return Diagonal(self.path.shapes, self.path.omega / (change.square() + self.xi))

    def end_task(self, task: Task, ctx: Context) -> None:
        total = self.curvature(task, ctx)
        if self.penalty.curvature is not None:
            total = self.penalty.curvature.add(total)
        self.penalty.replace(self.backbone, Diagonal(self.path.shapes, total.diag().clamp(min=0)))
        self.path.end_task()


class Path(Carrier):
    """The path integral of -gradient along the trajectory of the parameters, [P]."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Shapes = {}
        self.omega = torch.zeros(0)
        self.origin = torch.zeros(0)  # [P] during the first task: where it began
        self.gradient = torch.zeros(0)  # [P] between the two halves of a step
        self.start = torch.zeros(0)  # likewise

    def begin(self, params: Mapping[str, Tensor]) -> None:
        """Begin a life: these parameters count."""
        self.shapes, self.origin = shapes_of(params), flatten(params).detach()
        self.omega = torch.zeros_like(self.origin)

    def now(self, backbone: nn.Module) -> Tensor:
        """Return a copy of the parameters that count [P]."""
        params = dict(backbone.named_parameters())
        return flatten({name: params[name].detach() for name in self.shapes})

    def begin_step(self, backbone: nn.Module) -> None:
        """Note the gradient of the task's loss and where the step begins."""
        params = dict(backbone.named_parameters())
        self.gradient = flatten(gradients({name: params[name] for name in self.shapes}))
        self.start = self.now(backbone)

    def end_step(self, backbone: nn.Module) -> None:
        """Add what the step brought."""
        self.omega -= self.gradient * (self.now(backbone) - self.start)

    def end_task(self) -> None:
        """Begin anew."""
        self.omega = torch.zeros_like(self.omega)
        self.origin = self.gradient = self.start = torch.zeros(0)
