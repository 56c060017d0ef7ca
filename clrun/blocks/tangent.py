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
    with _outside_inference_mode(), torch.autocast(x.device.type, enabled=False), _Kernels(slope), _quiet():
        x = x.clone() if x.is_inference() else x
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):  # no other kernel has a derivative in forward mode
            carried = _Carried.apply([weights[name] for name in change], *change.values())
            duals = {
                name: forward_ad.make_dual(weight, delta.detach())  # type: ignore[no-untyped-call]
                for (name, delta), weight in zip(change.items(), carried, strict=True)
            }
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
    """Weights as they are, whose gradients go to their changes."""

    @staticmethod
    def forward(ctx: Any, weights: Sequence[Tensor], *changes: Tensor) -> tuple[Tensor, ...]:
        """Return the weights."""
        ctx.set_materialize_grads(False)
        return tuple(weight.detach() for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients for the changes."""
        return (None, *grads)


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
        slope: below 0; 0 replaces none.
    """

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return what `func` returns, or the leaky ReLU of its argument."""
        if func in RELUS and self.slope:
            return F.leaky_relu(args[0], self.slope)
        if func in RELUS_IN_PLACE and self.slope:
            return F.leaky_relu_(args[0], self.slope)
        return func(*args, **(kwargs or {}))


class _Kernels(_Leaky):
    """Replaces ReLUs as `_Leaky`, and some functions whose derivative in forward mode takes more kernels than needed.

    torch composes that of group and layer normalisation of a dozen elementwise operations with copies: in a small
    network it takes longer than the convolutions.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return what `func` returns."""
        function = _KERNELS.get(func)
        if function is None:
            return super().__torch_function__(func, types, args, kwargs)
        return function(*args, **(kwargs or {}))


def _group_norm(x: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    """Return `torch.nn.functional.group_norm` of these."""
    return _Normalised.apply(x, weight, bias, _GroupNorm(num_groups, eps, x.ndim - 2))


def _layer_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    """Return `torch.nn.functional.layer_norm` of these."""
    return _Normalised.apply(x, weight, bias, _LayerNorm(tuple(normalized_shape), eps))


@dataclass(frozen=True)
class _GroupNorm:
    """The kernels of group normalisation."""

    groups: int
    eps: float
    dimensions: int  # of an image; 2 for [B, C, H, W]

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the result, and mean and reciprocal standard deviation of every group."""
        n, c = x.shape[:2]
        found: tuple[Tensor, Tensor, Tensor] = torch.native_group_norm(
            x, weight, bias, n, c, x.shape[2:].numel(), self.groups, self.eps
        )
        return found

    def backward(
        self, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, needed: list[bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients for input, weight and bias, as far as they are needed."""
        n, c = x.shape[:2]
        grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_group_norm_backward(
            grad, x, mean, rstd, weight, n, c, x.shape[2:].numel(), self.groups, needed
        )
        return grads

    def factors(self, weight: Tensor) -> Tensor:
        """Return the weights of the channels in the form in which they multiply a normalised tensor."""
        return weight.view(-1, *[1] * self.dimensions)


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

    def factors(self, weight: Tensor) -> Tensor:
        """Return the weights of the features in the form in which they multiply a normalised tensor."""
        return weight


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
        own: Tensor | None = None if dweight is None else ctx.kernels.forward(x, dweight, dbias)[0]
        if dx is None:
            return own
        moved: Tensor = ctx.kernels.backward(dx, x, mean, rstd, None, [True, False, False])[0]
        if own is None:
            return moved if weight is None else moved.mul_(ctx.kernels.factors(weight))
        moved = own.add_(moved) if weight is None else own.addcmul_(moved, ctx.kernels.factors(weight))
        return moved


def _conv2d(
    x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Any:
    """Return `torch.nn.functional.conv2d` of these."""
    form = (stride, padding, dilation, groups)
    if isinstance(padding, str) or _change(weight) is None or _change(x) is not None:
        return F.conv2d(x, weight, bias, *form)
    return _Convolved.apply(x, weight, bias, form)


def _change(tensor: Tensor) -> Tensor | None:
    """Return the direction in which a tensor changes; None for one that does not."""
    return cast(Tensor | None, forward_ad.unpack_dual(tensor).tangent)  # type: ignore[no-untyped-call]


class _Convolved(Function):
    """A convolution of images, which do not change. torch's derivative of it convolves a change of 0 as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, form: Any) -> Tensor:
        """Return the convolution of x [B, C, H, W]."""
        ctx.set_materialize_grads(False)
        ctx.form, ctx.biased = form, bias is not None
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)
        return F.conv2d(x, weight, bias, *form)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients for x, weight and bias."""
        if grad is None:
            return None, None, None, None
        x, weight = ctx.saved_tensors
        *sizes, groups = ctx.form
        pairs = [[size, size] if isinstance(size, int) else list(size) for size in sizes]
        biases, needed = [len(weight)] if ctx.biased else None, list(ctx.needs_input_grad[:3])
        grads = torch.ops.aten.convolution_backward(grad, x, weight, biases, *pairs, False, [0, 0], groups, needed)
        return (*grads, None)

    @staticmethod
    def jvp(ctx: Any, dx: None, dweight: Tensor, dbias: Tensor | None, form: None) -> Tensor:
        """Return the derivative in the direction of these changes."""
        return F.conv2d(ctx.saved_tensors[0], dweight, dbias, *ctx.form)


_KERNELS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.conv2d: _conv2d,
    F.group_norm: _group_norm,
    F.layer_norm: _layer_norm,
}


__all__ = ["leaky", "make_differentiable", "tangent"]
