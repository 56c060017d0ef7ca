"""Metrics of one run as pure functions of its accuracy matrix.

R[i, j] is the accuracy after learning i tasks on the j-th task learned, T is the number of tasks, and b_j = R[0, j] is
the accuracy of the untrained model. Formulas count rows and columns from 1, as the papers do. Accuracies are fractions.
A cell that was not evaluated is NaN and makes every metric that needs it NaN, never 0.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Row = Mapping[str, Any]  # one line of accuracy.csv; its columns are described in clrun.results.records


@dataclass(frozen=True)
class AccuracyMatrix:
    """Numbers of correct answers on one split in one setting.

    Attributes:
        correct: [T+1, T] counts as float64; the row is the number of tasks learned (0: untrained), the column the
            position of the evaluated task; NaN where it was not evaluated.
        total: [T] number of samples of each task; 0 where the task was never evaluated.
        order: task id of each column.
    """

    correct: Floats
    total: npt.NDArray[np.int64]
    order: tuple[int, ...]

    @classmethod
    def from_rows(
        cls, rows: Iterable[Row], *, order: Sequence[int], count: Literal["correct", "task_correct"] = "correct"
    ) -> Self:
        """Build the matrix from the rows of one split and setting; rows of phase "during" are left out.

        Args:
            rows: lines of accuracy.csv.
            order: task ids by position.
            count: the column to read. "task_correct" gives the matrix of task inference: the number of samples whose
                predicted class belongs to their task. In the class-incremental setting correct / task_correct is the
                accuracy within the task.

        Raises:
            ValueError: a row contradicts the order or another row, or counts more correct answers than samples.
        """
        names = ("position", "task_position", "task", count, "total")
        return cls.from_cells(([row[name] for name in names] for row in rows if row["phase"] == "end"), order=order)

    @classmethod
    def from_cells(cls, cells: Iterable[Sequence[int]], *, order: Sequence[int]) -> Self:
        """Build the matrix from (position, task position, task, correct, total) of each cell; see `from_rows`."""
        tasks = len(order)
        # Lists: a report fills a million cells one by one, which takes several times longer in an array.
        correct = [[math.nan] * tasks for _ in range(tasks + 1)]
        total = [0] * tasks
        for i, j, task, right, rows in cells:
            if not (0 <= i <= tasks and 0 <= j < tasks) or order[j] != task:
                raise ValueError(f"position {i}, task {task} at {j}: does not fit the order {list(order)}")
            if not math.isnan(correct[i][j]) or total[j] not in (0, rows) or not 0 <= right <= rows:
                raise ValueError(f"position {i}, task {task}: stands there twice, or its counts contradict each other")
            correct[i][j], total[j] = right, rows
        counts = np.array(correct, dtype=np.float64).reshape(tasks + 1, tasks)
        return cls(counts, np.array(total, dtype=np.int64), tuple(order))

    def by_position(self) -> Floats:
        """Return [T+1, T] accuracies; column j is the j-th task learned."""
        rows = np.where(self.total > 0, self.total, np.nan)
        return np.asarray(self.correct / rows, dtype=np.float64)

    def final(self) -> dict[int, float]:
        """Return the accuracy after the last task by task id."""
        return dict(zip(self.order, self.by_position()[-1].tolist(), strict=True))


def average_accuracy(m: AccuracyMatrix, after: int | None = None) -> float:
    """Return A_k = mean_{j<=k} R[k, j] (Lopez-Paz and Ranzato 2017); `after` is k, by default T."""
    k = len(m.order) if after is None else after
    return float(m.by_position()[k, :k].mean()) if k else math.nan


def average_incremental_accuracy(m: AccuracyMatrix) -> float:
    """Return mean_k A_k over k = 1..T (iCaRL, Rebuffi et al. 2017; PILOT prints it as "average accuracy").

    Each A_k gives all tasks the same weight, whatever their number of test samples.
    """
    accuracy = m.by_position()
    return _mean(accuracy[k, :k].mean() for k in range(1, len(m.order) + 1))


def learning_accuracy(m: AccuracyMatrix) -> float:
    """Return mean_j R[j, j], the accuracy on each task right after it was learned (MER, Riemer et al. 2019)."""
    return _mean(np.diagonal(m.by_position()[1:]))


def forgetting(m: AccuracyMatrix, after: int | None = None) -> float:
    """Return F_k = mean_{j<k} (max_{1<=l<k} R[l, j] - R[k, j]) (Chaudhry et al. 2018, RWalk).

    The last row is not part of the maximum, so that F can be negative; cells that were not evaluated are left out of
    the maximum. NaN for k = 1, where nothing can have been forgotten.
    """
    k = len(m.order) if after is None else after
    accuracy = m.by_position()[1 : k + 1, : max(0, k - 1)]
    return _mean(np.fmax.reduce(accuracy[:-1]) - accuracy[-1]) if k > 1 else math.nan


def backward_transfer(m: AccuracyMatrix) -> float:
    """Return mean_{j<T} (R[T, j] - R[j, j]) (Lopez-Paz and Ranzato 2017); NaN for one task."""
    accuracy = m.by_position()[1:]
    return _mean((accuracy[-1] - np.diagonal(accuracy))[:-1]) if len(m.order) > 1 else math.nan


def forward_transfer(m: AccuracyMatrix) -> float:
    """Return mean_{j>=2} (R[j-1, j] - b_j) (Lopez-Paz and Ranzato 2017), b_j from the untrained model of the same run.

    NaN for one task and where unseen tasks are not evaluated: job.eval_initial does so in the domain-incremental
    setting, job.eval_unseen for methods that know classes by their names.
    """
    accuracy = m.by_position()
    return _mean((np.diagonal(accuracy) - accuracy[0])[1:]) if len(m.order) > 1 else math.nan


def transfer(m: AccuracyMatrix) -> float:
    """Return mean_{j>=2} mean_{1<=i<j} R[i, j], the accuracy on tasks not learned yet (ZSCL, Zheng et al. 2023).

    It is an absolute accuracy, not a gain as `forward_transfer`; the untrained model is no part of it. NaN for one task
    and where unseen tasks are not evaluated (job.eval_unseen).
    """
    accuracy = m.by_position()[1:]
    return _mean(accuracy[:j, j].mean() for j in range(1, len(m.order)))


def matrix_average(m: AccuracyMatrix) -> float:
    """Return mean_{1<=i<=T, 1<=j<=T} R[i, j], over learned and unseen tasks alike ("Avg." of ZSCL's protocol MTIL).

    "Last" of that protocol is `average_accuracy`. NaN where unseen tasks are not evaluated.
    """
    return _mean(m.by_position()[1:])


def seen_accuracy(m: AccuracyMatrix) -> float:
    """Return mean_{1<=k<T} S_k, S_k the accuracy over all samples of the k tasks learned (PROOF, Zhou et al. 2025).

    PROOF lets all classes compete, learned or not: the setting "open". NaN where unseen tasks are not evaluated.
    """
    return _mean(seen for seen, _ in _seen_and_unseen(m))


def unseen_accuracy(m: AccuracyMatrix) -> float:
    """Return mean_{1<=k<T} U_k, U_k the accuracy over all samples of the other T - k tasks; see `seen_accuracy`."""
    return _mean(unseen for _, unseen in _seen_and_unseen(m))


def harmonic_accuracy(m: AccuracyMatrix) -> float:
    """Return mean_{1<=k<T} 2 S_k U_k / (S_k + U_k), 0 where both are 0; see `seen_accuracy`."""
    return _mean(2 * s * u / (s + u) if s + u else s + u for s, u in _seen_and_unseen(m))


def _seen_and_unseen(m: AccuracyMatrix) -> list[tuple[float, float]]:
    """Return (S_k, U_k) for 1 <= k < T; NaN unless every task was evaluated each time."""
    correct, total, tasks = m.correct[1:], m.total.astype(np.float64), len(m.order)
    pairs = []
    for k in range(1, tasks):
        row = correct[k - 1] if not np.isnan(correct[k - 1]).any() else np.full(tasks, math.nan)
        pairs.append(
            (float(row[:k].sum() / max(1.0, total[:k].sum())), float(row[k:].sum() / max(1.0, total[k:].sum())))
        )
    return pairs


def zero_shot_degradation(counts: Sequence[Mapping[str, Sequence[int]]]) -> float:
    """Return the mean over held-out data sets of their accuracy before the first task minus that after the last one.

    Args:
        counts: [correct, total] of each data set by name, before the first task and after each (`job.eval_extra`).
    """
    first, last = ([right / total for right, total in counts[k].values()] for k in (0, -1))
    return _mean(before - after for before, after in zip(first, last, strict=True))


def worst_task(m: AccuracyMatrix) -> float:
    """Return min_j R[T, j], the lowest final accuracy of a task."""
    return float(m.by_position()[-1].min()) if m.order else math.nan


FUNCTIONS: tuple[Callable[[AccuracyMatrix], float], ...] = (
    average_accuracy,
    average_incremental_accuracy,
    forgetting,
    backward_transfer,
    forward_transfer,
    learning_accuracy,
    worst_task,
    transfer,
    matrix_average,
    seen_accuracy,
    unseen_accuracy,
    harmonic_accuracy,
)
METRICS = tuple(function.__name__ for function in FUNCTIONS)
UNSEEN = METRICS[-5:]  # those that need every task evaluated after every task


def summary(m: AccuracyMatrix) -> dict[str, float | None]:
    """Return the metrics of run.json in the order of METRICS; None where a cell is missing or a metric is undefined."""
    values = [function(m) for function in FUNCTIONS]
    return {name: None if math.isnan(value) else value for name, value in zip(METRICS, values, strict=True)}


def _mean(values: Iterable[float] | Floats) -> float:
    """Return the mean in float64; NaN without values or when one of them is NaN."""
    array = np.asarray(values if isinstance(values, np.ndarray) else list(values), dtype=np.float64)
    return float(array.mean()) if array.size else math.nan
