"""Tables of many runs: sweep.csv, order_robustness.json and the comparison on the terminal.

Runs belong to one experiment group when their configurations are equal without seed, task order, name and the keys
outside the configuration hash. Within a group, orders and seeds vary; statistics compare the same task id.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from clrun import robustness
from clrun.config import config_hash, inside_hash
from clrun.errors import ConfigError
from clrun.files import csv_text, exclusive, json_text, replacing, writing
from clrun.metrics import METRICS, Floats
from clrun.records import read_run
from clrun.reporting.collect import Run, collect, run_folders
from clrun.reporting.tables import SETTINGS, Line, Standing, comparison_table, listing, printable

WITHIN_GROUP = ("seed", "task_order", "name")  # may vary inside a group, as may the keys outside the hash
COLUMNS = ("folder", "name", "status", "method", "backbone", "dataset", "setting", "seed", "order")
UNFINISHED = {
    "failed": "no error was recorded",
    "interrupted": "its process is gone; start it again to resume",
    "running": "its process is alive",
}
Pair = tuple[tuple[int, ...], int]  # (order, seed)


@dataclass(frozen=True)
class SweepResult:
    """What the run folders below some folders add up to.

    Attributes:
        runs: a run each, sorted by folder.
        robustness: content of order_robustness.json.
        skipped: (folder, reason) of folders that cannot be read.
        text: comparison table, then failed, interrupted and skipped folders; "" when there is nothing.
    """

    runs: list[Run]
    robustness: list[dict[str, Any]]
    skipped: list[tuple[str, str]]
    text: str

    def with_status(self, *status: str) -> list[Run]:
        """Return the runs in one of these states."""
        return [run for run in self.runs if run.status in status]


def refresh(sweep_dir: Path) -> SweepResult:
    """Read the run folders below `sweep_dir` and rewrite its sweep.csv and order_robustness.json, each atomically.

    One process at a time; others wait. Without runs nothing is written.

    Raises:
        ConfigError: the folder cannot be written.
    """
    if next(run_folders(sweep_dir), None) is None:
        return _result([], [])
    with exclusive(sweep_dir / ".lock"):
        result = _result(*collect([sweep_dir]))
        _write(result, sweep_dir)
    return result


def report(dirs: Sequence[Path], *, out: Path | None = None, pictures: bool = True) -> SweepResult:
    """Rebuild tables and pictures from run folders alone.

    For one folder its tables are rewritten in place, unless it is a single run's. Several folders are read as one
    sweep, and nothing is written into them but pictures: their joint tables go to `out`, when that is given.

    Args:
        dirs: sweeps' or runs' folders, or folders above them.
        out: where to write the tables instead; made when needed.
        pictures: draw accuracy_matrix.png where a completed run has none, after the tables.

    Raises:
        ConfigError: a folder does not exist, holds no run, or cannot be written.
    """
    for folder in dirs:
        if not folder.is_dir():
            raise ConfigError(f"report: no such folder: {folder}")
    result = _result(*collect(dirs))
    if not result.runs and not result.skipped:
        raise ConfigError(f"report: no run (run.json) in {', '.join(map(str, dirs))}")
    target = out if out or len(dirs) > 1 or (dirs[0] / "run.json").exists() else dirs[0]
    if target is not None:
        with writing(target):
            target.mkdir(parents=True, exist_ok=True)
        with exclusive(target / ".lock"):
            _write(result, target)
    if pictures and (undrawn := draw_missing(result.runs)):
        result = replace(result, text=f"{result.text}\n\n{listing('no picture drawn', undrawn)}")
    return result


def draw_missing(runs: Iterable[Run]) -> list[tuple[str, str]]:
    """Draw accuracy_matrix.png of every completed run that has none; return (folder, reason) where that failed."""
    from clrun.reporting.figures import draw_accuracy_matrix

    undrawn = []
    for run in runs:
        path = run.folder / "accuracy_matrix.png"
        if run.status == "completed" and not path.exists():
            try:
                draw_accuracy_matrix(read_run(run.folder), path)
            except ConfigError as error:
                undrawn.append((run.label, str(error)))
    return undrawn


def group_key(config: Mapping[str, object]) -> str:
    """Return the hash of a flattened configuration without the keys that may vary inside a group; 8 hex digits."""
    return config_hash({key: value for key, value in config.items() if not _below(key, WITHIN_GROUP)})[:8]


def _result(runs: list[Run], skipped: list[tuple[str, str]]) -> SweepResult:
    groups = _groups(runs)
    entries = [group.entries() for group in groups]
    parts = [comparison_table(_lines(groups, entries))] if groups else []
    parts += _notes(groups)
    for status, why in UNFINISHED.items():
        if listed := [(run.label, run.error or why) for run in runs if run.status == status]:
            parts.append(listing(status, listed))
    if skipped:
        parts.append(listing("skipped: not readable as runs", skipped))
    return SweepResult(runs, [entry for each in entries for entry in each], skipped, "\n\n".join(parts))


def _write(result: SweepResult, folder: Path) -> None:
    with replacing(folder / "sweep.csv") as file:
        file.write(sweep_csv(result.runs).encode())
    with replacing(folder / "order_robustness.json") as file:
        file.write(json_text(result.robustness, indent=1).encode())


def sweep_csv(runs: Sequence[Run]) -> str:
    """Return sweep.csv: a line a run, fractions in full precision, and every config key in which the runs differ."""
    settings = [setting for setting in SETTINGS if any(setting in run.metrics for run in runs)]
    measured = [(setting, name) for setting in settings for name in METRICS]
    keys = _differing([run.config for run in runs], ("seed", "name"))
    header = [*COLUMNS, *(f"{setting}_{name}" for setting, name in measured)]
    lines: list[list[Any]] = [[*header, "parameters", "state_bytes", "train_seconds", "error", *keys]]
    for run in runs:
        line: list[Any] = [run.label, run.name, run.status, run.method, run.backbone, run.dataset]
        line += [run.config.get("scenario.setting"), run.seed, " ".join(map(str, run.order))]
        line += [run.metrics.get(setting, {}).get(name) for setting, name in measured]
        line += [
            run.parameters,
            run.state_bytes,
            run.train_seconds,
            printable(run.error),
            *(run.config.get(key) for key in keys),
        ]
        lines.append(line)
    return csv_text(lines)


@dataclass(frozen=True)
class _Group:
    """Runs of one experiment.

    Attributes:
        key: hash of what they share.
        differing: short config keys, with values, that tell the group from others of the same method, backbone and
            data set.
        runs: its runs.
    """

    key: str
    differing: Mapping[str, object]
    runs: list[Run]

    @property
    def triple(self) -> tuple[str, str, str]:
        """(method, backbone, dataset)."""
        return self.runs[0].method, self.runs[0].backbone, self.runs[0].dataset

    @property
    def title(self) -> str:
        """Hash and differing keys."""
        return " ".join([self.key, *(f"{key}={value}" for key, value in self.differing.items())])

    @property
    def settings(self) -> list[str]:
        """Settings that any of its runs was evaluated in; the configured one when none was."""
        configured = self.runs[0].config.get("scenario.setting")
        present = [setting for setting in SETTINGS if any(setting in run.finals for run in self.runs)]
        return present or [setting for setting in SETTINGS if setting == configured]

    def complete(self, setting: str) -> dict[Pair, Run]:
        """Return the runs that count in `setting`: completed, every final cell there; the first of equals."""
        counted: dict[Pair, Run] = {}
        for run in self.runs:
            if run.status == "completed" and setting in run.finals:
                counted.setdefault((run.order, run.seed), run)
        return counted

    def missing(self, setting: str) -> list[dict[str, Any]]:
        """Return what should have counted and does not: runs, then combinations of order and seed that have no run.

        Combinations are those of every order with every seed when more than half of them were tried. Otherwise each
        order is taken to have seeds of its own.
        """
        counted = self.complete(setting)
        lacking = []
        for run in self.runs:
            if (run.order, run.seed) not in counted:
                reason = run.status if run.status != "completed" else f"not every task is evaluated in {setting}"
                lacking.append({"order": list(run.order), "seed": run.seed, "reason": reason, "folder": run.label})
        tried = {(run.order, run.seed) for run in self.runs if run.order}
        orders, seeds = sorted({order for order, _ in tried}), sorted({seed for _, seed in tried})
        if 2 * len(tried) > len(orders) * len(seeds):
            absent = [(o, s) for o in orders for s in seeds if (o, s) not in tried]
            lacking += [{"order": list(o), "seed": s, "reason": "no run", "folder": None} for o, s in absent]
        return lacking

    def entries(self) -> list[dict[str, Any]]:
        """Return its entries of order_robustness.json, one a setting."""
        return [self._entry(setting) for setting in self.settings]

    def _entry(self, setting: str) -> dict[str, Any]:
        orders, tasks, finals = _finals(self.complete(setting), setting)
        method, backbone, dataset = self.triple
        disparity = robustness.opd(finals) if tasks else None
        worst = robustness.worst_order(finals)
        return {
            "method": method,
            "backbone": backbone,
            "dataset": dataset,
            "group": self.title,
            "setting": setting,
            "opd": None if disparity is None else dict(zip(map(str, tasks), disparity.tolist(), strict=True)),
            "aopd": robustness.aopd(finals) if tasks else None,
            "mopd": robustness.mopd(finals) if tasks else None,
            "mean": robustness.mean(finals),
            "sd": robustness.sd(finals),
            "ci95": robustness.ci95(finals),
            "worst_order": None if worst is None else orders[worst],
            "n_orders": len(orders),
            "n_seeds": finals.shape[1],
            "orders": orders,
            "missing": self.missing(setting),
        }

    def forgetting(self, setting: str) -> float | None:
        """Return the mean over orders of forgetting, seeds first; None where a run has none."""
        by_order: dict[tuple[int, ...], list[float]] = {}
        for (order, _), run in self.complete(setting).items():
            value = run.metrics[setting]["forgetting"]
            by_order.setdefault(order, []).append(math.nan if value is None else value)
        value = float(np.mean([np.mean(values) for values in by_order.values()])) if by_order else math.nan
        return None if math.isnan(value) else value


def _finals(complete: Mapping[Pair, Run], setting: str) -> tuple[list[tuple[int, ...]], list[int], Floats]:
    """Return (orders, task ids, finals [R, S, T]) for `clrun.robustness`; S is the most seeds of any order.

    Orders that cover different tasks (`job.max_tasks`) have no disparity of a task: there are no ids then, and finals
    is [R, S, 1], the average accuracy.
    """
    orders = sorted({order for order, _ in complete})
    tasks = sorted(orders[0]) if orders else []
    same = all(sorted(order) == tasks for order in orders)
    seeds: dict[tuple[int, ...], list[int]] = {order: [] for order in orders}
    for order, seed in sorted(complete):
        seeds[order].append(seed)
    finals = np.full((len(orders), max(map(len, seeds.values()), default=0), len(tasks) if same else 1), np.nan)
    for r, order in enumerate(orders):
        for s, seed in enumerate(seeds[order]):
            values = complete[order, seed].finals[setting]
            finals[r, s] = [values[task] for task in tasks] if same else np.mean(list(values.values()))
    return orders, tasks if same else [], finals


def _groups(runs: Sequence[Run]) -> list[_Group]:
    """Sort runs into experiment groups, in order of first appearance."""
    members: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        members.setdefault((run.method, run.backbone, run.dataset, group_key(run.config)), []).append(run)
    alike: dict[tuple[str, ...], list[Mapping[str, object]]] = {}
    for key, group in members.items():
        alike.setdefault(key[:3], []).append(group[0].config)
    names = {key: _differing(configs, WITHIN_GROUP) for key, configs in alike.items()}
    return [
        _Group(key[3], {name: group[0].config.get(name) for name in names[key[:3]]}, group)
        for key, group in members.items()
    ]


def _lines(groups: Sequence[_Group], entries: Sequence[list[dict[str, Any]]]) -> list[Line]:
    """Return the lines of the comparison table, labelled with what varies between them."""
    varies = [len({group.triple[part] for group in groups}) > 1 for part in (1, 2)]
    lines = []
    for group, each in zip(groups, entries, strict=True):
        names = [group.triple[0], *(name for name, shown in zip(group.triple[1:], varies, strict=True) if shown)]
        keys = [f"{_last(key, group.differing)}={value}" for key, value in group.differing.items()]
        standings = {
            entry["setting"]: Standing(
                entry["mean"], entry["sd"], entry["aopd"], entry["mopd"], group.forgetting(entry["setting"])
            )
            for entry in each
        }
        orders, seeds = (max((entry[key] for entry in each), default=0) for key in ("n_orders", "n_seeds"))
        missing = max((len(entry["missing"]) for entry in each), default=len(group.runs))
        lines.append(Line(" ".join(names + keys), standings, orders, seeds, missing))
    return lines


def _notes(groups: Sequence[_Group]) -> list[str]:
    """Return what a reader of the table must know about the sets of runs behind its lines."""
    notes = []
    pairs = {frozenset(group.complete(setting)) for group in groups for setting in group.settings[:1]}
    if len(pairs - {frozenset()}) > 1:
        notes.append("note: the lines rest on different sets of orders and seeds; compare them with care.")
    return notes


def _differing(configs: Sequence[Mapping[str, object]], without: Iterable[str]) -> list[str]:
    """Return the keys inside the hash in which flattened configurations differ; a key may be absent in some. Sorted."""
    first, absent = configs[0] if configs else {}, object()
    keys: set[str] = set()
    for config in configs[1:]:
        keys |= {key for key in first.keys() | config.keys() if first.get(key, absent) != config.get(key, absent)}
    return sorted(key for key in keys if inside_hash(key) and not _below(key, without))


def _below(key: str, prefixes: Iterable[str]) -> bool:
    """Whether a dotted key is one of `prefixes` or below it."""
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)


def _last(key: str, others: Iterable[str]) -> str:
    """Return the last part of a dotted key, or all of it when another key ends alike."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in others) == 1 else key
