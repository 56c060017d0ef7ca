"""Figures (PNG and SVG) and tables (CSV and LaTeX) for papers, in the folder `report` of a sweep."""

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clrun.reporting.groups import Group
from clrun.reporting.panels import Standings
from clrun.reporting.tables import SETTINGS, interval_points, points
from clrun.results import order_effects, robustness
from clrun.system.errors import printable
from clrun.system.files import csv_text, make_folder, replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = 12  # a figure with one panel per method shows this number of methods, the best ones
ROWS = 100  # a figure with one row per method shows this number of methods, the best ones
COLUMNS = 4  # panels per row
DPI = 200
BLUE, ORANGE, GREY = "#0b62c4", "#b3400a", "#777777"
TABLE = (
    ("accuracy", "mean"),
    ("sd", "sd"),
    ("AOPD", "aopd"),
    ("AOPD0", "aopd_floor"),
    ("AOPD/d2", "aopd_normalised"),
    ("MOPD", "mopd"),
    ("worst order", "worst_order_mean"),
    ("best order", "best_order_mean"),
)
SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
SPECIAL |= {character: f"\\{character}" for character in "&%$#_{}"}


def write(folder: Path, standings: Mapping[str, Standings], comparisons: Sequence[Mapping[str, Any]]) -> None:
    """Write the figures and tables of each setting into `folder`. The same runs give the same bytes.

    Args:
        folder: is created when it does not exist.
        standings: methods by setting, best first.
        comparisons: content of method_comparison.json.

    Raises:
        ConfigError: the folder cannot be written.
    """
    make_folder(folder, below=folder.parent)
    for setting, entries in standings.items():
        counted = [item for item in entries if item[2]["mean"] is not None]
        if not counted:
            continue
        _tables(folder, setting, counted)
        _pairs(folder, setting, comparisons)
        for name, draw in FIGURES.items():
            _save(folder / f"{name}_{setting}", draw(counted))


def latex(heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """Return a LaTeX table for the package booktabs; all text is escaped."""
    lines = [" & ".join(map(escaped, row)) + r" \\" for row in rows]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            f"\\caption{{{escaped(caption)}}}",
            f"\\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}",
            r"\toprule",
            " & ".join(map(escaped, heads)) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def escaped(value: str) -> str:
    """Return text in which the special characters of LaTeX are escaped."""
    return "".join(SPECIAL.get(character, character) for character in printable(value))


def _put(path: Path, content: str | bytes) -> None:
    with replacing(path, below=path.parent.parent) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def _tables(folder: Path, setting: str, entries: Standings) -> None:
    scored = any(group.logme is not None for _, group, _ in entries)
    heads = ["method", *(name for name, _ in TABLE), "orders", "seeds", *(["LogME"] if scored else [])]
    full = [
        [
            label,
            *(entry[key] for _, key in TABLE),
            entry["n_orders"],
            entry["n_seeds"],
            *([group.logme] if scored else []),
        ]
        for label, group, entry in entries
    ]
    _put(folder / f"comparison_{setting}.csv", csv_text([heads, *full]))
    measured = len(TABLE) + 1
    shown = [[row[0], *map(points, row[1:measured]), *map(_plain, row[measured:])] for row in full]
    caption = (
        f"Final {SETTINGS[setting]} accuracy in points: mean and standard deviation (sd) over task orders (seeds "
        "averaged first), mean and largest disparity over orders (AOPD, MOPD), and AOPD expected from seeds (AOPD0)."
    )
    _put(folder / f"comparison_{setting}.tex", latex(heads, shown, caption))
    tasks = sorted({task for _, _, entry in entries for task in entry["opd"] or ()}, key=int)
    rows = [[label, *((entry["opd"] or {}).get(task) for task in tasks)] for label, _, entry in entries]
    if tasks:
        _put(folder / f"opd_{setting}.csv", csv_text([["method", *(f"task {task}" for task in tasks)], *rows]))


def _plain(value: float | int | None) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _pairs(folder: Path, setting: str, comparisons: Sequence[Mapping[str, Any]]) -> None:
    keys = ("a", "b", "n", "mean", "sd", "p_wilcoxon", "p_holm", "p_sign", "p_t")
    pairs = [pair for entry in comparisons if entry["setting"] == setting for pair in entry["pairs"]]
    if not pairs:
        return
    _put(folder / f"pairs_{setting}.csv", csv_text([keys, *([pair[key] for key in keys] for pair in pairs)]))
    heads = ["difference", "orders", "mean", "sd", "p (Wilcoxon)", "p (Holm)"]
    rows = [
        [
            f"{p['a']} - {p['b']}",
            str(p["n"]),
            points(p["mean"]),
            points(p["sd"]),
            f"{p['p_wilcoxon']:.3g}",
            f"{p['p_holm']:.3g}",
        ]
        for p in pairs
    ]
    few = dict.fromkeys(caveat for entry in comparisons if entry["setting"] == setting for caveat in entry["caveats"])
    caption = f"Differences of final {SETTINGS[setting]} accuracy in points, paired over task orders."
    caption = " ".join([caption, "Signed-rank tests are exact and two-sided.", *few])
    _put(folder / f"pairs_{setting}.tex", latex(heads, rows, caption))


def _save(path: Path, figure: "Figure | None") -> None:
    """Write a figure as PNG and SVG."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    if figure is None:
        return
    FigureCanvasAgg(figure)
    layout = figure.get_layout_engine()
    assert layout is not None
    layout.execute(figure)
    figure.set_layout_engine("none")  # the layout is computed once for both files
    png, svg = io.BytesIO(), io.BytesIO()
    with warnings.catch_warnings(), rc_context({"svg.hashsalt": "clrun", "svg.fonttype": "none"}):
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the font has no letters of some scripts
        as_png: Any = FigureCanvasAgg(figure)
        as_png.print_png(png, metadata={"Software": None})  # savefig would draw each file twice
        as_svg: Any = FigureCanvasSVG(figure)
        as_svg.print_svg(svg, metadata={"Date": None, "Creator": None})
    for kind, picture in (("png", png), ("svg", svg)):
        _put(path.with_suffix(f".{kind}"), picture.getvalue())


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="compressed")


def _clean(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _rows(axes: "Axes", names: Sequence[str], title: str) -> None:
    """Label the rows of a figure; the first is at the top."""
    axes.set_yticks(range(len(names)), [printable(name)[:40] for name in names])
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(title, fontsize=9)
    _clean(axes)


def _accuracy(entries: Standings) -> "Figure | None":
    entries = entries[:ROWS]
    figure = _figure(5.2, 0.9 + 0.28 * len(entries))
    axes = figure.subplots()
    for y, (_, _, entry) in enumerate(entries):
        axes.plot([100 * entry["worst_order_mean"], 100 * entry["best_order_mean"]], [y, y], color=GREY, lw=1.2)
        if (interval := interval_points(entry["ci95"])) is not None:
            low, high = interval
            axes.barh(y, high - low, left=low, height=0.42, color=BLUE, alpha=0.35)
        axes.plot(100 * entry["mean"], y, "o", color=BLUE, ms=5)
    _rows(axes, [label for label, _, _ in entries], "final average accuracy (points)")
    return figure


def _order_effect(entries: Standings) -> "Figure | None":
    known = [item for item in entries if item[2]["aopd"] is not None][:ROWS]
    if not known:
        return None
    figure = _figure(5.2, 0.9 + 0.28 * len(known))
    axes = figure.subplots()
    for y, (_, _, entry) in enumerate(known):
        axes.barh(y, 100 * entry["aopd"], height=0.5, color=BLUE, alpha=0.75)
        if entry["aopd_floor"] is not None:
            axes.plot([100 * entry["aopd_floor"]] * 2, [y - 0.36, y + 0.36], color=ORANGE, lw=2.5)
    _rows(axes, [label for label, _, _ in known], "AOPD (points); tick: expected from seeds alone")
    return figure


def _variance(entries: Standings) -> "Figure | None":
    known = [item for item in entries if item[2]["task_order_variance"] is not None][:ROWS]
    if not known:
        return None
    figure = _figure(5.2, 0.9 + 0.36 * len(known))
    axes = figure.subplots()
    for shift, key, color, name in ((-0.2, "order", BLUE, "order"), (0.2, "seed", ORANGE, "seed")):
        values = [100 * entry[f"task_{key}_variance"] ** 0.5 for _, _, entry in known]
        axes.barh([y + shift for y in range(len(known))], values, height=0.36, color=color, alpha=0.8, label=name)
    axes.legend(fontsize=8, frameon=False)
    _rows(axes, [label for label, _, _ in known], "standard deviation of a task's accuracy (points)")
    return figure


def _cost(entries: Standings) -> "Figure | None":
    from matplotlib.ticker import NullFormatter

    figure = _figure(6.4, 3.0)
    found = False
    for axes, (title, of) in zip(
        figure.subplots(1, 2, sharey=True),
        (("training seconds per run", "train_seconds"), ("stored bytes", "state_bytes")),
        strict=True,
    ):
        for label, group, entry in entries:
            if values := [v for run in group.runs if (v := getattr(run, of))]:
                found = True
                place = float(np.mean(values)), 100 * entry["mean"]
                axes.plot(*place, "o", color=BLUE, ms=5)
                near = {"xytext": (5, 3), "textcoords": "offset points"}
                axes.annotate(printable(label)[:24], place, fontsize=7, parse_math=False, **near)
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())  # its labels would overlap
        axes.margins(x=0.25, y=0.1)
        axes.set_xlabel(title, fontsize=9)
        _clean(axes)
    figure.axes[0].set_ylabel("accuracy (points)", fontsize=9)
    return figure if found else None


def _panels(
    entries: Standings, draw: Callable[["Axes", Group, str], None], side: float, *, shared: str = "none"
) -> "Figure":
    """Return a figure with one panel per method, for the best ones; shared axes are labelled at the edge only.

    Args:
        entries: methods, best first.
        draw: draws one panel.
        side: side of a panel in inches.
        shared: axes that all panels share: "none", "x" or "both".
    """
    shown = entries[:PANELS]
    columns = min(COLUMNS, len(shown))
    lines = -(-len(shown) // columns)
    figure = _figure(side * columns + 0.6, side * lines + 0.4)
    subplots = figure.subplots(lines, columns, squeeze=False, sharex=shared != "none", sharey=shared == "both")
    grid = subplots.ravel()
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    for axes, (label, group, entry) in zip(grid, shown, strict=False):
        draw(axes, group, entry["setting"])
        axes.set_title(printable(label)[:36], fontsize=9).set_parse_math(False)
    for index, axes in enumerate(grid[: len(shown)]):
        below = index + columns < len(shown)
        axes.tick_params(labelbottom=not below or shared == "none")
        axes.set_xlabel("" if below else axes.get_xlabel(), fontsize=8)
        axes.set_ylabel(axes.get_ylabel() if index % columns == 0 else "", fontsize=8)
    if images := [image for axes in grid for image in axes.images]:
        bar = figure.colorbar(images[0], ax=list(grid), shrink=0.8, pad=0.02)
        bar.set_label("accuracy (points)", fontsize=8)
        bar.ax.tick_params(labelsize=8)
    if len(entries) > len(shown):
        figure.suptitle(f"the best {len(shown)} of {len(entries)}", fontsize=9)
    return figure


def _matrices(group: Group, setting: str) -> list[Any]:
    """Return the accuracy matrix of each order (seeds averaged) that has the most common number of tasks."""
    by_order: dict[tuple[int, ...], list[Any]] = {}
    for run in group.complete(setting).values():
        by_order.setdefault(run.order, []).append(run.matrices[setting])
    means = [np.mean(found, axis=0) for _, found in sorted(by_order.items())]
    sizes = [len(matrix) for matrix in means]
    usual = max(sizes, key=sizes.count)
    return [matrix for matrix in means if len(matrix) == usual]


def _draw_matrix(axes: "Axes", group: Group, setting: str) -> None:
    mean = 100 * np.mean(_matrices(group, setting), axis=0)
    axes.imshow(np.ma.masked_invalid(mean), cmap="viridis", vmin=0, vmax=100, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel("position of the task", fontsize=8)
    axes.set_ylabel("tasks learned", fontsize=8)


def _draw_curve(axes: "Axes", group: Group, setting: str) -> None:
    lines = np.array([[100 * m[k, : k + 1].mean() for k in range(len(m))] for m in _matrices(group, setting)])
    x = np.arange(1, lines.shape[1] + 1)
    axes.fill_between(x, lines.min(axis=0), lines.max(axis=0), color=BLUE, alpha=0.2, linewidth=0)
    axes.plot(x, lines.mean(axis=0), color=BLUE, marker="o", ms=3)
    axes.set_ylim(0, 103)
    axes.set_xlabel("tasks learned", fontsize=8)
    axes.set_ylabel("accuracy (points)", fontsize=8)
    _clean(axes)


def _draw_opd(axes: "Axes", group: Group, setting: str) -> None:
    _, tasks, finals = group.finals(setting)
    means = 100 * robustness.seed_means(finals)
    axes.hlines(range(len(tasks)), means.min(axis=0), means.max(axis=0), color=GREY, lw=1)
    axes.plot(means.ravel(), np.tile(np.arange(means.shape[1]), len(means)), "o", color=BLUE, ms=3.5, alpha=0.8)
    axes.set_ylabel("task", fontsize=8)
    step = -(-len(tasks) // 12) or 1
    axes.set_yticks(range(0, len(tasks), step), [str(task) for task in tasks[::step]])
    axes.set_ylim(max(len(tasks), 1) - 0.5, -0.5)
    axes.set_xlabel("final accuracy (points)", fontsize=9)
    _clean(axes)


def _draw_position(axes: "Axes", group: Group, setting: str) -> None:
    orders, tasks, finals = group.finals(setting)
    effect = order_effects.position_effect(finals, orders) if tasks else None
    axes.set_xlabel("position", fontsize=8)
    axes.set_ylabel("accuracy minus the task's mean", fontsize=8)
    _clean(axes)
    if effect is None:
        return
    places, centred = order_effects.centred_by_position(finals, orders)
    axes.plot(places.ravel() + 1, 100 * centred.ravel(), "o", color=BLUE, ms=3, alpha=0.4)
    ends = np.array([0, len(tasks) - 1])
    axes.plot(ends + 1, 100 * effect.slope * (ends - ends.mean()), "--", color=ORANGE)


FIGURES: dict[str, Callable[[Standings], "Figure | None"]] = {
    "accuracy": _accuracy,
    "order_effect": _order_effect,
    "order_and_seed": _variance,
    "cost": _cost,
    "accuracy_matrices": lambda entries: _panels(entries, _draw_matrix, 1.9),
    "accuracy_curves": lambda entries: _panels(entries, _draw_curve, 2.3, shared="both"),
    "opd_by_task": lambda entries: _panels(entries, _draw_opd, 2.3, shared="x"),
    "position_effect": lambda entries: _panels(entries, _draw_position, 2.3, shared="both"),
}
