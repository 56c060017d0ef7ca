"""`job=dry_run`: prints what a run would do and an estimate of its time, without training."""

import copy
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

from clrun.config.environment import masked
from clrun.config.job import JobInfo
from clrun.learning.context import Context
from clrun.learning.method import Method
from clrun.learning.training import fit
from clrun.running.accounting import forward_flops, learner_parameters
from clrun.running.build import Built, build, missing_weights
from clrun.running.evaluation import Evaluation
from clrun.running.parts import Parts
from clrun.system.hardware import Hardware

REPEATS = 5


def dry_run(parts: Parts, job: JobInfo) -> float:
    """Print tasks, classes, parameters, FLOPs and an estimated time; write nothing and return NaN.

    The estimate rests on the time of a few steps and evaluations of a copy of the method. It leaves out what a method
    does outside of its main fit (consolidation, further phases).
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
    print(f"forward FLOPs per {built.unit}: " + ("unknown" if flops is None else f"{flops:,}"))
    print(f"estimated time: {_duration(_estimate(parts, built))} on {hardware.device}")
    return math.nan


def _estimate(parts: Parts, built: Built) -> float:
    """Return the estimated seconds of the run."""
    hardware, job = parts.hardware, parts.job
    evaluation = Evaluation(hardware, job.eval_split, job.eval_batch_size, job.max_eval_rows)
    method: Method = copy.deepcopy(built.method).to(hardware.device)
    tasks = built.stream.tasks
    ctx = Context(built.stream, tasks[0], built.budget, hardware, parts.seed, max_steps=REPEATS)
    method.begin_task(tasks[0], ctx)
    method.to(hardware.device)
    rows = len(evaluation.rows(tasks[0]))
    per_row = _median_seconds(lambda: evaluation(method, built.stream, 1, tasks=1), hardware) / max(1, rows)
    evaluations = sum((len(tasks) - task.index) * len(evaluation.rows(task)) for task in tasks) * per_row
    if method.uses_frozen_features:  # features of every image are computed once; the rest takes little time
        return sum(len(task.train) + len(evaluation.rows(task)) for task in tasks) * per_row
    limit = job.max_steps or math.inf
    tuning: Any = job.tuning
    times = [1 if tuning is None else tuning.trainings(method, task) for task in tasks]
    steps = sum(n * min(limit, built.budget.total_steps(len(task.train))) for n, task in zip(times, tasks, strict=True))
    fit(method, tasks[0].train, ctx)
    return evaluations + steps * _median_seconds(lambda: fit(method, tasks[0].train, ctx), hardware) / REPEATS


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
