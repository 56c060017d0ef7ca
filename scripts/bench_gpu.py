"""How fast is clrun on a GPU beside a loop written out here that does the same passes and nothing else?

    python scripts/bench_gpu.py [--rounds 5] [--steps 50]     on a GPU: the shapes of published settings
    python scripts/bench_gpu.py --small                       small shapes, on any machine: shows that everything runs

Weights are random: speed does not depend on them. Images are random, too, and lie on the device. Both sides take
turns; each is timed by the wall clock until the device has finished, and the ratio is the median of bare / clrun over
the rounds (1: as fast as the bare loop). Peak memory is that of torch's allocator, the other side's tensors freed. The
tables are in Markdown, for docs/performance.md. Without a GPU nothing is demanded, as small shapes say nothing of it.

training: ResNet-18 and ResNet-32 on images of 32x32 in fp32; L2P, LoRA and finetuning of all weights on ViT-B/16 in
    bf16, the last one compiled, too (prompts and LoRA refuse `hardware.compile`). The bare loop of L2P has a frozen
    pass for the query and the prompted pass, that of LoRA has the updates of queries and values in every block.
passes: features of a frozen backbone, and evaluation, beside forward passes over the same batches.
closed forms: the solve of RanPAC, and the Fisher information as a diagonal and as Kronecker factors: seconds.
"""

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import clrun  # noqa: F401 isort: skip (sets how threads wait, before torch is imported)
import torch
import torch.nn.functional as F
from benchlib import Figure, configured, finish
from method_page import table
from torch import Tensor, nn

from clrun.blocks.curvature.estimate import estimate
from clrun.blocks.ridge import ridge
from clrun.blocks.statistics import ClassStats
from clrun.data.features import FEATURE_BATCH, frozen_features
from clrun.data.split import Plain, TensorSplit
from clrun.data.stream import Stream, Task
from clrun.learning.budget import Budget
from clrun.learning.context import Context
from clrun.learning.training import fit
from clrun.running.evaluation import Evaluation
from clrun.system.hardware import Hardware
from clrun.system.seeding import seed_all

SHARE = 0.95  # of the bare loop, demanded on a GPU
CLASSES = 10
QUICK = "--small --rounds 1 --steps 2"
SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A method on a backbone.

    Attributes:
        method: file in conf/method.
        backbone: file in conf/backbone.
        side: height and width of the images.
        batch: rows of a step.
        precision: of the forward passes.
        compile: whether the backbone is compiled.
        options: of the backbone.
    """

    method: str
    backbone: str
    side: int = 32
    batch: int = 128
    precision: str = "fp32"
    compile: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return what it is."""
        name = self.options.get("name", self.backbone)
        return f"{self.method}, {name}, {self.precision}, batch {self.batch}{', compiled' * self.compile}"


def cases(small: bool) -> list[Case]:
    """Return what is trained."""
    size, batch = (32, 8) if small else (224, 64)
    model = "vit_tiny_patch16_224" if small else "vit_base_patch16_224"
    vit = {"name": model, "pretrained": False, "image_size": size}
    found = [Case("finetune", name, batch=batch if small else 128) for name in ("resnet18", "resnet32")]
    found += [Case(method, "timm", size, batch, "bf16", options=vit) for method in ("l2p", "lora", "finetune")]
    return [*found, Case("finetune", "timm", size, batch, "bf16", compile=True, options=vit)]


class Bench:
    """One task of random images on the device, and a method that is ready to learn it.

    Args:
        case: what is trained.
        steps: optimizer steps of a fit.
    """

    def __init__(self, case: Case, steps: int) -> None:
        self.case, self.steps = case, steps
        self.hardware: Hardware = configured("hardware", "auto", precision=case.precision, deterministic=False)
        self.hardware.setup()
        seed_all(0, "bench")
        shape = (3, case.side, case.side)
        self.backbone: Any = configured("backbone", case.backbone, **case.options)(shape)
        self.hardware.place(self.backbone)
        images = torch.randn(case.batch * min(steps, 4), *shape)  # network input: no transform on either side
        split = TensorSplit(images, torch.arange(len(images)) % CLASSES).to(self.hardware.device)
        self.task = Task(0, 0, "random", torch.arange(CLASSES), split, split)
        self.stream = Stream((self.task,), CLASSES, "cil", transform=Plain())
        budget = Budget(SGD, epochs=None, steps=steps, batch_size=case.batch)
        self.ctx = Context(self.stream, self.task, budget, self.hardware, 0)
        self.other: Any = copy.deepcopy(self.backbone)  # of the bare loop
        self.method = configured("method", case.method)(self.backbone, CLASSES)
        self.hardware.place(self.method)
        if case.compile:
            self.method.backbone.compile()
            self.other.compile()
        self.method.begin_task(self.task, self.ctx)
        self.hardware.place(self.method)

    def train(self) -> None:
        """Learn the task as the method does."""
        fit(self.method, self.task.train, self.ctx)

    def bare(self) -> None:
        """Do the passes of every step and nothing else."""
        logits, trained = {"finetune": self.plain, "l2p": self.l2p, "lora": self.lora}[self.case.method]()
        optimizer, done = SGD(trained), 0
        order = torch.Generator().manual_seed(0)
        while done < self.steps:
            for batch in self.task.train.batches(self.case.batch, shuffle=order):
                optimizer.zero_grad()
                with self.hardware.autocast():
                    value = F.cross_entropy(logits(self.hardware.layout(batch.x)).float(), batch.y)
                value.backward()
                optimizer.step()
                done += 1
                if done == self.steps:
                    break

    def head(self) -> nn.Linear:
        """Return a new head on the device."""
        return nn.Linear(int(self.backbone.num_features), CLASSES, device=self.hardware.device)

    def plain(self) -> tuple[Loss, list[Tensor]]:
        """Return the logits of the network with a head, and what is trained."""
        model = nn.Sequential(self.other.train(), self.head())
        return model, list(model.parameters())

    def l2p(self) -> tuple[Loss, list[Tensor]]:
        """Return the logits of a pass with 25 more tokens after a frozen pass, and what is trained."""
        vit, head = self.other.eval().requires_grad_(False), self.head()
        tokens = torch.zeros(1, 25, vit.embed_dim, device=self.hardware.device, requires_grad=True)

        def logits(x: Tensor) -> Tensor:
            with torch.no_grad():
                vit(x)
            z = vit._pos_embed(vit.patch_embed(x))
            z = torch.cat([z[:, :1], tokens.expand(len(z), -1, -1), z[:, 1:]], dim=1)
            out: Tensor = head(vit.norm(vit.blocks(z))[:, 1:26].mean(dim=1))
            return out

        return logits, [tokens, *head.parameters()]

    def lora(self) -> tuple[Loss, list[Tensor]]:
        """Return the logits of a network with updates of rank 8 of queries and values, and what is trained."""
        vit, head, trained = copy.deepcopy(self.other).eval().requires_grad_(False), self.head(), []
        for block in vit.blocks:
            block.attn.qkv = Updated(block.attn.qkv, 8)
            trained += [block.attn.qkv.down, block.attn.qkv.up]
        return nn.Sequential(vit, head), [*trained, *head.parameters()]


class Updated(nn.Module):
    """A linear map to queries, keys and values with low-rank updates of the first and the last third."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        width, device = layer.in_features, layer.weight.device
        self.layer = layer
        self.down = nn.Parameter(torch.randn(2, width, rank, device=device) / width**0.5)
        self.up = nn.Parameter(torch.zeros(2, rank, width, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Return the map of x with its updates."""
        q, v = (x @ down @ up for down, up in zip(self.down, self.up, strict=True))
        out: Tensor = self.layer(x) + torch.cat([q, torch.zeros_like(q), v], dim=-1)
        return out


@dataclass
class Clock:
    """Times work on a device.

    Attributes:
        hardware: the device.
        rounds: of each pair.
    """

    hardware: Hardware
    rounds: int

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.hardware.device.startswith("cuda")

    def seconds(self, work: Callable[[], Any]) -> float:
        """Return the seconds until the device has done some work."""
        self.hardware.synchronize()
        start = time.perf_counter()
        work()
        self.hardware.synchronize()
        return time.perf_counter() - start

    def peak(self, work: Callable[[], Any]) -> str:
        """Return the largest memory in use during some work, in GB, as text; empty without a GPU."""
        gc.collect()
        if not self.cuda:
            work()
            return ""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        work()
        return f"{torch.cuda.max_memory_allocated() / 1e9:.2f}"

    def pair(self, name: str, bare: Callable[[], Any], own: Callable[[], Any]) -> tuple[list[str], Figure]:
        """Return a line of the table and the ratio of two works that take turns; both run once before."""
        peaks = self.peak(bare), self.peak(own)
        times = [(self.seconds(bare), self.seconds(own)) for _ in range(self.rounds)]
        ratio = statistics.median(a / b for a, b in times)
        shown = [f"{statistics.median(column):.3f}" for column in zip(*times, strict=True)]
        return [name, *shown, f"{ratio:.2f}", *peaks], Figure(name, ratio, SHARE)

    def alone(self, name: str, work: Callable[[], Any]) -> list[str]:
        """Return a line of the table of some work without a counterpart."""
        peak = self.peak(work)
        return [name, f"{statistics.median(self.seconds(work) for _ in range(self.rounds)):.3f}", peak]


def passes(bench: Bench, clock: Clock, rows: int) -> list[tuple[list[str], Figure]]:
    """Return the lines of frozen features and of evaluation."""
    hardware, size = bench.hardware, bench.case.side
    images = torch.randn(min(rows, 1000), 3, size, size, device=hardware.device)
    images = images.repeat(-(-rows // len(images)), 1, 1, 1)[:rows]
    split = TensorSplit(images, torch.arange(rows, device=hardware.device) % CLASSES)
    nothing = split.select(torch.arange(0, device=hardware.device))
    learned, tested = (
        Stream((Task(0, 0, "random", torch.arange(CLASSES), *parts),), CLASSES, "cil", transform=Plain())
        for parts in ((split, nothing), (nothing, split))
    )

    def forward(model: Callable[[Tensor], Tensor], batch: int) -> None:
        with torch.inference_mode():
            for start in range(0, rows, batch):
                with hardware.autocast():
                    model(hardware.layout(images[start : start + batch])).float()

    model, batch = nn.Sequential(bench.other.eval(), bench.head()), bench.case.batch

    def evaluate() -> None:
        Evaluation(hardware, "test", batch, None)(bench.method.eval(), tested, 1)

    name = bench.case.options.get("name", bench.case.backbone)
    return [
        clock.pair(
            f"features of {rows} images, {name}",
            partial(forward, bench.other.eval(), FEATURE_BATCH),
            partial(frozen_features, learned, bench.other, hardware),
        ),
        clock.pair(f"evaluation of {rows} images, {name}", partial(forward, model, batch), evaluate),
    ]


def closed_forms(bench: Bench, clock: Clock, width: int) -> list[list[str]]:
    """Return the lines of work that a bare loop has no counterpart of."""
    stats = ClassStats(width, 100, moments="pooled").to(bench.hardware.device)
    rows = torch.randn(4 * width, width, device=bench.hardware.device)
    stats.update(rows, torch.arange(len(rows), device=bench.hardware.device) % 100)
    fisher = partial(estimate, method=bench.method, split=bench.task.train, ctx=bench.ctx, of=bench.method.backbone)
    return [
        clock.alone(f"ridge solve, width {width}, 100 classes", lambda: ridge(1.0, stats)),
        clock.alone("Fisher, diagonal, 128 rows", lambda: fisher("diag", labels="sampled", samples=128)),
        clock.alone(
            "Fisher, Kronecker factors, 128 rows", lambda: fisher("kfac_expand", labels="sampled", samples=128)
        ),
    ]


def main(words: list[str] | None = None) -> list[Figure]:
    """Measure, print tables and return the ratios, on a GPU."""
    parser = argparse.ArgumentParser(description="How fast clrun is on a GPU.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50, help="of a fit")
    parser.add_argument("--small", action="store_true", help="small shapes, on any machine")
    args = parser.parse_args(words)
    gpu = torch.cuda.is_available()
    if not gpu and not args.small:
        missing = "torch sees no GPU on this machine; --small shows on the CPU that everything runs"
        if words is None:
            parser.error(missing)
        print(missing)
        return []
    found, alone = [], []
    for case in cases(args.small):
        bench = Bench(case, args.steps)
        clock = Clock(bench.hardware, args.rounds)
        found.append(clock.pair(f"training: {case}", bench.bare, bench.train))
        if case.backbone == "resnet18":
            alone = closed_forms(bench, clock, 256 if args.small else 10_000)
            found += passes(bench, clock, 64 if args.small else 50_000)
    name = torch.cuda.get_device_name() if gpu else "CPU, small shapes"
    print(f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")
    print(table(["", "bare s", "clrun s", "bare / clrun", "bare peak GB", "clrun peak GB"], [row for row, _ in found]))
    print(f"\n{table(['', 'seconds', 'peak GB'], alone)}")
    return [figure for _, figure in found] if gpu else []


if __name__ == "__main__":
    finish(main())
