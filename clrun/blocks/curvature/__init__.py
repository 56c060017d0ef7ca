"""Curvature of the loss around the learned weights, and the quadratic penalty that uses it.

All estimates share these conventions. F = 1/N sum_n E_y[g g'] is the mean over N rows x_n, whatever the batch size,
with g the gradient of log p(y | x_n). Rows are a seeded subset of the training rows without augmentation; the method is
in eval mode and computes in float32. The method, its training mode, its `.grad` and the global random state are bitwise
the same afterwards. Published penalty weights often refer to F / B for a batch size B, or omit the factor 1/2.
"""

from clrun.blocks.curvature.estimate import Kind, KroneckerFisher, diagonal_fisher, estimate, require_exact
from clrun.blocks.curvature.forms import Composite, Curvature, Damping, Diagonal, Identity, Sum
from clrun.blocks.curvature.kronecker import KroneckerEigen, KroneckerFactored, KroneckerTable, Terms, isotropic
from clrun.blocks.curvature.layers import Groups, Sharing, Tape, layers_of, named_too_large
from clrun.blocks.curvature.m_fac import BlockInverse, GradientWindow
from clrun.blocks.curvature.penalty import QuadraticPenalty, normalised
from clrun.blocks.curvature.target import Labels

__all__ = [
    "BlockInverse",
    "Composite",
    "Curvature",
    "Damping",
    "Diagonal",
    "GradientWindow",
    "Groups",
    "Identity",
    "Kind",
    "KroneckerEigen",
    "KroneckerFactored",
    "KroneckerFisher",
    "KroneckerTable",
    "Labels",
    "QuadraticPenalty",
    "Sharing",
    "Sum",
    "Tape",
    "Terms",
    "diagonal_fisher",
    "estimate",
    "isotropic",
    "layers_of",
    "named_too_large",
    "normalised",
    "require_exact",
]
