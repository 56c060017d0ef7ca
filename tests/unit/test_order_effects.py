"""Order and seed effects, and comparisons of methods, against the worked numbers of the definitions and brute force."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import friedmanchisquare, rankdata, studentized_range, ttest_rel, wilcoxon

from clrun.results import comparison, order_effects, robustness

ORDERS = [(0, 1, 2, 3), (2, 0, 3, 1), (3, 2, 1, 0)]
BY_POSITION = np.array([[70, 80, 60, 90], [63, 66, 88, 84], [91, 54, 78, 75]]) / 100
SEEDED = np.array([[70, 72], [76, 74], [65, 69]]) / 100  # rows = orders


def by_task():
    """Return [3, 1, 4] finals by task id."""
    finals = np.empty((3, 1, 4))
    for r, order in enumerate(ORDERS):
        finals[r, 0, list(order)] = BY_POSITION[r]
    return finals


# --- what orders contribute


def test_mean_range_of_normal_values():
    known = {2: 1.128, 3: 1.693, 4: 2.059, 5: 2.326, 6: 2.534, 8: 2.847, 10: 3.078, 20: 3.735, 24: 3.895, 30: 4.086}
    assert {n: round(order_effects.d2(n), 3) for n in known} == known


def test_disparity_without_its_growth_in_the_orders():
    assert round(100 * order_effects.normalised_aopd(by_task()), 3) == 3.988
    assert order_effects.task_sd(by_task()) == pytest.approx(0.034186, abs=1e-6)
    assert order_effects.normalised_aopd(by_task()[:1]) is order_effects.task_sd(by_task()[:1]) is None


def test_position_effect_of_the_worked_example():
    effect = order_effects.position_effect(by_task(), ORDERS)
    assert effect.spearman == pytest.approx(0.172733, abs=1e-6)
    assert effect.pearson == pytest.approx(0.208987, abs=1e-6)


def test_slope_is_the_gain_a_position_once_tasks_are_levelled():
    orders = list(itertools.permutations(range(4)))
    level = np.array([0.2, 0.9, 0.5, 0.4])
    finals = np.array([level - 0.03 * np.argsort(order) for order in orders])[:, None]
    effect = order_effects.position_effect(finals, orders)
    assert effect.slope == pytest.approx(-0.03) and effect.pearson == pytest.approx(-1)
    flat = order_effects.position_effect(np.broadcast_to(level, (24, 1, 4)), orders)
    assert flat.slope == 0 and flat.pearson is flat.spearman is None


def test_positions_are_those_of_the_orders_that_count():
    finals = by_task()
    finals[0] = np.nan
    positions, centred = order_effects.centred_by_position(finals, ORDERS)
    assert positions.tolist() == [[1, 3, 0, 2], [3, 2, 1, 0]]
    assert centred[0] == pytest.approx([-0.045, 0.03, 0.045, -0.015])


def test_order_and_seed_components_of_the_worked_example():
    parts = order_effects.components(SEEDED)
    assert parts.order == pytest.approx(14e-4) and parts.seed == pytest.approx(4e-4)
    assert parts.order_share == pytest.approx(0.777778, abs=1e-6)
    assert order_effects.accuracy_components(SEEDED[:, :, None]) == parts
    assert order_effects.task_components(SEEDED[:, :, None]) == parts


def test_averages_hide_what_single_tasks_lose():
    finals = np.stack([SEEDED, 1.4 - SEEDED], axis=2)
    assert order_effects.accuracy_components(finals).order == pytest.approx(0, abs=1e-12)
    assert order_effects.task_components(finals).order_share == pytest.approx(0.777778, abs=1e-6)


def test_components_need_a_second_order_and_a_second_seed():
    assert order_effects.components(SEEDED[:, :1]) is None
    assert order_effects.components(SEEDED[:1]) is None
    some = SEEDED.copy()
    some[1:, 1] = np.nan
    assert order_effects.components(some).seed == pytest.approx(2e-4)
    assert order_effects.components(np.ones((2, 2))).order_share is None


def test_unequal_seeds_recover_the_components_on_average():
    random, found = np.random.default_rng(0), []
    for _ in range(2000):
        values = random.normal(size=(6, 1)) * 2 + random.normal(size=(6, 3))
        values[:3, 1:] = np.nan
        parts = order_effects.components(values)
        found.append((parts.order, parts.seed))
    assert np.mean(found, axis=0) == pytest.approx([4, 1], rel=0.06)


def test_measured_floor_is_the_disparity_of_groups_of_seeds():
    finals = np.full((2, 4, 1), np.nan)
    finals[0, :, 0], finals[1, :2, 0] = [0.5, 0.6, 0.7, 0.6], [0.9, 0.9]
    floor = order_effects.floor(finals)
    assert floor.measured and floor.aopd == pytest.approx(0.65 - 0.55)
    assert floor.effect == pytest.approx(math.sqrt(0.3**2 - 0.1**2) / order_effects.d2(2))


def test_floor_is_estimated_from_the_seeds_where_no_order_has_enough():
    floor = order_effects.floor(SEEDED[:, :, None])
    assert not floor.measured
    assert floor.aopd == pytest.approx(order_effects.d2(3) * math.sqrt(4e-4 / 2))
    assert order_effects.floor(by_task()) is None


def test_disparity_of_pure_noise_is_its_floor():
    finals = np.random.default_rng(3).normal(size=(5, 2, 4000))
    assert robustness.aopd(finals) == pytest.approx(order_effects.d2(5) / math.sqrt(2), rel=0.02)
    # The square root of a variance from 5 degrees of freedom is biased by a known factor.
    bias = math.sqrt(2 / 5) * math.gamma(3) / math.gamma(2.5)
    assert order_effects.floor(finals).aopd == pytest.approx(bias * order_effects.d2(5) / math.sqrt(2), rel=0.02)


def test_worst_cell_of_the_worked_example():
    value, order, task = order_effects.worst_cell(by_task())
    assert value == 0.54 and ORDERS[order] == (3, 2, 1, 0) and task == 2
    assert order_effects.worst_cell(np.empty((0, 0, 0))) is None


@pytest.mark.parametrize("n,low,high", [(3, 0.52, 6.28), (5, 0.60, 2.87), (10, 0.69, 1.83), (30, 0.80, 1.34)])
def test_interval_of_a_standard_deviation(n, low, high):
    assert order_effects.sd_interval(1, n) == pytest.approx((low, high), abs=0.006)


@pytest.mark.parametrize("orders,tenth,twentieth", [(3, 27, 14), (5, 41, 23), (10, 65, 40), (20, 88, 64)])
def test_chance_of_meeting_an_extreme_order(orders, tenth, twentieth):
    assert round(100 * order_effects.chance_of_extreme(orders, 0.10)) == tenth
    assert round(100 * order_effects.chance_of_extreme(orders, 0.05)) == twentieth


def test_bootstrap_resamples_orders_not_runs():
    random = np.random.default_rng(0)
    effects = random.normal(size=(20, 1))
    many = np.repeat(effects, 50, axis=1)[:, :, None]
    low, high = order_effects.bootstrap_interval(many)
    assert (high - low) / 2 == pytest.approx(1.96 * effects.std() / math.sqrt(20), rel=0.1)
    assert order_effects.bootstrap_interval(many) == (low, high)
    assert order_effects.bootstrap_interval(many[:5]) is None


def test_caveats_go_as_orders_and_seeds_come():
    random = np.random.default_rng(1)

    def said(orders, seeds):
        effects = random.normal(size=(orders, 1, 3))
        return " ".join(order_effects.caveats(effects + random.normal(size=(orders, seeds, 3)) / 100))

    assert said(1, 2).startswith("One order")
    assert "41 %" in said(5, 1) and "0.60 to 2.87" in said(5, 1) and "second seed" in said(5, 1)
    assert "claim" in said(10, 2) and "factor" not in said(10, 2) and "second seed" not in said(10, 2)
    assert said(20, 2) == ""
    noise = np.tile([[0.4], [0.6]], (20, 1, 1)).reshape(20, 2, 1) + np.linspace(0, 1e-3, 20)[:, None, None]
    assert "seeds alone" in " ".join(order_effects.caveats(noise))
    uneven = random.normal(size=(20, 2, 3))
    uneven[4, 1] = np.nan
    assert "1 to 2 seeds" in " ".join(order_effects.caveats(uneven))
    assert order_effects.caveats(np.empty((0, 0, 0))) == []


# --- comparing methods


def test_exact_tests_cannot_reach_five_percent_on_five_orders():
    for n, smallest in ((5, 0.0625), (6, 0.03125)):
        difference = np.arange(1.0, n + 1)
        assert comparison.wilcoxon(difference) == comparison.sign_test(-difference) == smallest
    assert comparison.wilcoxon(np.zeros(5)) == comparison.sign_test(np.zeros(5)) == 1


def test_signed_ranks_against_all_signs():
    random = np.random.default_rng(5)
    for _ in range(20):
        difference = random.integers(-4, 5, size=7).astype(float)  # ties and zeros
        nonzero = difference[difference != 0]
        ranks = rankdata(np.abs(nonzero))
        sums = [np.dot(ranks, signs) for signs in itertools.product((0, 1), repeat=len(ranks))]
        own = ranks[nonzero > 0].sum()
        tail = min(np.mean(np.array(sums) <= own), np.mean(np.array(sums) >= own))
        assert comparison.wilcoxon(difference) == pytest.approx(min(1, 2 * tail))


def test_signed_ranks_of_many_orders_stay_finite():
    difference = np.random.default_rng(2).normal(size=400) + 0.1
    assert comparison.wilcoxon(difference) == pytest.approx(wilcoxon(difference, method="exact").pvalue, rel=1e-9)


def test_paired_differences():
    a, b = np.array([0.70, 0.76, 0.65]), np.array([0.60, 0.64, 0.57])
    found = comparison.paired(a, b)
    assert (found.n, found.mean, found.sd) == (3, pytest.approx(0.1), pytest.approx(0.02))
    assert found.ci95 == pytest.approx((0.1 - 2.484 * 0.02, 0.1 + 2.484 * 0.02), abs=1e-4)
    assert found.p_t == pytest.approx(ttest_rel(a, b).pvalue)
    assert comparison.paired(b, a).mean == -found.mean
    equal = comparison.paired(a, a)
    assert equal.p_wilcoxon == equal.p_sign == 1 and equal.p_t is equal.orders_needed is None
    assert comparison.paired(a[:1], b[:1]).ci95 is None


def test_orders_needed_for_four_in_five():
    assert [comparison.orders_needed(effect) for effect in (2, 1, 0.8, 0.5)] == [5, 10, 15, 34]
    assert [comparison.orders_needed(effect) for effect in (8, 14, 1000)] == [3, 2, 2]
    assert comparison.orders_needed(0.001) is None


def test_holm():
    assert comparison.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert comparison.holm([0.6, 0.7]) == [1, 1] and comparison.holm([]) == []


def test_agreement_of_orders_on_the_ranking():
    same = comparison.ranking(np.array([[0.9, 0.5, 0.1]] * 4))
    assert same.kendall_w == 1 and same.mean_ranks == [1, 2, 3]
    assert comparison.ranking(np.array([[1.0, 2.0], [2.0, 1.0]])).kendall_w == 0
    assert comparison.ranking(np.ones((3, 2))).kendall_w is None


def test_friedman_with_ties_as_scipy_has_it():
    scores = np.random.default_rng(0).integers(0, 5, size=(9, 4)).astype(float)
    expected = friedmanchisquare(*scores.T)
    found = comparison.ranking(scores)
    assert found.p_friedman == pytest.approx(expected.pvalue)
    assert found.kendall_w == pytest.approx(expected.statistic / (9 * 3))
    critical = studentized_range.ppf(0.95, 4, math.inf) / math.sqrt(2) * math.sqrt(4 * 5 / (6 * 9))
    assert found.critical_difference == pytest.approx(critical)


def test_critical_values_of_nemenyi_as_published():
    # Demsar (JMLR 2006), table 5a, for 2 to 10 methods, made from a table of q with two decimals.
    demsar = (1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164)
    assert [comparison.nemenyi(k) for k in range(2, 11)] == pytest.approx(demsar, abs=1.5e-3)
    # Harter (1960): the studentized range at 5 % with infinitely many degrees of freedom for 20, 40 and 60 treatments.
    tabled = {20: 5.01, 40: 5.50, 60: 5.76}
    assert {k: round(math.sqrt(2) * comparison.nemenyi(k), 2) for k in tabled} == tabled


def test_more_than_ten_methods_have_a_critical_difference():
    scores = np.random.default_rng(0).random((6, 12))
    expected = comparison.nemenyi(12) * math.sqrt(12 * 13 / (6 * 6))
    assert comparison.ranking(scores).critical_difference == pytest.approx(expected)


@pytest.mark.parametrize(
    ("orders", "said"),
    [
        ([5], ["On 5 shared orders", "below 0.0625:", "at least 6 orders"]),
        ([1], ["On 1 shared order the", "below 1:"]),
        ([6], []),
        ([6] * 45, ["On 6 shared orders", "below 1 after Holm's correction for 45 comparisons", "at least 11 orders"]),
        ([11] * 45, []),
        ([7] * 3, []),
        ([6] * 3, ["below 0.0938 after Holm's correction for 3 comparisons", "at least 7 orders"]),
        ([8, 8, 4], ["1 of 3 comparisons rest on fewer than 6 shared orders"]),
    ],
)
def test_caveats_say_what_few_orders_cannot_show(orders, said):
    found = comparison.caveats(orders)
    assert len(found) == bool(said)
    assert all(part in found[0] for part in said)


def test_the_caveat_is_the_best_that_the_tests_can_reach():
    differences = [np.arange(1.0, 7.0)] * 3  # one method beats another in each of six orders, in three comparisons
    adjusted = comparison.holm([comparison.wilcoxon(difference) for difference in differences])
    assert f"{min(adjusted):.3g}" == "0.0938" and "0.0938" in comparison.caveats([6] * 3)[0]
