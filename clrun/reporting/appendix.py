"""Sections of report.html on the runs: failures, differences of configurations, a list, commands and references."""

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from clrun import __version__
from clrun.reporting.charts import text
from clrun.reporting.collect import Run
from clrun.reporting.groups import Group, differing, labels
from clrun.reporting.markup import Cell, details, number, order_text, section, table
from clrun.reporting.tables import SETTINGS, command
from clrun.system.yaml_files import conf_dir, description

LISTED = 200  # most rows of the list of missing runs, and most commands
GRID = 3  # a grid of orders and seeds is shown if it has at most this multiple of the number of runs as cells
VALUES = 12  # most values of a key that are listed
SIGNS = {"completed": "●", "failed": "✕", "interrupted": "◐", "running": "…", "no run": "–"}
CITED = ("method", "dataset", "backbone")


def problems_section(
    groups: Sequence[Group], entries: Sequence[Mapping[str, Any]], skipped: Sequence[tuple[str, str]]
) -> str:
    """Return the section of runs that failed, are unfinished, missing or unreadable; "" without any."""
    rows: dict[tuple[str, ...], None] = {}
    names = iter([label for label, group in zip(labels(groups), groups, strict=True) for _ in group.settings])
    errors = {run.label: run.error for group in groups for run in group.runs}
    for label, entry in zip(names, entries, strict=True):
        for missing in entry["missing"]:
            why = errors.get(missing["folder"] or "") or ""
            order = order_text(missing["order"])
            rows[label, missing["reason"], order, str(missing["seed"]), missing["folder"] or "–", why] = None
    rows |= {("–", "unreadable", "", "", folder, reason): None for folder, reason in skipped}
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
    body = table(["method", "problem", "order", "seed", "folder", "reason"], cells, kind="text")
    runs = "run" if len(rows) == 1 else "runs"
    return section(f"{len(rows)} {runs} failed or missing", body + more, kind="problems")


def differences_section(groups: Sequence[Group]) -> str:
    """Return the section of keys in which configurations differ: between methods, then within each method."""
    configs = [group.runs[0].config for group in groups]
    keys = [key for key in differing(configs, ("seed", "task_order", "name"))]
    rows = [[Cell(key), *(Cell(_value(config, key)) for config in configs)] for key in keys]
    body = (
        table(["key", *labels(groups)], rows, kind="text")
        if rows
        else "<p>The configurations of the methods do not differ.</p>"
    )
    within = []
    for label, group in zip(labels(groups), groups, strict=True):
        for key in differing([run.config for run in group.runs], ()):
            values = sorted({_value(run.config, key) for run in group.runs}, key=_natural)
            shown = ", ".join(values[:VALUES]) + (f", … ({len(values)})" if len(values) > VALUES else "")
            within.append([Cell(label), Cell(key), Cell(shown)])
    if within:
        body += "<h3>Within a method</h3>" + table(["method", "key", "values"], within, kind="text")
    return section("Differences of the configurations", body)


def _value(config: Mapping[str, object], key: str) -> str:
    return "–" if key not in config else "null" if config[key] is None else str(config[key])


def runs_section(groups: Sequence[Group]) -> str:
    """Return the section of runs: a grid of orders and seeds per method, then the list of all runs."""
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
    """Return a table of the status by order (row) and seed (column); "" where each order has its own seeds."""
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
    return command(_words(run)) or "–" if run.overrides else "–"


def _words(run: Run) -> list[str]:
    """Return the overrides of a run without those of Hydra's own options."""
    return [word for word in run.overrides if not word.startswith("hydra.")]


def reproduction_section(groups: Sequence[Group]) -> str:
    """Return the section with commands, versions, orders and references."""
    every = [run for group in groups for run in group.runs]
    lines = commands(every)
    body = "<h3>Commands</h3><p>These commands start the same runs. A completed run is not repeated in its folder.</p>"
    body += (
        f"<pre>{text_lines(lines[:LISTED])}</pre>"
        if lines
        else "<p>The files of the runs do not record their commands.</p>"
    )
    if refused := sum(bool(run.overrides) and command(_words(run)) is None for run in every):
        body += (
            f"<p>The commands of {refused} runs are not shown: they have words that are no plain overrides, or name a "
            "class or function. Their overrides are in run.json.</p>"
        )
    body += "<h3>Versions</h3>" + table(["component", "version"], _versions(every), kind="text")
    names = {task: name for run in every for task, name in run.task_names.items()}
    orders = sorted({run.order for run in every if run.order})
    named = [
        [Cell(order_text(order)), Cell(", ".join(names.get(task, str(task)) for task in order))] for order in orders
    ]
    counted = "1 order" if len(orders) == 1 else f"{len(orders)} orders"
    body += f"<h3>Orders</h3><p>{counted}, as task ids in the order of learning.</p>"
    body += details("orders", table(["order", "task names"], named, kind="text"), opened=len(orders) <= 12)
    return section("Reproduce and cite", body + _cite(every))


def text_lines(lines: Sequence[str]) -> str:
    """Return lines as escaped text for a <pre> element."""
    return "\n".join(map(text, lines))


def commands(runs: Sequence[Run]) -> list[str]:
    """Return command lines that start these runs.

    A run with an override that `clrun.reporting.tables.command` refuses has none. Runs that form more than half of a
    grid of values become one sweep, with a comment when the sweep has more runs than are here. Other runs, and runs
    with commas in a value (lists), become one command each.
    """
    started: dict[tuple[str, ...], dict[str, dict[str, None]]] = {}
    lists: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for run in runs:
        pairs = sorted(word.partition("=")[::2] for word in _words(run))
        if not pairs or command(_words(run)) is None:
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
            rest = f"  # starts {size} runs; {len(found)} of them are in this report" if len(found) < size else ""
            lines.append(shlex.join(["clrun", *(["-m"] if size > 1 else []), *words]) + rest)
        else:
            lines += [shlex.join(["clrun", *map(_word, zip(keys, values, strict=True))]) for values in found]
    return lines


def _word(pair: tuple[str, str]) -> str:
    """Return an override; one that removes a key has no value."""
    key, value = pair
    return key if key.startswith("~") and not value else f"{key}={value}"


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
    """Return the description of a choice of a configuration group, which names its paper; "" for choices of others."""
    folder = conf_dir() / group
    file = folder / f"{member}.yaml"
    return description(file) if file.parent == folder and file.is_file() else ""
