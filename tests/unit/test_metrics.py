"""Metrics against the worked numbers of the definitions, and the relations that hold for every run."""

import math

import numpy as np
import pytest

from clrun.results.metrics import (
    METRICS,
    UNSEEN,
    AccuracyMatrix,
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    harmonic_accuracy,
    learning_accuracy,
    matrix_average,
    seen_accuracy,
    summary,
    transfer,
    unseen_accuracy,
    worst_task,
    zero_shot_degradation,
)

EXAMPLE = np.array(
    [
        [0.10, 0.12, 0.08, 0.10],
        [0.90, 0.20, 0.10, 0.12],
        [0.80, 0.85, 0.15, 0.10],
        [0.84, 0.88, 0.80, 0.20],
        [0.70, 0.90, 0.74, 0.86],
    ]
)
TOTAL = np.array([100, 300, 100, 100])


def matrix(accuracy: np.ndarray, total: int | np.ndarray = 100, order: tuple[int, ...] | None = None) -> AccuracyMatrix:
    """Return the counts of [T+1, T] accuracies; with [T, T] the untrained row is missing."""
    tasks = accuracy.shape[1]
    if len(accuracy) == tasks:
        accuracy = np.vstack([np.full(tasks, np.nan), accuracy])
    totals = np.broadcast_to(np.asarray(total, dtype=np.int64), (tasks,))
    return AccuracyMatrix(accuracy * totals, totals, order or tuple(range(tasks)))


def learned_only(accuracy: np.ndarray) -> np.ndarray:
    """Blank what a class-incremental run cannot evaluate: the untrained row and tasks not learned yet."""
    blank = np.where(np.tri(*accuracy[1:].shape, dtype=bool), accuracy[1:], np.nan)
    return np.vstack([np.full(accuracy.shape[1], np.nan), blank])


def random_matrices(count: int = 200) -> list[AccuracyMatrix]:
    rng = np.random.default_rng(0)
    cases = []
    for _ in range(count):
        tasks = int(rng.integers(2, 9))
        total = rng.integers(1, 400, tasks)
        correct = np.floor(rng.random((tasks + 1, tasks)) * (total + 1))
        if rng.random() < 0.5:
            correct = learned_only(correct)
        cases.append(AccuracyMatrix(correct, total, tuple(rng.permutation(tasks).tolist())))
    return cases


def row(position: int, task: int, task_position: int, correct: int, **changes: object) -> dict[str, object]:
    content: dict[str, object] = {
        "step": 10 * position,
        "position": position,
        "after": 0,
        "task": task,
        "task_position": task_position,
        "split": "test",
        "setting": "cil",
        "correct": correct,
        "total": 8,
        "task_correct": correct,
        "nll": 0.5,
        "phase": "end",
    }
    return content | changes


def test_worked_example():
    m = matrix(EXAMPLE, TOTAL)
    assert [average_accuracy(m, k) for k in (1, 2, 3, 4)] == pytest.approx([0.90, 0.825, 0.84, 0.80])
    assert average_accuracy(m) == pytest.approx(0.80)
    assert average_incremental_accuracy(m) == pytest.approx(0.84125)
    assert forgetting(m) == pytest.approx(0.08)
    assert [forgetting(m, k) for k in (2, 3)] == pytest.approx([0.10, 0.015])
    assert backward_transfer(m) == pytest.approx(-0.07)
    assert forward_transfer(m) == pytest.approx(0.25 / 3)
    assert learning_accuracy(m) == pytest.approx(0.8525)
    assert worst_task(m) == pytest.approx(0.70)


def test_forgetting_leaves_the_last_row_out_of_its_maximum():
    m = matrix(np.array([[0.5, np.nan], [0.9, 0.8]]))
    assert forgetting(m) == pytest.approx(-0.4)


def test_forgetting_skips_rows_that_were_not_evaluated():
    whole, blank = matrix(EXAMPLE), EXAMPLE.copy()
    blank[2, 0] = np.nan
    assert forgetting(matrix(blank)) == forgetting(whole)


def test_one_task_has_neither_forgetting_nor_transfer():
    m = matrix(np.array([[0.5]]))
    assert all(math.isnan(f(m)) for f in (forgetting, backward_transfer, forward_transfer))
    assert math.isnan(forgetting(matrix(EXAMPLE), 1))
    assert average_accuracy(m) == average_incremental_accuracy(m) == learning_accuracy(m) == worst_task(m) == 0.5


def test_forward_transfer_needs_the_untrained_row_and_unseen_tasks():
    assert math.isnan(forward_transfer(matrix(learned_only(EXAMPLE))))
    without_start = EXAMPLE.copy()
    without_start[0] = np.nan
    assert math.isnan(forward_transfer(matrix(without_start)))


@pytest.mark.parametrize(
    ("cell", "broken"),
    [
        (
            (4, 2),
            {"average_accuracy", "average_incremental_accuracy", "forgetting", "backward_transfer", "worst_task"}
            | {"matrix_average"},
        ),
        (
            (2, 1),
            {"average_incremental_accuracy", "learning_accuracy", "backward_transfer", *UNSEEN} - {"transfer"},
        ),
        ((0, 3), {"forward_transfer"}),
        ((3, 3), {"forward_transfer", *UNSEEN}),
    ],
)
def test_a_missing_cell_makes_what_needs_it_none_and_nothing_else(cell, broken):
    accuracy = EXAMPLE.copy()
    accuracy[cell] = np.nan
    values, whole = summary(matrix(accuracy)), summary(matrix(EXAMPLE))
    assert {name for name, value in values.items() if value is None} == broken
    assert all(values[name] == whole[name] for name in set(METRICS) - broken)


def test_summary_has_the_metrics_of_run_json():
    assert tuple(summary(matrix(EXAMPLE))) == METRICS
    assert summary(matrix(learned_only(EXAMPLE)))["forward_transfer"] is None


def test_relations_of_any_run():
    for m in random_matrices():
        tasks = len(m.order)
        gap = average_accuracy(m) - learning_accuracy(m)
        assert gap == pytest.approx((tasks - 1) / tasks * backward_transfer(m))
        assert forgetting(m) >= -backward_transfer(m) - 1e-12
        for value in (average_accuracy(m), average_incremental_accuracy(m), learning_accuracy(m)):
            assert 0 <= value <= 1
        assert worst_task(m) <= average_accuracy(m)
        renamed = AccuracyMatrix(m.correct, m.total, tuple(i + 7 for i in m.order))
        assert summary(renamed) == summary(m)


def test_average_accuracy_does_not_depend_on_the_order_of_columns_but_forgetting_does():
    m = matrix(EXAMPLE)
    shuffled = matrix(EXAMPLE[:, [3, 1, 0, 2]])
    assert average_accuracy(shuffled) == pytest.approx(average_accuracy(m))
    assert forgetting(shuffled) != pytest.approx(forgetting(m))
    assert backward_transfer(shuffled) != pytest.approx(backward_transfer(m))


def test_nothing_forgotten():
    diagonal = np.array([0.9, 0.8, 0.7])
    m = matrix(np.where(np.tri(3, dtype=bool), diagonal, np.nan))
    assert forgetting(m) == backward_transfer(m) == 0
    assert average_accuracy(m) == learning_accuracy(m)


def test_the_metrics_of_unseen_tasks_by_hand():
    m = matrix(np.array([[0.1, 0.1, 0.1], [0.9, 0.4, 0.2], [0.7, 0.8, 0.6], [0.5, 0.7, 1.0]]))
    assert transfer(m) == pytest.approx((0.4 + (0.2 + 0.6) / 2) / 2)
    assert matrix_average(m) == pytest.approx((0.9 + 0.4 + 0.2 + 0.7 + 0.8 + 0.6 + 0.5 + 0.7 + 1.0) / 9)
    rows = AccuracyMatrix(np.array([[0, 0], [8, 1], [6, 5]], dtype=float), np.array([10, 5]), (0, 1))
    assert seen_accuracy(rows) == 0.8 and unseen_accuracy(rows) == 0.2
    assert harmonic_accuracy(rows) == pytest.approx(2 * 0.8 * 0.2)
    same = matrix(
        np.array([[0.2, 0.4, 0.9]] * 4)
    )  # a method that nothing changes: Transfer is the mean of columns 2..T
    assert transfer(same) == pytest.approx(0.65) and matrix_average(same) == pytest.approx(average_accuracy(same))


def test_zero_shot_degradation_is_the_mean_loss_of_the_data_sets():
    counts = [{"a": [8, 10], "b": [3, 4]}, {"a": [9, 10], "b": [0, 4]}, {"a": [6, 10], "b": [2, 4]}]
    assert zero_shot_degradation(counts) == pytest.approx((0.2 + 0.25) / 2)


def test_constant_accuracy():
    m = matrix(np.full((4, 4), 0.25))
    assert average_accuracy(m) == average_incremental_accuracy(m) == learning_accuracy(m) == worst_task(m) == 0.25
    assert forgetting(m) == backward_transfer(m) == 0


def test_rows_become_the_matrix_and_map_to_task_ids():
    rows = [row(1, 7, 0, 6), row(2, 7, 0, 2), row(2, 3, 1, 8), row(2, 7, 0, 1, phase="during")]
    m = AccuracyMatrix.from_rows(rows, order=(7, 3))
    np.testing.assert_array_equal(m.by_position(), [[np.nan, np.nan], [0.75, np.nan], [0.25, 1.0]])
    assert m.final() == {7: 0.25, 3: 1.0}
    assert m.total.tolist() == [8, 8]


def test_an_unfinished_run_has_no_final_metrics():
    m = AccuracyMatrix.from_rows([row(1, 7, 0, 6)], order=(7, 3))
    assert set(summary(m).values()) == {None}
    assert average_accuracy(m, 1) == 0.75


@pytest.mark.parametrize(
    "rows",
    [
        [row(1, 5, 0, 1)],
        [row(3, 7, 0, 1)],
        [row(1, 7, 2, 1)],
        [row(1, 7, 0, 9)],
        [row(1, 7, 0, 1), row(1, 7, 0, 1)],
        [row(1, 7, 0, 1), row(2, 7, 0, 1, total=9)],
    ],
)
def test_rows_that_contradict_are_refused(rows):
    with pytest.raises(ValueError, match="position"):
        AccuracyMatrix.from_rows(rows, order=(7, 3))


def test_class_incremental_accuracy_is_task_inference_times_accuracy_within_the_task():
    logits = np.array(
        [[4, 1, 0, 0], [1, 3, 2, 0], [2, 0, 3, 1], [0, 2, 1, 3], [0, 1, 2, 4], [1, 0, 4, 3], [3, 0, 2, 1], [0, 0, 1, 2]]
    )
    labels = np.array([0, 1, 0, 1, 3, 3, 2, 3])
    task = labels // 2
    choice = logits.argmax(axis=1)
    own = np.where(np.arange(4)[None] // 2 == task[:, None], logits, -1).argmax(axis=1)
    rows = []
    for t in (0, 1):
        mine = task == t
        inferred = int((choice[mine] // 2 == t).sum())
        counts = {"total": int(mine.sum()), "task_correct": inferred}
        rows.append(row(2, t, t, int((choice == labels)[mine].sum()), **counts))
        rows.append(row(2, t, t, int((own == labels)[mine].sum()), **counts, setting="til"))
    cil, til = rows[::2], rows[1::2]
    accuracy = AccuracyMatrix.from_rows(cil, order=(0, 1))
    inference = AccuracyMatrix.from_rows(cil, order=(0, 1), count="task_correct")
    assert list(accuracy.final().values()) == [0.5, 0.5]
    assert list(AccuracyMatrix.from_rows(til, order=(0, 1)).final().values()) == [1.0, 0.75]
    assert list(inference.final().values()) == [0.5, 0.75]
    assert average_accuracy(inference) == 0.625
    within = accuracy.correct[-1].sum() / inference.correct[-1].sum()
    assert within == pytest.approx(0.8)
    assert average_accuracy(inference) * within == pytest.approx(average_accuracy(accuracy))
