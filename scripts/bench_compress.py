"""What does compression cost in accuracy, and how long does exact pruning take?

    python scripts/bench_compress.py [--datasets digits glyphs] [--backbones cnn glyph_vit] [--methods joint er ewc]
        [--kinds svd ...] [--points 4] [--seeds 1] [--time 96]

table: each learner (method, backbone, data set; in the setting til for ewc, cil otherwise) learns its stream once as
shipped. Copies of the trained learner are compressed after the last task, by every kind at every amount, and evaluated:
final average accuracy in points against the stored bytes of the backbone. Factorisations and pruners have the ratios
RATIOS of bytes, quantisation has BITS. The figures are means over learners, ratios and seeds of what one kind gains
over another at the same bytes.
time: processor time of the order of removal of all weights in rows of a ViT-Tiny layer (`--time` rows of the 192 of
fc2, with 768 inputs; 0 leaves it out), against the time of the count of arithmetic, d^3 operations per row, at the rate
at which this machine multiplies matrices [k, d] of rank-one terms with vectors, which is what a removal consists of.
"""

import argparse
import copy
import statistics
import time

import clrun  # noqa: F401 isort: skip (sets how threads wait, before torch is imported)
import torch
from bench_overhead import Journal
from benchlib import Figure, finish

from clrun.blocks.compress.base import Compressor
from clrun.blocks.compress.obs import ROWS, damped, inverse_of, removal_order
from clrun.config.check import check
from clrun.config.compose import Composer, plain_config
from clrun.running.build import build
from clrun.running.compression import Stage, accuracies
from clrun.running.engine import Engine
from clrun.running.evaluation import Evaluation
from clrun.running.parts import Parts, make

RATIOS = (0.5, 0.35, 0.25, 0.18)
BITS = (8, 4, 3, 2)
KINDS = {
    "svd": "compress=svd",
    "fwsvd": "compress=fwsvd",
    "tfwsvd": "compress=tfwsvd",
    "magnitude_prune": "compress=magnitude_prune compress.target=ratio",
    "obc_prune": "compress=obc_prune compress.target=ratio",
    "mfac_prune": "compress=mfac_prune compress.target=ratio compress.rounds=4 compress.gradients=32",
    "nearest": "compress=obc_quant compress.rounding=nearest",
    "obc_quant": "compress=obc_quant",
}
PAIRS = (("fwsvd", "svd"), ("tfwsvd", "svd"), ("obc_prune", "magnitude_prune"), ("obc_quant", "nearest"))
SLACK = 0.5  # points by which the mean over learners and amounts may miss what is demanded
DEMANDED_TIME = 2.0
WIDTH = 768
QUICK = (
    "--datasets digits --backbones cnn --methods er --kinds svd fwsvd magnitude_prune obc_prune --points 2 --time 32"
)


def composed(*overrides):
    """Return the configuration of the command line."""
    with Composer.of(config_path=None, config_name=None, config_dir=None) as composer:
        config = plain_config(
            composer.compose(["hydra.run.dir=unused", "hardware=cpu", "hardware.threads=1", *overrides])
        )
    check(config, {})
    return config


class Trained:
    """A learner after its stream."""

    def __init__(self, dataset, backbone, method, seed):
        self.setting = "til" if method == "ewc" else "cil"
        tasks = ("scenario.n_tasks=12",) if dataset == "glyphs" else ()
        options = (f"dataset={dataset}", f"backbone={backbone}", f"method={method}", f"seed={seed}", *tasks)
        parts = Parts(composed(*options, f"scenario.setting={self.setting}", "job.progress=false"))
        parts.hardware.setup()
        built = build(parts)
        evaluation = Evaluation(parts.hardware, "test", 256, None)
        self.engine = Engine(built.stream, built.budget, parts.hardware, parts.seed, evaluation, Journal())
        self.method = self.engine.run(built.method)

    def accuracy(self, method):
        """Return the final average accuracy in points."""
        tasks = self.engine.stream.tasks
        found = accuracies(self.engine.evaluation(method, self.engine.stream, len(tasks)))
        return 100 * statistics.fmean(found[self.setting].values())

    def compressed(self, node):
        """Return stored bytes, dense bytes and accuracy of a compressed copy."""
        method, task = copy.deepcopy(self.method), self.engine.stream.tasks[-1]
        record = Stage(make(node, Compressor))(method, self.engine.context(method, task), lambda phase: [])
        return record["stored_bytes"], record["dense_bytes"], self.accuracy(method)


def points(args, kind):
    """Return the nodes of a kind, one per amount."""
    amounts = (BITS if kind in ("nearest", "obc_quant") else RATIOS)[: args.points]
    words = KINDS[kind].split()
    return [composed(*words, f"compress.amount={amount}", "compress.when=end")["compress"] for amount in amounts]


def measured(args):
    """Return {(dataset, backbone, method, kind): [(ratio, accuracy)]}, means over seeds; kind "dense" has one point."""
    nodes = {kind: points(args, kind) for kind in args.kinds}
    found = {}
    for dataset in args.datasets:
        for backbone in args.backbones:
            for method in args.methods:
                runs = [Trained(dataset, backbone, method, seed) for seed in range(args.seeds)]
                found[dataset, backbone, method, "dense"] = [
                    (1.0, statistics.fmean(r.accuracy(r.method) for r in runs))
                ]
                for kind in args.kinds:
                    start, line = time.process_time(), []
                    for node in nodes[kind]:
                        results = [run.compressed(node) for run in runs]
                        ratio = statistics.fmean(stored / dense for stored, dense, _ in results)
                        line.append((ratio, statistics.fmean(accuracy for *_, accuracy in results)))
                    found[dataset, backbone, method, kind] = line
                    shown = "  ".join(f"{ratio:.3f}: {accuracy:5.1f}" for ratio, accuracy in line)
                    spent = time.process_time() - start
                    print(f"{dataset} {backbone} {method} {kind:16} {shown}  ({spent:.0f} s)", flush=True)
    return found


def table(found):
    """Return the Markdown table, one line per learner and kind."""
    lines = ["| data, backbone, method | dense | kind | bytes kept: accuracy |", "| --- | --- | --- | --- |"]
    for (dataset, backbone, method, kind), line in found.items():
        if kind != "dense":
            dense = found[dataset, backbone, method, "dense"][0][1]
            cells = ", ".join(f"{ratio:.3f}: {accuracy:.1f}" for ratio, accuracy in line)
            lines.append(f"| {dataset}, {backbone}, {method} | {dense:.1f} | {kind} | {cells} |")
    return "\n".join(lines)


def gains(found):
    """Return how many points one kind gains over another, the mean over learners and amounts."""
    figures = []
    for better, baseline in PAIRS:
        pairs = [
            (accuracy, other)
            for (*learner, kind), line in found.items()
            if kind == better and (*learner, baseline) in found
            for (_, accuracy), (_, other) in zip(line, found[(*learner, baseline)], strict=True)
        ]
        if pairs:
            gain = statistics.fmean(a - b for a, b in pairs)
            figures.append(Figure(f"{better} over {baseline}", gain, -SLACK, form="+.1f", unit=" points"))
    return figures


def duration(rows):
    """Return the figure of the time of exact pruning."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(WIDTH, 2 * WIDTH, generator=generator, dtype=torch.float64)
    inverse = inverse_of(damped(x @ x.T / len(x.T), 1e-4), "fc2")
    weights = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
    terms = torch.randn(ROWS, WIDTH // 2, WIDTH, generator=generator, dtype=torch.float64)
    vector = torch.randn(ROWS, 1, WIDTH // 2, generator=generator, dtype=torch.float64)
    products, best = 20, float("inf")
    for _ in range(3):
        start = time.process_time()
        for _ in range(products):
            torch.bmm(vector, terms)
        best = min(best, time.process_time() - start)
    rate = products * 2 * terms.numel() / best
    start = time.process_time()
    removal_order(weights, inverse, torch.zeros(rows, WIDTH, dtype=torch.bool))
    taken, counted = time.process_time() - start, rows * WIDTH**3 / rate
    print(
        f"{rows} rows of {WIDTH} weights: {taken:.1f} s; {WIDTH}^3 operations per row at {rate / 1e9:.2f} GFLOP/s take "
        f"{counted:.1f} s; the 192 rows of fc2 take {taken * 192 / rows:.0f} s"
    )
    return Figure("time of OBC, of the count", taken / counted, DEMANDED_TIME, less=True, unit=" x")


def main(words=None):
    """Measure and print; return the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", nargs="*", default=["digits", "glyphs"], choices=["digits", "glyphs"])
    parser.add_argument("--backbones", nargs="*", default=["cnn", "glyph_vit"])
    parser.add_argument("--methods", nargs="*", default=["joint", "er", "ewc"])
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--points", type=int, default=len(RATIOS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--time", type=int, default=96, help="rows; 0 leaves the time out")
    parser.add_argument("--quick", action="store_true", help=f"as {QUICK}")
    args = parser.parse_args(words)
    if args.quick:
        args = parser.parse_args(QUICK.split())
    torch.set_num_threads(1)
    found = measured(args)
    print(table(found))
    figures = gains(found) + ([duration(args.time)] if args.time else [])
    for figure in figures:
        print(f"{figure.name}: {figure}")
    return figures


if __name__ == "__main__":
    finish(main())
