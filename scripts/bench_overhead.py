"""How much slower than a bare PyTorch loop is clrun? Ratios, measured in pairs within one run of this script.

    python scripts/bench_overhead.py [--pairs 5] [--threads N] [--only training,evaluation,fisher,memory]

The bare loop trains the same network on the same uint8 images in memory, with the same batched augmentation (written
out again here), batch size and number of steps, and evaluates with one argmax; it is given the faster of the plain and
the channels-last memory order. clrun is its engine with method finetune. A ratio above 1 means clrun is faster; for
the Fisher and the memory, where less is better, it is clrun / bare. Medians over the pairs.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import clrun  # noqa: F401 isort: skip (sets how threads wait, before torch is imported)
import torch
import torch.nn.functional as F
from benchlib import Figure, finish
from torch import Tensor, nn

from clrun.backbones import small
from clrun.blocks.curvature import diagonal_fisher
from clrun.data.split import TensorSplit
from clrun.data.stream import Dataset, Stream, Task
from clrun.data.transforms import fit_transform
from clrun.learning.budget import Budget
from clrun.learning.context import Context
from clrun.learning.heads import GrowingHead
from clrun.methods.finetune import Finetune
from clrun.running.accounting import PeakMemory
from clrun.running.engine import Engine
from clrun.running.evaluation import Evaluation
from clrun.system.hardware import Hardware

CLASSES = 10
QUICK = "--pairs 1 --only training,fisher"


@dataclass(frozen=True)
class Case:
    """A network, its data, and what is demanded of clrun's training throughput relative to the bare loop."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    augment: bool
    batch: int
    rows: int
    epochs: int
    demanded: float


CASES = [
    Case(
        "resnet32, 32x32, batch 64", lambda: small.resnet32((3, 32, 32), width=16), (3, 32, 32), True, 64, 640, 2, 0.95
    ),
    Case("lenet, 32x32, batch 64", lambda: small.lenet((3, 32, 32)), (3, 32, 32), True, 64, 1280, 2, 0.90),
    Case("mlp, 8x8, batch 32", lambda: small.mlp((1, 8, 8), hidden=[256, 64]), (1, 8, 8), False, 32, 1440, 20, 0.80),
]
MEAN, STD = 0.45, 0.25


class Journal:
    """Hears the engine and keeps nothing."""

    def begin_task(self, task):
        pass

    step = log = rows = begin_task

    def end_task(self, task, method, run_state):
        pass


def data(case):
    """Return uint8 images [rows, C, H, W] and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (case.rows, *case.shape), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, CLASSES, (case.rows,), generator=generator)


def hardware(threads):
    device = Hardware("cpu", 1, "fp32", threads, 0, True, True, False)
    device.setup()
    return device


def stream(case, images, labels, network):
    """Return a stream of one task with all rows, for training and for the test."""
    split = TensorSplit(images, labels)
    augment = ("crop", "flip") if case.augment else ()
    channels = case.shape[0]
    dataset = Dataset(
        "bench", split, split, CLASSES, tuple("0123456789"), case.shape,
        mean=(MEAN,) * channels, std=(STD,) * channels, augment=augment,
    )  # fmt: skip
    transform, _ = fit_transform(dataset, network)
    rows = TensorSplit(images, labels, transform=transform)
    return Stream((Task(0, 0, "all", torch.arange(CLASSES), rows, rows),), CLASSES, "cil", transform=transform)


def bare_augment(x: Tensor, generator) -> Tensor:
    """Random crop with 4 pixels of zero padding, then random horizontal flip, per sample, batched."""
    count, _, height, width = x.shape
    padded = F.pad(x, (4, 4, 4, 4))
    top = torch.randint(0, 9, (count, 1), generator=generator) + torch.arange(height)
    left = torch.randint(0, 9, (count, 1), generator=generator)
    columns = torch.arange(width).expand(count, width)
    flip = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(flip, width - 1 - columns, columns) + left
    batch = torch.arange(count)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, top[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def bare_prepare(x: Tensor, layout) -> Tensor:
    return x.float().div_(255).sub_(MEAN).div_(STD).contiguous(memory_format=layout)


def bare_training(case, images, labels, layout):
    """Return the network and the seconds of a plain training loop."""
    torch.manual_seed(0)
    network = case.build()
    head = GrowingHead(network.num_features, CLASSES)
    head.grow(torch.arange(CLASSES))
    model = nn.Sequential(network, head).to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    model.train()
    start = time.perf_counter()
    for _ in range(case.epochs):
        order = torch.randperm(len(labels), generator=generator)
        for at in range(0, len(labels), case.batch):
            rows = order[at : at + case.batch]
            x, y = images[rows], labels[rows]
            if case.augment:
                x = bare_augment(x, generator)
            loss = F.cross_entropy(model(bare_prepare(x, layout)), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return model, time.perf_counter() - start


def bare_evaluation(case, model, images, labels, layout, repeats):
    model.eval()
    start = time.perf_counter()
    with torch.inference_mode():
        for _ in range(repeats):
            correct = 0
            for at in range(0, len(labels), 256):
                x = bare_prepare(images[at : at + 256], layout)
                correct += (model(x).argmax(1) == labels[at : at + 256]).sum()
            correct = int(correct)
    return time.perf_counter() - start


def clrun_training(case, images, labels, device):
    """Return the method, its stream and the seconds the engine reports for training."""
    torch.manual_seed(0)
    network = case.build()
    tasks = stream(case, images, labels, network)
    budget = Budget(partial(torch.optim.SGD, lr=0.01, momentum=0.9), epochs=case.epochs, batch_size=case.batch)
    evaluation = Evaluation(device, "test", 256, 8)
    engine = Engine(tasks, budget, device, 0, evaluation, Journal())
    method = Finetune(network, CLASSES, compete="seen")
    engine.run(method)
    return method, tasks, engine.state.costs[0]["train_seconds"]


LAYOUTS = {"plain": torch.contiguous_format, "channels-last": torch.channels_last}


def speed(case, pairs, device):
    """Yield the ratios of training and of evaluation; the bare loop's memory order is the faster one of each."""
    images, labels = data(case)
    repeats = max(1, 2000 // case.rows) if case.augment else 20
    times = {name: [] for name in ("training", "evaluation")}
    bare = {(name, layout): [] for name in times for layout in LAYOUTS}
    for _ in range(pairs + 1):  # the first one warms up
        for layout, order in LAYOUTS.items():
            model, seconds = bare_training(case, images, labels, order)
            bare["training", layout].append(seconds)
            bare["evaluation", layout].append(bare_evaluation(case, model, images, labels, order, repeats))
        method, tasks, seconds = clrun_training(case, images, labels, device)
        times["training"].append(seconds)
        evaluation = Evaluation(device, "test", 256, None)
        method.eval()
        times["evaluation"].append(timed(lambda: [evaluation(method, tasks, 1) for _ in range(repeats)]))  # noqa: B023
    rate = case.rows * case.epochs / statistics.median(times["training"][1:])
    for name, demanded in (("training", case.demanded), ("evaluation", 0.90)):
        best = min(LAYOUTS, key=lambda layout: statistics.median(bare[name, layout][1:]))  # noqa: B023
        ratios = [b / ours for b, ours in zip(bare[name, best], times[name], strict=True)][1:]
        more = f", {rate:,.0f} images/s" if name == "training" else ""
        yield show(f"{name:<10} {case.name} ({best}{more})", ratios, demanded)


def show(name, ratios, demanded, less=False):
    """Print and return the median."""
    figure = Figure(" ".join(name.split()), statistics.median(ratios), demanded, less)
    spread = f"[{min(ratios):.2f}, {max(ratios):.2f}]"
    print(f"{name:<62} {figure.measured:5.2f}  {spread}  {figure.bound}  {figure.verdict}", flush=True)
    return figure


def fisher(pairs, device):
    """Yield the time of ewc's diagonal Fisher over that of a bare estimate of the same kind.

    "sampled" against per-sample gradients by vmap over chunks of the best size, "batched" against one plain backward a
    batch, its gradient squared and multiplied by the batch size.
    """
    case = CASES[1]
    images, labels = data(case)
    torch.manual_seed(0)
    network = case.build()
    method = Finetune(network, CLASSES, compete="seen")
    tasks = stream(case, images, labels, network)
    budget = Budget(partial(torch.optim.SGD, lr=0.01), epochs=1, batch_size=case.batch)
    method.head.grow(torch.arange(CLASSES))
    device.place(method)
    method.eval()
    count = 512
    rows = tasks.tasks[0].train.select(torch.arange(count))
    bare = {"sampled": _per_sample(method, tasks.transform, images[:count]), "batched": _trick(method, tasks, images)}
    chunk = min((4, 8, 16, 32), key=lambda size: timed(lambda: bare["sampled"](size)))
    for kind, size in (("sampled", chunk), ("batched", case.batch)):
        ratios = []
        for _ in range(pairs):
            theirs = timed(lambda: bare[kind](size))  # noqa: B023
            ctx = Context(tasks, tasks.tasks[0], budget, device, 0)
            ours = timed(lambda: diagonal_fisher(method, rows, ctx, of=network, labels=kind, samples=None))  # noqa: B023
            ratios.append(ours / theirs)
        yield show(f"diagonal Fisher, {kind} labels, lenet, {count} rows, chunks of {size}", ratios, 2.0, less=True)


def _per_sample(method, transform, images):
    """Return a function of the chunk size that estimates the Fisher of the backbone by vmap of per-sample gradients."""
    params = {name: p.detach() for name, p in method.backbone.named_parameters()}
    rest = {f"backbone.{name}": b for name, b in method.backbone.named_buffers()}
    rest |= {f"head.{name}": p.detach() for name, p in method.head.named_parameters()}

    def nll(values, x, y):
        state = {f"backbone.{name}": value for name, value in values.items()} | rest
        return F.cross_entropy(torch.func.functional_call(method, state, (x[None],)), y[None])

    gradients = torch.func.vmap(torch.func.grad(nll), in_dims=(None, 0, 0))

    def estimate(size):
        total = {name: torch.zeros_like(p) for name, p in params.items()}
        for at in range(0, len(images), size):
            x = transform.eval(images[at : at + size])
            with torch.no_grad():
                y = torch.multinomial(method(x).softmax(1), 1)[:, 0]
            for name, gradient in gradients(params, x, y).items():
                total[name] += gradient.detach().square().sum(0)
        return total

    return estimate


def _trick(method, tasks, images, count=512):
    """Return a function of the batch size that estimates the Fisher from the gradients of whole batches."""
    params = list(method.backbone.parameters())

    def estimate(size):
        total = [torch.zeros_like(p) for p in params]
        for at in range(0, count, size):
            logits = method(tasks.transform.eval(images[at : at + size]))
            y = torch.multinomial(logits.detach().softmax(1), 1)[:, 0]
            for sum_, gradient in zip(total, torch.autograd.grad(F.cross_entropy(logits, y), params), strict=True):
                sum_.add_(gradient.square(), alpha=len(y) ** 2)
        return total

    return estimate


def timed(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def memory_child(which):
    """Print the bytes of resident memory that training adds in this fresh process."""
    case = CASES[2]
    device = hardware(1)
    images, labels = data(case)
    peak = PeakMemory(device)
    peak.reset()  # on Linux; the importing of torch has a higher peak than what follows
    before = peak.read()
    if which == "bare":
        bare_training(case, images, labels, torch.contiguous_format)
    else:
        clrun_training(case, images, labels, device)
    print(peak.read() - before)


def memory(pairs):
    """Yield peak resident memory added by training, clrun's over the bare loop's."""
    added = {"bare": [], "clrun": []}
    for _ in range(max(9, pairs)):
        for which in added:
            done = subprocess.run(
                [sys.executable, __file__, "--child", which], capture_output=True, text=True, check=True
            )
            added[which].append(int(done.stdout.strip().splitlines()[-1]))
    bare, ours = (statistics.median(added[which]) / 2**20 for which in ("bare", "clrun"))
    figure = Figure("memory added by training, mlp, one thread", ours, 1.1 * bare + 20, True, ".1f", " MiB")
    print(f"{figure.name:<62} {ours:5.1f} MiB, bare {bare:.1f} MiB  {figure.bound} (1.1x + 20)  {figure.verdict}")
    yield figure


def main(words=None):
    """Measure, print and return the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", default="training,fisher,memory")
    parser.add_argument("--child", choices=("bare", "clrun"), help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.child:
        memory_child(args.child)
        return []
    device = hardware(args.threads)
    print(f"torch {torch.__version__}, {device.threads} threads, {platform.machine()}, {args.pairs} pairs")
    print(f"{'clrun / bare loop':<62} median [min, max]")
    figures = []
    if "training" in args.only:
        for case in CASES:
            figures += speed(case, args.pairs, device)
    if "fisher" in args.only:
        figures += fisher(args.pairs, device)
    if "memory" in args.only:
        figures += memory(args.pairs)
    return figures


if __name__ == "__main__":
    finish(main())
