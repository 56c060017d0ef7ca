"""Charts of report.html as SVG text, without a drawing library; colours are those of report.css.

Every mark that shows a number has it as text in `data-t`, which report.js shows at the pointer.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from clrun.results.metrics import Floats
from clrun.system.errors import printable

WIDTH = 380  # of a chart, in units that are pixels on a phone
ROW = 22  # height of one row of `ranges`
LABEL = 130  # largest width of row labels
CHAR = 6.3  # width of a character
CELL = 30  # side of a cell of a heat map
LEVELS = 40  # number of colours of a heat map
TICKS = 5  # approximate number of ticks of an axis
NUMBERED = 10  # tasks up to which cells show their number
MARKS = 600  # a chart with more marks shows only means and the line
VIRIDIS = ["440154", "482475", "414487", "355f8d", "2a788e", "21918c", "22a884", "44bf70", "7ad151", "bddf26", "fde725"]


def text(value: object) -> str:
    """Return `value` as text, escaped for HTML elements and attributes."""
    return escape(printable(str(value)))


def short(label: str, room: float) -> str:
    """Return `label`, shortened at its end to about `room` units."""
    fits = int(room / CHAR)
    return label if len(label) <= fits else f"{label[: fits - 1]}…"


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis that maps values to units.

    Attributes:
        low: value at `start`.
        high: value at `stop`.
        start: first unit.
        stop: last unit.
        log: whether the axis is logarithmic.
    """

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    @classmethod
    def of(cls, values: Sequence[float], start: float, stop: float, *, log: bool = False, zero: bool = False) -> "Axis":
        """Return an axis that contains all values with a margin; `zero` makes it contain 0."""
        found = [v for v in values if math.isfinite(v) and (v > 0 or not log)] or [0.0 if not log else 1.0]
        low, high = min(found), max(found)
        if log:
            return cls(low / 1.6, high * 1.6, start, stop, True)
        low, high = (min(low, 0.0), max(high, 0.0)) if zero else (low, high)
        room = 0.06 * (high - low) or 1.0
        bottom = low if zero and low == 0 < high else low - room  # so that bars begin at the edge
        return cls(bottom, high if zero and low < 0 == high else high + room, start, stop)

    def __call__(self, value: float) -> float:
        """Return the unit of a value."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.stop - self.start), 1)

    def ticks(self) -> list[float]:
        """Return a few round values."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 3) if len(powers) < TICKS else (1,)
            found = [k * 10.0**p for p in powers for k in steps if self.low <= k * 10.0**p <= self.high]
            if len(found) > 2:
                return found
        raw = (self.high - self.low) / TICKS
        size = 10.0 ** math.floor(math.log10(raw))
        step = next(k * size for k in (1, 2, 5, 10) if k * size >= raw)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [k * step + 0.0 for k in range(first, last + 1)]


def compact(value: float) -> str:
    """Return the text of a tick: 1500000 as 1.5M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def svg(body: Sequence[str], height: float, label: str) -> str:
    """Return an SVG chart of the common width; `label` describes it for screen readers."""
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{text(label)}">'
        + "".join(body)
        + "</svg>"
    )


def _x_axis(axis: Axis, bottom: float, top: float, title: str) -> list[str]:
    parts = []
    for value in axis.ticks():
        x = axis(value)
        parts.append(f'<path class="grid" d="M{x} {top}V{bottom}"/>')
        parts.append(f'<text x="{x}" y="{bottom + 14}" class="mid">{compact(value)}</text>')
    middle = (axis.start + axis.stop) / 2
    return [*parts, f'<text x="{middle:g}" y="{bottom + 30}" class="mid title">{text(title)}</text>']


def _y_axis(axis: Axis, left: float, right: float) -> list[str]:
    parts = []
    for value in axis.ticks():
        y = axis(value)
        parts.append(f'<path class="grid" d="M{left} {y}H{right}"/>')
        parts.append(f'<text x="{left - 5}" y="{y + 4}" class="end">{compact(value)}</text>')
    return parts


def _dot(x: float, y: float, tip: str, kind: str = "dot", radius: float = 3.5) -> str:
    return f'<circle class="{kind}" cx="{x}" cy="{y}" r="{radius}" data-t="{text(tip)}"/>'


@dataclass(frozen=True)
class Range:
    """One row of `ranges`; values are in points.

    Attributes:
        label: label of the row.
        dots: (value, tooltip) of each dot.
        bar: (from, to, tooltip) of a bar; None for no bar.
        line: likewise of a thin line behind the bar.
        mark: (value, tooltip) of a tick across the row; None for no tick.
        note: text at the right end.
    """

    label: str
    dots: Sequence[tuple[float, str]] = ()
    bar: tuple[float, float, str] | None = None
    line: tuple[float, float, str] | None = None
    mark: tuple[float, str] | None = None
    note: str = ""

    def values(self) -> list[float]:
        """Return all values, for the axis."""
        spans = [v for span in (self.bar, self.line) if span for v in span[:2]]
        return [*(v for v, _ in self.dots), *spans, *([self.mark[0]] if self.mark else [])]


def ranges(rows: Sequence[Range], title: str, *, zero: bool = False) -> str:
    """Return a chart with one line of marks per row: lines, bars, ticks and dots along one axis."""
    left = min(LABEL, max(len(row.label) for row in rows) * CHAR) + 8
    right = WIDTH - max(10, max(len(row.note) for row in rows) * CHAR + 6)
    axis = Axis.of([v for row in rows for v in row.values()], left + 4, right - 6, zero=zero)
    bottom = 6 + ROW * len(rows)
    body = _x_axis(axis, bottom, 4, title)
    for number, row in enumerate(rows):
        body += _row(row, axis, 6 + ROW * number + ROW / 2, left)
        body.append(f'<text x="{WIDTH - 2}" y="{6 + ROW * number + ROW / 2 + 4}" class="end">{text(row.note)}</text>')
    return svg(body, bottom + 36, title)


def _row(row: Range, axis: Axis, y: float, left: float) -> list[str]:
    body = [
        f'<text x="{left - 4:g}" y="{y + 4}" class="end" data-t="{text(row.label)}">'
        f"{text(short(row.label, left))}</text>"
    ]
    for kind, thick, span in (("line", 2, row.line), ("bar", 9, row.bar)):
        if span:
            x, end = sorted((axis(span[0]), axis(span[1])))
            width = round(max(1.0, end - x), 1)
            place = f'x="{x}" y="{y - thick / 2:g}" width="{width}" height="{thick}"'
            body.append(f'<rect class="{kind}" {place} data-t="{text(span[2])}"/>')
    body += [_dot(axis(value), y, tip) for value, tip in row.dots]
    if row.mark:
        body.append(
            f'<rect class="mark" x="{axis(row.mark[0]) - 1.5:g}" y="{y - 8:g}" width="3" height="16" '
            f'data-t="{text(row.mark[1])}"/>'
        )
    return body


def curves(lines: Sequence[tuple[str, Floats]], title: str) -> str:
    """Return a chart of a number after each task, such as the accuracy in points.

    It has one thin line per order (for up to 12), their mean, and a band from the lowest to the highest.
    """
    values = np.array([line for _, line in lines])
    tasks = values.shape[1]
    low, high, mean = values.min(axis=0), values.max(axis=0), values.mean(axis=0)
    x = Axis(0.7 if tasks > 1 else 0, tasks + 0.3 if tasks > 1 else 2, 36, WIDTH - 8)
    y = Axis.of([*low, *high], 190, 8)
    across = [x(i + 1) for i in range(tasks)]
    band = [f"{a} {y(v)}" for a, v in zip(across, high, strict=True)]
    band += [f"{a} {y(v)}" for a, v in zip(reversed(across), low[::-1], strict=True)]
    body = [*_y_axis(y, 36, WIDTH - 8), f'<path class="band" d="M{"L".join(band)}z"/>']
    if len(lines) <= 12:
        body += [f'<path class="thin" d="{_path(across, line, y)}"/>' for _, line in lines]
    body.append(f'<path class="mean" d="{_path(across, mean, y)}"/>')
    for i, place in enumerate(across):
        each = f"; orders from {low[i]:.1f} to {high[i]:.1f}" if len(lines) > 1 else ""
        body.append(_dot(place, y(mean[i]), f"after {i + 1} tasks: mean {mean[i]:.1f}{each}"))
    for i in range(0, tasks, -(-tasks // 10)):
        body.append(f'<text x="{across[i]}" y="206" class="mid">{i + 1}</text>')
    body.append(f'<text x="{(36 + WIDTH) / 2}" y="222" class="mid title">{text(title)}</text>')
    return svg(body, 228, title)


def _path(across: Sequence[float], values: Floats, y: Axis) -> str:
    return "M" + "L".join(f"{a} {y(v)}" for a, v in zip(across, values.tolist(), strict=True))


def by_position(cells: Sequence[tuple[int, float, str]], slope: float, title: str) -> str:
    """Return the chart of the position effect.

    Args:
        cells: (position from 0, points above the mean of the task, tooltip) of each cell.
        slope: points per position.
        title: label of the horizontal axis.
    """
    last = max(position for position, _, _ in cells)
    x, y = Axis(-0.4, last + 0.4, 36, WIDTH - 8), Axis.of([value for _, value, _ in cells], 190, 8, zero=True)
    means = [float(np.mean([v for p, v, _ in cells if p == position])) for position in range(last + 1)]
    body = [*_y_axis(y, 36, WIDTH - 8), f'<path class="zero" d="M36 {y(0)}H{WIDTH - 8}"/>']
    if len(cells) <= MARKS:
        body += [_dot(x(p), y(v), tip, "faint", 3) for p, v, tip in cells]
    ends = [(p, slope * (p - last / 2)) for p in (0, last)]
    ends_shown = [(p, min(max(v, y.low), y.high)) for p, v in ends]
    body.append(f'<path class="fit" d="M{"L".join(f"{x(p)} {y(v)}" for p, v in ends_shown)}"/>')
    for position, value in enumerate(means):
        body.append(_dot(x(position), y(value), f"position {position + 1}: {value:+.1f} on average"))
    for position in range(0, last + 1, -(-(last + 1) // 10)):
        body.append(f'<text x="{x(position)}" y="206" class="mid">{position + 1}</text>')
    body.append(f'<text x="{(36 + WIDTH) / 2}" y="222" class="mid title">{text(title)}</text>')
    return svg(body, 228, title)


def path_of_search(trials: Sequence[tuple[int, float, str, bool]], title: str) -> str:
    """Return the chart of a search: accuracy of each order tried and, as a line, the lowest so far.

    Args:
        trials: (number, accuracy in points, tooltip, whether a move made the order) of each order.
        title: label of the horizontal axis.
    """
    last = max(place for place, *_ in trials)
    x, y = Axis(0.4, last + 0.6, 36, WIDTH - 8), Axis.of([value for _, value, _, _ in trials], 190, 8)
    lowest, steps = trials[0][1], [f"M{x(trials[0][0])} {y(trials[0][1])}"]
    for place, value, _, _ in trials[1:]:
        lowest = min(lowest, value)
        steps.append(f"H{x(place)}V{y(lowest)}")
    body = [*_y_axis(y, 36, WIDTH - 8), f'<path class="mean" d="{"".join(steps)}"/>']
    body += [_dot(x(place), y(value), tip, "dot" if moved else "faint") for place, value, tip, moved in trials]
    for place in range(1, last + 1, -(-last // 10)):
        body.append(f'<text x="{x(place)}" y="206" class="mid">{place}</text>')
    body.append(f'<text x="{(36 + WIDTH) / 2}" y="222" class="mid title">{text(title)}</text>')
    return svg(body, 228, title)


def scatter(dots: Sequence[tuple[float, float, str, str]], title: str) -> str:
    """Return a chart of accuracy against a cost on a logarithmic axis.

    Args:
        dots: (cost, accuracy in points, label, tooltip) of each method.
        title: label of the horizontal axis.
    """
    x = Axis.of([dot[0] for dot in dots], 40, WIDTH - 14, log=True)
    y = Axis.of([dot[1] for dot in dots], 190, 12)
    body = [*_y_axis(y, 36, WIDTH - 8), *_x_axis(x, 192, 8, title)]
    taken: list[tuple[float, float, float]] = []
    for cost, value, label, tip in sorted(dots, key=lambda dot: -dot[1]):
        across, down = x(cost), y(value)
        body.append(_dot(across, down, tip, radius=5))
        name = short(label, LABEL)
        width = len(name) * CHAR
        start = across + 9 if across + 9 + width < WIDTH else across - 9 - width
        height = down + 4
        while any(abs(height - h) < 12 and start < e and s < start + width for s, e, h in taken):
            height += 12
        taken.append((start, start + width, height))
        body.append(f'<text x="{start:.1f}" y="{height:.1f}">{text(name)}</text>')
    return svg(body, 228, title)


def heat(matrix: Floats, tasks: Sequence[str], *, numbers: bool) -> str:
    """Return the heat map of an accuracy matrix [T, T] by position; cells that were not evaluated stay blank.

    One path per colour keeps the file small; report.js reads the number of a cell, in tenths of points, from `data-m`.

    Args:
        matrix: accuracies as fractions; NaN = not evaluated.
        tasks: names of the tasks by position.
        numbers: write the accuracy on each cell, for up to NUMBERED tasks.
    """
    size = len(matrix)
    paths: dict[int, list[str]] = {}
    words = []
    for (i, j), value in np.ndenumerate(matrix):
        if np.isnan(value):
            continue
        level = round(float(value) * LEVELS)
        paths.setdefault(level, []).append(f"M{j * CELL} {i * CELL}h{CELL}v{CELL}h-{CELL}z")
        if numbers and size <= NUMBERED:
            kind = "on-dark" if _is_dark(_viridis(level / LEVELS)) else "on-light"
            place = f'x="{j * CELL + CELL / 2:g}" y="{i * CELL + CELL / 2 + 4:g}"'
            words.append(f'<text class="mid {kind}" {place}>{100 * value:.0f}</text>')
    cells = [f'<path fill="{_viridis(k / LEVELS)}" d="{"".join(d)}"/>' for k, d in sorted(paths.items())]
    stored = [[None if np.isnan(v) else round(1000 * v) for v in row] for row in matrix.tolist()]
    data = f'data-m="{json.dumps(stored, separators=(",", ":"))}" data-n="{text(json.dumps(list(tasks)))}"'
    side = size * CELL
    return f'<svg class="heat" viewBox="0 0 {side} {side}" role="img" {data}>{"".join(cells + words)}</svg>'


def _viridis(value: float) -> str:
    place = min(max(value, 0.0), 1.0) * (len(VIRIDIS) - 1)
    k = min(int(place), len(VIRIDIS) - 2)
    low, high = (bytes.fromhex(VIRIDIS[n]) for n in (k, k + 1))
    return "#" + "".join(f"{round(a + (b - a) * (place - k)):02x}" for a, b in zip(low, high, strict=True))


def _is_dark(color: str) -> bool:
    """Return whether white text has more contrast than black on a colour."""
    red, green, blue = ((channel / 255) ** 2.2 for channel in bytes.fromhex(color[1:]))
    return bool(0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.18)


def legend() -> str:
    """Return the colour scale of the heat maps."""
    stops = "".join(f'<rect x="{k * 8}" width="8.5" height="10" fill="{_viridis(k / 20)}"/>' for k in range(21))
    ends = '<text x="0" y="24">0</text><text x="168" y="24" class="end">100 points</text>'
    label = "colour scale, 0 to 100 points"
    return f'<svg class="legend" viewBox="0 0 170 28" role="img" aria-label="{label}">{stops}{ends}</svg>'
