"""The identity of data: what changes it, what does not, and the words for a change."""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import write
from running import member, source

from clrun.data import contents
from clrun.data.identity import Identity, changed_rows, identify, remember_rows, unpacked
from clrun.data.orders import canonical
from clrun.data.scenarios import class_split
from clrun.data.split import Plain, TensorSplit
from clrun.data.stream import Dataset, Stream
from clrun.results.data_record import Changes, NamedRows, data_changes
from clrun.system.yaml_files import conf_dir

pytestmark = pytest.mark.exact  # whole numbers, bytes and texts alone


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """train/ and test/ of three classes."""
    monkeypatch.setenv("CLRUN_CACHE", str(tmp_path / "cache"))
    for part, count in (("train", 6), ("test", 3)):
        for label in ("ant", "cat", "dog"):
            for k in range(count):
                write(tmp_path / "photos" / part / label / f"{k}.png", side=8, seed=100 * ord(label[0]) + k)
    return tmp_path / "photos"


def read(root: Path, **options: Any) -> tuple[Dataset, Stream]:
    node = member(conf_dir() / "dataset" / "folder.yaml") | {"root": str(root), "name": "photos"} | options
    node.pop("_target_")
    from clrun.data.decode import Decoding

    node["images"] = Decoding(**{key: value for key, value in node["images"].items() if key != "_target_"})
    dataset = source("folder")(**node)
    options = {"n_tasks": dataset.num_classes, "first": None, "sizes": None, "class_seed": None, "class_order": None}
    return dataset, class_split(dataset, canonical, Plain(), **options, setting="cil")


def of(root: Path, **options: Any) -> Identity:
    return identify(*read(root, **options))


def changes(before: Identity, now: Identity, *, names: bool = True) -> Changes:
    def rows(identity: Identity) -> dict[str, NamedRows]:
        return {part: NamedRows(*unpacked(rows)) for part, rows in identity.rows.items()}

    known = (rows(before), rows(now)) if names else (None, None)
    return data_changes(before.record, now.record, *known)


def test_it_depends_neither_on_the_place_nor_on_times(photos: Path, tmp_path: Path) -> None:
    first = of(photos)
    shutil.copytree(photos, tmp_path / "elsewhere")
    for file in (tmp_path / "elsewhere").rglob("*.png"):
        os.utime(file, (1, 1))
    assert of(tmp_path / "elsewhere").record == first.record
    assert not changes(first, of(tmp_path / "elsewhere"))


def edit_rename(root: Path) -> None:
    for part in ("train", "test"):
        (root / part / "dog").rename(root / part / "bee")


def edit_add_class(root: Path) -> None:
    for part in ("train", "test"):
        shutil.copytree(root / part / "cat", root / part / "eel")
    write(root / "train" / "eel" / "new.png", side=8, seed=1)


def edit_remove_class(root: Path) -> None:
    for part in ("train", "test"):
        shutil.rmtree(root / part / "cat")


def edit_remove_tests(root: Path) -> None:
    for k in range(2):
        (root / "test" / "ant" / f"{k}.png").unlink()


def edit_add_image(root: Path) -> None:
    write(root / "train" / "cat" / "new.png", side=8, seed=1)


def edit_content(root: Path) -> None:
    write(root / "train" / "cat" / "3.png", side=8, seed=1)


def edit_move(root: Path) -> None:
    (root / "train" / "cat" / "3.png").rename(root / "train" / "dog" / "x.png")


EDITS: list[tuple[Callable[[Path], None], list[str], list[str]]] = [
    (edit_rename, ["the class dog is now called bee"], ["the class dog is now called bee"]),
    (edit_add_class, ["1 class added (eel)"], ["1 class added (eel)"]),
    (edit_remove_class, ["1 class gone (cat)"], ["1 class gone (cat)"]),
    (
        edit_remove_tests,
        ["2 test rows gone (test/ant/0.png, test/ant/1.png)"],
        ["2 test rows gone (of class ant)"],
    ),
    (edit_add_image, ["1 training row added (train/cat/new.png)"], ["1 training row added (of class cat)"]),
    (
        edit_content,
        ["the contents of 1 training row changed (train/cat/3.png)"],
        ["the contents of training rows of class cat changed"],
    ),
    (
        edit_move,
        ["1 training row gone (train/cat/3.png)", "1 training row added (train/dog/x.png)"],
        ["1 training row gone (of class cat)", "1 training row added (of class dog)"],
    ),
]


@pytest.mark.parametrize(("edit", "named", "counted"), EDITS, ids=[edit.__name__ for edit, _, _ in EDITS])
@pytest.mark.parametrize("fraction", [0.0, 0.34])
def test_each_change_is_named(
    edit: Callable[[Path], None], named: list[str], counted: list[str], fraction: float, photos: Path
) -> None:
    before = of(photos, val_fraction=fraction)
    edit(photos)
    now = of(photos, val_fraction=fraction)
    assert changes(before, now).phrases == named
    assert changes(before, now, names=False).phrases == counted


def test_tasks_have_digests_of_their_own(photos: Path) -> None:
    before = of(photos).record["per_task"]
    edit_content(photos)
    after = of(photos).record["per_task"]
    assert {task for task in before if before[task] != after[task]} == {"1"}


def test_composed_and_decomposed_accents_are_one_name(photos: Path) -> None:
    (photos / "train" / "cat" / "0.png").rename(photos / "train" / "cat" / "caf\u00e9.png")
    composed = of(photos)
    (photos / "train" / "cat" / "caf\u00e9.png").rename(photos / "train" / "cat" / "cafe\u0301.png")
    assert of(photos).record["train"]["digest"] == composed.record["train"]["digest"]


def test_rows_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.arange(4 * 3 * 5 * 5).reshape(4, 3, 5, 5).to(torch.uint8)
    labels = torch.tensor([0, 1, 0, 1])
    split = TensorSplit(images, labels)
    dataset = Dataset("x", split, split, 2, ("a", "b"), (3, 5, 5))
    stream = class_split(
        dataset, canonical, Plain(), n_tasks=2, first=None, sizes=None, class_seed=None, class_order=None, setting="cil"
    )
    before = identify(dataset, stream)
    assert before.rows == {} and before.record["train"]["rows"] == 4
    copied = images.clone()
    copied[3, 2, 4, 4] += 1
    changed = replace(dataset, train=TensorSplit(copied, labels))
    assert changes(before, identify(changed, stream)).phrases == [
        "the contents of training rows of class b changed",
    ]
    fewer = replace(dataset, train=split.select(torch.tensor([0, 1, 2])))
    assert changes(before, identify(fewer, stream)).phrases == ["1 training row gone (of class b)"]
    turned = replace(dataset, train=split.select(torch.tensor([1, 0, 3, 2])))
    assert changes(before, identify(turned, stream)).phrases == ["the rows are in another order"]


def test_every_byte_of_a_row_counts() -> None:
    rows = torch.randint(0, 256, (3, 13), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    digests = contents.row_digests(rows)
    for k in range(13):
        other = rows.clone()
        other[1, k] ^= 128
        assert (contents.row_digests(other) != digests).tolist() == [False, True, False]
    assert (contents.row_digests(rows.float()) != contents.row_digests(rows.float() + 1e-6)).any()


def test_changes_of_the_highest_bytes_of_words_do_not_cancel() -> None:
    rows = torch.zeros(4096, 32, dtype=torch.uint8)
    rows[:, 7], rows[:, 15] = torch.arange(4096) % 64, torch.arange(4096) // 64  # the same column of two lines
    assert len(np.unique(contents.row_digests(rows))) == 4096
    assert len(np.unique(contents.row_digests(rows[:, :16]))) == 4096


def test_large_files_are_read_in_three_blocks(tmp_path: Path) -> None:
    content = bytearray(100_000)
    path = tmp_path / "x"

    def digest() -> int:
        path.write_bytes(content)
        assert contents.file_digest(str(path)) == contents.bytes_digest(bytes(content))
        return contents.file_digest(str(path))

    first = digest()
    for at in (0, 50_000, 99_999):
        content[at] = 1
        assert digest() != first
        content[at] = 0
    content[20_000] = 1  # the blind spot that the module states
    assert digest() == first
    assert contents.bytes_digest(bytes(content) + b"x") != first


def test_digests_are_kept_while_the_stamp_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(contents, "STORED", 2)
    read: list[str] = []
    plain = contents._read_files
    monkeypatch.setattr(contents, "_read_files", lambda paths, *table: read.extend(paths) or plain(paths, *table))
    root, names = tmp_path / "d", ["a\tb", "c"]
    root.mkdir()
    long_ago = time.time() - 100
    for name in names:
        (root / name).write_bytes(name.encode())
        os.utime(root / name, (long_ago, long_ago))
    first = contents.file_digests(str(root), names)
    assert len(read) == 2
    for forget in (False, True):
        if forget:  # as another process
            contents._known.clear()
        assert np.array_equal(contents.file_digests(str(root), names)[0], first[0]) and len(read) == 2
    (root / "c").write_bytes(b"d")
    assert contents.file_digests(str(root), names)[0][1] != first[0][1] and len(read) == 3
    contents.file_digests(str(root), names)
    assert len(read) == 4  # it changed a moment ago and may change again within the clock's resolution


def test_a_damaged_cache_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(contents, "STORED", 1)
    (tmp_path / "a").write_bytes(b"a")
    os.utime(tmp_path / "a", (1, 1))
    first = contents.file_digests(str(tmp_path), ["a"])[0]
    [stored] = (tmp_path / "cache" / "contents").glob("*.tsv")

    def nonsense() -> None:
        stored.write_bytes(b"nonsense\n\xff")

    def pipe() -> None:
        stored.unlink()
        os.mkfifo(stored)

    for damage in (nonsense, pipe):
        damage()
        contents._known.clear()
        assert np.array_equal(contents.file_digests(str(tmp_path), ["a"])[0], first)


def test_changed_rows_of_a_task(photos: Path) -> None:
    dataset, stream = read(photos)
    identify(dataset, stream)
    assert [changed_rows(stream.tasks, k) for k in range(3)] == [[], [], []]
    os.utime(photos / "train" / "ant" / "0.png", (1, 1))  # another time alone is no change
    write(photos / "train" / "cat" / "3.png", side=8, seed=1)
    (photos / "test" / "cat" / "0.png").unlink()
    found = [changed_rows(stream.tasks, k) for k in range(3)]
    assert found == [[], ["train/cat/3.png", "test/cat/0.png"], ["test/cat/0.png"]]


def test_changed_rows_in_memory() -> None:
    images = torch.randint(0, 256, (40, 1, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    train = TensorSplit(images, torch.arange(40) % 4)
    test = TensorSplit(images.flip(0), torch.arange(40) % 4)
    dataset = Dataset("x", train, test, 4, ("a", "b", "c", "d"), (1, 4, 4), val=train.select(torch.arange(36, 40)))
    stream = class_split(
        dataset, canonical, Plain(), n_tasks=2, first=None, sizes=None, class_seed=None, class_order=None, setting="cil"
    )
    remember_rows(stream.tasks)
    assert [changed_rows(stream.tasks, k) for k in range(2)] == [[], []]
    images[[0, 4, 37]] += 1  # classes a, a and b
    test.images[[0, 2]] += 1  # classes a and c
    assert changed_rows(stream.tasks, 0) == [
        "3 training rows in memory",
        "1 validation row in memory",
        "1 test row in memory",
    ]
    assert changed_rows(stream.tasks, 1) == ["2 test rows in memory"]  # after the last task, those of all tasks
