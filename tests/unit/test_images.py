import os
import pickle
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import cpu, factory, live, sgd
from pictures import PLAIN, decoding
from PIL import Image
from torch import Tensor, nn

from clrun.data import images as module
from clrun.data.decode import Decoding, FileList
from clrun.data.features import frozen_features
from clrun.data.images import FileImages, ImageSplit, JoinedImages, in_memory
from clrun.data.shifts import Rotation
from clrun.data.split import Batch, Split, TensorSplit, concatenate
from clrun.data.stream import Stream, Task
from clrun.data.survey import survey
from clrun.data.transforms import ImageTransform
from clrun.running.evaluation import Evaluation
from clrun.system.errors import ConfigError

ROWS, SIDE = 23, 6


def stored(files: FileList) -> Tensor:
    pixels = [np.array(Image.open(files.root / name)) for name in files.names]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


def split_of(files: FileList, *, options: Decoding = PLAIN, **changes: Any) -> ImageSplit:
    return ImageSplit(FileImages(files, options, channels=3, part="train"), torch.arange(len(files)) % 5, **changes)


def transform(*augmentations: Callable[..., Tensor]) -> ImageTransform:
    shape = (3, SIDE, SIDE)
    return ImageTransform(shape, shape, mean=(0.5,) * 3, std=(0.5,) * 3, augmentations=augmentations)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def whole(split: Split, **options: Any) -> Batch:
    return Batch.cat(*split.batches(7, **({"view": "raw"} | options)))


def noisy(x: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    return x.float() + torch.rand(x.shape, generator=generator)


# --- the same rows as in memory


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("view", ["raw", "eval", "train"])
@pytest.mark.parametrize("shard", [(0, 1), (1, 2), (4, 5)])
def test_batches_are_those_of_a_split_in_memory(files: FileList, workers: int, view: Any, shard: Any) -> None:
    rows, positions = torch.tensor([3, 20, 3, 11, 0, 9, 22, 14, 5]), torch.arange(ROWS)
    options = {"positions": positions, "transform": transform(noisy), "shift": Rotation(90.0)}
    ours = split_of(files, workers=workers, **options).select(rows)
    theirs = TensorSplit(stored(files), torch.arange(ROWS) % 5, **options).select(rows)
    for found, expected in zip(
        ours.batches(4, view=view, shuffle=seeded(3), shard=shard),
        theirs.batches(4, view=view, shuffle=seeded(3), shard=shard),
        strict=True,
    ):
        for name in ("x", "y", "t", "i"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert found.x.dtype == expected.x.dtype


def test_images_come_in_channels_last_order(files: FileList) -> None:
    x = next(split_of(files).batches(4, view="raw")).x
    assert x.shape == (4, 3, SIDE, SIDE) and x.is_contiguous(memory_format=torch.channels_last)


def test_an_empty_selection_and_an_empty_shard(files: FileList) -> None:
    empty = split_of(files).select(torch.tensor([], dtype=torch.long))
    assert len(empty) == 0 and list(empty.batches(4)) == []
    for workers in (0, 2):
        last = list(split_of(files, workers=workers).batches(22, view="raw", shard=(1, 2)))[-1]
        assert last.x.shape == (0, 3, SIDE, SIDE)


def test_selections_share_the_storage_and_survive_pickling(files: FileList) -> None:
    split = split_of(files, transform=transform(), workers=2, options=decoding(memory=1))
    chosen = split.select(torch.tensor([4, 9])).select(torch.tensor([1]))
    whole(split)
    assert chosen.images is split.images and torch.equal(whole(chosen).x, stored(files)[[9]])
    copy = pickle.loads(pickle.dumps(chosen))
    assert torch.equal(whole(copy).x, stored(files)[[9]]) and copy.workers == 2
    assert len(pickle.dumps(chosen)) < 6000  # no image goes along
    assert torch.equal(whole(split.select(torch.tensor([4])).whole()).x, stored(files))


# --- workers


def test_reading_ahead_is_bounded_and_in_order(files: FileList, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    read = module.decode

    def decode(file: Any, name: str, *rest: Any) -> Any:
        asked.append(int(Path(name).stem))
        return read(file, name, *rest)

    monkeypatch.setattr(module, "decode", decode)
    batches = split_of(files, workers=1).batches(2, view="raw")
    assert next(batches).i.tolist() == [0, 1]
    assert set(asked) <= set(range(2 * (1 + max(module.AHEAD, 2 * module.CHUNK // 2))))
    rest = list(batches)
    assert [b.i[0].item() for b in rest] == list(range(2, ROWS, 2)) and sorted(asked) == list(range(ROWS))


def test_a_reader_that_leaves_early_leaves_no_threads(files: FileList) -> None:
    before = threading.active_count()
    batches = split_of(files, workers=3).batches(2, view="raw")
    next(batches)
    assert threading.active_count() > before
    del batches
    assert threading.active_count() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_is_an_error_that_names_it(files: FileList, workers: int) -> None:
    (files.root / "13.png").write_bytes(b"damaged")
    before = threading.active_count()
    with pytest.raises(ConfigError, match=r"13.png: cannot be decoded \(not an image"):
        whole(split_of(files, workers=workers))
    assert threading.active_count() == before
    assert survey(files, decoding(verify="headers"), 3).problems == {
        13: f"{files.root}/13.png: cannot be decoded (not an image of a known format: BMP, GIF, JPEG, PNG, PPM, TIFF, "
        "WEBP)"
    }


# --- memory and fingerprints


@pytest.mark.parametrize(("memory", "times"), [(0, 2), (1, 1)])
def test_what_fits_into_memory_is_decoded_once(
    files: FileList, memory: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = []
    read = module.decode
    monkeypatch.setattr(module, "decode", lambda *args: count.append(1) or read(*args))
    split = split_of(files, options=decoding(memory=memory), workers=2)
    for _ in range(2):
        assert torch.equal(whole(split).x, stored(files))
    assert len(count) == times * ROWS
    first = next(split.batches(4, view="raw")).x
    first.zero_()  # a reader may do what it likes with its batch
    assert torch.equal(whole(split).x, stored(files))


def test_in_memory_holds_the_same_rows(files: FileList) -> None:
    split = split_of(files, positions=torch.arange(ROWS)).select(torch.tensor([7, 2]))
    loaded = in_memory(split)
    for name in ("x", "y", "t"):
        assert torch.equal(getattr(whole(loaded), name), getattr(whole(split), name))
    assert in_memory(split_of(files)).images is loaded.images and loaded.images.is_contiguous()


def test_the_fingerprint_tells_data_and_decoding_apart(files: FileList) -> None:
    first = split_of(files).fingerprint()
    assert split_of(files).fingerprint() == first == split_of(files, options=decoding(memory=5)).fingerprint()
    assert split_of(files, options=decoding(size=5)).fingerprint() != first
    os.utime(files.root / "03.png", ns=(1, 1))
    touched = split_of(files).fingerprint()
    assert touched != first
    assert split_of(FileList(files.root, files.names[:-1])).fingerprint() != touched


# --- concatenation


def test_splits_of_one_storage_share_it_when_concatenated(files: FileList) -> None:
    split = split_of(files, transform=transform())
    parts = [replace(split.select(torch.tensor([4, 2])), positions=3), replace(split, positions=1)]
    expected = Batch.cat(*(whole(part) for part in parts))
    joined = concatenate(parts)
    assert joined.images is split.images
    for name in ("x", "y", "t"):
        assert torch.equal(getattr(whole(joined), name), getattr(expected, name))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("inference", [False, True])
def test_splits_of_any_kind_and_domain_are_concatenated(files: FileList, workers: int, inference: bool) -> None:
    split = split_of(files, transform=transform(), workers=workers)
    in_tensor = TensorSplit(stored(files).flip(0), torch.arange(ROWS), shift=Rotation(180.0), positions=2)
    parts: list[Split] = [
        replace(split.select(torch.tensor([4, 2])), shift=Rotation(90.0), positions=torch.tensor([8, 9])),
        in_tensor.select(torch.tensor([6, 0, 1])),
        replace(split, positions=5),
    ]
    expected = Batch.cat(*(whole(part) for part in parts))
    with torch.inference_mode(inference):
        joined = concatenate(parts)
        found, mixed = whole(joined), whole(joined, shuffle=seeded())
    for name in ("x", "y", "t"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert torch.equal(mixed.x, expected.x[mixed.i])
    again = concatenate([joined.select(torch.tensor([1])), in_tensor.select(torch.tensor([3]))])
    assert torch.equal(whole(again).x, torch.cat([expected.x[1:2], whole(in_tensor).x[3:4]]))
    turned = [replace(parts[0], shift=Rotation(80.0)), *parts[1:]]
    others = [split, concatenate(parts[1:]), concatenate(parts[::-1]), concatenate(turned)]
    assert len({joined.fingerprint(), *(other.fingerprint() for other in others)}) == 5
    assert pickle.loads(pickle.dumps(joined)).fingerprint() == joined.fingerprint()
    assert torch.equal(whole(pickle.loads(pickle.dumps(joined))).x, expected.x)


def test_joined_images_know_their_shape(files: FileList) -> None:
    split = split_of(files)
    joined = JoinedImages([split, TensorSplit(stored(files)[:3], torch.arange(3))])
    assert joined.shape == (ROWS + 3, 3, SIDE, SIDE)
    with pytest.raises(AssertionError, match="cannot join"):
        JoinedImages([split, TensorSplit(torch.zeros(1, 1, 2, 2), torch.zeros(1))])


# --- with the rest of clrun


class Net(nn.Module):
    num_features = 4

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * SIDE * SIDE, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1)).tanh()


def stream_of(split: Split) -> Stream:
    def rows(index: int) -> Split:
        own = split.select(torch.isin(split.y, torch.tensor([2 * index, 2 * index + 1])).nonzero()[:, 0])
        return replace(own, positions=index, transform=split.transform)

    tasks = [Task(k, k, f"{k}", torch.tensor([2 * k, 2 * k + 1]), rows(k), rows(k)) for k in range(2)]
    return Stream(tuple(tasks), 5, "cil", transform=split.transform)


def outcome(split: Split) -> list[Any]:
    torch.manual_seed(0)
    method = factory("finetune")(Net(), 5)
    journal = live(method, stream_of(split), budget=sgd(batch_size=5))
    return [row["nll"] for row in journal.recorded] + [p.sum().item() for p in method.parameters()]


def test_a_learners_life_does_not_depend_on_where_images_lie_or_who_decodes(files: FileList) -> None:
    options = {"transform": transform(noisy)}
    memory = TensorSplit(stored(files), torch.arange(ROWS) % 5, **options)
    lives = [outcome(split_of(files, workers=workers, **options)) for workers in (0, 1, 3)]
    assert lives[0] == lives[1] == lives[2] == outcome(memory)


def test_frozen_features_are_those_of_images_in_memory(files: FileList) -> None:
    torch.manual_seed(0)
    net, options = Net(), {"transform": transform()}
    memory = TensorSplit(stored(files), torch.arange(ROWS) % 5, **options)
    streams = [
        frozen_features(stream_of(split), net, cpu())[0] for split in (split_of(files, workers=2, **options), memory)
    ]
    for ours, theirs in zip(*(stream.tasks for stream in streams), strict=True):
        assert torch.equal(whole(ours.train).x, whole(theirs.train).x) and torch.equal(ours.train.y, theirs.train.y)


def test_evaluation_looks_at_evenly_spaced_rows(files: FileList) -> None:
    task = stream_of(split_of(files, transform=transform())).tasks[0]
    rows = Evaluation(cpu(), "test", 64, 3).rows(task)
    assert torch.equal(whole(rows).x, whole(task.test).x[torch.linspace(0, len(task.test) - 1, 3).long()])


# --- the cache on disk


@pytest.mark.parametrize("workers", [0, 2])
def test_the_cache_gives_the_same_rows_and_decodes_once(
    files: FileList, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = decoding(cache=str(tmp_path / "cache"))
    rows = torch.tensor([20, 3, 3, 11])
    expected = whole(split_of(files)).x
    assert torch.equal(whole(split_of(files, options=options, workers=workers)).x, expected)
    monkeypatch.setattr("clrun.data.image_cache.decode", None)
    monkeypatch.setattr(module, "decode", None)
    again = split_of(files, options=options, workers=workers)
    assert torch.equal(whole(again.select(rows)).x, expected[rows])
    whole(again).x.zero_()
    assert torch.equal(whole(again, shuffle=seeded()).x, expected[whole(again, shuffle=seeded()).i])
    first = next(again.batches(2, view="raw")).x
    first.zero_()  # nothing of this reaches the file
    assert torch.equal(whole(split_of(files, options=options)).x, expected)
