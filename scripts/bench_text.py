"""How fast are texts learned beside a loop written out here that does the same passes and nothing else?

    python scripts/bench_text.py [--rounds 5] [--epochs 3] [--width 64]

CPU time on one thread. Both train the same BERT with random weights and a linear head on the same batches of token ids,
by the same SGD. They take turns, and the share is the median of bare / clrun over the rounds. `tokenise` is what the
one-time tokenising of the data set costs beside one epoch of training: texts are read once per process, whatever the
number of epochs, orders and seeds.
"""

import argparse
import statistics
from functools import partial
from typing import Any

import clrun  # noqa: F401 isort: skip (sets how threads wait, before torch is imported)
import torch
import torch.nn.functional as F
from benchlib import Figure, configured, finish, seconds
from torch import nn

from clrun.backbones.text import bert_tiny
from clrun.data.modality import modality_of
from clrun.data.orders import canonical
from clrun.data.sources.text_synthetic import text_synthetic
from clrun.data.texts import tokenised
from clrun.learning.budget import Budget
from clrun.learning.context import Context
from clrun.learning.training import fit
from clrun.system.hardware import Hardware
from clrun.system.seeding import seed_all

SHARE, TOKENISING = 0.95, 0.25  # demanded: of the bare loop; epochs of training that tokenising may cost
BATCH = 32
QUICK = "--rounds 1 --epochs 1 --width 16"
TEXTS: dict[str, Any] = {"num_classes": 10, "train_rows": 100, "test_rows": 5, "words": 6, "difficulty": 0.5}
TEXTS |= {"similarity": 0.0, "period": 2, "domains": 1, "val_fraction": 0.0, "seed": 0, "augment": []}
BERT: dict[str, Any] = {"depth": 2, "heads": 2, "vocabulary": None, "train": "all", "max_tokens": 64, "kappa": 20.0}
BERT |= {"head": "linear", "weights": None, "weights_key": None}
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


class Bench:
    """Ten classes of generated texts as one task, and a BERT that reads their bytes.

    Args:
        width: of the BERT.
        epochs: of a fit.
    """

    def __init__(self, width: int, epochs: int) -> None:
        self.hardware: Hardware = configured("hardware", "cpu", threads=1)
        self.hardware.setup()
        seed_all(0, "bench")
        self.dataset = text_synthetic(**TEXTS)
        self.backbone: Any = bert_tiny(self.dataset.shape, width=width, **BERT)
        fitted = modality_of(self.dataset).fit(self.dataset, self.backbone)
        split = configured("scenario", "class_split", n_tasks=1)
        self.stream = split(fitted.dataset, canonical, fitted.transform)
        self.train, self.epochs = self.stream.tasks[0].train, epochs
        self.method = configured("method", "finetune")(self.backbone, 10)
        budget = Budget(SGD, epochs=epochs, steps=None, batch_size=BATCH)
        self.ctx = Context(self.stream, self.stream.tasks[0], budget, self.hardware, 0)
        self.method.begin_task(self.stream.tasks[0], self.ctx)

    def learn(self) -> None:
        """Learn the task as the method does."""
        fit(self.method, self.train, self.ctx)

    def bare(self) -> None:
        """Do the passes of every step and nothing else."""
        model = nn.Sequential(self.backbone, nn.Linear(self.backbone.num_features, 10)).train()
        optimizer = SGD([p for p in model.parameters() if p.requires_grad])
        order, augment = self.ctx.generator("shuffle", "fit"), torch.Generator()
        for _ in range(self.epochs):
            for batch in self.train.batches(BATCH, view="raw", shuffle=order):
                optimizer.zero_grad()
                F.cross_entropy(model(self.stream.transform.train(batch.x, augment)), batch.y).backward()
                optimizer.step()

    def tokenise(self) -> None:
        """Turn the stored bytes into ids; a copy of them is no tensor that was tokenised before."""
        tokenised(self.dataset.train.images.clone(), self.backbone.tokenizer, self.backbone.max_tokens)


def main(words: list[str] | None = None) -> list[Figure]:
    """Measure, print a line per figure and return the figures."""
    parser = argparse.ArgumentParser(description="How fast texts are learned.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3, help="of a fit")
    parser.add_argument("--width", type=int, default=64, help="of the tokens of the BERT")
    args = parser.parse_args(words)
    bench = Bench(args.width, args.epochs)
    bench.learn(), bench.bare()
    pairs = [(seconds(bench.bare), seconds(bench.learn)) for _ in range(args.rounds)]
    share = statistics.median(bare / learned for bare, learned in pairs)
    cost = statistics.median(seconds(bench.tokenise) for _ in range(args.rounds))
    epoch = statistics.median(learned for _, learned in pairs) / args.epochs
    figures = [
        Figure(f"training on texts, BERT of width {args.width}", share, SHARE),
        Figure("tokenising once, in epochs", cost / epoch, TOKENISING, less=True),
    ]
    for figure in figures:
        print(f"{figure.name}: {figure}", flush=True)
    return figures


if __name__ == "__main__":
    finish(main())
