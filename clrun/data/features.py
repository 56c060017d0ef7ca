"""Frozen features: every row passes through the frozen backbone once and becomes a row [D] of a new stream.

Shapes: `M` stored rows, `B` batch, `D` feature width.
"""

import hashlib
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from clrun.data.captions import Captions
from clrun.data.feature_cache import FeatureCache, Features, Floats, default_folder
from clrun.data.split import Plain, Split, TensorSplit
from clrun.data.stream import Stream, Task
from clrun.system.digests import tensor_digest
from clrun.system.errors import ConfigError
from clrun.system.hardware import Hardware

FEATURE_BATCH = 256  # fixed, because the last bits of a feature may depend on the batch
CHECKED_ROWS = 8  # rows that are computed again when features of an earlier process are opened
TOLERANCE = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 5e-2}  # of those rows, relative to their largest entry


def open_cache(
    option: bool | str, gigabytes: float, hardware: Hardware, about: Mapping[str, Any]
) -> FeatureCache | None:
    """Return the cache that `job.feature_cache` names; None for false.

    Args:
        option: true is the default folder.
        gigabytes: size limit of the folder, `job.feature_cache_gb`.
        hardware: recorded with new features, because their last bits may depend on it.
        about: further facts to record with new features.

    Raises:
        ConfigError: the name of the folder is empty.
    """
    if option is False:
        return None
    if option == "":
        raise ConfigError("job.feature_cache: give a folder, true (the default folder) or false")
    folder = default_folder() if option is True else Path(str(option)).expanduser()
    device = hardware.device.partition(":")[0]
    place = f"a CPU with {torch.backends.cpu.get_cpu_capability()}" if device == "cpu" else device
    circumstances = f"torch {torch.__version__} on {place}"
    return FeatureCache(folder, gigabytes * 1e9, {**about, "circumstances": circumstances})


class FeatureBackbone(nn.Module):
    """The backbone of a method that reads features: the identity of width D.

    Args:
        num_features: D.
        joint: the text side of the frozen backbone; None for a backbone without one.
        captions: the text embeddings [M_k, d] of the captions of each of the C classes, if the method needs them.
    """

    def __init__(
        self, num_features: int, joint: nn.Module | None = None, captions: Sequence[Tensor] | None = None
    ) -> None:
        super().__init__()
        self.num_features = num_features
        if joint is not None:
            self.joint = joint
        # No buffer: a checkpoint has them, while it refers to the weights of a backbone, which are loaded again.
        self.captions = None if captions is None else tuple(captions)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features [B, D] as they are."""
        return x


@dataclass(frozen=True)
class FeatureSplit(Split):
    """A split whose rows are features in the cache; batches arrive on the device of the labels.

    Attributes:
        images: the features in the cache.
    """

    images: Features

    def to(self, device: torch.device | str, *, workers: int = 0) -> Self:
        """Return the split with labels and batches on `device`; the features stay on the disk."""
        rows = None if self.rows is None else self.rows.to(device)
        positions = self.positions if isinstance(self.positions, int) else self.positions.to(device)
        return replace(self, labels=self.labels.to(device), rows=rows, positions=positions)

    def fingerprint(self) -> str:
        """Return the key of the features."""
        return self.images.key

    def _read(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        device = self.labels.device
        return (torch.from_numpy(self.images.take(rows.cpu().numpy())).to(device) for rows in parts)

    @classmethod
    def joined(cls, parts: Sequence[Split]) -> Split:
        """Return one split in memory with the rows of several."""
        batches = [next(part.batches(max(1, len(part)), view="raw")) for part in parts if len(part)]
        x, y, t = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("x", "y", "t"))
        return TensorSplit(x, y, positions=t, transform=parts[0].transform)


@dataclass
class _Extractor:
    """Finds or computes the features of stored rows in data-set order, once per storage and shift."""

    backbone: nn.Module
    hardware: Hardware
    cache: FeatureCache | None
    digest: str | None
    show: bool
    done: list[tuple[Split, Features | Tensor]] = field(default_factory=list)

    def __call__(self, split: Split, about: Mapping[str, Any]) -> Split:
        """Return `split` with its stored images replaced by features [M, D]."""
        seen = (features for other, features in self.done if _same_rows(other, split))
        features = next(seen, None)
        if features is None:
            features = self._features(split.whole(), about)
            self.done.append((split, features))
        kind = FeatureSplit if isinstance(features, Features) else TensorSplit
        return kind(features, split.labels, split.rows, split.positions)  # type: ignore[arg-type]

    def _features(self, whole: Split, about: Mapping[str, Any]) -> Features | Tensor:
        """Return the features of every stored row, whether or not a task selects it."""
        if self.cache is None:
            blocks = list(self._all(whole, about))
            return torch.from_numpy(np.concatenate(blocks)).to(self.hardware.device)
        return self.cache.get(
            self._key(whole),
            shape=(len(whole), int(self.backbone.num_features)),  # type: ignore[arg-type]
            compute=lambda: self._all(whole, about),
            agrees=lambda stored: self._agrees(whole, stored),
            about=about,
        )

    def _all(self, whole: Split, about: Mapping[str, Any]) -> Iterator[Floats]:
        """Yield the features of all rows in blocks, with a progress bar."""
        with tqdm(total=len(whole), desc=f"features, {about['part']}", leave=False, disable=not self.show) as bar:
            for block in self._blocks(whole):
                yield block
                bar.update(len(block))

    def _blocks(self, split: Split) -> Iterator[Floats]:
        """Yield features of the eval view [B, D], in order."""
        width = int(self.backbone.num_features)  # type: ignore[arg-type]
        for batch in split.batches(FEATURE_BATCH):
            with torch.inference_mode(), self.hardware.autocast():
                features = self.backbone(self.hardware.layout(batch.x)).float()
            if features.shape[1:] != (width,):
                raise ConfigError(
                    f"backbone: num_features is {width}, but its output is "
                    f"[B, {', '.join(map(str, features.shape[1:]))}]; "
                    "return features [B, num_features]"
                )
            if not torch.isfinite(features).all():
                raise ConfigError("backbone: gives features that are not finite; try hardware.precision=fp32")
            yield features.cpu().numpy()

    def _agrees(self, whole: Split, stored: Features) -> bool:
        """Recompute a few rows and return whether the stored ones match, within the tolerance of the precision."""
        rows = torch.linspace(0, len(whole) - 1, min(CHECKED_ROWS, len(whole))).long()
        now = np.concatenate(list(self._blocks(whole.select(rows.to(whole.labels.device)))))
        error = np.abs(now - stored.take(rows.numpy())).max(initial=0)
        return bool(error <= TOLERANCE[self.hardware.precision] * np.abs(now).max(initial=0))

    def _key(self, whole: Split) -> dict[str, Any]:
        """Return everything the features depend on: data, weights, transform, precision, memory layout, batch size."""
        self.digest = self.digest or module_digest(self.backbone)
        return {
            "data": fingerprint(whole),
            "shift": described(whole.shift),
            "transform": described(whole.transform),
            "backbone": self.digest,
            "precision": self.hardware.precision,
            "channels_last": self.hardware.channels_last,
            "batch": FEATURE_BATCH,
        }


def frozen_features(
    stream: Stream,
    backbone: nn.Module,
    hardware: Hardware,
    cache: FeatureCache | None = None,
    *,
    digest: str | None = None,
    text: bool = False,
    show: bool = False,
) -> tuple[Stream, FeatureBackbone]:
    """Return the stream of the frozen backbone's features and the identity backbone that reads it.

    Features are those of the eval view, computed in data-set order whatever the task order, so that a learner which
    sums them is bitwise independent of the order.

    Args:
        stream: images.
        backbone: maps prepared images to features [B, D], on the device; put into eval mode and not changed.
        hardware: device and precision of the pass.
        cache: stores features on the disk; None computes them and holds them in memory.
        digest: `module_digest(backbone)` if it is known.
        text: also compute the text embeddings of the captions of all classes, which the backbone must have a text tower
            for; they are stored like the features of images.
        show: whether to show a progress bar while features are computed.

    Raises:
        ConfigError: the cache cannot be written, or the backbone's features are not finite.
    """
    backbone.eval()
    extract = _Extractor(backbone, hardware, cache, digest, show=show and hardware.main and sys.stderr.isatty())

    def featured(task: Task) -> Task:
        val = None if task.val is None else extract(task.val, {"part": "train"})
        train, test = extract(task.train, {"part": "train"}), extract(task.test, {"part": "test"})
        return replace(task, train=train, test=test, val=val)

    tasks = tuple(featured(task) for task in stream.tasks)
    width = int(backbone.num_features)  # type: ignore[arg-type]
    joint: nn.Module | None = getattr(backbone, "joint", None)
    if joint is backbone:  # an encoder of texts is its own joint space, and the learner trains nothing of it
        joint.requires_grad_(False)
    texts = None
    if text and joint is not None and stream.captions is not None:
        texts = frozen_texts(stream.captions, stream.num_classes, joint, hardware, cache)
    return replace(stream, tasks=tasks, transform=Plain()), FeatureBackbone(width, joint, texts)


def frozen_texts(
    captions: Captions, num_classes: int, joint: nn.Module, hardware: Hardware, cache: FeatureCache | None
) -> Sequence[Tensor]:
    """Return the text embeddings [M_k, d] fp32 of the captions of each class, on the device.

    They are computed in the order of the class ids, whatever the task order, and once per text tower and set of
    captions with a `cache`.

    Args:
        captions: texts of the classes.
        num_classes: C.
        joint: maps token ids [N, L] to embeddings [N, d]; has `tokenize` and `num_features` = d.
        hardware: device and precision of the pass.
        cache: stores them on the disk; None computes them.
    """
    texts = [captions.of(label) for label in range(num_classes)]
    ids: Tensor = joint.tokenize([text for own in texts for text in own])  # type: ignore[operator]
    split = TensorSplit(ids, torch.zeros(len(ids), dtype=torch.long, device=ids.device))
    read = _Extractor(joint, hardware, cache, None, show=False)(split, {"part": "captions"})
    return torch.split(next(read.batches(len(ids))).x, [len(own) for own in texts])


def _same_rows(a: Split, b: Split) -> bool:
    """Return whether two splits store the same rows and apply the same shift and transform."""
    return a.images is b.images and a.shift is b.shift and a.transform is b.transform


# --- what features depend on


_fingerprints: dict[int, tuple[Callable[[], Any], str]] = {}


def fingerprint(split: Split) -> str:
    """Return the fingerprint of the stored images, or features, computed once per process."""
    known = _fingerprints.get(id(split.images))
    if known is None or known[0]() is not split.images:
        known = _fingerprints[id(split.images)] = (weakref.ref(split.images), split.fingerprint())
    return known[1]


def module_digest(module: nn.Module) -> str:
    """Return a digest of the tensors and of the plain options of a module and everything within.

    Options are attributes that are numbers, texts, functions or classes, or tuples of these: sizes, epsilons, kinds of
    pooling. Two backbones of one digest compute the same function, unless forward hooks change one of them.
    """
    digest = hashlib.sha256()
    for name, part in module.named_modules():
        options = {key: value for key, value in sorted(vars(part).items()) if key != "training" and _plain(value)}
        digest.update(repr((name, _name(type(part)), described(options))).encode())
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor_digest(tensor)}".encode())
    return digest.hexdigest()


def described(value: Any) -> Any:
    """Return `value` as plain JSON values: tensors by digest, objects by class and attributes.

    Attributes whose names are in an object's `train_only` are left out.
    """
    if isinstance(value, Tensor):
        return tensor_digest(value)
    if isinstance(value, Mapping):
        return {str(key): described(item) for key, item in sorted(value.items(), key=lambda pair: str(pair[0]))}
    if isinstance(value, list | tuple):
        return [described(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if callable(value) and hasattr(value, "__qualname__"):
        return _name(value)
    state = value.__getstate__()
    without = getattr(value, "train_only", ())
    kept = {key: item for key, item in (state or {}).items() if key not in without}
    return {"class": _name(type(value)), **described(kept)}


def _plain(value: Any) -> bool:
    """Return whether `described` represents an attribute of a module completely."""
    if isinstance(value, list | tuple):
        return all(_plain(item) for item in value)
    named = callable(value) and hasattr(value, "__qualname__")
    return value is None or isinstance(value, bool | int | float | str) or named


def _name(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
