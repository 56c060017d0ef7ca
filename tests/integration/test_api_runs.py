"""Runs, sweeps and learners from Python: as on the command line, and nothing of the process is left changed."""

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import clrun
from clrun.api import ConfigError, Method, load, load_sweep, run, sweep
from clrun.results.metrics import METRICS

pytestmark = pytest.mark.records  # files, and bits of runs of one layout

ROOT = Path(__file__).parents[2]
SMALL = {"backbone": "cnn", "hardware": {"threads": 1}, "progress": False}
SHORT = {"max_tasks": 2, "max_steps": 3, "picture": False}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    options = {"save_predictions": "final", **SHORT}
    return run("method=er", folder=tmp_path_factory.mktemp("api") / "run", job=options, **SMALL)


# --- results


def test_a_run_says_what_its_files_say(done):
    stored = json.loads((done.folder / "run.json").read_text())
    assert done.status == "completed" and done.error == "" and done.setting == "cil" and done.seed == 0
    assert list(done.order) == stored["task_order"] and [t.name for t in done.tasks] == stored["task_names"]
    assert done.metrics == stored["metrics"] and done.settings == ("cil", "til")
    assert done.config == stored["config"]
    for setting, matrix in stored["accuracy_matrix"].items():
        frame = done.accuracy(setting)
        expected = np.array([[np.nan if x is None else x for x in row] for row in matrix])
        np.testing.assert_array_equal(frame.to_numpy(), expected)
        assert list(frame.index) == list(frame.columns) == stored["task_names"]
    assert done.accuracy().equals(done.accuracy("cil"))
    assert list(done.metrics_frame().columns) == list(METRICS) and list(done.metrics_frame().index) == ["cil", "til"]
    assert list(done.cost_frame()["task"]) == stored["task_order"]
    assert done.cost.parameters == stored["cost"]["parameters"]["total"]
    assert done.cost.train_seconds == pytest.approx(stored["cost"]["train_seconds"])
    assert len(done.training_log()) == len((done.folder / "metrics.jsonl").read_text().splitlines())
    with pytest.raises(ConfigError, match=r"no accuracies in the setting 'dil' \(measured: cil, til\)"):
        done.accuracy("dil")


def test_loading_gives_the_same_run(done):
    again = load(str(done.folder))
    assert again.metrics == done.metrics and again.order == done.order and again.cost == done.cost


def test_a_completed_folder_is_read_and_another_configuration_refused(done):
    written = (done.folder / "run.json").read_bytes()
    again = run("method=er", folder=done.folder, job=SHORT, **SMALL)
    assert again.metrics == done.metrics and (done.folder / "run.json").read_bytes() == written
    with pytest.raises(ConfigError, match="holds a run of another configuration"):
        run("method=er", folder=done.folder, job=SHORT, seed=1, **SMALL)


def test_a_failed_run_can_be_loaded(tmp_path, monkeypatch):
    def broken(self, task, ctx):
        raise RuntimeError("no more")

    monkeypatch.setattr("clrun.methods.finetune.Finetune.end_task", broken)
    with pytest.raises(RuntimeError, match="no more"):
        run("method=finetune", folder=tmp_path / "run", job=SHORT, **SMALL)
    found = load(tmp_path / "run")
    assert (
        found.status == "failed" and "no more" in found.error and found.settings == ("cil", "til") or not found.settings
    )
    with pytest.raises(ConfigError, match="no accuracies in the setting 'cil' .* its status is failed"):
        found.accuracy()
    with pytest.raises(ConfigError, match=r"holds no trained method .* job\.keep_checkpoint=true"):
        found.learner()


def test_an_interrupted_run_is_loaded_and_its_learner_knows_the_first_task(tmp_path, monkeypatch):
    from clrun.methods.finetune import Finetune

    learn = Finetune.learn

    def stopping(self, task, ctx):
        if task.index == 1:
            raise KeyboardInterrupt
        learn(self, task, ctx)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Finetune, "learn", stopping)
        run("method=finetune", folder=tmp_path / "run", job=SHORT, **SMALL)
    found = load(tmp_path / "run")
    learner = found.learner()
    assert found.status == "interrupted" and learner.tasks == ("0/1",)
    labels, probabilities = learner.predict(learner.test_images(0)[0])
    assert set(labels) <= {0, 1} and (probabilities[:, 2:] == 0).all()
    with pytest.raises(ConfigError, match=r"no task 1 was learned \(learned: 0 \(0/1\)\)"):
        learner.predict(learner.test_images(0)[0], task=1)
    assert run("method=finetune", folder=tmp_path / "run", job=SHORT, **SMALL).status == "completed"


# --- sweeps


def test_a_sweep_names_failed_jobs_and_goes_on(tmp_path, monkeypatch):
    from clrun.methods.finetune import Finetune

    learn = Finetune.learn

    def failing(self, task, ctx):
        if ctx.seed == 1:
            raise RuntimeError("no more")
        learn(self, task, ctx)

    monkeypatch.setattr(Finetune, "learn", failing)
    orders = {"task_order": "random", "task_order.seed": range(2)}
    found = sweep({"method": "finetune", "seed": [0, 1], **orders}, folder=tmp_path / "s", job=SHORT, **SMALL)
    assert len(found) == len(found.runs) == 4 and len(found.failed) == 2
    assert all("seed=1" in line and "no more" in line for line in found.failed)
    assert sorted(found.frame()["status"]) == ["completed", "completed", "failed", "failed"]
    (entry,) = (e for e in found.order_robustness if e["setting"] == "cil")
    assert entry in json.loads((tmp_path / "s/order_robustness.json").read_text()) and entry["n_orders"] == 2
    assert list(found.order_robustness_frame()["setting"]) == [e["setting"] for e in found.order_robustness]
    again = load_sweep(tmp_path / "s")
    assert again.order_robustness == found.order_robustness and len(again.failed) == 2
    with pytest.raises(ConfigError, match="load_sweep reads the 4 below it"):
        load(tmp_path / "s")


# --- what is left of a process


def test_generators_switches_and_hydra_are_as_before(tmp_path):
    from hydra import compose, initialize_config_dir, version
    from hydra.core.global_hydra import GlobalHydra

    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/mine.yaml").write_text("answer: 42\n")
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    expected = torch.rand(3), np.random.rand(3), random.random()
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    threads, path = torch.get_num_threads(), list(sys.path)
    deterministic = torch.are_deterministic_algorithms_enabled()  # an earlier test may have left it on
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        with initialize_config_dir(str(tmp_path / "conf"), version_base="1.2"):
            done = run("method=finetune", folder=tmp_path / "run", job=SHORT, **{**SMALL, "hardware": {"threads": 2}})
            assert compose("mine").answer == 42 and str(version.getbase()) == "1.2"
        assert done.status == "completed"
    GlobalHydra.instance().clear()
    found = torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(found[0], expected[0]) and (found[1] == expected[1]).all() and found[2] == expected[2]
    assert torch.get_num_threads() == threads
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert sys.path == path


def test_progress_is_printed_or_not(tmp_path, capsys):
    run("method=finetune", folder=tmp_path / "a", job=SHORT, **{**SMALL, "progress": None})
    assert "results:" in capsys.readouterr().out
    run("method=finetune", folder=tmp_path / "b", job=SHORT, **SMALL)
    sweep("method=finetune", folder=tmp_path / "c", job=SHORT, **SMALL)
    assert capsys.readouterr().out == ""


# --- learners


class Own(Method):
    """A method from outside of clrun."""


def test_own_methods_are_trusted_in_their_process_alone(tmp_path):
    target = f"method._target_={Own.__module__}.Own"
    done = run(["method=finetune", "~method.compete", target], folder=tmp_path / "run", job=SHORT, **SMALL)
    images, labels = done.learner().test_images(0)
    expected = done.learner().predict(images).labels
    with pytest.raises(ConfigError, match=rf"names {Own.__module__}\.Own, which is not clrun's"):
        load(done.folder).learner()
    assert repr(load(done.folder).learner(trust=Own.__module__)).startswith("Learner(Own, tasks=['")
    np.testing.assert_array_equal(load(done.folder).learner(trust=[Own.__module__]).predict(images).labels, expected)


def test_a_class_defined_anew_is_the_one_that_runs(tmp_path, monkeypatch):
    class Other(Own):
        learned = 0

        def learn(self, task, ctx):
            type(self).learned += 1

    arguments = ["method=finetune", "~method.compete", f"method._target_={Own.__module__}.Own"]
    run(arguments, folder=tmp_path / "a", job=SHORT, **SMALL)
    monkeypatch.setattr(sys.modules[__name__], "Own", Other)
    Other.__qualname__ = "Own"
    run(arguments, folder=tmp_path / "b", job={**SHORT, "resume": False}, keep_learner=False, **SMALL)
    assert Other.learned == 2


@pytest.mark.parametrize("target", ["os.system", "clrun.cli.main", "torch.hub.load", "torch.optim.SGD.step"])
def test_what_a_configuration_names_is_not_called(target, done, tmp_path):
    shutil.copytree(done.folder, tmp_path / "run")
    stored = json.loads((tmp_path / "run/run.json").read_text())
    stored["config"]["dataset"] = {"_target_": target, "command": f"touch {tmp_path}/called"}
    (tmp_path / "run/run.json").write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match=f"names {re.escape(target)}, which is not clrun's"):
        load(tmp_path / "run").learner()
    assert not (tmp_path / "called").exists()


def test_pickled_code_is_not_run(done, tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "called",))

    shutil.copytree(done.folder, tmp_path / "run")
    (tmp_path / "run/checkpoint.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ConfigError, match="refused, nothing in it was run"):
        load(tmp_path / "run").learner()
    assert not (tmp_path / "called").exists()


def test_a_method_that_needs_the_task_says_so(tmp_path):
    done = run("method=hat scenario.setting=til", folder=tmp_path / "run", job=SHORT, **SMALL)
    learner = done.learner()
    images, _ = learner.test_images("2/3")
    with pytest.raises(ConfigError, match=r"Hat needs the task id: predict\(images, task=...\), of '0/1', '2/3'"):
        learner.predict(images)
    with pytest.raises(ConfigError, match="no task '2/4' was learned; did you mean '2/3'"):
        learner.predict(images, task="2/4")
    assert set(learner.predict(images, task="2/3").labels) <= {2, 3}
    np.testing.assert_array_equal(learner.predict(images, task=1).labels, learner.predict(images, task="2/3").labels)


def test_domains_are_shown_as_their_task_shows_them(tmp_path):
    options = {"save_predictions": "final", **SHORT}
    done = run("method=finetune experiment=permuted_digits", folder=tmp_path / "run", job=options, **SMALL)
    learner, saved = done.learner(), done.predictions()
    assert done.setting == "dil"
    for task in done.order:
        own = saved[saved.task == task]
        np.testing.assert_array_equal(learner.predict(learner.test_images(task)[0], task=task).labels, own["dil"])


# --- the page and the notebook

# Runs before the page and the notebook: their runs end after a few steps per task and draw no picture.
LIMITS = """
import functools
import clrun

def limited(start):
    @functools.wraps(start)
    def call(*options, job=None, **keywords):
        return start(*options, job={"max_steps": 5, "picture": False, **(job or {})}, **keywords)
    return call

clrun.run, clrun.sweep = limited(clrun.run), limited(clrun.sweep)
"""


def test_every_example_of_the_page_runs(tmp_path):
    text = (ROOT / "docs/api.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    (tmp_path / "page.py").write_text("\n".join([LIMITS, *blocks]))
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no method named 'err'; did you mean 'er'?" in done.stdout and "4 runs, failed: ()" in done.stdout
    documented = set(re.findall(r"`(?:clrun\.|run\.|sweep\.|learner\.)?(\w+)", text))
    assert {name for name in clrun.api.__all__ if name[0].isupper()} - documented <= {
        "Run",
        "Sweep",
        "Learner",
        "Prediction",
        "Cost",
        "TaskInfo",
        "AccuracyMatrix",
    }


def test_the_notebook_runs(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    path = ROOT / "docs/example.ipynb"
    assert path.stat().st_size < 100_000
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(LIMITS))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    texts = [out["data"].get("text/plain", "") for c in notebook.cells for out in c.get("outputs", []) if "data" in out]
    assert any("aopd" in text for text in texts) and any("average_accuracy" in text for text in texts)
