"""Evaluation counts what its columns say, on logits written down by hand."""

import math

import pytest
import torch
from helpers import Identity, cpu, row_stream
from torch import Tensor

from clrun.data.stream import Stream
from clrun.learning.method import Method
from clrun.running.evaluation import Evaluation


class Given(Method):
    """Its rows are its logits."""

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        return x


FIRST = ([[1.0, 0, 0, 7], [3, 2, 0, 0]], [0, 1])  # logits and labels of the task with the classes 0 and 1
SECOND = ([[0.0, 0, 5, 1], [9, 0, 5, 1], [0, 0, 5, 1]], [2, 2, 3])


def stream() -> Stream:
    return row_stream([(torch.tensor(x), torch.tensor(y)) for x, y in (FIRST, SECOND)], num_classes=4)


def counts(learned: int, size: int = 64, rows: int | None = None) -> dict[tuple[int, str], list[int]]:
    """Return (rows right, rows whose prediction lies in their task, rows) by task and setting."""
    found = Evaluation(cpu(), "test", size, rows)(Given(Identity(4), 4), stream(), learned)
    return {(r["task"], r["setting"]): [r["correct"], r["task_correct"], r["total"]] for r in found}


@pytest.mark.parametrize("size", [1, 2, 64])
def test_counts_by_setting(size: int) -> None:
    # The first row of the first task says 3, which competes from the second task on, class-incrementally.
    assert counts(1, size) == {(0, "cil"): [1, 2, 2], (0, "til"): [1, 2, 2]}
    later = {(0, "cil"): [0, 1, 2], (0, "til"): [1, 2, 2], (1, "cil"): [1, 2, 3], (1, "til"): [2, 3, 3]}
    assert counts(2, size) == later


def test_a_row_without_an_answer_is_wrong_in_every_column() -> None:
    none = float("-inf")
    x, y = torch.tensor([[none] * 4, [none, 0.0, none, none], [none, none, 0.0, none]]), torch.tensor([0, 1, 1])
    tasks = row_stream([(x, y), (torch.zeros(1, 4), torch.tensor([2]))], num_classes=4)
    evaluation, method = Evaluation(cpu(), "test", 64, None), Given(Identity(4), 4)
    rows = {(r["task"], r["setting"]): r for r in evaluation(method, tasks, 2)}
    assert [rows[0, s]["correct"] for s in ("cil", "til")] == [1, 1], "the first row is not of the first class"
    assert [rows[0, s]["task_correct"] for s in ("cil", "til")] == [1, 1]
    floor = -2 * math.log(1e-12) / 3  # two of three rows give their label no probability
    assert [rows[0, s]["nll"] for s in ("cil", "til")] == pytest.approx([floor, floor])
    predicted, _ = evaluation.predictions(method, tasks, 2)
    assert [(r["cil"], r["til"]) for r in predicted[:3]] == [(-1, -1), (1, 1), (2, -1)]


def test_a_label_without_a_score_is_not_among_the_first_five() -> None:
    none = float("-inf")
    x = torch.tensor([[0.0, *[none] * 6], [0.0, *[none] * 6]])
    tasks = row_stream([(x, torch.tensor([0, 1])), (torch.zeros(5, 7), torch.arange(2, 7))], num_classes=7)
    evaluation = Evaluation(cpu(), "test", 64, None)
    evaluation(Given(Identity(7), 7), tasks, 2)
    assert evaluation.at_five["cil"] == pytest.approx((1 / 2 + 3 / 5) / 2)


def test_rows_are_evenly_spaced() -> None:
    assert counts(2, rows=2)[1, "cil"] == [1, 2, 2], "the first and the last row"


def test_likelihood_is_that_of_the_classes_that_compete() -> None:
    found = {
        (r["task"], r["setting"]): r["nll"]
        for r in Evaluation(cpu(), "test", 64, None)(Given(Identity(4), 4), stream(), 2)
    }
    own = [math.log1p(math.exp(-4)), math.log1p(math.exp(-4)), math.log1p(math.exp(4))]
    assert found[1, "til"] == pytest.approx(sum(own) / 3, rel=1e-6)
    among_all = [math.log(sum(map(math.exp, row))) - row[y] for row, y in zip(*SECOND, strict=True)]
    assert found[1, "cil"] == pytest.approx(sum(among_all) / 3, rel=1e-6)


def test_accuracy_is_that_of_the_last_task_learned() -> None:
    evaluation, method, tasks = Evaluation(cpu(), "test", 64, None), Given(Identity(4), 4), stream()
    assert evaluation.accuracy(method, tasks, tasks.tasks[0]) == 1 / 2
    assert evaluation.accuracy(method, tasks, tasks.tasks[1]) == 1 / 3


def test_predictions_agree_with_the_counts() -> None:
    evaluation, method, tasks = Evaluation(cpu(), "test", 2, None), Given(Identity(4), 4), stream()
    rows, logits = evaluation.predictions(method, tasks, len(tasks.tasks))
    assert [(r["task"], r["row"], r["label"], r["cil"], r["til"]) for r in rows] == [
        (0, 0, 0, 3, 0),
        (0, 1, 1, 0, 0),
        (1, 0, 2, 2, 2),
        (1, 1, 2, 0, 2),
        (1, 2, 3, 2, 2),
    ]


def test_accuracy_at_five_is_that_of_the_first_five_candidates() -> None:
    rising = torch.arange(8.0).repeat(4, 1)  # the first five are 7, 6, 5, 4 and 3
    equal = torch.zeros(5, 8)  # the first five are 0, 1, 2, 3 and 4
    several = row_stream([(rising, torch.tensor([0, 1, 2, 3])), (equal, torch.tensor([4, 4, 5, 6, 7]))], 8)
    evaluation = Evaluation(cpu(), "test", 64, None)
    evaluation(Given(Identity(8), 8), several, 1)
    assert evaluation.at_five == {}, "after the last task only"
    evaluation(Given(Identity(8), 8), several, 2)
    assert evaluation.at_five == {"cil": (1 / 4 + 2 / 5) / 2}, "each task has but four candidates of its own"
