"""QR: quadratic regularisation as explicit interpolation (Lubana et al., CoLLAs 2022, arXiv 2102.02805).

Memory between tasks: the importance of the past, the running importance and the anchor, 3 P floats for P backbone
parameters. With importance=si another P floats during a task. Task id: not needed.

Verified: interpolation weights do not depend on the scale of the importances, strength 0 is bitwise finetuning, with a
huge strength the weights do not move, and importances equal values computed by hand (test_methods_importance).
"""

from typing import Literal

import torch
from torch import Tensor, nn

from clrun.blocks.curvature import Diagonal, QuadraticPenalty
from clrun.blocks.params import Carrier, flatten, gradients, select, shapes_of
from clrun.data.split import Batch
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.knobs import Knob
from clrun.learning.losses import Compete, masked_cross_entropy
from clrun.learning.method import Method
from clrun.system.errors import Fraction, NonNegative

TINY = 1e-20  # added to the denominator as in the published code


class Qr(Method):
    """After each step on CE alone, theta_i <- a_i theta_i + (1 - a_i) theta*_i for the backbone parameters.

    theta* are the parameters after the previous task. A gradient step on a quadratic penalty with importance F is also
    such an interpolation, with 1 - a = learning rate * strength * F. It depends on the learning rate and on the scale
    of F, and is therefore negligible in some layers and unstable in others. Here a = sqrt(I) / (sqrt(I) + strength
    sqrt(P)), where I is the importance of the current task, a running mean over its steps, and P is the importance of
    the past. A common factor of the importances has no effect. When a task ends, I is merged into P and theta* <-
    theta. Use SGD: the averages of Adam do not follow the interpolation.

    Deviation: the published code covers convolutions and batch normalisation only, and matches importances by position.
    Here all parameters of the backbone are covered, matched by name.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        strength: weight of the past; 1 as published, 0 is plain finetuning.
        importance: the importance of a step, from its batch. "ewc": the square of the gradient g. "mas":
            |d mean |f|^2 / d theta| for the logits f of the competing classes, which takes a second backward pass.
            "si": the decrease of the loss by the change dtheta of a weight in the step, max(0, -g dtheta); the
            published code has the opposite sign, which gives 0 for descent steps.
        smoothing: weight of a step in the running mean, I <- smoothing * step + (1 - smoothing) I; 0.8 as published.
        merge: how I is merged into P. "average": P <- (P + I) / 2. "normalise": I and P are scaled to sum 1, and P + I
            is scaled to sum 1.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    knobs = (Knob("strength"),)

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        strength: NonNegative,
        importance: Literal["ewc", "mas", "si"],
        smoothing: Fraction,
        merge: Literal["average", "normalise"],
        compete: Compete,
    ) -> None:
        super().__init__(backbone, num_classes, compete=compete)
        self.strength, self.importance, self.smoothing, self.merge = strength, importance, smoothing, merge
        self.penalty = QuadraticPenalty(decay=1.0)  # past importance and anchor
        self.running = RunningImportance()

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        if task.index == 0:
            params = select(self.backbone)
            zeros = torch.zeros_like(flatten(params).detach())
            self.penalty.replace(self.backbone, Diagonal(shapes_of(params), zeros))
            self.running.importance = zeros.clone()

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        logits, mask = self(batch.x), self.competing(batch.t, ctx)
        if self.strength and self.importance == "mas":
            square = logits.float().masked_fill(~mask, 0).square().sum()
            params = list(self._params().values())
            grads = torch.autograd.grad(square, params, retain_graph=True, materialize_grads=True)
            self.running.store_outputs(torch.cat([g.flatten() for g in grads]), len(batch))
        return masked_cross_entropy(logits, batch.y, mask)

    def adjust_gradients(self, ctx: Context) -> None:
        if not self.strength:
            return
        params = self._params()
        gradient = flatten(gradients(params))
        if self.importance == "ewc":
            self.running.add(gradient.square(), self.smoothing)
        elif self.importance == "mas":
            self.running.add(self.running.outputs(ctx).abs(), self.smoothing)
        else:
            self.running.gradient, self.running.start = gradient, flatten(params).detach()

    def after_step(self, ctx: Context) -> None:
        if not self.strength:
            return
        if self.importance == "si":
            change = flatten(self._params()).detach() - self.running.start
            self.running.add((-self.running.gradient * change).clamp(min=0), self.smoothing)
        if ctx.task.index:
            self.penalty.interpolate_(self.backbone, self.present_weight())

    def present_weight(self) -> Tensor:
        """Return the interpolation weight a of the present parameters, one entry per parameter."""
        present = self._scaled(self.running.importance).sqrt()
        return present / (present + self.strength * self.penalty.importance.sqrt() + TINY)

    def end_task(self, task: Task, ctx: Context) -> None:
        total = self.penalty.importance + self._scaled(self.running.importance)
        past = self._scaled(total) if self.merge == "normalise" else total / 2
        self.penalty.replace(self.backbone, Diagonal(self.penalty.shapes, past))
        self.running.end_task()

    def _scaled(self, importance: Tensor) -> Tensor:
        """Return an importance, with merge=normalise scaled to sum 1 unless it is all zeros."""
        if self.merge == "average":
            return importance
        return importance / importance.sum().clamp(min=torch.finfo(importance.dtype).tiny)

    def _params(self) -> dict[str, nn.Parameter]:
        """Return the backbone parameters that have an importance, by name."""
        params = dict(self.backbone.named_parameters())
        return {name: params[name] for name in self.penalty.shapes}


class RunningImportance(Carrier):
    """The running importance of a task, and tensors of one step from which the importance of the step is computed.

    Attributes:
        importance: the running importance I, one entry per parameter.
        gradient: gradient of the loss; only during a step with importance=si.
        start: parameters before the step; only during a step with importance=si.
        square: gradient of the squared outputs summed over the rows of this process, followed by the number of these
            rows; only during a step with importance=mas.
    """

    def __init__(self) -> None:
        super().__init__()
        self.importance = torch.zeros(0)
        self.gradient = torch.zeros(0)
        self.start = torch.zeros(0)
        self.square = torch.zeros(0)

    def add(self, step: Tensor, smoothing: float) -> None:
        """Add the importance of a step to the running mean."""
        self.importance = smoothing * step + (1 - smoothing) * self.importance

    def store_outputs(self, gradient: Tensor, rows: int) -> None:
        """Store the gradient of the squared outputs, summed over `rows` rows."""
        self.square = torch.cat([gradient.detach(), gradient.new_tensor([rows])])

    def outputs(self, ctx: Context) -> Tensor:
        """Return the gradient of the mean squared outputs over all processes; this process may have no rows."""
        if not len(self.square):
            self.square = self.importance.new_zeros(len(self.importance) + 1)
        total, self.square = ctx.hardware.sum(self.square), torch.zeros(0)
        return total[:-1] / total[-1]

    def end_task(self) -> None:
        """Reset the state for the next task."""
        self.importance = torch.zeros_like(self.importance)
        self.gradient = self.start = torch.zeros(0)
