"""Orders at the extremes of difficulty, from the similarity of tasks (EDGE, Lai et al. 2025, arXiv 2509.22580).

EDGE judges learners on a hard, an easy and a random sequence, because random orders rarely reach the extremes. In a
hard order neighbouring tasks are dissimilar, in an easy order they are similar. Two deviations: tasks are ordered and
never regrouped, so that accuracies can be compared by task id (EDGE also distributes the classes over the tasks); and
classes are compared by features of the frozen backbone or by the letters of their names, where EDGE embeds the names
with CLIP.

Shapes: T tasks, C classes, D features.
"""

import itertools
from collections.abc import Sequence
from typing import Literal

from clrun.data.orders import canonical, random
from clrun.results.metrics import Floats

EXACT = 7  # tasks up to which every order is compared


def edge(
    n_tasks: int,
    similarities: Floats | None = None,
    *,
    kind: Literal["hard", "easy", "random"],
    similarity: Literal["features", "names"],
    seed: int,
) -> list[int]:
    """Return the order whose neighbours are least similar (hard) or most similar (easy), or a random order.

    Up to 7 tasks, the sum of the similarities of neighbours is the smallest, or largest, of all orders. Beyond that a
    greedy path from each of the T tasks is improved by reversing stretches (2-opt), and the best result is returned. An
    order and its reverse have the same sum; the returned one begins with the smaller id.

    Args:
        n_tasks: T.
        similarities: [T, T], symmetric. None gives ascending ids, for checks before the run.
        kind: the kind of order.
        similarity: the source of `similarities`. The features of a backbone that is not pre-trained depend on the seed
            of the run, and then the order does, too.
        seed: of the random order.
    """
    if kind == "random":
        return random(n_tasks, seed=seed)
    if similarities is None or n_tasks < 2:
        return canonical(n_tasks)
    costs = similarities if kind == "hard" else -similarities
    if n_tasks <= EXACT:
        paths = [p for p in itertools.permutations(range(n_tasks)) if p[0] < p[-1]]
    else:
        paths = [tuple(_improved(_greedy(costs, first), costs)) for first in range(n_tasks)]
    best = min(paths, key=lambda path: round(_cost(path, costs), 9))
    return list(best if best[0] < best[-1] else best[::-1])


def _cost(path: Sequence[int], costs: Floats) -> float:
    return float(costs[path[:-1], path[1:]].sum())


def _greedy(costs: Floats, first: int) -> list[int]:
    """Return the path from `first` that always goes on to the cheapest remaining task."""
    path, left = [first], set(range(len(costs))) - {first}
    while left:
        path.append(min(left, key=lambda task: (costs[path[-1], task], task)))
        left.remove(path[-1])
    return path


def _improved(path: list[int], costs: Floats) -> list[int]:
    """Return the path after reversing stretches (2-opt) until no reversal makes it cheaper."""
    better, last = True, len(path) - 1
    while better:
        better = False
        for i, j in itertools.combinations(range(len(path)), 2):
            ends = (
                [(path[i - 1], path[i], path[j])] if i else []
            )  # (the fixed task, its neighbour before and after the reversal)
            ends += [(path[j + 1], path[j], path[i])] if j < last else []
            if sum(costs[stays, new] - costs[stays, old] for stays, old, new in ends) < -1e-12:
                path[i : j + 1] = path[i : j + 1][::-1]
                better = True
    return path
