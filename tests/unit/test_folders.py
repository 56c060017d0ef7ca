import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import decoding, write

from clrun.data.reading.archives import unpack
from clrun.data.reading.listing import in_test
from clrun.data.sources.folder import folder, folder_domains
from clrun.data.split import Batch
from clrun.data.stream import Dataset
from clrun.system.errors import ConfigError, collecting_warnings

pytestmark = [  # none but those that a test notes
    pytest.mark.filterwarnings("error::clrun.system.errors.DataWarning"),
    pytest.mark.exact,  # whole numbers, bytes and texts alone
]


def load(root: Path, **changes: Any) -> Dataset:
    """Return `dataset=folder` or, with `domains` given, `dataset=folder_domains`."""
    options: dict[str, Any] = {
        "name": str(root),
        "root": str(root),
        "archive": None,
        "sha256": None,
        "archive_limit_gb": 500,
    }
    options |= {"test_fraction": 0.5, "channels": 3, "images": decoding(), "mean": [], "std": []}
    options |= {
        "val_fraction": 0.0,
        "seed": 0,
        "augment": [],
        "empty_classes": "error",
        "splits": None,
        "sort": "text",
        "classes": "top",
    }
    return (folder_domains if "domains" in changes else folder)(**(options | changes))


def noted(root: Path, **changes: Any) -> tuple[Dataset, list[str]]:
    """Return a data set and the warnings on the way."""
    notes: list[str] = []
    with collecting_warnings(notes):
        found = load(root, **changes)
    return found, notes


def names(split: Any) -> list[str]:
    """Return which files the rows of a split are, in order."""
    rows = range(len(split)) if split.rows is None else split.rows.tolist()
    return [split.images.files.names[row] for row in rows]


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """train/ and test/ of two classes."""
    for part, count in (("train", 4), ("test", 2)):
        for label in ("cat", "dog"):
            for k in range(count):
                write(tmp_path / "data" / part / label / f"{k}.png", seed=k)
    return tmp_path / "data"


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """Folders of two classes alone."""
    for label in ("cat", "dog"):
        for k in range(40):
            write(tmp_path / "photos" / label / f"{k}.png", seed=k)
    return tmp_path / "photos"


# --- what is read


def test_train_and_test_folders(two: Path) -> None:
    data = load(two, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], augment=["flip"])
    assert data.class_names == ("cat", "dog") and data.num_classes == 2 and data.name == "data"
    assert names(data.train) == [f"train/{label}/{k}.png" for label in ("cat", "dog") for k in range(4)]
    assert data.train.y.tolist() == [0] * 4 + [1] * 4 and data.test.y.tolist() == [0, 0, 1, 1]
    assert data.shape == (3, 6, 6) and data.mean == (0.1, 0.2, 0.3) and data.augment == ("flip",)
    batch = next(data.test.batches(4, view="raw"))
    assert torch.equal(batch.x[0], batch.x[2]) and not torch.equal(batch.x[0], batch.x[1])


@pytest.mark.parametrize(
    ("constants", "words"),
    [
        ({"mean": [123.7, 116.3, 103.5], "std": [58.4, 57.1, 57.4]}, "dataset.mean: every value must be from 0 to 1"),
        ({"mean": [0.5, 0.5, 0.5], "std": [58.4, 57.1, 57.4]}, "dataset.std: every value must be from 0 to 1"),
        ({"mean": [-0.1], "std": [1.0]}, "dataset.mean: every value must be from 0 to 1"),
        ({"mean": [0.5], "std": [0.0]}, "dataset.std: every value must be above 0"),
        ({"mean": [0.5], "std": []}, "dataset.mean: mean and std need one value per channel"),
    ],
)
def test_constants_are_in_units_of_zero_to_one(two: Path, constants: dict[str, list[float]], words: str) -> None:
    with pytest.raises(ConfigError, match=f"^{words}") as raised:
        load(two, **constants)
    assert "\n" not in str(raised.value)


def test_validation_images_are_cut_per_class(two: Path) -> None:
    data = load(two, val_fraction=0.25)
    assert data.val is not None and data.val.y.tolist() == [0, 1] and len(data.train) == 6
    assert data.val.images is data.train.images


def test_a_single_folder_is_split_by_the_hash_of_the_names(one: Path) -> None:
    before = load(one, test_fraction=0.3)
    assert set(names(before.train)).isdisjoint(names(before.test))
    assert len(before.train) + len(before.test) == 80 and 12 <= len(before.test) <= 36
    assert all(in_test(name, 0.3) for name in names(before.test))
    for k in range(40, 60):
        write(one / "cat" / f"{k}.png")
    after = load(one, test_fraction=0.3, seed=5)
    assert set(names(before.test)) <= set(names(after.test)) and set(names(before.train)) <= set(names(after.train))
    shares = [sum(in_test(f"{k}.jpg", share) for k in range(4000)) / 4000 for share in (0, 0.2, 1)]
    assert shares[0] == 0 and shares[2] == 1 and abs(shares[1] - 0.2) < 3.3 * (0.2 * 0.8 / 4000) ** 0.5


def test_the_split_does_not_depend_on_how_a_name_is_composed() -> None:
    for share in (0.3, 0.5, 0.7):
        assert in_test("caf\u00e9/1.png", share) == in_test("cafe\u0301/1.png", share)


def test_folders_within_a_class_links_and_hidden_files(two: Path, tmp_path: Path) -> None:
    write(two / "train" / "cat" / "more" / "a.JPG")
    write(two / "train" / "cat" / ".hidden.png")
    write(two / "train" / ".thumbnails" / "x.png")
    write(two / "train" / "__MACOSX" / "x.png")
    write(tmp_path / "elsewhere" / "b.png")
    (two / "train" / "dog" / "linked.png").symlink_to(tmp_path / "elsewhere" / "b.png")
    (two / "train" / "dog" / "others").symlink_to(tmp_path / "elsewhere")
    (two / "train" / "dog" / "loop").symlink_to(two / "train")
    (two / "train" / "dog" / "self").symlink_to(two / "train" / "dog")
    data, notes = noted(two)
    extra = [name for name in names(data.train) if name.rpartition("/")[2] not in ("0.png", "1.png", "2.png", "3.png")]
    assert extra == ["train/cat/more/a.JPG", "train/dog/linked.png"] and data.class_names == ("cat", "dog")
    assert notes == [
        "data: 1 images are reached a second time through links, and count once: train/dog/others/b.png",
        f"data: 2 links are not followed because they lead to a folder around them or nowhere: {two}/train/dog/loop, "
        f"{two}/train/dog/self",
    ]


def test_files_that_are_no_images_are_left_out_with_a_warning(two: Path) -> None:
    for k in range(5):
        (two / "train" / "cat" / f"{k}.txt").write_text("")
    data, notes = noted(two)
    assert len(data.train) == 8
    assert notes == [
        f"data: 5 files are left out because their names are not those of images: {two}/train/cat/0.txt, "
        f"{two}/train/cat/1.txt, {two}/train/cat/2.txt and 2 more"
    ]


def test_a_name_that_is_no_text(two: Path) -> None:
    write(two / "train" / os.fsdecode(b"caf\xe9") / "1.png")
    write(two / "test" / os.fsdecode(b"caf\xe9") / "1.png")
    data = load(two)
    assert data.class_names == ("caf\ufffd", "cat", "dog")
    assert len(next(data.train.batches(9, view="raw"))) == 9


def test_grey_images(two: Path) -> None:
    assert load(two, channels=1).shape == (1, 6, 6)
    assert next(load(two, channels=1).train.batches(2, view="raw")).x.shape == (2, 1, 6, 6)


# --- mistakes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda two: write(two / "test" / "cow" / "0.png"),
            "data: only test/ has the classes cow; add training images",
        ),
        (
            lambda two: (two / "test" / "dog").rename(two / "test" / "Dog"),
            "the classes 'dog' and 'Dog' (in test/) differ only in case; rename",
        ),
        (lambda two: write(two / "train" / "CAT" / "0.png"), "the classes 'CAT' and 'cat' differ only in case; rename"),
        (lambda two: (two / "train" / "cow").mkdir(), "data: no training images of cow; add some, remove the class"),
        (
            lambda two: (two / "test").rename(two / "part"),
            "data: contains train but no test part; add one, or set dataset.splits={train: train} to take",
        ),
        (
            lambda two: (two / "train").rename(two / "learn"),
            "data: test look like parts of a data set, but there is no training part",
        ),
        (lambda two: two.rename(two.parent / "moved"), "dataset.root: there is no folder"),
    ],
)
def test_folders_that_cannot_be_meant(two: Path, change: Callable[[Path], Any], said: str) -> None:
    change(two)
    with pytest.raises(ConfigError) as error:
        load(two, test_fraction=1.0)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_folders(tmp_path: Path) -> None:
    write(tmp_path / "lonely.png")
    with pytest.raises(ConfigError, match="contains no folders; expected train/ and test/ with one folder per class"):
        load(tmp_path)


def test_a_class_without_test_images_is_a_warning(two: Path) -> None:
    write(two / "train" / "cow" / "0.png")
    data, notes = noted(two)
    assert data.num_classes == 3 and notes == [f"data: no test images of cow in {two}"]


def test_a_folder_that_may_not_be_read(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ConfigError, match=r"train/dog: cannot be read \(Permission denied\)"):
        load(two)


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_stop_the_reader_or_are_left_out(two: Path, workers: int) -> None:
    (two / "train" / "dog" / "2.png").write_bytes(b"")
    (two / "test" / "cat" / "0.png").write_bytes((two / "test" / "cat" / "0.png").read_bytes()[:60])
    stops = load(two).train.to("cpu", workers=workers)
    with pytest.raises(ConfigError, match=r"train/dog/2.png: cannot be decoded \(the file is empty\); repair"):
        list(stops.batches(3, view="raw"))
    data, notes = noted(two, images=decoding(unreadable="skip"))
    assert len(data.train) == 7 and len(data.test) == 3 and len(data.train.images.files) == 7
    assert len(Batch.cat(*data.train.to("cpu", workers=workers).batches(3, view="raw"))) == 7
    assert [note.partition(":")[2].partition(":")[0] for note in notes] == [
        " 1 files are left out because they cannot be decoded"
    ] * 2 and "train/dog/2.png" in notes[0]


# --- domains


@pytest.fixture
def domains(tmp_path: Path) -> Path:
    """Two domains of three classes, one of them without a class and without a test folder."""
    for label in ("a", "b", "c"):
        for part, count in (("train", 3), ("test", 2)):
            for k in range(count):
                write(tmp_path / "all" / "sun" / part / label / f"{k}.png", seed=k)
    for label in ("a", "c"):
        for k in range(20):
            write(tmp_path / "all" / "rain" / label / f"{k}.png", seed=k)
    return tmp_path / "all"


def test_domains_are_parts_of_one_data_set(domains: Path) -> None:
    data = load(domains, domains=None, val_fraction=0.34)
    assert data.class_names == ("a", "b", "c") and [part.name for part in data.parts] == ["rain", "sun"]
    rain, sun = data.parts
    for split in ("train", "test", "val"):
        whole, parts = getattr(data, split), [getattr(part, split) for part in data.parts]
        assert all(part.images is whole.images for part in parts)
        assert sorted(n for part in parts for n in names(part)) == sorted(names(whole))
        assert all(n.startswith("rain/") for n in names(parts[0])) and all(
            n.startswith("sun/") for n in names(parts[1])
        )
    assert sun.train.y.tolist() == [0, 0, 1, 1, 2, 2] and sun.val.y.tolist() == [0, 1, 2]
    assert set(rain.train.y.tolist()) == {0, 2} and rain.num_classes == 3
    assert all(in_test(name.removeprefix("rain/"), 0.5) for name in names(rain.test))


def test_domains_are_chosen_and_ordered(domains: Path) -> None:
    data = load(domains, domains=["sun", "rain"])
    assert [part.name for part in data.parts] == ["sun", "rain"] and names(data.train)[0].startswith("sun/")
    alone = load(domains, domains=["rain"])
    assert alone.class_names == ("a", "c") and len(alone.parts) == 1
    with pytest.raises(ConfigError, match=r"^dataset.domains: no folder 'fog' in .* \(there are: rain, sun\)"):
        load(domains, domains=["fog"])


def test_damaged_images_of_domains_are_left_out(domains: Path) -> None:
    (domains / "rain" / "a" / "0.png").write_bytes(b"")
    (domains / "sun" / "train" / "b" / "1.png").write_bytes(b"")
    data, _ = noted(domains, domains=None, images=decoding(unreadable="skip"))
    assert [len(part.train) + len(part.test) for part in data.parts] == [39, 14]
    assert all(name.startswith("sun/") for name in names(data.parts[1].train))


# --- archives


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def tarred(path: Path, members: list[tarfile.TarInfo], mode: Any = "w:gz") -> Path:
    with tarfile.open(path, mode) as file:
        for info in members:
            file.addfile(info, io.BytesIO(b"x" * info.size))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.xz"])
@pytest.mark.parametrize("top", ["", "photos/"])
def test_an_archive_is_unpacked_once(two: Path, tmp_path: Path, kind: str, top: str) -> None:
    files = {f"{top}{file.relative_to(two)}": file.read_bytes() for file in sorted(two.rglob("*.png"))}
    archive = tmp_path / f"photos.{kind}"
    if kind == "zip":
        zipped(archive, files)
    else:
        with tarfile.open(archive, f"w:{kind[4:]}") as file:
            for name, content in files.items():
                info = member(f"./{name}", size=len(content))
                file.addfile(info, io.BytesIO(content))
    digest = sha256(archive.read_bytes()).hexdigest()
    root = tmp_path / "new" / "home"
    data = load(root, archive=str(archive), sha256=digest.upper())
    assert len(data.train) == 8 and len(next(data.train.batches(8, view="raw"))) == 8
    assert sorted(p.name for p in root.parent.iterdir()) == ["home", "home.lock"]
    archive.unlink()
    assert len(load(root, archive=str(archive)).test) == 4


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/etc/evil", "C:\\evil", "a\\..\\..\\evil"])
def test_members_outside_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    for archive in (
        zipped(tmp_path / "a.zip", {"good.png": b"", name: b""}),
        tarred(tmp_path / "a.tgz", [member("good.png"), member(name)]),
    ):
        with pytest.raises(ConfigError) as error:
            unpack(archive, tmp_path / "out", sha256=None, limit_gb=10**10)
        assert f"{archive}: refused, its member" in str(error.value) and "would be written outside the folder" in str(
            error.value
        )
        assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize(
    ("info", "kind"),
    [
        (member("a", tarfile.SYMTYPE, "/etc"), "link"),
        (member("a", tarfile.LNKTYPE, "../b"), "link"),
        (member("a", tarfile.FIFOTYPE), "device"),
        (member("a", tarfile.CHRTYPE), "device"),
    ],
)
def test_links_and_devices_are_refused(tmp_path: Path, info: tarfile.TarInfo, kind: str) -> None:
    archive = tarred(tmp_path / "a.tgz", [info, member("a/x.png")])
    with pytest.raises(ConfigError, match=f"refused, its member 'a' is a {kind}"):
        unpack(archive, tmp_path / "out", sha256=None, limit_gb=10**10)
    assert not (tmp_path / "out").exists()


def test_links_in_zip_files_are_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("a")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr(info, "/etc")
    with pytest.raises(ConfigError, match="refused, its member 'a' is a link"):
        unpack(tmp_path / "a.zip", tmp_path / "out", sha256=None, limit_gb=10**10)


def test_archives_that_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = zipped(tmp_path / "good.zip", {"a/1.png": b"x" * 1000, "a/2.png": b"y" * 1000})
    (tmp_path / "cut.zip").write_bytes(good.read_bytes()[:-30])
    data = bytearray(good.read_bytes())
    data[500] ^= 1
    (tmp_path / "flipped.zip").write_bytes(data)
    tar = tarred(tmp_path / "good.tgz", [member("a/1.png", size=100_000)])
    (tmp_path / "cut.tgz").write_bytes(tar.read_bytes()[:-30])
    (tmp_path / "text.zip").write_text("no archive")
    said = {
        "missing.zip": "dataset.archive: there is no file",
        "cut.zip": "cut.zip: is neither a zip nor a tar file",
        "flipped.zip": "flipped.zip: cannot be unpacked (Bad CRC-32",
        "cut.tgz": "cut.tgz: cannot be unpacked (",
        "text.zip": "text.zip: is neither a zip nor a tar file",
    }
    for name, text in said.items():
        with pytest.raises(ConfigError) as error:
            unpack(tmp_path / name, tmp_path / "out", sha256=None, limit_gb=10**10)
        assert text in str(error.value) and not (tmp_path / "out").exists()
    with pytest.raises(
        ConfigError, match=r"its sha256 is \w{64}, not 00 \(dataset.sha256\); download the archive again"
    ):
        unpack(good, tmp_path / "out", sha256="00", limit_gb=1)
    bomb = zipped(tmp_path / "bomb.zip", {"a/1.png": b""})
    monkeypatch.setattr("clrun.data.reading.archives.Zip.members", lambda self: [_Bomb()])
    monkeypatch.setattr("clrun.data.reading.archives.RATIO", 10**18)
    with pytest.raises(ConfigError, match=r"bomb.zip: needs 1000000000.0 GB when unpacked, and .* GB; free some space"):
        unpack(bomb, tmp_path / "out", sha256=None, limit_gb=10**10)
    assert not list(tmp_path.glob("out*")) or [p.name for p in tmp_path.glob("out*")] == ["out.lock"]


class _Bomb:
    name, kind, size = "a/1.png", "file", 10**18
