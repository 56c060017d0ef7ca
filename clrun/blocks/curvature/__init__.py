"""Curvature of the loss around the learned weights, and the quadratic penalty that uses it.

Conventions of every estimate: the per-sample mean F = 1/N sum_n E_y[g g^T] with g = grad log p(y | x_n), whatever the
batch size; eval mode, un-augmented rows, fp32, a seeded subset; the model, its modes, `.grad` and the global random
numbers stay bitwise as they were. Published penalty weights often refer to F / B, or omit the 1/2.
"""

from clrun.blocks.curvature.estimate import Kind, KroneckerFisher, diagonal_fisher, estimate, require_exact
from clrun.blocks.curvature.forms import (
    Blocks,
    Composite,
    Curvature,
    Damping,
    Dense,
    Diagonal,
    Identity,
    Operator,
    Sum,
)
from clrun.blocks.curvature.gram import GradientWindow, GramInverse, GramLowRank
from clrun.blocks.curvature.kronecker import KroneckerEigen, KroneckerFactored, Terms, isotropic
from clrun.blocks.curvature.layers import Groups, Sharing, Tape, layers_of
from clrun.blocks.curvature.penalty import QuadraticPenalty, normalised
from clrun.blocks.curvature.target import Labels

__all__ = [
    "Blocks",
    "Composite",
    "Curvature",
    "Damping",
    "Dense",
    "Diagonal",
    "GradientWindow",
    "GramInverse",
    "GramLowRank",
    "Groups",
    "Identity",
    "Kind",
    "KroneckerEigen",
    "KroneckerFactored",
    "KroneckerFisher",
    "Labels",
    "Operator",
    "QuadraticPenalty",
    "Sharing",
    "Sum",
    "Tape",
    "Terms",
    "diagonal_fisher",
    "estimate",
    "isotropic",
    "layers_of",
    "normalised",
    "require_exact",
]
