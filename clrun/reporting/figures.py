"""Figures of one run, drawn without pyplot, so that its global state is not changed."""

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clrun.reporting.tables import EVALUATED, points, settings_of
from clrun.results.metrics import Floats
from clrun.system.errors import ConfigError, printable
from clrun.system.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

ANNOTATED = 12  # tasks up to which every cell shows its number and every axis its task names
TICKS = 20  # most labels on an axis
TITLE = 80  # characters of the run's name in the title
NAME = 16  # characters of a task's name


def draw_accuracy_matrix(run: Mapping[str, Any], path: Path) -> None:
    """Draw one heat map per setting: accuracy after learning a task (row) on a task (column), in the order of learning.

    Cells that were not evaluated stay blank. The same run gives the same bytes.

    Args:
        run: content of run.json.
        path: PNG file to write.

    Raises:
        ConfigError: `run` has no accuracy matrix, or the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matrices = _matrices(run, path)
    tasks = len(run["task_order"])
    labels = _labels(run)
    side = max(2.0, 0.5 * tasks) if tasks <= ANNOTATED else 6.0
    height = side + (2.3 if tasks <= ANNOTATED and _slanted(labels) else 1.6)
    figure = Figure(figsize=(side * len(matrices) + 2.6, height), layout="compressed")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(matrices), squeeze=False)[0]
    for index, (setting, matrix) in enumerate(matrices.items()):
        _draw(axes[index], matrix, labels, rows=index == 0)
        average = matrix[-1].mean()
        ending = "" if np.isnan(average) else f"\naverage accuracy {points(average)}"
        axes[index].set_title(EVALUATED[setting] + ending, fontsize=10)
    bar = figure.colorbar(axes[0].images[0], ax=list(axes), shrink=0.85, pad=0.02, aspect=25)
    bar.set_label("accuracy (points)", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    _title(figure, run)
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the font has no letters of some scripts
        figure.savefig(picture, format="png", dpi=130, bbox_inches="tight", metadata={"Software": None})
    with replacing(path) as file:
        file.write(picture.getvalue())


def _matrices(run: Mapping[str, Any], path: Path) -> dict[str, Floats]:
    """Return the accuracies [T, T] by setting, NaN where not evaluated."""
    tasks = len(run.get("task_order") or ())
    try:
        matrices = {
            s: np.array(run["accuracy_matrix"][s], dtype=np.float64) for s in settings_of(run["accuracy_matrix"])
        }
    except (KeyError, TypeError, ValueError, OverflowError):
        matrices = {}
    if not matrices or any(matrix.shape != (tasks, tasks) for matrix in matrices.values()):
        raise ConfigError(
            f"{path.parent / 'run.json'}: has no accuracy matrix to draw; the run ended before its first evaluation"
        )
    return matrices


def _labels(run: Mapping[str, Any]) -> list[str]:
    """Return id and name of the task at each position."""
    order = run["task_order"]
    names = run.get("task_names") or [""] * len(order)
    return [_label(task, printable(str(name))) for task, name in zip(order, names, strict=True)]


def _slanted(columns: Sequence[str]) -> bool:
    """Return whether the labels under the columns are too long for horizontal text."""
    return max(map(len, columns)) > 3


def _label(task: int, name: str) -> str:
    if not name or name == str(task):
        return str(task)
    return f"{task}: {name if len(name) <= NAME else name[: NAME - 1] + '…'}"


def _draw(axes: "Axes", matrix: Floats, labels: Sequence[str], *, rows: bool) -> None:
    """Draw one heat map; `rows` says whether its rows are labelled."""
    tasks = len(matrix)
    axes.set_facecolor("#f3f3f3")
    axes.imshow(100 * np.ma.masked_invalid(matrix), cmap="viridis", vmin=0, vmax=100, interpolation="nearest")
    shown = range(0, tasks, -(-tasks // TICKS))
    columns = [labels[i] if tasks <= ANNOTATED else labels[i].partition(":")[0] for i in shown]
    axes.set_xticks(list(shown), columns)
    if _slanted(columns):
        for text in axes.get_xticklabels():
            text.set(rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(list(shown) if rows else [], [labels[i] for i in shown] if rows else [])
    axes.tick_params(labelsize=8, length=2)
    for text in [*axes.get_xticklabels(), *axes.get_yticklabels()]:
        _literal(text)
    axes.set_xlabel("evaluated on task", fontsize=9)
    if rows:
        axes.set_ylabel("after learning task", fontsize=9)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if tasks <= ANNOTATED:
        _annotate(axes, matrix)


def _annotate(axes: "Axes", matrix: Floats) -> None:
    """Write the accuracy in points on each cell, in white or black for contrast, and draw white lines between cells."""
    for (i, j), value in np.ndenumerate(matrix):
        if not np.isnan(value):
            color = "white" if is_dark(float(value)) else "black"
            axes.text(j, i, points(value), ha="center", va="center", fontsize=8, color=color)
    edges = np.arange(len(matrix) + 1) - 0.5
    axes.set_xticks(edges, minor=True)
    axes.set_yticks(edges, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="minor", length=0)


def is_dark(value: float) -> bool:
    """Return whether white text has more contrast than black on the colour of an accuracy (a fraction)."""
    from matplotlib import colormaps

    red, green, blue, _ = (channel**2.2 for channel in colormaps["viridis"](value))
    return bool(0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.18)


def _title(figure: "Figure", run: Mapping[str, Any]) -> None:
    """Set the title: name of the run, its seed and, where there is room, its task order."""
    order = " ".join(map(str, run["task_order"]))
    name = printable(str(run.get("name", "")))
    name = name if len(name) <= TITLE else name[: TITLE - 1] + "…"
    title = f"{name}, seed {run.get('seed')}"
    if len(order) <= 60:
        title += f"\ntask order {order}"
    _literal(figure.suptitle(title, fontsize=11))


def _literal(text: "Text") -> None:
    """Keep matplotlib from reading dollar signs in a name as mathematics."""
    text.set_parse_math(False)
