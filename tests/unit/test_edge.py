"""Orders by how alike tasks are: the extremes are found, whatever the direction, and similarities are what they say."""

from collections import Counter
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from helpers import image_stream
from torch import nn

from clrun.data.edge import edge
from clrun.running.similarity import task_similarities


def similarities(n_tasks, seed):
    drawn = np.random.default_rng(seed).normal(size=(n_tasks, n_tasks))
    return drawn + drawn.T


def neighbours(order, table):
    return float(table[order[:-1], order[1:]].sum())


def options(kind, **changes):
    return {"kind": kind, "similarity": "features", "seed": 0} | changes


def test_worked_example():
    """On a line 0 - 2 - 1 - 3 with similarity falling with distance the easy order walks along, the hard one jumps."""
    place = np.array([0.0, 2.0, 1.0, 3.0])
    table = -np.abs(place[:, None] - place[None, :])
    assert edge(4, table, **options("easy")) == [0, 2, 1, 3]
    assert edge(4, table, **options("hard")) == [1, 0, 3, 2]


@pytest.mark.parametrize("n_tasks", [2, 5, 7])
def test_few_tasks_get_the_extremes_of_all_orders(n_tasks):
    table = similarities(n_tasks, n_tasks)
    every = [neighbours(order, table) for order in permutations(range(n_tasks))]
    assert neighbours(edge(n_tasks, table, **options("hard")), table) == pytest.approx(min(every))
    assert neighbours(edge(n_tasks, table, **options("easy")), table) == pytest.approx(max(every))


def test_of_many_tasks_no_random_order_is_as_extreme():
    table = similarities(20, 0)
    hard, easy = (edge(20, table, **options(kind)) for kind in ("hard", "easy"))
    assert sorted(hard) == sorted(easy) == list(range(20))
    random = np.random.default_rng(1)
    sums = [neighbours(random.permutation(20), table) for _ in range(3000)]
    assert neighbours(hard, table) < 1.5 * min(sums) < 1.5 * max(sums) < neighbours(easy, table)
    for i in range(20):
        for j in range(i + 1, 20):
            turned = [*hard[:i], *hard[i : j + 1][::-1], *hard[j + 1 :]]
            assert neighbours(hard, table) <= neighbours(turned, table) + 1e-9


def test_random_reads_no_similarities():
    table = similarities(9, 2)
    assert edge(9, table, **options("random", seed=3)) == edge(9, None, **options("random", seed=3)) != list(range(9))
    assert edge(9, None, **options("hard")) == list(range(9)), "before the backbone is there"
    assert edge(1, np.zeros((1, 1)), **options("hard")) == [0]


class Rows(nn.Module):
    """Feature k is the mean of row k of an image."""

    def forward(self, x):
        return x.mean(dim=(1, 3))


@pytest.mark.parametrize("setting", ["cil", "dil"])
def test_tasks_are_compared_by_the_features_of_their_classes(setting):
    stream = image_stream(setting, (2, 0, 1))
    table = task_similarities(stream, Rows(), "features")
    means = []
    for task in sorted(stream.tasks, key=lambda task: task.id):
        everything = next(task.train.batches(1000))
        rows = [everything.x[everything.y == c] for c in task.classes.tolist()]
        means.append([Rows()(x).double().mean(dim=0).numpy() for x in rows])
    centred = np.array(means) - np.array(means).mean(axis=(0, 1))
    unit = centred / np.linalg.norm(centred, axis=2, keepdims=True)
    expected = np.array([[np.mean(a @ b.T) for b in unit] for a in unit])
    assert np.allclose(table, expected, atol=1e-6) and np.ptp(expected) > 0.1


def test_names_are_compared_by_their_letters():
    names = ("hiragana a", "hiragana ka", "greek xi", "greek pi", "hiragana u", "hiragana ku")
    table = task_similarities(replace(image_stream(order=(1, 2, 0)), class_names=names), Rows(), "names")
    assert np.allclose(table, table.T)
    assert table[0, 2] > 0.5 > 0.2 > table[0, 1], "by task id"
    first, second = (Counter(f"  {n}  "[i : i + 3] for i in range(len(n) + 2)) for n in names[2:4])
    cosine = sum(first[k] * second[k] for k in first) / (first.total() * second.total()) ** 0.5  # no run comes twice
    assert table[1, 1] == pytest.approx((1 + cosine) / 2)
