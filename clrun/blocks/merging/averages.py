"""Merged weights as averages: plain, weighted, weighted by Fisher information, moment matching, interpolation, EMA.

Symbols: theta_t [P] are the weights of model t, F_t [P] its diagonal Fisher information, w_t its coefficient.
"""

from collections.abc import Collection, Mapping
from typing import Literal

import torch
from torch import Tensor

from clrun.blocks.merging.base import Evidence, Merge, Total
from clrun.system.errors import ConfigError, Fraction, NonNegative, Positive

TINY = 1e-8  # added to the Fisher information by the mode of IMM


class Mean(Merge):
    """theta* = sum_t w_t theta_t / sum_t w_t: the mean, or with coefficients the weighted mean.

    State: one sum of P entries.
    """

    def _begin(self, size: int) -> None:
        self.sum, self.weight = Total(size, exact=self.exact), Total(exact=self.exact)

    def _add(self, model: Tensor, evidence: Evidence, key: int, weight: float) -> None:
        self.sum.plus(weight * model.double())
        self.weight.plus(torch.tensor(weight, dtype=torch.float64))

    def _value(self, newest: Tensor | None) -> Tensor:
        return self.sum.value() / self.weight.value()


class ImmMean(Mean):
    """The mean of the mixture of Gaussian posteriors (mean-IMM, Lee et al., NeurIPS 2017, equations 3 and 4).

    The merged weights are the weighted mean. `variance` adds the second moment of the mixture, Sigma* = sum_t a_t
    (Sigma_t + (theta_t - theta*)^2) with Sigma_t = 1 / (F_t + 1e-8), which prediction does not need.

    Args:
        variance: keep the sums for `variance` (needs the Fisher information of every model).
    """

    def __init__(self, *, variance: bool = False) -> None:
        super().__init__()
        self.with_variance = variance

    def _begin(self, size: int) -> None:
        super()._begin(size)
        if self.with_variance:
            self.own = Total(size, exact=self.exact)  # sum_t w_t Sigma_t
            self.spread = torch.zeros(size, dtype=torch.float64)  # sum_t w_t (theta_t - theta*)^2, updated by Welford

    def _add(self, model: Tensor, evidence: Evidence, key: int, weight: float) -> None:
        if self.with_variance:
            before = self._value(None) if self.models else model.double()
            self.own.plus(weight / (self.fisher(evidence) + TINY))
        super()._add(model, evidence, key, weight)
        if self.with_variance:
            self.spread = self.spread + weight * (model - before) * (model - self._value(None))

    def variance(self) -> Tensor:
        """Return the variances Sigma* [P] of the mixture."""
        variance: Tensor = (self.own.value() + self.spread) / self.weight.value()
        return variance


class Precision(Merge):
    """theta* = sum_t w_t W_t theta_t / sum_t w_t W_t entry by entry, for weights W_t [P] that a subclass defines.

    An entry on which no model has any weight is copied from the newest one. State: two sums of P entries.
    """

    needs = frozenset({"fisher"})

    def _begin(self, size: int) -> None:
        self.weighted, self.total = Total(size, exact=self.exact), Total(size, exact=self.exact)

    def _add(self, model: Tensor, evidence: Evidence, key: int, weight: float) -> None:
        precision = weight * self.precision(evidence)
        self.weighted.plus(precision * model)
        self.total.plus(precision)

    def _value(self, newest: Tensor | None) -> Tensor:
        total, weighted = self.total.value(), self.weighted.value()
        merged = weighted / total
        if bool((total == 0).any()):
            if newest is None:
                raise ValueError("some entries have no Fisher information in any model: pass the newest model")
            merged = torch.where(total == 0, newest.to(merged.dtype), merged)
        return merged

    def precision(self, evidence: Evidence) -> Tensor:
        """Return the weights W_t [P] float64 of a model's entries."""
        raise NotImplementedError


class FisherMean(Precision):
    """Fisher-weighted averaging (Matena and Raffel, NeurIPS 2022, arXiv 2111.09832, section 3; code mmatena).

    The mode of the product of the models' diagonal Gaussian posteriors: W_t = max(F_t, floor) / |F_t|.

    Args:
        floor: smallest Fisher information of an entry. Entries that are unimportant to every model then have their
            mean (or, with favour=first, the value of the first model).
        normalise: divide by the norm |F_t| of the Fisher information over all entries, so that every model counts
            alike; without it the model with the larger gradients dominates.
        favour: "all" applies the floor to every model, "first" to the first one only (the target model of the paper).
    """

    def __init__(self, *, floor: NonNegative, normalise: bool, favour: Literal["all", "first"]) -> None:
        super().__init__()
        self.floor, self.normalise, self.favour = floor, normalise, favour
        self.commutes = favour == "all"

    def precision(self, evidence: Evidence) -> Tensor:
        """Return max(F_t, floor) / |F_t|."""
        fisher = self.fisher(evidence)
        norm = torch.linalg.vector_norm(fisher) if self.normalise else torch.ones((), dtype=torch.float64)
        if self.favour == "all" or not self.models:
            fisher = fisher.clamp(min=self.floor)
        return fisher / torch.where(norm > 0, norm, torch.ones_like(norm))


class ImmMode(Precision):
    """The mode of the mixture of Gaussian posteriors (mode-IMM, Lee et al., NeurIPS 2017, equations 7 and 8).

    W_t = F_t + 1e-8. It equals `FisherMean` without normalisation, up to the 1e-8.
    """

    def precision(self, evidence: Evidence) -> Tensor:
        """Return F_t + 1e-8."""
        return self.fisher(evidence) + TINY


class Interpolate(Merge):
    """theta*_t = (1 - alpha) theta_a + alpha theta_t with the anchor theta_a (WiSE-FT, CoMA, CoFiMA).

    anchor=initial: theta_a = theta_0 (WiSE-FT, Wortsman et al., CVPR 2022, arXiv 2109.01903); each value depends on the
    newest model alone. anchor=previous: theta_a = theta*_(t-1), and theta*_1 = theta_1 (CoMA; with Fisher information
    CoFiMA, Marouf et al., ECCV 2024, arXiv 2312.08977). With Fisher information the coefficients are, entry by entry,
    (1 - alpha) F_a and alpha F_t, where F_a is that of the previous model alone and each F is clipped to [floor, clip].

    State: theta_a, and F_a with Fisher information.

    Args:
        alpha: weight of the newest model, 0 to 1; None for 1 / t (with anchor=previous the mean of the models added).
        anchor: see above.
        fisher: weight by Fisher information; needs anchor=previous.
        floor: smallest Fisher information, above 0: where both models are below it, this is the plain interpolation.
        clip: largest Fisher information; None for no limit.

    Raises:
        ConfigError: Fisher information with anchor=initial, which has none.
    """

    commutes = False

    def __init__(
        self,
        *,
        alpha: Fraction | None,
        anchor: Literal["initial", "previous"],
        fisher: bool,
        floor: Positive,
        clip: Positive | None,
    ) -> None:
        super().__init__()
        if fisher and anchor == "initial":
            raise ConfigError(
                "method.wise_ft.fisher: the initial weights have no Fisher information; set "
                "method.wise_ft.anchor=previous or method.wise_ft.fisher=false"
            )
        self.alpha, self.anchor, self.floor, self.clip = alpha, anchor, floor, clip
        self.needs = frozenset({"fisher"} if fisher else ())
        self.reads_initial = anchor == "initial"
        self.merged, self.information = torch.zeros(0), torch.zeros(0)

    def _add(self, model: Tensor, evidence: Evidence, key: int, weight: float) -> None:
        alpha = 1 / (self.models + 1) if self.alpha is None else self.alpha
        model = model.double()
        now = self.fisher(evidence).clamp(min=self.floor, max=self.clip) if self.needs else model.new_ones(())
        if self.anchor == "initial":
            before, past = self.initial.double(), now
        elif not self.models:
            before, past = model, now
        else:
            before, past = self.merged.double(), self.information.double() if self.needs else now
        # lerp with the share of the newest model is exact at its ends and stays between the two
        share = alpha * now / (alpha * now + (1 - alpha) * past)
        self.merged = torch.lerp(before, model, share.expand_as(model)).to(self.kind)
        if self.needs:
            self.information = now.to(self.kind)

    def _value(self, newest: Tensor | None) -> Tensor:
        return self.merged


class Ema(Merge):
    """phi <- rho phi + (1 - rho) theta after every optimizer step, from phi = theta_0: the exponential moving average.

    State: phi.

    Args:
        horizon: number of steps over which the average extends, as a fraction of the steps of a task's fit: rho =
            1 - 1 / max(1, horizon * steps).

    Attributes:
        rho: the decay; set directly, or by `extend`.
    """

    every_step, commutes = True, False

    def __init__(self, *, horizon: Fraction) -> None:
        super().__init__()
        self.horizon, self.rho = horizon, 0.0
        self.merged = torch.zeros(0)

    def begin(
        self, initial: Mapping[str, Tensor], *, linear: Collection[str] = (), keep: bool = False, exact: bool = True
    ) -> None:
        """Set phi to the weights theta_0; see `Merge.begin`."""
        super().begin(initial, linear=linear, keep=keep, exact=exact)
        self.merged = self.vector(initial).to(self.kind, copy=True)

    def extend(self, steps: int) -> None:
        """Set the decay for a fit of this many steps."""
        self.rho = 1 - 1 / max(1.0, self.horizon * steps)

    def _add(self, model: Tensor, evidence: Evidence, key: int, weight: float) -> None:
        self.merged.lerp_(model.to(self.merged.dtype), 1 - self.rho)

    def _value(self, newest: Tensor | None) -> Tensor:
        return self.merged


__all__ = ["Ema", "FisherMean", "ImmMean", "ImmMode", "Interpolate", "Mean", "Precision"]
