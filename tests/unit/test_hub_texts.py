"""Texts that the library `datasets` has written are read as they are; skipped where it is not installed."""

from pathlib import Path
from typing import Any

import pytest
from test_texts import COMMON, rows

from clrun.data.sources.hf_text import hf_text
from clrun.data.stream import Dataset
from clrun.system.errors import ConfigError

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("error::clrun.system.errors.DataWarning")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the library's own cache out of the user's, and the library off the network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def load(path: Path, **options: Any) -> Dataset:
    common = {key: value for key, value in COMMON.items() if key != "splits"} | {"config": None, "revision": None}
    columns = {"text": None, "text_b": None, "label": None, "train": "train", "test": "test", "val": None}
    return hf_text(**(common | columns | {"path": str(path)} | options))


def table(part: str, count: int, *, kind: str = "string") -> Any:
    """Return rows of two named classes, in the order of the names."""
    features = {"text": datasets.Value(kind), "label": datasets.ClassLabel(names=["zebra", "ant"])}
    content = {"text": [f"{part} {k}" for k in range(count)], "label": [k % 2 for k in range(count)]}
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


def expected(part: str, name: str, count: int) -> list[tuple[str, str, str]]:
    return [(name, f"{part} {k}", ("zebra", "ant")[k % 2]) for k in range(count)]


def test_saved_splits_and_parquet_files(tmp_path: Path) -> None:
    parts = {"train": table("learn", 4), "test": table("try", 2), "validation": table("tune", 2)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    found = load(tmp_path / "saved", val="validation")
    assert found.class_names == ("zebra", "ant"), "the order of the ClassLabel"
    assert rows(found) == expected("learn", "train", 4) + expected("tune", "val", 2) + expected("try", "test", 2)
    (tmp_path / "files").mkdir()
    for part in ("train", "test"):
        parts[part].to_parquet(tmp_path / "files" / f"{part}.parquet")
    again = load(tmp_path / "files")
    assert rows(again) == expected("learn", "train", 4) + expected("try", "test", 2)
    parts["train"].save_to_disk(tmp_path / "alone")
    with pytest.raises(
        ConfigError, match="^dataset.test: there is no split 'test'; set dataset.test .there are: train"
    ):
        load(tmp_path / "alone")


@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_every_type_of_strings_is_a_column_of_texts(tmp_path: Path, kind: str) -> None:
    (tmp_path / "files").mkdir()
    for part in ("train", "test"):
        table(part, 2, kind=kind).to_parquet(tmp_path / "files" / f"{part}.parquet")
    assert rows(load(tmp_path / "files")) == expected("train", "train", 2) + expected("test", "test", 2)


def test_tables_in_csv_files(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    for part in ("train", "test"):
        (tmp_path / "files" / f"{part}.csv").write_text(f"text,label\n{part} a,x\n{part} b,y\n")
    named = load(tmp_path / "files", text="text")
    assert [row[1:] for row in rows(named)] == [("train a", "x"), ("train b", "y"), ("test a", "x"), ("test b", "y")]
    with pytest.raises(ConfigError, match="^dataset.text: name the column; 2 hold strings .of: text .Value., label"):
        load(tmp_path / "files")


def test_hidden_labels_missing_values_and_damage(tmp_path: Path) -> None:
    hidden = table("try", 2).map(lambda row: {"label": -1})
    datasets.DatasetDict({"train": table("learn", 2), "test": hidden}).save_to_disk(tmp_path / "hidden")
    with pytest.raises(
        ConfigError, match="hidden, split test, row 0: the label -1 names no class; choose a split whose"
    ):
        load(tmp_path / "hidden")
    (tmp_path / "gaps").mkdir()
    gaps = {"text": ["a", None, "c", "d"], "label": ["x", "y", "x", "y"]}
    datasets.Dataset.from_dict(gaps).to_parquet(tmp_path / "gaps" / "train.parquet")
    with pytest.raises(ConfigError, match="gaps, split train, row 1: the text is empty; remove the row or set"):
        load(tmp_path / "gaps", test=None, text="text")
    table("learn", 2).save_to_disk(tmp_path / "torn")
    for file in (tmp_path / "torn").glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ConfigError, match="^dataset.path: .*torn cannot be loaded"):
        load(tmp_path / "torn", test=None)
