"""LogME: golden values, the evidence itself, and that features that are 0 change nothing."""

import math

import pytest
import torch
from test_blocks_statistics import gaussians, measured
from torch import Tensor

from clrun.blocks.logme import _precisions, log_evidence, logme
from clrun.blocks.ridge import Spectrum

FEATURES = torch.tensor([[1.0, 0], [1, 1], [0, 2], [2, 1], [0, 1], [3, 0]])
LABELS = torch.tensor([0, 0, 1, 1, 1, 0])


def test_golden_values() -> None:
    stats = measured(FEATURES, LABELS, 2)
    spectrum = Spectrum.of(stats)
    inputs = spectrum.values, spectrum.projected.square(), stats.counts().double()
    alpha, beta, _, _ = _precisions(*inputs, rows=6)
    assert alpha.tolist() == pytest.approx([22.867051, 8.114298], rel=1e-3)
    assert beta.tolist() == pytest.approx([3.224356, 5.506214], rel=1e-3)
    evidence = log_evidence(*inputs, width=2, rows=6) / 6
    assert evidence.tolist() == pytest.approx([-0.98303498, -0.90738148], abs=1e-7)
    assert logme(stats) == pytest.approx(-0.945208231, abs=1e-7)


@pytest.mark.parametrize("zeros", [6, 20])
def test_features_that_are_zero_change_nothing(zeros: int) -> None:
    wider = torch.cat([FEATURES, torch.zeros(6, zeros)], dim=1)
    assert logme(measured(wider, LABELS, 2)) == pytest.approx(-0.945208231, abs=1e-7)


def dense(features: Tensor, y: Tensor, alpha: float, beta: float) -> float:
    """Return ln N(y; 0, I / beta + F F' / alpha)."""
    covariance = torch.eye(len(y), dtype=torch.float64) / beta + features @ features.t() / alpha
    return float(torch.distributions.MultivariateNormal(torch.zeros(len(y)).double(), covariance).log_prob(y))


@pytest.mark.parametrize("rows", [60, 16, 9, 5], ids=["n > D", "n = D", "n < D", "2 n < D"])
def test_score_is_the_evidence_at_its_maximum(rows: int) -> None:
    features, y = gaussians(rows, num_classes=3)
    features = (features - 20).double()
    spectrum = Spectrum.of(measured(features, y, 3))
    for label in y.unique().tolist():
        target = (y == label).double()
        inputs = spectrum.values, spectrum.projected[:, label, None].square(), target.sum()[None]
        alpha, beta, _, _ = (float(t) for t in _precisions(*inputs, rows=rows))
        if math.isclose(beta, 1e12, rel_tol=10) or alpha / beta < 1e-8:
            continue  # the targets are fitted exactly: no maximum
        best = dense(features, target, alpha, beta)
        assert float(log_evidence(*inputs, width=16, rows=rows)) == pytest.approx(best, rel=1e-8, abs=1e-8)
        for a, b in ((1.01, 1), (0.99, 1), (1, 1.01), (1, 0.99)):
            assert dense(features, target, a * alpha, b * beta) <= best + 1e-9


def test_rotations_do_not_matter() -> None:
    features, y = gaussians()
    rotation = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q
    turned = measured(features.double() @ rotation, y, 6)
    assert logme(turned) == pytest.approx(logme(measured(features, y, 6)), rel=1e-9)


def test_better_features_score_higher() -> None:
    features, y = gaussians()
    noise = torch.randn(300, 16, generator=torch.Generator().manual_seed(1))
    scores = [logme(measured(features - 20 + k * noise, y, 6)) for k in (0, 1, 4)]
    assert scores == sorted(scores, reverse=True)
