"""Measure what the identity of a data set costs: 50,000 files, without digests, with stored ones, and in one process.

    python scripts/bench_identity.py [--files 50000] [--bytes 20000]

Writes the files into a temporary folder, and digests beside them; nothing else is touched. "first time" reads every
file; "new process" has the digests of an earlier one; "same process" is a further run of a sweep; "after a task" is
the check of the files that one of ten tasks has used. Rows in memory are 50,000 images of 3 x 32 x 32; "after all
tasks" are their checks after each of ten tasks.

The demand is 1 % of the processor time that decoding as many JPEG files of 256 x 256 takes in three epochs here, for
they do not fit into `dataset.images.memory`; training comes on top. For rows in memory it is that of 50,000 files.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from benchlib import Figure, finish, seconds
from PIL import Image

from clrun.data import contents
from clrun.data.decode import Decoding, FileList, decode
from clrun.data.identity import changed_rows, identify, remember_rows
from clrun.data.images import FileImages, ImageSplit
from clrun.data.orders import canonical
from clrun.data.scenarios import class_split
from clrun.data.split import Plain, Split, TensorSplit
from clrun.data.stream import Dataset, Stream

QUICK = "--files 3000"
CLASSES = 100
OPTIONS = Decoding(
    size=256,
    fit="crop",
    interpolation="bicubic",
    exif=False,
    max_pixels=10**8,
    unreadable="error",
    memory=0,
    cache=False,
    range="auto",
    verify="none",
)


def make(root: Path, files: int, size: int) -> list[str]:
    """Write files of random bytes, as old as an hour, into class folders; return their names."""
    random, names = np.random.default_rng(0), []
    hour_ago = time.time() - 3600
    for k in range(files):
        name = f"train/{k % CLASSES:03d}/{k:06d}.jpg"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(random.bytes(size))
        os.utime(root / name, (hour_ago, hour_ago))
        names.append(name)
    return names


def stream_of(dataset: Dataset) -> Stream:
    """Return the data set cut into ten tasks."""
    options = {"n_tasks": 10, "first": None, "sizes": None, "class_seed": None, "class_order": None}
    return class_split(dataset, canonical, Plain(), **options, setting="cil")  # type: ignore[arg-type]


def dataset_of(train: Split, test: Split) -> Dataset:
    """Return a data set of these rows."""
    names = tuple(f"{label:03d}" for label in range(CLASSES))
    return Dataset("files", train, test, CLASSES, names, (3, 256, 256))


def files_of(root: Path, names: list[str]) -> Dataset:
    """Return the data set of the files, a sixth of them for testing."""
    labels = [int(name.split("/")[1]) for name in names]
    cut = 5 * len(names) // 6
    parts = []
    for own, title in ((slice(0, cut), "train"), (slice(cut, None), "test")):
        images = FileImages(FileList(root, tuple(names[own])), OPTIONS, channels=3, part=title)
        parts.append(ImageSplit(images, torch.tensor(labels[own])))
    return dataset_of(*parts)


def decoding(folder: Path) -> float:
    """Return the processor seconds of decoding one JPEG of 256 x 256 with one thread."""
    pixels = np.random.default_rng(0).normal(128, 20, (256, 256, 3)).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "one.jpg")
    return seconds(lambda: [decode(folder / "one.jpg", "one", OPTIONS, 3) for _ in range(200)]) / 200


def main(words: list[str] | None = None) -> list[Figure]:
    """Measure, print and return the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--files", type=int, default=50_000)
    parser.add_argument("--bytes", type=int, default=20_000)
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as name, mock.patch.dict(os.environ, {"CLRUN_CACHE": f"{name}/cache"}):
        root = Path(name) / "data"
        names = make(root, options.files, options.bytes)
        bound = 0.03 * options.files * decoding(Path(name))

        def identified() -> float:
            dataset = files_of(root, names)
            stream = stream_of(dataset)
            return seconds(lambda: identify(dataset, stream))

        found = {"first time": identified()}
        contents._known.clear()
        found["new process"] = identified()
        found["same process"] = identified()
        dataset = files_of(root, names)
        stream = stream_of(dataset)
        identify(dataset, stream)
        found["after a task"] = seconds(lambda: changed_rows(stream.tasks, 9))
        images = torch.randint(0, 256, (50_000, 3, 32, 32), dtype=torch.uint8)
        split = TensorSplit(images, torch.arange(50_000) % CLASSES)
        memory = dataset_of(split, split.select(torch.arange(10_000)))
        found["rows in memory"] = seconds(lambda: identify(memory, stream_of(memory)))
        tasks = stream_of(memory).tasks
        remember_rows(tasks)
        found["after all tasks"] = seconds(lambda: [changed_rows(tasks, k) for k in range(10)])
    whole = bound * 50_000 / options.files
    bounds = {title: whole if title in ("rows in memory", "after all tasks") else bound for title in found}
    figures = [Figure(title, took, bounds[title], True, ".2f", " s") for title, took in found.items()]
    for title, took in found.items():
        print(f"identity of {options.files} files, {title:<16}{took:7.2f} s   (1 % of a run: {bounds[title]:.2f} s)")
    return figures


if __name__ == "__main__":
    finish(main())
