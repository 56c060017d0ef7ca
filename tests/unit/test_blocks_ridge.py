"""Ridge regression from sums: golden values, and agreement of its forms."""

import pytest
import torch
from test_blocks_statistics import TOY, gaussians, measured
from torch import Tensor

from clrun.blocks.ridge import (
    RandomProjection,
    Spectrum,
    best_by_gcv,
    best_held_out,
    held_out_error,
    ridge,
)
from clrun.blocks.statistics import together

STRENGTHS = [10.0**k for k in range(-4, 5)]


def lifted(rows: int, width: int) -> tuple[Tensor, Tensor]:
    features, y = gaussians(rows)
    return RandomProjection(16, width, seed=1)(features - 20).double(), y


def targets(y: Tensor, num_classes: int = 6) -> Tensor:
    return torch.nn.functional.one_hot(y, num_classes).double()


def test_golden_ridge_and_cross_validation() -> None:
    stats = measured(*TOY, 2)
    expected = torch.tensor([[0.275, 0.125], [0.025, 0.375]], dtype=torch.float64)
    spectrum = Spectrum.of(stats)
    for weights in (ridge(1.0, stats), spectrum.weights(1.0)):
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-12)
    assert spectrum.residual(1.0) == pytest.approx(1.8175, abs=1e-12)
    assert spectrum.freedom(1.0) == pytest.approx(1.65, abs=1e-12)
    assert spectrum.gcv(1.0) == pytest.approx(1.3164327750113174, abs=1e-12)


def test_golden_held_out_error() -> None:
    features, y = TOY
    fitted, apart = measured(features[:3], y[:3], 2), measured(features[3:], y[3:], 2)
    weights = ridge(1.0, fitted)
    expected = torch.tensor([[11, -2], [1, 6]], dtype=torch.float64) / 17
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-12)
    assert held_out_error(weights, apart.gram(), apart.sums.value(), apart.total()) == pytest.approx(
        1.3044982698961936, abs=1e-12
    )


@pytest.mark.parametrize(("rows", "width"), [(300, 40), (60, 100), (30, 100)], ids=["primal", "wide", "very wide"])
def test_forms_agree(rows: int, width: int) -> None:
    h, y = lifted(rows, width)
    stats = measured(h, y, 6)
    primal, dual = Spectrum.of(stats), Spectrum.dual(h, targets(y))
    assert len(primal.values) == (rows if 2 * rows < width else width)
    for strength in (0.1, 10.0, 1000.0):
        identity = torch.eye(rows, dtype=torch.float64)
        expected = h.t() @ torch.linalg.solve(h @ h.t() + strength * identity, targets(y))
        for weights in (ridge(strength, stats), primal.weights(strength), dual.weights(strength)):
            torch.testing.assert_close(weights, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))
        hat = h @ torch.linalg.solve(stats.gram() + strength * torch.eye(width, dtype=torch.float64), h.t())
        error = float((targets(y) - hat @ targets(y)).square().sum())
        for spectrum in (primal, dual):
            assert spectrum.residual(strength) == pytest.approx(error, rel=1e-8)
            assert spectrum.freedom(strength) == pytest.approx(float(hat.trace()), rel=1e-8)
            brute = error / rows / (1 - float(hat.trace()) / rows) ** 2
            assert spectrum.gcv(strength) == pytest.approx(brute, rel=1e-8)


def test_held_out_error_needs_sums_only() -> None:
    h, y = lifted(300, 40)
    fitted, apart = measured(h[:200], y[:200], 6), measured(h[200:], y[200:], 6)
    for strength in STRENGTHS:
        weights = ridge(strength, fitted)
        direct = float((h[200:] @ weights - targets(y[200:])).square().mean())
        assert held_out_error(weights, apart.gram(), apart.sums.value(), apart.total()) == pytest.approx(
            direct, rel=1e-9
        )
    errors = {s: float((h[200:] @ ridge(s, fitted) - targets(y[200:])).square().mean()) for s in STRENGTHS}
    assert best_held_out(fitted, apart, STRENGTHS) == min(errors, key=errors.__getitem__)


def test_increments_equal_the_joint_solution_in_every_order() -> None:
    h, y = lifted(300, 40)
    joint = ridge(1.0, measured(h, y, 6))
    parts = [measured(h[k : k + 100], y[k : k + 100], 6) for k in (0, 100, 200)]
    first, second = (together(*(parts[k] for k in order)) for order in ((0, 1, 2), (2, 0, 1)))
    torch.testing.assert_close(ridge(1.0, first), joint, rtol=1e-9, atol=1e-9 * float(joint.abs().max()))
    assert torch.equal(ridge(1.0, first), ridge(1.0, second))
    assert best_by_gcv(first, STRENGTHS)[0] == best_by_gcv(second, STRENGTHS)[0]
    torch.testing.assert_close(1e12 * ridge(1e12, first), first.sums.value().t(), rtol=1e-5, atol=1e-3)


def test_projection_depends_on_its_seed_alone() -> None:
    torch.manual_seed(5)
    first = RandomProjection(4, 7, seed=0)
    torch.rand(3)
    assert torch.equal(first.weight, RandomProjection(4, 7, seed=0).weight)
    assert not torch.equal(first.weight, RandomProjection(4, 7, seed=1).weight)
    x = torch.randn(5, 4)
    assert torch.equal(first(x), (x @ first.weight).clamp(min=0))
    assert RandomProjection(4, 0, seed=0)(x) is x
