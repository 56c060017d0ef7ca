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

    NaN for one task and where unseen tasks are not evaluated: without job.eval_initial, and always in the class- and
    task-incremental settings, where no classes of an unseen task compete.
    """
    accuracy = m.by_position()
    return _mean((np.diagonal(accuracy) - accuracy[0])[1:]) if len(m.order) > 1 else math.nan


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
)
METRICS = tuple(function.__name__ for function in FUNCTIONS)


def summary(m: AccuracyMatrix) -> dict[str, float | None]:
    """Return the metrics of run.json in the order of METRICS; None where a cell is missing or a metric is undefined."""
    values = [function(m) for function in FUNCTIONS]
    return {name: None if math.isnan(value) else value for name, value in zip(METRICS, values, strict=True)}


def _mean(values: Iterable[float] | Floats) -> float:
    """Return the mean in float64; NaN without values or when one of them is NaN."""
    array = np.asarray(values if isinstance(values, np.ndarray) else list(values), dtype=np.float64)
    return float(array.mean()) if array.size else math.nan
