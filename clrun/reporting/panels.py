"""The figures of report.html: all methods side by side, then each method over its orders."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from clrun.reporting.charts import Range, by_position, curves, heat, legend, ranges, scatter, text
from clrun.reporting.collect import Run
from clrun.reporting.groups import Group
from clrun.reporting.markup import Cell, figure, order_text, section, table
from clrun.reporting.tables import interval_points
from clrun.results import order_effects, robustness

MAPS = 12  # number of orders whose accuracy matrices are shown for each method
DOTS = 40  # number of orders up to which each one is a dot and a row
Standings = Sequence[tuple[str, Group, Mapping[str, Any]]]  # (label, group, entry of order_robustness.json)


def overview_section(entries: Standings) -> str:
    """Return the section with figures of all methods side by side."""
    counted = [item for item in entries if item[2]["mean"] is not None]
    if not counted:
        return ""
    figures = [_accuracies(counted), _disparities(counted), _variances(counted), *_costs(counted)]
    return section("Methods side by side", f'<div class="figures">{"".join(figures)}</div>')


def _accuracies(entries: Standings) -> str:
    """Return the figure of final accuracies."""
    rows = []
    for label, _, entry in entries:
        mean, low, high = (100 * entry[key] for key in ("mean", "worst_order_mean", "best_order_mean"))
        interval = interval_points(entry["ci95"])
        bar = None
        if interval:
            bar = (*interval, f"95 % interval of the mean: {interval[0]:.1f} to {interval[1]:.1f}")
        line = (low, high, f"worst order {low:.1f}, best order {high:.1f}")
        rows.append(Range(label, [(mean, f"{label}: mean over orders {mean:.1f}")], bar, line, note=f"{mean:.1f}"))
    caption = (
        "Final average accuracy: mean over orders (dot), 95 % interval of the mean (bar), worst to best order (line)."
    )
    return figure(ranges(rows, "accuracy (points)"), caption)


def _disparities(entries: Standings) -> str:
    """Return the figure of AOPD and its seed-only floor; "" without AOPD."""
    rows = []
    for label, _, entry in entries:
        if entry["aopd"] is not None:
            value, bottom = 100 * entry["aopd"], entry["aopd_floor"]
            mark = None if bottom is None else (100 * bottom, f"{label}: seeds alone {100 * bottom:.1f}")
            rows.append(Range(label, (), (0.0, value, f"{label}: AOPD {value:.1f}"), None, mark, f"{value:.1f}"))
    if not rows:
        return ""
    caption = (
        "AOPD (bar) and AOPD0, expected from seeds alone (tick): only the part beyond the tick is due to the order."
    )
    return figure(ranges(rows, "AOPD (points)", zero=True), caption)


def _variances(entries: Standings) -> str:
    """Return the figure of the variance components; "" when no method has them."""
    rows, numbers = [], []
    for label, _, entry in entries:
        if entry["task_order_variance"] is not None:
            order, seed = (100 * entry[key] ** 0.5 for key in ("task_order_variance", "task_seed_variance"))
            whole = [100 * entry[key] ** 0.5 for key in ("order_variance", "seed_variance")]
            tick = (seed, f"{label}: seeds, standard deviation {seed:.1f} points")
            bar = (0.0, order, f"{label}: order, standard deviation {order:.1f} points")
            rows.append(Range(label, (), bar, None, tick, f"{order:.1f} | {seed:.1f}"))
            numbers.append([Cell(label, label), *(Cell(f"{v:.2f}", v) for v in (order, seed, *whole))])
    if not rows:
        return ""
    heads = ["method", "order, single tasks", "seed, single tasks", "order, average accuracy", "seed, average accuracy"]
    caption = "Standard deviation of a task's final accuracy that is due to the order (bar) and to the seed (tick)."
    return figure(ranges(rows, "standard deviation (points)", zero=True), caption, table(heads, numbers))


def _costs(entries: Standings) -> list[str]:
    """Return the figures of accuracy against training time, stored bytes and, with compression, the network's bytes."""
    dense = {group.triple: run.network_bytes[0] for _, group, _ in entries for run in group.runs if run.network_bytes}

    def bytes_of(group: Group, run: Run) -> int | None:
        """Return those of the compressed network, or of the dense one beside others that are compressed."""
        return run.network_bytes[1] if run.network_bytes else dense.get(group.triple)

    figures = []
    costs: list[tuple[str, Callable[[Group, Run], float | None]]] = [
        ("training seconds per run", lambda group, run: run.train_seconds),
        ("stored bytes after the last task", lambda group, run: run.state_bytes),
        ("bytes of the network", bytes_of),
    ]
    for title, of in costs:
        dots = []
        for label, group, entry in entries:
            values = [v for run in group.runs if (v := of(group, run))]
            if values:
                cost, value = float(np.mean(values)), 100 * entry["mean"]
                dots.append((cost, value, label, f"{label}: {value:.1f} points, {cost:,.4g} {title}"))
        if dots:
            figures.append(figure(scatter(dots, title), f"Accuracy (points) against {title}."))
    return figures


def method_section(label: str, group: Group, entry: Mapping[str, Any]) -> str:
    """Return the section of one method: curves, tasks, position effect and accuracy matrices."""
    setting = entry["setting"]
    runs = list(group.complete(setting).values())
    names = {task: name for run in runs for task, name in run.task_names.items()}
    by_order: dict[tuple[int, ...], list[Any]] = {}
    for run in runs:
        by_order.setdefault(run.order, []).append(run.matrices[setting])
    matrices = {order: np.mean(found, axis=0) for order, found in sorted(by_order.items())}
    figures = [_curves(matrices)] if len({len(order) for order in matrices}) == 1 else []
    figures += [*_tasks(group, entry, names), _modules(runs)]
    body = f'<div class="figures">{"".join(f for f in figures if f)}</div>{_maps(matrices, names)}'
    return section(f"{label}", body, kind="method")


def _curves(matrices: Mapping[tuple[int, ...], Any]) -> str:
    """Return the figure of average accuracy after each task; "" when a cell is missing in every order."""
    averages = {
        order: np.array([100 * matrix[k, : k + 1].mean() for k in range(len(order))])
        for order, matrix in matrices.items()
    }
    lines = [(order_text(order), values) for order, values in averages.items() if not np.isnan(values).any()]
    if not lines:
        return ""
    rows = [[Cell(name), *(Cell(f"{v:.1f}", v) for v in values)] for name, values in lines[:DOTS]]
    heads = ["order", *(str(k + 1) for k in range(len(lines[0][1])))]
    caption = (
        "Average accuracy on the tasks learned so far, after each task: mean over orders, and band from the lowest to "
        "the highest order."
    )
    return figure(curves(lines, "tasks learned"), caption, table(heads, rows))


def _tasks(group: Group, entry: Mapping[str, Any], names: Mapping[int, str]) -> list[str]:
    """Return the figures of the disparity of each task and of the position effect."""
    orders, tasks, finals = group.finals(entry["setting"])
    means = 100 * robustness.seed_means(finals)
    if not tasks or len(orders) < 2:
        return []
    rows = []
    for t, task in enumerate(tasks):
        column = means[:, t]
        title = str(task) if names.get(task, str(task)) == str(task) else f"{task}: {names[task]}"
        shown = range(len(orders)) if len(orders) <= DOTS else (int(column.argmin()), int(column.argmax()))
        dots = [(float(column[r]), f"task {title}: {column[r]:.1f} in order {order_text(orders[r])}") for r in shown]
        low, high = float(column.min()), float(column.max())
        spread = f"{high - low:.1f}"
        rows.append(Range(title, dots, None, (low, high, f"task {title}: OPD {spread}"), None, spread))
    numbers = [
        [Cell(order_text(order)), *(Cell(f"{v:.1f}", v) for v in (*means[r], means[r].mean()))]
        for r, order in enumerate(orders[:DOTS])
    ]
    heads = ["order", *(f"task {task}" for task in tasks), "average"]
    caption = "Final accuracy of each task, one dot per order. The number at the right is the range over orders (OPD)."
    found = [figure(ranges(rows, "final accuracy (points)"), caption, table(heads, numbers, kind="sortable"))]
    effect = order_effects.position_effect(finals, orders)
    if effect is not None:
        places, centred = order_effects.centred_by_position(finals, orders)
        cells = [
            (int(p), 100 * float(v), f"task {tasks[t]} at position {p + 1}: {100 * v:+.1f}")
            for row, values in zip(places, centred, strict=True)
            for t, (p, v) in enumerate(zip(row, values, strict=True))
        ]
        slope = 100 * effect.slope
        rho = "" if effect.spearman is None else f", rank correlation {effect.spearman:+.2f}"
        caption = (
            "Position effect: final accuracy of a task minus its mean over orders, by the position at which it was "
            f"learned; {slope:+.2f} points per position{rho}."
        )
        found.append(figure(by_position(cells, slope, "position of the task"), caption))
    return found


def _modules(runs: Sequence[Any]) -> str:
    """Return the figure of the number of modules after each task; "" for a method that adds none by need."""
    grown = [run for run in runs if run.modules and all(run.modules)]
    if not grown or len({len(run.modules) for run in grown}) > 1:
        return ""
    lines = [(order_text(run.order), np.array([float(sum(m.values())) for m in run.modules])) for run in grown]
    places = list(grown[0].modules[0])
    rows = []
    for place in places:
        means = np.mean([[after.get(place, 0) for after in run.modules] for run in grown], axis=0)
        rows.append([Cell(place), *(Cell(f"{v:.1f}", v) for v in means.tolist())])
    heads = ["place", *(str(k + 1) for k in range(len(lines[0][1])))]
    caption = (
        "Modules after each task, all places together: mean over runs, and band from the fewest to the most. The table "
        "has the mean of each place."
    )
    return figure(curves(lines, "tasks learned"), caption, table(heads, rows))


def _maps(matrices: Mapping[tuple[int, ...], Any], names: Mapping[int, str]) -> str:
    """Return the accuracy matrices: the mean over orders by position, then one per order."""
    maps = []
    shapes = {matrix.shape for matrix in matrices.values()}
    if len(matrices) > 1 and len(shapes) == 1:
        mean = np.mean(list(matrices.values()), axis=0)
        positions = [f"position {k + 1}" for k in range(len(mean))]
        title = f"mean of {len(matrices)} orders, by position"
        maps.append(f"<figure>{heat(mean, positions, numbers=True)}<figcaption>{title}</figcaption></figure>")
    for order, matrix in list(matrices.items())[:MAPS]:
        tasks = [f"{task}: {names[task]}" if task in names else str(task) for task in order]
        last = f"<b>{100 * matrix[-1].mean():.1f}</b> <span>{text(order_text(order))}</span>"
        maps.append(f"<figure>{heat(matrix, tasks, numbers=True)}<figcaption>{last}</figcaption></figure>")
    rest = len(matrices) - MAPS
    more = (
        f"<p class=note>The accuracy matrices of {rest} more orders are in the folders of their runs.</p>"
        if rest > 0
        else ""
    )
    caption = (
        "<p>Accuracy matrices (seeds averaged). Each row shows the accuracies after learning one more task, from top "
        "to bottom; each column is an evaluated task, in the order of learning. Below each matrix: final average "
        "accuracy and order.</p>"
    )
    return f'{caption}<div class="maps">{"".join(maps)}</div>{legend()}{more}'
