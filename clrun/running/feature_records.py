"""What a run on frozen features records beside its results: where the features came from, and how good they are."""

from typing import Any

import torch

from clrun.blocks.logme import logme
from clrun.blocks.statistics import ClassStats, together
from clrun.data.feature_cache import FeatureCache
from clrun.data.features import fingerprint
from clrun.data.split import Split
from clrun.data.stream import Stream
from clrun.system.digests import tensor_digest

WIDEST = 4096  # features beyond which decomposing D x D matrices is not worth its time
_known: dict[str, dict[str, Any]] = {}  # scores of this process's earlier runs: the order of tasks does not matter


def cache_report(cache: FeatureCache | None) -> dict[str, Any]:
    """Return what run.json says of the features: the folder, and of each file its key, size, and if it was there."""
    if cache is None:
        return {"folder": None, "files": [], "bytes": 0}
    files = [
        {"key": found.key, "bytes": found.size, "reused": found.reused, "kept": found.kept} for found in cache.opened
    ]
    return {"folder": str(cache.folder), "files": files, "bytes": sum(file["bytes"] for file in files)}


def feature_notes(cache: FeatureCache | None, images: Stream) -> list[str]:
    """Return what a reader of the results should know about the features of `images`."""
    notes = [note for found in cache.opened for note in found.notes] if cache else []
    if images.transform.augments:
        notes.append("dataset.augment is without effect: features are those of the images as they are")
    return notes


def transferability(stream: Stream) -> dict[str, Any] | None:
    """Return LogME of the training rows of each task, by id, and of all together; None for very wide features.

    Args:
        stream: of features.
    """
    splits = {task.id: task.train for task in sorted(stream.tasks, key=lambda task: task.id)}
    width = next(iter(splits.values())).batches(1).__next__().x.shape[1]
    if width > WIDEST:
        return None
    key = repr([(task, _identity(split)) for task, split in splits.items()])
    if key not in _known:
        parts = {task: _sums(split, width, stream.num_classes) for task, split in splits.items()}
        scores = {str(task): logme(part) for task, part in parts.items()}
        _known[key] = {"all": logme(together(*parts.values())), "tasks": scores}
    return _known[key]


def _identity(split: Split) -> tuple[str, ...]:
    """Return what tells apart rows and labels of splits."""
    rows = torch.arange(len(split)) if split.rows is None else split.rows
    return fingerprint(split), tensor_digest(rows), tensor_digest(split.y)


def _sums(split: Split, width: int, num_classes: int) -> ClassStats:
    stats = ClassStats(width, num_classes, moments="pooled")
    for batch in split.batches(1024):
        stats.update(batch.x, batch.y)
    return stats
