"""The stage after a task that makes the backbone of any learner smaller (`compress`), and its record in run.json.

After `end_task` the learner is evaluated as it is (phase "dense" in accuracy.csv), the chosen layers are replaced by
their compressed forms, and the learner is trained on for some epochs if that is wanted. The evaluation at the end of
the task then sees the compressed learner. The forms hold while later tasks are learned: the engine puts the weights
back after every optimizer step. A target that leaves everything as it is changes no byte of accuracy.csv.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from clrun.blocks.compress.base import Compressed, Compressor, Evidence, Layer, forms_of, hold, install, network_bytes
from clrun.data.stream import Stream, Task
from clrun.learning.context import Context
from clrun.learning.method import Method
from clrun.learning.training import fit
from clrun.running.evaluation import Row
from clrun.system.errors import ConfigError, first_line

Evaluate = Callable[[str], list[Row]]  # evaluates the learner and reports the rows under this phase
SINGULAR: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
DENSE, COMPRESSED = "dense", "compressed"


@dataclass(frozen=True)
class Stage:
    """Compresses a learner after its tasks.

    Attributes:
        compressor: says how.
    """

    compressor: Compressor

    def due(self, task: Task, stream: Stream) -> bool:
        """Return whether the learner is compressed after this task."""
        last = task.index == len(stream.tasks) - 1
        return not self.compressor.neutral and (last or self.compressor.when == "each_task")

    def __call__(self, method: Method, ctx: Context, evaluate: Evaluate) -> dict[str, Any]:
        """Compress a learner that has learned the task of `ctx`; return the record for run.json.

        Args:
            method: the learner.
            ctx: a new context of the task.
            evaluate: evaluates the learner and reports the rows under a phase.
        """
        start = time.perf_counter()
        held = any(True for _ in forms_of(method))
        before = evaluate(DENSE) if held else []
        hold(method)
        layers = self.compressor.select(method.backbone)
        found = self._found(method, ctx, layers)
        if not (held or found):
            return {"kind": self.compressor.name, "target": self.compressor.words, "layers": {}}
        before = before or evaluate(DENSE)
        install(method, found)
        seconds = time.perf_counter() - start
        directly = evaluate(COMPRESSED) if self.compressor.epochs else []
        tuning = 0.0
        if self.compressor.epochs:
            start = time.perf_counter()
            found = {**found, **self._tune(method, ctx)}
            tuning = time.perf_counter() - start
        facts = {name: dict(compressed.facts) for name, compressed in found.items()}
        return {
            "kind": self.compressor.name,
            "target": self.compressor.words,
            **network_bytes(method),
            "seconds": seconds,
            "finetune_seconds": tuning,
            "before": accuracies(before),
            **({"directly_after": accuracies(directly)} if directly else {}),
            "layers": {
                name: {
                    "shape": list(form.shape),
                    "dense_bytes": form.dense_bytes,
                    "stored_bytes": form.stored_bytes,
                    **form.describe(),
                    **facts.get(name, {}),
                }
                for name, form in forms_of(method)
            },
        }

    def _found(self, method: Method, ctx: Context, layers: Mapping[str, Layer]) -> dict[str, Compressed]:
        """Return the compressed layers.

        Raises:
            ConfigError: a matrix has no inverse or decomposition, or a weight is not finite.
        """
        try:
            found = self.compressor.compress(Evidence(method, ctx, layers, self.compressor.samples))
        except SINGULAR as error:
            raise ConfigError(f"compress: {_advice(self.compressor)} ({first_line(error)})") from error
        for name, compressed in found.items():
            if not bool(compressed.weight.isfinite().all()):
                raise ConfigError(f"compress: the weight of layer {name} is not finite; {_advice(self.compressor)}")
        return found

    def _tune(self, method: Method, ctx: Context) -> dict[str, Compressed]:
        """Train the compressed learner on its task; put free forms on their grid again and return them.

        The rows of the task count as seen before, so that no row is offered to a memory again.
        """
        budget = replace(ctx.budget, epochs=self.compressor.epochs, steps=None)
        fit(method, ctx.task.train, ctx, budget=budget, name="compress", passed=1)
        if not self.compressor.frees:
            return {}
        found = self._found(method, ctx, self.compressor.select(method.backbone))
        install(method, found)
        return found


def _advice(compressor: Compressor) -> str:
    """Return what to do where the arithmetic of a compressor fails."""
    if hasattr(compressor, "damping"):
        return (
            "its matrices have no inverse in double precision; use a larger compress.damping or more compress.samples"
        )
    return "a weight has no decomposition; train with a smaller learning rate, so that weights stay finite"


def accuracies(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Return the accuracy (a fraction) on each task by setting and task id, from rows of an evaluation."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        found.setdefault(row["setting"], {})[str(row["task"])] = row["correct"] / max(1, row["total"])
    return found


def plan(compressor: Compressor, method: Method) -> str:
    """Return a line that says what will be compressed.

    Raises:
        ConfigError: nothing can be.
    """
    layers = compressor.check(method)
    names = list(layers)
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    entries = sum(layer.weight.numel() for layer in layers.values())
    every = sum(p.numel() for p in method.backbone.parameters())
    when = "after each task" if compressor.when == "each_task" else "after the last task"
    return (
        f"{compressor.name}, {compressor.words}, {when}: {len(names)} layers ({shown}) with {entries:,} of the "
        f"{every:,} parameters of the backbone"
    )


def total(costs: list[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the record of the last compression of a run; None without one."""
    return next((cost["compression"] for cost in reversed(costs) if cost.get("compression")), None)


__all__ = ["COMPRESSED", "DENSE", "Stage", "accuracies", "plan", "total"]
