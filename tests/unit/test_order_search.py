"""The search for the worst order against oracles whose worst order is known."""

import math
from itertools import permutations

import numpy as np
import pytest

from clrun.data import orders
from clrun.data.order_search import OrderSearch, adversarial, moves
from clrun.system.errors import ConfigError


def oracle(n_tasks, seed):
    """An accuracy that depends on which task follows which and where a task stands, and its lowest value."""
    random = np.random.default_rng(seed)
    follows, stands = random.normal(size=(n_tasks, n_tasks)), random.normal(size=(n_tasks, n_tasks))

    def accuracy(order):
        pairs = sum(follows[a, b] for a, b in zip(order, order[1:], strict=False))
        return float(0.5 + 0.02 * (pairs + sum(stands[task, place] for place, task in enumerate(order))))

    return accuracy, min(map(accuracy, permutations(range(n_tasks))))


def searched(accuracy, n_tasks, budget, *, known=(), **options):
    """Let a search spend its budget; return it and its proposals."""
    search = OrderSearch(n_tasks, **{"starts": 6, "patience": 5, "seed": 0} | options)
    for order in known:
        search.add_known(order, accuracy(order))
    path = []
    while len(path) < budget and (proposal := search.propose()):
        path.append(proposal)
        search.add_result(proposal, accuracy(proposal.order))
    return search, path


def test_the_worst_order_is_found_more_often_than_by_random_orders():
    tries, budget, n_tasks = 20, 40, 6  # of 720 orders
    by_moves = by_chance = 0
    for seed in range(tries):
        accuracy, lowest = oracle(n_tasks, seed)
        search, _ = searched(accuracy, n_tasks, budget, seed=seed)
        by_moves += accuracy(search.worst()) == lowest
        by_chance += min(accuracy(orders.random(n_tasks, seed=1000 * seed + k)) for k in range(budget)) == lowest
    assert by_moves >= 10
    assert by_moves > 3 * by_chance


def test_every_order_of_few_tasks_is_tried_once():
    accuracy, lowest = oracle(4, 0)
    search, path = searched(accuracy, 4, 100)
    assert len({p.order for p in path}) == len(path) == 24
    assert accuracy(search.worst()) == lowest
    assert search.propose() is None
    one, path = searched(lambda order: 0.5, 1, 9)
    assert [p.order for p in path] == [(0,)] and one.worst() == (0,)


def test_the_path_depends_on_seed_and_accuracies_alone():
    accuracy, _ = oracle(8, 1)
    first, again, other = (searched(accuracy, 8, 25, seed=seed)[1] for seed in (0, 0, 1))
    assert first == again
    assert [p.order for p in first] != [p.order for p in other]
    assert searched(accuracy, 8, 40)[1][:25] == first, "a larger budget goes on"


def test_a_design_comes_first_then_moves_of_the_worst():
    accuracy, _ = oracle(6, 2)
    search, path = searched(accuracy, 6, 20, starts=4, patience=20)
    rows = {tuple(orders.williams(6, row=row)) for row in range(6)}
    assert [p.source for p in path[:4]] == ["design"] * 4 and {p.order for p in path[:4]} <= rows
    tried = {}
    for proposal in path:
        if proposal.source == "move":
            assert proposal.order in moves(proposal.parent)
            assert moves(proposal.parent)[proposal.order] == proposal.move
            assert accuracy(proposal.parent) == min(map(accuracy, tried)), "patience was not lost"
        tried[proposal.order] = proposal
    assert searched(accuracy, 3, 6, starts=6)[1][-1].source in ("design", "random")


def test_an_order_without_better_moves_is_left():
    pit = (0, 1, 2, 3, 4)
    search, path = searched(lambda order: float(order != pit), 5, 30, known=[pit], starts=1, patience=3)
    parents = [p.parent for p in path if p.source == "move"]
    assert parents[:3] == [pit] * 3 and pit not in parents[3:]
    assert all(parents.count(parent) <= 3 for parent in parents)
    assert search.worst() == pit


def test_random_orders_follow_when_nothing_is_left_to_move():
    _, path = searched(lambda order: math.nan, 5, 12, starts=3)
    assert [p.source for p in path] == ["design"] * 3 + ["random"] * 9, "runs without result are moved from never"


def test_moves_are_all_swaps_and_insertions():
    found = moves((0, 1, 2, 3))
    assert len(found) == 6 + 6, "6 swaps, 3 of them neighbours; 9 insertions, 3 of them these swaps"
    assert found[3, 1, 2, 0] == "tasks at 1 and 4 swapped"
    assert found[1, 2, 3, 0] == "task at 1 put at 4"
    assert (0, 1, 2, 3) not in found


def test_what_is_known_is_not_proposed():
    accuracy, _ = oracle(5, 3)
    known = list(permutations(range(5)))[:110]
    _, path = searched(accuracy, 5, 100, known=known)
    assert {p.order for p in path} == set(permutations(range(5))) - set(known)


def test_the_group_member_gives_the_first_order(tmp_path):
    options = {"budget": 3, "starts": 2, "patience": 1, "seed": 7}
    first = OrderSearch(9, starts=2, patience=1, seed=7).propose()
    assert adversarial(9, reuse=[str(tmp_path)], **options) == list(first.order)
    with pytest.raises(ConfigError, match=r"^task_order.reuse: no such folder: .*gone$"):
        adversarial(9, reuse=[str(tmp_path / "gone")], **options)
