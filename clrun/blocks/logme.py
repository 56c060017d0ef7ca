"""LogME: how well frozen features suit labels, before any learner is tried (You et al., ICML 2021, arXiv 2102.11005).

The score is the log evidence per row of a Bayesian linear model on the features, one target column a class, at the
best precisions of prior and noise. Eigenvalues that are 0 take part in the determinant; the published fixed-point code
leaves them out, and its score is too high by (D - rank) / (2 n) ln(alpha) wherever D exceeds the rank.
"""

import math

import torch
from torch import Tensor

from clrun.blocks.ridge import Spectrum
from clrun.blocks.statistics import ClassStats

STEPS = 100  # of the fixed point; it settles in about ten
SETTLED = 1e-8  # relative change of alpha / beta
SMALLEST = 1e-12  # of residuals and of squared weights


def logme(stats: ClassStats) -> float:
    """Return the score of pooled statistics: the mean over the classes present of the log evidence per row."""
    spectrum, present = Spectrum.of(stats), stats.counts() > 0
    squared, energy = spectrum.projected[:, present].square(), stats.counts()[present].double()
    evidence = log_evidence(spectrum.values, squared, energy, stats.num_features, spectrum.rows)
    return float(evidence.mean()) / spectrum.rows


def log_evidence(values: Tensor, squared: Tensor, energy: Tensor, width: int, rows: int) -> Tensor:
    """Return [C], the log evidence of each target column at its own best alpha (prior) and beta (noise precision).

    Args:
        values: [R] eigenvalues of F'F that need not be 0.
        squared: [R, C], squares of V'F'y.
        energy: [C], y'y.
        width: D, of all eigenvalues.
        rows: n.
    """
    alpha, beta, weight, residual = _precisions(values, squared, energy, rows)
    determinant = (alpha + beta * values[:, None]).log().sum(dim=0) + (width - len(values)) * alpha.log()
    logs = width * alpha.log() + rows * beta.log() - rows * math.log(2 * math.pi)
    return 0.5 * (logs - determinant - beta * residual - alpha * weight)


def _precisions(values: Tensor, squared: Tensor, energy: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return alpha, beta, |m|^2 and the residual sum of squares of each column, all [C], by MacKay's fixed point."""
    ratio = torch.ones_like(energy)
    for _ in range(STEPS):
        shifted = values[:, None] + ratio  # [R, C]
        gamma = (values[:, None] / shifted).sum(dim=0)
        weight = (squared / shifted.square()).sum(dim=0).clamp(min=SMALLEST)
        residual = energy - (squared * (shifted + ratio) / shifted.square()).sum(dim=0)
        alpha, beta = gamma / weight, (rows - gamma) / residual.clamp_(min=SMALLEST)
        before, ratio = ratio, alpha / beta
        if ((ratio - before).abs() <= SETTLED * before).all():
            break
    return alpha, beta, weight, residual
