"""Frozen features as a data service: every row through the frozen backbone once, as a new stream of [B, D] rows."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from clrun.data.split import Plain, Split, TensorSplit
from clrun.data.stream import Stream, Task
from clrun.hardware import Hardware

FEATURE_BATCH = 256  # fixed: the last bits of a feature may depend on the batch it was computed in


class FeatureBackbone(nn.Module):
    """The backbone of a method that reads features: the identity of width D.

    Args:
        num_features: D.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        """Return the features [B, D] as they are."""
        return x


@dataclass
class _Extractor:
    """Computes the features of stored rows in data-set order, once for each storage and domain."""

    backbone: nn.Module
    hardware: Hardware
    done: list[tuple[Tensor, Callable[[Tensor], Tensor] | None, Tensor]] = field(default_factory=list)

    def __call__(self, split: Split) -> TensorSplit:
        """Return `split` with its stored images replaced by features [M, D]."""
        if not isinstance(split, TensorSplit):
            raise TypeError(f"frozen features of a {type(split).__name__}")
        for images, shift, features in self.done:
            if images is split.images and shift is split.shift:
                break
        else:
            features = self._compute(split)
            self.done.append((split.images, split.shift, features))
        return replace(split, images=features, transform=Plain(), shift=None)

    def _compute(self, split: TensorSplit) -> Tensor:
        """Return the features [M, D] of every stored row, whether or not this split selects it."""
        whole = replace(split, rows=None, positions=0)
        layout = self.hardware.layout
        with torch.inference_mode(), self.hardware.autocast():
            parts = [self.backbone(layout(batch.x)).float() for batch in whole.batches(FEATURE_BATCH)]
        # A clone made outside inference mode: an inference tensor cannot enter a later training step.
        return torch.cat(parts).clone()


def frozen_features(stream: Stream, backbone: nn.Module, hardware: Hardware) -> tuple[Stream, FeatureBackbone]:
    """Return the stream of the frozen backbone's features and the identity backbone that reads it.

    Features are those of the eval view, computed in data-set order whatever the task order, so that a learner which
    sums them is bitwise independent of the order.

    Args:
        stream: images; every split is held in memory.
        backbone: maps prepared images to features [B, D], on the device; put into eval mode and not changed.
        hardware: device and precision of the pass.
    """
    backbone.eval()
    extract = _Extractor(backbone, hardware)

    def featured(task: Task) -> Task:
        val = None if task.val is None else extract(task.val)
        return replace(task, train=extract(task.train), test=extract(task.test), val=val)

    tasks = tuple(featured(task) for task in stream.tasks)
    width = int(backbone.num_features)  # type: ignore[arg-type]
    return replace(stream, tasks=tasks, transform=Plain()), FeatureBackbone(width)
