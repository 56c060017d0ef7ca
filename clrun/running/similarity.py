"""Similarity of the tasks of a stream, from features of the backbone or from the names of their classes."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import nn

from clrun.blocks.params import eval_mode
from clrun.data.stream import Stream
from clrun.results.metrics import Floats

ROWS = 100  # number of training rows per class whose features are averaged


def task_similarities(stream: Stream, backbone: nn.Module, similarity: Literal["features", "names"]) -> Floats:
    """Return [T, T] by task id: the mean cosine of the classes of one task with those of the other.

    With "features", the vector of a class is the mean feature of at most 100 of its training rows in the task,
    minus the mean over all classes. With "names", it counts the runs of three letters in the name of the class.
    """
    tasks = sorted(stream.tasks, key=lambda task: task.id)
    if similarity == "names":
        vectors = [_letters([stream.class_names[c] for c in task.classes.tolist()]) for task in tasks]
        runs = sorted({run for own in vectors for run in own})
        rows = np.array([[own.get(run, 0.0) for run in runs] for own in vectors]).reshape(len(tasks), len(runs))
    else:
        means = [_class_means(stream, backbone, task.index) for task in tasks]
        centre = np.concatenate(means).mean(axis=0)
        rows = np.stack([_unit(mean - centre).mean(axis=0) for mean in means])
    return np.asarray(rows @ rows.T, dtype=np.float64)


def _class_means(stream: Stream, backbone: nn.Module, position: int) -> Floats:
    """Return the mean features [k, D] of the classes of a task, float64."""
    task = stream.tasks[position]
    device = next((p.device for p in backbone.parameters()), torch.device("cpu"))
    found = []
    with torch.no_grad(), eval_mode(backbone):
        for label in task.classes.tolist():
            rows = (task.train.y == label).nonzero().flatten()[:ROWS]
            if len(rows):
                images = next(task.train.select(rows).batches(ROWS)).x
                found.append(backbone(images.to(device)).double().mean(dim=0).cpu().numpy())
    return np.stack(found)


def _letters(names: Sequence[str]) -> Mapping[str, float]:
    """Return, by run of three letters, the mean over `names` of their counts of runs, each scaled to length 1."""
    total: dict[str, float] = defaultdict(float)
    for name in names:
        text = f"  {name.lower().replace('_', ' ')}  "
        runs = Counter(text[i : i + 3] for i in range(len(text) - 2))
        length = sum(count**2 for count in runs.values()) ** 0.5
        for run, count in runs.items():
            total[run] += count / length / len(names)
    return total


def _unit(rows: Floats) -> Floats:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12), dtype=np.float64)
