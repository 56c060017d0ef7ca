"""report.html: everything about a sweep on one page that opens offline.

The HTML is written without a template library, which keeps large reports fast. Accuracies are in points. A missing
value is a dash; runs that failed or are missing are listed before the results.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np

from clrun.reporting import appendix
from clrun.reporting.charts import text
from clrun.reporting.groups import Group, labels
from clrun.reporting.markup import Cell, count, details, number, section, table
from clrun.reporting.panels import Standings, method_section, overview_section
from clrun.reporting.searches import Search, search_sections
from clrun.reporting.tables import SETTINGS, interval_points

PAIRS = 60  # comparisons of two methods shown in the table


@dataclass(frozen=True)
class Page:
    """The content of report.html.

    Attributes:
        title: name of the sweep.
        groups: experiment groups.
        robustness: content of order_robustness.json.
        comparisons: content of method_comparison.json.
        skipped: (folder, reason) for each folder that cannot be read.
        notes: caveats about all groups.
        searches: content of each order_search.json.
    """

    title: str
    groups: Sequence[Group]
    robustness: Sequence[Mapping[str, Any]]
    comparisons: Sequence[Mapping[str, Any]]
    skipped: Sequence[tuple[str, str]]
    notes: Sequence[str]
    searches: Sequence[Search] = ()

    def settings(self) -> list[str]:
        """Return the settings that have entries; the one that the first group was trained in comes first."""
        own = self.groups[0].runs[0].config.get("scenario.setting") if self.groups else None
        found = [setting for setting in SETTINGS if any(entry["setting"] == setting for entry in self.robustness)]
        return sorted(found, key=lambda setting: setting != own)

    def entries(self, setting: str) -> list[tuple[str, Group, Mapping[str, Any]]]:
        """Return (label, group, entry of order_robustness.json) in a setting, best first."""
        pairs = []
        entries = iter(self.robustness)
        for label, group in zip(labels(self.groups), self.groups, strict=True):
            for own in group.settings:
                entry = next(entries)
                if own == setting:
                    pairs.append((label, group, entry))
        return sorted(pairs, key=lambda item: -1.0 if item[2]["mean"] is None else item[2]["mean"], reverse=True)


def render(page: Page) -> str:
    """Return the text of report.html. The same runs give the same text.

    Its Content-Security-Policy allows this style and this script alone, and no request: if a text of a run ever got
    past the escaping, the browser would neither execute it nor send anything.
    """
    settings = page.settings()
    first = settings[0] if settings else ""
    parts = [_header(page), appendix.problems_section(page.groups, page.robustness, page.skipped), _switch(settings)]
    for setting in settings:
        entries = page.entries(setting)
        body = [_comparison(page, setting, entries), overview_section(entries), _pairs(page, setting)]
        body += [method_section(label, group, entry) for label, group, entry in entries if entry["n_orders"]]
        parts.append(f'<div class="in-{setting}">{"".join(body)}</div>')
    parts.append(search_sections(page.searches))
    parts += [
        appendix.differences_section(page.groups),
        appendix.runs_section(page.groups),
        appendix.reproduction_section(page.groups),
    ]
    here = files("clrun.reporting")
    style, script = (here.joinpath(name).read_text("utf-8") for name in ("report.css", "report.js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src {_digest(style)}; script-src {_digest(script)}; base-uri 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}; form-action \'none\'">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{text(page.title)}: clrun report</title><style>{style}</style></head>"
        f'<body data-setting="{first}"><main>{"".join(parts)}</main><div id="tip" role="status" hidden></div>'
        f"<script>{script}</script></body></html>\n"
    )


def _digest(inline: str) -> str:
    """Return how a Content-Security-Policy names an inline style or script: no other one is used by the browser."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}'"


def _header(page: Page) -> str:
    """Return the title and the facts below it."""
    runs = [run for group in page.groups for run in group.runs]
    done = sum(run.status == "completed" for run in runs)
    orders, seeds = len({run.order for run in runs if run.order}), len({run.seed for run in runs})
    tasks = sorted({len(run.order) for run in runs if run.order})
    facts = [
        ("data", ", ".join(sorted({run.dataset for run in runs}))),
        ("backbone", ", ".join(sorted({run.backbone for run in runs}))),
        ("tasks", ", ".join(map(str, tasks))),
        ("methods", len(page.groups)),
        ("orders", orders),
        ("seeds", seeds),
        ("runs completed", f"{done} of {len(runs)}"),
        ("last run ended", max((run.finished for run in runs), default="").replace("T", " ")[:16]),
    ]
    cells = "".join(f"<div><dt>{name}</dt><dd>{text(value)}</dd></div>" for name, value in facts if value != "")
    return f'<header><h1>{text(page.title)}</h1><dl class="facts">{cells}</dl></header>'


def _switch(settings: Sequence[str]) -> str:
    """Return the buttons that choose the setting shown; "" for one setting."""
    if len(settings) < 2:
        return ""
    buttons = "".join(
        f'<button type="button" data-to="{s}" aria-pressed="{"true" if s == settings[0] else "false"}">'
        f"{SETTINGS[s]}</button>"
        for s in settings
    )
    return f'<nav class="switch" aria-label="setting">{buttons}</nav>'


HEADINGS = (
    ("method", ""),
    ("accuracy", "final average accuracy: mean and standard deviation over orders (seeds averaged first)"),
    (
        "95 % interval",
        "interval of the mean over R orders (t distribution, R - 1 degrees of freedom; cut at 0 and 100)",
    ),
    ("AOPD", "mean over tasks of the range of a task's final accuracy over the orders; lower is better"),
    ("AOPD0", "AOPD expected from seeds alone; * estimated from the standard deviation between seeds"),
    ("AOPD / d2", "AOPD divided by d2(R), which removes its growth with the number of orders R"),
    ("MOPD", "largest range of a task's final accuracy over the orders; lower is better"),
    ("worst order", "final average accuracy of the worst order"),
    ("worst cell", "lowest final accuracy of a task in any order"),
    ("order share", "part of the variance of a task's accuracy that is due to the order; the rest is due to seeds"),
    ("slope", "change of a task's final accuracy per position; above 0 tasks learned early are forgotten"),
    ("forgetting", "drop of a task's accuracy from its highest earlier value to the end; mean over tasks and orders"),
    ("parameters", "number of parameters after the last task"),
    ("stored bytes", "bytes that the method stores between tasks: parameters, memories and statistics"),
    ("training (s)", "training time of a run in seconds, mean over runs"),
    ("orders × seeds", ""),
    ("missing", "runs that failed, are unfinished or were never started; they are not in the statistics"),
)


LOGME = (
    "LogME",
    "log evidence per training row of a linear model on the frozen features, in nats; higher is better; comparable "
    "for the same rows and labels only",
)


def _comparison(page: Page, setting: str, entries: Standings) -> str:
    """Return the table of all methods in a setting, its caveats, and the meaning of its columns."""
    rows = [_standing(label, group, entry) for label, group, entry in entries]
    headings = list(HEADINGS)
    if any(group.logme is not None for _, group, _ in entries):
        place = [name for name, _ in HEADINGS].index("parameters")
        headings.insert(place, LOGME)
        for row, (_, group, _) in zip(rows, entries, strict=True):
            row.insert(place, Cell("–" if group.logme is None else f"{group.logme:.3f}", group.logme))
    known = [caveat for _, _, entry in entries for caveat in entry["caveats"]]
    said = list(dict.fromkeys(known))
    few = [caveat for entry in page.comparisons if entry["setting"] == setting for caveat in entry["caveats"]]
    notes = [*page.notes, *said, *dict.fromkeys(few)]
    listed = "".join(f"<li>{text(_whose(note[:1].upper() + note[1:], entries))}</li>" for note in notes)
    warning = f'<aside class="caveats"><h3>What these runs cannot show</h3><ul>{listed}</ul></aside>' if notes else ""
    terms = "".join(f"<dt>{name}</dt><dd>{text(meaning)}</dd>" for name, meaning in headings if meaning)
    names, meanings = zip(*headings, strict=True)
    body = table(names, rows, kind="sortable", titles=meanings)
    body += warning + details("What the columns mean", f"<dl>{terms}</dl>")
    return section(f"Comparison, {SETTINGS[setting]}", body)


def _whose(caveat: str, entries: Standings) -> str:
    """Return a caveat with the names of the methods that it is about, unless it is about all of them."""
    about = [label for label, _, entry in entries if caveat in entry["caveats"]]
    return caveat if len(about) in (0, len(entries)) else f"{', '.join(about)}: {caveat}"


def _standing(label: str, group: Group, entry: Mapping[str, Any]) -> list[Cell]:
    """Return the row of one method, in the order of HEADINGS."""
    low, high = interval_points(entry["ci95"]) or (None, None)
    position, cell = entry["position_effect"] or {}, entry["worst_cell"] or {}
    estimated = "*" if entry["aopd_floor_source"] == "spread of seeds" else ""
    seconds = [run.train_seconds for run in group.runs if run.train_seconds is not None]
    run, share = group.runs[-1], entry["task_order_share"]
    spread = "" if entry["sd"] is None else f" ± {number(entry['sd'])}"
    return [
        Cell(label, label),
        Cell(number(entry["mean"]) + spread, entry["mean"]),
        Cell("–" if low is None else f"{low:.1f} to {high:.1f}", low),
        Cell(number(entry["aopd"]), entry["aopd"]),
        Cell(number(entry["aopd_floor"]) + estimated, entry["aopd_floor"]),
        Cell(number(entry["aopd_normalised"]), entry["aopd_normalised"]),
        Cell(number(entry["mopd"]), entry["mopd"]),
        Cell(number(entry["worst_order_mean"]), entry["worst_order_mean"]),
        Cell(number(cell.get("accuracy")), cell.get("accuracy")),
        Cell("–" if share is None else f"{100 * share:.0f} %", share),
        Cell(number(position.get("slope"), sign=True), position.get("slope")),
        Cell(number(forgotten := group.forgetting(entry["setting"])), forgotten),
        Cell(count(run.parameters), run.parameters),
        Cell(count(run.state_bytes), run.state_bytes),
        Cell(f"{np.mean(seconds):.1f}" if seconds else "–", float(np.mean(seconds)) if seconds else None),
        Cell(f"{entry['n_orders']} × {entry['n_seeds']}", entry["n_orders"] * entry["n_seeds"]),
        Cell(str(len(entry["missing"]) or "–"), len(entry["missing"]), "bad" if entry["missing"] else ""),
    ]


def _pairs(page: Page, setting: str) -> str:
    """Return the section that compares methods on the same orders."""
    body = []
    for entry in page.comparisons:
        if entry["setting"] != setting:
            continue
        body.append(_agreement(entry))
        rows = [
            [
                Cell(f"{p['a']} − {p['b']}", f"{p['a']} {p['b']}"),
                Cell(number(p["mean"], sign=True), p["mean"]),
                Cell("–" if span is None else " to ".join(number(v / 100, sign=True) for v in span)),
                Cell(f"{p['p_holm']:.3g}", p["p_holm"], "good" if p["p_holm"] < 0.05 else ""),
                Cell(f"{p['p_wilcoxon']:.3g}", p["p_wilcoxon"]),
                Cell(f"{p['p_sign']:.3g}", p["p_sign"]),
                Cell("–" if p["p_t"] is None else f"{p['p_t']:.2g}", p["p_t"]),
                Cell(str(p["orders_needed"] or "–"), p["orders_needed"]),
                Cell(str(p["n"]), p["n"]),
            ]
            for p in sorted(entry["pairs"], key=lambda p: p["p_holm"])
            for span in [interval_points(p["ci95"], lowest=-100.0)]
        ]
        heads = [
            "difference",
            "mean",
            "95 % interval",
            "p (Holm)",
            "p (Wilcoxon)",
            "p (sign test)",
            "p (t test)",
            "orders needed",
            "orders",
        ]
        body.append(table(heads, rows[:PAIRS], kind="sortable"))
        if len(rows) > PAIRS:
            body.append(f"<p>{len(rows) - PAIRS} further pairs are in method_comparison.json.</p>")
    note = (
        "<p class=note>Differences are paired over orders; seeds are averaged first. The Wilcoxon signed-rank test and "
        "the sign test are exact and two-sided. Holm's correction adjusts the Wilcoxon p values for the number of "
        "comparisons. The t test assumes normal differences. Intervals are cut at -100 and 100 points. "
        "Orders needed: number of orders for 80 % power of a "
        "paired t test, if the true difference is as large as the one measured.</p>"
    )
    return section("Paired comparison on the same orders", "".join(body) + note) if body else ""


def _agreement(entry: Mapping[str, Any]) -> str:
    """Return the caveats of a comparison and how much its orders agree on the ranking of the methods."""
    orders = entry["n_orders"]
    lines = list(entry["caveats"])
    if entry["mean_ranks"]:
        ranks = sorted(zip(entry["mean_ranks"], entry["methods"], strict=True))
        listed = ", ".join(f"{label} {rank:.2f}" for rank, label in ranks)
        w = "–" if entry["kendall_w"] is None else f"{entry['kendall_w']:.3f}"
        p = "–" if entry["p_friedman"] is None else f"{entry['p_friedman']:.3g}"
        lines.append(
            f"{entry['dataset']}, {orders} shared orders: Kendall's W = {w} (1: every order ranks the methods alike), "
            f"Friedman test p = {p}. Mean ranks (1 is best): {listed}. Two mean ranks differ significantly at 5 % when "
            f"they are {entry['critical_difference']:.2f} or more apart (Nemenyi test)."
        )
    return "".join(f"<p>{text(line)}</p>" for line in lines)
