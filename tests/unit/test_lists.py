"""`dataset=list`: what people write into lists, and what is right for each."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import decoding, write

from clrun.data.reading.listing import in_test
from clrun.data.sources.list import list as load_list
from clrun.data.stream import Dataset
from clrun.system.errors import ConfigError, collecting_warnings

pytestmark = pytest.mark.filterwarnings("error::clrun.system.errors.DataWarning")
PARTS, LABELS = ("train", "test"), ("cat", "dog")
ROWS = [(f"images/{label}/{part}_{k}.png", label, part) for part in PARTS for label in LABELS for k in "ab"]


def load(path: Path, **changes: Any) -> Dataset:
    options: dict[str, Any] = {
        "name": "pets",
        "file": str(path),
        "root": None,
        "columns": None,
        "splits": None,
        "sort": "natural",
    }
    options |= {"test_fraction": 0.5, "channels": 3, "images": decoding(verify="headers"), "mean": [], "std": []}
    options |= {"val_fraction": 0.0, "seed": 0, "augment": [], "empty_classes": "error"}
    return load_list(**(options | changes))


def noted(file: Path, **changes: Any) -> tuple[Dataset, Sequence[str]]:
    notes: list[str] = []
    with collecting_warnings(notes):
        found = load(file, **changes)
    return found, notes


def names(split: Any) -> list[str]:
    rows = range(len(split)) if split.rows is None else split.rows.tolist()
    return [split.images.files.names[row] for row in rows]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The images of `ROWS`."""
    for number, (path, _, _) in enumerate(ROWS):
        write(tmp_path / path, seed=number)
    return tmp_path


def lines(*, separator: str = ",", quote: str = "", end: str = "\n", header: str = "", columns: int = 3) -> str:
    rows = [header] if header else []
    rows += [separator.join([f"{quote}{row[0]}{quote}", *row[1:columns]]) for row in ROWS]
    return end.join(rows) + end


# Each is the same data set.
SAME = {
    "plain.csv": lines().encode(),
    "header.csv": lines(header="path,label,split").encode(),
    "other words.csv": lines(header="Image Path,Class,Subset").encode(),
    "quotes.csv": lines(quote='"', header="path,label,split").encode(),
    "crlf and mark.csv": b"\xef\xbb\xbf" + lines(quote='"', end="\r\n", header="path,label,split").encode(),
    "mark alone.csv": b"\xef\xbb\xbf" + lines().encode(),
    "old mac.csv": lines(end="\r").encode(),
    "semicolons.csv": lines(separator=";", header="path;label;split").encode(),
    "tabs.tsv": lines(separator="\t", header="path\tlabel\tsplit").encode(),
    "tabs.txt": lines(separator="\t").encode(),
    "utf-16.txt": lines(separator="\t", header="path\tlabel\tsplit").encode("utf-16"),
    "spaces after commas.csv": lines(separator=", ").encode(),
    "empty lines.csv": ("\n\n" + lines().replace("\n", "\n\n") + ",,\n").encode(),
    "windows paths.csv": lines().replace("/", "\\").encode(),
    "dots.csv": lines().replace("images/", "./images/").encode(),
    "parts in capitals.csv": lines().replace(",train", ",Training").replace(",test", ",TEST").encode(),
    "index.csv": "".join([",path,label,split\n", *(f"{k},{','.join(row)}\n" for k, row in enumerate(ROWS))]).encode(),
}


@pytest.mark.parametrize("name", SAME)
def test_lists_of_all_programs_are_one_data_set(home: Path, name: str) -> None:
    (home / name).write_bytes(SAME[name])
    data = load(home / name)
    assert data.class_names == ("cat", "dog") and data.name == "pets"
    assert data.train.y.tolist() == data.test.y.tolist() == [0, 0, 1, 1]
    expected = [path for path, _, part in ROWS if part == "train"]
    assert [name.removeprefix("./") for name in names(data.train)] == expected
    assert len(next(data.train.batches(9, view="raw"))) == 4


def test_without_splits_a_hash_decides_and_paths_may_hold_spaces(home: Path) -> None:
    for k in range(20):
        write(home / "some more" / f"{k} x.png", seed=k)
    text = "".join(f"some more/{k} x.png {k % 2}\n" for k in range(20))
    (home / "a.txt").write_text(text)
    data = load(home / "a.txt")
    assert data.class_names == ("0", "1") and len(data.train) + len(data.test) == 20
    assert all(in_test(name, 0.5) for name in names(data.test))


def test_a_folder_for_the_paths_and_absolute_paths(home: Path, tmp_path: Path) -> None:
    (home / "lists").mkdir()
    (home / "lists" / "a.csv").write_text(lines())
    assert len(load(home / "lists" / "a.csv", root=str(home)).train) == 4
    (home / "lists" / "b.csv").write_text(lines().replace("images/", f"{home}/images/"))
    assert len(load(home / "lists" / "b.csv").train) == 4


def test_numbers_are_classes_in_their_order(home: Path) -> None:
    rows = [(path, str(k + 5), part) for part in ("train", "test") for k, (path, _, _) in enumerate(ROWS)]
    rows = [(path, label, "train" if k < 8 else "test") for k, (path, label, _) in enumerate(rows)]
    for path, _, _ in rows[8:]:
        write(home / "again" / path)
    text = "".join(f"{'again/' * (part == 'test')}{path},{label},{part}\n" for path, label, part in rows)
    (home / "a.csv").write_text(text)
    assert load(home / "a.csv").class_names == ("5", "6", "7", "8", "9", "10", "11", "12")


def test_domains_and_tasks(home: Path) -> None:
    head = "path,label,split,domain\n"
    (home / "d.csv").write_text(head + "".join(f"{','.join(row)},{'ab'[k % 2]}\n" for k, row in enumerate(ROWS)))
    data = load(home / "d.csv")
    assert [(part.name, len(part.train), len(part.test)) for part in data.parts] == [("a", 2, 2), ("b", 2, 2)]
    tasks = {"cat": "10", "dog": "9"}
    head = "path,label,split,task\n"
    (home / "t.csv").write_text(head + "".join(f"{','.join(row)},{tasks[row[1]]}\n" for row in ROWS))
    assert load(home / "t.csv").groups == {"task": ((1,), (0,))}
    unheaded = "".join(f"{','.join(row)},{tasks[row[1]]}\n" for row in ROWS)
    (home / "u.csv").write_text(unheaded)
    assert load(home / "u.csv", columns=["path", "label", "split", "task"]).groups == {"task": ((1,), (0,))}
    assert load(home / "u.csv", columns=["path", "label", "split", "-"]).groups == {}
    (home / "w.csv").write_text(head + "".join(f"{','.join(row)},{k % 2}\n" for k, row in enumerate(ROWS)))
    with pytest.raises(ConfigError, match="w.csv, line 3: the class cat is in the tasks 0 and 1; name the"):
        load(home / "w.csv")


def test_parts_are_named_or_found(home: Path) -> None:
    folds = {"train": "fold1", "test": "fold2"}
    (home / "f.csv").write_text("".join(f"{path},{label},{folds[part]}\n" for path, label, part in ROWS))
    with pytest.raises(ConfigError, match="add a first line such as path,label,split"):
        load(home / "f.csv")
    (home / "f.csv").write_text("path,label,split\n" + (home / "f.csv").read_text())
    with pytest.raises(ConfigError, match="the splits fold1, fold2 are unclear; name them, as in"):
        load(home / "f.csv")
    data = load(home / "f.csv", splits={"train": "fold1", "test": "fold2"})
    assert len(data.train) == len(data.test) == 4 and data.reading == "tested on fold2"
    with pytest.raises(ConfigError, match="dataset.splits.test: there is no 'fold3' in .*did you mean 'fold2'"):
        load(home / "f.csv", splits={"train": "fold1", "test": "fold3"})
    data, notes = noted(home / "f.csv", splits={"train": "fold1"}, empty_classes="drop", test_fraction=0.7)
    assert len(data.train) + len(data.test) == 4 and "4 rows of other splits are ignored: fold2" in notes[0]
    (home / "v.csv").write_text(lines().replace(",test", ",val"))
    data, notes = noted(home / "v.csv")
    assert len(data.test) == 4 and data.val is None and "there is no test part, so that val is tested on" in notes[0]
    (home / "three.csv").write_text(lines() + "images/cat/test_a.png,cat,valid\n".replace("test_a", "extra"))
    write(home / "images/cat/extra.png")
    data = load(home / "three.csv")
    assert data.val is not None and data.val.y.tolist() == [0] and len(data.test) == 4


WRONG = {
    "": "holds no rows; expected lines of path,label",
    "path,label\n": "holds no rows after its first line",
    "a.png\nb.png\n": "the columns of 'a.png' are unclear",
    "a.png,cat\nb.png\n": "line 2: has 1 columns, expected 2 (path, label)",
    "a.png,cat\n,dog\n": "line 2: has no path; add it",
    "path,label,split\na.png,cat,\n": "line 2: has no split; add it",
    'a.png,"cat\n': "cannot be read (unexpected end of data)",
    "path,label,class\na.png,cat,cat\n": "has two columns of label",
    "a.png,cat\n./a.png,dog\n": "line 1 says that a.png is 'cat', and line 2 that it is 'dog'; remove one",
    "images/x.png,cat,train\nimages/y.png,Cat,test\n": "the classes 'cat' and 'Cat' (in the test part) differ",
    "images/x.png,cat,train\nimages/y.png,dog,test\n": "only the test part has the classes dog",
    "images/x.png,cat,train\nimages/y.png,cat,test\n": "x.png: cannot be decoded (No such file or directory); so are 1",
}


@pytest.mark.parametrize("text", WRONG)
def test_mistakes_in_lists(home: Path, text: str) -> None:
    (home / "a.csv").write_text(text)
    with pytest.raises(ConfigError) as error:
        load(home / "a.csv")
    assert WRONG[text] in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_no_lists(home: Path) -> None:
    (home / "a.csv").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    with pytest.raises(ConfigError, match="a.csv, line 1: is no UTF-8 text"):
        load(home / "a.csv")
    with pytest.raises(ConfigError, match="dataset.file: there is no file"):
        load(home / "b.csv")
    with pytest.raises(ConfigError, match="dataset.file: is empty"):
        load(home / "c.csv", **{"file": ""})
    (home / "c.csv").write_text(lines())
    with pytest.raises(ConfigError, match="there is no column 'colour'"):
        load(home / "c.csv", columns=["path", "label", "colour"])


def test_a_path_that_is_named_twice_counts_once(home: Path) -> None:
    (home / "a.csv").write_text(lines() + lines())
    data, notes = noted(home / "a.csv")
    assert len(data.train) == 4 and "8 paths are named again, and count once, where they are first" in notes[0]


def test_a_file_that_is_named_in_several_ways_counts_once(home: Path) -> None:
    path, label, part = ROWS[0]
    (home / "link.png").symlink_to(path)
    (home / "more").symlink_to("images")
    others = (
        f"../{home.name}/{path}",
        f"{home}/{path}",
        "link.png",
        path.replace("images/", "more/"),
        f"./x/..//{path}",
    )
    (home / "x").mkdir()
    for other in others:
        (home / "a.csv").write_text(lines() + f"{other},{label},test\n")
        data, notes = noted(home / "a.csv")
        assert len(data.train) == len(data.test) == 4 and "1 paths are named again, and count once" in notes[0]
        (home / "a.csv").write_text(lines() + f"{other},dog,{part}\n")
        with pytest.raises(ConfigError, match="line 1 says that .* is 'cat', and line 9 that .* is 'dog'; remove one"):
            load(home / "a.csv")


def test_absolute_paths_below_the_folder_of_the_list_are_those_of_any_folder(home: Path, tmp_path: Path) -> None:
    (home / "a.csv").write_text(lines())
    (home / "b.csv").write_text(lines().replace("images/", f"{home}/images/"))
    (tmp_path / "elsewhere").mkdir(exist_ok=True)
    (tmp_path / "elsewhere" / "c.csv").write_text((home / "b.csv").read_text())
    near, far = load(home / "b.csv"), load(tmp_path / "elsewhere" / "c.csv")
    assert names(near.train) == names(load(home / "a.csv").train) and len(far.train) + len(far.test) == 8
    stored = [split.stored_rows() for split in (near.train, load(home / "a.csv").train)]
    assert stored[0].names == stored[1].names and stored[0].contents.tolist() == stored[1].contents.tolist()
    whole = far.train.stored_rows()
    assert all(name.startswith(str(home)) for name in whole.names) and not whole.changed(np.arange(len(whole.names)))


def test_domains_of_a_list_with_a_pipe(home: Path) -> None:
    os.mkfifo(home / "pipe.png")
    text = "path,label,split,domain\npipe.png,cat,train,a\n"
    (home / "a.csv").write_text(text + "".join(f"{','.join(row)},{'ab'[k % 2]}\n" for k, row in enumerate(ROWS)))
    data, notes = noted(home / "a.csv")
    assert len(notes) == 1 and "1 pipes or devices" in notes[0]
    assert [(part.name, len(part.train), len(part.test)) for part in data.parts] == [("a", 2, 2), ("b", 2, 2)]


def test_a_pipe_is_never_opened(home: Path) -> None:
    os.mkfifo(home / "pipe.png")
    (home / "a.csv").write_text(lines() + "pipe.png,cat,train\n")
    data, notes = noted(home / "a.csv", images=decoding(verify="none"))
    assert len(data.train) == 4 and notes == ["pets: 1 pipes or devices are left out and were not opened: pipe.png"]


def test_missing_files_are_left_out_on_request(home: Path) -> None:
    (home / "a.csv").write_text(lines() + "images/gone.png,cat,train\n")
    data, notes = noted(home / "a.csv", images=decoding(unreadable="skip"))
    assert len(data.train) == 4 and "1 files are left out because they cannot be decoded" in notes[0]
