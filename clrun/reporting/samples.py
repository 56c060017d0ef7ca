"""The figure of a stream of tasks: one band of sample images per task, in the order of learning."""

import io
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clrun.system.errors import printable
from clrun.system.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Pixels = NDArray[np.uint8]  # [k, height, width, 1 or 3]

TILE, GAP, LABEL, MARGIN, BETWEEN = 0.62, 0.07, 2.35, 0.2, 0.3  # inches
LINE = 0.11  # height of one line of the class names under the images
HEADER = 0.85  # height of the title and the headings
DPI = 110
FONT = "DejaVu Sans"  # comes with matplotlib


@dataclass(frozen=True)
class Band:
    """The samples of one task.

    Attributes:
        title: position, id and name of the task.
        lines: further text; long lines are wrapped.
        names: class name of each sample.
        images: the samples as the network sees them.
        training: the same samples augmented for training; None when training does not augment.
    """

    title: str
    lines: tuple[str, ...]
    names: tuple[str, ...]
    images: Pixels
    training: Pixels | None


def draw_samples(title: str, subtitle: str, bands: Sequence[Band], path: Path) -> None:
    """Draw one band a task, in one column of them up to 12 tasks, in two up to 50, else in three.

    Args:
        title: what the stream is.
        subtitle: how its images become network input.
        bands: one per task, in the order of learning. Either all of them have training images or none has; none has
            more samples than the first.
        path: PNG file to write.

    Raises:
        ConfigError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 1 if len(bands) <= 12 else 2 if len(bands) <= 50 else 3
    rows = -(-len(bands) // columns)
    strip = len(bands[0].images) * (TILE + GAP) + BETWEEN
    strips = 1 if bands[0].training is None else 2
    lines = max(len(_caption(name)) for content in bands for name in content.names)
    column, band = LABEL + strips * strip - BETWEEN + 2 * MARGIN, TILE + lines * LINE + 3 * GAP
    width, height = columns * column, HEADER + rows * band + MARGIN
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    _write(axes, MARGIN, 0.3, title, size=13, weight="bold", room=width - 2 * MARGIN)
    _write(axes, MARGIN, 0.52, subtitle, size=8, room=width - 2 * MARGIN, color="#555555")
    for number in range(columns):
        left = number * column + MARGIN + LABEL
        for k, heading in enumerate(("as the network sees them", "augmented for training")[:strips]):
            _write(axes, left + k * strip, HEADER - 0.05, heading, size=8, color="#555555", room=strip)
    for k, content in enumerate(bands):
        _draw(axes, content, left=k // rows * column + MARGIN, top=HEADER + k % rows * band, strip=strip)
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the font has no letters of some scripts
        figure.savefig(picture, format="png", dpi=DPI, metadata={"Software": None})
    with replacing(path) as file:
        file.write(picture.getvalue())


def _draw(axes: "Axes", band: Band, *, left: float, top: float, strip: float) -> None:
    """Draw one band with its upper left corner at (left, top)."""
    width = LABEL + strip * (1 if band.training is None else 2) - BETWEEN
    axes.plot([left, left + width], [top, top], color="#dddddd", lw=0.6)
    _write(axes, left, top + 0.2, band.title, size=9, weight="bold", room=LABEL - GAP)
    lines = [part for line in band.lines for part in textwrap.wrap(printable(line), 36)]
    lines = lines if len(lines) <= 4 else [*lines[:3], f"{lines[3][:34]}…"]
    for number, line in enumerate(lines):
        _write(axes, left, top + 0.36 + 0.13 * number, line, size=7, color="#555555", room=LABEL - GAP)
    for k, images in enumerate((band.images, band.training)):
        if images is None:
            continue
        for number, (image, name) in enumerate(zip(images, band.names, strict=True)):
            x, y = left + LABEL + k * strip + number * (TILE + GAP), top + GAP
            shown = image.repeat(3, axis=-1) if image.shape[-1] == 1 else image
            axes.imshow(shown, extent=(x, x + TILE, y + TILE, y), interpolation="nearest", aspect="auto")
            for below, line in enumerate(_caption(name), start=1):
                _write(axes, x + TILE / 2, y + TILE + below * LINE, line, size=6.5, room=TILE + GAP, align="center")
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())


def _caption(name: str) -> list[str]:
    """Return a class name as at most two lines; of a longer name the first and the last line."""
    lines = textwrap.wrap(printable(name).replace("_", " "), 13) or [""]
    return lines if len(lines) <= 2 else [lines[0], lines[-1]]


def _write(
    axes: "Axes",
    x: float,
    y: float,
    text: str,
    *,
    size: float,
    room: float,
    weight: str = "normal",
    align: str = "left",
    color: str = "black",
) -> None:
    """Write one line of text with its baseline at y, shortened to about `room` inches."""
    fits = int(room * 72 / (0.56 * size))
    line = printable(text)
    line = line if len(line) <= fits else f"{line[: fits - 1]}…"
    axes.text(x, y, line, fontsize=size, fontweight=weight, ha=align, color=color, fontfamily=FONT, parse_math=False)
