"""Comparing methods over the same task orders: paired differences, exact tests, Holm, Kendall's W, Friedman, Nemenyi.

The sample are orders: accuracies of the seeds of an order are averaged before they come here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clrun.results.metrics import Floats
from clrun.results.order_effects import ranks

LEVEL, POWER = 0.05, 0.8
MOST_ORDERS = 1000  # beyond, a difference is too small to plan for
# Studentized range / sqrt(2) at the 5 % level for 2, 3, ... methods (Demsar, JMLR 2006, table 5a).
NEMENYI = (1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164)


@dataclass(frozen=True)
class Paired:
    """Differences a - b of two methods over n orders.

    Attributes:
        n: orders that both have.
        mean: mean difference.
        sd: standard deviation (ddof 1); None for n < 2.
        ci95: mean -+ t sd / sqrt(n); None for n < 2.
        p_wilcoxon: exact signed-rank test, two-sided.
        p_sign: exact sign test, two-sided.
        p_t: paired t test, two-sided; None for n < 2 or sd 0.
        orders_needed: orders for 80 % power of the t test if the difference is real; None when it is 0 or tiny.
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
    """Compare two methods on the same orders; `a` and `b` are [n], one value an order, n >= 1."""
    from scipy.special import stdtr, stdtrit

    difference = a - b
    n, mean = len(difference), float(difference.mean())
    p_wilcoxon, p_sign = wilcoxon(difference), sign_test(difference)
    if n < 2:
        return Paired(n, mean, None, None, p_wilcoxon, p_sign, None, None)
    sd = float(difference.std(ddof=1))
    half = float(stdtrit(n - 1, 1 - LEVEL / 2)) * sd / math.sqrt(n)
    p_t = 2 * float(stdtr(n - 1, -abs(mean) / sd * math.sqrt(n))) if sd > 0 else None
    needed = orders_needed(abs(mean) / sd) if sd > 0 else None
    return Paired(n, mean, sd, (mean - half, mean + half), p_wilcoxon, p_sign, p_t, needed)


def wilcoxon(difference: Floats) -> float:
    """Return the exact two-sided p of the signed-rank test (Wilcoxon 1945); zeros are dropped, ties share ranks.

    The distribution is that of the given ranks under all 2^n signs. Its smallest p is 2^(1 - n): 0.0625 for 5 orders.
    """
    nonzero = difference[difference != 0]
    twice = np.rint(2 * ranks(np.abs(nonzero))).astype(np.int64)  # whole numbers, whatever the ties
    ways = np.zeros(int(twice.sum()) + 1)
    ways[0] = 1.0
    for rank in twice.tolist():
        ways[rank:] += ways[:-rank].copy()
        ways /= 2.0
    positive = int(twice[nonzero > 0].sum())
    return min(1.0, 2 * float(min(ways[: positive + 1].sum(), ways[positive:].sum())))


def sign_test(difference: Floats) -> float:
    """Return the exact two-sided p of the sign test; zeros are dropped."""
    n, fewer = int((difference != 0).sum()), int(min((difference > 0).sum(), (difference < 0).sum()))
    return min(1.0, 2 * float(sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n))


def orders_needed(effect: float) -> int | None:
    """Return the orders at which a two-sided paired t test at 5 % reaches 80 % power for |mean| / sd = `effect`."""
    from scipy.special import nctdtr, stdtrit

    def power(n: int) -> float:
        critical, shift = float(stdtrit(n - 1, 1 - LEVEL / 2)), effect * math.sqrt(n)
        other_side = float(nctdtr(n - 1, shift, -critical))  # scipy has NaN where this is below about 1e-14
        return 1 - float(nctdtr(n - 1, shift, critical)) + (0.0 if math.isnan(other_side) else other_side)

    start = max(2, int((2.8 / effect) ** 2)) if effect > 2.8 / math.sqrt(MOST_ORDERS) else MOST_ORDERS  # normal approx.
    return next((n for n in range(start, MOST_ORDERS) if power(n) >= POWER), None)


def holm(p: Sequence[float]) -> list[float]:
    """Return p values adjusted for all comparisons made (Holm 1979), in the given order."""
    adjusted, highest = [0.0] * len(p), 0.0
    for done, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, (len(p) - done) * p[index]))
        adjusted[index] = highest
    return adjusted


@dataclass(frozen=True)
class Ranking:
    """How alike the orders rank the methods.

    Attributes:
        kendall_w: 1 when every order ranks alike, 0 when there is no agreement; None when every order ties all.
        p_friedman: of the null that methods do not differ (chi-square with k - 1 degrees, coarse for few orders).
        mean_ranks: of each method, 1 is best.
        critical_difference: of mean ranks at 5 % (Nemenyi 1963); None beyond 10 methods.
    """

    kendall_w: float | None
    p_friedman: float | None
    mean_ranks: list[float]
    critical_difference: float | None


def ranking(scores: Floats) -> Ranking:
    """Rank k >= 2 methods within each of R >= 2 orders; `scores` is [R, k], higher is better; W allows for ties."""
    from scipy.special import chdtrc

    orders, k = scores.shape
    table = np.stack([ranks(-row) for row in scores])
    sums = table.sum(axis=0)
    ties = sum(float((counts**3 - counts).sum()) for counts in (np.unique(row, return_counts=True)[1] for row in table))
    scale = orders**2 * (k**3 - k) - orders * ties
    w = 12 * float(((sums - sums.mean()) ** 2).sum()) / scale if scale > 0 else None
    p = None if w is None else float(chdtrc(k - 1, orders * (k - 1) * w))
    critical = NEMENYI[k - 2] * math.sqrt(k * (k + 1) / (6 * orders)) if k - 2 < len(NEMENYI) else None
    return Ranking(w, p, (sums / orders).tolist(), critical)
