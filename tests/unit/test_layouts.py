"""Every layout of folders and archives that people have, each with the classes and rows that are right.

A line describes a file: "train/cat/{a,b}.png" are two images, "x -> y" is a link, "x |" a pipe, "x/" an empty folder,
and "x = text" a text file.
"""

import io
import os
import re
import tarfile
import unicodedata
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import decoding, encoded, noise
from PIL import Image

from clrun.data.sources.folder import folder, folder_domains, folder_sequence
from clrun.data.stream import Dataset
from clrun.results.identity import config_hash
from clrun.system.errors import ConfigError, collecting_warnings

PICTURE = encoded(Image.fromarray(noise(6, 6, 3)))
OPTIONS: dict[str, Any] = {
    "archive": None,
    "sha256": None,
    "archive_limit_gb": 1.0,
    "test_fraction": 0.5,
    "channels": 3,
}
OPTIONS |= {"images": decoding(verify="headers"), "mean": [], "std": [], "val_fraction": 0.0, "seed": 0, "augment": []}
OPTIONS |= {"empty_classes": "error", "splits": None, "classes": "top", "sort": "text"}
CAFE = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]


def expanded(line: str) -> list[str]:
    found = re.fullmatch(r"(.*)\{(.*)\}(.*)", line)
    return [line] if found is None else [e for x in found[2].split(",") for e in expanded(found[1] + x + found[3])]


def build(home: Path, *lines: str) -> Path:
    """Make the files that the lines describe."""
    home.mkdir(parents=True, exist_ok=True)
    for entry in [entry for line in lines for entry in expanded(line)]:
        name, _, target = entry.partition(" -> ")
        name, text, content = name.partition(" = ")
        path = home / name.removesuffix(" |")
        path.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(path) and not name.endswith("/"):
            raise FileExistsError(path)  # also because writing to a pipe would wait for a reader
        if target:
            path.symlink_to(target)
        elif name.endswith(" |"):
            os.mkfifo(path)
        elif name.endswith("/"):
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(content.encode() if text else PICTURE)
    return home


def load(home: Path, loader: Any = folder, **changes: Any) -> tuple[Dataset, list[str]]:
    notes: list[str] = []
    with collecting_warnings(notes):
        found = loader(**(OPTIONS | {"name": "pets", "root": str(home)} | changes))
    return found, notes


def rows(data: Dataset) -> tuple[int, ...]:
    """Numbers of training, test and validation rows."""
    return len(data.train), len(data.test), *([] if data.val is None else [len(data.val)])


@dataclass(frozen=True)
class Layout:
    """What is right for some files: classes and numbers of rows, or a part of the error; and parts of the notes."""

    lines: tuple[str, ...]
    classes: tuple[str, ...] = ("cat", "dog")
    rows: tuple[int, ...] = (4, 2)
    error: str = ""
    notes: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    said: str = ""


TRAIN, TEST = "train/{cat,dog}/{a,b}.png", "test/{cat,dog}/c.png"
TWO = (TRAIN, TEST)


def parts(train: str, test: str, *more: str) -> tuple[str, ...]:
    return (f"{train}/{{cat,dog}}/{{a,b}}.png", f"{test}/{{cat,dog}}/c.png", *more)


LAYOUTS = {
    "train and test": Layout(TWO),
    "Train and Test": Layout(parts("Train", "Test")),
    "TRAIN and TEST": Layout(parts("TRAIN", "TEST")),
    "training and testing": Layout(parts("training", "testing")),
    "train and valid": Layout(parts("train", "valid"), notes=("valid is tested on",), said="tested on valid/"),
    "train and val": Layout(parts("train", "val"), notes=("val is tested on",), said="tested on val/"),
    "train and dev": Layout(parts("train", "Dev"), notes=("Dev is tested on",), said="tested on Dev/"),
    "three parts": Layout((*TWO, "val/cat/d.png"), rows=(4, 2, 1), said="tested on test/, validated on val/"),
    "three parts, validation": Layout((*TWO, "Validation/{cat,dog}/d.png"), rows=(4, 2, 2)),
    "val, chosen": Layout(parts("train", "val"), options={"splits": {"train": "train", "test": "val"}}),
    "other names": Layout(parts("learn", "quiz"), options={"splits": {"train": "learn", "test": "quiz"}}),
    "val left out": Layout(
        (*TWO, "val/cat/d.png"),
        options={"splits": {"train": "train", "test": "test"}},
        notes=("ignored, because they are in no class folder of a part: val/",),
    ),
    "data sets as classes": Layout(
        ("{cat,dog}/train/{x,y}/{a,b,c,d,e,f}.png", "{cat,dog}/Test/{x,y}/a.png"),
        rows=(15, 13),
        notes=("in cat, dog there are folders called train and test, which are not read as parts",),
    ),
    "parts within classes": Layout(
        ("{cat,dog}/train/{a,b,c,d,e,f}.png", "{cat,dog}/test/{a,b}.png"),
        rows=(5, 11),
        notes=("or name images and parts in a list (dataset=list)",),
    ),
    "train alone": Layout(
        (TRAIN,), error="contains train but no test part; add one, or set dataset.splits={train: train}"
    ),
    "train alone, chosen": Layout(
        ("train/{cat,dog}/{a,b,c,d,e,f}.png",), rows=(6, 6), options={"splits": {"train": "train"}}
    ),
    "test alone": Layout(
        (TEST, "other/cat/a.png"), error="test look like parts of a data set, but there is no training"
    ),
    "train and training": Layout(
        (*TWO, "training/cat/x.png"), error="both 'train' and 'training' may be the train part"
    ),
    "val and dev": Layout((*TWO, "val/cat/x.png", "dev/cat/x.png"), error="may be the val part; choose"),
    "parts of no classes": Layout(("train/{a,b}.png", "test/c.png"), error="labels in a file are read by dataset=list"),
    "parts as classes": Layout(
        ("Train/{a,b,c,d}.png", "Test/{a,b,c,d}.png"),
        ("Test", "Train"),
        (4, 4),
        options={"splits": {}},
        notes=("the folders Test, Train are learned as classes",),
    ),
    "a class called train": Layout(
        ("train/{a,b,c,d}.png", "cat/{a,b,c,d,e,f}.png"),
        ("cat", "train"),
        (6, 4),
        notes=("the folder train is learned as a class",),
    ),
    "classes alone": Layout(("{cat,dog}/{a,b,c,d,e,f}.png",), rows=(6, 6)),
    "one level too deep": Layout(tuple(f"data/{line}" for line in TWO), notes=("which is read as the data set",)),
    "two levels too deep": Layout(tuple(f"a/b/{line}" for line in TWO), notes=("which is read as the data set",)),
    "too deep, with a README": Layout((*(f"data/{line}" for line in TWO), "README = x"), notes=("which is read",)),
    "one class": Layout(("cat/{a,b,c,d,e,f}.png",), ("cat",), (4, 2)),
    "hidden files": Layout((*TWO, "train/.hidden/x.png", "train/cat/.x.png", ".git/x.png")),
    "service folders": Layout(
        (
            *TWO,
            *(f"train/{x}/x.png" for x in ("@eaDir", "__MACOSX", "lost+found", "#recycle")),
            "train/cat/@eaDir/a.png/x.png",
            "train/.ipynb_checkpoints/x.png",
            "$RECYCLE.BIN/x.png",
        )
    ),
    "system files": Layout((*TWO, "train/Thumbs.db = x", "train/cat/desktop.ini = x", "train/cat/.DS_Store = x")),
    "other files": Layout(
        (*TWO, "train/cat/notes.txt = x"), notes=("1 files are left out because their names are not",)
    ),
    "images beside classes": Layout(
        (*TWO, "train/x.png", "y.png"), notes=("in no class folder of a part: y.png, train/x",)
    ),
    "a folder beside the parts": Layout((*TWO, "extra/cat/a.png"), notes=("in no class folder of a part: extra/",)),
    "nested folders": Layout((*TWO, "train/cat/more/deep/x.png"), rows=(5, 2)),
    "classes by path": Layout(
        ("train/pets/{cat,dog}/{a,b}.png", "test/pets/{cat,dog}/c.png"),
        ("pets/cat", "pets/dog"),
        options={"classes": "path"},
    ),
    "a link to a folder around it": Layout((*TWO, "train/dog/up -> .."), notes=("1 links are not followed",)),
    "a link to the root": Layout((*TWO, "train/dog/up -> ../.."), notes=("1 links are not followed",)),
    "a link to itself": Layout((*TWO, "train/dog/loop -> loop"), notes=("1 links are not followed",)),
    "two links to each other's folders": Layout(
        (*TWO, "train/cat/l -> ../dog", "train/dog/l -> ../cat"), notes=("count once", "links are not followed")
    ),
    "a link to nothing": Layout((*TWO, "train/dog/x.png -> gone.png"), error="x.png: cannot be decoded (No such file"),
    "a link to nothing, skipped": Layout(
        (*TWO, "train/dog/x.png -> gone.png"),
        notes=("cannot be decoded",),
        options={"images": decoding(unreadable="skip")},
    ),
    "a second name of an image": Layout((*TWO, "train/dog/x.png -> a.png"), notes=("count once: train/dog/x.png",)),
    "a second name of a class": Layout((*TWO, "train/dog/x -> ../cat"), notes=("2 images are reached a second time",)),
    "a test part that is the training part": Layout((TRAIN, "test -> train"), error="there are no test images"),
    "parts that are links": Layout(
        (*parts("away/a", "away/b"), "home/train -> ../away/a", "home/test -> ../away/b"), options={"root": "home"}
    ),
    "images that are links": Layout(
        (
            "away/{a,b,c,d}.png",
            "train/{cat,dog}/",
            "test/{cat,dog}/",
            *(
                f"{part}/{label}/x.png -> ../../away/{x}.png"
                for x, (part, label) in zip(
                    "abcd", [(p, c) for p in ("train", "test") for c in ("cat", "dog")], strict=True
                )
            ),
        ),
        rows=(2, 2),
        notes=("in no class folder of a part: away/",),
    ),
    "a pipe": Layout((*TWO, "train/cat/pipe.png |"), notes=("1 pipes or devices are left out and were not opened",)),
    "accents": Layout(
        (f"train/{CAFE[1]}/{{a,b}}.png", f"test/{CAFE[0]}/c.png", "train/dog/{a,b}.png", "test/dog/c.png"),
        (CAFE[0], "dog"),
    ),
    "accents in one part": Layout(
        (f"train/{CAFE[1]}/a.png", f"train/{CAFE[0]}/b.png", "train/dog/{a,b}.png", f"test/{{{CAFE[0]},dog}}/c.png"),
        (CAFE[0], "dog"),
    ),
    "names that differ in case": Layout(("train/{Cat,cat}/a.png", TEST), error="differ only in case"),
    "parts that differ in case": Layout((TRAIN, "test/{Cat,dog}/c.png"), error="differ only in case"),
    "a class in the test part alone": Layout((*TWO, "test/cow/c.png"), error="only test/ has the classes cow"),
    "a class in the validation part alone": Layout((*TWO, "val/cow/c.png"), error="only val/ has the classes cow"),
    "an empty class": Layout((*TWO, "train/cow/"), error="no training images of cow; add some"),
    "an empty class, dropped": Layout(
        (*TWO, "train/cow/", "test/cow/x.png"),
        options={"empty_classes": "drop"},
        notes=("classes without training images are left out, and so are their 1 other",),
    ),
    "a class without test images": Layout(
        (*TWO, "train/cow/a.png"), ("cat", "cow", "dog"), (5, 2), notes=("no test images of cow",)
    ),
    "one image per class": Layout(
        ("train/{cat,dog}/a.png", TEST),
        rows=(2, 2),
        options={"val_fraction": 0.5},
        notes=("no validation rows of cat, dog, with one training row each",),
    ),
    "a class of one image": Layout(
        ("train/cat/{a,b,c,d}.png", "train/dog/a.png", TEST),
        rows=(3, 2, 2),
        options={"val_fraction": 0.5},
        notes=("no validation rows of dog",),
    ),
    "validation images twice": Layout(
        (*TWO, "val/cat/x.png"),
        options={"val_fraction": 0.5},
        error="dataset.val_fraction: the data set has a validation part already",
    ),
    "no folders": Layout(("a.png",), error="contains no folders; expected train/ and test/"),
    "nothing": Layout((), error="contains no folders"),
    "suffixes": Layout(
        ("train/{cat,dog}/a.{PNG,jfif}", "test/{cat,dog}/a.Jpe"),
    ),
    "an unknown part": Layout(
        TWO, options={"splits": {"trian": "train"}}, error="no part 'trian'; did you mean 'train'?"
    ),
    "a part that is not there": Layout(TWO, options={"splits": {"train": "trian"}}, error="there is no 'trian' in"),
    "no training part": Layout(
        TWO, options={"splits": {"test": "test"}}, error="names no training part; add train: NAME"
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    home = build(tmp_path / "data", *layout.lines)
    options = dict(layout.options)
    root = home / options.pop("root", "")
    if layout.error:
        with pytest.raises(ConfigError) as error:
            load(root, **options)
        assert layout.error in str(error.value) and "\n" not in str(error.value)
        return
    data, notes = load(root, **options)
    assert data.class_names == layout.classes
    assert rows(data)[: len(layout.rows)] == layout.rows
    assert len(notes) == len(layout.notes) and all(any(part in note for note in notes) for part in layout.notes), notes
    assert not layout.said or data.reading == layout.said
    assert len(next(data.train.batches(100, view="raw"))) == len(data.train)


def test_the_table_has_at_least_forty_layouts() -> None:
    assert len(LAYOUTS) >= 40


def test_the_present_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(build(tmp_path / "data", *TWO))
    data, _ = load(Path())
    assert rows(data) == (4, 2) and data.train.images.files.names[0] == "train/cat/a.png"


def test_paths_of_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "data", *TWO)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert rows(load(Path(), root="~/data")[0]) == (4, 2)
    for root, said in (
        ("", "dataset.root: is empty"),
        (" ", "is empty"),
        ("~nobody-here/x", "home of an unknown user"),
    ):
        with pytest.raises(ConfigError, match=said):
            load(Path(), root=root)


@pytest.mark.parametrize(
    "constants",
    [
        {"mean": [0.5], "std": [0.0]},
        {"mean": [0.5] * 3, "std": [1.0, -1.0, 1.0]},
        {"mean": [0.1, 0.2], "std": [0.1, 0.2]},
    ],
)
def test_constants_that_cannot_normalise(tmp_path: Path, constants: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^dataset\.(mean|std): "):
        load(build(tmp_path / "data", *TWO), **constants)


def test_domains_with_parts_of_other_names(tmp_path: Path) -> None:
    lines = [f"sun/{line}" for line in (*TWO, "val/cat/v.png")] + [f"rain/{line}" for line in parts("Training", "Test")]
    data, _ = load(build(tmp_path / "data", *lines), folder_domains, domains=None)
    assert [(p.name, *rows(p)) for p in data.parts] == [("rain", 4, 2, 0), ("sun", 4, 2, 1)]
    _, notes = load(build(tmp_path / "two", "{train,test}/{cat,dog}/{a,b,c,d,e,f}.png"), folder_domains, domains=None)
    assert "test, train are learned as domains; if they are parts of one data set, use dataset=folder" in notes[0]


def test_a_sequence_needs_validation_parts_in_all_or_none(tmp_path: Path) -> None:
    lines = [f"{name}/{line}" for name in "ab" for line in TWO]
    options = {name: value for name, value in OPTIONS.items() if not name.startswith(("archive", "sha"))}
    options |= {"name": "x", "root": str(build(tmp_path / "data", *lines)), "sets": None}
    assert len(folder_sequence(**options).parts) == 2
    build(tmp_path / "data", "a/val/cat/x.png")
    with pytest.raises(ConfigError, match="b in .* have no validation part, and others have one"):
        folder_sequence(**options)


def test_the_advice_to_skip_files_is_no_other_configuration() -> None:
    config: dict[str, Any] = {"dataset": {"images": {"unreadable": "error", "verify": "headers", "range": "auto"}}}
    for key, value, same in (("unreadable", "skip", True), ("verify", "decode", True), ("range", 12, False)):
        images = config["dataset"]["images"] | {key: value}
        assert (config_hash({"dataset": {"images": images}}) == config_hash(config)) is same


# --- archives


FILES = [
    f"{part}/{label}/{k}.png" for part, ks in (("train", "ab"), ("test", "c")) for label in ("cat", "dog") for k in ks
]
TOP = [f"pets/{name}" for name in FILES]
ARCHIVES: dict[str, tuple[list[str], str]] = {
    "plain": (FILES, ""),
    "one folder at the top": (TOP, ""),
    "Finder": ([*TOP, "__MACOSX/pets/._train", "__MACOSX/._pets", "pets/.DS_Store"], ""),
    "a README beside it": ([*TOP, "README.txt", "LICENSE"], ""),
    "a hidden file beside it": ([*TOP, ".gitignore", ".git/config"], ""),
    "a list beside it": ([*TOP, "labels.csv"], ""),
    "a README inside and beside": ([*TOP, "README", "pets/README"], ""),
    "backslashes": ([name.replace("/", "\\") for name in TOP], ""),
    "a dot": ([f"./{name}" for name in TOP], ""),
    "two levels": ([f"a/{name}" for name in TOP], ""),
    "a file of a NAS": ([*TOP, "pets/train/cat/@eaDir/a.png/x.jpg"], ""),
    "Windows files": ([*TOP, "pets/train/cat/Thumbs.db", "desktop.ini"], ""),
    "hidden files alone": ([".a.png", "__MACOSX/b.png"], "holds no files, or hidden ones alone"),
    "nothing": ([], "holds no files"),
    "outside": ([*FILES, "../x.png"], "would be written outside"),
    "a file that is a folder": ([*FILES, "train/cat"], "is both a file and a folder"),
    "an absolute path": ([*FILES, "/x.png"], "would be written outside"),
    "a drive": ([*FILES, "C:\\x.png"], "would be written outside"),
}


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("name", ARCHIVES)
def test_archives(tmp_path: Path, name: str, kind: str) -> None:
    members, refused = ARCHIVES[name]
    archive = tmp_path / f"a.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            for member in members:
                info = zipfile.ZipInfo("x")
                info.filename = member
                file.writestr(info, PICTURE)
    else:
        with tarfile.open(archive, "w") as tar:
            for member in members:
                entry = tarfile.TarInfo(member)
                entry.size = len(PICTURE)
                tar.addfile(entry, io.BytesIO(PICTURE))
    if refused:
        with pytest.raises(ConfigError, match=refused):
            load(tmp_path / "out", archive=str(archive))
        assert not (tmp_path / "out").exists()
        return
    data, notes = load(tmp_path / "out", archive=str(archive))
    assert data.class_names == ("cat", "dog") and rows(data) == (4, 2)
    assert len(notes) == (name == "two levels")


# --- any folder at all


NAMES = st.sampled_from(["cat", "dog", "train", "Test", "val", "a.png", "b.JPG", "x.txt", ".x", "@eaDir", *CAFE, "Cat"])
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
ENTRIES = st.one_of(
    PATHS,
    PATHS.map(lambda path: f"{path}/"),
    PATHS.map(lambda path: f"{path} |"),
    st.tuples(PATHS, st.sampled_from([".", "..", "../..", "cat", "../cat", "gone", "a.png"])).map(" -> ".join),
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(ENTRIES, max_size=12), skip=st.booleans(), by_path=st.booleans(), drop=st.booleans())
def test_any_folder_is_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], skip: bool, by_path: bool, drop: bool
) -> None:
    home = tmp_path_factory.mktemp("any")
    for line in lines:
        try:
            build(home, line)
        except OSError:  # a name is taken by another kind of entry
            continue
    options = {"images": decoding(verify="headers", unreadable="skip" if skip else "error")}
    options |= {"classes": "path" if by_path else "top", "empty_classes": "drop" if drop else "error"}
    try:
        data, _ = load(home, **options)
    except ConfigError as error:
        assert "\n" not in str(error)
        return
    real = [
        os.path.realpath(home / name)
        for split in (data.train, data.test, data.val)
        if split is not None
        for name in split.images.files.names
    ]
    assert len(real) == len(set(real)), "a file counts twice"
    assert not any(part.startswith((".", "@eaDir")) for name in data.class_names for part in name.split("/"))
    assert len(next(data.train.batches(1000, view="raw"))) == len(data.train) > 0 < len(data.test)
