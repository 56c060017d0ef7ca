"""Algebra on named tensors (`dict[str, Tensor]`), and modules whose state follows them to their device.

Nothing else in the package flattens or aligns parameters. Symbols: `P` numbers in all tensors together.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Self

import torch
from torch import Tensor, nn

Params = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


def select(
    module: nn.Module, *, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> dict[str, nn.Parameter]:
    """Return the trainable parameters of `module` whose name matches a pattern of `include` and none of `exclude`.

    Patterns are those of the shell (`head.*`); the order is that of the module.
    """

    def wanted(name: str) -> bool:
        return any(fnmatchcase(name, p) for p in include) and not any(fnmatchcase(name, p) for p in exclude)

    return {name: p for name, p in module.named_parameters() if p.requires_grad and wanted(name)}


def gradients(params: Mapping[str, Tensor]) -> Params:
    """Return the gradients of `params`; a missing one counts as zero."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in params.items()}


def clone(params: Mapping[str, Tensor]) -> Params:
    """Return detached copies: an anchor must not follow the parameter it was taken from."""
    return {name: p.detach().clone() for name, p in params.items()}


def shapes_of(params: Mapping[str, Tensor]) -> Shapes:
    """Return the shape of each tensor."""
    return {name: tuple(p.shape) for name, p in params.items()}


def flatten(params: Mapping[str, Tensor]) -> Tensor:
    """Return [P], the tensors one after the other in the order of the mapping."""
    return torch.cat([p.reshape(-1) for p in params.values()]) if params else torch.zeros(0)


def unflatten(vector: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> Params:
    """Return views of `vector` [P] in these shapes: the inverse of `flatten`."""
    parts = torch.split(vector, [math.prod(shape) for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """Return the inner product [] of tensors of the same names, summed in float64."""
    products = [(a[name] * b[name]).sum(dtype=torch.float64) for name in a]
    return torch.stack(products).sum()


def corner(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the view of the first `shape` entries of `tensor` along each dimension: where a tensor grew from."""
    return tensor[tuple(slice(0, size) for size in shape)]


def match(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (name, old tensor, its corner of the new tensor) for the names both have.

    Raises:
        ValueError: a tensor lost dimensions or entries.
    """
    for name, before in old.items():
        if name in new:
            after = new[name]
            if before.dim() != after.dim() or any(b > a for b, a in zip(before.shape, after.shape, strict=True)):
                raise ValueError(f"{name} shrank from {tuple(before.shape)} to {tuple(after.shape)}")
            yield name, before, corner(after, before.shape)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put `module` in eval mode; afterwards every submodule has the mode it had."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, mode in modes:
            submodule.training = mode


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Stop the training of every parameter of `modules`; afterwards each trains as it did."""
    flags = [(p, p.requires_grad) for module in modules for p in module.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def hold_statistics(module: nn.Module) -> None:
    """Put the batch normalisation layers of `module` in eval mode, so that their running statistics stand still."""
    for submodule in module.modules():
        if isinstance(submodule, nn.modules.batchnorm._BatchNorm):
            submodule.eval()


class Carrier(nn.Module):
    """A module whose state is tensors in plain attributes that follow it to its device.

    Unlike buffers they are not weights: they stay out of `state_dict`, hence of exported weights, and are never
    averaged over processes, of which each may hold its own.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the attributes too; every `.to(device)` of an owner comes through here."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, fn(value))
        return self


__all__ = [
    "Carrier",
    "Params",
    "Shapes",
    "clone",
    "corner",
    "dot",
    "eval_mode",
    "flatten",
    "frozen",
    "gradients",
    "hold_statistics",
    "match",
    "select",
    "shapes_of",
    "unflatten",
]
