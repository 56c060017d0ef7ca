"""The feature cache: what finds an entry, what spoils it, who may compute, and who makes room."""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Net, configured, cpu, image_stream

from clrun.data import feature_cache
from clrun.data.feature_cache import ABANDONED, MAPPED, FeatureCache, Features, Floats, default_folder, listing
from clrun.data.features import FeatureSplit, frozen_features, module_digest
from clrun.data.split import TensorSplit
from clrun.data.stream import Stream
from clrun.data.transforms import fit_transform
from clrun.running.accounting import PeakMemory
from clrun.system.errors import ConfigError
from clrun.system.seeding import seed_all

ROWS = np.arange(12, dtype=np.float32).reshape(6, 2)


def ask(cache: FeatureCache, key: str = "a", *, agrees: bool = True, rows: Floats = ROWS, **options: Any) -> Features:
    """Ask for the rows under a key, in two blocks."""
    return cache.get(
        {"name": key},
        shape=rows.shape,
        compute=options.get("compute", lambda: iter((rows[:4], rows[4:]))),
        agrees=lambda stored: agrees,
        about={"dataset": key, "part": "train"},
    )


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Forget what this process has checked, as a new process would."""
    feature_cache._intact.clear()


def files(folder: Path, suffix: str) -> list[Path]:
    return sorted(folder.glob(f"*{suffix}"))


def test_stores_once_and_gives_back_the_same_bytes(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "deep" / "cache")
    first, second = ask(cache), ask(cache)
    assert (first.reused, second.reused) == (False, True)
    assert first.key == second.key
    assert np.array_equal(first.rows, ROWS) and np.array_equal(second.rows, ROWS)
    assert np.array_equal(np.load(files(cache.folder, ".npy")[0]), ROWS)
    assert not files(cache.folder, ".tmp")
    assert not ask(cache, "b").reused
    first.rows[0, 0] = 7  # a private copy
    assert ask(cache).rows[0, 0] == 0
    assert [found.reused for found in cache.opened] == [False, True, False, True]


@pytest.mark.parametrize(
    "how", ["shortened", "changed", "lengthened", "no header", "no sidecar", "torn sidecar", "other"]
)
def test_damaged_files_are_computed_again(how: str, tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    ask(cache)
    [path] = files(tmp_path, ".npy")
    data = bytearray(path.read_bytes())
    sidecar = path.with_suffix(".json")
    if how == "shortened":
        path.write_bytes(data[:-4])
    elif how == "changed":
        data[-1] ^= 1
        path.write_bytes(data)
    elif how == "lengthened":
        path.write_bytes(data + b"\0" * 8)
    elif how == "no header":
        path.write_bytes(b"\0" * len(data))
    elif how == "no sidecar":
        sidecar.unlink()
    elif how == "torn sidecar":
        sidecar.write_text(sidecar.read_text()[:40])
    feature_cache._intact.clear()
    again = ask(cache, agrees=how != "other")
    assert not again.reused and np.array_equal(again.rows, ROWS)
    expected = {"no sidecar": (), "torn sidecar": (), "other": ("differ from those that the backbone computes here",)}
    notes = expected.get(how, ("damaged",))
    assert len(again.notes) == len(notes) and all(part in note for part, note in zip(notes, again.notes, strict=True))
    assert ask(cache).reused


def test_a_file_that_changes_later_is_looked_at_again(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    ask(cache)
    assert ask(cache).reused
    [path] = files(tmp_path, ".npy")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    time.sleep(0.01)
    path.write_bytes(data)
    assert not ask(cache).reused


def fail() -> Iterator[Floats]:
    yield ROWS[:4]
    raise KeyboardInterrupt


def test_a_crash_leaves_nothing_that_would_be_read(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        ask(cache, compute=fail)
    assert not files(tmp_path, ".npy") and not files(tmp_path, ".tmp")
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert files(tmp_path, ".tmp") and not files(tmp_path, ".npy")
    assert not ask(cache).reused and ask(cache).reused
    [left] = files(tmp_path, ".tmp")
    os.utime(left, (0, time.time() - ABANDONED - 1))
    cache.make_room()
    assert not files(tmp_path, ".tmp") and files(tmp_path, ".npy")


def _killed(folder: Path) -> None:
    def compute() -> Iterator[Floats]:
        yield ROWS[:4]
        os._exit(9)

    ask(FeatureCache(folder), compute=compute)


def test_one_process_computes_and_the_others_wait(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.SimpleQueue()
    processes = [context.Process(target=_ask_at_once, args=(tmp_path, barrier, results)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    assert sorted(reused for reused, _ in found) == [False, True, True, True]
    assert {total for _, total in found} == {float(ROWS.sum())}


def _ask_at_once(folder: Path, barrier: Any, results: Any) -> None:
    def compute() -> Iterator[Floats]:
        time.sleep(0.2)
        yield ROWS

    barrier.wait()
    found = ask(FeatureCache(folder), compute=compute)
    results.put((found.reused, float(found.rows.sum())))


def test_the_least_recently_used_make_room_but_none_in_use(tmp_path: Path) -> None:
    size = 128 + ROWS.nbytes
    cache = FeatureCache(tmp_path, limit=3 * size)
    held = ask(cache, "a")
    for k, key in enumerate("bc"):
        ask(cache, key)
        [path] = [p for p in files(tmp_path, ".json") if json.loads(p.read_text())["about"]["dataset"] == key]
        os.utime(path, (0, time.time() - 100 + k))
    cache.opened.clear()
    os.utime(tmp_path / f"{held.key}.json", (0, 0))
    assert [entry.in_use for entry in cache.entries()] == [False, False, True]
    ask(cache, "d")
    assert {entry.about["dataset"] for entry in cache.entries()} == {"a", "c", "d"}
    cache.opened.clear()
    ask(cache, "c")
    del held
    cache.opened.clear()
    ask(cache, "e")
    assert {entry.about["dataset"] for entry in cache.entries()} == {"c", "d", "e"}
    assert sum(entry.size for entry in cache.entries()) <= cache.limit
    cache.opened.clear()
    FeatureCache(tmp_path, limit=0).make_room()
    assert not list(tmp_path.iterdir())


def test_features_beyond_the_limit_are_used_and_not_kept(tmp_path: Path) -> None:
    ask(FeatureCache(tmp_path), "small", rows=ROWS[:, :1])
    cache = FeatureCache(tmp_path, limit=128 + ROWS.nbytes - 1)
    found = ask(cache)
    assert np.array_equal(found.rows, ROWS) and not found.in_cache
    assert "not kept" in found.notes[0]
    assert len(files(tmp_path, ".npy")) == 1, "nothing had to go for them"
    assert not files(tmp_path, ".tmp")
    for path in files(tmp_path, ".lock"):
        os.utime(path, (0, 0))
    cache.make_room()
    assert len(files(tmp_path, ".lock")) == 1


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/cache: .* job\.feature_cache=FOLDER, or job\.feature_cache=false"):
        ask(FeatureCache(tmp_path / "file" / "cache"))


def test_other_circumstances_are_noted(tmp_path: Path) -> None:
    ask(FeatureCache(tmp_path, about={"circumstances": "torch 1"}))
    [note] = ask(FeatureCache(tmp_path, about={"circumstances": "torch 2"})).notes
    assert "torch 1" in note and "torch 2" in note


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CLRUN_CACHE", str(tmp_path))
    assert default_folder() == tmp_path / "features"
    monkeypatch.delenv("CLRUN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    if sys.platform == "linux":
        assert default_folder() == tmp_path / "xdg" / "clrun" / "features"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert default_folder() == Path.home() / ".cache" / "clrun" / "features"


def test_listing(tmp_path: Path) -> None:
    assert listing(tmp_path / "none").startswith("0 files, 0.0 MB in ")
    cache = FeatureCache(tmp_path, about={"backbone": "net"})
    held = ask(cache)
    lines = listing(tmp_path).splitlines()
    assert lines[1].split()[:6] == ["a", "train", "net", "6", "x", "2"] and lines[1].endswith("(in use)")
    del held
    cache.opened.clear()
    assert not listing(tmp_path).splitlines()[1].endswith("(in use)")


# --- features of a backbone


def net() -> Net:
    seed_all(0, "net")
    return Net()


def rows_of(stream: Stream) -> dict[tuple[int, str], torch.Tensor]:
    """Return the features of each task and part, by task id."""
    parts = {(task.id, part): getattr(task, part) for task in stream.tasks for part in ("train", "test")}
    return {key: torch.cat([batch.x for batch in split.batches(100)]) for key, split in parts.items()}


@pytest.mark.parametrize("setting", ["cil", "dil"])
def test_cached_features_are_the_live_ones(setting: Any, tmp_path: Path) -> None:
    live = rows_of(frozen_features(image_stream(setting), net(), cpu())[0])
    for order in ((0, 1, 2), (2, 0, 1)):
        cache = FeatureCache(tmp_path)
        cached = rows_of(frozen_features(image_stream(setting, order), net(), cpu(), cache)[0])
        assert cached.keys() == live.keys()
        assert all(torch.equal(cached[key], live[key]) for key in live)
        reused = order != (0, 1, 2)
        assert [found.reused for found in cache.opened] == [reused] * (6 if setting == "dil" else 2)


def keys(stream: Stream, backbone: torch.nn.Module, folder: Path, **options: Any) -> list[str]:
    cache = FeatureCache(folder)
    frozen_features(stream, backbone, cpu(**options), cache)
    return [found.key for found in cache.opened]


def stream_for(network: Net) -> Stream:
    """Return the stream of `image_stream`, its images fitted to a network."""
    dataset = configured("dataset", "synthetic", num_classes=6, image_shape=[1, 8, 8], train_rows=16, test_rows=8)
    transform, _ = fit_transform(dataset, network)
    stream: Stream = configured("scenario", "class_split", n_tasks=3)(dataset, lambda n: list(range(n)), transform)
    return stream


def test_everything_that_features_depend_on_changes_the_key(tmp_path: Path) -> None:
    usual = keys(image_stream(), net(), tmp_path)
    assert len(set(usual)) == 2
    same = [image_stream(order=(2, 1, 0)), image_stream(augment=()), image_stream(class_seed=3)]
    assert all(keys(stream, net(), tmp_path) == usual for stream in same)

    def weight(network: Net) -> None:
        network.linear.weight.data[0, 0] += 1e-6

    def statistic(network: Net) -> None:
        network.norm.running_mean[0] += 1e-6

    def option(network: Net) -> None:
        network.norm.eps = 1e-3

    def size(network: Net) -> None:
        network.input_size = (1, 9, 9)
        network.linear = torch.nn.Linear(96, network.num_features)

    def mean(network: Net) -> None:
        network.mean, network.std = (0.3,), (0.2,)

    others = []
    for change in (weight, statistic, option, size, mean):
        network = net()
        change(network)
        others.append(keys(stream_for(network), network, tmp_path))
    others.append(keys(image_stream(), net(), tmp_path, precision="bf16"))
    others.append(keys(image_stream(), net(), tmp_path, channels_last=False))
    others.append(keys(image_stream("dil"), net(), tmp_path)[2:])
    first = image_stream().tasks[0]
    images = first.train.images.clone()
    images[0, 0, 0, 0] ^= 1
    altered = replace(first, train=replace(first.train, images=images))
    others.append(keys(replace(image_stream(), tasks=(altered,)), net(), tmp_path)[:1])
    found = [key for group in others for key in group]
    assert not set(found) & set(usual)
    assert len(set(found)) == len(found) - sum(key in usual for key in found)


def test_module_digest_sees_structure_and_weights() -> None:
    linear = torch.nn.Linear(3, 3)
    digests = {
        module_digest(module)
        for module in (
            linear,
            torch.nn.Sequential(linear),
            torch.nn.Sequential(linear, torch.nn.ReLU()),
            torch.nn.ReLU(),
        )
    }
    assert len(digests) == 4
    assert module_digest(linear) == module_digest(linear.train())


def test_another_backbone_behind_the_same_key_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clrun.data.features.module_digest", lambda module: "the same")
    keys(image_stream(), net(), tmp_path)
    cache = FeatureCache(tmp_path)
    feature_cache._intact.clear()
    seed_all(1, "net")
    stream, _ = frozen_features(image_stream(), Net(), cpu(), cache)
    assert [found.reused for found in cache.opened] == [False, False]
    seed_all(1, "net")
    live = rows_of(frozen_features(image_stream(), Net(), cpu())[0])
    assert all(torch.equal(rows, live[key]) for key, rows in rows_of(stream).items())


def test_backbones_that_lie_are_refused() -> None:
    network = net()
    network.num_features = 7
    with pytest.raises(ConfigError, match=r"num_features is 7, but its output is \[B, \d+\]"):
        frozen_features(image_stream(), network, cpu())
    network = net()
    network.linear.weight.data.fill_(torch.inf)
    with pytest.raises(ConfigError, match="not finite"):
        frozen_features(image_stream(), network, cpu())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is measured on Linux")
def test_memory_does_not_grow_with_the_number_of_rows(tmp_path: Path) -> None:
    rows, width = 5 * MAPPED // 4 // 512, 512

    def compute() -> Iterator[Floats]:
        return (np.full((256, width), k, np.float32) for k in range(rows // 256))

    cache = FeatureCache(tmp_path)
    found = cache.get({}, shape=(rows, width), compute=compute, agrees=lambda stored: True, about={})
    split = FeatureSplit(found, torch.zeros(rows, dtype=torch.long))
    memory = PeakMemory(cpu())
    for shuffle in (None, torch.Generator()):
        total = 0.0
        memory.reset()
        before = memory.read()
        for batch in split.batches(256, shuffle=shuffle):
            total += float(batch.x[:, 0].sum())
        assert total == 256 * sum(range(rows // 256))
        assert memory.read() - before < MAPPED / 4 < found.size / 16


def test_a_split_of_features_reads_selects_and_joins(tmp_path: Path) -> None:
    stream, _ = frozen_features(image_stream(), net(), cpu(), FeatureCache(tmp_path))
    split = stream.tasks[1].train
    assert isinstance(split, FeatureSplit)
    assert torch.equal(split.labels[split.rows], split.y) and split.to("cpu").images is split.images
    whole = next(split.batches(100))
    part = next(split.select(torch.tensor([3, 1])).batches(100))
    assert torch.equal(part.x, whole.x[[3, 1]]) and torch.equal(part.y, whole.y[[3, 1]])
    both = FeatureSplit.joined([split, stream.tasks[0].train])
    assert isinstance(both, TensorSplit) and len(both) == 2 * len(whole.y)
    assert torch.equal(both.images[: len(whole.y)], whole.x) and both.positions.tolist() == [1] * 32 + [0] * 32
