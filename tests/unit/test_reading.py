"""The options that loaders of data sets share: one declaration, flat on the command line and in signatures."""

import inspect
from pathlib import Path
from typing import Literal

import pytest
import yaml
from helpers import CONF
from running import configuration, member, source

from clrun.config.signature import mismatch, parameters
from clrun.data.reading.options import ArrayReading, Reading, loader
from clrun.data.stream import Dataset
from clrun.system.errors import ConfigError, Fraction

pytestmark = pytest.mark.exact  # whole numbers, bytes and texts alone

NAMES = sorted(file.stem for file in (CONF / "dataset").glob("*.yaml"))
COMMON = {"val_fraction": 0.0, "seed": 0, "augment": []}
seen: list[tuple[ArrayReading, str]] = []


@loader
def example(reading: ArrayReading, *, split: Literal["a", "b"]) -> Dataset:
    """Return nothing; remember the arguments."""
    seen.append((reading, split))
    return None  # type: ignore[return-value]


def test_a_loader_takes_the_fields_of_its_reading_and_its_own_options_as_keywords() -> None:
    takes = parameters(example)
    assert list(takes) == [*COMMON, "templates", "class_names", "root", "download", "split"]
    assert {parameter.kind for parameter in takes.values()} == {inspect.Parameter.KEYWORD_ONLY}
    assert (
        takes["val_fraction"].annotation == Fraction | dict[str, Fraction]
        and takes["split"].annotation == Literal["a", "b"]
    )
    assert mismatch(1.5, takes["val_fraction"].annotation) == "must be at most 1"
    assert example.__name__ == "example" and example.__doc__ == "Return nothing; remember the arguments."
    example(**COMMON, root="~/data", download=True, split="b")
    assert seen.pop() == (ArrayReading(**COMMON, root="~/data", download=True), "b")
    assert ArrayReading(**COMMON, root="~/data", download=True).home == Path.home() / "data"


@pytest.mark.parametrize(
    ("options", "problem"),
    [({"root": "x", "download": False}, "'split'"), ({"root": "x", "download": False, "split": "a", "k": 1}, "'k'")],
)
def test_missing_and_unknown_options_of_a_loader_are_named(options: dict[str, object], problem: str) -> None:
    with pytest.raises(TypeError, match=problem):
        example(**COMMON, **options)


def test_wrong_augmentations_are_refused_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match="dataset.augment"):
        Reading(val_fraction=0.0, seed=0, augment=["blur"])


@pytest.mark.parametrize("name", NAMES)
def test_a_source_file_is_named_after_the_data_sets_that_it_reads(name: str) -> None:
    file = source(name).__module__.rpartition(".")[2]
    several = "selection" in member(CONF / "dataset" / f"{name}.yaml")  # one loader with an option for each of them
    assert file in name and (source(name).__name__ == name or several and source(name).__name__ == file)


@pytest.mark.parametrize("name", ["core50", "emnist", "folder", "synthetic"])
def test_included_options_are_those_that_the_command_line_composes(name: str) -> None:
    overrides = [f"dataset={name}", "dataset.root=x"] if name == "folder" else [f"dataset={name}"]
    composed = configuration(*overrides)[0]["dataset"]
    own = member(CONF / "dataset" / f"{name}.yaml")
    assert composed.keys() == own.keys() and composed.get("images") == own.get("images")


@pytest.mark.parametrize("name", NAMES)
def test_a_yaml_file_repeats_no_option_with_its_included_default(name: str) -> None:
    file = CONF / "dataset" / f"{name}.yaml"
    node = yaml.safe_load(file.read_text())
    for entry in node["defaults"]:
        if entry != "_self_":
            included = member(file.parent / f"{entry.partition('@')[0]}.yaml")
            same = {key for key in node.keys() & included.keys() if node[key] == included[key] != "???"}
            assert same <= {"seed"}  # in some files it says more than in others
