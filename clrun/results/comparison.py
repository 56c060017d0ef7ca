"""Comparing methods over the same task orders: paired tests, Holm's correction, Kendall's W, Friedman, Nemenyi.

The sampling unit is the task order: accuracies of the seeds of one order are averaged before they come here.
Distributions come from scipy.stats. Three formulas are written here because SciPy lacks them: the signed-rank test that
stays exact with ties, Holm's correction, and Friedman's test for two methods.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from clrun.results.metrics import Floats

LEVEL, POWER = 0.05, 0.8
MOST_ORDERS = 1000  # orders_needed stops here: a smaller difference is not worth planning for


@dataclass(frozen=True)
class Paired:
    """Differences a - b of two methods over n orders.

    Attributes:
        n: number of orders that both methods have.
        mean: mean difference.
        sd: standard deviation of the differences (ddof 1); None for n < 2.
        ci95: 95 % interval of the mean, mean -+ t sd / sqrt(n); None for n < 2.
        p_wilcoxon: p value of the exact two-sided signed-rank test.
        p_sign: p value of the exact two-sided sign test.
        p_t: p value of the two-sided paired t test; None for n < 2 or sd = 0.
        orders_needed: number of orders at which the t test has 80 % power for a difference as large as this one; None
            when the difference is 0 or needs 1000 orders or more.
    """

    n: int
    mean: float
    sd: float | None
    ci95: tuple[float, float] | None
    p_wilcoxon: float
    p_sign: float
    p_t: float | None
    orders_needed: int | None


def paired(a: Floats, b: Floats) -> Paired:
    """Compare two methods on the same n >= 1 orders; `a` and `b` are [n], one value per order."""
    from scipy import stats

    difference = a - b
    n, mean = len(difference), float(difference.mean())
    p_wilcoxon, p_sign = wilcoxon(difference), sign_test(difference)
    if n < 2:
        return Paired(n, mean, None, None, p_wilcoxon, p_sign, None, None)
    sd = float(difference.std(ddof=1))
    half = float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * sd / math.sqrt(n)
    p_t = 2 * float(stats.t.sf(abs(mean) / sd * math.sqrt(n), n - 1)) if sd > 0 else None
    needed = orders_needed(abs(mean) / sd) if sd > 0 else None
    return Paired(n, mean, sd, (mean - half, mean + half), p_wilcoxon, p_sign, p_t, needed)


def wilcoxon(difference: Floats) -> float:
    """Return the exact two-sided p value of the signed-rank test (Wilcoxon 1945) of differences [n].

    Zeros are dropped and equal values share the mean of their ranks. The null distribution is that of the given ranks
    under all 2^n signs, so that the test is exact with ties, for which scipy.stats.wilcoxon has no exact method. The
    smallest possible p value is 2^(1 - n): 0.0625 for 5 orders.
    """
    from scipy import stats

    nonzero = difference[difference != 0]
    twice = np.rint(2 * stats.rankdata(np.abs(nonzero))).astype(np.int64)  # whole numbers, whatever the ties
    probability = np.zeros(int(twice.sum()) + 1)  # of each possible sum of the positive ranks, doubled
    probability[0] = 1.0
    for rank in twice.tolist():
        probability[rank:] += probability[:-rank].copy()
        probability /= 2.0
    positive = int(twice[nonzero > 0].sum())
    return min(1.0, 2 * float(min(probability[: positive + 1].sum(), probability[positive:].sum())))


def sign_test(difference: Floats) -> float:
    """Return the exact two-sided p value of the sign test of differences [n]; zeros are dropped."""
    from scipy import stats

    positive, negative = int((difference > 0).sum()), int((difference < 0).sum())
    return float(stats.binomtest(positive, positive + negative).pvalue) if positive + negative else 1.0


def orders_needed(effect: float) -> int | None:
    """Return the number of orders at which a two-sided paired t test at 5 % has 80 % power.

    Args:
        effect: |mean| / sd of the differences.

    Returns:
        The number of orders, at least 2; None for 1000 or more.
    """
    from scipy.special import nctdtr, stdtrit  # the functions behind scipy.stats.nct: this runs for every order tried

    def power(n: int) -> float:
        critical, shift = float(stdtrit(n - 1, 1 - LEVEL / 2)), effect * math.sqrt(n)
        other_side = float(nctdtr(n - 1, shift, -critical))  # scipy returns NaN where this is below about 1e-14
        return 1 - float(nctdtr(n - 1, shift, critical)) + (0.0 if math.isnan(other_side) else other_side)

    # The normal approximation (1.96 + 0.84)^2 / effect^2 is below the answer, so that the search may begin there.
    start = max(2, int((2.8 / effect) ** 2)) if effect > 2.8 / math.sqrt(MOST_ORDERS) else MOST_ORDERS
    return next((n for n in range(start, MOST_ORDERS) if power(n) >= POWER), None)


def holm(p: Sequence[float]) -> list[float]:
    """Return the p values corrected for the number of comparisons (Holm 1979), in the given order."""
    adjusted, highest = [0.0] * len(p), 0.0
    for done, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, (len(p) - done) * p[index]))
        adjusted[index] = highest
    return adjusted


def caveats(orders: Sequence[int]) -> list[str]:
    """Return one sentence for each thing that the number of orders keeps the corrected tests from showing.

    The exact signed-rank test on n orders has no p value below 2^(1 - n), and Holm multiplies the smallest of m
    p values by m.

    Args:
        orders: number of shared orders of each comparison, m >= 1 numbers.
    """
    count, most = len(orders), max(orders)
    smallest = min(1.0, count * 2.0 ** (1 - most))
    corrected = f" after Holm's correction for {count} comparisons" if count > 1 else ""
    if smallest > LEVEL:
        return [
            f"On {most} shared order{'s' if most > 1 else ''} the exact signed-rank test cannot reach a p value below "
            f"{smallest:.3g}{corrected}: no difference between methods can be shown at the 5 % level. That needs at "
            f"least {_orders_for(count)} orders."
        ]
    few = sum(2.0 ** (1 - n) > LEVEL for n in orders)
    if few:
        return [
            f"{few} of {count} comparisons rest on fewer than {_orders_for(1)} shared orders: their exact signed-rank "
            "tests cannot reach the 5 % level."
        ]
    return []


def _orders_for(comparisons: int) -> int:
    """Return the smallest n with `comparisons` * 2^(1 - n) <= 5 %."""
    return math.ceil(1 + math.log2(comparisons / LEVEL))


@dataclass(frozen=True)
class Ranking:
    """How much the orders agree in how they rank the methods.

    Attributes:
        kendall_w: Kendall's coefficient of concordance: 1 when every order ranks the methods alike, 0 without any
            agreement; None when all methods tie in every order.
        p_friedman: p value of Friedman's test that methods do not differ (chi-square approximation with k - 1 degrees
            of freedom, coarse for few orders).
        mean_ranks: mean rank of each method; 1 is best.
        critical_difference: difference of two mean ranks that is significant at 5 % (Nemenyi 1963; Demsar, JMLR 2006).
    """

    kendall_w: float | None
    p_friedman: float | None
    mean_ranks: list[float]
    critical_difference: float


def ranking(scores: Floats) -> Ranking:
    """Rank k >= 2 methods within each of R >= 2 orders and compare the rankings.

    Kendall's W is corrected for ties. Friedman's statistic is R (k - 1) W; scipy.stats.friedmanchisquare gives the same
    and refuses k = 2.

    Args:
        scores: [R, k], higher is better.
    """
    from scipy import stats

    orders, k = scores.shape
    ranks = stats.rankdata(-scores, axis=1)
    sums = ranks.sum(axis=0)
    ties = sum(float((counts**3 - counts).sum()) for counts in (np.unique(row, return_counts=True)[1] for row in ranks))
    scale = orders**2 * (k**3 - k) - orders * ties
    w = 12 * float(((sums - sums.mean()) ** 2).sum()) / scale if scale > 0 else None
    p = None if w is None else float(stats.chi2.sf(orders * (k - 1) * w, k - 1))
    critical = nemenyi(k) * math.sqrt(k * (k + 1) / (6 * orders))
    return Ranking(w, p, (sums / orders).tolist(), critical)


@cache
def nemenyi(methods: int) -> float:
    """Return the critical value of Nemenyi's test at 5 %: the studentized range of k >= 2 methods over sqrt(2)."""
    from scipy import stats

    return float(stats.studentized_range.ppf(1 - LEVEL, methods, math.inf)) / math.sqrt(2)
