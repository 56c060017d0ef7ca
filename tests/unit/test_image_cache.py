import json
import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pictures import decoding
from PIL import Image

from clrun.data import image_cache as module
from clrun.data.decode import FileList, decode
from clrun.data.image_cache import ImageCache
from clrun.system.errors import ConfigError

ROWS, SIDE = 23, 6
ALL = np.arange(ROWS)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were decoded so far."""
    names: list[str] = []

    def counting(content: Any, name: str, *rest: Any) -> Any:
        names.append(Path(name).stem)
        return decode(content, name, *rest)

    monkeypatch.setattr(module, "decode", counting)
    return names


def cache_of(files: FileList, folder: Path, **changes: Any) -> ImageCache:
    return ImageCache(files, decoding(cache=str(folder), **changes), 3, "train")


def pixels(files: FileList) -> np.ndarray:
    return np.stack([np.array(Image.open(files.root / name)) for name in files.names])


def rewrite(file: Path, value: int) -> None:
    """Put another image of the same size in bytes and the same time of change in the place of one."""
    before = file.stat()
    Image.fromarray(np.full((SIDE, SIDE, 3), value, dtype=np.uint8)).save(file, "PNG")
    assert file.stat().st_size <= before.st_size
    file.write_bytes(file.read_bytes() + bytes(before.st_size - file.stat().st_size))


def test_images_are_stored_once_and_found_again(files: FileList, tmp_path: Path, decoded: list[str]) -> None:
    take = cache_of(files, tmp_path / "c").open(workers=2)
    assert np.array_equal(take(ALL), pixels(files)) and len(decoded) == ROWS
    again = cache_of(files, tmp_path / "c").open(workers=1)
    assert np.array_equal(again(np.array([20, 3, 3])), pixels(files)[[20, 3, 3]]) and len(decoded) == ROWS
    assert sorted(p.suffix for p in (tmp_path / "c").iterdir()) == [".bin", ".json", ".lock"]


def test_a_changed_file_is_decoded_again_and_only_that(files: FileList, tmp_path: Path, decoded: list[str]) -> None:
    cache_of(files, tmp_path / "c").open(workers=1)
    Image.fromarray(np.zeros((SIDE, SIDE, 3), dtype=np.uint8)).save(files.root / "05.png")
    rewrite(files.root / "07.png", 9)  # same size in bytes; the time differs
    decoded.clear()
    take = cache_of(files, tmp_path / "c").open(workers=1)
    assert sorted(decoded) == ["05", "07"] and np.array_equal(take(ALL), pixels(files))


def test_a_file_that_was_only_touched_is_not_decoded_again(
    files: FileList, tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_of(files, tmp_path / "c").open(workers=1)
    os.utime(files.root / "04.png", ns=(5, 5))
    decoded.clear()
    looked: list[bytes] = []
    digest = module._digest
    monkeypatch.setattr(module, "_digest", lambda content: looked.append(content) or digest(content))
    for _ in range(2):
        assert np.array_equal(cache_of(files, tmp_path / "c").open(workers=1)(ALL), pixels(files))
    assert decoded == [] and len(looked) == 1  # the new time was written down


def test_added_and_removed_files(files: FileList, tmp_path: Path, decoded: list[str]) -> None:
    fewer = FileList(files.root, files.names[3:])
    for asked in (files, fewer, files):  # as with two values of dataset.test_fraction, in turns
        take = cache_of(asked, tmp_path / "c").open(workers=1)
        assert np.array_equal(take(np.arange(len(asked))), pixels(asked))
    assert len(decoded) == ROWS
    Image.fromarray(np.zeros((SIDE, SIDE, 3), dtype=np.uint8)).save(files.root / "new.png")
    more = FileList(files.root, ("new.png", *files.names))
    assert np.array_equal(cache_of(more, tmp_path / "c").open(workers=1)(np.arange(ROWS + 1)), pixels(more))
    assert decoded[ROWS:] == ["new"] and len(list((tmp_path / "c").glob("*.bin"))) == 1
    (files.root / "03.png").unlink()
    with pytest.raises(ConfigError, match="03.png: cannot be read"):
        cache_of(files, tmp_path / "c").open(workers=1)


def test_what_no_reader_wants_any_more_does_not_pile_up(files: FileList, tmp_path: Path) -> None:
    for start in range(ROWS - 4):
        cache_of(FileList(files.root, files.names[start : start + 4]), tmp_path / "c").open(workers=1)
    [data] = (tmp_path / "c").glob("*.bin")
    assert data.stat().st_size == 8 * SIDE * SIDE * 3


def test_ways_of_decoding_parts_and_places_are_kept_apart(files: FileList, tmp_path: Path) -> None:
    first = cache_of(files, tmp_path / "c")
    others = [cache_of(files, tmp_path / "c", **{k: v}) for k, v in (("size", 3), ("fit", "squash"), ("exif", True))]
    others += [replace(first, channels=1), replace(first, part="test")]
    others += [replace(first, files=FileList(tmp_path / "elsewhere", files.names))]
    assert len({cache.key for cache in (first, *others)}) == 1 + len(others)
    assert cache_of(files, tmp_path / "d", memory=9, max_pixels=4, unreadable="skip").key == first.key


@pytest.mark.parametrize(
    "damage",
    ["data cut", "data gone", "data a link", "text", "list", "not json", "nested", "endless", "a link", "a pipe"],
)
def test_a_damaged_cache_is_built_anew(files: FileList, tmp_path: Path, damage: str, decoded: list[str]) -> None:
    cache_of(files, tmp_path / "c").open(workers=1)
    [data], [facts] = (tmp_path / "c").glob("*.bin"), (tmp_path / "c").glob("*.json")
    if damage == "data cut":
        data.write_bytes(data.read_bytes()[:-1])
    elif damage == "data gone":
        data.unlink()
    elif damage.endswith("link"):
        file = data if damage == "data a link" else facts
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    elif damage == "a pipe":
        facts.unlink()
        os.mkfifo(facts)
    elif damage == "endless":
        facts.write_text(facts.read_text() + " " * 2**21)
    elif damage == "text":
        facts.write_text(json.dumps(json.loads(facts.read_text()) | {"name": ["x"]}))
    else:
        facts.write_text({"list": "[]", "nested": "[" * 100_000, "not json": "{"}[damage])
    decoded.clear()
    assert np.array_equal(cache_of(files, tmp_path / "c").open(workers=1)(ALL), pixels(files))
    assert len(decoded) == ROWS and len(list((tmp_path / "c").glob("*.bin"))) == 1


def test_a_killed_builder_leaves_nothing_that_is_read(
    files: FileList, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ImageCache, "_describe", killed)
    with pytest.raises(KeyboardInterrupt):
        cache_of(files, tmp_path / "c").open(workers=1)
    (tmp_path / "c" / f"{cache_of(files, tmp_path / 'c').key}-7.bin.tmp").write_bytes(b"half")
    monkeypatch.undo()
    assert np.array_equal(cache_of(files, tmp_path / "c").open(workers=1)(ALL), pixels(files))
    assert len(list((tmp_path / "c").iterdir())) == 3


def test_an_open_map_survives_a_rebuild(files: FileList, tmp_path: Path) -> None:
    take, before = cache_of(files, tmp_path / "c").open(workers=1), pixels(files)
    Image.fromarray(np.zeros((SIDE, SIDE, 3), dtype=np.uint8)).save(files.root / "05.png")
    cache_of(files, tmp_path / "c").open(workers=1)
    assert np.array_equal(take(ALL), before)


def test_a_damaged_image_is_named_and_leaves_the_cache_alone(files: FileList, tmp_path: Path) -> None:
    (files.root / "13.png").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="13.png: cannot be decoded"):
        cache_of(files, tmp_path / "c").open(workers=2)
    assert [p.suffix for p in (tmp_path / "c").iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_written_and_a_disk_that_is_full(
    files: FileList, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file: cannot be written \(.*; make room or choose another folder"):
        cache_of(files, tmp_path / "file").open(workers=1)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(ConfigError, match="decoded images need 0.0 GB there and 0.0 GB are free; set dataset.images"):
        cache_of(files, tmp_path / "c").open(workers=1)


def test_the_default_folder_is_the_users_cache(
    files: FileList, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLRUN_CACHE", str(tmp_path / "home"))
    cache = ImageCache(files, decoding(cache=True), 3, "train")
    assert cache.folder == tmp_path / "home" / "images"


def _open(names: tuple[str, ...], root: str, folder: str, results: Any) -> None:
    """Open the cache in a process of its own; every decoding takes a while and is counted."""
    count = 0

    def slow(*args: Any) -> Any:
        nonlocal count
        count += 1
        time.sleep(0.02)
        return decode(*args)

    module.decode = slow  # type: ignore[assignment]
    take = cache_of(FileList(Path(root), names), Path(folder)).open(workers=1)
    results.put((count, take(np.arange(len(names))).tobytes()))


def test_of_two_processes_one_builds_and_the_other_waits(files: FileList, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    both = [
        context.Process(target=_open, args=(files.names, str(files.root), str(tmp_path / "c"), results))
        for _ in range(2)
    ]
    for process in both:
        process.start()
    found = [results.get(timeout=60) for _ in both]
    for process in both:
        process.join()
    assert sorted(count for count, _ in found) == [0, ROWS]
    assert {data for _, data in found} == {pixels(files).tobytes()}
