"""QR: quadratic regularisation as explicit interpolation (Lubana et al., CoLLAs 2022, arXiv 2102.02805).

Memory between tasks: 3 P floats (importance of the past, running importance, anchor), P = backbone parameters; P more
during a task with importance=si. Task id: not needed.

Verified: shares are free of scale, 0 is finetuning bit for bit and the other extreme stands still, importance by hand
(test_methods_importance).
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

TINY = 1e-20  # what the published code adds to the denominator


class Qr(Method):
    """After each step on CE alone, theta_i <- a_i theta_i + (1 - a_i) theta*_i on the backbone.

    A step on a quadratic penalty is this interpolation too, with 1 - a = learning rate * strength * F: it depends on
    learning rate and scale of F, is tiny in some layers and unstable in others. Here a = sqrt(I) / (sqrt(I) + strength
    sqrt(P)), the same for any common factor of the importances: I of the current task, a running mean over its steps,
    and P of the past. When a task ends, P takes in I and theta* <- theta. Adam's moments go stale under interpolation:
    use SGD. The published code walks convolutions and batch normalisation, and indexes importances by position; here
    every parameter of the backbone counts, by name.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        strength: weight of the past; 1 as published, 0 is finetuning.
        importance: of a step, from its batch. "ewc": square of the gradient. "mas": |d mean |f|^2 / d theta|, f the
            logits of competing classes, for a second backward. "si": the fall of the loss that the step brings each
            weight, max(0, -g dtheta); the published code has the opposite sign, which is 0 under descent.
        smoothing: of the running mean, I <- smoothing * step + (1 - smoothing) I; 0.8 as published.
        merge: "average": P <- (P + I) / 2. "normalise": P <- P + I, each of sum 1, scaled to sum 1.
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
        self.running = Running()

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
            self.running.note_outputs(torch.cat([g.flatten() for g in grads]), len(batch))
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
            moved = flatten(self._params()).detach() - self.running.start
            self.running.add((-self.running.gradient * moved).clamp(min=0), self.smoothing)
        if ctx.task.index:
            self.penalty.interpolate_(self.backbone, self.kept())

    def kept(self) -> Tensor:
        """Return a [P], the share of the weights of now."""
        now = self._scaled(self.running.importance).sqrt()
        return now / (now + self.strength * self.penalty.importance.sqrt() + TINY)

    def end_task(self, task: Task, ctx: Context) -> None:
        total = self.penalty.importance + self._scaled(self.running.importance)
        past = self._scaled(total) if self.merge == "normalise" else total / 2
        self.penalty.replace(self.backbone, Diagonal(self.penalty.shapes, past))
        self.running.end_task()

    def _scaled(self, importance: Tensor) -> Tensor:
        """Return the importance [P] as it is, or with sum 1; all zeros stay zeros."""
        if self.merge == "average":
            return importance
        return importance / importance.sum().clamp(min=torch.finfo(importance.dtype).tiny)

    def _params(self) -> dict[str, nn.Parameter]:
        """Return the parameters with importance."""
        params = dict(self.backbone.named_parameters())
        return {name: params[name] for name in self.penalty.shapes}


class Running(Carrier):
    """The running importance of a task, and what a step leaves for it; each [P], all but the first for one step."""

    def __init__(self) -> None:
        super().__init__()
        self.importance = torch.zeros(0)
        self.gradient = torch.zeros(0)
        self.start = torch.zeros(0)
        self.square = torch.zeros(0)  # gradient of the summed squared outputs of this process's rows, and their number

    def add(self, step: Tensor, smoothing: float) -> None:
        """Take in the importance of a step."""
        self.importance = smoothing * step + (1 - smoothing) * self.importance

    def note_outputs(self, gradient: Tensor, rows: int) -> None:
        """Note the gradient of the squared outputs, summed over `rows` rows."""
        self.square = torch.cat([gradient.detach(), gradient.new_tensor([rows])])

    def outputs(self, ctx: Context) -> Tensor:
        """Return the gradient of the mean squared outputs over all processes, of which this one may have no rows."""
        if not len(self.square):
            self.square = self.importance.new_zeros(len(self.importance) + 1)
        total, self.square = ctx.hardware.sum(self.square), torch.zeros(0)
        return total[:-1] / total[-1]

    def end_task(self) -> None:
        """Begin anew."""
        self.importance = torch.zeros_like(self.importance)
        self.gradient = self.start = torch.zeros(0)
