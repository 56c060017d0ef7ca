"""The first-order Taylor expansion of a network in its weights, by one pass in forward mode."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


def tangent(network: nn.Module, change: Mapping[str, Tensor], x: Tensor, *, slope: float) -> tuple[Tensor, Tensor]:
    """Return the output g(x) of a network and its derivative J(x) delta in the direction of a change of its weights.

    Both are computed by one pass in forward mode, in float32 also under autocast, which would cost the derivative three
    digits. The derivative is differentiable in the change: its gradient J' times that of the output needs one backward
    pass through the network as it is, whose forward pass is the same one.

    Args:
        network: differentiable in forward mode, see `make_differentiable`.
        change: delta, by the names of the network's parameters; others do not change.
        x: its input.
        slope: of ReLUs below 0, see `leaky`.
    """
    weights = dict(network.named_parameters())
    with _outside_inference_mode(), torch.autocast(x.device.type, enabled=False), leaky(slope), _Kernels(), _quiet():
        x = x.clone() if x.is_inference() else x
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):  # no other kernel has a derivative in forward mode
            duals = {}
            for name, delta in change.items():
                weight = _Carried.apply(weights[name].detach(), delta)
                duals[name] = forward_ad.make_dual(weight, delta.detach())  # type: ignore[no-untyped-call]
            output, moved = forward_ad.unpack_dual(functional_call(network, duals, (x,)))  # type: ignore[no-untyped-call]
    value = output.detach()
    return value, (torch.zeros_like(value) if moved is None else moved.detach()) + (output - value)


def leaky(slope: float) -> AbstractContextManager[object]:
    """Return a context in which ReLUs, modules and functions alike, have this slope below 0; 0 changes nothing."""
    return _Leaky(slope) if slope else nullcontext()


def make_differentiable(backbone: nn.Module) -> None:
    """Make a network differentiable in forward mode, and exclude parameters of batch normalisation from training."""
    module: Any
    for module in backbone.modules():
        if hasattr(module, "fused_attn"):  # timm's attentions decide by it which kernel they call
            module.fused_attn = False
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.requires_grad_(False)


class _Carried(Function):
    """A weight as it is, whose gradient goes to its change."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, change: Tensor) -> Tensor:
        """Return the weight."""
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        """Return the gradient for the change."""
        return None, grad


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress a warning of torch about its own rules for forward mode."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated")
        yield


@contextmanager
def _outside_inference_mode() -> Iterator[None]:
    """Leave inference mode, which has no derivatives in forward mode, and compute without gradients instead."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


RELUS = (F.relu, torch.relu, Tensor.relu)
RELUS_IN_PLACE = (F.relu_, torch.relu_, Tensor.relu_)


class _Leaky(TorchFunctionMode):
    """Replaces ReLUs, whether modules or functions, by leaky ones while the context is open.

    Args:
        slope: below 0.
    """

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return what `func` returns, or the leaky ReLU of its argument."""
        if func in RELUS:
            return F.leaky_relu(args[0], self.slope)
        if func in RELUS_IN_PLACE:
            return F.leaky_relu_(args[0], self.slope)
        return func(*args, **(kwargs or {}))


class _Kernels(TorchFunctionMode):
    """Replaces group and layer normalisation by functions whose derivative in forward mode takes two kernels.

    torch composes this derivative of a dozen elementwise operations with copies: in a small network it takes longer
    than the convolutions.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return what `func` returns."""
        function = _KERNELS.get(func)
        return func(*args, **(kwargs or {})) if function is None else function(*args, **(kwargs or {}))


def _group_norm(x: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    """Return `torch.nn.functional.group_norm` of these."""
    return _Normalised.apply(x, weight, bias, _GroupNorm(num_groups, eps))


def _layer_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    """Return `torch.nn.functional.layer_norm` of these."""
    return _Normalised.apply(x, weight, bias, _LayerNorm(tuple(normalized_shape), eps))


_KERNELS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.group_norm: _group_norm,
    F.layer_norm: _layer_norm,
}


@dataclass(frozen=True)
class _GroupNorm:
    """The kernels of group normalisation."""

    groups: int
    eps: float

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the result, and mean and reciprocal standard deviation of every group."""
        n, c = x.shape[:2]
        found: tuple[Tensor, Tensor, Tensor] = torch.native_group_norm(
            x, weight, bias, n, c, x[0, 0].numel(), self.groups, self.eps
        )
        return found

    def backward(
        self, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, needed: list[bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients for input, weight and bias, as far as they are needed."""
        n, c = x.shape[:2]
        grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_group_norm_backward(
            grad, x, mean, rstd, weight, n, c, x[0, 0].numel(), self.groups, needed
        )
        return grads

    def scaled(self, moved: Tensor, weight: Tensor) -> Tensor:
        """Return a normalised tensor times the weight of its channel."""
        return moved * weight.view(-1, *[1] * (moved.ndim - 2))


@dataclass(frozen=True)
class _LayerNorm:
    """The kernels of layer normalisation."""

    shape: tuple[int, ...]
    eps: float

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the result, and mean and reciprocal standard deviation of every row."""
        found: tuple[Tensor, Tensor, Tensor] = torch.native_layer_norm(x, list(self.shape), weight, bias, self.eps)
        return found

    def backward(
        self, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, needed: list[bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients for input, weight and bias, as far as they are needed."""
        bias = weight  # the kernel reads only its shape
        grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_layer_norm_backward(
            grad, x, list(self.shape), mean, rstd, weight, bias, needed
        )
        return grads

    def scaled(self, moved: Tensor, weight: Tensor) -> Tensor:
        """Return a normalised tensor times the weight of its feature."""
        return moved * weight


class _Normalised(Function):
    """n(x) w + b, where n normalises groups or rows, differentiable in both modes.

    The derivative of n is a symmetric matrix, so that the kernel of the backward pass computes its product with the
    change of x as well; n(x) dw + db is a normalisation with other parameters.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, kernels: Any) -> Tensor:
        """Return n(x) w + b."""
        ctx.set_materialize_grads(False)
        x = x.contiguous() if isinstance(kernels, _LayerNorm) else x
        result, mean, rstd = kernels.forward(x, weight, bias)
        ctx.kernels = kernels
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.save_for_forward(x, weight, mean, rstd)
        return cast(Tensor, result)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients for x, weight and bias."""
        if grad is None:
            return None, None, None, None
        x, weight, mean, rstd = ctx.saved_tensors
        grads = ctx.kernels.backward(grad, x, mean, rstd, weight, list(ctx.needs_input_grad[:3]))
        return (*(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)), None)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None, kernels: None) -> Tensor | None:
        """Return the derivative in the direction of these changes."""
        x, weight, mean, rstd = ctx.saved_tensors
        moved = None
        if dx is not None:
            moved = ctx.kernels.backward(dx, x, mean, rstd, None, [True, False, False])[0]
            moved = moved if weight is None else ctx.kernels.scaled(moved, weight)
        if dweight is not None:
            own = ctx.kernels.forward(x, dweight, dbias)[0]
            moved = own if moved is None else moved + own
        return moved


__all__ = ["leaky", "make_differentiable", "tangent"]
