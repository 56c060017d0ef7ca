from collections import Counter
from itertools import permutations

import pytest

from clrun.data import orders
from clrun.system.errors import ConfigError


@pytest.mark.parametrize("n_tasks", [1, 2, 5, 31])
def test_every_order_is_a_permutation(n_tasks: int) -> None:
    found = [
        orders.canonical(n_tasks),
        orders.reverse(n_tasks),
        orders.listed(n_tasks, tasks=list(range(n_tasks))),
        orders.random(n_tasks, seed=3),
        orders.rotation(n_tasks, shift=n_tasks - 1),
        orders.williams(n_tasks, row=n_tasks - 1),
    ]
    assert all(sorted(order) == list(range(n_tasks)) for order in found)


def test_simple_orders() -> None:
    assert orders.canonical(4) == [0, 1, 2, 3]
    assert orders.reverse(4) == [3, 2, 1, 0]
    assert orders.rotation(4, shift=0) == [0, 1, 2, 3]
    assert orders.rotation(4, shift=3) == [3, 0, 1, 2]
    assert orders.listed(4, tasks=[2, 0, 3, 1]) == [2, 0, 3, 1]


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ([0, 0, 2], "missing: 1, 3; repeated: 0"),
        ([0, 1, 2, 3, 4], "not a task: 4"),
        ([3, 2, -1, 0], "missing: 1; not a task: -1"),
        ([0, 1, 2, 3, 3], "repeated: 3"),
        ([], "missing: 0, 1, 2, 3"),
    ],
)
def test_listed_says_which_tasks_are_wrong(tasks: list[int], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        orders.listed(4, tasks=tasks)
    assert str(error.value) == f"task_order.tasks: must name each of the tasks 0 to 3 exactly once ({said})"


def test_random_is_stable() -> None:
    assert orders.random(10, seed=0) == [9, 4, 3, 1, 5, 8, 2, 0, 6, 7]
    assert orders.random(10, seed=1) == [5, 9, 6, 8, 1, 7, 2, 3, 0, 4]


def test_random_keeps_relative_order_when_tasks_are_added() -> None:
    longer = orders.random(20, seed=5)
    assert [task for task in longer if task < 7] == orders.random(7, seed=5)


def test_random_is_uniform() -> None:
    counts = Counter(tuple(orders.random(3, seed=seed)) for seed in range(1200))
    statistic = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert len(counts) == 6
    assert statistic < 20.5  # chi-square with 5 degrees of freedom: exceeded once in 1000 draws


@pytest.mark.parametrize("n_tasks", range(2, 16))
def test_williams_is_balanced(n_tasks: int) -> None:
    rows = n_tasks if n_tasks % 2 == 0 else 2 * n_tasks
    square = [orders.williams(n_tasks, row=row) for row in range(rows)]
    assert len({tuple(order) for order in square}) == rows
    at = Counter((position, task) for order in square for position, task in enumerate(order))
    assert set(at.values()) == {rows // n_tasks} and len(at) == n_tasks**2
    neighbours = Counter(pair for order in square for pair in zip(order, order[1:], strict=False))
    assert set(neighbours.values()) == {rows // n_tasks} and len(neighbours) == n_tasks * (n_tasks - 1)


def test_presets_are_named() -> None:
    found = {"A": [0, 1, 2], "B": [2, 0, 1]}
    assert orders.preset(3, order="B", orders=found) == [2, 0, 1]
    for tasks, order, said in (
        (3, "C", "task_order.order: no order 'C' (available: A, B)"),
        (
            4,
            "B",
            "task_order.order: order 'B' permutes 3 tasks, and the stream has 4; choose another order, or cut "
            "the data into 3 tasks (scenario)",
        ),
    ):
        with pytest.raises(ConfigError) as error:
            orders.preset(tasks, order=order, orders=found)
        assert str(error.value) == said
    with pytest.raises(ConfigError, match="^task_order.orders.A: must name each .* repeated: 1"):
        orders.preset(2, order="A", orders={"A": [1, 1]})


def test_williams_of_four_is_the_published_square() -> None:
    square = [orders.williams(4, row=row) for row in range(4)]
    assert square == [[0, 1, 3, 2], [1, 2, 0, 3], [2, 3, 1, 0], [3, 0, 2, 1]]


def test_exhaustive_is_lexicographic() -> None:
    for n_tasks, count in ((1, 1), (3, 6), (5, 120)):
        found = [tuple(orders.exhaustive(n_tasks, index=index)) for index in range(count)]
        assert found == list(permutations(range(n_tasks)))
    assert orders.exhaustive(8, index=40319) == [7, 6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize(
    ("call", "key"),
    [
        (lambda: orders.rotation(4, shift=4), "task_order.shift: must be between 0 and 3, got 4"),
        (lambda: orders.williams(4, row=4), "task_order.row: must be between 0 and 3, got 4"),
        (lambda: orders.williams(5, row=10), "task_order.row: must be between 0 and 9, got 10"),
        (lambda: orders.exhaustive(3, index=6), "task_order.index: must be between 0 and 5, got 6"),
        (lambda: orders.exhaustive(9, index=0), "task_order=exhaustive: 9 tasks have 362880 orders"),
    ],
)
def test_out_of_range_is_refused(call, key: str) -> None:
    with pytest.raises(ConfigError) as error:
        call()
    assert str(error.value).startswith(key)
