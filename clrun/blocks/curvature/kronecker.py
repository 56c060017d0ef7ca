"""The curvature of a linear or convolutional layer as a Kronecker product, and sums of such products.

A layer computes y = [W, b] [a; 1] from an input a, with its weight W flattened to a matrix [out, in] and its bias b, if
it is trained, as the last column. The curvature of the row-major matrix [W, b] is approximated by the Kronecker product
G (x) A, which maps a matrix D of the same shape to G D A. G [out, out] comes from the gradients at the outputs and A
[in (+1), in (+1)] from the inputs (K-FAC, Martens and Grosse, ICML 2015, arXiv 1503.05671). A table of embeddings is a
linear layer on one-hot vectors, whose A is diagonal (`KroneckerTable`).
"""

from dataclasses import dataclass
from math import prod, sqrt

import torch
from torch import Tensor

from clrun.blocks.curvature.forms import Composite, Curvature, Damping, Diagonal, Sum
from clrun.blocks.params import Shapes

# The fixed point of the KL-optimal sum: damping of a step, relative squared change at which it stops, most steps.
STEP, STOP, ROUNDS = 0.3, 1e-24, 3000


def as_matrix(vector: Tensor, shapes: Shapes) -> Tensor:
    """Return the matrix [W, b] [out, in (+1)] of a vector that holds a weight [out, ...] and possibly a bias [out]."""
    weight, *bias = shapes.values()
    out, size = weight[0], prod(weight)
    matrix = vector[:size].view(out, -1)
    return torch.cat([matrix, vector[size:, None]], dim=1) if bias else matrix


def as_vector(matrix: Tensor, shapes: Shapes) -> Tensor:
    """Return the vector [P] of a matrix [W, b] [out, in (+1)]: the inverse of `as_matrix`."""
    if len(shapes) == 1:
        return matrix.reshape(-1)
    return torch.cat([matrix[:, :-1].reshape(-1), matrix[:, -1]])


@dataclass(frozen=True, eq=False)
class KroneckerFactored(Curvature):
    """K = G (x) A for one layer.

    Attributes:
        outer: G [out, out], symmetric positive semi-definite.
        inner: A [in (+1), in (+1)], symmetric positive semi-definite.
    """

    outer: Tensor
    inner: Tensor

    def mv(self, vector: Tensor) -> Tensor:
        """Return G D A as a vector [P], where D is the matrix of `vector`."""
        return as_vector(self.outer @ as_matrix(vector, self.shapes) @ self.inner, self.shapes)

    def inverse(self, damping: float, mode: Damping = "exact") -> Curvature:
        """Return (G (x) A + damping I)^-1.

        Args:
            damping: 0 or more.
            mode: "exact" computes it in the eigenbasis of both factors. "factored" returns the Kronecker product of
                the inverses of G + sqrt(damping) / pi I and A + pi sqrt(damping) I with
                pi^2 = (tr A / dim A) / (tr G / dim G), the heuristic of Martens and Grosse (section 6.3).
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
        """Return the outer product of the diagonals of G and A, as a vector [P]."""
        return as_vector(torch.outer(self.outer.diagonal(), self.inner.diagonal()), self.shapes)

    def scale(self, factor: float) -> "KroneckerFactored":
        """Return factor * K: both G and A are multiplied by the square root of the factor."""
        return KroneckerFactored(self.shapes, self.outer * factor**0.5, self.inner * factor**0.5)

    def add(self, other: Curvature, how: Sum = "kl") -> Curvature:
        """Return one Kronecker product that approximates the sum of two, or the list of both.

        Args:
            other: another Kronecker product of the same parameters.
            how: "kl": the product whose Gaussian (with the product as precision) is closest in KL divergence to the
                Gaussian of the exact sum (Kao et al., NeurIPS 2021); exact if the two are proportional or have a factor
                in common. "additive": the sums of the factors, balanced by their traces (Martens and Grosse), which
                overestimates the trace of the sum by a factor of up to 2. "rank1": the product closest in the Frobenius
                norm (Van Loan and Pitsianis, 1993). "list": the exact sum, which stores every product.
        """
        if how == "list":
            return Terms(self.shapes, (self,)).add(other, how)
        assert isinstance(other, KroneckerFactored)
        assert self.shapes == other.shapes
        factors = _sum((self.outer, self.inner), (other.outer, other.inner), how)
        return KroneckerFactored(self.shapes, *factors)

    def decomposed(self) -> "KroneckerEigen":
        """Return the same matrix in the eigenbasis of both factors, computed in float64."""
        (s, u), (t, v) = (torch.linalg.eigh(factor.double()) for factor in (self.outer, self.inner))
        values = torch.outer(s.clamp(min=0), t.clamp(min=0))
        return KroneckerEigen(self.shapes, *(x.to(self.outer.dtype) for x in (u, v, values)))


@dataclass(frozen=True, eq=False)
class KroneckerEigen(Curvature):
    """K = (U (x) V) diag(values) (U (x) V)' for one layer: a Kronecker product in its eigenbasis.

    Attributes:
        outer: U [out, out], orthogonal.
        inner: V [in (+1), in (+1)], orthogonal.
        values: [out, in (+1)].
    """

    outer: Tensor
    inner: Tensor
    values: Tensor

    def mv(self, vector: Tensor) -> Tensor:
        """Return U (values * (U' D V)) V' as a vector [P], where D is the matrix of `vector`."""
        rotated = self.outer.T @ as_matrix(vector, self.shapes) @ self.inner
        return as_vector(self.outer @ (self.values * rotated) @ self.inner.T, self.shapes)

    def inverse(self, damping: float, mode: Damping = "exact") -> "KroneckerEigen":
        """Return the matrix with the same eigenbasis and the eigenvalues 1 / (values + damping)."""
        return KroneckerEigen(self.shapes, self.outer, self.inner, 1 / (self.values + damping))

    def diag(self) -> Tensor:
        """Return the diagonal of K [P]."""
        return as_vector(self.outer.square() @ self.values @ self.inner.square().T, self.shapes)

    def scale(self, factor: float) -> "KroneckerEigen":
        """Return the matrix with the same eigenbasis and the eigenvalues factor * values."""
        return KroneckerEigen(self.shapes, self.outer, self.inner, factor * self.values)

    def add(self, other: Curvature, how: Sum = "kl") -> Curvature:
        """Return the list of both terms, because two different eigenbases have no common one."""
        return Terms(self.shapes, (self,)).add(other, how)


@dataclass(frozen=True, eq=False)
class KroneckerTable(Curvature):
    """K = G (x) A for a table of embeddings W [V, D], the transpose of a linear layer on one-hot vectors.

    The second moment A of one-hot vectors is diagonal: the frequencies of the entries. K maps a change D of the table
    to diag(A) D G. An entry that does not occur has no curvature.

    Attributes:
        outer: G [D, D], symmetric positive semi-definite.
        inner: the diagonal of A [V].
    """

    outer: Tensor
    inner: Tensor

    def mv(self, vector: Tensor) -> Tensor:
        """Return diag(A) D G as a vector [P], where D [V, D] is the matrix of `vector`."""
        return (self.inner[:, None] * (vector.view(len(self.inner), -1) @ self.outer)).flatten()

    def inverse(self, damping: float, mode: Damping = "exact") -> Curvature:
        """Return (G (x) A + damping I)^-1; see `KroneckerFactored.inverse`."""
        if mode == "exact":
            return self.decomposed().inverse(damping)
        outer, inner = self.outer.double(), self.inner.double()
        ratio = inner.mean() / (outer.trace() / len(outer))
        pi = ratio.sqrt() if 0 < ratio < torch.inf else torch.ones_like(ratio)
        root = _inverse(outer + sqrt(damping) / pi * torch.eye(len(outer)).to(outer))
        return KroneckerTable(self.shapes, *(x.to(self.outer.dtype) for x in (root, 1 / (inner + sqrt(damping) * pi))))

    def diag(self) -> Tensor:
        """Return the outer product of A and the diagonal of G, as a vector [P]."""
        return torch.outer(self.inner, self.outer.diagonal()).flatten()

    def scale(self, factor: float) -> "KroneckerTable":
        """Return factor * K: both G and A are multiplied by the square root of the factor."""
        return KroneckerTable(self.shapes, self.outer * factor**0.5, self.inner * factor**0.5)

    def add(self, other: Curvature, how: Sum = "kl") -> Curvature:
        """Return one product that approximates the sum of two, or the list of both; see `KroneckerFactored.add`."""
        if how == "list":
            return Terms(self.shapes, (self,)).add(other, how)
        assert isinstance(other, KroneckerTable)
        assert self.shapes == other.shapes
        factors = _sum((self.outer, self.inner), (other.outer, other.inner), how)
        return KroneckerTable(self.shapes, *factors)

    def decomposed(self) -> "KroneckerTableEigen":
        """Return the same matrix in the eigenbasis of G, computed in float64."""
        values, basis = torch.linalg.eigh(self.outer.double())
        values = torch.outer(self.inner.double(), values.clamp(min=0))
        return KroneckerTableEigen(self.shapes, *(x.to(self.outer.dtype) for x in (basis, values)))


@dataclass(frozen=True, eq=False)
class KroneckerTableEigen(Curvature):
    """K = (U (x) I) diag(values) (U (x) I)' for a table of embeddings [V, D].

    Attributes:
        outer: U [D, D], orthogonal.
        values: [V, D].
    """

    outer: Tensor
    values: Tensor

    def mv(self, vector: Tensor) -> Tensor:
        """Return (values * (D U)) U' as a vector [P], where D is the matrix of `vector`."""
        return ((self.values * (vector.view_as(self.values) @ self.outer)) @ self.outer.T).flatten()

    def inverse(self, damping: float, mode: Damping = "exact") -> "KroneckerTableEigen":
        """Return the matrix with the same eigenbasis and the eigenvalues 1 / (values + damping)."""
        return KroneckerTableEigen(self.shapes, self.outer, 1 / (self.values + damping))

    def diag(self) -> Tensor:
        """Return the diagonal of K [P]."""
        return (self.values @ self.outer.square().T).flatten()

    def scale(self, factor: float) -> "KroneckerTableEigen":
        """Return the matrix with the same eigenbasis and the eigenvalues factor * values."""
        return KroneckerTableEigen(self.shapes, self.outer, factor * self.values)

    def add(self, other: Curvature, how: Sum = "kl") -> Curvature:
        """Return the list of both terms, because two different eigenbases have no common one."""
        return Terms(self.shapes, (self,)).add(other, how)


@dataclass(frozen=True, eq=False)
class Terms(Curvature):
    """K as a sum of curvatures of the same parameters, each stored separately.

    Attributes:
        terms: at least one curvature.
    """

    terms: tuple[Curvature, ...]

    def mv(self, vector: Tensor) -> Tensor:
        """Return the sum of the products of all terms [P]."""
        return torch.stack([term.mv(vector) for term in self.terms]).sum(dim=0)

    def inverse(self, damping: float, mode: Damping = "exact") -> Curvature:
        """Return (K + damping I)^-1 for a sum of a single term.

        Raises:
            ValueError: the sum has several terms.
        """
        if len(self.terms) > 1:
            raise ValueError("a sum stored term by term cannot be inverted; add the terms with kl, additive or rank1")
        return self.terms[0].inverse(damping, mode)

    def diag(self) -> Tensor:
        """Return the sum of the diagonals of all terms [P]."""
        return torch.stack([term.diag() for term in self.terms]).sum(dim=0)

    def scale(self, factor: float) -> "Terms":
        """Return the sum of the scaled terms."""
        return Terms(self.shapes, tuple(term.scale(factor) for term in self.terms))

    def add(self, other: Curvature, how: Sum = "list") -> "Terms":
        """Return the sum with the term `other` (or the terms of `other`) appended."""
        new = other.terms if isinstance(other, Terms) else (other,)
        return Terms(self.shapes, self.terms + new)


def isotropic(like: Curvature, value: float) -> Curvature:
    """Return value * I in the form of `like`: a diagonal, a product of two multiples of I, or a composite of these."""
    if isinstance(like, Composite):
        return Composite.of([isotropic(part, value) for part in like.parts])
    if isinstance(like, Diagonal):
        return Diagonal(like.shapes, torch.full_like(like.values, value))
    if isinstance(like, KroneckerTable):
        outer, inner = torch.eye(len(like.outer)).to(like.outer), torch.ones_like(like.inner)
        return KroneckerTable(like.shapes, outer * sqrt(value), inner * sqrt(value))
    assert isinstance(like, KroneckerFactored)
    factors = (torch.eye(len(factor)).to(factor) * sqrt(value) for factor in (like.outer, like.inner))
    return KroneckerFactored(like.shapes, *factors)


def _inverse(factor: Tensor) -> Tensor:
    """Return the inverse of a symmetric matrix, float64.

    Rounding to single precision may have made eigenvalues negative: they are replaced by the epsilon of float32 times
    the largest eigenvalue.
    """
    root, problem = torch.linalg.cholesky_ex(factor)
    if not problem:
        return torch.cholesky_inverse(root)
    values, vectors = torch.linalg.eigh(factor)
    inverse: Tensor = (vectors / values.clamp(min=values[-1] * torch.finfo(torch.float32).eps)) @ vectors.T
    return inverse


Pair = tuple[Tensor, Tensor]  # G and A; A may be a vector, which stands for the diagonal matrix
Pairs = list[Pair]  # the factors of the two terms of a sum
Weights = tuple[tuple[float, float], tuple[float, float]]  # (of G1, of G2), (of A1, of A2)


def _sum(first: Pair, second: Pair, how: Sum) -> Pair:
    """Return the factors of one product that approximates the sum of two, see `KroneckerFactored.add`."""
    pairs = [(outer.double(), inner.double()) for outer, inner in (first, second)]
    traces = [(_trace(outer) * _trace(inner)).item() for outer, inner in pairs]
    if not all(traces):
        return first if traces[0] else second
    pairs = [_balanced(*pair) for pair in pairs]
    (g, h), (a, b) = {"kl": _kl, "additive": _additive, "rank1": _rank1}[how](pairs)
    outer, inner = g * pairs[0][0] + h * pairs[1][0], a * pairs[0][1] + b * pairs[1][1]
    outer, inner = _balanced(outer, inner)
    return outer.to(first[0].dtype), inner.to(first[1].dtype)


def _trace(factor: Tensor) -> Tensor:
    """Return the trace of a factor, a matrix or the diagonal of one."""
    return factor.sum() if factor.dim() == 1 else factor.trace()


def _balanced(outer: Tensor, inner: Tensor) -> Pair:
    """Return factors with the same Kronecker product and with equal mean eigenvalues."""
    scale = ((_trace(inner) / len(inner)) / (_trace(outer) / len(outer))).sqrt()
    return outer * scale, inner / scale


def _additive(pairs: Pairs) -> Weights:
    """Return the weights of the sum of factors that is balanced by the traces."""
    (g, a), (h, b) = pairs
    pi = float((_trace(g) * _trace(b) / (_trace(h) * _trace(a))).sqrt())
    return (1.0, pi), (1.0, 1 / pi)


def _rank1(pairs: Pairs) -> Weights:
    """Return the weights of the leading pair of singular vectors of vec(G1) vec(A1)' + vec(G2) vec(A2)'.

    The pair lies in the span of the terms, where it is the leading eigenvector of a non-negative 2x2 matrix. Its
    weights are therefore non-negative, and both factors stay positive semi-definite.
    """
    outer, inner = (torch.stack([pair[i].flatten() for pair in pairs]) for i in (0, 1))
    gram, other = outer @ outer.T, inner @ inner.T
    values, vectors = torch.linalg.eig(other @ gram)
    lead = vectors[:, values.real.argmax()].real.abs()
    image = gram @ lead
    weights = image / (lead @ image)
    return (float(lead[0]), float(lead[1])), (float(weights[0]), float(weights[1]))


def _kl(pairs: Pairs) -> Weights:
    """Return the weights of the KL-optimal product, by the damped fixed-point iteration of Kao et al. (2021).

    The fixed point is G = e G1 + h G2 with e = tr(A1 A^-1) / dim A and h = tr(A2 A^-1) / dim A, and correspondingly for
    A with the roles of G and A exchanged. Both factors stay in the span of the terms: after one decomposition per
    factor, an iteration is arithmetic on eigenvalues. In directions in which both terms are 0 the sum is 0.

    Deviation from the published code: it stops at a relative squared change of 1e-7, which leaves errors of 1e-4.
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
    """Return the eigenvalues b of `first` relative to `first` + `second`, and 1 - b: [R, 2] for a sum of rank R."""
    if first.dim() == 1:
        total = first + second
        relative = (first / total)[total > 0].cpu()
        return torch.stack([relative, 1 - relative], dim=1)
    values, vectors = torch.linalg.eigh(first + second)
    positive = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    whitening = vectors[:, positive] / values[positive].sqrt()
    relative = torch.linalg.eigvalsh(whitening.T @ first @ whitening).clamp(0, 1).cpu()
    return torch.stack([relative, 1 - relative], dim=1)
