"""Algebra on named tensors (`dict[str, Tensor]`), temporary modes of modules, and modules that carry plain tensors.

Symbols: all tensors of a mapping together have `P` entries.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

Params = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


def select(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters of `module` by name, in the order of the module."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def rate_groups(*parts: tuple[Iterable[nn.Parameter], float]) -> list[dict[str, Any]]:
    """Return groups for an optimizer of the trainable ones of some parameters, each with a factor of the rate.

    `clrun.learning.training.fit` multiplies the learning rate of a group by its factor.
    """
    found = [{"params": [p for p in params if p.requires_grad], "lr_factor": factor} for params, factor in parts]
    return [group for group in found if group["params"]]


def gradients(params: Mapping[str, Tensor]) -> Params:
    """Return the gradients of `params` by name; a missing gradient counts as zeros."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in params.items()}


def clone(params: Mapping[str, Tensor]) -> Params:
    """Return detached copies by name, which do not change when the parameters do."""
    return {name: p.detach().clone() for name, p in params.items()}


def shapes_of(params: Mapping[str, Tensor]) -> Shapes:
    """Return the shape of each tensor by name."""
    return {name: tuple(p.shape) for name, p in params.items()}


def flatten(params: Mapping[str, Tensor]) -> Tensor:
    """Return the vector [P] of all entries, tensor by tensor in the order of the mapping."""
    return torch.cat([p.reshape(-1) for p in params.values()]) if params else torch.zeros(0)


def unflatten(vector: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> Params:
    """Return views of `vector` [P] with these names and shapes: the inverse of `flatten`."""
    parts = torch.split(vector, [math.prod(shape) for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def is_dense(tensor: Tensor) -> bool:
    """Return whether the entries of a tensor lie in memory side by side and once each, in whatever order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def as_stored(tensor: Tensor) -> Tensor:
    """Return a view of the entries of a dense tensor in the order in which they lie in memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """Return the inner product [] of two mappings with the same names and shapes, summed in float64."""
    products = [(a[name] * b[name]).sum(dtype=torch.float64) for name in a]
    return torch.stack(products).sum()


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put `module` in eval mode for the `with` block; afterwards every submodule is in its earlier mode."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, mode in modes:
            submodule.training = mode


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Set `requires_grad` of all parameters of `modules` to False for the `with` block, and restore it afterwards."""
    flags = [(p, p.requires_grad) for module in modules for p in module.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def hold_statistics(module: nn.Module) -> None:
    """Put the batch normalisation layers of `module` in eval mode, so that their running statistics do not change."""
    for submodule in module.modules():
        if isinstance(submodule, nn.modules.batchnorm._BatchNorm):
            submodule.eval()


class Carrier(nn.Module):
    """A module that keeps tensors in plain attributes, which move with it to its device.

    Unlike buffers these tensors are not part of `state_dict`, and hence not of exported weights. They are never
    averaged over processes: each process may have different ones.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Apply `fn` to the attributes too: torch calls this for every `.to(device)` of the module or its owner."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, fn(value))
        return self


__all__ = [
    "Carrier",
    "Params",
    "Shapes",
    "as_stored",
    "clone",
    "dot",
    "eval_mode",
    "flatten",
    "frozen",
    "gradients",
    "hold_statistics",
    "is_dense",
    "rate_groups",
    "select",
    "shapes_of",
    "unflatten",
]
