"""LogME: a score of how well frozen features fit labels, without training (You et al., ICML 2021, arXiv 2102.11005).

The score is the log evidence per row of a Bayesian linear model from features [n, D] to one-hot labels, with one target
column per class, at the precisions alpha of the prior and beta of the noise that maximise the evidence.

Deviation: eigenvalues of F'F that are 0 are part of the determinant here. The published fixed-point code leaves them
out, so that its score is too high by (D - rank) / (2 n) ln(alpha) if D exceeds the rank of F.
"""

import math

import torch
from torch import Tensor

from clrun.blocks.ridge import Spectrum
from clrun.blocks.statistics import ClassStats

STEPS = 100  # most steps of the fixed-point iteration, which converges in about ten
SETTLED = 1e-8  # relative change of alpha / beta at which the iteration stops
SMALLEST = 1e-12  # lower bound of residuals and of squared weights


def logme(stats: ClassStats) -> float:
    """Return the score of statistics with pooled moments: the mean log evidence per row over classes with rows."""
    return read_out(stats)[0]


def read_out(stats: ClassStats) -> tuple[float, Tensor]:
    """Return the score, and the posterior mean of the weights [C, D] float64; 0 for classes without rows.

    The weights of a class are V diag(1 / (s + alpha / beta)) V'F'y, with the eigenvalues s and eigenvectors V of F'F.
    """
    spectrum, present = Spectrum.of(stats), stats.counts() > 0
    projected, energy = spectrum.projected[:, present], stats.counts()[present].double()
    values, squared = spectrum.values, projected.square()
    evidence = log_evidence(values, squared, energy, stats.num_features, spectrum.rows)
    alpha, beta, _, _ = _precisions(values, squared, energy, spectrum.rows)
    weights = torch.zeros_like(stats.sums.value())
    weights[present] = (spectrum.vectors @ (projected / (values[:, None] + alpha / beta))).t()
    return float(evidence.mean()) / spectrum.rows, weights


def log_evidence(values: Tensor, squared: Tensor, energy: Tensor, width: int, rows: int) -> Tensor:
    """Return the log evidence [C] of each target column y, at the best alpha and beta of that column.

    Args:
        values: the R eigenvalues [R] of F'F that may differ from 0; V has their eigenvectors as columns.
        squared: squares of V'F'y [R, C].
        energy: y'y [C].
        width: D, the number of all eigenvalues.
        rows: n.
    """
    alpha, beta, weight, residual = _precisions(values, squared, energy, rows)
    determinant = (alpha + beta * values[:, None]).log().sum(dim=0) + (width - len(values)) * alpha.log()
    logs = width * alpha.log() + rows * beta.log() - rows * math.log(2 * math.pi)
    return 0.5 * (logs - determinant - beta * residual - alpha * weight)


def _precisions(values: Tensor, squared: Tensor, energy: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return alpha, beta, the squared norm of the mean weights and the residual sum of squares of each column, all [C].

    alpha and beta are found by MacKay's fixed-point iteration; the other arguments are those of `log_evidence`.
    """
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
