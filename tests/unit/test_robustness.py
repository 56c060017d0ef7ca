"""Robustness to task order against the worked numbers of the definitions."""

import numpy as np
import pytest

from clrun.results import robustness

ORDERS = [(0, 1, 2, 3), (2, 0, 3, 1), (3, 2, 1, 0)]
BY_POSITION = np.array([[70, 80, 60, 90], [63, 66, 88, 84], [91, 54, 78, 75]]) / 100


def by_task() -> np.ndarray:
    """Return [3, 1, 4] finals by task id."""
    finals = np.empty((3, 1, 4))
    for r, order in enumerate(ORDERS):
        finals[r, 0, list(order)] = BY_POSITION[r]
    return finals


def test_disparities_of_the_worked_example():
    finals = by_task()
    assert robustness.opd(finals) == pytest.approx([0.09, 0.06, 0.09, 0.03])
    assert robustness.aopd(finals) == pytest.approx(0.0675)
    assert robustness.mopd(finals) == pytest.approx(0.09)


def test_averages_of_the_worked_example():
    finals = by_task()
    assert robustness.order_means(finals) == pytest.approx([0.75, 0.7525, 0.745])
    assert robustness.mean(finals) == pytest.approx(0.74916667)
    assert robustness.sd(finals) == pytest.approx(0.00381881, abs=1e-8)
    assert robustness.worst_order(finals) == 2
    low, high = robustness.ci95(finals)
    assert (high - low) / 2 == pytest.approx(0.00948646, abs=1e-8)
    assert (high + low) / 2 == pytest.approx(0.74916667)


def test_positions_are_not_tasks():
    assert robustness.opd(BY_POSITION[:, None]) == pytest.approx([0.28, 0.26, 0.28, 0.15])


def test_the_interval_counts_orders_not_runs():
    finals = np.array([[70, 72], [76, 74], [65, 69]])[:, :, None] / 100
    assert robustness.order_means(finals) == pytest.approx([0.71, 0.75, 0.67])
    assert robustness.mean(finals) == pytest.approx(0.71)
    assert robustness.ci95(finals) == pytest.approx((0.61063449, 0.80936551), abs=1e-8)
    assert robustness.worst_order(finals) == 2


def test_seeds_are_averaged_before_the_range_is_taken():
    finals = np.array([[0.70, 0.74], [0.73, 0.71]])[:, :, None]
    assert robustness.aopd(finals) == pytest.approx(0, abs=1e-15)


def test_an_order_invariant_learner_has_exactly_no_disparity():
    finals = np.broadcast_to(np.array([0.1, 0.7, 0.3]) / 0.9, (5, 2, 3))
    assert robustness.aopd(finals) == robustness.mopd(finals) == robustness.sd(finals) == 0


def test_one_order_tells_nothing_of_orders():
    finals = by_task()[:1]
    assert robustness.mean(finals) == 0.75
    assert robustness.worst_order(finals) == 0
    for metric in (robustness.opd, robustness.aopd, robustness.mopd, robustness.sd, robustness.ci95):
        assert metric(finals) is None


def test_nothing_tells_nothing():
    finals = np.empty((0, 0, 0))
    for metric in (robustness.mean, robustness.worst_order, robustness.opd, robustness.sd):
        assert metric(finals) is None


def test_a_run_with_a_missing_cell_does_not_count():
    finals = np.concatenate([by_task(), by_task() * 0.5], axis=1)
    finals[0, 1, 2] = finals[1, 1] = finals[2, 1] = np.nan
    assert robustness.opd(finals) == pytest.approx(robustness.opd(by_task()))
    finals[2, 0, 0] = np.nan
    assert robustness.opd(finals) == pytest.approx(robustness.opd(by_task()[:2]))
    assert np.isnan(robustness.order_means(finals)[2])
    assert robustness.worst_order(finals) == 0


def test_relabelling_tasks_or_orders_changes_nothing():
    rng = np.random.default_rng(1)
    for _ in range(50):
        finals = rng.random((rng.integers(2, 6), rng.integers(1, 4), rng.integers(1, 7)))
        orders, tasks = rng.permutation(finals.shape[0]), rng.permutation(finals.shape[2])
        shuffled = finals[orders][:, :, tasks]
        for metric in (robustness.aopd, robustness.mopd, robustness.mean, robustness.sd):
            assert metric(shuffled) == pytest.approx(metric(finals))
        assert robustness.aopd(finals) <= robustness.mopd(finals)
