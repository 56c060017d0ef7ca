"""What does choosing the ranks cost HALRP, and does a task take longer the more tasks came before?

    python scripts/bench_low_rank.py [--threads 1] [--rows 1000] [--repeats 3] [--only share,flat]

LeNet on 3x32x32 images made by the script, method=halrp and budget=sgd as shipped, clrun's engine, processor time. The
same runs are repeated, and of every task the fastest time counts: other processes on the machine only ever add to it.

share: 10 tasks of `--rows` training images, a fifth of CIFAR-100's. The time of everything between warm-up and
fine-tuning (curvature, closed forms, eigenvalues, choice of ranks, making the layers) as a share of the time of
learning all tasks; it does not grow with the images. The published code spends 79 % of a run on it.
flat: 40 tasks of 64 images. Time of learning a task, median over the last third against the first third (the first task
trains the base and does not count), and the same of the fastest tasks, to which a busy machine adds least.
"""

import argparse
import statistics
import time
from pathlib import Path

import clrun  # noqa: F401 isort: skip (sets how threads wait, before torch is imported)
import torch
from bench_overhead import Journal
from benchlib import Figure, finish
from hydra.utils import instantiate
from omegaconf import OmegaConf

from clrun.backbones import small
from clrun.data.split import TensorSplit
from clrun.data.stream import Stream, Task
from clrun.methods.halrp import Halrp
from clrun.running.engine import Engine
from clrun.running.evaluation import Evaluation
from clrun.system.hardware import Hardware

CONF = Path(__file__).parents[1] / "conf"
CLASSES = 5  # of a task
DEMANDED_SHARE, DEMANDED_DRIFT = 0.15, 0.10
QUICK = "--rows 100 --repeats 1 --only flat"


class Timed(Halrp):
    """HALRP with clocks: processor seconds of learning each task, and of choosing its ranks."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.learning, self.ranking, self.start = [], [], 0.0

    def begin_task(self, task, ctx):
        self.start = time.process_time()
        super().begin_task(task, ctx)

    def install_residuals(self, task, ctx):
        start = time.process_time()
        super().install_residuals(task, ctx)
        self.ranking.append(time.process_time() - start)

    def end_task(self, task, ctx):
        super().end_task(task, ctx)
        self.learning.append(time.process_time() - self.start)


def options(group, name):
    """Return the options of a shipped configuration, without its target."""
    node = OmegaConf.load(CONF / group / f"{name}.yaml")
    built = instantiate(node, _convert_="all")
    return built.keywords if hasattr(built, "keywords") else built


def life(tasks, rows, threads):
    """Let HALRP live through `tasks` tasks of `rows` training images; return the learner."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(tasks):
        classes = torch.arange(CLASSES) + index * CLASSES
        y = classes.repeat_interleave(-(-rows // CLASSES))[:rows]
        x = torch.rand(rows, 3, 32, 32, generator=generator) + y[:, None, None, None] % 5 / 5
        split = TensorSplit(x, y, positions=index)
        made.append(Task(index, index, f"task {index}", classes, split, split.select(torch.arange(1))))
    stream = Stream(tuple(made), tasks * CLASSES, "til")
    torch.manual_seed(0)
    method = Timed(small.lenet((3, 32, 32)), stream.num_classes, **options("method", "halrp"))
    hardware = Hardware("cpu", 1, "fp32", threads, 0, True, False, False)
    hardware.setup()
    Engine(stream, options("budget", "sgd"), hardware, 0, Evaluation(hardware, "test", 1, None), Journal()).run(method)
    return method


def fastest(tasks, rows, arguments):
    """Return the fastest seconds of learning each task and of choosing its ranks, over the repeats."""
    lives = [life(tasks, rows, arguments.threads) for _ in range(arguments.repeats)]
    return [
        [min(times) for times in zip(*(getattr(m, of) for m in lives), strict=True)] for of in ("learning", "ranking")
    ]


def report(name, value, demanded):
    """Print and return one number beside what is demanded of it."""
    figure = Figure(name, value, demanded, True, ".1%")
    print(f"{name}: {figure}")
    return figure


def main(words=None):
    """Measure, print and return the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="share,flat")
    arguments = parser.parse_args(words)
    figures = []
    if "share" in arguments.only:
        learning, ranking = map(sum, fastest(10, arguments.rows, arguments))
        print(f"10 tasks of {arguments.rows} images: {learning:.1f} s, ranks {ranking:.2f} s")
        figures.append(report("share of the choice of ranks", ranking / learning, DEMANDED_SHARE))
    if "flat" in arguments.only:
        later = fastest(40, 64, arguments)[0][1:]
        third = len(later) // 3
        for name, middle in (("median", statistics.median), ("fastest", min)):
            first, last = middle(later[:third]), middle(later[-third:])
            print(f"40 tasks of 64 images, {name}: {first:.2f} s in the first third, {last:.2f} s in the last")
            figures.append(report(f"growth of the time of a task, {name}", last / first - 1, DEMANDED_DRIFT))
    return figures


if __name__ == "__main__":
    finish(main())
