"""Runs on image files: the same results whoever decodes, wherever decoded images are kept, and after a resume."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pictures import write
from running import cells, quiet, run

from clrun.cli import _warning
from clrun.config.compose import slug
from clrun.results.identity import config_hash
from clrun.running import checkpoint
from clrun.system.errors import ConfigError, DataWarning

FILES = ("dataset=folder", "dataset.images.size=8", "scenario.n_tasks=2", "backbone=mlp", "budget.epochs=1")


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """train/ and test/ of four classes, in two domains."""
    monkeypatch.setenv("CLRUN_CACHE", str(tmp_path / "cache"))
    for domain in ("rain", "sun"):
        for part, count in (("train", 5), ("test", 3)):
            for label in "abcd":
                for k in range(count):
                    seed = 100 * ord(label) + k + (domain == "sun")
                    write(tmp_path / "photos" / domain / part / label / f"{k}.jpg", side=9 + k, seed=seed)
    return tmp_path / "photos"


@pytest.fixture
def rows(photos: Path, tmp_path: Path) -> Callable[..., bytes]:
    """Run with some options and return accuracy.csv."""

    def accuracy(name: str, *options: str) -> bytes:
        run(tmp_path / name, *FILES, f"dataset.root={photos / 'sun'}", *options)
        return (tmp_path / name / "accuracy.csv").read_bytes()

    return accuracy


def test_results_do_not_depend_on_workers_memory_or_cache(rows: Callable[..., bytes]) -> None:
    first = rows("plain", "method=er", "method.capacity=8")
    for k, options in enumerate(
        (
            ("hardware.workers=2",),
            ("dataset.images.memory=0",),
            ("dataset.images.cache=true",),
            ("dataset.images.cache=true", "hardware.workers=2"),
        )
    ):
        assert rows(f"run{k}", "method=er", "method.capacity=8", *options) == first


def test_a_resumed_run_ends_as_an_uninterrupted_one(
    rows: Callable[..., bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = rows("whole", "hardware.workers=2")
    saved, save = [], checkpoint.save

    def dying(*args: Any, **options: Any) -> None:
        save(*args, **options)
        saved.append(1)
        if len(saved) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        rows("stopped")
    assert rows("stopped", "hardware.workers=1", "dataset.images.cache=true") == whole
    assert "resumed after 1 tasks" in json.loads((tmp_path / "stopped" / "run.json").read_text())["notes"]


def test_frozen_features_joint_training_and_domains(photos: Path, tmp_path: Path) -> None:
    domains = ("dataset=folder_domains", "dataset.images.size=8", f"dataset.root={photos}")
    domains += ("scenario=dataset_sequence", "scenario.setting=dil", "backbone=mlp", "budget.epochs=1")
    for method in ("simplecil", "joint"):
        run(tmp_path / method, *domains, f"method={method}", "hardware.workers=1")
        found = cells(tmp_path / method, "dil")
        assert set(found) == {(1, 0), (2, 0), (2, 1)} and {total for _, total in found.values()} == {12}
        names = json.loads((tmp_path / method / "run.json").read_text())["task_names"]
        assert names == ["rain", "sun"]


def test_what_the_data_said_is_kept_in_the_results(rows: Callable[..., bytes], photos: Path, tmp_path: Path) -> None:
    (photos / "sun" / "train" / "a" / "notes.txt").touch()
    rows("noted")
    [note] = json.loads((tmp_path / "noted" / "run.json").read_text())["notes"]
    assert note.startswith("sun: 1 files are left out because their names are not those of images: ")


def test_warnings_about_data_are_printed_on_one_line() -> None:
    assert _warning(DataWarning("no test images"), DataWarning, "a.py", 3) == "clrun: warning: no test images\n"
    assert _warning("old", DeprecationWarning, "a.py", 3) == "a.py:3: DeprecationWarning: old\n"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_ends_the_run_with_its_name(rows: Callable[..., bytes], photos: Path, workers: int) -> None:
    (photos / "sun" / "test" / "b" / "1.jpg").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="sun/test/b/1.jpg: cannot be decoded"):
        rows("damaged", f"hardware.workers={workers}")


def test_the_name_of_the_data_and_not_its_place_is_part_of_a_runs_identity(photos: Path) -> None:
    def identity(*options: str) -> str:
        return config_hash(quiet(*FILES, *options)[0])

    here, there = f"dataset.root={photos / 'sun'}", f"dataset.root={photos / 'rain'}"
    assert identity(here) != identity(there)
    assert identity(here, "dataset.name=mine") == identity(there, "dataset.name=mine")
    assert slug([here]) != slug([there]) and slug(["dataset.images.memory=1"]) == slug([])
    published = [identity("dataset=cub200", f"dataset.root={root}", "dataset.images.cache=x") for root in "ab"]
    assert published[0] == published[1] == identity("dataset=cub200")


@pytest.mark.slow
def test_two_processes_share_the_images(rows: Callable[..., bytes]) -> None:
    whole = rows("one", "dataset.images.cache=true")
    shared = rows("two", "dataset.images.cache=true", "hardware=ddp", "hardware.processes=2", "hardware.workers=1")
    assert os.environ["CLRUN_CACHE"] and len(whole.splitlines()) == len(shared.splitlines())
