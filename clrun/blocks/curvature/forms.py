"""The operations that every form of curvature offers, and the forms that do not depend on the kind of layer.

A curvature is a symmetric positive semi-definite matrix K [P, P] over the P numbers of some named parameters. It acts
on vectors [P] that hold the parameters in the order of `shapes`, each parameter flattened in row-major order. A
curvature is an immutable value made of tensors and plain containers: it can be pickled, and every operation returns a
new one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from clrun.blocks.params import Params, Shapes, flatten, shapes_of, unflatten

Damping = Literal["exact", "factored"]
Sum = Literal["kl", "additive", "rank1", "list"]


@dataclass(frozen=True, eq=False)
class Curvature(ABC):
    """A positive semi-definite matrix K [P, P], which can be multiplied by vectors, added over tasks and inverted.

    Attributes:
        shapes: shape of each parameter by name, in the order of the vector.
    """

    shapes: Shapes

    @property
    def size(self) -> int:
        """The number P of entries of all parameters."""
        return sum(prod(shape) for shape in self.shapes.values())

    @abstractmethod
    def mv(self, vector: Tensor) -> Tensor:
        """Return the product K v [P]; differentiable in v."""

    @abstractmethod
    def diag(self) -> Tensor:
        """Return the diagonal of K [P]."""

    @abstractmethod
    def inverse(self, damping: float, mode: Damping = "exact") -> "Curvature":
        """Return (K + damping I)^-1, decomposed in float64.

        Args:
            damping: 0 or more.
            mode: "factored" distributes the damping over the factors of a Kronecker product, see
                `KroneckerFactored.inverse`; all other forms treat it as "exact".
        """

    @abstractmethod
    def scale(self, factor: float) -> "Curvature":
        """Return factor * K for a factor of at least 0."""

    @abstractmethod
    def add(self, other: "Curvature", how: Sum = "kl") -> "Curvature":
        """Return the sum of K and `other`.

        Args:
            other: a curvature of the same form and of the same parameters in the same order.
            how: which Kronecker product approximates the sum of two, see `KroneckerFactored.add`; all other forms
                ignore it and add exactly.
        """

    def quad(self, vector: Tensor) -> Tensor:
        """Return the quadratic form v' K v [], differentiable in v; forward and backward share one product K v."""
        value: Tensor = _Quad.apply(self, vector)
        return value

    def vector(self, params: Mapping[str, Tensor]) -> Tensor:
        """Return the vector [P] of the parameters in `shapes`; `params` may hold others too, which are left out."""
        return flatten({name: params[name] for name in self.shapes})

    def params(self, vector: Tensor) -> Params:
        """Return views of a vector [P] by parameter name: the inverse of `vector`."""
        return unflatten(vector, self.shapes)

    def decomposed(self) -> "Curvature":
        """Return the same matrix in a form that can be inverted cheaply for any damping."""
        return self

    def proximal(self, point: Tensor, anchor: Tensor, rate: float) -> Tensor:
        """Return the vector t [P] that minimises |t - point|^2 / 2 + rate / 2 (t - anchor)' K (t - anchor)."""
        return anchor + self.scale(rate).inverse(1.0).mv(point - anchor)

    def apply(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """Return the curvature with `fn` applied to each of its tensors, for example to move them to a device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: _applied(value, fn) for name, value in values.items()})


class _Quad(Function):
    """The function v' K v, computed in the precision of K even under autocast.

    The product K v of the forward pass is stored, because the gradient 2 K v needs the same product.
    """

    @staticmethod
    def forward(ctx: Any, curvature: Curvature, vector: Tensor) -> Tensor:
        """Return v' K v []."""
        with torch.autocast(vector.device.type, enabled=False):
            product = curvature.mv(vector)
        ctx.save_for_backward(product)
        return torch.dot(product, vector)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        """Return the gradient 2 K v [P], multiplied by the gradient [] of the value."""
        (product,) = ctx.saved_tensors
        return None, 2 * grad * product


def _applied(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """Return `value` with `fn` applied to the tensors and curvatures in it."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, Curvature):
        return value.apply(fn)
    if isinstance(value, tuple):
        return tuple(_applied(item, fn) for item in value)
    return value


@dataclass(frozen=True, eq=False)
class Identity(Curvature):
    """K = strength * I: all parameters are equally important. Only the number `strength` is stored."""

    strength: float = 1.0

    def mv(self, vector: Tensor) -> Tensor:
        """Return strength * v [P]."""
        return self.strength * vector

    def inverse(self, damping: float, mode: Damping = "exact") -> "Identity":
        """Return I / (strength + damping)."""
        return Identity(self.shapes, 1 / (self.strength + damping))

    def diag(self) -> Tensor:
        """Return a vector [P] filled with the strength, float64 on the CPU."""
        return torch.full((self.size,), self.strength, dtype=torch.float64)

    def scale(self, factor: float) -> "Identity":
        """Return factor * strength * I."""
        return Identity(self.shapes, factor * self.strength)

    def add(self, other: Curvature, how: Sum = "kl") -> "Identity":
        """Return the sum of two multiples of I."""
        assert isinstance(other, Identity)
        return Identity(other.shapes, self.strength + other.strength)


@dataclass(frozen=True, eq=False)
class Diagonal(Curvature):
    """K = diag(values).

    Attributes:
        values: the diagonal [P].
    """

    values: Tensor

    @classmethod
    def of(cls, importance: Mapping[str, Tensor]) -> "Diagonal":
        """Return the diagonal made of the importances of each parameter, by name and in the parameter's shape."""
        return cls(shapes_of(importance), flatten(importance))

    def mv(self, vector: Tensor) -> Tensor:
        """Return values * v [P]."""
        return self.values * vector

    def quad(self, vector: Tensor) -> Tensor:
        """Return v' K v [] by autograd, which is cheap for products of vectors."""
        return torch.dot(self.mv(vector), vector)

    def inverse(self, damping: float, mode: Damping = "exact") -> "Diagonal":
        """Return the diagonal 1 / (values + damping)."""
        return Diagonal(self.shapes, 1 / (self.values + damping))

    def diag(self) -> Tensor:
        """Return the values [P]."""
        return self.values

    def scale(self, factor: float) -> "Diagonal":
        """Return the diagonal factor * values."""
        return Diagonal(self.shapes, self.values * factor)

    def add(self, other: Curvature, how: Sum = "kl") -> "Diagonal":
        """Return the diagonal of the sums of the values."""
        assert isinstance(other, Diagonal)
        assert list(self.shapes.items()) == list(other.shapes.items())
        return Diagonal(self.shapes, self.values + other.values)

    def proximal(self, point: Tensor, anchor: Tensor, rate: float) -> Tensor:
        """Return (point + c * anchor) / (1 + c) [P] with c = rate * values."""
        pull = rate * self.values
        return (point + pull * anchor) / (1 + pull)


@dataclass(frozen=True, eq=False)
class Composite(Curvature):
    """A block-diagonal K with one block per group of parameters, for example a Kronecker product per layer.

    Attributes:
        parts: the blocks; `shapes` holds the shapes of the first part, then those of the second, and so on.
    """

    parts: tuple[Curvature, ...]

    @classmethod
    def of(cls, parts: Sequence[Curvature]) -> Self:
        """Return the block-diagonal matrix of these blocks."""
        return cls({name: shape for part in parts for name, shape in part.shapes.items()}, tuple(parts))

    def split(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Return the slice of a vector [P] that belongs to each block."""
        return torch.split(vector, [part.size for part in self.parts])

    def mv(self, vector: Tensor) -> Tensor:
        """Return the products of all blocks with their slices, concatenated [P]."""
        if not self.parts:
            return vector
        return torch.cat([part.mv(v) for part, v in zip(self.parts, self.split(vector), strict=True)])

    def diag(self) -> Tensor:
        """Return the diagonals of all blocks, concatenated [P]."""
        return torch.cat([part.diag() for part in self.parts]) if self.parts else torch.zeros(0)

    def inverse(self, damping: float, mode: Damping = "exact") -> "Composite":
        """Return the block-diagonal matrix of the inverses of all blocks."""
        return Composite.of([part.inverse(damping, mode) for part in self.parts])

    def scale(self, factor: float) -> "Composite":
        """Return the block-diagonal matrix of the scaled blocks."""
        return Composite.of([part.scale(factor) for part in self.parts])

    def add(self, other: Curvature, how: Sum = "kl") -> "Composite":
        """Return the block-diagonal matrix of the sums of corresponding blocks."""
        assert isinstance(other, Composite)
        return Composite.of([a.add(b, how) for a, b in zip(self.parts, other.parts, strict=True)])

    def decomposed(self) -> "Composite":
        """Return the block-diagonal matrix of the decomposed blocks."""
        return Composite.of([part.decomposed() for part in self.parts])

    def proximal(self, point: Tensor, anchor: Tensor, rate: float) -> Tensor:
        """Return the minimisers of all blocks, concatenated [P]."""
        split = zip(self.parts, self.split(point), self.split(anchor), strict=True)
        return torch.cat([part.proximal(p, a, rate) for part, p, a in split])


__all__ = ["Composite", "Curvature", "Damping", "Diagonal", "Identity", "Sum"]
