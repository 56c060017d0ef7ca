"""What do task orders and methods cost once the features of a frozen backbone are cached? Ratios within one run.

    python scripts/bench_sweep.py [--orders 24] [--size 224] [--pairs 3] [--threads N] [--only cold,further,...]

Every clrun is a process of its own, timed from start to end; what is compared takes turns, and the medians over the
pairs are shown. Beside each ratio of wall times stands that of processor times, which a busy machine disturbs less. All
four parts use 5,760 + 1,800 glyphs in 12 tasks and a timm vit_tiny with random weights.

cold     a sweep of orders x (simplecil, lda), features included, over one simplecil run, features included
further  one more run in a sweep over one more job of an empty Hydra application with the same configuration
ranpac   a ranpac run (M = 2000) beyond a simplecil run, over a bare script of its algebra: Gram matrices in float64,
         all strengths from one decomposition, solution, after every task; with n < M rows in the dual form, n x n
memory   memory added by reading cached features, four times as many over as many
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from benchlib import Figure, finish

ROOT = Path(__file__).parent.parent
TASKS = 12
QUICK = "--orders 3 --size 32 --pairs 1"
STRENGTHS = [10.0**k for k in range(-8, 9)]
EMPTY = """
import hydra, clrun.config.compose

@hydra.main(version_base="1.3", config_path={conf!r}, config_name="config")
def main(cfg):
    pass

main()
"""


class Cost(NamedTuple):
    """Seconds on the clock, and seconds of all processors together."""

    wall: float
    cpu: float

    def minus(self, other, count=1):
        return Cost((self.wall - other.wall) / count, (self.cpu - other.cpu) / count)

    def over(self, other):
        return Cost(self.wall / other.wall, self.cpu / other.cpu)

    def __str__(self):
        return f"{self.wall:.2f} s (processors {self.cpu:.2f} s)"


def median(costs):
    return Cost(*(statistics.median(values) for values in zip(*costs, strict=True)))


class Bench:
    """Starts processes with a feature cache of their own."""

    def __init__(self, args):
        self.args = args
        self.folder = Path(tempfile.mkdtemp(prefix="clrun-bench-"))
        self.count = 0

    def command(self, *words, cache="cache", sweep=False, program=("-m", "clrun")):
        """Run a command to its end; return what it took."""
        self.count += 1
        out = self.folder / f"run{self.count}"
        where = f"hydra.sweep.dir={out}" if sweep else f"hydra.run.dir={out}"
        size = self.args.size
        configuration = [
            "dataset=glyphs", f"scenario.n_tasks={TASKS}", "backbone=timm", "backbone.name=vit_tiny_patch16_224",
            "backbone.pretrained=false", f"backbone.image_size={size}", "hardware=cpu", "job.picture=false",
            "job.progress=false", where, *words,
        ]  # fmt: skip
        if self.args.threads:
            configuration.append(f"hardware.threads={self.args.threads}")
        environment = {**os.environ, "CLRUN_CACHE": str(self.folder / cache), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, *program, *(["-m"] if sweep else []), *configuration]
        used, start = _children(), time.perf_counter()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        cost = Cost(time.perf_counter() - start, _children() - used)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        shutil.rmtree(out, ignore_errors=True)  # an empty job leaves none
        return cost

    def orders(self, count):
        return "task_order=random", f"task_order.seed=range({count})"


def _children():
    """Seconds of processors that finished child processes have used."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def show(name, ratio, bound, text):
    """Print a line and return the figure; the verdict is on the wall times."""
    figure = Figure(name, ratio.wall, bound, True)
    print(f"{name:<9} {figure}, processors {ratio.cpu:.2f}  {text}", flush=True)
    return figure


def cold(bench):
    """A whole sweep over one run, both with an empty cache."""
    one = bench.command("method=simplecil", cache="first")
    many = bench.command("method=simplecil,lda", *bench.orders(bench.args.orders), cache="cache", sweep=True)
    return show("cold", many.over(one), 1.3, f"{2 * bench.args.orders} runs {many}, one run {one}, features included")


def further(bench):
    """One more run over one more empty job."""
    empty = bench.folder / "empty.py"
    empty.write_text(EMPTY.format(conf=str(ROOT / "conf")))
    few, more = 4, 4 + bench.args.orders
    bench.command("method=simplecil")
    ratios, ours, theirs = [], [], []
    for _ in range(bench.args.pairs):
        costs = {
            (program, count): bench.command("method=simplecil", *bench.orders(count), sweep=True, program=words)
            for program, words in (("clrun", ("-m", "clrun")), ("empty", (str(empty),)))
            for count in (few, more)
        }
        ours.append(costs["clrun", more].minus(costs["clrun", few], bench.args.orders))
        theirs.append(costs["empty", more].minus(costs["empty", few], bench.args.orders))
        ratios.append(ours[-1].over(theirs[-1]))
    return show("further", median(ratios), 3.0, f"a run {median(ours)}, an empty job {median(theirs)}")


def ranpac(bench):
    """What ranpac adds over the bare algebra."""
    bench.command("method=simplecil")
    ratios, added, bare = [], [], []
    for _ in range(bench.args.pairs):
        without = bench.command("method=simplecil")
        added.append(bench.command("method=ranpac", "method.m=2000").minus(without))
        environment = {**os.environ, "CLRUN_CACHE": str(bench.folder / "cache"), "PYTHONPATH": str(ROOT)}
        threads = str(bench.args.threads or 0)
        child = [sys.executable, __file__, "--child", "algebra", "--threads", threads]
        done = subprocess.run(child, env=environment, capture_output=True, text=True, check=True)
        bare.append(Cost(*map(float, done.stdout.split())))
        ratios.append(added[-1].over(bare[-1]))
    return show("ranpac", median(ratios), 1.3, f"ranpac adds {median(added)}, the bare algebra takes {median(bare)}")


def solved(matrix, right, strength):
    """Return (matrix + strength I)^-1 right."""
    import torch

    matrix.diagonal().add_(strength)
    return torch.cholesky_solve(right, torch.linalg.cholesky(matrix))


def algebra(threads):
    """Print the seconds that the algebra of ranpac takes on the cached training features, task by task."""
    import torch

    from clrun.data.sources.glyphs import glyphs

    if threads:
        torch.set_num_threads(threads)
    folder = Path(os.environ["CLRUN_CACHE"]) / "features"
    features = torch.from_numpy(next(a for a in map(np.load, sorted(folder.glob("*.npy"))) if len(a) == 5760))
    labels = glyphs(val_fraction=0.0, seed=0, augment=[]).train.y
    projection, width, classes = torch.randn(features.shape[1], 2000), 2000, 72
    grams = [torch.zeros(width, width, dtype=torch.float64) for _ in range(2)]
    sums = [torch.zeros(width, classes, dtype=torch.float64) for _ in range(2)]
    counts = [0, 0]
    fitted, seen = [], []  # rows and targets, for the dual form
    start, used = time.perf_counter(), time.process_time()
    for task in range(TASKS):
        rows = (labels // (classes // TASKS) == task).nonzero()[:, 0]
        lifted = (features[rows] @ projection).relu().double()
        targets = torch.nn.functional.one_hot(labels[rows], classes).double()
        fifth = torch.rand(len(rows)) < 0.2
        for part, mask in enumerate((~fifth, fifth)):
            grams[part] += lifted[mask].t() @ lifted[mask]
            sums[part] += lifted[mask].t() @ targets[mask]
            counts[part] += int(mask.sum())
        fitted.append(lifted[~fifth])
        seen.append((lifted, targets))
        if counts[0] < width:
            few = torch.cat(fitted)
            values, vectors = torch.linalg.eigh(few @ few.t())
            vectors = few.t() @ vectors / values.clamp_(min=1e-12).sqrt()
        else:
            values, vectors = torch.linalg.eigh(grams[0])
        projected = vectors.t() @ sums[0]
        errors = {}
        for strength in STRENGTHS:
            weights = vectors @ (projected / (values.clamp(min=0) + strength)[:, None])
            errors[strength] = float((weights * (grams[1] @ weights - 2 * sums[1])).sum()) + counts[1]
        best = min(errors, key=errors.get)
        if sum(counts) < width:
            few, aims = (torch.cat(part) for part in zip(*seen, strict=True))
            few.t() @ solved(few @ few.t(), aims, best)
        else:
            solved(grams[0] + grams[1], sums[0] + sums[1], best)
    print(time.perf_counter() - start, time.process_time() - used)


def memory(bench):
    """Memory added by reading features, by their number."""
    added = {}
    for rows in (100_000, 400_000):
        environment = {**os.environ, "CLRUN_CACHE": str(bench.folder / "rows"), "PYTHONPATH": str(ROOT)}
        child = [sys.executable, __file__, "--child", "reading", "--rows", str(rows)]
        done = subprocess.run(child, env=environment, capture_output=True, text=True, check=True)
        added[rows] = float(done.stdout)
    texts = [f"{rows:,} rows ({rows * 768 / 1e6:.0f} MB) add {mb:.1f} MB" for rows, mb in added.items()]
    few, many = added.values()
    figure = Figure("memory, four times the rows", max(1.0, many) / max(1.0, few), 1.3, True)
    print(f"memory    {figure}  {', '.join(texts)}", flush=True)
    return figure


def reading(rows):
    """Print the MB of resident memory that two passes over so many cached features add, in order and shuffled."""
    from clrun.data.feature_cache import FeatureCache, default_folder
    from clrun.running.accounting import PeakMemory
    from clrun.system.hardware import Hardware

    def compute():
        return (np.full((1000, 192), k, np.float32) for k in range(rows // 1000))

    features = FeatureCache(default_folder()).get(
        {"rows": rows}, shape=(rows, 192), compute=compute, agrees=lambda stored: True, about={}
    )
    order = np.random.default_rng(0).permutation(rows)
    memory = PeakMemory(Hardware("cpu", 1, "fp32", 1, 0, True, True, False))
    memory.reset()
    before = memory.read()
    for start in range(0, rows, 250):
        features.take(np.arange(start, start + 250)).sum()
    for start in range(0, rows, 250):
        features.take(order[start : start + 250]).sum()
    print((memory.read() - before) / 1e6)


def main(words=None):
    """Measure, print and return the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--orders", type=int, default=24)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--only", default="cold,further,ranpac,memory")
    parser.add_argument("--child", choices=("algebra", "reading"), help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.child == "algebra":
        algebra(args.threads)
        return []
    if args.child == "reading":
        reading(args.rows)
        return []
    bench = Bench(args)
    try:
        return [part(bench) for part in (cold, further, ranpac, memory) if part.__name__ in args.only.split(",")]
    finally:
        shutil.rmtree(bench.folder)


if __name__ == "__main__":
    finish(main())
