"""Texts: how they are stored, tokenised once, read from tables and folders, and what is said about bad rows."""

import csv
import json
import pickle
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clrun.data.features import described
from clrun.data.modality import Images, Texts, Vectors, modality_of
from clrun.data.orders import canonical
from clrun.data.reading.text_rows import text_key
from clrun.data.scenarios import dataset_sequence, domain_shift, fixed_groups
from clrun.data.sources.digits import digits
from clrun.data.sources.hf_text import hf_text
from clrun.data.sources.text_folder import text_folder
from clrun.data.sources.text_synthetic import text_synthetic
from clrun.data.sources.text_table import text_table
from clrun.data.split import Plain, TensorSplit
from clrun.data.stream import Dataset
from clrun.data.texts import TextTransform, cut, pair, to_bytes, to_texts
from clrun.data.tokens import SEPARATOR, ByteTokenizer
from clrun.system.errors import ConfigError, collecting_warnings

pytestmark = [
    pytest.mark.filterwarnings("error::clrun.system.errors.DataWarning"),
    pytest.mark.exact,  # whole numbers, bytes and texts alone
]
BACKBONE: Any = SimpleNamespace(tokenizer=ByteTokenizer(), max_tokens=12)
COMMON = {"val_fraction": 0.0, "seed": 0, "augment": [], "test_fraction": 0.5, "max_bytes": 4096, "empty": "error"}
COMMON |= {"empty_classes": "error", "encoding": "utf-8", "sort": "natural", "splits": None}
TABLE = {"text": "text", "text_b": None, "label": "label", "split": None, "domain": None, "group": None}
TABLE |= {"delimiter": None, "quote": '"'}
SYNTHETIC = {"num_classes": 4, "train_rows": 5, "test_rows": 3, "words": 4, "difficulty": 0.5, "similarity": 0.0}
SYNTHETIC |= {"period": 2, "domains": 1, "val_fraction": 0.0, "seed": 0, "augment": []}


def table(path: Path, content: str | bytes, **options: Any) -> Dataset:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return text_table(**(COMMON | TABLE | {"name": path.name, "file": str(path)} | options))


def folder(path: Path, **options: Any) -> Dataset:
    return text_folder(**(COMMON | {"name": "own", "root": str(path)} | options))


def texts(split: Any) -> list[str]:
    return to_texts(next(split.batches(len(split), view="raw")).x)


def rows(dataset: Dataset) -> list[tuple[str, str, str]]:
    """Return (part, text, class) of all rows."""
    parts = [(name, getattr(dataset, name)) for name in ("train", "val", "test")]
    return [
        (name, text, dataset.class_names[label])
        for name, split in parts
        if split is not None
        for text, label in zip(texts(split), split.y.tolist(), strict=True)
    ]


# --- stored


@pytest.mark.parametrize("text", ["a", "Grüße", "漢字 😀", "é\u0301", "tab\tand\nline", "\u200b", SEPARATOR])
def test_texts_come_back_as_they_were_stored(text: str) -> None:
    assert to_texts(to_bytes([text, text + "x" * 9, "b"])) == [text, text + "x" * 9, "b"]


def test_a_cut_never_divides_a_character() -> None:
    for limit in range(1, 9):
        kept = cut("aé漢😀", limit)
        assert "aé漢😀".startswith(kept) and len(kept.encode()) <= limit < len(("aé漢😀z")[: len(kept) + 1].encode())


def test_folding_leaves_words_of_letters_and_digits() -> None:
    assert text_key("  Ünder_Score, (2nd) LINE\n") == "ünder score 2nd line" and text_key("ﬁn") == "fin"
    assert text_key("!?") != text_key("??"), "texts without words are told apart"


# --- tokenised


def test_texts_are_tokenised_once_and_have_one_width() -> None:
    dataset = text_synthetic(**SYNTHETIC)
    fitted, transform, line, row = Texts().fit(dataset, BACKBONE)
    again, *_ = Texts().fit(dataset, BACKBONE)
    assert fitted.train.images is fitted.test.images, "one tensor of ids, as one tensor of bytes"
    assert torch.equal(fitted.train.images, again.train.images)
    width = min(12, max(len(ByteTokenizer().encode(text, 99)) for _, text, _ in rows(dataset)))
    assert fitted.shape == (width,) == fitted.train.images.shape[1:] and fitted.train.images.dtype == torch.int32
    for split, own in ((fitted.train, dataset.train), (fitted.test, dataset.test)):
        batch = next(replace(split, transform=transform).batches(99))
        assert batch.x.dtype == torch.int64 and torch.equal(batch.y, own.y)
        for ids, text in zip(batch.x, texts(own), strict=True):
            expected = ByteTokenizer().encode(text, 12)
            assert ids.tolist() == expected + [0] * (width - len(expected))
    cut_rows = sum(len(text.encode()) > 11 for _, text, _ in rows(dataset))
    assert line.startswith(f"texts, at most {width} tokens (mean ") and f"{cut_rows} rows cut at 12), bytes" in line
    assert row == f"text of {width} tokens"


def test_parts_share_the_ids_and_keep_their_rows() -> None:
    dataset = text_synthetic(**(SYNTHETIC | {"domains": 3, "val_fraction": 0.2}))
    fitted, transform, *_ = Texts().fit(dataset, BACKBONE)
    stream = dataset_sequence(fitted, canonical, transform, setting="dil")
    plain = dataset_sequence(dataset, canonical, Plain(), setting="dil")
    assert [task.name for task in stream.tasks] == ["domain 0", "domain 1", "domain 2"]
    for task, stored in zip(stream.tasks, plain.tasks, strict=True):
        assert task.train.images is fitted.train.images
        for split, own in ((task.train, stored.train), (task.val, stored.val), (task.test, stored.test)):
            assert torch.equal(next(split.batches(99)).x, transform.rows(texts(own))[:, : fitted.shape[0]].long())


def test_a_transform_is_identified_by_its_tokenizer_and_pickled_without_it() -> None:
    transform = TextTransform(ByteTokenizer(), 5, 9)
    assert described(transform)["digest"] == ByteTokenizer().digest
    kept = pickle.loads(pickle.dumps(transform))
    assert kept.tokenizer is None and described(kept) == described(transform)
    assert transform.rows(["ab", "abcdefghijkl"]).shape == (2, 9), "a longer new text is cut at the backbone's limit"
    assert transform.rows(["ab"]).shape == (1, 5) and not transform.augments


def test_blank_rows_and_samples() -> None:
    dataset = text_synthetic(**SYNTHETIC)
    blank = Texts().blank(dataset, BACKBONE)
    assert blank.shape[0] == 1 and blank.dtype == torch.int64 and (blank != 0).all()
    fitted, transform, *_ = Texts().fit(dataset, BACKBONE)
    found = Texts().samples(dataset.train, torch.tensor([0, 7]), transform, torch.Generator())
    assert [shown.text for shown in found.texts] == [texts(dataset.train)[k] for k in (0, 7)]
    for shown in found.texts:
        assert len(shown.tokens) + shown.missing == len(shown.text) + 1 and len(shown.tokens) <= 12
    assert Vectors().samples(dataset.train, torch.tensor([0]), Plain(), torch.Generator()) is None


def test_images_and_texts_are_not_mixed_up() -> None:
    words, pictures = text_synthetic(**SYNTHETIC), digits(val_fraction=0.0, seed=0, augment=[])
    plain: Any = SimpleNamespace(input_size=None, mean=None, std=None)
    assert isinstance(modality_of(words), Texts) and isinstance(modality_of(pictures), Images)
    with pytest.raises(ConfigError, match="^backbone: SimpleNamespace reads no texts, and text_synthetic consists of"):
        Texts().fit(words, plain)
    with pytest.raises(ConfigError, match="^backbone: SimpleNamespace reads texts, and digits consists of images"):
        Images().fit(pictures, BACKBONE)
    with pytest.raises(ConfigError, match="^dataset.augment: flip: is for images, not for texts; set dataset.augment="):
        text_synthetic(**(SYNTHETIC | {"augment": ["flip"]}))
    with pytest.raises(ConfigError, match="^scenario=domain_shift: needs images, and text_synthetic consists of texts"):
        options = {"n_tasks": 2, "kind": "permuted", "identity_first": True, "max_angle": 90.0, "setting": "dil"}
        domain_shift(words, canonical, Plain(), **options)


def test_rows_of_a_users_loader_are_checked() -> None:
    stored, labels = to_bytes(["ab", "c"]), torch.tensor([0, 1])
    dataset = Dataset("own", TensorSplit(stored, labels), TensorSplit(stored, labels), 2, ("x", "y"), (2,))
    assert Texts().problem(dataset.train, dataset) is None
    wrong = {
        "texts of [2, 2] torch.int64": TensorSplit(stored.long(), labels),
        "an empty text (row 1)": TensorSplit(torch.tensor([[97, 0], [0, 0]], dtype=torch.uint8), labels),
        "1 texts and 2 labels": TensorSplit(stored[:1], labels),
        "labels from 1 to 2": TensorSplit(stored, labels + 1),
    }
    for expected, split in wrong.items():
        assert Texts().problem(split, dataset).startswith(expected)


# --- generated


def test_generated_texts_have_words_of_their_classes() -> None:
    options = {"similarity": 0.5, "difficulty": 0.0, "train_rows": 40, "words": 6}
    dataset = text_synthetic(**(SYNTHETIC | options))
    words: list[set[str]] = [set() for _ in range(4)]
    for text, label in zip(texts(dataset.train), dataset.train.y.tolist(), strict=True):
        words[label] |= set(text.split())
    assert [len(own) for own in words] == [8] * 4 and not words[0] & words[1]
    assert len(words[0] & words[2]) == 4 == len(words[1] & words[3]), "classes `period` apart share half of them"
    assert texts(dataset.train) == texts(text_synthetic(**(SYNTHETIC | options)).train)
    assert texts(dataset.train) != texts(text_synthetic(**(SYNTHETIC | options | {"seed": 1})).train)


# --- tables


def test_a_table_with_everything(tmp_path: Path) -> None:
    content = '\ufefflabel,split,text,domain,group\r\n2,train,"two, ""quoted""\r\nlines",a,x\r\n10,train,zehn,b,y\r\n'
    content += "\r\n2,test,zwei,a,x\r\n10,Test,ten,b,y\r\n2,dev,deux,a,x\r\n10,dev,dix,b,y\r\n"
    dataset = table(tmp_path / "rows.csv", content.replace("Test", "test"))
    assert dataset.class_names == ("2", "10"), "numbers are sorted as numbers"
    assert rows(dataset) == [
        ("train", 'two, "quoted"\r\nlines', "2"),
        ("train", "zehn", "10"),
        ("val", "deux", "2"),
        ("val", "dix", "10"),
        ("test", "zwei", "2"),
        ("test", "ten", "10"),
    ]
    assert [part.name for part in dataset.parts] == ["a", "b"] and dataset.groups == {"group": ((0,), (1,))}
    assert [rows(part) for part in dataset.parts][1] == [
        ("train", "zehn", "10"),
        ("val", "dix", "10"),
        ("test", "ten", "10"),
    ]
    stream = fixed_groups(dataset, canonical, Plain(), groups="group", setting="cil")
    assert [len(task.train) for task in stream.tasks] == [1, 1]


def test_the_same_rows_in_other_forms(tmp_path: Path) -> None:
    pairs = [(f"Text {k}; der {k}.", f"class {k % 3}") for k in range(30)]
    lines = [f'"{text}",{label}' for text, label in pairs]
    expected = table(tmp_path / "rows.csv", "\n".join(["text,label", *lines]))
    forms = {
        "rows.tsv": "\n".join(["label\ttext", *(f"{label}\t{text}" for text, label in pairs)]),
        "rows.jsonl": "\n".join(json.dumps({"label": label, "text": text, "x": None}) for text, label in pairs),
        "semicolons.csv": "\n".join(["text;label", *(f'"{text}";{label}' for text, label in pairs)]),
        "latin.csv": "\r\n".join(["text,label", *lines]).encode("utf-16"),
    }
    special = {"semicolons.csv": {"delimiter": ";"}, "latin.csv": {"encoding": "utf-16"}}
    for name, content in forms.items():
        assert rows(table(tmp_path / name, content, **special.get(name, {}))) == rows(expected)
    shuffled = table(tmp_path / "rows.csv", "\n".join(["text,label", *reversed(lines)]))
    assert sorted(rows(shuffled)) == sorted(rows(expected)), "the order of the lines decides no part"


def test_the_hash_of_the_folded_text_decides(tmp_path: Path) -> None:
    once = [f"t{k},{k % 2}" for k in range(40)]
    again = [f"T{k}!,{k % 2}" for k in range(40)]
    parts: dict[str, set[str]] = {}
    for part, text, _ in rows(table(tmp_path / "rows.csv", "\n".join(["text,label", *once, *again]))):
        parts.setdefault(text_key(text), set()).add(part)
    assert all(len(own) == 1 for own in parts.values()) and {"train", "test"} == set.union(*parts.values())


def test_pairs_of_texts_are_joined_by_the_separator(tmp_path: Path) -> None:
    content = "\n".join(["a,b,label", *(f"a{k},b{k},{k % 2}" for k in range(12))])
    dataset = table(tmp_path / "rows.csv", content, text="a", text_b="b")
    assert {text for _, text, _ in rows(dataset)} == {pair(f"a{k}", f"b{k}") for k in range(12)}


ROWS = "\n".join(["text,label", *(f"text {k},{'ab'[k % 2]}" for k in range(12))])
LONG = ROWS.replace("text,label", "text,label,n").replace(",a", ",a,1").replace(",b", ",b,1")
BAD: dict[str, tuple[str, str | bytes, dict[str, Any], str]] = {
    "empty": ("csv", f"{ROWS}\n,a", {}, ", line 14: the text is empty; remove the row or set dataset.empty=skip"),
    "blank": (
        "csv",
        f"{ROWS}\n \u200b\t,a\n  ,b",
        {},
        ", line 14: the text is empty (so are 1 more); ...",
    ),
    "no label": ("csv", f"{ROWS}\nx,", {}, ", line 14: no label"),
    "short row": ("csv", f"{ROWS}\nx", {}, ", line 14: no label"),
    "label of null": ("jsonl", '{"text": "x", "label": null}', {}, ", line 1: no label"),
    "label left out": ("jsonl", '{"text": "x", "label": "a"}\n{"text": "x"}', {}, ", line 2: no label"),
    "many fields": ("csv", f"{ROWS}\nx,a,b", {}, ", line 14: has 3 fields, expected 2 (text, label); put texts ..."),
    "no column": (
        "csv",
        ROWS,
        {"text": "sentence"},
        " has no column 'sentence' (columns: text, label); set ...",
    ),
    "no split": ("csv", ROWS, {"split": "part"}, " has no column 'part' (columns: text, label); set dataset.split"),
    "latin-1": (
        "csv",
        f"{ROWS}\nGrü,a".encode("latin-1"),
        {},
        ", byte 123: not UTF-8; set dataset.encoding=latin-1 ...",
    ),
    "NUL": ("csv", f"{ROWS}\nx\0y,a", {}, ", line 14: holds a NUL character (U+0000), which no text has; remove it"),
    "NUL in JSON": ("jsonl", '{"text": "\\u0000", "label": 1}', {}, ", line 1: the text holds a NUL character ..."),
    "half a pair": (
        "jsonl",
        '{"text": "\\ud83d", "label": 1}',
        {},
        ", line 1: the text holds half of a ...",
    ),
    "broken JSON": (
        "jsonl",
        '{"text": "x", "label": 1}\n\n{"text" 3',
        {},
        ", line 3: no JSON object (Expecting ...",
    ),
    "a list": ("jsonl", "[1, 2]", {}, ", line 1: no JSON object (a list); expected {...}"),
    "number as text": ("jsonl", '{"text": 3, "label": 1}', {}, ", line 1: the text is no string (3)"),
    "list as label": ("jsonl", '{"text": "x", "label": [1]}', {}, ", line 1: the label is neither a string nor ..."),
    "semicolon": ("csv", ROWS.replace(",", ";"), {}, ": one column 'text;label'; set dataset.delimiter=';'"),
    "open quote": (
        "csv",
        f'{ROWS}\n"x,a',
        {},
        ", line 14: cannot be read (unexpected end of data); ...",
    ),
    "twice": ("csv", "text,text,label", {}, ": two columns are called 'text'; rename one"),
    "no rows": ("csv", "text,label\n", {}, ": holds no texts"),
    "no names": ("csv", "", {}, ": is empty; expected a first line of names, such as text,label"),
    "suffix": ("xls", ROWS, {}, "dataset.file: {} is none of .csv, .tsv, .tab, .jsonl, .ndjson; rename it, or set ..."),
    "delimiter": ("csv", ROWS, {"delimiter": "::"}, "dataset.delimiter: must be one character, got '::'"),
    "case": (
        "csv",
        f"{ROWS}\nx,A\n",
        {},
        ": the classes 'a' and 'A' differ only in case or ...",
    ),
    "blanks": (
        "csv",
        f"{ROWS}\nx,c d\ny,c  d",
        {},
        ": the classes 'c d' and 'c  d' differ only in case or ...",
    ),
    "empty split": (
        "csv",
        "text,label,split\nx,a,train\ny,a,",
        {},
        ", line 3: no split; fill in ...",
    ),
    "class of the test part": (
        "csv",
        "text,label,split\nx,a,train\ny,a,test\nz,b,test",
        {},
        ": only the test part has the classes b; add training texts or remove them",
    ),
    "two groups": (
        "csv",
        "text,label,group\nx,a,g\ny,a,h",
        {},
        ", line 3: the class a is in the tasks g and h; ...",
    ),
    "unknown encoding": ("csv", ROWS, {"encoding": "utf-9"}, "dataset.encoding: there is no encoding 'utf-9'; use ..."),
    "images": ("csv", ROWS, {"augment": ["crop"]}, "dataset.augment: crop: is for images, not for texts; set ..."),
}


@pytest.mark.parametrize(("suffix", "content", "options", "expected"), BAD.values(), ids=BAD)
def test_bad_rows_are_named(
    suffix: str, content: str | bytes, options: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    path = tmp_path / f"rows.{suffix}"
    with pytest.raises(ConfigError) as error:
        table(path, content, **options)
    line = expected.format(path) if expected.startswith("dataset") else f"{path}{expected}"
    assert str(error.value).startswith(line.removesuffix("...").rstrip())
    assert "\n" not in str(error.value) and (line.endswith("...") or str(error.value) == line)


def said(path: Path, content: str, **options: Any) -> tuple[Dataset, list[str]]:
    notes: list[str] = []
    with collecting_warnings(notes):
        dataset = table(path, content, **options)
    return dataset, notes


def test_what_is_said_about_rows_that_are_used_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    dataset, notes = said(path, f"{ROWS}\n,a\n \t,b", empty="skip")
    assert notes == [f"{path}: 2 empty texts are left out, first: {path}, line 14"] and len(rows(dataset)) == 12
    _, notes = said(path, f"{ROWS}\nText 0!,b\n")
    assert notes == [f"{path}: 1 texts have several labels: 'Text 0!' is a and b"]
    _, notes = said(path, "text,label,split\nx,a,train\ny,b,train\nX,a,test\nz,b,test")
    assert notes == [f"{path}: 1 test texts are training texts, too, such as 'X'"]
    _, notes = said(path, "text,label,split\nx,a,train\ny,b,train\nw,a,val\nz,b,val")
    assert len(notes) == 1 and "there is no test part, so that val is tested on" in notes[0]


def test_a_very_long_row_is_cut_before_anything_is_made_of_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"{ROWS}\n{'y' * 1_000_000},a\n{'é' * 3000},b\n")
    assert csv.field_size_limit() < 1_000_000
    tracemalloc.start()
    notes: list[str] = []
    with collecting_warnings(notes):
        dataset = text_table(**(COMMON | TABLE | {"name": "rows", "file": str(path)}))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 25e6, "a few copies of the million characters, and no tensor of them"
    assert dataset.train.images.shape == (14, 4096) and csv.field_size_limit() < 1_000_000
    assert notes == [f"{path}: 2 texts are cut at dataset.max_bytes=4096; the longest has 1,000,000 bytes"]
    assert {len(text) for _, text, _ in rows(dataset)} == {6, 7, 4096, 2048}


# --- folders


def write(root: Path, *paths: str, text: str = "ein Text {}") -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"{text.format(path)}\n")


def test_a_folder_with_parts(tmp_path: Path) -> None:
    write(tmp_path, *(f"{part}/{label}/{k}.txt" for part in ("train", "test", "val") for label in "ba" for k in "12"))
    dataset = folder(tmp_path)
    assert dataset.class_names == ("a", "b") and len(rows(dataset)) == 12
    assert rows(dataset)[0] == ("train", "ein Text train/a/1.txt", "a") and len(dataset.val) == 4


def test_a_folder_without_parts_is_divided_by_the_texts(tmp_path: Path) -> None:
    write(tmp_path, *(f"{label}/{k}.txt" for label in "ab" for k in range(20)))
    (tmp_path / "a" / "picture.png").touch()
    notes: list[str] = []
    with collecting_warnings(notes):
        dataset = folder(tmp_path)
    assert len(rows(dataset)) == 40 and 8 < len(dataset.test) < 32
    assert notes == [
        "own: 1 files are left out because their names are not those of texts: " + str(tmp_path / "a/picture.png")
    ]


def test_bad_files_are_named(tmp_path: Path) -> None:
    write(tmp_path, *(f"{label}/{k}.txt" for label in "ab" for k in range(20)))
    write(tmp_path, "a/7.txt", text=" ")
    with pytest.raises(ConfigError, match=r"a/7\.txt: the text is empty; remove the row or set dataset.empty=skip$"):
        folder(tmp_path)
    (tmp_path / "a" / "7.txt").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"a/7\.txt, byte 0: not UTF-8; set dataset.encoding=latin-1 if that is what"):
        folder(tmp_path)
    write(tmp_path / "parts", "train/a/1.txt", "test/a/1.txt", "test/b/1.txt")
    with pytest.raises(ConfigError, match=r"only test/ has the classes b; add training texts or remove them$"):
        folder(tmp_path / "parts")


def test_parts_and_encodings_that_cannot_be(tmp_path: Path) -> None:
    content = "text,label\n" + "".join(f"word {k},{'ab'[k % 2]}\n" for k in range(12))
    with pytest.raises(
        ConfigError, match="rows.csv: there are no training texts; add some, or set a smaller dataset.test"
    ):
        table(tmp_path / "rows.csv", content, test_fraction=1.0)
    listed = content.replace("label", "label,split", 1).replace(",a\n", ",a,train\n").replace(",b\n", ",b,test\n")
    with pytest.raises(ConfigError, match="only the test part has the classes b; add training texts"):
        table(tmp_path / "rows.csv", listed)
    for name in ("idna", "unicode_escape", "rot13"):
        with pytest.raises(ConfigError, match=f"^dataset.encoding: there is no encoding '{name}'; use one of Python"):
            table(tmp_path / "rows.csv", content, encoding=name)
    with pytest.raises(
        ConfigError, match="use another scenario, or a table with a column of domains .dataset=text_table"
    ):
        dataset_sequence(table(tmp_path / "rows.csv", content), canonical, Plain(), setting="dil")


# --- tables of the library `datasets`


class Table(list[dict[str, Any]]):
    """Rows with features, as the library has them."""

    def __init__(self, rows: list[dict[str, Any]], **features: Any) -> None:
        super().__init__(rows)
        self.features = features


def hub(monkeypatch: pytest.MonkeyPatch, tables: dict[str, Table], **options: Any) -> Dataset:
    monkeypatch.setattr("clrun.data.sources.hf_text.hub_tables", lambda *_: tables)
    common = {key: value for key, value in COMMON.items() if key != "splits"} | {"config": None, "revision": None}
    columns = {"text": None, "text_b": None, "label": None, "train": "train", "test": "test", "val": None}
    return hf_text(**(common | columns | {"path": "owner/name"} | options))


def test_tables_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    string, classes = (
        SimpleNamespace(dtype="string"),
        type("ClassLabel", (), {"names": ["yes", "no"], "dtype": "int64"})(),
    )
    rows_of = {part: [{"line": f"{part} {k}", "y": k % 2} for k in range(12)] for part in ("train", "test")}
    tables = {part: Table(own, line=string, y=classes) for part, own in rows_of.items()}
    dataset = hub(monkeypatch, tables)
    assert dataset.class_names == ("yes", "no"), "the order of the ClassLabel"
    assert rows(dataset)[1] == ("train", "train 1", "no") and len(rows(dataset)) == 24
    alone = hub(monkeypatch, tables, test=None, test_fraction=0.5)
    assert 0 < len(alone.test) < 12 == len(rows(alone))
    pairs = hub(monkeypatch, tables, text="line", text_b="line")
    assert rows(pairs)[0][1] == pair("train 0", "train 0")
    for row, expected in (
        ({"line": None, "y": 1}, "owner/name, split train, row 2: the text is empty; remove the row or set dataset"),
        ({"line": "x", "y": None}, "owner/name, split train, row 2: no label"),
        ({"line": 3, "y": 1}, "owner/name, split train, row 2: the text is no string (3)"),
        ({"line": "x", "y": -1}, "owner/name, split train, row 2: the label -1 names no class; choose a split whose"),
    ):
        broken = Table([*rows_of["train"][:2], row], line=string, y=classes)
        with pytest.raises(ConfigError) as error:
            hub(monkeypatch, tables | {"train": broken})
        assert str(error.value).startswith(expected)
    with pytest.raises(ConfigError, match="^dataset.text: there is no column 'text'"):
        hub(monkeypatch, tables, text="text")
