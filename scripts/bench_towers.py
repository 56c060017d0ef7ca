"""What methods on an image and a text tower cost beside the passes that they are made of.

    python scripts/bench_towers.py [--methods coop clip_finetune] [--rounds 5] [--steps 60] [--orders 24]

CPU time on one thread, glyph_clip, and the ten classes of digits as one task.

speed: a fit of a method beside a loop written out here that does the same passes and optimizer steps and nothing else;
the two take turns, and `share` is the median of bare / method over the rounds.
sweep: wall time of `clrun -m` over random orders of zero_shot, features and texts included, over that of one run, both
from an empty cache.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import clrun  # noqa: F401 isort: skip (sets how threads wait, before torch is imported)
import torch
import torch.nn.functional as F
from benchlib import Figure, finish
from hydra.utils import instantiate
from omegaconf import OmegaConf

from clrun.backbones.glyph import glyph_clip
from clrun.data.features import frozen_features
from clrun.data.orders import canonical
from clrun.data.sources.digits import digits
from clrun.data.transforms import fit_transform
from clrun.learning.budget import Budget
from clrun.learning.context import Context
from clrun.learning.training import fit
from clrun.system.hardware import Hardware
from clrun.system.seeding import seed_all

CONF = Path(__file__).parents[1] / "conf"
SHARE, SWEEP = 0.95, 2.5  # demanded: of the bare loop; runs that 24 orders may cost
QUICK = "--rounds 1 --steps 3 --orders 2"
BATCH = 32
SGD = partial(torch.optim.SGD, lr=0.001)


def configured(group: str, choice: str, **options: Any) -> Any:
    """Return what conf/`group`/`choice`.yaml names, with some options changed."""
    return instantiate(OmegaConf.merge(OmegaConf.load(CONF / group / f"{choice}.yaml"), options), _convert_="all")


class Bench:
    """One method on the ten classes of digits as one task.

    Args:
        name: of the method.
        steps: optimizer steps of a fit.
    """

    def __init__(self, name: str, steps: int) -> None:
        self.steps = steps
        hardware: Hardware = configured("hardware", "cpu", threads=1)
        hardware.setup()
        seed_all(0, "bench")
        towers = glyph_clip((1, 8, 8), pretrained=True, weights=None, weights_key=None, head="linear")
        dataset = digits(val_fraction=0.0, seed=0, augment=[])
        split = configured("scenario", "class_split", n_tasks=1)
        stream = split(dataset, canonical, fit_transform(dataset, towers)[0])
        self.seen: Any = towers
        if name == "coop":
            stream, self.seen = frozen_features(stream, towers, hardware, text=True)
        self.method = configured("method", name)(self.seen, 10)
        self.method.read_names(stream.captions)
        budget = Budget(SGD, epochs=None, steps=steps, batch_size=BATCH)
        self.ctx = Context(stream, stream.tasks[0], budget, hardware, 0)
        self.method.begin_task(stream.tasks[0], self.ctx)
        self.captions = [stream.captions.of(label)[0] for label in stream.tasks[0].classes.tolist()]

    def train(self) -> None:
        """Learn the task as the method does."""
        fit(self.method, self.ctx.task.train, self.ctx)

    def bare(self) -> None:
        """Do the passes of every step and nothing else."""
        joint, head = self.seen.joint, self.method.head
        context = torch.randn(1, 4, joint.text_width, requires_grad=True)
        ids = joint.tokenize(self.captions)
        coop = hasattr(head, "places")
        if coop:
            ids, places = head.ids, head.places[:, :, None].expand(-1, -1, joint.text_width)
        eot = ids.argmax(dim=1)
        trained = [context] if coop else [p for p in self.seen.parameters() if p.requires_grad]
        optimizer, train = SGD(trained), self.ctx.task.train
        generator, done = torch.Generator().manual_seed(0), 0
        while done < self.steps:
            for batch in train.batches(BATCH, view="train", shuffle=generator):
                embeddings = joint.embed_tokens(ids)
                if coop:
                    embeddings = embeddings.scatter(1, places, context.expand(len(ids), -1, -1))
                embeddings = embeddings[:, : int(eot.max()) + 1]
                texts = F.normalize(joint.text_from_embeddings(embeddings, eot), dim=1)
                images = F.normalize(joint.project(self.seen(batch.x)), dim=1)
                loss = F.cross_entropy(joint.scale * images @ texts.T, batch.y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                done += 1
                if done == self.steps:
                    break


def seconds(work: Callable[[], Any]) -> float:
    """Return the CPU seconds of a call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def speed(name: str, rounds: int, steps: int) -> Figure:
    """Return the share of the bare loop in the time of a method's fit."""
    bench = Bench(name, steps)
    bench.train(), bench.bare()
    return Figure(name, statistics.median(seconds(bench.bare) / seconds(bench.train) for _ in range(rounds)), SHARE)


def sweep(orders: int) -> Figure:
    """Return how many single runs a sweep over orders of zero_shot takes, by wall time."""
    words = ["backbone=glyph_clip", "method=zero_shot", "dataset=digits", "scenario.n_tasks=5", "hardware.threads=1"]
    words += ["job.progress=false", "job.picture=false"]
    several = ["-m", *words, "task_order=random", f"task_order.seed=range({orders})"]
    costs = [_process(words), _process(several)]
    return Figure(f"zero_shot, {orders} orders over one run", costs[1] / costs[0], SWEEP, less=True)


def _process(words: list[str]) -> float:
    """Return the wall seconds of a clrun in a folder of its own, with an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        options = [f"job.feature_cache={folder}/cache"]
        command = [sys.executable, "-m", "clrun", *words, *options]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - begun


def main(words: list[str] | None = None) -> list[Figure]:
    """Measure, print a line per figure and return the figures."""
    parser = argparse.ArgumentParser(description="What methods on two towers cost.")
    parser.add_argument("--methods", nargs="+", default=["coop", "clip_finetune"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help="of a fit")
    parser.add_argument("--orders", type=int, default=24, help="of the sweep; 0 for none")
    args = parser.parse_args(words)
    figures = [speed(name, args.rounds, args.steps) for name in args.methods]
    figures += [sweep(args.orders)] if args.orders else []
    for figure in figures:
        print(f"{figure.name}: {figure}", flush=True)
    return figures


if __name__ == "__main__":
    finish(main())
