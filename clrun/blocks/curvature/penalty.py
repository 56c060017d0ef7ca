"""The quadratic penalty that keeps a network near the weights of earlier tasks, as far as their curvature asks."""

from collections.abc import Callable
from typing import Literal, Self

import torch
from torch import Tensor, nn

from clrun.blocks.curvature.forms import Curvature, Diagonal, Sum
from clrun.blocks.params import Carrier, Params, Shapes, corner, flatten, match, unflatten


def normalised(importance: Diagonal, by: Literal["none", "mean", "max"]) -> Diagonal:
    """Return the importances divided by their overall mean or maximum, so that tasks of any loss scale count equally.

    All zeros stay zeros. Progress & Compress (Schwarz et al., ICML 2018) normalises each task's Fisher.
    """
    if by == "none" or not len(importance.values):
        return importance
    scale = importance.values.mean() if by == "mean" else importance.values.max()
    return Diagonal(importance.shapes, importance.values / scale.clamp(min=torch.finfo(scale.dtype).tiny))


class QuadraticPenalty(Carrier):
    """1/2 (theta - a)' K (theta - a), which remembers the tasks seen so far as one Gaussian.

    Parameters are matched by name; where one has grown, the entries it began with are penalised and the new ones are
    free.

    Args:
        decay: K <- decay * K + K_task when a task is added.
        mode: "online": all tasks around the latest weights, a <- theta (Huszar, PNAS 2018). "separate": one quadratic
            a task, each around its own weights (Kirkpatrick et al., PNAS 2017); diagonal K only. Their sum is again a
            quadratic up to a constant, with summed K and a = the K-weighted mean of the anchors, so that 2 P numbers
            hold T tasks.
        how: which Kronecker product stands for a sum; see `KroneckerFactored.add`.

    Attributes:
        curvature: K; None before the first task.
        anchor: a [P], in the order of the curvature.
    """

    def __init__(self, decay: float, mode: Literal["online", "separate"] = "online", *, how: Sum = "kl") -> None:
        super().__init__()
        self.decay, self.mode, self.how = decay, mode, how
        self.curvature: Curvature | None = None
        self.anchor = torch.zeros(0)
        self._decomposed: Curvature | None = None

    @property
    def shapes(self) -> Shapes:
        """Shapes of the penalised parameters, or parts of parameters; empty before the first task."""
        return {} if self.curvature is None else self.curvature.shapes

    @property
    def importance(self) -> Tensor:
        """The diagonal of K [P]."""
        return self.anchor if self.curvature is None else self.curvature.diag()

    def forward(self, module: nn.Module) -> Tensor:
        """Return the penalty [] of the parameters of `module`, differentiable; 0 before the first task."""
        if not self.shapes:
            return self.anchor.sum()
        assert self.curvature is not None
        return 0.5 * self.curvature.quad(flatten(self._view(module)) - self.anchor)

    def gradient(self, module: nn.Module) -> Params:
        """Return K (theta - a) by name, without autograd; empty before the first task."""
        if self.curvature is None or not self.shapes:
            return {}
        with torch.no_grad():
            change = flatten(self._view(module)) - self.anchor
            return unflatten(self.curvature.mv(change), self.shapes)

    def add_grad_(self, module: nn.Module, strength: float) -> None:
        """Add strength * K (theta - a) to `.grad`, as backward of strength * penalty does, at a third of the cost."""
        if not strength:
            return
        params = dict(module.named_parameters())
        for name, pull in self.gradient(module).items():
            parameter = params[name]
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            corner(parameter.grad, self.shapes[name]).add_(pull, alpha=strength)

    def proximal_(self, module: nn.Module, rate: float) -> None:
        """Move the parameters to argmin |theta' - theta|^2 / 2 + rate * penalty(theta'): stable for any K."""
        if self.curvature is None or not self.shapes or not rate:
            return
        if self._decomposed is None:
            self._decomposed = self.curvature.decomposed()
        with torch.no_grad():
            views = self._view(module)
            moved = self._decomposed.proximal(flatten(views), self.anchor, rate)
            for name, value in unflatten(moved, self.shapes).items():
                views[name].copy_(value)

    def interpolate_(self, module: nn.Module, share: Tensor) -> None:
        """Move the parameters to share * theta + (1 - share) * a, entry by entry; `share` is [P].

        A gradient step of rate r on the penalty is this, with share = 1 - r K for a diagonal K.
        """
        with torch.no_grad():
            views = self._view(module)
            moved = torch.lerp(self.anchor, flatten(views), share)
            for name, value in unflatten(moved, self.shapes).items():
                views[name].copy_(value)

    def update(self, module: nn.Module, curvature: Curvature) -> None:
        """Add a task: its curvature, named as the parameters of `module`, around the present parameters."""
        past = None if self.curvature is None else self.curvature.expand(curvature.shapes).scale(self.decay)
        total = curvature if past is None else past.add(curvature, self.how)
        if self.mode == "separate":
            self._mean_anchor(module, curvature, total)
        else:
            self.replace(module, total)

    def replace(self, module: nn.Module, curvature: Curvature) -> None:
        """Forget what was, and hold the present parameters of `module` as `curvature` says."""
        params = dict(module.named_parameters())
        self.anchor = curvature.vector({name: params[name].detach() for name in curvature.shapes}).clone()
        self.curvature, self._decomposed = curvature, None

    def _mean_anchor(self, module: nn.Module, task: Curvature, total: Curvature) -> None:
        """Anchor the sum of a past and a task at the weighted mean of their anchors; the task's where both weigh 0."""
        assert isinstance(task, Diagonal)
        assert isinstance(total, Diagonal)
        past, shapes = self.anchor, self.shapes
        self.replace(module, total)
        weight = torch.where(total.values > 0, task.values / total.values, torch.ones_like(total.values))
        before = unflatten(torch.zeros_like(self.anchor), total.shapes)
        for _, old, place in match(unflatten(past, shapes), before):
            place.copy_(old)
        self.anchor = torch.lerp(flatten(before), self.anchor, weight)

    def _view(self, module: nn.Module) -> Params:
        """Return the penalised part of each parameter of `module`."""
        params = dict(module.named_parameters())
        return {name: corner(params[name], shape) for name, shape in self.shapes.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the curvature along with the anchor."""
        super()._apply(fn, recurse)
        self.curvature = None if self.curvature is None else self.curvature.apply(fn)
        self._decomposed = None if self._decomposed is None else self._decomposed.apply(fn)
        return self
