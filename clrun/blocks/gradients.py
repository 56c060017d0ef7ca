"""Projections of a gradient between the backward pass and the optimizer step, on named tensors."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from clrun.blocks.params import Params, dot


def project_halfspace(gradient: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> Params:
    """Return the vector closest to a gradient g that has a non-negative inner product with a reference r.

    This is g - min(<g, r>, 0) / |r|^2 r (A-GEM, Chaudhry et al., ICLR 2019, equation 11). If <g, r> >= 0 the result is
    bitwise g. The values are never read on the CPU, so that a GPU is not waited for.

    Deviation: the published code adds 1e-12 to |r|^2, which leaves the constraint violated when |r| is about 1e-6. Here
    nothing is added, and r = 0 is no constraint.

    Args:
        gradient: g by parameter name.
        reference: r, with the same names and shapes.
    """
    excess = dot(gradient, reference).clamp(max=0)
    square = dot(reference, reference)
    scale = torch.where(square > 0, excess / square, torch.zeros_like(square))
    return {name: g - scale.to(g.dtype) * reference[name] for name, g in gradient.items()}


def project_cone(
    gradient: Mapping[str, Tensor], references: Sequence[Mapping[str, Tensor]], *, margin: float = 0.0
) -> Params:
    """Return the vector closest to a gradient g that has non-negative inner products with all references.

    This is g + G' v with v = argmin_(v >= 0) 1/2 |g + G' v|^2, where the rows of G [k, P] are the references (GEM,
    Lopez-Paz and Ranzato, NeurIPS 2017, equations 8 to 11). The k numbers of v are found in float64. If no inner
    product is negative the result is bitwise g.

    Deviation: the published code adds 1e-3 to the diagonal of G G', so that references of about that length lose their
    effect. Here 1e-12 of the mean of the diagonal is added.

    Args:
        gradient: g by parameter name.
        references: k mappings with the same names and shapes.
        margin: gamma; every entry of v is at least gamma, as in the published code. This projects g + gamma G' 1
            instead of g.
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
    """Return the vector v [k] that minimises 1/2 v' K v + c' v over v >= 0.

    With the Cholesky factor L of K this is the least-squares problem |L' v + L^-1 c|^2 over v >= 0, which
    `scipy.optimize.nnls` solves.

    Args:
        gram: K [k, k], symmetric positive semi-definite, float64 on the CPU; 1e-12 of its mean diagonal is added to its
            diagonal.
        inner: c [k], float64 on the CPU.
    """
    from scipy.optimize import nnls

    added = (1e-12 * gram.diagonal().mean()).clamp(min=torch.finfo(gram.dtype).tiny)  # also if all references are 0
    factor = torch.linalg.cholesky(gram + added * torch.eye(len(gram), dtype=gram.dtype))
    target = torch.linalg.solve_triangular(factor, -inner[:, None], upper=False)[:, 0]
    return torch.from_numpy(nnls(factor.T.numpy(), target.numpy())[0])


__all__ = ["nonnegative_minimum", "project_cone", "project_halfspace"]
