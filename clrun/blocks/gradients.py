"""Changes of a gradient between backward and the optimizer step, on named tensors."""

from collections.abc import Mapping

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
