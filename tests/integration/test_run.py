"""One run end to end on the embedded data: its files, its determinism, and the options of a job."""

import csv
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from running import cells, run, run_interrupted
from safetensors.torch import load_file

from clrun.cli import main
from clrun.results.metrics import UNSEEN, AccuracyMatrix, average_accuracy
from clrun.results.records import RunRecord
from clrun.system import files
from clrun.system.errors import ConfigError
from clrun.system.locks import locked

ROOT = Path(__file__).parents[2]
SHORT = ("job.max_tasks=3", "budget.epochs=1")


def test_the_default_run_learns(tmp_path: Path) -> None:
    value = run(tmp_path / "er")
    assert value >= 0.85
    finetune = run(tmp_path / "finetune", "method=finetune")
    joint = run(tmp_path / "joint", "method=joint")
    assert finetune < value <= joint + 0.02


def test_files_of_a_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    value = run(out, "method=ewc", "task_order=reverse", "job.picture=true", "job.save_predictions=final", *SHORT)
    names = {"config.yaml", "run.json", "accuracy.csv", "metrics.jsonl", "clrun.log", "accuracy_matrix.png"}
    assert {p.name for p in out.iterdir()} == names | {"predictions.csv"}
    stored = json.loads((out / "run.json").read_text())
    assert (stored["schema"], stored["status"], stored["seed"], stored["task_order"]) == (1, "completed", 0, [4, 3, 2])
    assert stored["class_order"] == list(range(10))
    assert stored["config"] == yaml.safe_load((out / "config.yaml").read_text())
    assert stored["config"]["method"]["_target_"] == "clrun.methods.ewc.Ewc"
    keys = "average_accuracy average_incremental_accuracy forgetting backward_transfer forward_transfer"
    assert set(stored["metrics"]["cil"]) == {*keys.split(), "learning_accuracy", "worst_task", "accuracy_at_5", *UNSEEN}
    assert stored["metrics"]["cil"]["average_accuracy"] == value
    assert stored["metrics"]["cil"]["forward_transfer"] is None
    matrix = stored["accuracy_matrix"]["cil"]
    assert [[cell is None for cell in row] for row in matrix] == [[j > i for j in range(3)] for i in range(3)]
    assert sum(matrix[-1]) / 3 == pytest.approx(value, abs=1e-12)
    cost = stored["cost"]
    assert [task["task"] for task in cost["tasks"]] == [4, 3, 2]
    for name in ("train_seconds", "eval_seconds", "images_per_second", "peak_memory_bytes"):
        assert all(task[name] > 0 for task in cost["tasks"]), name
    parameters = cost["parameters"]["total"]
    assert cost["state_bytes"]["penalty"] == 2 * (cost["state_bytes"]["backbone"]), "importance and anchor"
    assert cost["state_bytes"]["backbone"] + 4 * (256 * 10 + 10) == 4 * parameters
    assert cost["flops_per_image"] > 100_000
    assert {"python", "torch", "timm", "git_commit", "threads", "device"} <= set(stored["versions"])
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {"task", "phase", "step", "loss", "lr"} <= set(records[0])
    with (out / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    final = cells(out)
    for task in (4, 3, 2):
        right = sum(r["label"] == r["cil"] for r in rows if int(r["task"]) == task)
        assert (right, sum(int(r["task"]) == task for r in rows)) == final[3, task]
    record = RunRecord.load(out)
    assert average_accuracy(record.matrices["test", "cil"]) == value
    assert isinstance(record.matrices["test", "til"], AccuracyMatrix)


def test_the_same_command_twice_is_the_same_run(tmp_path: Path) -> None:
    options = ("method=der", "method.beta=0.5", "dataset.augment=[crop]", "job.save_model=true", *SHORT)
    for name in ("a", "b"):
        run(tmp_path / name, *options)
    assert (tmp_path / "a" / "accuracy.csv").read_bytes() == (tmp_path / "b" / "accuracy.csv").read_bytes()
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    run(tmp_path / "c", *options, "seed=1")
    c = load_file(tmp_path / "c" / "model.safetensors")
    assert not torch.equal(a["head.weight"], c["head.weight"])


@pytest.mark.parametrize("method", ["apd", "halrp"])
def test_weights_that_tasks_share_are_saved_whatever_their_order_in_memory(tmp_path: Path, method: str) -> None:
    short = ("scenario.setting=til", "job.max_tasks=2", "job.max_steps=1", "hardware.channels_last=true")
    run(tmp_path, f"method={method}", "job.save_model=true", *short)
    saved = load_file(tmp_path / "model.safetensors")
    assert any(tensor.dim() == 4 for tensor in saved.values())


def test_the_four_seeds_are_independent(tmp_path: Path) -> None:
    base = ("method=finetune", "task_order=random", "scenario.class_seed=0", "dataset.val_fraction=0.1", *SHORT)

    def facts(*options: str) -> dict[str, object]:
        out = tmp_path / "-".join(options or ("base",))
        run(out, *base, *options, "job.save_model=true", "job.max_tasks=5")
        stored = json.loads((out / "run.json").read_text())
        names = ("task_order", "class_order")
        return {name: stored[name] for name in names} | {
            "weights": load_file(out / "model.safetensors")["head.bias"].tolist()
        }

    reference = facts()
    for option, changed in (
        ("seed=5", set()),
        ("task_order.seed=5", {"task_order"}),
        ("scenario.class_seed=5", {"class_order"}),
    ):
        other = facts(option)
        assert {k for k in ("task_order", "class_order") if other[k] != reference[k]} == changed, option
        assert other["weights"] != reference["weights"]
    assert facts("dataset.seed=5")["task_order"] == reference["task_order"]


def test_forward_transfer_and_evaluation_within_tasks(tmp_path: Path) -> None:
    dil = ("scenario=domain_shift", "scenario.n_tasks=3", "budget.epochs=1", "method=finetune")
    run(tmp_path / "run", *dil, "job.eval_initial=true", "job.eval_every=20")
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    assert set(stored["metrics"]) == {"dil"}
    with (tmp_path / "run" / "accuracy.csv").open() as file:
        rows = list(csv.DictReader(file))
    accuracy = {
        (int(r["position"]), int(r["task"])): int(r["correct"]) / int(r["total"]) for r in rows if r["phase"] == "end"
    }
    expected = sum(accuracy[t, t] - accuracy[0, t] for t in (1, 2)) / 2
    assert stored["metrics"]["dil"]["forward_transfer"] == pytest.approx(expected, abs=1e-12)
    during = [r for r in rows if r["phase"] == "during"]
    assert during and all(int(r["step"]) % 20 == 0 for r in during)
    plain = run(tmp_path / "plain", *dil)
    assert cells(tmp_path / "plain", "dil")[3, 0] == cells(tmp_path / "run", "dil")[3, 0], "looking changes nothing"
    assert plain == stored["metrics"]["dil"]["average_accuracy"]


def test_a_complete_run_is_shown_and_left_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ("method=finetune", *SHORT, "job.progress=true")
    value = run(tmp_path / "run", *options)
    table = capfd.readouterr().out
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "run").iterdir()}
    assert run(tmp_path / "run", *options) == value
    again = capfd.readouterr().out
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "run").iterdir()}
    line = next(line for line in table.splitlines() if line.startswith("average accuracy"))
    assert line in again.splitlines()


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    with locked(out / "lock"), pytest.raises(ConfigError, match="in use by process"):
        run(out, "method=finetune", *SHORT)
    assert not (out / "accuracy.csv").exists()


FAST = ("method=finetune", "job.max_tasks=2", "job.max_steps=2", "job.max_eval_rows=8")


def failing_to_build(error: BaseException) -> pytest.MonkeyPatch:
    """Let every backbone raise `error` as long as the returned patch is not undone."""
    patch = pytest.MonkeyPatch()

    def check_features(*_: object) -> None:
        raise error

    patch.setattr("clrun.running.build.check_features", check_features)
    return patch


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), ConfigError("a mistake"), KeyboardInterrupt()])
@pytest.mark.parametrize("state", ["completed", "interrupted"])
def test_a_rerun_that_fails_to_build_leaves_the_results_alone(tmp_path: Path, error: BaseException, state: str) -> None:
    out = tmp_path / "run"
    if state == "completed":
        run(out, *FAST)
    else:
        run_interrupted(out, *FAST)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.name != "clrun.log"}
    patch = failing_to_build(error)
    with pytest.raises(type(error)):
        run(out, *FAST, *(["job.resume=false"] if state == "completed" else []))
    patch.undo()
    assert before == {path.name: path.read_bytes() for path in out.iterdir() if path.name != "clrun.log"}
    run(out, *FAST)
    assert json.loads((out / "run.json").read_text())["status"] == "completed"


def test_a_rerun_beside_a_running_one_is_refused_before_it_builds_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_interrupted(out, *FAST)
    with locked(out / "lock"):
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        patch = failing_to_build(ZeroDivisionError("a bug"))
        with pytest.raises(ConfigError, match="in use by process"):
            run(out, *FAST)
        patch.undo()
        assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_first_run_that_fails_to_build_says_so(tmp_path: Path) -> None:
    patch = failing_to_build(ZeroDivisionError("a bug"))
    for _ in range(2):  # again: there are no results to be kept
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "run", *FAST)
    patch.undo()
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (stored["status"], stored["error"]) == ("failed", "ZeroDivisionError: a bug")
    assert (tmp_path / "run" / "clrun.log").read_text().count("ZeroDivisionError: a bug") == 2


@pytest.mark.parametrize(("method", "trainable"), [("simplecil", 0), ("linear_probe", 970), ("ranpac method.m=50", 0)])
def test_a_frozen_backbone_has_no_trainable_parameters(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], method: str, trainable: int
) -> None:
    options = (*f"method={method}".split(), "backbone=glyph_vit", *FAST[1:])
    run(tmp_path / "run", *options)
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    assert stored["cost"]["parameters"]["trainable"] == trainable
    assert stored["backbone"]["trainable"] == 0
    assert stored["cost"]["parameters"]["total"] >= stored["backbone"]["total"] == 379_968
    assert all(task["parameters"]["trainable"] == trainable for task in stored["cost"]["tasks"])
    assert stored["cost"]["tasks"][-1]["parameters"]["total"] == stored["cost"]["parameters"]["total"]
    capfd.readouterr()
    run(tmp_path / "dry", *options, "job.mode=dry_run")
    total = stored["cost"]["parameters"]["total"]
    assert f"parameters: {total:,} ({trainable:,} trainable)" in capfd.readouterr().out


def predictions(out: Path) -> list[dict[str, str]]:
    with (out / "predictions.csv").open() as file:
        return list(csv.DictReader(file))


def test_predictions_and_logits_after_each_task(tmp_path: Path) -> None:
    options = ("method=finetune", "task_order=reverse", *SHORT, "job.max_steps=20", "job.max_eval_rows=30")
    wanted = ("job.save_predictions=each_task", "job.save_logits=each_task")
    run(tmp_path / "none", *options)
    run(tmp_path / "run", *options, *wanted)
    run_interrupted(tmp_path / "stopped", *options, *wanted)
    run(tmp_path / "stopped", *options, *wanted)
    names = ["accuracy.csv", "predictions.csv", *(f"logits/after_{n}.npz" for n in (1, 2, 3))]
    for name in names:
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()
    assert (tmp_path / "none" / "accuracy.csv").read_bytes() == (tmp_path / "run" / "accuracy.csv").read_bytes()
    assert not (tmp_path / "none" / "predictions.csv").exists() and not (tmp_path / "none" / "logits").exists()
    rows = predictions(tmp_path / "run")
    assert list(rows[0]) == ["position", "task", "row", "label", "cil", "til"]
    for (position, task), (correct, total) in cells(tmp_path / "run").items():
        own = [row for row in rows if (int(row["position"]), int(row["task"])) == (position, task)]
        assert (sum(row["label"] == row["cil"] for row in own), len(own)) == (correct, total)
    for position in (1, 2, 3):
        own = [row for row in rows if int(row["position"]) == position]
        with numpy.load(tmp_path / "run" / "logits" / f"after_{position}.npz") as stored:
            assert stored["classes"].tolist() == list(range(10 - 2 * position, 10))
            for name in ("task", "row", "label"):
                assert stored[name].tolist() == [int(row[name]) for row in own]
            assert stored["logits"].dtype == numpy.float32
            best = stored["classes"][stored["logits"].argmax(axis=1)]
        assert best.tolist() == [int(row["cil"]) for row in own]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "a flipped bit of a prediction": lambda data: data[:-8] + bytes([data[-8] ^ 1]) + data[-7:],
    "a flipped bit of the position": lambda data: data.replace(b"\n1,", b"\n3,", 1),
    "bytes that are no text": lambda data: data[:60] + b"\xff\xfe\n" + data[60:],
    "a lost line": lambda data: data[: data.index(b"\n", 60)] + data[data.index(b"\n", 90) :],
    "a cut": lambda data: data[: len(data) // 3],
    "nothing left": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_predictions_are_not_gone_on_with(
    damage: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("method=finetune", "job.max_tasks=2", "job.max_steps=1", "job.max_eval_rows=9")
    options += ("job.save_predictions=each_task",)
    run_interrupted(tmp_path / "run", *options)
    file = tmp_path / "run" / "predictions.csv"
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert file.read_bytes() != whole
    with pytest.raises(ConfigError, match="predictions.csv: is no longer what the run has written; move it") as raised:
        run(tmp_path / "run", *options)
    assert "\n" not in str(raised.value)
    file.rename(tmp_path / "away")
    run(tmp_path / "run", *options)
    assert {row["position"] for row in predictions(tmp_path / "run")} == {"2"}
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    assert stored["status"] == "completed" and any("after 1 tasks are missing" in note for note in stored["notes"])


def test_predictions_of_an_unfinished_task_are_written_anew(tmp_path: Path) -> None:
    options = ("method=finetune", "job.max_tasks=2", "job.max_steps=1", "job.max_eval_rows=9")
    options += ("job.save_predictions=each_task", "job.save_logits=each_task")
    run(tmp_path / "whole", *options)
    run_interrupted(tmp_path / "run", *options)
    with (tmp_path / "run" / "predictions.csv").open("ab") as file:
        file.write(b"2,0,0,0,\xff")  # torn by a kill
    for name in ("after_x.npz", "after_99999999999999999999.npz"):
        (tmp_path / "run" / "logits" / name).write_bytes(b"of somebody else")
    (tmp_path / "run" / "logits" / "after_7.npz").mkdir()
    run(tmp_path / "run", *options)
    for name in ("predictions.csv", "logits/after_1.npz", "logits/after_2.npz"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_logits_are_not_removed_through_a_link(tmp_path: Path) -> None:
    options = ("method=finetune", "job.max_tasks=2", "job.max_steps=1", "job.save_predictions=each_task")
    run_interrupted(tmp_path / "run", *options)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "after_2.npz").write_bytes(b"mine")
    (tmp_path / "run" / "logits").symlink_to(tmp_path / "home")
    with pytest.raises(ConfigError, match="logits: is a symbolic link"):
        run(tmp_path / "run", *options)
    assert (tmp_path / "home" / "after_2.npz").read_bytes() == b"mine"


def test_final_predictions_also_of_a_run_that_had_all_but_ended_without_them(tmp_path: Path) -> None:
    options = ("method=finetune", "job.max_tasks=1", "job.max_steps=2", "job.max_eval_rows=8")
    run(tmp_path / "run", *options, "job.save_predictions=final", "job.save_logits=final")
    run_interrupted(tmp_path / "stopped", *options)  # at the checkpoint of the last task
    run(tmp_path / "stopped", *options, "job.save_predictions=final", "job.save_logits=final")
    for name in ("predictions.csv", "logits/after_1.npz"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()
    run_interrupted(tmp_path / "late", *options)
    run(tmp_path / "late", *options, "job.save_logits=each_task")
    notes = json.loads((tmp_path / "late" / "run.json").read_text())["notes"]
    assert any(note.startswith("job.save_logits=each_task: those after 1 tasks are missing") for note in notes)


@pytest.mark.parametrize("failing", ["replace", "write"])
def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    out, options = tmp_path / "run", ("method=finetune", *SHORT)
    run(tmp_path / "whole", *options)
    calls = 0
    replace, append = os.replace, files.append_text

    def full(*args: object, **folders: int) -> None:
        nonlocal calls
        calls += 1
        if calls > (6 if failing == "replace" else 2):
            raise OSError(28, "No space left on device")
        (replace if failing == "replace" else append)(*args, **folders)  # type: ignore[arg-type, call-arg]

    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="No space left on device") as error:
        if failing == "replace":
            patch.setattr("clrun.system.files.os.replace", full)
        else:
            patch.setattr("clrun.results.records.append_text", lambda path, text: _written(path, text, full))
        run(out, *options)
    assert len(str(error.value).splitlines()) == 1
    assert json.loads((out / "run.json").read_text())["status"] in ("running", "failed")
    run(out, *options)
    assert (out / "accuracy.csv").read_bytes() == (tmp_path / "whole" / "accuracy.csv").read_bytes()


def _written(path: Path, text: str, write) -> None:
    """Append as `clrun.system.files.append_text` does, with its way of reporting."""
    with files.writing(path):
        write(path, text)


def test_dry_run_trains_and_writes_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "run", "job=dry_run", "job.progress=true")
    out = capfd.readouterr().out
    assert "5 tasks, 10 classes, setting cil" in out
    assert "parameters: 21,578" in out
    for word in ("FLOPs", "estimated time", "2. task 1 2/3"):
        assert word in out
    assert not (tmp_path / "run").exists()


def test_without_a_terminal_one_line_a_task_and_silence_on_request(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "a", "method=finetune", *SHORT, "job.progress=true")
    out, err = capfd.readouterr()
    assert [line.split()[0] for line in out.splitlines() if line[:2] in ("1/", "2/", "3/")] == ["1/3", "2/3", "3/3"]
    assert err == ""
    assert out.splitlines()[-1] == f"results: {tmp_path / 'a'}"
    assert (tmp_path / "a" / "clrun.log").read_text() == out
    run(tmp_path / "b", "method=finetune", *SHORT, "job.progress=false")
    assert capfd.readouterr() == ("", "")


def test_smoke_never_passes_for_the_whole_run(tmp_path: Path) -> None:
    run(tmp_path / "run", "method=finetune", "job=smoke")
    with pytest.raises(ConfigError, match=r"job\.max_eval_rows, job\.max_steps, job\.max_tasks differ"):
        run(tmp_path / "run", "method=finetune")


USER_METHOD = '''
"""Finetuning that forgets even faster."""

from clrun.learning.method import Method


class Mine(Method):
    def __init__(self, backbone, num_classes, *, factor: float):
        super().__init__(backbone, num_classes)
        self.factor = factor

    def loss(self, batch, ctx):
        return self.factor * super().loss(batch, ctx)
'''


def test_a_method_in_a_package_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").touch()
    (tmp_path / "my_package" / "mine.py").write_text(USER_METHOD)
    (tmp_path / "my_conf" / "method").mkdir(parents=True)
    (tmp_path / "my_conf" / "method" / "mine.yaml").write_text(
        "# Mine\n_target_: my_package.mine.Mine\n_partial_: true\nfactor: 2.0\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as end:
        main(["--config-dir", "my_conf", "method=mine", "method.factor=3", "job=smoke", "hydra.run.dir=out"])
    assert end.value.code == 0
    stored = json.loads(Path("out/run.json").read_text())
    assert stored["config"]["method"] == {"_target_": "my_package.mine.Mine", "_partial_": True, "factor": 3}
    with pytest.raises(SystemExit) as end:
        main(["--config-dir", "my_conf", "method=mine", "method.factro=3"])
    assert end.value.code == 2


def test_the_wheel_holds_the_configuration_and_runs_anywhere(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True, capture_output=True)
    wheel = next(tmp_path.glob("clrun-*.whl"))
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    assert (tmp_path / "site" / "clrun" / "conf" / "method" / "er.yaml").is_file()
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "PYTHONPATH": str(tmp_path / "site")
    }
    show = [sys.executable, "-P", "-m", "clrun", "--cfg", "job", "method=ewc"]
    done = subprocess.run(show, env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert yaml.safe_load(done.stdout)["method"]["_target_"] == "clrun.methods.ewc.Ewc"


def test_no_timm_without_a_timm_backbone(tmp_path: Path) -> None:
    script = (
        "import sys; from clrun.cli import main\n"
        f"try: main(['job=smoke', 'backbone=cnn', 'hydra.run.dir={tmp_path / 'out'}'])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(sorted({'timm', 'torchvision'} & set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
