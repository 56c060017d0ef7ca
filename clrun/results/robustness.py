"""How much final accuracies depend on the order of the tasks (Yoon et al., ICLR 2020, arXiv 1902.09432, section 5).

`finals` is [R, S, T]: R orders, S seeds of each, T tasks **by task id**, so that a task has the same column in every
order. A run that is absent or lacks a cell is NaN there and is not counted; an order without any complete run is left
out. Seeds are averaged first: P_t^r is the mean over the seeds of order r. Accuracies are fractions. None means that
the runs do not determine the value.
"""

import math
import statistics

import numpy as np

from clrun.results.metrics import Floats


def seed_means(finals: Floats) -> Floats:
    """Return P_t^r, [R, T]: the mean over the complete runs of each order; the row of an order without any is NaN."""
    complete = ~np.isnan(finals).any(axis=2, keepdims=True)  # [R, S, 1]
    runs = complete.sum(axis=1)
    total = np.where(complete, finals, 0.0).sum(axis=1)
    return np.asarray(np.where(runs > 0, total / np.maximum(runs, 1), np.nan), dtype=np.float64)


def order_means(finals: Floats) -> Floats:
    """Return the average accuracy of each order, [R] (mean over seeds and tasks); NaN for an order without runs."""
    return np.asarray(seed_means(finals).sum(axis=1) / max(1, finals.shape[2]), dtype=np.float64)


def opd(finals: Floats) -> Floats | None:
    """Return the order-normalised performance disparity (OPD) of each task, [T]; None for R < 2.

    It is max_r P_t^r - min_r P_t^r.
    """
    means = _counted(seed_means(finals))
    return np.asarray(np.ptp(means, axis=0), dtype=np.float64) if len(means) > 1 else None


def aopd(finals: Floats) -> float | None:
    """Return AOPD, the mean of OPD over tasks; exactly 0 when no task's accuracy depends on the order."""
    disparity = opd(finals)
    return None if disparity is None else float(disparity.mean())


def mopd(finals: Floats) -> float | None:
    """Return MOPD, the largest OPD of any task.

    AOPD grows with R, and MOPD with R and T: compare them at equal R and T only.
    """
    disparity = opd(finals)
    return None if disparity is None else float(disparity.max())


def mean(finals: Floats) -> float | None:
    """Return the mean of the order means; None without complete runs."""
    means = _counted(order_means(finals)).tolist()
    return statistics.fmean(means) if means else None


def sd(finals: Floats) -> float | None:
    """Return the standard deviation of the order means (ddof 1); None for R < 2."""
    means = _counted(order_means(finals)).tolist()
    return statistics.stdev(means) if len(means) > 1 else None  # exactly 0 for equal means, unlike numpy's


def ci95(finals: Floats) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean over orders, mean -+ t_{R-1, .975} sd / sqrt(R); None for R < 2.

    The sampling unit is the order and not the run: more seeds of the same orders do not narrow the interval.
    """
    from scipy.special import stdtrit  # scipy.stats, whose t distribution it is, takes three times as long to import

    centre, spread, orders = mean(finals), sd(finals), len(_counted(order_means(finals)))
    if centre is None or spread is None:
        return None
    half = float(stdtrit(orders - 1, 0.975)) * spread / math.sqrt(orders)
    return centre - half, centre + half


def worst_order(finals: Floats) -> int | None:
    """Return the index of the order with the lowest mean, the first of equal ones; None without complete runs."""
    means = order_means(finals)
    return None if np.isnan(means).all() else int(np.nanargmin(means))


def _counted(values: Floats) -> Floats:
    """Return `values` without the orders (first axis) that have no complete run."""
    return values[~np.isnan(values).any(axis=tuple(range(1, values.ndim)))]
