"""A run knows its data: it goes on only with the data that it has learned from, and says when they have changed."""

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pictures import write
from running import run, run_interrupted

from clrun.api import load
from clrun.reporting import refresh
from clrun.reporting.sweep import sweep_table
from clrun.results.schema import run_problem
from clrun.running import checkpoint_file
from clrun.running.data_checks import _is_there
from clrun.running.engine import Engine
from clrun.system.checksums import RULE
from clrun.system.errors import ConfigError, DataWarning

pytestmark = pytest.mark.records  # files, and bits of runs of one layout

CLASSES = ("ant", "cat", "dog")
OPTIONS = ("dataset=folder", "dataset.name=photos", "dataset.images.size=8", "scenario.n_tasks=3", "backbone=mlp")
OPTIONS += ("budget.epochs=1", "method=er", "method.capacity=8")


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """train/ and test/ of three classes."""
    monkeypatch.setenv("CLRUN_CACHE", str(tmp_path / "cache"))
    for part, count in (("train", 6), ("test", 3)):
        for label in CLASSES:
            for k in range(count):
                write(tmp_path / "photos" / part / label / f"{k}.png", side=8, seed=100 * ord(label[0]) + k)
    return tmp_path / "photos"


def truncate(file: Path) -> bytes:
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    return whole


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


@pytest.fixture
def stopped(photos: Path, tmp_path: Path) -> tuple[Path, bytes]:
    """A run that has learned two of three tasks and met a damaged file in the third; the file as it should be."""
    whole = truncate(photos / "train" / "dog" / "3.png")
    with pytest.raises(ConfigError, match="3.png: cannot be decoded"):
        run(tmp_path / "run", *OPTIONS, f"dataset.root={photos}", "dataset.images.memory=0")
    assert record(tmp_path / "run")["status"] == "failed"
    return tmp_path / "run", whole


def test_a_file_that_was_repaired_before_it_was_used_is_no_obstacle(
    stopped: tuple[Path, bytes], photos: Path, tmp_path: Path
) -> None:
    out, whole = stopped
    (photos / "train" / "dog" / "3.png").write_bytes(whole)
    run(out, *OPTIONS, f"dataset.root={photos}", "dataset.images.memory=0")
    assert record(out)["status"] == "completed"
    assert any("before this run learned from them" in n and "train/dog/3.png" in n for n in record(out)["notes"])
    run(tmp_path / "whole", *OPTIONS, f"dataset.root={photos}")
    assert record(out)["data"] == record(tmp_path / "whole")["data"]
    assert (out / "accuracy.csv").read_bytes() == (tmp_path / "whole" / "accuracy.csv").read_bytes()


def rename(root: Path) -> None:
    for part in ("train", "test"):
        (root / part / "dog").rename(root / part / "bee")


def add(root: Path) -> None:
    for part in ("train", "test"):
        shutil.copytree(root / part / "cat", root / part / "eel")


def remove_tests(root: Path) -> None:
    (root / "test" / "dog" / "0.png").unlink()


def change_learned(root: Path) -> None:
    write(root / "train" / "ant" / "3.png", side=8, seed=1)


def change_test(root: Path) -> None:
    write(root / "test" / "ant" / "1.png", side=8, seed=1)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (rename, "class dog is now called bee"),
        (add, "1 class added \\(eel\\)"),
        (remove_tests, "1 test row gone \\(test/dog/0.png\\)"),
        (change_learned, "contents of 2 training rows changed \\(train/ant/3.png, train/dog/3.png\\)"),
        (change_test, "contents of 1 test row changed \\(test/ant/1.png\\)"),
    ],
)
def test_a_run_does_not_go_on_with_other_data(
    edit: Callable[[Path], None], words: str, stopped: tuple[Path, bytes], photos: Path
) -> None:
    out, whole = stopped
    (photos / "train" / "dog" / "3.png").write_bytes(whole)
    edit(photos)
    before = files(out)
    with pytest.raises(ConfigError, match=words) as raised:
        run(out, *OPTIONS, f"dataset.root={photos}", "dataset.images.memory=0")
    assert "\n" not in str(raised.value) and "hydra.run.dir" in str(raised.value)
    assert files(out) == before


def test_data_may_move(stopped: tuple[Path, bytes], photos: Path, tmp_path: Path) -> None:
    out, whole = stopped
    (photos / "train" / "dog" / "3.png").write_bytes(whole)
    moved = photos.rename(tmp_path / "elsewhere")
    run(out, *OPTIONS, f"dataset.root={moved}")
    assert record(out)["status"] == "completed"


def test_a_file_that_changes_during_a_run_stops_it(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, file = tmp_path / "run", photos / "train" / "cat" / "0.png"
    run(tmp_path / "whole", *OPTIONS, f"dataset.root={photos}")
    train, whole = Engine.train, file.read_bytes()

    def training(self: Engine, method: Any, ctx: Any) -> float:
        seconds = train(self, method, ctx)
        if ctx.task.index == 1:
            write(file, side=8, seed=1)
        return seconds

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "train", training)
        with pytest.raises(ConfigError, match="1 file has changed .*train/cat/0.png.*goes on after 1 tasks"):
            run(out, *OPTIONS, f"dataset.root={photos}")
    assert record(out)["status"] == "failed" and len(record(out)["cost"]["tasks"]) == 1
    file.write_bytes(whole)
    run(out, *OPTIONS, f"dataset.root={photos}")
    assert (out / "accuracy.csv").read_bytes() == (tmp_path / "whole" / "accuracy.csv").read_bytes()


def test_rows_in_memory_that_change_during_a_run_stop_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("dataset=synthetic", "scenario.n_tasks=3", "backbone=mlp", "job.max_steps=2")
    train, changed = Engine.train, []

    def training(self: Engine, method: Any, ctx: Any) -> float:
        seconds = train(self, method, ctx)
        if ctx.task.index == 1:
            changed.append((ctx.task.train.images, ctx.task.train.rows[:2]))
            ctx.task.train.images[ctx.task.train.rows[:2]] += 1
        return seconds

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "train", training)
        with pytest.raises(ConfigError, match="2 training rows in memory.*work on copies.*goes on after 1 tasks"):
            run(tmp_path / "run", *options)
    assert record(tmp_path / "run")["status"] == "failed"
    [(images, rows)] = changed
    images[rows] -= 1  # the data set is kept within the process
    run(tmp_path / "run", *options)
    assert record(tmp_path / "run")["status"] == "completed"


def test_a_complete_run_says_that_its_data_have_changed(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (*OPTIONS, f"dataset.root={photos}", "job.progress=true")
    run(tmp_path / "run", *options)
    before = files(tmp_path / "run")
    capsys.readouterr()
    run(tmp_path / "run", *options)
    assert "the data have changed" not in capsys.readouterr().out
    remove_tests(photos)
    run(tmp_path / "run", *options)
    assert "the data have changed since this run: 1 test row gone (of class dog)" in capsys.readouterr().out
    assert files(tmp_path / "run") == before


def test_a_run_does_not_go_on_from_another_one_with_other_data(photos: Path, tmp_path: Path) -> None:
    options = (*SWEPT, f"dataset.root={photos}")
    run(tmp_path / "short", *options, "job.max_tasks=1", "job.keep_checkpoint=true")
    change_learned(photos)
    with pytest.raises(ConfigError, match="train/ant/3.png.*put them back, or leave out job.start_from to begin"):
        run(tmp_path / "long", *options, f"job.start_from={tmp_path / 'short'}")
    assert not (tmp_path / "long" / "run.json").exists()
    run(tmp_path / "long", *options)
    assert record(tmp_path / "long")["status"] == "completed"


def test_a_run_from_before_data_were_recorded_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("method=er", "method.capacity=8", "budget.epochs=1", "job.max_tasks=2", "job.max_steps=3")
    with monkeypatch.context() as patch:
        patch.setattr("clrun.running.recorder.stored_identity", lambda data: None)
        run_interrupted(tmp_path / "run", *options)
    run(tmp_path / "run", *options)
    assert record(tmp_path / "run")["status"] == "completed"
    assert any("before clrun recorded the data" in note for note in record(tmp_path / "run")["notes"])
    assert record(tmp_path / "run")["data"]["train"]["rows"] > 0


def swap(root: Path) -> None:
    for part in ("train", "test"):
        (root / part / "dog").rename(root / part / "abc")


@pytest.mark.parametrize(
    ("kept", "edit", "words"),
    [
        ("job.keep_checkpoint=true", add, "1 class added \\(eel\\)"),
        ("job.save_model=true", swap, "dog is now called abc"),
    ],
)
def test_a_trained_method_does_not_predict_for_other_classes(
    kept: str, edit: Callable[[Path], None], words: str, photos: Path, tmp_path: Path
) -> None:
    run(tmp_path / "run", *SWEPT, f"dataset.root={photos}", kept)
    edit(photos)
    with pytest.raises(ConfigError, match=f"classes of the data are no longer those .*{words}.*read as other classes"):
        load(tmp_path / "run").learner()


def test_a_trained_method_says_that_rows_have_changed(photos: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", *SWEPT, f"dataset.root={photos}", "job.keep_checkpoint=true")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = load(tmp_path / "run").learner().predict(photos / "test" / "cat" / "1.png").labels
    remove_tests(photos)
    with pytest.warns(DataWarning, match="the data have changed since this run: 1 test row gone"):
        learner = load(tmp_path / "run").learner()
    assert learner.predict(photos / "test" / "cat" / "1.png").labels == before


def older(folder: Path) -> None:
    """Change a stopped run into one of a version of clrun that digested data in another way."""
    file = folder / "checkpoint.pt"
    header, method = checkpoint_file.read(file)
    assert header.data is not None
    names = ("config_hash", "learned", "steps", "rows", "costs", "referenced", "start", "predictions")
    data = copy.deepcopy(header.data)
    del data["record"]["rule"]
    data["record"]["digest"] = data["record"]["train"]["digest"] = "0" * 12
    plain = {name: getattr(header, name) for name in names}
    checkpoint_file.write(file, plain | {"data": data}, [method], flush=False)


def test_a_run_of_another_rule_of_digests_goes_on(stopped: tuple[Path, bytes], photos: Path) -> None:
    out, whole = stopped
    (photos / "train" / "dog" / "3.png").write_bytes(whole)
    older(out)
    run(out, *OPTIONS, f"dataset.root={photos}", "dataset.images.memory=0")
    assert any("digested data in another way" in note for note in record(out)["notes"])
    assert record(out)["data"]["rule"] == RULE


def test_a_run_of_another_rule_of_digests_knows_its_classes(stopped: tuple[Path, bytes], photos: Path) -> None:
    out, whole = stopped
    (photos / "train" / "dog" / "3.png").write_bytes(whole)
    older(out)
    rename(photos)
    with pytest.raises(ConfigError, match="class dog is now called bee"):
        run(out, *OPTIONS, f"dataset.root={photos}", "dataset.images.memory=0")


SWEPT = ("dataset=folder", "dataset.name=photos", "dataset.images.size=8", "scenario.n_tasks=3", "backbone=mlp")
SWEPT += ("budget.epochs=1", "job.max_steps=1")


def sweep(folder: Path, name: str, photos: Path, *options: str) -> None:
    run(folder / name, *SWEPT, f"dataset.root={photos}", *options)


def test_a_report_does_not_compare_runs_on_other_data(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    sweep(out, "a0", photos, "method=finetune")
    sweep(out, "a1", photos, "method=finetune", "seed=1")
    same = refresh(out)
    assert len(same.groups) == 1 and "data" not in same.text and "data" not in sweep_table(same.runs)[0]
    remove_tests(photos)
    sweep(out, "b0", photos, "method=finetune", "seed=2")
    sweep(out, "b1", photos, "method=er", "method.capacity=8", "seed=1")
    other = refresh(out)
    digests = [record(out / name)["data"]["digest"][:6] for name in ("a0", "b0")]
    assert sorted((group.triple[0], group.differing["data"], len(group.runs)) for group in other.groups) == sorted(
        [("finetune", digests[0], 2), ("finetune", digests[1], 1), ("er", digests[1], 1)]
    )
    assert f"from data={digests[0]}" in flat(other.text) and "1 test row gone (of class dog)" in flat(other.text)
    assert {frozenset(entry["methods"]) for entry in other.comparisons} == {
        frozenset({f"finetune data={digests[1]}", f"er data={digests[1]}"})
    }
    assert {entry["group"].partition("data=")[2] for entry in other.robustness} == set(digests)
    header, lines = sweep_table(other.runs)
    assert [line[header.index("data")] for line in lines] == [digests[0], digests[0], digests[1], digests[1]]
    assert f"data={digests[1]}" in (out / "report.html").read_text()


def flat(text: str) -> str:
    return " ".join(text.split())


def test_runs_that_do_not_record_their_data_are_told(photos: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        sweep(tmp_path, name, photos, "method=finetune", f"seed={ord(name)}")
    stored = record(tmp_path / "b")
    del stored["data"]
    (tmp_path / "b" / "run.json").write_text(json.dumps(stored))
    result = refresh(tmp_path)
    assert len(result.groups) == 1 and "1 run from before clrun recorded data (such as b)" in flat(result.text)


def test_a_search_reuses_no_runs_on_other_data(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = tmp_path / "earlier"
    sweep(earlier, "a", photos, "method=finetune")
    options = ("method=finetune", "task_order=adversarial", f"task_order.reuse=[{earlier}]", "job.progress=true")
    sweep(tmp_path, "same", photos, *options, "task_order.budget=1")
    assert [t["reused"] for t in json.loads((tmp_path / "same" / "order_search.json").read_text())["trials"]][0]
    remove_tests(photos)
    sweep(tmp_path, "other", photos, *options, "task_order.budget=1")
    assert "not reused, because its data were others" in capsys.readouterr().out
    trials = json.loads((tmp_path / "other" / "order_search.json").read_text())["trials"]
    assert not any(trial["reused"] for trial in trials)
    with pytest.raises(ConfigError, match="no longer those of this search: 1 test row gone"):
        sweep(tmp_path, "same", photos, *options, "task_order.budget=2")


def test_a_malformed_identity_is_refused(photos: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", *OPTIONS, f"dataset.root={photos}", "job.max_tasks=1")
    stored = record(tmp_path / "run")
    assert run_problem(stored) is None
    for path, value in (
        (("digest",), 3),
        (("classes", "names"), ["ant"]),
        (("train", "by_class", 0), "3"),
        (("test",), []),
        (("per_task",), None),
    ):
        broken = copy.deepcopy(stored)
        place = broken["data"]
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        assert (run_problem(broken) or "").startswith("data.")


def test_malformed_rows_of_a_checkpoint_are_refused(stopped: tuple[Path, bytes], photos: Path) -> None:
    out, whole = stopped
    (photos / "train" / "dog" / "3.png").write_bytes(whole)
    file = out / "checkpoint.pt"
    header, method = checkpoint_file.read(file)
    assert header.data is not None
    good = header.data
    names = ("config_hash", "learned", "steps", "rows", "costs", "referenced", "start")
    for bad in ({}, {"record": 3}, good | {"rows": {"train": {"names": "x"}}}, good | {"rows": 5}):
        plain = {name: getattr(header, name) for name in names}
        checkpoint_file.write(file, plain | {"data": bad}, [method], flush=False)
        with pytest.raises(ConfigError, match="identity of the data in its checkpoint is malformed"):
            run(out, *OPTIONS, f"dataset.root={photos}", "dataset.images.memory=0")


def test_files_left_out_are_found_one_folder_down_and_behind_broken_links(tmp_path: Path) -> None:
    (tmp_path / "dataset" / "train").mkdir(parents=True)
    (tmp_path / "dataset" / "train" / "a.png").write_bytes(b"cut off")
    (tmp_path / "link.png").symlink_to("nowhere")
    assert _is_there(str(tmp_path), "train/a.png") and _is_there(str(tmp_path), "link.png")
    assert not _is_there(str(tmp_path), "train/b.png") and not _is_there(str(tmp_path / "gone"), "train/a.png")
