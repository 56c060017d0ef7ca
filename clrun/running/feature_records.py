"""Records of a run on frozen features in run.json: where the features came from, and their transferability (LogME)."""

from typing import Any

import torch

from clrun.blocks.logme import logme
from clrun.blocks.statistics import ClassStats, together
from clrun.data.feature_cache import FeatureCache
from clrun.data.features import fingerprint
from clrun.data.split import Split
from clrun.data.stream import Stream
from clrun.system.digests import tensor_digest

WIDEST = 4096  # beyond this width decomposing D x D matrices takes too long
_scores: dict[
    str, dict[str, Any]
] = {}  # of this process's earlier runs, by rows and labels of the tasks; the task order does not matter


def cache_report(cache: FeatureCache | None) -> dict[str, Any]:
    """Return the entry `features` of run.json: the folder, and per file its key, its size and whether it was reused."""
    if cache is None:
        return {"folder": None, "files": [], "bytes": 0}
    files = [
        {"key": found.key, "bytes": found.size, "reused": found.reused, "kept": found.in_cache}
        for found in cache.opened
    ]
    return {"folder": str(cache.folder), "files": files, "bytes": sum(file["bytes"] for file in files)}


def feature_notes(cache: FeatureCache | None, images: Stream) -> list[str]:
    """Return the notes of run.json on the features of `images`."""
    notes = [note for found in cache.opened for note in found.notes] if cache else []
    if images.transform.augments:
        notes.append("dataset.augment has no effect: features are computed from images without augmentation")
    return notes


def transferability(stream: Stream) -> dict[str, Any] | None:
    """Return the LogME of the training rows of each task, by id, and of all together; None for very wide features.

    Args:
        stream: a stream of features.
    """
    splits = {task.id: task.train for task in sorted(stream.tasks, key=lambda task: task.id)}
    width = next(iter(splits.values())).batches(1).__next__().x.shape[1]
    if width > WIDEST:
        return None
    key = repr([(task, _identity(split)) for task, split in splits.items()])
    if key not in _scores:
        parts = {task: _sums(split, width, stream.num_classes) for task, split in splits.items()}
        scores = {str(task): logme(part) for task, part in parts.items()}
        _scores[key] = {"all": logme(together(*parts.values())), "tasks": scores}
    return _scores[key]


def _identity(split: Split) -> tuple[str, ...]:
    """Return digests of the stored data, the rows and the labels of a split; they differ where splits differ."""
    rows = torch.arange(len(split)) if split.rows is None else split.rows
    return fingerprint(split), tensor_digest(rows), tensor_digest(split.y)


def _sums(split: Split, width: int, num_classes: int) -> ClassStats:
    stats = ClassStats(width, num_classes, moments="pooled")
    for batch in split.batches(1024):
        stats.update(batch.x, batch.y)
    return stats
