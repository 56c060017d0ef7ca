"""Changes of a gradient between backward and the optimizer step, on named tensors."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from clrun.blocks.params import Params, dot


def project_halfspace(gradient: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> Params:
    """Return the vector closest to g = `gradient` that has no negative inner product with r = `reference`.

    g - min(<g, r>, 0) / |r|^2 r (A-GEM, Chaudhry et al., ICLR 2019, equation 11). When <g, r> >= 0 the result is g,
    bit for bit. The published code adds 1e-12 to |r|^2, which leaves the constraint violated when |r| is about 1e-6;
    here nothing is added, and r = 0 constrains nothing. There is no look at the numbers, hence no wait for the device.

    Args:
        gradient: g.
        reference: r, of the same names and shapes.
    """
    excess = dot(gradient, reference).clamp(max=0)
    square = dot(reference, reference)
    scale = torch.where(square > 0, excess / square, torch.zeros_like(square))
    return {name: g - scale.to(g.dtype) * reference[name] for name, g in gradient.items()}


def project_cone(
    gradient: Mapping[str, Tensor], references: Sequence[Mapping[str, Tensor]], *, margin: float = 0.0
) -> Params:
    """Return the vector closest to g = `gradient` that has no negative inner product with any of the `references`.

    g + G' v with v = argmin_(v >= 0) 1/2 |g + G' v|^2, rows of G [k, P] the references (GEM, Lopez-Paz and Ranzato,
    NeurIPS 2017, equations 8 to 11), solved in float64 in the k dimensions of v. When nothing is violated the result
    is g, bit for bit. The published code adds 1e-3 to G G', which makes references of about that length void; what is
    added here is relative, 1e-12 of the mean of the diagonal.

    Args:
        gradient: g.
        references: k mappings of the same names and shapes.
        margin: gamma; every v is at least gamma (published code), which projects g + gamma G' 1 instead of g.
    """
    names = list(gradient)
    rows = [torch.stack([reference[name].flatten() for reference in references]) for name in names]
    gram = sum(r.double() @ r.double().T for r in rows)
    inner = sum(r.double() @ gradient[name].double().flatten() for name, r in zip(names, rows, strict=True))
    assert isinstance(gram, Tensor) and isinstance(inner, Tensor)
    if not bool((inner < 0).any()):
        return dict(gradient)
    weights = nonnegative_minimum(gram.cpu(), (inner + margin * gram.sum(dim=1)).cpu()) + margin
    moves = [weights.to(r.device) @ r.double() for r in rows]
    return {
        name: (gradient[name].double() + move.view_as(gradient[name])).to(gradient[name].dtype)
        for name, move in zip(names, moves, strict=True)
    }


def nonnegative_minimum(gram: Tensor, inner: Tensor) -> Tensor:
    """Return argmin_(v >= 0) 1/2 v' K v + c' v, [k], by the active-set method of Lawson and Hanson (1974, chapter 23).

    Args:
        gram: K [k, k], symmetric positive semi-definite, float64; 1e-12 of its mean diagonal is added to the diagonal.
        inner: c [k], float64.
    """
    size = len(inner)
    matrix = gram + 1e-12 * gram.diagonal().mean() * torch.eye(size, dtype=gram.dtype)
    tolerance = 1e-12 * float(inner.abs().max())
    v, active = torch.zeros_like(inner), torch.zeros(size, dtype=torch.bool)
    for _ in range(10 * size):  # each round lowers the objective; the bound stops what rounding would let circle
        slope = -(matrix @ v + inner)
        open_ = ~active & (gram.diagonal() > 0)
        if not bool((slope[open_] > tolerance).any()):
            break
        active[slope.masked_fill(~open_, float("-inf")).argmax()] = True
        v = _feasible(matrix, inner, v, active)
    return v


def _feasible(matrix: Tensor, inner: Tensor, v: Tensor, active: Tensor) -> Tensor:
    """Return the minimum over the `active` entries ([k] bool, changed in place) that is non-negative, from v."""
    while bool(active.any()):
        target = torch.zeros_like(v)
        target[active] = torch.linalg.solve(matrix[active][:, active], -inner[active])
        blocking = active & (target <= 0)
        if not bool(blocking.any()):
            return target
        step = (v[blocking] / (v[blocking] - target[blocking])).min()
        v = v + step * (target - v)
        active &= v > 1e-15 * v.max()
        v = v * active
    return v
