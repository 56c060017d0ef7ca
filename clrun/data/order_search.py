"""The search for the task order with the lowest final accuracy: first a design of orders, then moves chosen by a model.

The search proposes orders and receives their accuracies; `clrun.running.worst_order` runs them. The proposals depend
only on the seed and on the accuracies received, so that a search can be replayed.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clrun.data.orders import random, williams
from clrun.system.errors import ConfigError, PositiveInt
from clrun.system.seeding import derive

Order = tuple[int, ...]
NEAR = 500  # moves that are compared; if there are more, a random choice of them
RIDGE = 0.1  # penalty of the model, relative to the mean squared length of its inputs
DIGITS = 9  # decimals of a prediction that are compared, so that rounding errors do not decide


def adversarial(
    n_tasks: int, *, budget: PositiveInt, starts: PositiveInt, patience: PositiveInt, seed: int, reuse: list[str]
) -> list[int]:
    """Return the first order that the search tries; `clrun.running.worst_order` continues the search.

    Args:
        n_tasks: T.
        budget: number of runs that the search may start; finished runs that are reused do not count.
        starts: orders tried before the first move: rows of the Williams design, then random ones.
        patience: number of moves from one order without a worse one, after which the next-worst order is changed.
        seed: seed of the search, independent of the seed of the runs.
        reuse: folders with finished runs that differ from those of the search in the task order alone.

    Raises:
        ConfigError: a folder does not exist.
    """
    for folder in reuse:
        if not Path(folder).is_dir():
            raise ConfigError(f"task_order.reuse: no such folder: {folder}")
    first = OrderSearch(n_tasks, starts=starts, patience=patience, seed=seed).propose()
    assert first is not None
    return list(first.order)


@dataclass(frozen=True)
class Proposal:
    """An order to try.

    Attributes:
        order: task ids by position.
        source: "design", "random" or "move".
        move: the move in words, with positions from 1; "" for no move.
        parent: the order that was changed; None for no move.
    """

    order: Order
    source: str
    move: str = ""
    parent: Order | None = None


class OrderSearch:
    """Local search, the worst order first.

    The orders of a design come first. Then the worst known order is changed by one move: two tasks are swapped, or one
    task is put at another position. Of all untried orders that are one move away, the one with the lowest predicted
    accuracy is proposed. The prediction is a ridge regression on all accuracies so far; its inputs are the position
    of each task, the pairs of adjacent tasks, and for each pair which task comes first. If `patience` moves from an
    order find no worse one, the next-worst order is changed; if none is left, a random order follows.

    Args:
        n_tasks: T.
        starts: number of orders of the design.
        patience: number of moves from one order without a worse one.
        seed: seed of the search.
    """

    def __init__(self, n_tasks: int, *, starts: int, patience: int, seed: int) -> None:
        self.n_tasks, self.patience, self.seed = n_tasks, patience, seed
        self.accuracies: dict[Order, float] = {}  # NaN for a failed run
        self.fruitless: Counter[Order] = Counter()
        self.design = list(_design(n_tasks, starts, seed))

    def add_known(self, order: Order, accuracy: float) -> None:
        """Record the accuracy of an order that was run before the search."""
        self.accuracies[order] = accuracy

    def add_result(self, proposal: Proposal, accuracy: float) -> None:
        """Record the accuracy of a proposed order; NaN if its run failed."""
        self.accuracies[proposal.order] = accuracy
        if proposal.parent is not None and not accuracy < self.accuracies[proposal.parent]:
            self.fruitless[proposal.parent] += 1

    def worst(self) -> Order | None:
        """Return the order with the lowest accuracy, the first of several; None if there is none."""
        known = [order for order, accuracy in self.accuracies.items() if not math.isnan(accuracy)]
        return min(known, key=self.accuracies.__getitem__, default=None)

    def propose(self) -> Proposal | None:
        """Return the next order to try; None if all were tried."""
        if len(self.accuracies) >= math.factorial(self.n_tasks):
            return None
        while self.design:
            proposal = self.design.pop(0)
            if proposal.order not in self.accuracies:
                return proposal
        return self._move() or self._random()

    def _move(self) -> Proposal | None:
        known = [order for order, accuracy in self.accuracies.items() if not math.isnan(accuracy)]
        for parent in sorted(known, key=self.accuracies.__getitem__):
            if self.fruitless[parent] < self.patience:
                near = {order: move for order, move in moves(parent).items() if order not in self.accuracies}
                if near:
                    chosen = sorted(near, key=lambda order: derive(self.seed, "move", *order))[:NEAR]
                    order = chosen[int(np.argmin(self._predicted(known, chosen)))]
                    return Proposal(order, "move", near[order], parent)
        return None

    def _predicted(self, known: Sequence[Order], asked: Sequence[Order]) -> np.ndarray:
        """Return the predicted accuracies of the orders `asked`, minus the mean of the known accuracies."""
        inputs = np.stack([_inputs(order) for order in known])
        accuracies = np.array([self.accuracies[order] for order in known])
        products = inputs @ inputs.T
        penalty = RIDGE * products.diagonal().mean() * np.eye(len(known))
        weights = inputs.T @ np.linalg.solve(products + penalty, accuracies - accuracies.mean())
        predicted: np.ndarray = np.round(np.stack([_inputs(order) for order in asked]) @ weights, DIGITS)
        return predicted

    def _random(self) -> Proposal:
        draw = 0
        while (order := _drawn(self.n_tasks, self.seed, draw)) in self.accuracies:
            draw += 1
        return Proposal(order, "random")


def _inputs(order: Order) -> np.ndarray:
    """Return the inputs of the regression, [3 T^2]: position, successor and precedence, scaled to the same norm."""
    tasks = np.array(order)
    places = np.argsort(tasks)
    stands, follows = np.zeros((2, len(order), len(order)))
    stands[tasks, places[tasks]] = 1
    follows[tasks[:-1], tasks[1:]] = 1
    before = (places[:, None] < places[None, :]) / math.sqrt(len(order) / 2)
    return np.concatenate([stands.ravel(), follows.ravel(), before.ravel()])


def moves(order: Order) -> Mapping[Order, str]:
    """Return all orders that are one move away from `order`, each with the move in words."""
    found: dict[Order, str] = {}
    places = range(len(order))
    for i in places:
        for j in places[i + 1 :]:
            swapped = list(order)
            swapped[i], swapped[j] = order[j], order[i]
            found.setdefault(tuple(swapped), f"tasks at {i + 1} and {j + 1} swapped")
    for i in places:
        for j in places:
            put = [*order[:i], *order[i + 1 :]]
            put.insert(j, order[i])
            found.setdefault(tuple(put), f"task at {i + 1} put at {j + 1}")
    found.pop(order, None)
    return found


def _design(n_tasks: int, starts: int, seed: int) -> Iterator[Proposal]:
    """Yield `starts` different orders: rows of the Williams design in the order of a hash, then random ones."""
    rows = n_tasks if n_tasks % 2 == 0 else 2 * n_tasks
    chosen = sorted(range(rows), key=lambda row: derive(seed, "williams", row))
    found = dict.fromkeys(tuple(williams(n_tasks, row=row)) for row in chosen)
    yield from (Proposal(order, "design") for order in list(found)[:starts])
    draw = 0
    while len(found) < min(starts, math.factorial(n_tasks)):
        order = _drawn(n_tasks, seed, draw)
        draw += 1
        if order not in found:
            found[order] = None
            yield Proposal(order, "random")


def _drawn(n_tasks: int, seed: int, draw: int) -> Order:
    return tuple(random(n_tasks, seed=derive(seed, "draw", draw)))
