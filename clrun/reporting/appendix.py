"""The rest of report.html: what failed, which runs there are, how they differ, how to run them again."""

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from clrun import __version__
from clrun.config.groups import conf_dir
from clrun.reporting.charts import text
from clrun.reporting.collect import Run
from clrun.reporting.groups import Group, differing, labels
from clrun.reporting.markup import Cell, details, number, order_text, section, table
from clrun.reporting.tables import SETTINGS

LISTED = 200  # rows of the lists of what is missing
GRID = 3  # times the runs, cells up to which orders x seeds are shown as a grid
VALUES = 12  # values of a key shown
SIGNS = {"completed": "●", "failed": "✕", "interrupted": "◐", "running": "…", "no run": "–"}
CITED = ("method", "dataset", "backbone")


def problems(groups: Sequence[Group], entries: Sequence[Mapping[str, Any]], skipped: Sequence[tuple[str, str]]) -> str:
    """Return what failed, is unfinished, missing or unreadable; "" when nothing is."""
    rows: dict[tuple[str, ...], None] = {}
    names = iter([label for label, group in zip(labels(groups), groups, strict=True) for _ in group.settings])
    errors = {run.label: run.error for group in groups for run in group.runs}
    for label, entry in zip(names, entries, strict=True):
        for lack in entry["missing"]:
            why = errors.get(lack["folder"] or "") or ""
            order = order_text(lack["order"])
            rows[label, lack["reason"], order, str(lack["seed"]), lack["folder"] or "–", why] = None
    rows |= {("–", "not readable", "", "", folder, reason): None for folder, reason in skipped}
    if not rows:
        return ""
    cells = [
        [
            Cell(value, None, kind)
            for value, kind in zip(row, ("", "whole", "whole", "whole", "long", "long"), strict=True)
        ]
        for row in list(rows)[:LISTED]
    ]
    more = f"<p>and {len(rows) - LISTED} more</p>" if len(rows) > LISTED else ""
    body = table(["method", "what", "order", "seed", "folder", "why"], cells, kind="text")
    runs = "run" if len(rows) == 1 else "runs"
    return section(f"{len(rows)} {runs} failed or missing", body + more, kind="problems")


def differences(groups: Sequence[Group]) -> str:
    """Return the keys in which the configurations differ: between methods, then inside them."""
    configs = [group.runs[0].config for group in groups]
    keys = [key for key in differing(configs, ("seed", "task_order", "name"))]
    rows = [[Cell(key), *(Cell(_value(config, key)) for config in configs)] for key in keys]
    body = table(["key", *labels(groups)], rows, kind="text") if rows else "<p>None between methods.</p>"
    within = []
    for label, group in zip(labels(groups), groups, strict=True):
        for key in differing([run.config for run in group.runs], ()):
            values = sorted({_value(run.config, key) for run in group.runs}, key=_natural)
            shown = ", ".join(values[:VALUES]) + (f", … ({len(values)})" if len(values) > VALUES else "")
            within.append([Cell(label), Cell(key), Cell(shown)])
    if within:
        body += "<h3>Inside a method</h3>" + table(["method", "key", "values"], within, kind="text")
    return section("Differences of the configurations", body)


def _value(config: Mapping[str, object], key: str) -> str:
    return "–" if key not in config else "null" if config[key] is None else str(config[key])


def runs(groups: Sequence[Group]) -> str:
    """Return which runs there are: a grid of orders and seeds for each method, then all of them."""
    grids = [
        f"<figure><figcaption>{text(label)}</figcaption>{grid}</figure>"
        for label, group in zip(labels(groups), groups, strict=True)
        if (grid := _grid(group))
    ]
    key = ", ".join(f"{sign} {status}" for status, sign in SIGNS.items())
    body = f'<p class=note>{key}</p><div class="grids">{"".join(grids)}</div>' if grids else ""
    settings = [s for s in SETTINGS if any(s in run.metrics for group in groups for run in group.runs)]
    rows = [
        [
            Cell(run.label, run.label),
            Cell(run.status, run.status, "" if run.status == "completed" else "bad"),
            Cell(label, label),
            Cell(order_text(run.order), order_text(run.order), "whole"),
            Cell(str(run.seed), run.seed),
            *(Cell(number(v := run.metrics.get(s, {}).get("average_accuracy")), v) for s in settings),
            Cell(_command(run), _command(run)),
        ]
        for label, group in zip(labels(groups), groups, strict=True)
        for run in group.runs
    ]
    heads = ["folder", "status", "method", "order", "seed", *(f"accuracy {s}" for s in settings), "command"]
    return section("Runs", body + details(f"All {len(rows)} runs", table(heads, rows, kind="sortable text")))


def _grid(group: Group) -> str:
    """Return the state of each order (row) and seed (column); "" where orders have seeds of their own."""
    orders = sorted({run.order for run in group.runs if run.order})
    seeds = sorted({run.seed for run in group.runs})
    if not orders or len(orders) * len(seeds) > GRID * len(group.runs):
        return ""
    states: dict[tuple[tuple[int, ...], int], str] = {}
    for run in group.runs:
        if states.get((run.order, run.seed)) != "completed":
            states[run.order, run.seed] = run.status
    rows = []
    for order in orders:
        cells = [Cell(order_text(order))]
        for seed in seeds:
            state = states.get((order, seed), "no run")
            cells.append(Cell(SIGNS.get(state, state), None, "" if state == "completed" else "bad"))
        rows.append(cells)
    return table(["order", *(f"seed {seed}" for seed in seeds)], rows)


def _command(run: Run) -> str:
    return shlex.join(["clrun", *(o for o in run.overrides if not o.startswith("hydra."))]) if run.overrides else "–"


def reproduce(groups: Sequence[Group]) -> str:
    """Return commands, versions, orders and references."""
    every = [run for group in groups for run in group.runs]
    lines = commands(every)
    body = "<h3>Commands</h3><p>Every run, as it was started; a finished run is not repeated in the same folder.</p>"
    body += f"<pre>{text_lines(lines[:LISTED])}</pre>" if lines else "<p>The runs do not say how they were started.</p>"
    body += "<h3>Versions</h3>" + table(["what", "version"], _versions(every), kind="text")
    names = {task: name for run in every for task, name in run.task_names.items()}
    orders = sorted({run.order for run in every if run.order})
    named = [
        [Cell(order_text(order)), Cell(", ".join(names.get(task, str(task)) for task in order))] for order in orders
    ]
    body += f"<h3>Orders</h3><p>Tasks by identity, in the order of learning; {len(orders)} orders.</p>"
    body += details("orders", table(["order", "names of the tasks"], named, kind="text"), opened=len(orders) <= 12)
    return section("Cite and reproduce", body + _cite(every))


def text_lines(lines: Sequence[str]) -> str:
    """Return lines escaped for a <pre>."""
    return "\n".join(map(text, lines))


def commands(runs: Sequence[Run]) -> list[str]:
    """Return command lines that start these runs: a sweep where they form most of a grid, else one by one.

    A sweep says when it holds more than is there. Values with commas, as lists have, are started one by one.
    """
    started: dict[tuple[str, ...], dict[str, dict[str, None]]] = {}
    lists: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for run in runs:
        words = [word for word in run.overrides if not word.startswith("hydra.")]
        pairs = sorted(word.partition("=")[::2] for word in words)
        if not pairs:
            continue
        keys = tuple(key for key, _ in pairs)
        values = started.setdefault(keys, {key: {} for key in keys})
        for key, value in pairs:
            values[key][value] = None
        lists.setdefault(keys, set()).add(tuple(value for _, value in pairs))
    lines = []
    for keys, options in started.items():
        size, found = math.prod(map(len, options.values())), sorted(lists[keys])
        if len(found) > size / 2 and not any("," in value for values in options.values() for value in values):
            words = [f"{key}={','.join(sorted(values, key=_natural))}" for key, values in options.items()]
            rest = f"  # {len(found)} of these {size} runs are here" if len(found) < size else ""
            lines.append(shlex.join(["clrun", *(["-m"] if size > 1 else []), *words]) + rest)
        else:
            lines += [shlex.join(["clrun", *map("=".join, zip(keys, values, strict=True))]) for values in found]
    return lines


def _natural(value: str) -> tuple[int, str]:
    return (int(value), "") if value.isdigit() else (-1, value)


def _versions(runs: Sequence[Run]) -> list[list[Cell]]:
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for name, version in run.versions.items():
            if version is not None:
                found.setdefault(str(name), {})[str(version)] = None
    rows = [[Cell(name), Cell(", ".join(values))] for name, values in found.items()]
    return [[Cell("report written by clrun"), Cell(__version__)], *rows]


def _cite(runs: Sequence[Run]) -> str:
    sources = [
        "OPD, AOPD, MOPD: Yoon et al., Scalable and Order-robust Continual Learning with Additive Parameter "
        "Decomposition, ICLR 2020, arXiv 1902.09432",
        "average accuracy, backward transfer: Lopez-Paz and Ranzato, NeurIPS 2017, arXiv 1706.08840",
        "forgetting: Chaudhry et al., ECCV 2018, arXiv 1801.10112",
    ]
    for group in CITED:
        for member in sorted({str(getattr(run, group)) for run in runs}):
            if source := _source(group, member):
                sources.append(f"{group} {member}: {source}")
    listed = "".join(f"<li>{text(source)}</li>" for source in sources)
    entry = (
        f"@software{{clrun,\n  title = {{clrun: continual-learning experiments}},\n  version = {{{__version__}}}\n}}"
    )
    return f"<h3>References</h3><ul>{listed}</ul><pre>{text_lines(entry.splitlines())}</pre>"


def _source(group: str, member: str) -> str:
    """Return the first comment of a member of a configuration group, which says where it comes from; "" for others'."""
    folder = conf_dir() / group
    file = folder / f"{member}.yaml"
    if file.parent != folder or not file.is_file():
        return ""
    comments = (line.removeprefix("#").strip() for line in file.read_text("utf-8").splitlines() if line.startswith("#"))
    return next((line for line in comments if line and not line.startswith("@")), "")
