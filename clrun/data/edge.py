"""Orders at the extremes of difficulty, from how alike tasks are (EDGE, Lai et al. 2025, arXiv 2509.22580).

EDGE judges learners on a hard, an easy and a random sequence, because random orders rarely meet the extremes: in a hard
one neighbours are unlike, in an easy one alike. Two deviations: tasks are ordered, never regrouped, so that accuracies
compare by task id (EDGE also deals classes to tasks); and classes are compared by features of the frozen backbone or by
the letters of their names, where EDGE embeds the names with CLIP.

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
    """Return the order whose neighbours are least alike (hard), most alike (easy), or a random one.

    The sum of the similarities of neighbours is the smallest, or largest, of all orders up to 7 tasks. Beyond it is
    what reversing stretches of a greedy path makes of the best of its T beginnings. Either direction has the same sum;
    the order begins with the smaller id.

    Args:
        n_tasks: T.
        similarities: [T, T], symmetric; None, as in a check before the run, gives ascending ids.
        kind: which.
        similarity: what `similarities` come from. Features of a backbone that is not pre-trained depend on the seed of
            the run, and so does the order then.
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
    """Return a path from `first`, always on to the cheapest task that is left."""
    path, left = [first], set(range(len(costs))) - {first}
    while left:
        path.append(min(left, key=lambda task: (costs[path[-1], task], task)))
        left.remove(path[-1])
    return path


def _improved(path: list[int], costs: Floats) -> list[int]:
    """Return the path after reversing stretches as long as that makes it cheaper."""
    better, last = True, len(path) - 1
    while better:
        better = False
        for i, j in itertools.combinations(range(len(path)), 2):
            ends = [(path[i - 1], path[i], path[j])] if i else []  # (what stays, its neighbour before and after)
            ends += [(path[j + 1], path[j], path[i])] if j < last else []
            if sum(costs[stays, new] - costs[stays, old] for stays, old, new in ends) < -1e-12:
                path[i : j + 1] = path[i : j + 1][::-1]
                better = True
    return path
