"""`job=preview`: a picture, or a page of texts, of the data that a run would learn, without training.

Pre-trained weights are loaded only where the task order depends on them (`task_order=edge`).
"""

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from clrun.config.environment import masked
from clrun.config.job import JobInfo
from clrun.data.modality import modality_of
from clrun.data.split import Split
from clrun.data.stream import Modality, Stream, Task
from clrun.reporting.samples import Band, Pixels, draw_samples
from clrun.reporting.tables import SETTINGS
from clrun.reporting.text_samples import TextBand, TextSample, write_samples
from clrun.running.build import order_reads_backbone, prepare
from clrun.running.parts import Parts
from clrun.system.errors import ConfigError
from clrun.system.files import make_folder
from clrun.system.seeding import generator

FILE, PAGE = "preview.png", "preview.html"
SAMPLES, FEWER, MANY = 8, 6, 12  # samples of each task; fewer of them beyond so many tasks
NAMES = 40  # class names of a task that are listed


def preview(parts: Parts, out: Path, job: JobInfo) -> float:
    """Draw training samples of every task in order into `preview.png`, or write texts into `preview.html`; return NaN.

    Images are shown as the network sees them, and once more as augmented for training where that is different, in
    pixels: the normalisation is undone. Texts are shown as stored and as tokens.

    Args:
        parts: of the configuration.
        out: the folder to write the picture or the page into; made when needed.
        job: how the run was started.

    Raises:
        ConfigError: the data set has neither images nor texts, or the file cannot be written.
    """
    parts.hardware.setup(job=job.number or 0, parallel=job.parallel)
    title, text, bands = samples(parts)
    make_folder(out)
    pictures = [band for band in bands if isinstance(band, Band)]
    if pictures:
        draw_samples(title, text, pictures, out / FILE)
        print(f"{len(bands)} tasks drawn: {out / FILE}")
    else:
        write_samples(title, text, [band for band in bands if isinstance(band, TextBand)], out / PAGE)
        print(f"{len(bands)} tasks written: {out / PAGE}")
    return math.nan


def samples(parts: Parts) -> tuple[str, str, list[Band | TextBand]]:
    """Return what is shown: a title, how rows are fitted to the backbone, and the samples of each task.

    Args:
        parts: of the configuration; its hardware is set up.

    Raises:
        ConfigError: the rows of the data set can neither be drawn nor printed.
    """
    needed = order_reads_backbone(parts)  # then the order is the run's only with the run's backbone on its device
    prepared = prepare(parts, place=needed, pretrained=needed)
    stream, modality = prepared.stream, modality_of(prepared.dataset)
    slots = SAMPLES if len(stream.tasks) <= MANY else FEWER
    stored = {task.id: task.train for task in prepared.whole.tasks}
    bands = [
        band
        for task in stream.tasks
        if (band := _band(modality, stream, replace(task, train=stored[task.id]), slots, parts.seed)) is not None
    ]
    if not bands:
        raise ConfigError(f"job=preview: the rows of {masked(parts.name)} are no images and no texts")
    order = " ".join(map(str, stream.order))
    title = f"{masked(parts.name)}: {len(stream.tasks)} tasks, {SETTINGS[stream.setting]}, order {order}"
    return title, prepared.input, bands


def _band(modality: Modality, stream: Stream, task: Task, slots: int, seed: int) -> Band | TextBand | None:
    """Return samples of the stored rows of a task and what is to be said about it; None if they cannot be shown."""
    rows, drawn = _rows(task.train, slots), generator(seed, "preview", task.id)
    found = modality.samples(task.train, rows, stream.transform, drawn)
    if found is None:
        return None
    names = [stream.class_names[label] if stream.class_names else str(label) for label in task.classes.tolist()]
    by_label = dict(zip(task.classes.tolist(), names, strict=True))
    listed = ", ".join(names[:NAMES])
    title = f"{task.index + 1}. task {task.id}: {task.name}"
    lines = (f"{len(task.train)} train, {len(task.test)} test", f"{len(names)} classes: {listed}")
    shown = tuple(by_label[label] for label in found.labels.tolist())
    if found.images is None:
        texts = zip(shown, found.texts, strict=True)
        return TextBand(title, lines, tuple(TextSample(label, t.text, t.tokens, t.missing) for label, t in texts))
    training = None if found.training is None else _pixels(found.training)
    return Band(title=title, lines=lines, names=shown, images=_pixels(found.images), training=training)


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
