"""Orders at the extremes of difficulty, from how alike tasks are (EDGE, Lai et al. 2025, arXiv 2509.22580).

EDGE judges learners on a hard, an easy and a random sequence, because random orders rarely meet the extremes: in a hard
one neighbours are unlike, in an easy one alike. Two deviations: tasks are ordered, never regrouped, so that accuracies
compare by task id (EDGE also deals classes to tasks); and classes are compared by features of the frozen backbone or by
the letters of their names, where EDGE embeds the names with CLIP.

Shapes: T tasks, C classes, D features.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import nn

from clrun.blocks.params import eval_mode
from clrun.data.orders import canonical, random
from clrun.data.stream import Stream
from clrun.metrics import Floats

EXACT = 7  # tasks up to which every order is compared
ROWS = 100  # of each task and class that are looked at


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


def task_similarities(stream: Stream, backbone: nn.Module, similarity: Literal["features", "names"]) -> Floats:
    """Return [T, T] by task id: the mean cosine of the classes of one task with those of the other.

    Features are class means less their mean over all classes, of at most 100 training rows of a class in a task; names
    are compared by their runs of three letters.
    """
    tasks = sorted(stream.tasks, key=lambda task: task.id)
    if similarity == "names":
        vectors = [_letters([stream.class_names[c] for c in task.classes.tolist()]) for task in tasks]
        shared = sorted({key for own in vectors for key in own})
        rows = np.array([[own.get(key, 0.0) for key in shared] for own in vectors]).reshape(len(tasks), len(shared))
    else:
        means = [_class_means(stream, backbone, task.index) for task in tasks]
        centre = np.concatenate(means).mean(axis=0)
        rows = np.stack([_unit(mean - centre).mean(axis=0) for mean in means])
    return np.asarray(rows @ rows.T, dtype=np.float64)


def _class_means(stream: Stream, backbone: nn.Module, position: int) -> Floats:
    """Return the mean features [k, D] of the classes of a task, float64."""
    task = stream.tasks[position]
    device = next((p.device for p in backbone.parameters()), torch.device("cpu"))
    found = []
    with torch.no_grad(), eval_mode(backbone):
        for label in task.classes.tolist():
            rows = (task.train.y == label).nonzero().flatten()[:ROWS]
            if len(rows):
                images = next(task.train.select(rows).batches(ROWS)).x
                found.append(backbone(images.to(device)).double().mean(dim=0).cpu().numpy())
    return np.stack(found)


def _letters(names: Sequence[str]) -> Mapping[str, float]:
    """Return the mean over names of the unit vectors of their runs of three letters, by run."""
    total: dict[str, float] = defaultdict(float)
    for name in names:
        text = f"  {name.lower().replace('_', ' ')}  "
        runs = Counter(text[i : i + 3] for i in range(len(text) - 2))
        length = sum(count**2 for count in runs.values()) ** 0.5
        for run, count in runs.items():
            total[run] += count / length / len(names)
    return total


def _unit(rows: Floats) -> Floats:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12), dtype=np.float64)


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
