"""`job=preview`: a picture of the data that a run would learn, without training.

Pre-trained weights are loaded only where the task order depends on them (`task_order=edge`).
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from clrun.config.environment import masked
from clrun.config.job import JobInfo
from clrun.data.split import Batch, Split
from clrun.data.stream import Stream, Task
from clrun.data.transforms import ImageTransform
from clrun.reporting.samples import Band, Pixels, draw_samples
from clrun.reporting.tables import SETTINGS
from clrun.running.build import build_images, order_reads_backbone
from clrun.running.parts import Parts
from clrun.system.errors import ConfigError
from clrun.system.files import make_folder
from clrun.system.seeding import generator

FILE = "preview.png"
SAMPLES, FEWER, MANY = 8, 6, 12  # samples of each task; fewer of them beyond so many tasks
NAMES = 40  # class names of a task that are listed


def preview(parts: Parts, out: Path, job: JobInfo) -> float:
    """Draw training samples of every task in order into `preview.png` and return NaN.

    They are shown as the network sees them, and once more as augmented for training where that is different, in
    pixels: the normalisation is undone.

    Args:
        parts: of the configuration.
        out: the folder to write the picture into; made when needed.
        job: how the run was started.

    Raises:
        ConfigError: the data set has no images, or the picture cannot be written.
    """
    parts.hardware.setup(job=job.number or 0, parallel=job.parallel)
    title, text, bands = samples(parts)
    make_folder(out)
    draw_samples(title, text, bands, out / FILE)
    print(f"{len(bands)} tasks drawn: {out / FILE}")
    return math.nan


def samples(parts: Parts) -> tuple[str, str, list[Band]]:
    """Return what the picture shows: a title, how images are fitted to the backbone, and the samples of each task.

    Args:
        parts: of the configuration; its hardware is set up.

    Raises:
        ConfigError: the data set has no images.
    """
    needed = order_reads_backbone(parts)  # then the order is the run's only with the run's backbone on its device
    _, stream, text = build_images(parts, place=needed, pretrained=needed)
    if not isinstance(stream.transform, ImageTransform):
        raise ConfigError(f"job=preview: the rows of {masked(parts.name)} are no images")
    slots = SAMPLES if len(stream.tasks) <= MANY else FEWER
    bands = [_band(stream, task, slots, parts.seed) for task in stream.tasks]
    order = " ".join(map(str, stream.order))
    title = f"{masked(parts.name)}: {len(stream.tasks)} tasks, {SETTINGS[stream.setting]}, order {order}"
    return title, text, bands


def _band(stream: Stream, task: Task, slots: int, seed: int) -> Band:
    """Return the samples of a task and what is to be said about it."""
    transform = stream.transform
    assert isinstance(transform, ImageTransform)
    raw: Batch = next(task.train.select(_rows(task.train, slots)).batches(slots, view="raw"))
    augmented = transform.train(raw.x, generator(seed, "preview", task.id)) if transform.augments else None
    shown, training = _pixels(transform.undo(transform.eval(raw.x))), None
    if augmented is not None:
        training = _pixels(transform.undo(augmented))
    names = [stream.class_names[label] if stream.class_names else str(label) for label in task.classes.tolist()]
    by_label = dict(zip(task.classes.tolist(), names, strict=True))
    listed = ", ".join(names[:NAMES])
    return Band(
        title=f"{task.index + 1}. task {task.id}: {task.name}",
        lines=(f"{len(task.train)} train, {len(task.test)} test", f"{len(names)} classes: {listed}"),
        names=tuple(by_label[label] for label in raw.y.tolist()),
        images=shown,
        training=training,
    )


def _rows(split: Split, slots: int) -> Tensor:
    """Return up to `slots` rows, [k] long: the first ones of every class, or of classes spread evenly over many."""
    labels = torch.tensor(sorted(set(split.y.tolist())))
    chosen = labels[torch.linspace(0, len(labels) - 1, min(slots, len(labels))).round().long()]
    parts = []
    for k, label in enumerate(chosen):
        count = slots // len(chosen) + (k < slots % len(chosen))
        parts.append((split.y == label).nonzero()[:count, 0])
    return torch.cat(parts)


def _pixels(x: Tensor) -> Pixels:
    """Return images [k, C, H, W] in units of 0..255 as pixels [k, H, W, C], C 1 or 3; a wider range is compressed."""
    low, high = min(0.0, float(x.min())), max(255.0, float(x.max()))
    if low < -1 or high > 256:
        x = (x - low) * (255 / (high - low))
    if x.shape[1] not in (1, 3):
        x = x.mean(dim=1, keepdim=True)
    shown: Pixels = x.round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    return shown
