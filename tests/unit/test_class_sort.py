"""Classes with numbers in their names: how they are sorted, and the warning where ids of classes are listed."""

import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import write
from running import member, source

from clrun.data.decode import Decoding
from clrun.data.orders import canonical
from clrun.data.reading.class_names import in_order
from clrun.data.scenarios import class_split, fixed_groups
from clrun.data.split import Plain
from clrun.data.stream import Dataset
from clrun.system.errors import DataWarning
from clrun.system.yaml_files import conf_dir


@pytest.mark.parametrize(
    ("names", "text", "natural"),
    [
        (["10", "2", "1"], ["1", "10", "2"], ["1", "2", "10"]),
        (["c10", "c9", "b11"], ["b11", "c10", "c9"], ["b11", "c9", "c10"]),
        (["2", "a", "10", ""], ["", "10", "2", "a"], ["", "2", "10", "a"]),
        (["9" * 5000, "1" + "0" * 5000], ["1" + "0" * 5000, "9" * 5000], ["9" * 5000, "1" + "0" * 5000]),
        (["01", "1", "1a", "1.5"], ["01", "1", "1.5", "1a"], ["01", "1", "1.5", "1a"]),
        (["cat", "Ant"], ["Ant", "cat"], ["Ant", "cat"]),
    ],
)
def test_both_orders(names: list[str], text: list[str], natural: list[str]) -> None:
    assert in_order(names, "text") == text and in_order(names, "natural") == natural


@given(st.lists(st.text(alphabet="0123456789ab. \u0662\u00b2", max_size=6), unique=True, max_size=8))
def test_the_order_is_one_of_all_names(names: list[str]) -> None:
    found = in_order(names, "natural")
    assert sorted(found) == sorted(names) and in_order(reversed(names), "natural") == found


def read(root: Path, sort: str, labels: tuple[str, ...] = ("1", "2", "10")) -> Dataset:
    for part, count in (("train", 2), ("test", 1)):
        for label in labels:
            for k in range(count):
                write(root / part / label / f"{k}.png", side=8, seed=k)
    node: dict[str, Any] = member(conf_dir() / "dataset" / "folder.yaml") | {
        "root": str(root),
        "name": "x",
        "sort": sort,
    }
    node.pop("_target_")
    node["images"] = Decoding(**{key: value for key, value in node["images"].items() if key != "_target_"})
    return source("folder")(**node)


def messages(dataset: Dataset, **options: Any) -> list[str]:
    """Return the warnings of a class split."""
    given = {"n_tasks": 3, "first": None, "sizes": None, "class_seed": None, "class_order": None} | options
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        class_split(dataset, canonical, Plain(), **given, setting="cil")
    return [str(one.message) for one in caught if issubclass(one.category, DataWarning)]


def test_folders_are_sorted_as_asked(tmp_path: Path) -> None:
    assert read(tmp_path, "text").class_names == ("1", "10", "2")
    natural = read(tmp_path, "natural")
    assert natural.class_names == ("1", "2", "10")
    assert [natural.class_names[label] for label in natural.train.y.tolist()] == [
        Path(natural.train.images.files.name(row)).parent.name for row in range(len(natural.train))
    ]


@pytest.mark.parametrize(
    ("sort", "here", "there", "other"), [("text", "10", "2", "natural"), ("natural", "2", "10", "text")]
)
@pytest.mark.parametrize("order", [[2, 1, 0], {"numpy_seed": 1993}])
def test_both_readings_of_a_listed_order_are_told(
    sort: str, here: str, there: str, other: str, order: Any, tmp_path: Path
) -> None:
    dataset = read(tmp_path, sort)
    [text] = messages(dataset, class_order=order)
    assert text.startswith("scenario.class_order:") and f"class id 1 is '{here}'" in text
    assert f"it would be '{there}'" in text and text.endswith(f"set dataset.sort={other}")
    with pytest.warns(DataWarning, match="scenario.groups: .*class id 1"):
        fixed_groups(dataset, canonical, Plain(), groups=[[0], [1]], setting="cil")


def test_no_warning_without_two_readings(tmp_path: Path) -> None:
    assert messages(read(tmp_path / "a", "text")) == []
    assert messages(read(tmp_path / "b", "text"), class_seed=1) == []
    assert messages(read(tmp_path / "c", "text", ("01", "02", "10")), class_order=[2, 1, 0]) == []
