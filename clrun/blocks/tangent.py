"""The first-order Taylor expansion of a network in its weights, by one pass in forward mode."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.func import functional_call
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
    with _outside_inference_mode(), torch.autocast(x.device.type, enabled=False), leaky(slope), _quiet():
        x = x.clone() if x.is_inference() else x
        with forward_ad.dual_level():
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


__all__ = ["leaky", "make_differentiable", "tangent"]
