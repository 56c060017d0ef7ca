import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import decoding, encoded, noise, write
from PIL import Image

from clrun.data.sources.hf import hf
from clrun.data.split import Batch
from clrun.data.stream import Dataset
from clrun.system.errors import ConfigError, collecting_warnings

datasets = pytest.importorskip("datasets")
pytestmark = [
    pytest.mark.filterwarnings("error::clrun.system.errors.DataWarning"),
    pytest.mark.exact,  # whole numbers, bytes and texts alone
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the library's own cache out of the user's, and the library off the network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def load(path: Path | str, **changes: Any) -> Dataset:
    options: dict[str, Any] = {"config": None, "revision": None, "train": "train", "test": "test", "image": None}
    options |= {"label": None, "test_fraction": 0.5, "channels": 3, "images": decoding(), "mean": [], "std": []}
    options |= {"val_fraction": 0.0, "seed": 0, "augment": [], "val": None, "empty_classes": "error"}
    return hf(path=str(path), **(options | changes))


def images(split: Any, workers: int = 0) -> torch.Tensor:
    return Batch.cat(*split.to("cpu", workers=workers).batches(2, view="raw")).x


def table(labels: Any, feature: Any, **columns: Any) -> Any:
    """Return a table of images stored as bytes with these labels."""
    cells = [{"bytes": encoded(Image.fromarray(noise(6, 6, 3, seed=k))), "path": None} for k in range(len(labels))]
    features = {"picture": datasets.Image(), "kind": feature}
    features |= {name: datasets.Image() for name in columns}
    content = {"picture": cells, "kind": labels, **columns}
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


def test_a_folder_of_images(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for label in ("cat", "dog"):
            for k in range(3):
                write(tmp_path / "pets" / part / label / f"{k}.png", seed=k)
    data = load(tmp_path / "pets")
    assert data.class_names == ("cat", "dog") and data.train.y.tolist() == [0, 0, 0, 1, 1, 1]
    for workers in (0, 2):
        expected = torch.from_numpy(noise(6, 6, 3, seed=1)).permute(2, 0, 1)
        assert torch.equal(images(data.train, workers)[4], expected)
    assert load(tmp_path / "pets").train.fingerprint() == data.train.fingerprint() != data.test.fingerprint()


def test_what_save_to_disk_leaves(tmp_path: Path) -> None:
    classes = datasets.ClassLabel(names=["no", "yes", "maybe"])
    whole = datasets.DatasetDict({"train": table([1, 0, 2, 1], classes), "validation": table([2, 0], classes)})
    whole.save_to_disk(tmp_path / "saved")
    with collecting_warnings(notes := []):
        data = load(tmp_path / "saved", test="validation", channels=1)
    assert data.class_names == ("no", "yes", "maybe") and data.train.y.tolist() == [1, 0, 2, 1]
    assert data.shape == (1, 6, 6) and images(data.test).shape == (2, 1, 6, 6)
    assert notes == [f"hf: no test images of yes in {tmp_path / 'saved'}"]
    with pytest.raises(ConfigError, match=r"^dataset.test: there is no split 'valid'; did you mean 'validation'\? "):
        load(tmp_path / "saved", test="valid")


@pytest.mark.parametrize(
    ("labels", "names"), [(["b", "a"] * 20, ("a", "b")), ([7, 3] * 20, ("3", "7"))], ids=["texts", "numbers"]
)
def test_one_split_and_plain_labels(tmp_path: Path, labels: list[Any], names: tuple[str, ...]) -> None:
    table(labels, datasets.Value("string" if names == ("a", "b") else "int64")).save_to_disk(tmp_path / "saved")
    data = load(tmp_path / "saved", test=None, label="kind")
    assert data.class_names == names and len(data.train) + len(data.test) == 40 and 8 <= len(data.test) <= 32
    rows = [*data.train.images.files.rows, *data.test.images.files.rows]
    assert sorted(rows) == list(range(40))
    expected = [1 - row % 2 for row in rows]
    assert [*data.train.y.tolist(), *data.test.y.tolist()] == expected
    first = torch.from_numpy(noise(6, 6, 3, seed=data.test.images.files.rows[0])).permute(2, 0, 1)
    assert torch.equal(images(data.test)[0], first)


def test_columns_must_be_named_where_there_are_several(tmp_path: Path) -> None:
    classes = datasets.ClassLabel(names=["no", "yes"])
    cells = [{"bytes": encoded(Image.new("L", (6, 6), 9)), "path": None}] * 2
    parts = {part: table([1, 0], classes, mask=cells) for part in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"^dataset.image: name the column; 2 hold images \(of: picture"):
        load(tmp_path / "saved")
    assert torch.all(images(load(tmp_path / "saved", image="mask").train) == 9)
    for option, name in (("image", "kind"), ("image", "photo"), ("label", "label")):
        with pytest.raises(
            ConfigError, match=rf"^dataset.{option}: there is no column .*'{name}' \(there are: picture"
        ):
            load(tmp_path / "saved", **{"image": "mask", option: name})


def test_hidden_labels_and_damaged_images(tmp_path: Path) -> None:
    classes = datasets.ClassLabel(names=["no", "yes"])
    datasets.DatasetDict({"train": table([1, 0], classes), "test": table([-1, -1], classes)}).save_to_disk(
        tmp_path / "a"
    )
    with pytest.raises(ConfigError, match=r"a, split test, row 0: the column 'kind' names no class \(it holds -1\)"):
        load(tmp_path / "a")
    good = {"bytes": encoded(Image.fromarray(noise(6, 6, 3))), "path": None}
    cells = [good, {"bytes": b"x", "path": None}, good, None]
    features = datasets.Features({"image": datasets.Image(), "label": classes})
    broken = datasets.Dataset.from_dict({"image": cells, "label": [0, 1, 1, 0]}, features=features)
    datasets.DatasetDict({"train": broken, "test": broken}).save_to_disk(tmp_path / "b")
    with pytest.raises(ConfigError, match=r"b train, row 1: cannot be decoded \(not an image"):
        images(load(tmp_path / "b").train)
    with pytest.raises(ConfigError, match="b train, row 3: there is no image; remove the row"):
        images(load(tmp_path / "b").train.select(torch.tensor([3])))
    with collecting_warnings(notes := []):
        data = load(tmp_path / "b", images=decoding(unreadable="skip"))
    assert data.train.y.tolist() == [0, 1] and len(images(data.train)) == 2
    assert notes[0].startswith("hf: 2 files are left out because they cannot be decoded: ")


def test_a_data_set_that_brings_a_program_is_refused(tmp_path: Path) -> None:
    home = tmp_path / "evil"
    write(home / "train" / "a" / "0.png")
    (home / "evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\n")
    with pytest.raises(ConfigError, match="^dataset.path: .*evil cannot be loaded .*scripts are no longer supported"):
        load(home)
    assert not (tmp_path / "run").exists()


def test_an_old_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(ConfigError, match=r"^dataset=hf needs datasets 4 or newer.*found 3.6.0; run pip install"):
        load(tmp_path)


def test_a_name_that_cannot_be_reached(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load("owner/nothing")
    assert str(error.value).startswith("dataset.path: owner/nothing cannot be loaded (") and "\n" not in str(
        error.value
    )


def test_cached_images_follow_the_state_of_the_table(tmp_path: Path) -> None:
    options = {"images": decoding(cache=str(tmp_path / "cache")), "label": "kind", "test": None}
    whole = table(["a", "b"] * 10, datasets.Value("string"))
    whole.save_to_disk(tmp_path / "saved")
    first = images(load(tmp_path / "saved", **options).train)
    assert torch.equal(first, images(load(tmp_path / "saved", **(options | {"images": decoding()})).train))
    shutil.rmtree(tmp_path / "saved")
    whole.select(range(19, -1, -1)).save_to_disk(tmp_path / "saved")
    second = images(load(tmp_path / "saved", **options).train)
    assert torch.equal(second, images(load(tmp_path / "saved", **(options | {"images": decoding()})).train))
    assert not torch.equal(first, second) and len(list((tmp_path / "cache").glob("*.bin"))) == 1


def test_classes_of_the_splits_are_matched_by_name(tmp_path: Path) -> None:
    train = table([0, 1, 2, 0], datasets.ClassLabel(names=["cat", "dog", "cow"]))
    test = table([0, 1, 2], datasets.ClassLabel(names=["cow", "cat", "dog"]))
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "a")
    data = load(tmp_path / "a", val="test")
    assert data.class_names == ("cat", "dog", "cow")
    assert data.test.y.tolist() == data.val.y.tolist() == [2, 0, 1]
    words = table(["dog", "cow", "cat"], datasets.Value("string"))
    datasets.DatasetDict({"train": train, "test": words}).save_to_disk(tmp_path / "b")
    assert load(tmp_path / "b").test.y.tolist() == [1, 2, 0]
    other = table([1], datasets.ClassLabel(names=["cat", "bee"]))
    datasets.DatasetDict({"train": train, "test": other}).save_to_disk(tmp_path / "c")
    with pytest.raises(ConfigError, match="only the split test has the classes bee; add training images"):
        load(tmp_path / "c")


def test_labels_without_rows_are_dropped_on_request(tmp_path: Path) -> None:
    train = table([0, 3, 0], datasets.ClassLabel(names=["cat", "dog", "cow", "bee"]))
    test = table([3, 0, 1], datasets.ClassLabel(names=["cat", "dog", "cow", "bee"]))
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "a")
    with pytest.raises(ConfigError, match="no training images of dog, cow; .* dataset.empty_classes=drop"):
        load(tmp_path / "a")
    with collecting_warnings(notes := []):
        data = load(tmp_path / "a", empty_classes="drop")
    assert data.class_names == ("cat", "bee") and data.train.y.tolist() == [0, 1, 0] and data.test.y.tolist() == [1, 0]
    assert notes == ["hf: classes without training images are left out, and so are their 1 other images: dog, cow"]


@pytest.mark.parametrize("kind", ["bytes", "struct"])
def test_parquet_files_of_bytes_or_structs(tmp_path: Path, kind: str) -> None:
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    (tmp_path / "a").mkdir()
    for part in ("train", "test"):
        cells: list[Any] = [encoded(Image.fromarray(noise(6, 6, 3, seed=k))) for k in range(4)]
        if kind == "struct":
            cells = [{"bytes": cell, "path": f"{k}.png"} for k, cell in enumerate(cells)]
        content = arrow.table({"picture": cells, "kind": ["b", "a", "b", "a"]})
        parquet.write_table(content, tmp_path / "a" / f"{part}.parquet")
    data = load(tmp_path / "a")
    assert data.class_names == ("a", "b") and data.train.y.tolist() == [1, 0, 1, 0]
    assert len(set(data.train.stored_rows().contents.tolist())) == 4
    assert torch.equal(images(data.train)[2], torch.from_numpy(noise(6, 6, 3, seed=2)).permute(2, 0, 1))


def test_the_content_of_a_table_identifies_it_wherever_it_lies(tmp_path: Path) -> None:
    classes = datasets.ClassLabel(names=["no", "yes"])
    parts = {"train": table([1, 0, 1, 0], classes), "test": table([1, 0], classes)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    shutil.copytree(tmp_path / "saved", tmp_path / "copy")
    rows = load(tmp_path / "saved").train.stored_rows()
    assert rows.names == ("row 0", "row 1", "row 2", "row 3") and len(set(rows.contents.tolist())) == 4
    copied = load(tmp_path / "copy").train.stored_rows()
    assert copied.names == rows.names and copied.contents.tolist() == rows.contents.tolist()
    swapped = datasets.DatasetDict({"train": parts["train"].select([1, 0, 2, 3]), "test": parts["test"]})
    swapped.save_to_disk(tmp_path / "swapped")
    other = load(tmp_path / "swapped").train.stored_rows().contents.tolist()
    assert other == [rows.contents.tolist()[k] for k in (1, 0, 2, 3)]


def test_files_that_a_table_names_are_identified_by_their_content(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for label in ("cat", "dog"):
            for k in range(2):
                write(tmp_path / "pets" / part / label / f"{k}.png", seed=k)
    rows = load(tmp_path / "pets").train.stored_rows().contents.tolist()
    assert rows[:2] == rows[2:] and rows[0] != rows[1] and 0 not in rows
