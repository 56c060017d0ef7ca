"""Evaluation on data sets that are never learned, by the names of their classes (`job.eval_extra`)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import nn

from clrun.data.captions import Captions
from clrun.data.feature_cache import FeatureCache
from clrun.data.features import frozen_features
from clrun.data.modality import modality_of
from clrun.data.stream import Dataset, Stream, Task
from clrun.learning.method import Method
from clrun.running.evaluation import Evaluation
from clrun.running.parts import Parts, of_kind
from clrun.system.errors import ConfigError


@dataclass(frozen=True)
class HeldOut:
    """Data sets that are never learned; calling it evaluates a method on them.

    Attributes:
        sets: name, test rows as the method reads them, and captions of the classes of each data set.
    """

    sets: Sequence[tuple[str, Task, Captions]]

    @classmethod
    def of(cls, parts: Parts, backbone: nn.Module, method: Method, cache: FeatureCache | None) -> Self:
        """Return the data sets of `parts.job.eval_extra`, fitted to the backbone and placed on the device.

        Args:
            parts: of the configuration; its hardware is set up.
            backbone: the backbone as loaded.
            method: says whether it reads features; then they are computed or looked up.
            cache: where features are stored; None for nowhere.

        Raises:
            ConfigError: a data set cannot be read, its images do not suit the backbone, or a name occurs twice.
        """
        sets: list[tuple[str, Task, Captions]] = []
        for number, load in enumerate(parts.job.eval_extra):
            dataset: Dataset = of_kind(load(), Dataset, f"job.eval_extra[{number}]")
            if any(dataset.name == name for name, _, _ in sets):
                raise ConfigError(f"job.eval_extra: the data set {dataset.name} is listed twice; remove one")
            dataset, transform, *_ = modality_of(dataset).fit(dataset, backbone)
            hardware = parts.hardware
            rows = replace(dataset.test, transform=transform).to(hardware.device, workers=hardware.workers or 0)
            task = Task(0, number, dataset.name, torch.arange(dataset.num_classes), rows, rows, rows)
            stream = Stream((task,), dataset.num_classes, "cil", dataset.class_names, transform=transform)
            if method.uses_frozen_features:
                training = backbone.training
                stream, _ = frozen_features(stream, backbone, hardware, cache, show=parts.job.progress)
                backbone.train(training)
            sets.append((dataset.name, stream.tasks[0], dataset.texts))
        return cls(sets)

    def __call__(self, method: Method, *, evaluation: Evaluation) -> dict[str, list[int]]:
        """Return [correct, total] of each data set by name; all classes of the data set compete, and no others.

        Args:
            method: put into eval mode; its mode is restored.
            evaluation: says how rows are read; several processes share them.
        """
        training, hardware = method.training, evaluation.hardware
        method.eval()
        found = {}
        with torch.inference_mode():
            for name, task, captions in self.sets:
                rows = evaluation.rows(task)
                counts = torch.zeros(1, dtype=torch.long, device=hardware.device)
                for batch in rows.batches(evaluation.batch_size, shard=(hardware.rank, hardware.world)):
                    with hardware.autocast():
                        logits = method.score_names(hardware.layout(batch.x), captions)
                    counts += (logits.argmax(dim=1) == batch.y).sum()
                found[name] = [int(hardware.sum(counts)), len(rows)]
        method.train(training)
        return found
