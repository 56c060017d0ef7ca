"""Task orders: functions from the number of tasks T to a list of task ids by position.

Every order is a permutation of 0..T-1, known before the run and saved with it; none reads the seed of the run.
"""

import math
import random as python_random
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from clrun.system.errors import ConfigError, Count, did_you_mean
from clrun.system.seeding import derive

MAX_EXHAUSTIVE = 8  # 8! = 40320 orders; more cannot be run in practice


def canonical(n_tasks: int) -> list[int]:
    """Return the tasks by ascending id."""
    return list(range(n_tasks))


def reverse(n_tasks: int) -> list[int]:
    """Return the tasks by descending id."""
    return list(range(n_tasks))[::-1]


def listed(n_tasks: int, *, tasks: list[int]) -> list[int]:
    """Return the order listed in the configuration.

    Raises:
        ConfigError: `tasks` is not a permutation of the task ids; the message says which are missing or repeated.
    """
    return _permutation("task_order.tasks", tasks, n_tasks)


def preset(n_tasks: int, *, order: str, orders: Mapping[str, list[int]]) -> list[int]:
    """Return the published order of this name.

    Args:
        n_tasks: T.
        order: name of one of the orders.
        orders: orders by name; each file in `conf/task_order` says which tasks its orders permute.

    Raises:
        ConfigError: there is no order of this name, or the stream has another number of tasks.
    """
    if order not in orders:
        hint = did_you_mean(order, orders)
        raise ConfigError(f"task_order.order: no order '{order}'{hint} (available: {', '.join(orders)})")
    if len(orders[order]) != n_tasks:
        raise ConfigError(
            f"task_order.order: order '{order}' permutes {len(orders[order])} tasks, and the stream has "
            f"{n_tasks}; choose another order, or cut the data into {len(orders[order])} tasks (scenario)"
        )
    return _permutation(f"task_order.orders.{order}", orders[order], n_tasks)


def _permutation(key: str, tasks: Sequence[int], n_tasks: int) -> list[int]:
    """Return `tasks` after checking that they are the task ids, each once."""
    counts = Counter(tasks)
    problems = {
        "missing": [t for t in range(n_tasks) if t not in counts],
        "repeated": sorted(t for t, n in counts.items() if n > 1),
        "not a task": sorted(t for t in counts if not 0 <= t < n_tasks),
    }
    found = [f"{what}: {', '.join(map(str, ids))}" for what, ids in problems.items() if ids]
    if found:
        raise ConfigError(f"{key}: must name each of the tasks 0 to {n_tasks - 1} exactly once ({'; '.join(found)})")
    return list(tasks)


def random(n_tasks: int, *, seed: int) -> list[int]:
    """Return a uniformly random order that depends on `seed` only.

    Algorithm: the tasks sorted by a 63-bit hash of (seed, task id), see `clrun.system.seeding.derive`. It uses no
    generator of numpy or torch, so it is the same in every version of them; and two tasks keep their relative order
    when tasks are added.
    """
    return sorted(range(n_tasks), key=lambda task: derive(seed, "task_order", task))


def rotation(n_tasks: int, *, shift: Count) -> list[int]:
    """Return the ascending order that begins at task `shift` and wraps around.

    Raises:
        ConfigError: `shift` is not smaller than the number of tasks and would repeat another rotation.
    """
    _below("task_order.shift", shift, n_tasks, f"{n_tasks} tasks have {n_tasks} rotations")
    return [(shift + position) % n_tasks for position in range(n_tasks)]


def williams(n_tasks: int, *, row: Count) -> list[int]:
    """Return one row of the Williams design of T tasks (Williams, Australian Journal of Scientific Research A2, 1949).

    Over all rows (T when T is even, 2 T when it is odd) each task stands at each position equally often, and each
    ordered pair of tasks is adjacent equally often: averages over the design are free of position and first-order
    carry-over effects. Row 0 is 0, 1, T-1, 2, T-2, ...; row r adds r modulo T; for odd T the rows from T on are the
    first T reversed.

    Raises:
        ConfigError: the design has no such row.
    """
    rows = n_tasks if n_tasks % 2 == 0 else 2 * n_tasks
    _below("task_order.row", row, rows, f"the Williams design of {n_tasks} tasks has {rows} rows")
    zigzag = [(p + 1) // 2 if p % 2 else (n_tasks - p // 2) % n_tasks for p in range(n_tasks)]
    order = [(task + row) % n_tasks for task in zigzag]
    return order if row < n_tasks else order[::-1]


def exhaustive(n_tasks: int, *, index: Count) -> list[int]:
    """Return permutation number `index` of all T! in lexicographic order.

    Raises:
        ConfigError: there are more than 8 tasks, or no such permutation.
    """
    if n_tasks > MAX_EXHAUSTIVE:
        raise ConfigError(
            f"task_order=exhaustive: {n_tasks} tasks have {math.factorial(n_tasks)} orders (at most {MAX_EXHAUSTIVE} "
            "tasks are allowed); use task_order=williams or task_order=random"
        )
    total = math.factorial(n_tasks)
    _below("task_order.index", index, total, f"{n_tasks} tasks have {total} orders")
    left, order = list(range(n_tasks)), []
    for position in range(n_tasks, 0, -1):
        digit, index = divmod(index, math.factorial(position - 1))
        order.append(left.pop(digit))
    return order


def _below(key: str, value: int, limit: int, why: str) -> None:
    """Refuse a `value` outside 0..limit-1."""
    if not 0 <= value < limit:
        raise ConfigError(f"{key}: must be between 0 and {limit - 1}, got {value} ({why})")


def numpy_permutation(count: int, seed: int) -> list[int]:
    """Return what np.random.seed(seed); np.random.permutation(count) gives: the class orders of iCaRL, PyCIL and PILOT.

    NumPy keeps this stream for all versions (NEP 19).
    """
    return [int(k) for k in np.random.RandomState(seed).permutation(count)]


def python_permutation(count: int, seed: int) -> list[int]:
    """Return what random.seed(seed); random.shuffle(list(range(count))) gives: the orders of CODA-Prompt and HALRP."""
    order = list(range(count))
    python_random.Random(seed).shuffle(order)
    return order
