"""The figure of the prompts or components that a method selects for the images of each task."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clrun.system.files import replacing

ANNOTATED = 20  # rows and columns up to which every cell shows its number


def draw_selection(run: Mapping[str, Any], path: Path) -> None:
    """Draw how often each component (column) is selected for the images of each task (row), in percent.

    Args:
        run: content of run.json with the key `selection`.
        path: PNG file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = np.array(run["selection"]["counts"], dtype=np.float64)
    shares = 100 * counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    tasks, columns = shares.shape
    figure = Figure(figsize=(2.6 + min(10, 0.42 * columns), 1.8 + min(8, 0.36 * tasks)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    largest = max(1.0, float(shares.max()))
    image = axes.imshow(shares, cmap="viridis", vmin=0, vmax=largest, aspect="auto")
    if columns <= ANNOTATED and tasks <= ANNOTATED:
        for (row, column), share in np.ndenumerate(shares):
            colour = "black" if share > largest / 2 else "white"
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(0, columns, max(1, columns // 20)))
    axes.set_yticks(range(0, tasks, max(1, tasks // 20)))
    axes.set_xlabel("selected prompt, or position of the task whose component is selected")
    axes.set_ylabel("position of the image's task")
    used, entropy = run["selection"]["used"], run["selection"]["entropy"]
    axes.set_title(f"{run['name']}: {used} of {columns} selected, relative entropy {entropy:.2f}", fontsize=9)
    figure.colorbar(image, ax=axes).set_label("selections for the images of the task (%)", fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130, metadata={"Software": None})
    with replacing(path) as file:
        file.write(picture.getvalue())
