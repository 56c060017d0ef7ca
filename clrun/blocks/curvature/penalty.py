"""The quadratic penalty on the change of a network's weights since earlier tasks, weighted by their curvature."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from clrun.blocks.curvature.forms import Curvature, Diagonal, Identity, Sum
from clrun.blocks.params import Carrier, Params, Shapes, as_stored, flatten, is_dense, unflatten


def normalised(importance: Diagonal, by: Literal["none", "mean", "max"]) -> Diagonal:
    """Return the importances divided by their overall mean or maximum; importances that are all 0 stay 0.

    All tasks then count equally, whatever the scale of their losses. Progress & Compress (Schwarz et al., ICML 2018)
    normalises the Fisher information of each task.
    """
    if by == "none" or not len(importance.values):
        return importance
    scale = importance.values.mean() if by == "mean" else importance.values.max()
    return Diagonal(importance.shapes, importance.values / scale.clamp(min=torch.finfo(scale.dtype).tiny))


class QuadraticPenalty(Carrier):
    """The penalty 1/2 (theta - a)' K (theta - a), which stores all earlier tasks as one Gaussian.

    theta [P] are the present parameters of a module, a [P] is the anchor and K [P, P] the curvature. Parameters are
    matched by name. All tasks must have the same parameters, with the same shapes.

    Args:
        decay: factor of the past when a task is added: K <- decay * K + K_task.
        mode: "online": all tasks have the latest weights as their anchor, a <- theta (Huszar, PNAS 2018). "separate":
            one quadratic per task, each around that task's own weights (Kirkpatrick et al., PNAS 2017); this needs a
            diagonal K. The sum of these quadratics is again one quadratic up to a constant: its curvature is the sum of
            theirs, and its anchor is the mean of theirs, weighted by curvature. Any number of tasks therefore takes 2 P
            numbers.
        how: which Kronecker product approximates a sum of two; see `KroneckerFactored.add`.

    Attributes:
        curvature: K; None before the first task.
        anchor: a [P], in the order of the curvature.
    """

    not_state: ClassVar[tuple[str, ...]] = ("_stored",)
    _stored: "_Stored | None" = None

    def __init__(self, decay: float, mode: Literal["online", "separate"] = "online", *, how: Sum = "kl") -> None:
        super().__init__()
        self.decay, self.mode, self.how = decay, mode, how
        self.curvature: Curvature | None = None
        self.anchor = torch.zeros(0)
        self._decomposed: Curvature | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the copies that a step computes with."""
        return {**vars(self), "_stored": None}

    @property
    def shapes(self) -> Shapes:
        """Shapes of the penalised parameters by name; empty before the first task."""
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
        params = self._penalised(module)
        if isinstance(self.curvature, Diagonal | Identity) and all(is_dense(p) for p in params.values()):
            value: Tensor = _Elementwise.apply(self._as_stored(self.curvature, params), *params.values())
        else:
            value = self.curvature.quad(flatten(params) - self.anchor)
        return 0.5 * value

    def _as_stored(self, curvature: Diagonal | Identity, params: Params) -> "_Stored":
        """Return anchor and curvature in the order in which the parameters lie in memory."""
        found = self._stored
        if found is None or not found.fits(self.anchor, curvature, params):
            found = self._stored = _Stored(self.anchor, curvature, params)
        return found

    def gradient(self, module: nn.Module) -> Params:
        """Return the gradient K (theta - a) by parameter name, without autograd; empty before the first task."""
        if self.curvature is None or not self.shapes:
            return {}
        with torch.no_grad():
            change = flatten(self._penalised(module)) - self.anchor
            return unflatten(self.curvature.mv(change), self.shapes)

    def add_grad_(self, module: nn.Module, strength: float) -> None:
        """Add strength * K (theta - a) to `.grad`: as backward of strength * penalty does, at a third of its cost."""
        if not strength:
            return
        params = dict(module.named_parameters())
        for name, pull in self.gradient(module).items():
            parameter = params[name]
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.add_(pull, alpha=strength)

    def proximal_(self, module: nn.Module, rate: float) -> None:
        """Move the parameters to the minimiser of |theta' - theta|^2 / 2 + rate * penalty(theta').

        Unlike a gradient step this is stable for any K and any rate.
        """
        if self.curvature is None or not self.shapes or not rate:
            return
        if self._decomposed is None:
            self._decomposed = self.curvature.decomposed()
        with torch.no_grad():
            params = self._penalised(module)
            moved = self._decomposed.proximal(flatten(params), self.anchor, rate)
            for name, value in unflatten(moved, self.shapes).items():
                params[name].copy_(value)

    def interpolate_(self, module: nn.Module, weight: Tensor) -> None:
        """Move the parameters to weight * theta + (1 - weight) * a, elementwise.

        A gradient step of rate r on a penalty with diagonal K is this with weight = 1 - r K.

        Args:
            module: whose parameters move.
            weight: [P], in the order of the curvature.
        """
        with torch.no_grad():
            params = self._penalised(module)
            moved = torch.lerp(self.anchor, flatten(params), weight)
            for name, value in unflatten(moved, self.shapes).items():
                params[name].copy_(value)

    def update(self, module: nn.Module, curvature: Curvature) -> None:
        """Add a task: its curvature around the present parameters of `module`, under the names they have there."""
        total = curvature
        if self.curvature is not None:
            total = self.curvature.scale(self.decay).add(curvature, self.how)
        if self.mode == "separate":
            self._average_anchor(module, curvature, total)
        else:
            self.replace(module, total)

    def replace(self, module: nn.Module, curvature: Curvature) -> None:
        """Drop all earlier tasks, and penalise changes from the present parameters of `module` by `curvature`."""
        self.anchor_at(dict(module.named_parameters()), curvature)

    def anchor_at(self, params: Mapping[str, Tensor], curvature: Curvature) -> None:
        """Drop all earlier tasks, and penalise changes from these parameters, by name, by `curvature`."""
        self.anchor = curvature.vector({name: params[name].detach() for name in curvature.shapes}).clone()
        self.curvature, self._decomposed = curvature, None

    def _average_anchor(self, module: nn.Module, task: Curvature, total: Curvature) -> None:
        """Set K = total, and the anchor to the mean of the past anchor and the present parameters.

        The mean is weighted by the curvatures of the past and of the task. Where both are 0 the anchor is the present
        parameter.
        """
        assert isinstance(task, Diagonal)
        assert isinstance(total, Diagonal)
        past, first = self.anchor, self.curvature is None
        self.replace(module, total)
        if not first:
            weight = torch.where(total.values > 0, task.values / total.values, torch.ones_like(total.values))
            self.anchor = torch.lerp(past, self.anchor, weight)

    def _penalised(self, module: nn.Module) -> Params:
        """Return the penalised parameters of `module` by name, in the order of the curvature."""
        params = dict(module.named_parameters())
        return {name: params[name] for name in self.shapes}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the curvature together with the anchor."""
        super()._apply(fn, recurse)
        self.curvature = None if self.curvature is None else self.curvature.apply(fn)
        self._decomposed = None if self._decomposed is None else self._decomposed.apply(fn)
        self._stored = None
        return self


class _Stored:
    """Anchor and curvature [P] in the order in which some parameters lie in memory.

    Weights of convolutions lie there in another order than row-major where images do (channels_last), and each step
    would copy them entry by entry.

    Args:
        anchor: in row-major order.
        curvature: of the same parameters.
        params: by name, dense.
    """

    def __init__(self, anchor: Tensor, curvature: Diagonal | Identity, params: Params) -> None:
        self.anchor, self.curvature = anchor, curvature
        self.strides = [p.stride() for p in params.values()]
        self.point = _reordered(anchor, params.values())
        self.weights: Tensor | float = curvature.strength if isinstance(curvature, Identity) else 0.0
        if isinstance(curvature, Diagonal):
            self.weights = _reordered(curvature.values, params.values())

    def fits(self, anchor: Tensor, curvature: Curvature, params: Params) -> bool:
        """Return whether these are still the same, and the parameters lie in memory as they did."""
        same = self.anchor is anchor and self.curvature is curvature
        return same and self.strides == [p.stride() for p in params.values()]


def _reordered(vector: Tensor, params: Collection[Tensor]) -> Tensor:
    """Return a vector [P] in row-major order in the order in which the parameters lie in memory."""
    if all(p.is_contiguous() for p in params):
        return vector
    parts = unflatten(vector, {str(place): tuple(p.shape) for place, p in enumerate(params)})
    copies = [vector.new_empty_strided(p.shape, p.stride()) for p in params]
    return torch.cat([as_stored(copy.copy_(part)) for copy, part in zip(copies, parts.values(), strict=True)])


class _Elementwise(Function):
    """The sum over all entries of the weight times the squared distance from the anchor."""

    @staticmethod
    def forward(ctx: Any, stored: _Stored, *params: Tensor) -> Tensor:
        """Return the sum []."""
        change = torch.cat([as_stored(p) for p in params]).sub_(stored.point)
        product = change * stored.weights
        ctx.save_for_backward(product)
        ctx.forms = [(p.shape, p.stride()) for p in params]
        return torch.dot(product, change)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of each parameter, as it lies in memory."""
        (product,) = ctx.saved_tensors
        pull, start = 2 * grad * product, 0
        found: list[Tensor | None] = [None]
        for shape, stride in ctx.forms:
            found.append(pull.as_strided(shape, stride, start))
            start += shape.numel()
        return tuple(found)


__all__ = ["QuadraticPenalty", "normalised"]
