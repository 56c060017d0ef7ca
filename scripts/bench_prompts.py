"""What the frozen query pass costs: L2P, DualPrompt, CODA-Prompt and DAP on a timm ViT-Ti/16 at 224 pixels.

Run `python scripts/bench_prompts.py`. Weights are random: speed does not depend on them. In turns, in one process:

- bare: a loop written out here, of one frozen forward pass (the query) and one forward and backward pass with as many
  extra tokens as the method has; nothing else of the method, and nothing of clrun;
- augmented: the method in clrun's `fit`, with a query pass a step, as every published code has it;
- plain: the same when nothing is augmented: each image's query is computed once a task;
- twice and eval: the first evaluation of a task, with two passes an image, and the second, whose queries are known.

Beside the gains stands what is possible at most, from bare frozen passes with and without the extra tokens. With a
query that costs q and a step that costs s: (q + s) / (s + q / epochs) in training, 1.5 for many epochs if backward
costs what forward does; with a pass with the tokens that costs p: (q + p) / p in evaluation, below 1.9 for L2P (25).

CPU time is compared: other programs on the machine then matter little. Ratios are medians over the rounds.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from benchlib import Figure, configured, finish, seconds

from clrun.data.split import Plain, TensorSplit
from clrun.data.stream import Stream, Task
from clrun.learning.budget import Budget
from clrun.learning.context import Context
from clrun.learning.losses import masked_cross_entropy
from clrun.running.evaluation import Evaluation
from clrun.system.hardware import Hardware

SHARE, GAIN, EVALUATION = 0.95, 1.4, 1.9  # demanded: of the bare loop; over augmented training; over two passes
QUICK = "--rounds 1 --epochs 4 --size 64 --methods l2p"
TOKENS = {"l2p": 25, "dualprompt": 0, "coda_prompt": 0, "dap": 10}  # that the method adds


class Augmenting(Plain):
    """A transform that claims to augment and takes no time."""

    augments = True


class Bench:
    """One method on one task of random images.

    Args:
        name: of the method.
        args: of the command line.
    """

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.tokens = TOKENS[name]
        self.hardware: Hardware = configured("hardware", "cpu", threads=1)
        self.hardware.setup()
        torch.manual_seed(0)
        options = {"name": args.model, "pretrained": False, "image_size": args.size}
        self.vit = configured("backbone", "timm", **options)((3, args.size, args.size))
        images, labels = torch.rand(args.rows, 3, args.size, args.size), torch.arange(args.rows) % 2
        split = TensorSplit(images, labels)
        self.task = Task(0, 0, "random", torch.arange(2), split, split)
        self.budget = Budget(partial(torch.optim.SGD, lr=0.01), epochs=args.epochs, batch_size=args.batch)
        self.method = configured("method", name)(self.vit, 2)
        self.method.begin_task(self.task, self.context(Plain()))
        self.evaluation: Evaluation | None = None

    def context(self, transform: Plain) -> Context:
        """Return a new context."""
        return Context(Stream((self.task,), 2, "cil", transform=transform), self.task, self.budget, self.hardware, 0)

    def train(self, transform: Plain) -> None:
        """Learn the task as the method does."""
        self.method.learn(self.task, self.context(transform))

    def bare(self) -> None:
        """Do the passes of every step and nothing else."""
        vit, split = self.vit.eval(), self.task.train
        tokens = torch.zeros(1, 1 + self.tokens, vit.embed_dim, requires_grad=True)
        head = torch.nn.Linear(vit.embed_dim, 2)
        optimizer = torch.optim.SGD([tokens, *head.parameters()], lr=0.01)
        allowed = torch.ones(2, dtype=torch.bool)
        assert self.budget.epochs is not None
        for _ in range(self.budget.epochs):
            for batch in split.batches(self.budget.batch_size):
                with torch.no_grad():
                    vit(batch.x)
                z = vit._pos_embed(vit.patch_embed(batch.x)) + tokens[:, :1]
                z = torch.cat([z, tokens[:, 1:].expand(len(z), -1, -1)], dim=1)
                logits = head(vit.norm(vit.blocks(z))[:, 0])
                optimizer.zero_grad()
                masked_cross_entropy(logits, batch.y, allowed).backward()
                optimizer.step()

    def frozen(self, tokens: int, passes: int) -> None:
        """Do forward passes over the task without gradients, with so many extra tokens."""
        vit = self.vit.eval()
        extra = torch.zeros(1, tokens, vit.embed_dim)
        with torch.inference_mode():
            for _ in range(passes):
                for batch in self.task.train.batches(self.budget.batch_size):
                    z = vit._pos_embed(vit.patch_embed(batch.x))
                    vit.norm(vit.blocks(torch.cat([z, extra.expand(len(z), -1, -1)], dim=1)))

    def evaluate(self, *, new: bool) -> None:
        """Evaluate the task, for the first time or again."""
        if new or self.evaluation is None:
            self.evaluation = Evaluation(self.hardware, "test", self.budget.batch_size, None)
        self.evaluation(self.method, self.context(Plain()).stream, 1)


def main(words: list[str] | None = None) -> list[Figure]:
    """Measure, print a line a method and return the figures."""
    parser = argparse.ArgumentParser(description="What the frozen query pass costs.")
    parser.add_argument("--rows", type=int, default=4, help="images of the task")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=20, help="of a fit")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(TOKENS), choices=list(TOKENS))
    args = parser.parse_args(words)
    print(f"{args.model} at {args.size} px, {args.rows} images, {args.epochs} epochs, batch {args.batch}; CPU seconds")
    print("              bare augmented share | plain  gain at most | twice   eval  gain at most")
    figures = []
    for name in args.methods:
        text, found = line(Bench(name, args), args)
        print(f"{name:12s} {text}", flush=True)
        figures += [Figure(f"{name}, {what}", *numbers) for what, numbers in found.items()]
    return figures


def line(bench: Bench, args: argparse.Namespace) -> tuple[str, dict[str, tuple[float, float]]]:
    """Return the medians over the rounds of what one method takes and their ratios, and the ratios with their demands.

    The demand on a gain stands also where more is not possible: the name of the figure says what is.
    """
    passes = 4  # of an evaluation: long enough to be timed
    works: dict[str, Callable[[], Any]] = {
        "bare": bench.bare,
        "query": partial(bench.frozen, 0, args.epochs),
        "augmented": partial(bench.train, Augmenting()),
        "plain": partial(bench.train, Plain()),
        "twice": lambda: [bench.evaluate(new=True) for _ in range(passes)],
        "eval": lambda: [bench.evaluate(new=False) for _ in range(passes)],
        "alone": partial(bench.frozen, 0, passes),
        "prompted": partial(bench.frozen, bench.tokens, passes),
    }
    bench.evaluate(new=True)
    rounds = [{key: seconds(work) for key, work in works.items()} for _ in range(args.rounds)]
    t = {key: statistics.median(r[key] for r in rounds) for key in works}

    def ratio(a: str, b: str) -> float:
        return statistics.median(r[a] / r[b] for r in rounds)

    def most(r: dict[str, float]) -> float:
        return r["bare"] / (r["bare"] - r["query"] * (1 - 1 / args.epochs))

    share, gain, faster = ratio("bare", "augmented"), ratio("augmented", "plain"), ratio("twice", "eval")
    limits = statistics.median(map(most, rounds)), 1 + ratio("alone", "prompted")
    text = f"{t['bare']:5.2f} {t['augmented']:9.2f} {share:5.2f} | {t['plain']:5.2f} {gain:5.2f} {limits[0]:7.2f} | "
    text += f"{t['twice']:5.2f} {t['eval']:6.2f} {faster:5.2f} {limits[1]:7.2f}"
    return text, {
        "training over the bare loop": (share, SHARE),
        f"gain of known queries in training ({limits[0]:.2f} possible)": (gain, GAIN),
        f"gain of known queries in evaluation ({limits[1]:.2f} possible)": (faster, EVALUATION),
    }


if __name__ == "__main__":
    finish(main())
