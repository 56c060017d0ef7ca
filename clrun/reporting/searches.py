"""A search for the worst order (order_search.json): reading it, its result in words, and its section of report.html."""

import os
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clrun.reporting.charts import path_of_search, text
from clrun.reporting.markup import Cell, details, figure, number, order_text, section, table
from clrun.reporting.tables import SETTINGS, WIDTH, command, points
from clrun.results.schema import search_problem
from clrun.system.errors import ConfigError, printable
from clrun.system.reading import MB, read_json

RECORD = "order_search.json"
SCHEMA = 1
LISTED = 40  # number of orders up to which the table of a search is shown unfolded
LIMIT = 64 * MB  # bytes of the file that are read
Search = Mapping[str, Any]


def read_search(path: Path) -> dict[str, Any]:
    """Return the content of an order_search.json.

    Raises:
        ConfigError: it cannot be read or was not written by this version of clrun.
    """
    search = read_json(path, remedy="remove the file to start a new search", limit=LIMIT)
    if not isinstance(search, dict) or search.get("schema") != SCHEMA:
        raise ConfigError(f"{path}: was not written by this version of clrun; remove the file to start a new search")
    if problem := search_problem(search):
        raise ConfigError(f"{path}: {problem}; remove the file to start a new search")
    return search


def find_searches(roots: Sequence[Path]) -> tuple[list[Search], list[tuple[str, str]]]:
    """Return the searches at or below `roots`, and (folder, reason) for each that cannot be read."""
    found: list[Search] = []
    skipped = []
    for root in roots:
        for folder, folders, files in os.walk(root):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if RECORD in files:
                try:
                    found.append(read_search(Path(folder) / RECORD))
                except ConfigError as error:
                    skipped.append((printable(os.path.relpath(folder, root)), str(error)))
    return found, skipped


def conclusion(search: Search) -> str:
    """Return the result of a search as one line; a second line has the command that runs the worst order again."""
    known = [trial for trial in search["trials"] if trial["accuracy"] is not None]
    known = [trial for trial in known if trial["accuracy"] == trial["accuracy"]]
    if not known:
        return "no order has been evaluated yet."
    if len(known) == 1:
        return f"one order has been evaluated so far: {points(known[0]['accuracy'])} points."
    low, high = (pick(trial["accuracy"] for trial in known) for pick in (min, max))
    counted = f"{len(known)} orders ({sum(trial['reused'] for trial in known)} of them reused)"
    if low == high:
        return f"all {counted} have the same accuracy, {points(low)} points: the order makes no difference."
    worst = min(known, key=lambda trial: trial["accuracy"])
    listed = ",".join(map(str, worst["order"]))
    again = _again(search["again"], f"task_order.tasks=[{listed}]")
    return (
        f"the worst of {counted} is {order_text(worst['order'])} with {points(low)} points; the best has "
        f"{points(high)}. The lowest of many accuracies is low in part by chance; to check it with other seeds, "
        + (f"run:\n{again}" if again else "run it again (the command that the file names is not shown).")
    )


def _again(stored: str, order: str) -> str | None:
    """Return the stored command with an order, built anew from its words; None when it is not a plain command."""
    try:
        program, *words = shlex.split(stored)
    except ValueError:
        return None
    return command([*words, order]) if program == "clrun" else None


def printed_conclusion(search: Search) -> str:
    """Return the conclusion wrapped for the terminal; the command stays on one line."""
    found, _, again = conclusion(search).partition("\n")
    lines = textwrap.wrap(f"search for the worst order, {method_of(search)}: {printable(found)}", WIDTH)
    return "\n".join([*lines, *([again] if again else [])])


def method_of(search: Search) -> str:
    """Return the name of the method that the search trained."""
    return printable(str(search["choices"].get("method") or search["name"]))


def search_sections(searches: Sequence[Search]) -> str:
    """Return one section of report.html for each search."""
    return "".join(map(_section, searches))


def _section(search: Search) -> str:
    title = f"Search for the worst order: {method_of(search)}"
    first, _, command_line = conclusion(search).partition("\n")
    rows = [
        [
            Cell(f"{trial['number']}", trial["number"]),
            Cell(number(trial["accuracy"]) if trial["accuracy"] is not None else trial["status"], trial["accuracy"]),
            Cell(order_text(trial["order"]), None, "whole"),
            Cell(_origin(trial), _origin(trial), "whole"),
            Cell("reused" if trial["reused"] else trial["status"], trial["status"]),
            Cell(trial["folder"], trial["folder"], "long"),
        ]
        for trial in search["trials"]
    ]
    heads = ["#", "accuracy", "order", "origin", "state", "folder"]
    listed = details("all orders tried", table(heads, rows, kind="sortable text path"), opened=len(rows) <= LISTED)
    dots = [
        (trial["number"], 100 * trial["accuracy"], _tip(trial), trial["source"] == "move")
        for trial in search["trials"]
        if trial["accuracy"] is not None
    ]
    setting = SETTINGS[search["setting"]]
    caption = (
        f"Final {setting} accuracy of every order tried: earlier runs and designed orders (light dots), orders made by "
        f"moving tasks in the worst one (dark dots), and the lowest accuracy so far (line). {search['started']} of "
        f"{search['budget']} runs were started; status: {search['status']}."
    )
    picture = figure(path_of_search(dots, "number of the order"), caption) if dots else ""
    again = f"<pre>{text(command_line)}</pre>" if command_line else ""
    said = f"<p>{text(first[0].upper() + first[1:])}</p>{again}"
    return section(title, f'{said}<div class="figures">{picture}</div>{listed}')


def _origin(trial: Mapping[str, Any]) -> str:
    return f"#{trial['parent']}: {trial['move']}" if trial["parent"] else str(trial["source"])


def _tip(trial: Mapping[str, Any]) -> str:
    return f"#{trial['number']}, {100 * trial['accuracy']:.1f}: {order_text(trial['order'])}, {_origin(trial)}"
