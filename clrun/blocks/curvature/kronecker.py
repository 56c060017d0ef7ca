"""Curvature of a linear or convolutional layer as a Kronecker product, and sums of such products.

The layer is y = [W, b] [a; 1] with W flattened to [out, in]: the bias, if it is trained, is the last column. The
curvature of a row-major [W, b] is G (x) A: D -> G D A, with G [out, out] from the gradients at the outputs and A
[in (+1), in (+1)] from the inputs (K-FAC, Martens and Grosse, ICML 2015, arXiv 1503.05671).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod, sqrt

import torch
from torch import Tensor

from clrun.blocks.curvature.forms import Composite, Curvature, Damping, Diagonal, Operator, Sum
from clrun.blocks.params import Shapes

STEP, STOP, ROUNDS = 0.3, 1e-24, 3000  # of the fixed point of the KL-optimal sum


def as_matrix(vector: Tensor, shapes: Shapes) -> Tensor:
    """Return [W, b] [out, in (+1)] of the vector of a layer: its weight [out, ...] and, possibly, its bias [out]."""
    weight, *bias = shapes.values()
    out, size = weight[0], prod(weight)
    matrix = vector[:size].view(out, -1)
    return torch.cat([matrix, vector[size:, None]], dim=1) if bias else matrix


def as_vector(matrix: Tensor, shapes: Shapes) -> Tensor:
    """Return the vector of [W, b]: the inverse of `as_matrix`."""
    if len(shapes) == 1:
        return matrix.reshape(-1)
    return torch.cat([matrix[:, :-1].reshape(-1), matrix[:, -1]])


@dataclass(frozen=True, eq=False)
class KroneckerFactored(Curvature):
    """K = G (x) A for one layer.

    Attributes:
        outer: G, symmetric positive semi-definite.
        inner: A, likewise.
    """

    outer: Tensor
    inner: Tensor

    def mv(self, vector: Tensor) -> Tensor:
        """Return G D A as a vector."""
        return as_vector(self.outer @ as_matrix(vector, self.shapes) @ self.inner, self.shapes)

    def inverse(self, damping: float, mode: Damping = "exact") -> Operator:
        """Return (G (x) A + damping I)^-1.

        "exact" works in the eigenbasis of both factors. "factored" returns the Kronecker product of the inverses of
        G + sqrt(damping) / pi I and A + pi sqrt(damping) I, pi^2 = (tr A / dim A) / (tr G / dim G), the heuristic of
        Martens and Grosse (section 6.3).
        """
        if mode == "exact":
            return self.decomposed().inverse(damping)
        outer, inner = self.outer.double(), self.inner.double()
        ratio = (inner.trace() / len(inner)) / (outer.trace() / len(outer))
        pi = ratio.sqrt() if 0 < ratio < torch.inf else torch.ones_like(ratio)
        parts = [
            _inverse(factor + shift * torch.eye(len(factor)).to(factor))
            for factor, shift in ((outer, sqrt(damping) / pi), (inner, sqrt(damping) * pi))
        ]
        return KroneckerFactored(self.shapes, *(part.to(self.outer.dtype) for part in parts))

    def diag(self) -> Tensor:
        """Return the outer product of the diagonals."""
        return as_vector(torch.outer(self.outer.diagonal(), self.inner.diagonal()), self.shapes)

    def trace(self) -> Tensor:
        """Return tr G tr A."""
        return self.outer.trace() * self.inner.trace()

    def scale(self, factor: float) -> "KroneckerFactored":
        """Return the product with the factor shared by G and A."""
        return KroneckerFactored(self.shapes, self.outer * factor**0.5, self.inner * factor**0.5)

    def add(self, other: Curvature, how: Sum = "kl") -> Curvature:
        """Return one Kronecker product for the sum of two, or both.

        Args:
            other: the other term.
            how: "kl": the Gaussian of that precision is closest in KL divergence to the one of the exact sum (Kao et
                al., NeurIPS 2021); exact when the products are proportional or share a factor. "additive": the sum of
                the factors, balanced by the traces (Martens and Grosse): up to twice too stiff. "rank1": closest in
                the Frobenius norm (Van Loan and Pitsianis, 1993). "list": exact, keeps every product.
        """
        if how == "list":
            return Terms(self.shapes, (self,)).add(other, how)
        assert isinstance(other, KroneckerFactored)
        assert self.shapes == other.shapes
        pairs = [(self.outer.double(), self.inner.double()), (other.outer.double(), other.inner.double())]
        traces = [(outer.trace() * inner.trace()).item() for outer, inner in pairs]
        if not all(traces):
            return self if traces[0] else other
        pairs = [_balanced(*pair) for pair in pairs]
        (g, h), (a, b) = {"kl": _kl, "additive": _additive, "rank1": _rank1}[how](pairs)
        outer, inner = g * pairs[0][0] + h * pairs[1][0], a * pairs[0][1] + b * pairs[1][1]
        return KroneckerFactored(self.shapes, *(f.to(self.outer.dtype) for f in _balanced(outer, inner)))

    def expand(self, shapes: Mapping[str, tuple[int, ...]]) -> "KroneckerFactored":
        """Return factors with zeros for new outputs and inputs; the constant input stays the last."""
        old, new = next(iter(self.shapes.values())), next(iter(shapes.values()))
        if old == new:
            return self
        if old[2:] != new[2:] or any(b > a for b, a in zip(old, new, strict=True)):
            raise ValueError(f"{next(iter(shapes))} cannot grow from {old} to {new}")
        bias = len(shapes) > 1
        outer = self.outer.new_zeros(new[0], new[0])
        outer[: old[0], : old[0]] = self.outer
        places = [*range(prod(old[1:])), *([prod(new[1:])] if bias else [])]
        where = torch.tensor(places, device=self.inner.device)
        inner = self.inner.new_zeros(prod(new[1:]) + bias, prod(new[1:]) + bias)
        inner[where[:, None], where] = self.inner
        return KroneckerFactored(dict(shapes), outer, inner)

    def decomposed(self) -> "KroneckerEigen":
        """Return the eigenbasis of both factors, computed in float64."""
        (s, u), (t, v) = (torch.linalg.eigh(factor.double()) for factor in (self.outer, self.inner))
        values = torch.outer(s.clamp(min=0), t.clamp(min=0))
        return KroneckerEigen(self.shapes, *(x.to(self.outer.dtype) for x in (u, v, values)))


@dataclass(frozen=True, eq=False)
class KroneckerEigen(Curvature):
    """K = (U (x) V) diag(values) (U (x) V)' for one layer: what a Kronecker product is in its eigenbasis.

    Attributes:
        outer: U, an orthogonal matrix.
        inner: V, likewise.
        values: [out, in (+1)].
    """

    outer: Tensor
    inner: Tensor
    values: Tensor

    def mv(self, vector: Tensor) -> Tensor:
        """Return U (values * (U' D V)) V' as a vector."""
        turned = self.outer.T @ as_matrix(vector, self.shapes) @ self.inner
        return as_vector(self.outer @ (self.values * turned) @ self.inner.T, self.shapes)

    def inverse(self, damping: float, mode: Damping = "exact") -> "KroneckerEigen":
        """Return the same basis with 1 / (values + damping)."""
        return KroneckerEigen(self.shapes, self.outer, self.inner, 1 / (self.values + damping))

    def diag(self) -> Tensor:
        """Return the diagonal."""
        return as_vector(self.outer.square() @ self.values @ self.inner.square().T, self.shapes)

    def scale(self, factor: float) -> "KroneckerEigen":
        """Return the same basis with factor * values."""
        return KroneckerEigen(self.shapes, self.outer, self.inner, factor * self.values)

    def add(self, other: Curvature, how: Sum = "kl") -> Curvature:
        """Return both terms: two bases have no common one."""
        return Terms(self.shapes, (self,)).add(other, how)

    def expand(self, shapes: Mapping[str, tuple[int, ...]]) -> "KroneckerEigen":
        """Return itself: nothing may have grown."""
        assert dict(shapes) == self.shapes, "expand a Kronecker product before it is decomposed"
        return self


@dataclass(frozen=True, eq=False)
class Terms(Curvature):
    """K = sum of curvatures of the same parameters, kept apart.

    Attributes:
        terms: at least one.
    """

    terms: tuple[Curvature, ...]

    def mv(self, vector: Tensor) -> Tensor:
        """Return the sum of the products."""
        return torch.stack([term.mv(vector) for term in self.terms]).sum(dim=0)

    def inverse(self, damping: float, mode: Damping = "exact") -> Operator:
        """Return the inverse of the only term.

        Raises:
            ValueError: there are several.
        """
        if len(self.terms) > 1:
            raise ValueError("a sum that keeps its terms has no inverse; add them with kl, additive or rank1")
        return self.terms[0].inverse(damping, mode)

    def diag(self) -> Tensor:
        """Return the sum of the diagonals."""
        return torch.stack([term.diag() for term in self.terms]).sum(dim=0)

    def scale(self, factor: float) -> "Terms":
        """Return each term scaled."""
        return Terms(self.shapes, tuple(term.scale(factor) for term in self.terms))

    def add(self, other: Curvature, how: Sum = "list") -> "Terms":
        """Return one term more."""
        new = other.terms if isinstance(other, Terms) else (other,)
        return Terms(self.shapes, self.terms + new)

    def expand(self, shapes: Mapping[str, tuple[int, ...]]) -> "Terms":
        """Return each term expanded."""
        return Terms(dict(shapes), tuple(term.expand(shapes) for term in self.terms))


def isotropic(like: Curvature, value: float) -> Curvature:
    """Return value * I in the form of `like`: a diagonal, a Kronecker product (of equal factors), or parts of these."""
    if isinstance(like, Composite):
        return Composite.of([isotropic(part, value) for part in like.parts])
    if isinstance(like, Diagonal):
        return Diagonal(like.shapes, torch.full_like(like.values, value))
    assert isinstance(like, KroneckerFactored)
    factors = (torch.eye(len(factor)).to(factor) * sqrt(value) for factor in (like.outer, like.inner))
    return KroneckerFactored(like.shapes, *factors)


def _inverse(factor: Tensor) -> Tensor:
    """Return the inverse, float64; eigenvalues that rounding to single precision made negative count as its epsilon."""
    root, problem = torch.linalg.cholesky_ex(factor)
    if not problem:
        return torch.cholesky_inverse(root)
    values, vectors = torch.linalg.eigh(factor)
    inverse: Tensor = (vectors / values.clamp(min=values[-1] * torch.finfo(torch.float32).eps)) @ vectors.T
    return inverse


Pairs = list[tuple[Tensor, Tensor]]
Weights = tuple[tuple[float, float], tuple[float, float]]  # of both G, and of both A


def _balanced(outer: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of the same product with equal mean eigenvalues."""
    scale = ((inner.trace() / len(inner)) / (outer.trace() / len(outer))).sqrt()
    return outer * scale, inner / scale


def _additive(pairs: Pairs) -> Weights:
    """Return the weights of the trace-balanced sum of factors."""
    (g, a), (h, b) = pairs
    pi = float((g.trace() * b.trace() / (h.trace() * a.trace())).sqrt())
    return (1.0, pi), (1.0, 1 / pi)


def _rank1(pairs: Pairs) -> Weights:
    """Return the weights of the leading singular pair of vec(G1) vec(A1)' + vec(G2) vec(A2)'.

    It lies in the span of the terms, where it is the leading eigenvector of a non-negative 2x2 matrix: its weights
    are non-negative, and both factors stay positive semi-definite.
    """
    outer, inner = (torch.stack([pair[i].flatten() for pair in pairs]) for i in (0, 1))
    gram, other = outer @ outer.T, inner @ inner.T
    values, vectors = torch.linalg.eig(other @ gram)
    lead = vectors[:, values.real.argmax()].real.abs()
    image = gram @ lead
    weights = image / (lead @ image)
    return (float(lead[0]), float(lead[1])), (float(weights[0]), float(weights[1]))


def _kl(pairs: Pairs) -> Weights:
    """Return the weights of the KL-optimal product, by the damped fixed point of Kao et al. (2021).

    G = e G1 + h G2 with e = tr(A1 A^-1) / dim A, h = tr(A2 A^-1) / dim A, and the same for A. Both factors stay in
    the span of the terms, so that one decomposition each turns an iteration into arithmetic on eigenvalues. Where both
    terms are 0, so is the sum. The published stop at a relative squared change of 1e-7 leaves errors of 1e-4.
    """
    beta, alpha = _relative(*(pair[0] for pair in pairs)), _relative(*(pair[1] for pair in pairs))
    (g, h), (a, b) = _additive(pairs)
    point = torch.tensor([g, h, a, b], dtype=torch.float64)
    for _ in range(ROUNDS):
        outer = beta / (point[0] * beta[:, :1] + point[1] * beta[:, 1:])
        inner = alpha / (point[2] * alpha[:, :1] + point[3] * alpha[:, 1:])
        change = STEP * (torch.cat([inner.mean(dim=0), outer.mean(dim=0)]) - point)
        point = point + change
        if change.square().sum() < STOP * point.square().sum():
            break
    g, h, a, b = point.tolist()
    return (g, h), (a, b)


def _relative(first: Tensor, second: Tensor) -> Tensor:
    """Return [R, 2], the eigenvalues b of `first` relative to the sum of both, and 1 - b; R is the rank of the sum."""
    values, vectors = torch.linalg.eigh(first + second)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    half = vectors[:, kept] / values[kept].sqrt()
    share = torch.linalg.eigvalsh(half.T @ first @ half).clamp(0, 1).cpu()
    return torch.stack([share, 1 - share], dim=1)
