"""The results of many runs: sweep.csv, order_robustness.json, method_comparison.json, report.html, the printed table.

Runs are sorted into experiment groups first (`clrun.reporting.groups`).
"""

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clrun.reporting import searches as order_searches
from clrun.reporting.collect import Run, collect, run_folders
from clrun.reporting.compare import compare
from clrun.reporting.data_groups import DataOfRuns
from clrun.reporting.groups import SEARCHED, Group, differing, group_runs, labels
from clrun.reporting.page import Page, render
from clrun.reporting.tables import EVALUATED, WIDTH, Line, Standing, comparison_table, listing
from clrun.results.metrics import METRICS, UNSEEN
from clrun.results.records import read_run
from clrun.system.errors import ConfigError, printable
from clrun.system.files import csv_text, json_text, make_folder, remove_leftovers, replace_text
from clrun.system.locks import exclusive

PICTURE = "accuracy_matrix.png"
FEW = 50  # a report draws at most this number of figures of single runs without --pictures
COLUMNS = ("folder", "name", "status", "method", "backbone", "dataset", "setting", "seed", "order")
UNFINISHED = {
    "failed": "no error was recorded",
    "interrupted": "its process has ended; start the same command again, with its folder, to resume it",
    "running": "its process is running",
}


@dataclass(frozen=True)
class SweepResult:
    """The results of all runs at or below some folders.

    Attributes:
        runs: all runs, sorted by folder.
        groups: the same runs by experiment.
        robustness: content of order_robustness.json.
        comparisons: content of method_comparison.json.
        skipped: (folder, reason) for each folder that cannot be read.
        searches: content of each order_search.json.
        text: comparison table and notes, then failed, interrupted and skipped folders; "" without any of them.
        page: the report.html that was written; None when none was written.
    """

    runs: list[Run]
    groups: list[Group]
    robustness: list[dict[str, Any]]
    comparisons: list[dict[str, Any]]
    skipped: list[tuple[str, str]]
    searches: list[order_searches.Search]
    text: str
    page: Path | None = None


def refresh(sweep_dir: Path) -> SweepResult:
    """Read the run folders below `sweep_dir` and rewrite its tables and report.html, each file atomically.

    Only one process does this at a time; others wait for it. Without runs nothing is written.

    Raises:
        ConfigError: the folder cannot be written.
    """
    if next(run_folders(sweep_dir), None) is None:
        return read_runs([])
    with exclusive(sweep_dir / ".lock"):
        remove_leftovers(sweep_dir)
        result = read_runs([sweep_dir])
        _write(result, sweep_dir)
    return replace(result, page=sweep_dir / "report.html")


def report(
    dirs: Sequence[Path], *, out: Path | None = None, pictures: bool = True, every_picture: bool = False
) -> SweepResult:
    """Rebuild tables and figures from the files of runs.

    For one folder, its tables and report.html are rewritten in place; the folder of a single run gets report.html only.
    Several folders are read as one sweep. Their joint tables and report.html are written to `out` if it is given;
    nothing but missing figures is written into the folders themselves.

    Args:
        dirs: folders of sweeps or runs, or folders above them.
        out: folder for the tables instead; it is created when it does not exist.
        pictures: also write figures and tables for papers into the folder `report` beside the tables, and draw
            accuracy_matrix.png for completed runs without one, if there are at most FEW.
        every_picture: draw accuracy_matrix.png also if there are more, which takes about 0.3 seconds each.

    Raises:
        ConfigError: a folder does not exist, has no run, or cannot be written.
    """
    for folder in dirs:
        if not folder.is_dir():
            raise ConfigError(f"report: no such folder: {folder}")
    result = read_runs(dirs)
    if not result.runs and not result.skipped:
        raise ConfigError(f"report: no run (run.json) found in {', '.join(map(str, dirs))}")
    target = out if out or len(dirs) > 1 else dirs[0]
    if target is not None:
        _rebuild(result, target, alone=(target / "run.json").exists(), pictures=pictures)
        result = replace(result, page=target / "report.html")
    if pictures and (note := _draw(result.runs, every=every_picture)):
        result = replace(result, text=f"{result.text}\n\n{note}")
    return result


def _draw(runs: Sequence[Run], *, every: bool) -> str:
    """Draw missing figures of single runs; return a message about those that are still missing, "" for none."""
    missing = [run for run in runs if run.status == "completed" and not (run.folder / PICTURE).exists()]
    if len(missing) > FEW and not every:
        return f"{len(missing)} runs have no {PICTURE} (job.picture=false); to draw them, run clrun report --pictures"
    undrawn = _drawn(missing)
    return listing("figures that could not be drawn", undrawn) if undrawn else ""


def _rebuild(result: SweepResult, target: Path, *, alone: bool, pictures: bool) -> None:
    """Write tables, report.html and the files for papers; for a single run (`alone`) report.html only."""
    if alone:
        _write_page(result, target)
        return
    make_folder(target)
    with exclusive(target / ".lock"):
        remove_leftovers(target, "report")
        _write(result, target)
        if pictures:
            from clrun.reporting import paper

            page = page_of(result, "")
            standings = {setting: page.entries(setting) for setting in page.settings()}
            paper.write(target / "report", standings, result.comparisons)


def _drawn(runs: Iterable[Run]) -> list[tuple[str, str]]:
    """Draw the accuracy matrices of these runs; return (folder, reason) for each that could not be drawn."""
    from clrun.reporting.figures import draw_accuracy_matrix

    undrawn = []
    for run in runs:
        try:
            draw_accuracy_matrix(read_run(run.folder), run.folder / PICTURE)
        except ConfigError as error:
            undrawn.append((run.label, str(error)))
    return undrawn


def read_runs(roots: Sequence[Path]) -> SweepResult:
    """Read the runs at or below `roots` and compute everything that a report shows; nothing is written."""
    runs, skipped = collect(roots)
    searches, unreadable = order_searches.find_searches(roots)
    skipped += unreadable
    groups = group_runs(runs)
    entries = [group.entries() for group in groups]
    parts = [comparison_table(_lines(groups, entries))] if groups else []
    comparisons = compare(groups)
    notes = [*_notes(runs, groups), *dict.fromkeys(caveat for entry in comparisons for caveat in entry["caveats"])]
    if any(group.searched for group in groups):
        notes.append(f"orders=searched: {SEARCHED}")
    parts += ["\n".join(textwrap.wrap(f"note: {printable(note)}", WIDTH)) for note in notes]
    parts += map(order_searches.printed_conclusion, searches)
    for status, why in UNFINISHED.items():
        if listed := [(run.label, run.error or why) for run in runs if run.status == status]:
            parts.append(listing(status, listed))
    if skipped:
        parts.append(listing("skipped because they cannot be read", skipped))
    robustness = [entry for each in entries for entry in each]
    return SweepResult(runs, groups, robustness, comparisons, skipped, searches, "\n\n".join(parts))


def _write(result: SweepResult, folder: Path) -> None:
    replace_text(folder / "sweep.csv", sweep_csv(result.runs))
    replace_text(folder / "order_robustness.json", json_text(result.robustness, indent=1))
    replace_text(folder / "method_comparison.json", json_text(result.comparisons, indent=1))
    _write_page(result, folder)


def _write_page(result: SweepResult, folder: Path) -> None:
    replace_text(folder / "report.html", render(page_of(result, folder.absolute().name)))


def page_of(result: SweepResult, title: str) -> Page:
    """Return the content of report.html."""
    notes = _notes(result.runs, result.groups)
    return Page(title, result.groups, result.robustness, result.comparisons, result.skipped, notes, result.searches)


def sweep_csv(runs: Sequence[Run]) -> str:
    """Return sweep.csv: one line per run, as `sweep_table` has them."""
    header, lines = sweep_table(runs)
    return csv_text([header, *lines])


def sweep_table(runs: Sequence[Run]) -> tuple[list[str], list[list[Any]]]:
    """Return the header and one line per run: fractions in full precision, every config key in which the runs differ.

    Where runs of one data set have seen different data, the column `data` has the first digits of their digest.

    None stands for a value that a run does not have; orders are task ids separated by spaces.
    """
    settings = [setting for setting in EVALUATED if any(setting in run.metrics for run in runs)]
    present = {(s, name) for run in runs for s, own in run.metrics.items() for name in UNSEEN if own[name] is not None}
    measured = [(s, name) for s in settings for name in METRICS if name not in UNSEEN or (s, name) in present]
    keys = differing([run.config for run in runs], ("seed", "name"))
    header = [*COLUMNS, *(f"{setting}_{name}" for setting, name in measured)]
    compressed = any(run.network_bytes for run in runs)
    header += ["parameters", "state_bytes", "train_seconds", "logme", "error"]
    header += [*(("dense_bytes", "compressed_bytes") if compressed else ()), *keys]
    data = DataOfRuns(runs)
    seen = [data.label(run) for run in runs]
    header += ["data"] if any(seen) else []
    lines: list[list[Any]] = []
    for run, digest in zip(runs, seen, strict=True):
        line: list[Any] = [run.label, run.name, run.status, run.method, run.backbone, run.dataset]
        line += [run.config.get("scenario.setting"), run.seed, " ".join(map(str, run.order))]
        line += [run.metrics.get(setting, {}).get(name) for setting, name in measured]
        line += [
            run.parameters,
            run.state_bytes,
            run.train_seconds,
            run.logme,
            printable(run.error),
            *((run.network_bytes or (None, None)) if compressed else ()),
            *(run.config.get(key) for key in keys),
            *([digest or None] if any(seen) else []),
        ]
        lines.append(line)
    return header, lines


def _lines(groups: Sequence[Group], entries: Sequence[list[dict[str, Any]]]) -> list[Line]:
    """Return the lines of the comparison table, labelled with the choices in which they differ."""
    lines = []
    for group, label, each in zip(groups, labels(groups), entries, strict=True):
        standings = {
            entry["setting"]: Standing(
                entry["mean"], entry["sd"], entry["aopd"], entry["mopd"], group.forgetting(entry["setting"])
            )
            for entry in each
        }
        orders, seeds = (max((entry[key] for entry in each), default=0) for key in ("n_orders", "n_seeds"))
        missing = max((len(entry["missing"]) for entry in each), default=len(group.runs))
        lines.append(Line(label, standings, orders, seeds, missing, group.logme))
    return lines


def _notes(runs: Sequence[Run], groups: Sequence[Group]) -> list[str]:
    """Return caveats about the sets of runs behind the lines of the table."""
    notes = DataOfRuns(runs).notes()
    pairs = {frozenset(group.complete(setting)) for group in groups for setting in group.settings[:1]}
    if len(pairs - {frozenset()}) > 1:
        notes.append("the methods were run on different sets of orders and seeds; compare them with care.")
    return notes
