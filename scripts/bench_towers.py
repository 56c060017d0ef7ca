"""What methods on an image and a text tower cost beside the passes that they are made of.

    python scripts/bench_towers.py [--methods coop clip_finetune ...] [--rounds 5] [--steps 60] [--orders 24]
        [--sweeps zero_shot ...] [--towers backbone=glyph_clip ...]

CPU time on one thread, glyph_clip, and the ten classes of digits as one task; for rapf the second of two tasks, because
it replays nothing in the first one.

speed: a fit of a method beside a loop written out here that does the same passes and optimizer steps and nothing else;
the two take turns, and `share` is the median of bare / method over the rounds. The loop of proof computes the attention
over the sequence of each image. A step of rapf takes a millisecond, and the demand is that of an MLP of this size, as
in bench_families; it has 8 near pairs.
bytes: what a method without network and head has in memory after the last task, beside the formula of its definition.
sweep: wall time of `clrun -m` over random orders of a method, features and texts included, over that of one run, both
from an empty cache. The features of digits cost a second with glyph_clip, so that a sweep of methods that train (rapf,
proof) or solve (rail) shows what these take per order; features are what it saves with towers of a published size:

    python scripts/bench_towers.py --methods --sweeps proof rapf rail zero_shot --towers backbone=open_clip \\
        backbone.model=ViT-B-32 backbone.pretrained=false backbone.quick_gelu=true backbone.mean=[0.5,0.5,0.5] \\
        backbone.std=[0.25,0.25,0.25] backbone.interpolation=bicubic
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import clrun  # noqa: F401 isort: skip (sets how threads wait, before torch is imported)
import torch
import torch.nn.functional as F
from benchlib import Figure, configured, finish, seconds
from torch import Tensor, nn

from clrun.backbones.glyph import glyph_clip
from clrun.data.features import frozen_features
from clrun.data.orders import canonical
from clrun.data.sources.digits import digits
from clrun.data.transforms import fit_transform
from clrun.learning.budget import Budget
from clrun.learning.context import Context
from clrun.learning.training import fit
from clrun.running.accounting import state_bytes
from clrun.system.hardware import Hardware
from clrun.system.seeding import seed_all

SHARE, SWEEP, BYTES = 0.95, 2.5, 0.02  # demanded: of the bare loop; runs that 24 orders may cost; error of a formula
SHARES = {"rapf": 0.80}  # where another share is demanded
OPTIONS: dict[str, dict[str, Any]] = {"rapf": {"name_distance": 2.0, "max_pairs": 8}}
QUICK = "--rounds 1 --steps 3 --orders 2"
FEATURES = ("coop", "proof", "rapf", "rail")  # methods that read features of the image tower
BATCH = 32
SGD = partial(torch.optim.SGD, lr=0.001)
Loss = Callable[[Tensor, Tensor], Tensor]


class Bench:
    """One method on the ten classes of digits, ready to learn its last task.

    Args:
        name: of the method.
        steps: optimizer steps of a fit.
        options: of the method that differ from those of its file.
    """

    def __init__(self, name: str, steps: int, **options: Any) -> None:
        self.name, self.steps = name, steps
        hardware: Hardware = configured("hardware", "cpu", threads=1)
        hardware.setup()
        seed_all(0, "bench")
        towers = glyph_clip((1, 8, 8), pretrained=True, weights=None, weights_key=None, head="linear")
        dataset = digits(val_fraction=0.0, seed=0, augment=[])
        split = configured("scenario", "class_split", n_tasks=2 if name in ("rapf", "rail") else 1)
        stream = split(dataset, canonical, fit_transform(dataset, towers)[0])
        self.seen: Any = towers
        if name in FEATURES:
            stream, self.seen = frozen_features(stream, towers, hardware, text=True)
        self.method = configured("method", name, **options)(self.seen, 10)
        self.method.read_names(stream.captions)
        budget = Budget(SGD, epochs=None, steps=steps, batch_size=BATCH)
        for task in stream.tasks:
            self.ctx = Context(stream, task, budget, hardware, 0)
            self.method.begin_task(task, self.ctx)
            if task is not stream.tasks[-1]:
                self.method.learn(task, self.ctx)
                self.method.end_task(task, self.ctx)
        seen = stream.candidates(len(stream.tasks), "cil")[0].nonzero()[:, 0]
        self.captions = [stream.captions.of(label)[0] for label in seen.tolist()]

    def train(self) -> None:
        """Learn the task as the method does."""
        fit(self.method, self.ctx.task.train, self.ctx)

    def bare(self) -> None:
        """Do the passes of every step and nothing else."""
        made = getattr(self, self.name) if self.name in ("coop", "proof", "rapf", "zscl") else self.finetune
        loss, trained = made()
        optimizer, train = SGD(trained), self.ctx.task.train
        generator, done = torch.Generator().manual_seed(0), 0
        while done < self.steps:
            for batch in train.batches(BATCH, view="train", shuffle=generator):
                value = loss(batch.x, batch.y)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                done += 1
                if done == self.steps:
                    break

    def finetune(self) -> tuple[Loss, list[Tensor]]:
        """Return the loss of finetuning both towers, and what it trains."""
        ids = self.seen.joint.tokenize(self.captions)
        return self.texts(ids, lambda embeddings: embeddings), [p for p in self.seen.parameters() if p.requires_grad]

    def zscl(self) -> tuple[Loss, list[Tensor]]:
        """Return the loss of ZSCL, whose reference images take a second pass, and what it trains."""
        (finetuning, trained), joint = self.finetune(), self.seen.joint
        others, known = self.method.reference, self.method.teacher

        def loss(x: Tensor, y: Tensor) -> Tensor:
            rows = torch.randperm(len(others))[:BATCH]
            units = F.normalize(joint.project(self.seen(others.take(rows))), dim=1)
            now, before = (joint.scale * images @ known.texts.T for images in (units, known.images[rows]))
            value = finetuning(x, y)
            for a, b in ((now, before), (now.T, before.T)):
                value = value + F.kl_div(a.log_softmax(1), b.log_softmax(1), reduction="batchmean", log_target=True)
            return value

        return loss, trained

    def coop(self) -> tuple[Loss, list[Tensor]]:
        """Return the loss of CoOp, and what it trains."""
        width, head = self.seen.joint.text_width, self.method.head
        context, places = torch.randn(1, 4, width, requires_grad=True), head.places[:, :, None].expand(-1, -1, width)
        return self.texts(head.ids, lambda e: e.scatter(1, places, context.expand(len(e), -1, -1))), [context]

    def texts(self, ids: Tensor, change: Callable[[Tensor], Tensor]) -> Loss:
        """Return the cross-entropy with texts that are encoded in every step."""
        joint, eot = self.seen.joint, ids.argmax(dim=1)

        def loss(x: Tensor, y: Tensor) -> Tensor:
            embeddings = change(joint.embed_tokens(ids))[:, : int(eot.max()) + 1]
            texts = F.normalize(joint.text_from_embeddings(embeddings, eot), dim=1)
            images = F.normalize(joint.project(self.seen(x)), dim=1)
            return F.cross_entropy(joint.scale * images @ texts.T, y)

        return loss

    def rapf(self) -> tuple[Loss, list[Tensor]]:
        """Return the loss of RAPF with as many draws as in the method, and what it trains."""
        joint, method = self.seen.joint, self.method
        layer = nn.Linear(joint.dim, joint.dim, bias=False)
        texts, drawn, pairs = method.head.weight, method.classes_per_batch, method.pairs
        factor, generator = method.sampler.factors[0], torch.Generator().manual_seed(0)

        def draw(classes: int, rows: int) -> Tensor:
            each = [torch.randn(rows, joint.dim, dtype=factor.dtype, generator=generator) for _ in range(classes)]
            return torch.cat([(own @ factor.T).float() for own in each])

        def loss(x: Tensor, y: Tensor) -> Tensor:
            old = method.old[:drawn].repeat_interleave(method.draw)
            rows = torch.cat([joint.project(x), draw(drawn, method.draw)])
            units = F.normalize(layer(rows), dim=1)
            value = F.cross_entropy(joint.scale * units @ texts.T, torch.cat([y, old]))
            if len(pairs):
                units = F.normalize(layer(draw(len(pairs), method.pair_draw)), dim=1)
                away = (texts[pairs[:, 1]] - texts[pairs[:, 0]]).repeat_interleave(method.pair_draw, dim=0)
                value = value + ((units * away).sum(dim=1) + method.margin).clamp(min=0).mean()
            return value

        return loss, list(layer.parameters())

    def proof(self) -> tuple[Loss, list[Tensor]]:
        """Return the loss of PROOF with attention over the sequence of each image, and what it trains."""
        joint, width, count = self.seen.joint, self.seen.joint.dim, len(self.captions)
        image, text, out = (nn.Linear(width, width) for _ in range(3))
        query, key, value = (nn.Linear(width, width, bias=False) for _ in range(3))
        norm, drop, context = nn.LayerNorm(width), nn.Dropout(0.1), torch.randn(3, width, requires_grad=True)
        raw, means = torch.stack([own[0] for own in self.seen.captions]), torch.randn(count, width)

        def loss(x: Tensor, y: Tensor) -> Tensor:
            units, texts = F.normalize(image(joint.project(x)), dim=1), F.normalize(text(raw), dim=1)
            shared = torch.cat([texts, F.normalize(image(means), dim=1), context]).expand(len(x), -1, -1)
            s = torch.cat([units[:, None], shared], dim=1)
            weights = drop((query(s) @ key(s).transpose(1, 2) / width**0.5).softmax(dim=2))
            s = norm(drop(out(weights @ value(s))) + s)
            fused = torch.einsum("brd,bd->br", s[:, 1 : 1 + 2 * count], s[:, 0])
            parts = (joint.scale * units @ texts.T, fused[:, :count], fused[:, count:])
            return torch.stack([F.cross_entropy(part, y) for part in parts]).sum()

        modules = (image, text, out, query, key, value, norm)
        return loss, [context, *(p for module in modules for p in module.parameters())]

    def expected(self) -> float:
        """Return the bytes of the state without network and head, by the definition of the method."""
        method, d, c = self.method, self.seen.joint.dim, 10
        if self.name == "rapf":
            return 8 * c * (d + 1) + 4 * d * d * c + 8 * c
        if self.name == "proof":
            row = 4 * self.seen.num_features + 8
            return len(method.memory) * row + 12 * d + 16 * d * d + 12 * d + 12 * c * d + 8 * c
        if method.form == "dual":
            rows = sum(len(task.train) for task in self.ctx.stream.tasks)
            return rows * (4 * d + 16) + 8 * c * rows + c * (8 * d + 8)
        m = method.projection.num_features
        return 4 * d * m + 8 * m * m + c * (8 * m + 8) + 8 * c * (m + 1)


def speed(name: str, rounds: int, steps: int) -> Figure:
    """Return the share of the bare loop in the time of a method's fit."""
    bench = Bench(name, steps, **OPTIONS.get(name, {}))
    bench.train(), bench.bare()
    share = statistics.median(seconds(bench.bare) / seconds(bench.train) for _ in range(rounds))
    return Figure(name, share, SHARES.get(name, SHARE))


def stored(name: str, **options: Any) -> Figure:
    """Return how far the bytes of a method's state are from the formula of its definition."""
    bench = Bench(name, 2, **options)
    bench.method.learn(bench.ctx.task, bench.ctx)
    bench.method.end_task(bench.ctx.task, bench.ctx)
    sizes, expected = state_bytes(bench.method), bench.expected()
    found = sizes["total"] - sizes["backbone"] - sizes["head"]
    about = ", ".join(map(str, (name, *options.values())))
    return Figure(f"bytes of {about} off its formula", abs(found - expected) / expected, BYTES, less=True, form=".2%")


def sweep(name: str, orders: int, towers: list[str]) -> Figure:
    """Return how many single runs a sweep over orders of a method takes, by wall time.

    Args:
        name: of the method.
        orders: how many.
        towers: overrides that choose the backbone.
    """
    words = [*towers, f"method={name}", "dataset=digits", "scenario.n_tasks=5", "hardware.threads=1"]
    words += ["job.progress=false", "job.picture=false"]
    several = ["-m", *words, "task_order=random", f"task_order.seed=range({orders})"]
    costs = [_process(words), _process(several)]
    return Figure(f"{name}, {orders} orders over one run", costs[1] / costs[0], SWEEP, less=True)


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
    parser.add_argument("--methods", nargs="*", default=["coop", "clip_finetune", "zscl", "proof", "rapf"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help="of a fit")
    parser.add_argument("--orders", type=int, default=24, help="of the sweep; 0 for none")
    parser.add_argument("--sweeps", nargs="+", default=["zero_shot"], help="methods")
    parser.add_argument("--towers", nargs="+", default=["backbone=glyph_clip"], help="of the sweeps")
    args = parser.parse_args(words)
    figures = [speed(name, args.rounds, args.steps) for name in args.methods]
    figures += [stored("proof"), stored("rapf"), stored("rail"), stored("rail", form="dual")]
    figures += [sweep(name, args.orders, args.towers) for name in args.sweeps] if args.orders else []
    for figure in figures:
        print(f"{figure.name}: {figure}", flush=True)
    return figures


if __name__ == "__main__":
    finish(main())
