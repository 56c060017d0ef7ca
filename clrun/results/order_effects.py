"""How much orders and seeds contribute to final accuracies, and which claims a number of orders supports.

`finals` is [R, S, T] as in `clrun.results.robustness`: R orders, S seeds, T task ids, NaN where a run is absent.
Accuracies are fractions, and variances are squares of fractions. None means that the runs do not determine the value.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from clrun.results import robustness
from clrun.results.metrics import Floats

RESAMPLES = 2000
BOOTSTRAP_FROM = 6  # with fewer orders a percentile interval is misleading
REPORT, CLAIM = 10, 20  # number of orders for a report and for a claim of robustness


@cache
def d2(n: int) -> float:
    """Return the expected range of n >= 2 normal values over their sigma: the integral of 1 - Phi^n - (1 - Phi)^n.

    This is the constant d2 of control charts.
    """
    from scipy.special import ndtr

    x = np.linspace(-9.0, 9.0, 18001)
    below = ndtr(x)
    return float(np.trapezoid(1 - below**n - (1 - below) ** n, x))


def normalised_aopd(finals: Floats) -> float | None:
    """Return AOPD / d2(R), which can be compared between different R.

    It estimates the standard deviation of a task's accuracy over orders if that accuracy is normally distributed.
    """
    value = robustness.aopd(finals)
    return None if value is None else value / d2(len(_counted(finals)))


def task_sd(finals: Floats) -> float | None:
    """Return the mean over tasks of sd_r(P_t^r) (ddof 1), which does not grow with R; None for R < 2."""
    means = robustness.seed_means(_counted(finals))
    if len(means) < 2:
        return None
    return float(np.sqrt((_centred(means) ** 2).sum(axis=0) / (len(means) - 1)).mean())


def sd_interval(spread: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a standard deviation that was estimated from n >= 2 normal values (chi-square)."""
    from scipy import stats

    low, high = (spread * math.sqrt((n - 1) / float(stats.chi2.isf(tail, n - 1))) for tail in (0.025, 0.975))
    return low, high


@dataclass(frozen=True)
class Components:
    """Variance components of the model X_rs = mu + o_r + e_rs of order r and seed s.

    Attributes:
        order: variance of o_r, between orders; a negative estimate is set to 0.
        seed: variance of e_rs, between the seeds of one order.
    """

    order: float
    seed: float

    @property
    def order_share(self) -> float | None:
        """The intraclass correlation order / (order + seed).

        It is 0 when seeds explain all differences, and None when all values are equal.
        """
        total = self.order + self.seed
        return self.order / total if total > 0 else None


def components(values: Floats) -> Components | None:
    """Estimate the variance components of values [R, S] by one-way analysis of variance; NaN is an absent run.

    With n_r seeds of order r and N runs, the order variance is divided by n0 = (N - sum_r n_r^2 / N) / (R - 1), which
    is S when all orders have S seeds. The result is None unless there are two orders and one of them has two seeds.
    """
    present = ~np.isnan(values)
    values, counts = values[present.any(axis=1)], present.sum(axis=1)[present.any(axis=1)]
    orders, runs = len(counts), int(counts.sum())
    if orders < 2 or runs == orders:
        return None
    if np.nanmin(values) == np.nanmax(values):
        return Components(0.0, 0.0)  # rounding of the means would leave a tiny variance and an arbitrary share
    means = np.nanmean(values, axis=1)
    within = float(np.nansum((values - means[:, None]) ** 2)) / (runs - orders)
    grand = float(np.nansum(values)) / runs
    between = float((counts * (means - grand) ** 2).sum()) / (orders - 1)
    per_order = (runs - float((counts**2).sum()) / runs) / (orders - 1)
    return Components(max(0.0, (between - within) / per_order), within)


def accuracy_components(finals: Floats) -> Components | None:
    """Return the variance components of the final average accuracy."""
    return components(_run_means(finals))


def task_components(finals: Floats) -> Components | None:
    """Return the variance components of a task's final accuracy, averaged over tasks.

    They show order effects on single tasks that cancel in the average accuracy.
    """
    each = [components(np.where(_complete(finals), finals[:, :, t], np.nan)) for t in range(finals.shape[2])]
    known = [one for one in each if one is not None]
    if not known:
        return None
    return Components(statistics.fmean(c.order for c in known), statistics.fmean(c.seed for c in known))


@dataclass(frozen=True)
class Floor:
    """AOPD0: the AOPD expected if the order had no effect and only seeds differed.

    Attributes:
        aopd: AOPD0 for as many groups as there are orders.
        measured: True where AOPD0 was measured over R groups of seeds of one fixed order; False where it was estimated
            as d2(R) times the standard deviation between seeds.
        effect: sqrt(max(0, (AOPD / d2)^2 - (AOPD0 / d2)^2)), the part of a task's standard deviation that is due to the
            order.
    """

    aopd: float
    measured: bool
    effect: float


def floor(finals: Floats) -> Floor | None:
    """Return the seed-only floor of AOPD; None without AOPD or when no order has a second seed.

    S is the smallest number of seeds of an order. If one order has at least R S seeds, they are divided into R groups
    of S, by increasing seed, and AOPD is computed over the groups. Otherwise the floor is estimated from the seeds of
    all orders, as normal noise: d2(R) sqrt(seed variance / S), averaged over tasks.
    """
    value = robustness.aopd(finals)
    if value is None:
        return None
    finals = _counted(finals)
    complete, orders = _complete(finals), len(finals)
    seeds = complete.sum(axis=1)
    size, most = int(seeds.min()), int(np.argmax(seeds))
    measured = int(seeds[most]) >= orders * size
    if measured:
        fixed = finals[most][complete[most]][: orders * size].reshape(orders, size, -1)
        lowest = robustness.aopd(np.asarray(fixed, dtype=np.float64)) or 0.0
    else:
        each = [components(np.where(complete, finals[:, :, t], np.nan)) for t in range(finals.shape[2])]
        if any(one is None for one in each):
            return None
        lowest = d2(orders) * statistics.fmean(math.sqrt(one.seed / size) for one in each if one is not None)
    return Floor(lowest, measured, math.sqrt(max(0.0, value**2 - lowest**2)) / d2(orders))


@dataclass(frozen=True)
class PositionEffect:
    """Dependence of a task's final accuracy, minus its mean over orders, on the position at which it was learned.

    Attributes:
        slope: change per position; above 0 tasks learned late do better (forgetting), below 0 tasks learned early do
            (loss of capacity).
        pearson: Pearson correlation; None when all accuracies are equal.
        spearman: Spearman rank correlation; None when all accuracies are equal.
    """

    slope: float
    pearson: float | None
    spearman: float | None


def position_effect(finals: Floats, orders: Sequence[Sequence[int]]) -> PositionEffect | None:
    """Regress P_t^r - mean_r P_t^r on the position of task t in order r, over all cells (t, r).

    Args:
        finals: [R, S, T]; column t is the t-th smallest task id.
        orders: R task orders, ids by position.

    Returns:
        None for R < 2 or T < 2.
    """
    positions, centred = centred_by_position(finals, orders)
    if len(centred) < 2 or centred.shape[1] < 2:
        return None
    from scipy import stats

    x, y = positions.ravel().astype(np.float64), centred.ravel()
    slope = float(((x - x.mean()) * y).sum() / ((x - x.mean()) ** 2).sum())
    if np.ptp(y) == 0:
        return PositionEffect(slope, None, None)
    return PositionEffect(slope, float(stats.pearsonr(x, y).statistic), float(stats.spearmanr(x, y).statistic))


def centred_by_position(finals: Floats, orders: Sequence[Sequence[int]]) -> tuple[np.ndarray, Floats]:
    """Return positions [R, T] from 0 and P_t^r - mean_r P_t^r [R, T] of the orders that have complete runs."""
    means = robustness.seed_means(finals)
    kept = ~np.isnan(means).any(axis=1)
    positions = np.array([np.argsort(order) for order in orders], dtype=np.int64).reshape(means.shape)[kept]
    means = means[kept]
    return positions, _centred(means) if len(means) else means


def worst_cell(finals: Floats) -> tuple[float, int, int] | None:
    """Return min_{t,r} P_t^r and the indices (order, task) of the first cell with this value; None without runs."""
    means = robustness.seed_means(finals)
    if np.isnan(means).all():
        return None
    order, task = np.unravel_index(int(np.nanargmin(means)), means.shape)
    return float(means[order, task]), int(order), int(task)


def bootstrap_interval(finals: Floats) -> tuple[float, float] | None:
    """Return the 95 % percentile interval of the mean over orders; None for R < 6.

    Orders are resampled first and then the seeds within each (scipy.stats.bootstrap has no nested resampling). The same
    runs give the same interval.
    """
    runs = [row[~np.isnan(row)] for row in _run_means(finals)]
    runs = [row for row in runs if row.size]
    if len(runs) < BOOTSTRAP_FROM:
        return None
    random = np.random.default_rng(0)
    # First RESAMPLES means over resampled seeds for each order, then orders drawn with one of their means each.
    drawn = np.stack([row[random.integers(row.size, size=(RESAMPLES, row.size))].mean(axis=1) for row in runs])
    chosen = random.integers(len(runs), size=(RESAMPLES, len(runs)))
    means = drawn[chosen, random.integers(RESAMPLES, size=chosen.shape)].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975]).tolist()
    return low, high


def chance_of_extreme(orders: int, share: float) -> float:
    """Return the chance that `orders` random orders contain one of the worst `share` (a fraction) of all orders."""
    return float(1 - (1 - share) ** orders)


def caveats(finals: Floats) -> list[str]:
    """Return one sentence for each claim that the number of orders and seeds does not support, most important first."""
    finals = _counted(finals)
    orders = len(finals)
    if not orders:
        return []
    if orders == 1:
        return ["One order says nothing about the effect of the order."]
    found = []
    if orders < CLAIM:
        seen = 100 * chance_of_extreme(orders, 0.1)
        found.append(
            f"{orders} orders do not support a claim of robustness ({CLAIM} orders and a search for the worst one do): "
            f"the chance that they include one of the worst 10 % of all orders is {seen:.0f} %."
        )
    if orders < REPORT:
        low, high = sd_interval(1.0, orders)
        found.append(
            f"The standard deviation over {orders} orders is known only up to a factor of {low:.2f} to {high:.2f} "
            f"(95 % interval for normal values); use at least {REPORT} orders or a Williams square."
        )
    if int(_complete(finals).sum(axis=1).max()) < 2:
        found.append(
            "No order has a second seed: the effect of the order cannot be separated from the effect of the seed."
        )
    seeds = _complete(finals).sum(axis=1)
    if int(seeds.min()) < int(seeds.max()):
        found.append(
            f"The orders have {int(seeds.min())} to {int(seeds.max())} seeds each: where seeds are missing, "
            "differences between orders are in part differences between seeds."
        )
    bottom, value = floor(finals), robustness.aopd(finals)
    if bottom is not None and value is not None and 0 < value <= bottom.aopd:
        found.append("AOPD is not larger than its seed-only floor: seeds alone explain the differences.")
    return found


def _centred(means: Floats) -> Floats:
    """Return [R, T] minus the mean over orders of each column, exactly 0 where a column is constant."""
    constant = np.ptp(means, axis=0) == 0
    return np.asarray(np.where(constant, 0.0, means - means.mean(axis=0)), dtype=np.float64)


def _complete(finals: Floats) -> np.ndarray:
    """Return a mask [R, S] of the runs that have every cell."""
    return np.asarray(~np.isnan(finals).any(axis=2))


def _run_means(finals: Floats) -> Floats:
    """Return the average accuracy of each run, [R, S]; NaN where the run is absent."""
    return np.asarray(finals.sum(axis=2) / max(1, finals.shape[2]), dtype=np.float64)


def _counted(finals: Floats) -> Floats:
    """Return `finals` without the orders that have no complete run."""
    return finals[_complete(finals).any(axis=1)]
