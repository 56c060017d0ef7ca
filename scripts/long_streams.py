"""Time and memory of each of 100 tasks of one run: what grows, and what must not.

    python scripts/long_streams.py [--tasks 100] [--only finetune er ...] [--keep FOLDER] [--write]

Tasks of two classes of generated images (dataset=synthetic) or texts, learned by clrun's own command, each method in a
process of its own on one thread. Processor time of learning a task, of evaluating all tasks seen (which grows with them
by nature, so it is given for one of them) and of records (run.json and checkpoint: all cells of the accuracy matrix,
whose number grows with the square of the tasks); resident memory of the process and bytes of the learner's state when
the task has ended.

Compared are the medians of the last and of the first third of the tasks. Learning must not slow down by more than 10 %:
each of these methods does the same for its last task as for its first. Resident memory may grow by what the state
grows, by 1 KB for each new cell of the accuracy matrix, which is kept for the checkpoint, and by 8 MB that the
allocator may hold back: more is a leak. State may grow where the method's definition says so: halrp adds low-rank
matrices and a head for each task, slow learners and RAPF a Gaussian for each class. One method stands for each family:
merging (imm), slow learners (coma), low-rank updates (lora), closed forms (acil), two towers (rapf), texts (l2).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchlib import Figure, finish

ROOT = Path(__file__).parent.parent
SLOWER, ALLOWANCE, CELL = 0.10, 8e6, 1000  # demanded; bytes; bytes of a cell of the accuracy matrix
VIT = ["backbone=glyph_vit"]
CNN = ["backbone=cnn", "backbone.width=16"]
METHODS: dict[str, list[str]] = {
    "finetune": CNN,
    "er": CNN,
    "ewc": [*CNN, "method.samples=null", "method.solver=proximal"],  # which a hundred importances do not upset
    "l2p": VIT,
    "ranpac": [*VIT, "method.m=256"],
    "halrp": [*CNN, "scenario.setting=til", "method.growth=20"],  # a hundred heads and scales alone take 11
    "imm": [*CNN, "method.sums=single"],  # merging
    "coma": [*CNN, "method.alignment.budget.epochs=0"],  # a slow learner; its alignment is to all classes
    "lora": VIT,
    "acil": [*VIT, "method.m=256"],  # closed form
    "rapf": ["backbone=glyph_clip"],  # two towers
    "l2": ["dataset=text_synthetic", "backbone=bert_tiny", "method.solver=proximal"],  # texts
}
GROWS = {"halrp", "coma", "rapf"}  # whose state grows with the tasks by definition: networks, Gaussians of classes


class Clock:
    """Adds up the processor seconds of some calls and takes a sample when a task has ended."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.samples: list[dict[str, float]] = []

    def watch(self, owner: type, name: str, what: str) -> None:
        """Count the calls of a method of `owner` as `what`."""
        original: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return original(*args, **kwargs)
            finally:
                self.spent[what] = self.spent.get(what, 0.0) + time.process_time() - start
                if what == "records":
                    self.samples.append(self.spent | {"resident": resident()})
                    self.spent = {}

        setattr(owner, name, timed)


def resident() -> int:
    """Return the bytes of resident memory of this process, without pages of files, which the kernel moves at will."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) * 1024


def child(name: str, tasks: int, out: Path) -> None:
    """Run one method in this process and leave a sample for each task."""
    from clrun import cli
    from clrun.running.engine import Engine
    from clrun.running.evaluation import Evaluation
    from clrun.running.recorder import Recorder

    clock = Clock()
    clock.watch(Engine, "train", "train")
    clock.watch(Evaluation, "__call__", "evaluate")
    clock.watch(Recorder, "end_task", "records")
    own = METHODS[name]
    data = [] if own[0].startswith("dataset=") else ["dataset=synthetic"]
    words = [
        f"method={name}", *data, f"dataset.num_classes={2 * tasks}", f"scenario.n_tasks={tasks}",
        "dataset.train_rows=24", "dataset.test_rows=4", "budget=sgd", "budget.epochs=2", "budget.batch_size=16",
        "hardware=cpu", "hardware.threads=1", "job.progress=false", "job.picture=false", f"hydra.run.dir={out}",
        *own,
    ]  # fmt: skip
    try:
        cli.main(words)
    except SystemExit as end:
        if end.code:
            raise
    costs = json.loads((out / "run.json").read_text())["cost"]["tasks"]
    for sample, cost in zip(clock.samples, costs, strict=True):
        sample["state"] = cost["state_bytes"]["total"]
    (out / "samples.json").write_text(json.dumps(clock.samples))


def measure(name: str, tasks: int, folder: Path) -> list[dict[str, float]]:
    """Return the samples of a run in a fresh process, or those that lie in the folder."""
    out = folder / name
    if (out / "samples.json").exists():
        found: list[dict[str, float]] = json.loads((out / "samples.json").read_text())
        return found
    environment = {**os.environ, "CLRUN_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--child", str(out), "--tasks", str(tasks), "--only", name]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return measure(name, tasks, folder)


class Comparison:
    """The first third of a run's tasks beside the last one; the first task, which warms up, is left out.

    Args:
        name: of the method.
        samples: one a task.
    """

    def __init__(self, name: str, samples: list[dict[str, float]]) -> None:
        self.name, self.samples = name, samples
        third = (len(samples) - 1) // 3
        self.thirds = range(1, 1 + third), range(len(samples) - third, len(samples))

    def medians(self, value: Callable[[int], float]) -> tuple[float, float]:
        """Return the median of a value of the tasks in both thirds."""
        first, last = (statistics.median(map(value, third)) for third in self.thirds)
        return first, last

    def of(self, what: str) -> tuple[float, float]:
        """Return the medians of a sampled number."""
        return self.medians(lambda task: self.samples[task][what])

    @property
    def figures(self) -> list[Figure]:
        """Growth of the time of learning a task, of resident memory, and of a state that must not grow."""
        first, last = self.of("train")
        found = [Figure(f"{self.name}, growth of learning", last / first - 1, SLOWER, True, ".0%")]
        state, held = (b - a for a, b in (self.of("state"), self.of("resident")))
        settings = 1 if self.name == "halrp" else 2
        cells = self.medians(lambda task: settings * (task + 1) * (task + 2) / 2)
        most = (state + CELL * (cells[1] - cells[0]) + ALLOWANCE) / 1e6
        found.append(Figure(f"{self.name}, growth of resident memory", held / 1e6, most, True, ".1f", " MB"))
        if self.name not in GROWS:
            found.append(Figure(f"{self.name}, growth of state", state, 0, True, ".0f", " bytes"))
        return found

    @property
    def row(self) -> list[str]:
        """A line of the table."""
        seen = self.medians(lambda task: self.samples[task]["evaluate"] / (task + 1))
        times = [self.of("train"), seen, self.of("records")]
        memory = self.figures[1]
        return [
            self.name,
            *(
                f"{1000 * a:.{digits}f} → {1000 * b:.{digits}f}"
                for (a, b), digits in zip(times, (1, 2, 1), strict=True)
            ),
            " → ".join(f"{b / 1000:,.0f}" for b in self.of("state")),
            f"{memory.found} of {memory.demanded:.1f}",
            "MISSED" if any(not figure.met for figure in self.figures) else "ok",
        ]


HEADER = ["method", "learning, ms", "evaluation of a task, ms", "records, ms", "state, KB", "resident growth", ""]


def table(comparisons: list[Comparison]) -> str:
    """Return the comparison as a Markdown table."""
    rows = [HEADER, ["---"] * len(HEADER), *(c.row for c in comparisons)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(comparisons: list[Comparison], path: Path) -> None:
    """Draw time and memory of each task."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for k, c in enumerate(comparisons):
        tasks = range(1, len(c.samples) + 1)
        colour = f"C{k}"
        left.plot(tasks, [1000 * s["train"] for s in c.samples], color=colour, lw=1.4, label=c.name)
        left.plot(tasks, [1000 * s["evaluate"] for s in c.samples], color=colour, lw=0.8, ls=":")
        right.plot(tasks, [(s["resident"] - c.samples[0]["resident"]) / 1e6 for s in c.samples], color=colour, lw=1.4)
        right.plot(tasks, [(s["state"] - c.samples[0]["state"]) / 1e6 for s in c.samples], color=colour, lw=0.8, ls=":")
    left.set(title="Processor time", xlabel="task", ylabel="milliseconds", yscale="log")
    right.set(title="Memory beyond that after the first task", xlabel="task", ylabel="MB")
    legends = (
        (left, "lower right", "learning the task", "evaluating all tasks seen"),
        (right, "upper left", "process", "state"),
    )
    for axes, place, solid, dotted in legends:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        styles = [
            axes.plot([], [], color="0.3", ls=ls, lw=1.2, label=text)[0] for ls, text in (("-", solid), (":", dotted))
        ]
        axes.add_artist(axes.legend(handles=styles, loc=place, frameon=False, fontsize=9))
    handles, names = left.get_legend_handles_labels()
    keep = [pair for pair in zip(handles, names, strict=True) if pair[1] in METHODS]
    figure.legend(*zip(*keep, strict=True), loc="outside lower center", ncols=len(keep), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(words: list[str] | None = None) -> list[Figure]:
    """Run, draw, print and return the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/long_streams.png")
    parser.add_argument("--keep", type=Path, help="folder for the runs; those that are there are used again")
    parser.add_argument("--write", action="store_true", help="write the table into docs/performance.md")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.child:
        child(args.only[0], args.tasks, args.child)
        return []
    comparisons = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        for name in args.only:
            start = time.perf_counter()
            comparisons.append(Comparison(name, measure(name, args.tasks, folder)))
            print(f"{name}: {args.tasks} tasks in {time.perf_counter() - start:.0f} s", flush=True)
            for figure in comparisons[-1].figures:
                print(f"  {figure.name}: {figure}", flush=True)
    draw(comparisons, args.picture)
    print(f"\nmedians of the first and the last third of {args.tasks} tasks; growth beside what is allowed\n")
    print(table(comparisons))
    if args.write:
        import readme_results  # not in the measured processes

        readme_results.place("long streams", table(comparisons))
    return [figure for c in comparisons for figure in c.figures]


if __name__ == "__main__":
    finish(main())
