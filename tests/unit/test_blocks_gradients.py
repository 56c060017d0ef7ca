"""Half-space projection of gradients."""

import pytest
import torch

from clrun.blocks.gradients import project_halfspace
from clrun.blocks.params import dot


def pair(seed: int, *, sign: float, scale: float = 1.0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return g and r with <g, r> of the given sign; r has about the length `scale`."""
    source = torch.Generator().manual_seed(seed)
    g, r = ({"a": torch.randn(4, 3, generator=source), "b": torch.randn(5, generator=source)} for _ in range(2))
    if dot(g, r) * sign < 0:
        r = {name: -t for name, t in r.items()}
    return g, {name: t * scale for name, t in r.items()}


@pytest.mark.parametrize("seed", range(5))
def test_no_violation_returns_g_bit_for_bit(seed: int) -> None:
    g, r = pair(seed, sign=1)
    assert all(torch.equal(new, g[name]) for name, new in project_halfspace(g, r).items())


@pytest.mark.parametrize("scale", [1.0, 1e-7, 1e7])
@pytest.mark.parametrize("seed", range(5))
def test_violation_is_projected_onto_the_boundary(seed: int, scale: float) -> None:
    g, r = pair(seed, sign=-1, scale=scale)
    new = project_halfspace(g, r)
    length = (dot(g, g) * dot(r, r)).sqrt()
    assert abs(dot(new, r)) < 1e-6 * length
    # The move is along r, hence the boundary point is the closest feasible one.
    move = {name: new[name] - g[name] for name in g}
    cosine = dot(move, r) / (dot(move, move) * dot(r, r)).sqrt()
    assert cosine.item() == pytest.approx(1.0, abs=1e-6)


def test_scale_of_the_reference_does_not_matter() -> None:
    g, r = pair(0, sign=-1)
    a, b = project_halfspace(g, r), project_halfspace(g, {name: t * 2**-30 for name, t in r.items()})
    assert all(torch.equal(a[name], b[name]) for name in g)


def test_zero_reference_constrains_nothing() -> None:
    g, r = pair(0, sign=-1)
    new = project_halfspace(g, {name: torch.zeros_like(t) for name, t in r.items()})
    assert all(torch.equal(new[name], g[name]) for name in g)
