"""`job=dry_run`: prints what a run would do and an estimate of its time, without training."""

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from clrun.config.environment import masked
from clrun.config.job import JobInfo
from clrun.data.features import FEATURE_BATCH
from clrun.data.split import Plain, Split, TensorSplit
from clrun.data.stream import Stream
from clrun.learning.context import Context
from clrun.learning.method import Method
from clrun.learning.training import fit
from clrun.running.accounting import forward_flops, learner_parameters
from clrun.running.build import Built, build, missing_weights
from clrun.running.compression import plan
from clrun.running.evaluation import Evaluation
from clrun.running.parts import Parts
from clrun.system.hardware import Hardware

REPEATS = 5


def dry_run(parts: Parts, job: JobInfo) -> float:
    """Print tasks, classes, parameters, FLOPs and an estimated time; write nothing and return NaN.

    The estimate rests on the time of a few steps and evaluations of a copy of the method. It leaves out what a method
    does outside of its main fit (consolidation, further phases) and compression.
    """
    hardware = parts.hardware
    hardware.setup(job=job.number or 0, parallel=job.parallel)
    missing = missing_weights(parts)
    built = build(parts, features=False, pretrained=missing is None)
    stream = built.stream
    print(f"{masked(parts.name)}: {len(stream.tasks)} tasks, {stream.num_classes} classes, setting {stream.setting}")
    for task in stream.tasks:
        names = ", ".join(stream.class_names[c] if stream.class_names else str(c) for c in task.classes.tolist()[:12])
        more = ", ..." if len(task.classes) > 12 else ""
        print(
            f"  {task.index + 1:3d}. task {task.id} {task.name}: {len(task.train)} train, {len(task.test)} test", end=""
        )
        print(f", classes {names}{more}")
    counts = learner_parameters(built.method, built.backbone)
    row = next(built.images.tasks[0].test.batches(1)).x
    flops = forward_flops(built.backbone, row)
    print(f"input: {built.input}")
    if missing is not None:
        print(f"weights: random in this dry run, and a run needs them: {missing}")
    print(f"parameters: {counts['total']:,} ({counts['trainable']:,} trainable)")
    print(f"forward FLOPs per {built.row}: " + ("unknown" if flops is None else f"{flops:,}"))
    if parts.compress is not None:
        print(f"compress: {plan(parts.compress, built.method)}")
    print(f"estimated time: {_duration(_estimate(parts, built))} on {hardware.device}")
    return math.nan


def _estimate(parts: Parts, built: Built) -> float:
    """Return the estimated seconds of the run."""
    hardware, job = parts.hardware, parts.job
    evaluation = Evaluation(hardware, job.eval_split, job.eval_batch_size, job.max_eval_rows)
    method: Method = copy.deepcopy(built.method).to(hardware.device)
    encoding, stream = _encoding(built, hardware)
    tasks = stream.tasks
    ctx = Context(stream, tasks[0], built.budget, hardware, parts.seed, max_steps=REPEATS)
    method.begin_task(tasks[0], ctx)
    method.to(hardware.device)
    rows = len(evaluation.rows(tasks[0]))
    per_row = _median_seconds(lambda: evaluation(method, stream, 1, tasks=1), hardware) / max(1, rows)
    evaluations = sum((len(tasks) - task.index) * len(evaluation.rows(task)) for task in tasks) * per_row
    if method.uses_frozen_features:  # features of every image are computed once; the rest takes little time
        return sum(len(task.train) + len(evaluation.rows(task)) for task in tasks) * per_row
    limit = job.max_steps or math.inf
    tuning: Any = job.tuning
    times = [1 if tuning is None else tuning.trainings(method, task) for task in tasks]
    steps = sum(n * min(limit, built.budget.total_steps(len(task.train))) for n, task in zip(times, tasks, strict=True))
    fit(method, tasks[0].train, ctx)
    training = steps * _median_seconds(lambda: fit(method, tasks[0].train, ctx), hardware) / REPEATS
    return encoding + evaluations + training


def _encoding(built: Built, hardware: Hardware) -> tuple[float, Stream]:
    """Return the estimated seconds of what a backbone's `frozen_part` computes once, and the stream to train on.

    In that stream random numbers stand for the features of the frozen part; without such a part it is the run's own.
    """
    frozen: Any = getattr(built.backbone, "frozen_part", None)
    if frozen is None or built.method.uses_frozen_features:
        return 0.0, built.stream
    rows = next(built.images.tasks[0].train.batches(FEATURE_BATCH)).x

    def encode() -> None:
        with torch.inference_mode(), hardware.autocast():
            frozen(hardware.layout(rows))

    def instead(split: Split) -> Split:
        numbers = torch.randn(len(split.images), int(frozen.num_features), device=hardware.device)
        return TensorSplit(numbers, split.labels, split.rows, split.positions)

    tasks = [
        replace(t, train=instead(t.train), test=instead(t.test), val=t.val and instead(t.val))
        for t in built.stream.tasks
    ]
    count = sum(len(task.train) + len(task.test) for task in tasks)
    seconds = count * _median_seconds(encode, hardware) / len(rows)
    return seconds, replace(built.stream, tasks=tuple(tasks), transform=Plain())


def _median_seconds(work: Callable[[], Any], hardware: Hardware) -> float:
    """Return the median wall time of a few calls of `work`."""
    seconds = []
    for _ in range(REPEATS):
        hardware.synchronize()
        start = time.perf_counter()
        work()
        hardware.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _duration(seconds: float) -> str:
    """Return seconds as "42 s", "3 min" or "2.5 h"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
