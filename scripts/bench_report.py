"""Measure `clrun report` over many runs: make records of runs that were never trained, then time a fresh process.

    python scripts/bench_report.py [--runs 2000] [--tasks 20] [--keep FOLDER]

Prints wall and processor seconds and peak resident memory of the tables with report.html (what a sweep does at its end)
and of `clrun report` with the figures for papers.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from itertools import islice, product
from pathlib import Path

import numpy as np
from benchlib import Figure, finish

from clrun.results.metrics import AccuracyMatrix, summary
from clrun.results.records import COLUMNS
from clrun.system.files import csv_text, json_text

METHODS, SEEDS = 10, 10
MOST_SECONDS, MOST_MEGABYTES = 20, 500
QUICK = "--runs 200"
SETTINGS = ("cil", "til")


def make(folder: Path, runs: int, tasks: int) -> None:
    """Write `runs` run folders: 10 methods, 10 seeds, as many orders as it takes."""
    enough = range(-(-runs // (METHODS * SEEDS)))
    orders = [np.random.default_rng(r).permutation(tasks).tolist() for r in enough]
    for order, seed, method in islice(product(orders, range(SEEDS), range(METHODS)), runs):
        _make(folder / f"method-{method}_order-{'-'.join(map(str, order))[:40]}_seed-{seed}", order, seed, method)


def _make(folder: Path, order: list[int], seed: int, method: int) -> None:
    random = np.random.default_rng([seed, method, *order])
    rows, tasks = [], len(order)
    for i, setting in product(range(1, tasks + 1), SETTINGS):
        for j in range(i):
            right = int(random.binomial(500, 0.9 - 0.02 * (i - j) - 0.02 * method * (setting == "cil")))
            rows.append(_row(i, j, order, setting, right))
    matrices = {
        s: AccuracyMatrix.from_rows([row for row in rows if row["setting"] == s], order=order) for s in SETTINGS
    }
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json_text(_run(order, seed, method, matrices), indent=1))
    (folder / "accuracy.csv").write_text(csv_text([COLUMNS, *([row[name] for name in COLUMNS] for row in rows)]))
    (folder / "accuracy_matrix.png").touch()  # drawn by the run itself


def _row(i: int, j: int, order: list[int], setting: str, right: int) -> dict[str, object]:
    place = {"step": 100 * i, "position": i, "after": order[i - 1], "task": order[j], "task_position": j}
    counts = {"correct": right, "total": 500, "task_correct": right, "nll": 0.5}
    return place | {"split": "test", "setting": setting, "phase": "end"} | counts


def _run(order: list[int], seed: int, method: int, matrices: dict[str, AccuracyMatrix]) -> dict[str, object]:
    options = {f"option_{k}": k for k in range(60)}
    return {
        "schema": 1,
        "status": "completed",
        "error": None,
        "name": f"method{method}-images",
        "choices": {"method": f"method{method}", "backbone": "resnet18", "dataset": "images"},
        "overrides": [f"method=method{method}", f"seed={seed}", f"task_order.tasks={order}"],
        "seed": seed,
        "setting": "cil",
        "task_order": order,
        "task_names": [f"classes {5 * t} to {5 * t + 4}" for t in order],
        "accuracy_matrix": {s: m.by_position()[1:] for s, m in matrices.items()},
        "metrics": {s: summary(m) for s, m in matrices.items()},
        "cost": {
            "tasks": [
                {
                    "train_seconds": 10.0 + method,
                    "parameters": {"total": 11_000_000},
                    "state_bytes": {"total": 44_000_000},
                }
                for _ in order
            ]
        },
        "versions": {"python": "3.11", "torch": "2.14"},
        "finished": "2026-01-01T00:00:00+00:00",
        "config": {
            "name": f"method{method}-images",
            "seed": seed,
            "method": {"_target_": f"package.method{method}.Method"},
            "dataset": {"_target_": "package.images", **options},
            "scenario": {"_target_": "package.split", "n_tasks": len(order), "setting": "cil"},
            "task_order": {"_target_": "package.listed", "tasks": order},
            "backbone": {"_target_": "package.resnet18"},
            "job": {"eval_split": "test"},
        },
    }


def measure(title: str, code: str, folder: Path) -> list[Figure]:
    """Run `code` in a fresh process, print and return what it cost."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    peak = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    command = [sys.executable, "-c", f"{code}\n{peak}", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    megabytes = int(done.stdout.split()[-1]) / (1000**2 if sys.platform == "darwin" else 1000)
    figures = [
        Figure(f"{title}, wall", wall, MOST_SECONDS, True, ".1f", " s"),
        Figure(f"{title}, peak memory", megabytes, MOST_MEGABYTES, True, ".0f", " MB"),
    ]
    verdicts = " ".join(figure.verdict for figure in figures)
    print(f"{title:<40}{wall:6.1f} s wall {cpu:6.1f} s processor {megabytes:6.0f} MB  {verdicts}", flush=True)
    return figures


def main(words: list[str] | None = None) -> list[Figure]:
    """Make the records, measure, print and return the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        make(folder, args.runs, args.tasks)
        broken = folder / "broken"
        broken.mkdir(exist_ok=True)
        (broken / "run.json").write_text("{")
        start = "import sys, pathlib; from clrun.reporting import refresh, report; folder = pathlib.Path(sys.argv[1])"
        figures = measure("tables and report.html", f"{start}\nrefresh(folder)", folder)
        figures += measure("clrun report, with figures for papers", f"{start}\nreport([folder])", folder)
        size = (folder / "report.html").stat().st_size
        entries = json.loads((folder / "order_robustness.json").read_text())
        print(f"report.html: {size / 1e6:.1f} MB; {len(entries)} entries of {args.runs} runs of {args.tasks} tasks")
        return figures


if __name__ == "__main__":
    finish(main())
