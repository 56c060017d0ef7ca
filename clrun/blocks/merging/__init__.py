"""Merging networks with a common initial network: one accumulator per rule, and what the rules measure.

A rule is used in three steps, with `Params` a mapping of parameters by name:

    rule = FisherMean(floor=1e-6)
    rule.begin(initial)                          # the weights from which all models started, once
    rule.add(model, evidence, key=task.id)       # for every model, in any order where the rule commutes
    merged = rule.value(newest)                  # after any number of models
"""

from clrun.blocks.merging.averages import Ema, FisherMean, ImmMean, ImmMode, Interpolate, Mean, Precision
from clrun.blocks.merging.base import Evidence, Merge, Total, linear_weights
from clrun.blocks.merging.evidence import estimate_statistics, evidence_of, input_grams
from clrun.blocks.merging.projections import Dop, Opcm
from clrun.blocks.merging.regmean import RegMean, regmean_plus
from clrun.blocks.merging.signed_max import SignedMax
from clrun.blocks.merging.vectors import Dare, MagMax, TaskArithmetic, TaskVectors, Ties
from clrun.blocks.moments import Gram

__all__ = [
    "Dare",
    "Dop",
    "Ema",
    "Evidence",
    "FisherMean",
    "Gram",
    "ImmMean",
    "ImmMode",
    "Interpolate",
    "MagMax",
    "Mean",
    "Merge",
    "Opcm",
    "Precision",
    "RegMean",
    "SignedMax",
    "TaskArithmetic",
    "TaskVectors",
    "Ties",
    "Total",
    "estimate_statistics",
    "evidence_of",
    "input_grams",
    "linear_weights",
    "regmean_plus",
]
