"""SI: synaptic intelligence, importance from each weight's part in the decrease of the loss (Zenke et al., ICML 2017).

Source: arXiv 1703.04200. Memory between tasks: importance, anchor and path integral, 3 P floats for P backbone
parameters. During a task 2 P more. Task id: not needed.

Verified: the path integral sums to the decrease of the loss, for a quadratic loss the importance is half the curvature,
and strength 0 is bitwise finetuning (test_methods_importance).
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
    """loss = CE + strength / 2 sum_i Omega_i (theta_i - theta*_i)^2 over backbone parameters; the head has no penalty.

    theta* are the parameters after the previous task. During a task omega_i is the sum over steps of -g_i times the
    change of theta_i, where g is the gradient of CE alone before clipping, averaged over all processes. When the task
    ends, Omega <- max(0, Omega + omega / ((theta - theta*)^2 + xi)), omega <- 0 and theta* <- theta. The gradient of
    the penalty is added to g without a second backward pass.

    Deviation: public code uses the gradient of the penalised loss, clips it first, or leaves out the maximum.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        strength: 2 c; published values of c omit the 1/2 and must be doubled; 0 is plain finetuning.
        xi: damping of the division, in units of squared weights; 1e-3 (CIFAR) and 0.1 (permuted MNIST) as published.
        solver: "grad": the gradient of the penalty is added; training diverges if learning rate * strength * Omega_i
            exceeds 2. "proximal": a step on CE alone, and then the exact proximal step on the penalty; it is stable for
            any strength, but needs torch.optim.SGD.
        norm: running statistics of batch normalisation, which have no penalty: "train" updates them in every task,
            "freeze_after_first" in the first task only.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    samples_names = True

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
        self.path = PathIntegral()

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        if task.index == 0:
            self.path.begin(select(self.backbone))

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        return Method.loss(self, batch, ctx)  # without the penalty, whose gradient is added in `adjust_gradients`

    def adjust_gradients(self, ctx: Context) -> None:
        self.path.begin_step(self.backbone)
        if self.solver == "grad":
            self.penalty.add_grad_(self.backbone, self.strength)

    def after_step(self, ctx: Context) -> None:
        super().after_step(ctx)
        self.path.end_step(self.backbone)

    def curvature(self, task: Task, ctx: Context) -> Curvature:
        start = self.penalty.anchor if self.penalty.shapes else self.path.origin
        change = self.path.present(self.backbone) - start
        return Diagonal(self.path.shapes, self.path.omega / (change.square() + self.xi))

    def end_task(self, task: Task, ctx: Context) -> None:
        total = self.curvature(task, ctx)
        if self.penalty.curvature is not None:
            total = self.penalty.curvature.add(total)
        self.penalty.replace(self.backbone, Diagonal(self.path.shapes, total.diag().clamp(min=0)))
        self.path.end_task()


class PathIntegral(Carrier):
    """The path integral omega of the negative gradient along the trajectory of the parameters.

    Attributes:
        shapes: shapes of the parameters by name; all vectors hold these parameters in this order.
        omega: the integral.
        origin: the initial parameters; only during the first task.
        gradient: gradient of CE; only during a step.
        start: parameters before the step; only during a step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Shapes = {}
        self.omega = self.origin = self.gradient = self.start = torch.zeros(0)

    def begin(self, params: Mapping[str, Tensor]) -> None:
        """Start the first integral, for these parameters."""
        self.shapes, self.origin = shapes_of(params), flatten(params).detach()
        self.omega = torch.zeros_like(self.origin)

    def present(self, backbone: nn.Module) -> Tensor:
        """Return the present parameters as a new vector."""
        params = dict(backbone.named_parameters())
        return flatten({name: params[name].detach() for name in self.shapes})

    def begin_step(self, backbone: nn.Module) -> None:
        """Store the gradient of CE and the parameters before the step."""
        params = dict(backbone.named_parameters())
        self.gradient = flatten(gradients({name: params[name] for name in self.shapes}))
        self.start = self.present(backbone)

    def end_step(self, backbone: nn.Module) -> None:
        """Add the contribution of the step to the integral."""
        self.omega -= self.gradient * (self.present(backbone) - self.start)

    def end_task(self) -> None:
        """Reset the integral for the next task."""
        self.omega = torch.zeros_like(self.omega)
        self.origin = self.gradient = self.start = torch.zeros(0)
