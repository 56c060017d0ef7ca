"""What a curvature can do, whatever its form: symmetric positive semi-definite matrices on the parameters of a module.

A curvature K acts on the vector [P] of the parameters named in `shapes`, one after the other in that order, each in
row-major order. It is an immutable value of tensors and plain containers: it pickles, and operations return new ones.
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

from clrun.blocks.params import Params, Shapes, flatten, match, shapes_of, unflatten

Damping = Literal["exact", "factored"]
Sum = Literal["kl", "additive", "rank1", "list"]


@dataclass(frozen=True, eq=False)
class Operator(ABC):
    """A symmetric matrix M [P, P] by its action: a curvature or the inverse of one.

    Attributes:
        shapes: shape of each parameter, in the order of the vector.
    """

    shapes: Shapes

    @property
    def size(self) -> int:
        """P."""
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        found: list[Tensor] = []
        self.apply(lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
        return sum(tensor.nbytes for tensor in found)

    @abstractmethod
    def mv(self, vector: Tensor) -> Tensor:
        """Return M v [P]; differentiable in v."""

    @abstractmethod
    def diag(self) -> Tensor:
        """Return the diagonal [P]."""

    def quad(self, vector: Tensor) -> Tensor:
        """Return v' M v []; differentiable in v, at the price of one product."""
        value: Tensor = _Quad.apply(self, vector)
        return value

    def trace(self) -> Tensor:
        """Return the trace []."""
        return self.diag().sum()

    def vector(self, params: Mapping[str, Tensor]) -> Tensor:
        """Return [P], the parameters of this operator among `params`."""
        return flatten({name: params[name] for name in self.shapes})

    def params(self, vector: Tensor) -> Params:
        """Return views of `vector` [P] by name: the inverse of `vector`."""
        return unflatten(vector, self.shapes)

    def dense(self) -> Tensor:
        """Return M as a matrix; for small P."""
        columns = torch.eye(self.size, dtype=self.diag().dtype, device=self.diag().device)
        return torch.stack([self.mv(column) for column in columns], dim=1)

    def apply(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """Return the operator with `fn` applied to every tensor: how it follows a module to its device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: _applied(value, fn) for name, value in values.items()})


class _Quad(Function):
    """v' M v, whose gradient 2 M v is at hand when the value is; in the precision of M, whatever autocast says."""

    @staticmethod
    def forward(ctx: Any, operator: Operator, vector: Tensor) -> Tensor:
        """Return v' M v []."""
        with torch.autocast(vector.device.type, enabled=False):
            product = operator.mv(vector)
        ctx.save_for_backward(product)
        return torch.dot(product, vector)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        """Return 2 M v times the gradient of the value."""
        (product,) = ctx.saved_tensors
        return None, 2 * grad * product


@dataclass(frozen=True, eq=False)
class Curvature(Operator):
    """A positive semi-definite K that can be summed over tasks, grown and inverted."""

    @abstractmethod
    def inverse(self, damping: float, mode: Damping = "exact") -> Operator:
        """Return (K + damping I)^-1, decomposed in float64.

        Args:
            damping: 0 or more.
            mode: "factored" spreads the damping over Kronecker factors (see there); other forms know "exact" only.
        """

    @abstractmethod
    def scale(self, factor: float) -> "Curvature":
        """Return factor * K, factor >= 0."""

    @abstractmethod
    def add(self, other: "Curvature", how: Sum = "kl") -> "Curvature":
        """Return K + `other`, of the same form and shapes.

        Args:
            other: the other term.
            how: which Kronecker product stands for a sum of two (see there); all other forms add exactly.
        """

    @abstractmethod
    def expand(self, shapes: Mapping[str, tuple[int, ...]]) -> "Curvature":
        """Return the curvature of the parameters in `shapes`: 0 for every entry that is new, old ones in the corner."""

    def solve(self, vector: Tensor, damping: float, mode: Damping = "exact") -> Tensor:
        """Return (K + damping I)^-1 v; `inverse` once is cheaper than many calls."""
        return self.inverse(damping, mode).mv(vector)

    def decomposed(self) -> "Curvature":
        """Return the same matrix in a form whose inverses are cheap."""
        return self

    def proximal(self, point: Tensor, anchor: Tensor, rate: float) -> Tensor:
        """Return argmin_t |t - point|^2 / 2 + rate / 2 (t - anchor)' K (t - anchor)."""
        return anchor + self.scale(rate).inverse(1.0).mv(point - anchor)


def _applied(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """Return `value` with `fn` applied to the tensors and curvatures in it."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, Operator):
        return value.apply(fn)
    if isinstance(value, tuple):
        return tuple(_applied(item, fn) for item in value)
    return value


@dataclass(frozen=True, eq=False)
class Identity(Curvature):
    """K = strength * I: every parameter counts the same, and nothing but a number is stored."""

    strength: float = 1.0

    def mv(self, vector: Tensor) -> Tensor:
        """Return strength * v."""
        return self.strength * vector

    def inverse(self, damping: float, mode: Damping = "exact") -> "Identity":
        """Return I / (strength + damping)."""
        return Identity(self.shapes, 1 / (self.strength + damping))

    def diag(self) -> Tensor:
        """Return the strength, P times, float64 on the CPU."""
        return torch.full((self.size,), self.strength, dtype=torch.float64)

    def scale(self, factor: float) -> "Identity":
        """Return factor * strength * I."""
        return Identity(self.shapes, factor * self.strength)

    def add(self, other: Curvature, how: Sum = "kl") -> "Identity":
        """Return the sum of two multiples of I."""
        assert isinstance(other, Identity)
        return Identity(other.shapes, self.strength + other.strength)

    def expand(self, shapes: Mapping[str, tuple[int, ...]]) -> "Identity":
        """Return the same multiple of a larger I: what is new counts as what is old."""
        return Identity(dict(shapes), self.strength)


@dataclass(frozen=True, eq=False)
class Diagonal(Curvature):
    """K = diag(values).

    Attributes:
        values: [P].
    """

    values: Tensor

    @classmethod
    def of(cls, importance: Mapping[str, Tensor]) -> "Diagonal":
        """Return the diagonal of these importances by parameter."""
        return cls(shapes_of(importance), flatten(importance))

    def mv(self, vector: Tensor) -> Tensor:
        """Return values * v."""
        return self.values * vector

    def quad(self, vector: Tensor) -> Tensor:
        """Return v' M v, by autograd: two products of vectors cost nothing."""
        return torch.dot(self.mv(vector), vector)

    def inverse(self, damping: float, mode: Damping = "exact") -> "Diagonal":
        """Return 1 / (values + damping)."""
        return Diagonal(self.shapes, 1 / (self.values + damping))

    def diag(self) -> Tensor:
        """Return the values."""
        return self.values

    def scale(self, factor: float) -> "Diagonal":
        """Return factor * values."""
        return Diagonal(self.shapes, self.values * factor)

    def add(self, other: Curvature, how: Sum = "kl") -> "Diagonal":
        """Return the sum of the values."""
        assert isinstance(other, Diagonal)
        assert list(self.shapes.items()) == list(other.shapes.items())
        return Diagonal(self.shapes, self.values + other.values)

    def expand(self, shapes: Mapping[str, tuple[int, ...]]) -> "Diagonal":
        """Return the values in the corner of each parameter; a name that is new has zeros."""
        grown = {name: self.values.new_zeros(shape) for name, shape in shapes.items()}
        for _, before, place in match(unflatten(self.values, self.shapes), grown):
            place.copy_(before)
        return Diagonal(dict(shapes), flatten(grown))

    def proximal(self, point: Tensor, anchor: Tensor, rate: float) -> Tensor:
        """Return (point + c anchor) / (1 + c), c = rate * values."""
        pull = rate * self.values
        return (point + pull * anchor) / (1 + pull)


@dataclass(frozen=True, eq=False)
class Dense(Curvature):
    """K as it is, for tests and small models.

    Attributes:
        matrix: [P, P].
    """

    matrix: Tensor

    def mv(self, vector: Tensor) -> Tensor:
        """Return K v."""
        return self.matrix @ vector

    def inverse(self, damping: float, mode: Damping = "exact") -> "Dense":
        """Return (K + damping I)^-1 by Cholesky."""
        matrix = self.matrix.double()
        eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        factor = torch.linalg.cholesky(matrix + damping * eye)
        return Dense(self.shapes, torch.cholesky_inverse(factor).to(self.matrix.dtype))

    def diag(self) -> Tensor:
        """Return the diagonal."""
        return self.matrix.diagonal()

    def scale(self, factor: float) -> "Dense":
        """Return factor * K."""
        return Dense(self.shapes, factor * self.matrix)

    def add(self, other: Curvature, how: Sum = "kl") -> "Dense":
        """Return the sum."""
        assert isinstance(other, Dense)
        return Dense(self.shapes, self.matrix + other.matrix)

    def expand(self, shapes: Mapping[str, tuple[int, ...]]) -> "Dense":
        """Return K on the old entries, 0 elsewhere."""
        places = flatten({name: torch.full(shape, -1) for name, shape in shapes.items()})
        grown = unflatten(places, dict(shapes))
        old = unflatten(torch.arange(self.size), self.shapes)
        for _, before, place in match(old, grown):
            place.copy_(before)
        matrix = self.matrix.new_zeros(len(places), len(places))
        where = (places >= 0).nonzero()[:, 0]
        matrix[where[:, None], where] = self.matrix[places[where][:, None], places[where]]
        return Dense(dict(shapes), matrix)


@dataclass(frozen=True, eq=False)
class Blocks(Operator):
    """A block-diagonal M.

    Attributes:
        parts: the blocks; `shapes` is theirs, one part after the other.
    """

    parts: tuple[Operator, ...]

    @classmethod
    def of(cls, parts: Sequence[Operator]) -> Self:
        """Return the blocks together."""
        return cls({name: shape for part in parts for name, shape in part.shapes.items()}, tuple(parts))

    def split(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Return the share of each part."""
        return torch.split(vector, [part.size for part in self.parts])

    def mv(self, vector: Tensor) -> Tensor:
        """Return the products of all parts."""
        if not self.parts:
            return vector
        return torch.cat([part.mv(v) for part, v in zip(self.parts, self.split(vector), strict=True)])

    def diag(self) -> Tensor:
        """Return the diagonals."""
        return torch.cat([part.diag() for part in self.parts]) if self.parts else torch.zeros(0)


@dataclass(frozen=True, eq=False)
class Composite(Blocks, Curvature):
    """A block-diagonal K: one part for each group of parameters, e.g. a Kronecker product for each layer."""

    parts: tuple[Curvature, ...]

    def inverse(self, damping: float, mode: Damping = "exact") -> Blocks:
        """Return the inverse of each part."""
        return Blocks.of([part.inverse(damping, mode) for part in self.parts])

    def scale(self, factor: float) -> "Composite":
        """Return each part scaled."""
        return Composite.of([part.scale(factor) for part in self.parts])

    def add(self, other: Curvature, how: Sum = "kl") -> "Composite":
        """Return the sum part by part."""
        assert isinstance(other, Composite)
        return Composite.of([a.add(b, how) for a, b in zip(self.parts, other.parts, strict=True)])

    def expand(self, shapes: Mapping[str, tuple[int, ...]]) -> "Composite":
        """Return each part expanded."""
        assert shapes.keys() == self.shapes.keys(), "the parts of a composite stay"
        return Composite.of([part.expand({n: shapes[n] for n in part.shapes}) for part in self.parts])

    def decomposed(self) -> "Composite":
        """Return each part decomposed."""
        return Composite.of([part.decomposed() for part in self.parts])

    def proximal(self, point: Tensor, anchor: Tensor, rate: float) -> Tensor:
        """Return the minimiser of each part."""
        split = zip(self.parts, self.split(point), self.split(anchor), strict=True)
        return torch.cat([part.proximal(p, a, rate) for part, p, a in split])
