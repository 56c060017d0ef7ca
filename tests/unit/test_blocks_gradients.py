"""Projections of gradients on half-spaces and cones."""

import pytest
import torch
from scipy.optimize import minimize, nnls
from torch import Tensor

from clrun.blocks.gradients import nonnegative_minimum, project_cone, project_halfspace
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


def cone(seed: int, *, most: int = 8, size: int = 20) -> tuple[Tensor, Tensor]:
    """Return g [P] and references G [k, P], float64; every third G has a row twice, every fifth one a row of zeros."""
    source = torch.Generator().manual_seed(seed)
    count = 1 + int(torch.randint(most, (), generator=source))
    g = torch.randn(size, generator=source, dtype=torch.float64)
    rows = torch.randn(count, size, generator=source, dtype=torch.float64) - 0.3 * g
    if seed % 3 == 0:
        rows[-1] = rows[0]
    if seed % 5 == 0:
        rows[-1] = 0.0
    return g, rows


def projected(g: Tensor, rows: Tensor, *, margin: float = 0.0) -> Tensor:
    """Return the projection, given in two pieces."""
    cut = len(g) // 3
    pieces = [{"a": v[:cut], "b": v[cut:].view(-1, 1)} for v in (g, *rows)]
    found = project_cone(pieces[0], pieces[1:], margin=margin)
    return torch.cat([found["a"], found["b"][:, 0]])


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e5])
def test_cone_projection_satisfies_every_constraint_and_pulls_only_at_the_boundary(scale: float) -> None:
    violated = 0
    for seed in range(100):
        g, rows = cone(seed)
        rows = rows * scale
        new = projected(g, rows)
        lengths = g.norm() * rows.norm(dim=1)
        assert (rows @ new >= -1e-9 * lengths).all()
        v = nonnegative_minimum(rows @ rows.T, rows @ g)
        assert (v >= 0).all()
        torch.testing.assert_close(g + rows.T @ v, new, rtol=0, atol=1e-9)
        assert (v * scale * (rows @ new) <= 1e-9 * lengths).all(), "complementary slackness"
        violated += bool((rows @ g < 0).any())
    assert violated > 80


def test_cone_projection_agrees_with_scipy() -> None:
    for seed in range(300):
        g, rows = cone(seed)
        v, _ = nnls(rows.T.numpy(), -g.numpy())
        torch.testing.assert_close(projected(g, rows), g + rows.T @ torch.from_numpy(v), rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_cone_projection_is_the_nearest_feasible_point(seed: int) -> None:
    g, rows = cone(seed, most=4, size=6)
    found = minimize(
        lambda x: 0.5 * ((x - g.numpy()) ** 2).sum(),
        g.numpy(),
        jac=lambda x: x - g.numpy(),
        constraints={"type": "ineq", "fun": lambda x: rows.numpy() @ x, "jac": lambda x: rows.numpy()},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    torch.testing.assert_close(projected(g, rows), torch.from_numpy(found.x), rtol=0, atol=1e-6)


def test_cone_without_violation_returns_g_bit_for_bit() -> None:
    g, rows = cone(1)
    rows = rows * (rows @ g).sign()[:, None]
    assert torch.equal(projected(g.float(), rows.float(), margin=0.5), g.float())


@pytest.mark.parametrize("seed", range(5))
def test_cone_of_one_reference_is_the_halfspace(seed: int) -> None:
    g, r = pair(seed, sign=-1)
    one, other = project_cone(g, [r]), project_halfspace(g, r)
    for name in g:
        torch.testing.assert_close(one[name], other[name])


def test_margin_is_the_projection_of_a_shifted_gradient() -> None:
    for seed in range(1, 30):
        g, rows = cone(seed)
        if (rows @ g < 0).any():
            shifted = g + 0.5 * rows.sum(dim=0)
            expected = projected(shifted, rows)
            torch.testing.assert_close(projected(g, rows, margin=0.5), expected, rtol=0, atol=1e-8)


def test_short_references_are_not_ignored() -> None:
    # The absolute 1e-3 of the published solver leaves a cosine of -0.7 here.
    g, rows = torch.tensor([-1.0, 1.0]), torch.tensor([[1e-3, 0.0]])
    assert projected(torch.cat([g, g]), torch.cat([rows, 0 * rows], dim=1))[0].abs() < 1e-7
