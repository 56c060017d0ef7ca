"""Values from the environment in files and on the terminal; plugins of Hydra in the working folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clrun.api import ConfigError, load, load_sweep

SECRET = "tok3n-0f-m1ne"
ROOT = Path(__file__).parents[2]
SHORT = [
    "dataset=digits",
    "backbone=mlp",
    "method=finetune",
    "job.max_tasks=1",
    "job.max_steps=1",
    "hardware.threads=1",
]
SHORT += ["job.picture=false", "job.keep_checkpoint=true"]


def clrun(folder, *words, **environment):
    """Run the command in a folder of its own."""
    run = [sys.executable, "-m", "clrun", *words]
    new = os.environ | {"PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(run, cwd=folder, env=new, capture_output=True, text=True, check=False, timeout=300)


def holding(folder, text):
    """The files and folders with this text in their content or name."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    named = [path for path in folder.rglob("*") if text in path.name]
    return named + [path for path in paths if text.encode() in path.read_bytes()]


def test_a_secret_is_recorded_as_its_expression(tmp_path):
    """In name, which is shown everywhere, and in options that change the result, of a run and of a sweep."""
    lr = {"RATE": "0.012345"}
    words = [*SHORT, "name=run-${oc.env:TOKEN}", "budget.optimizer.lr='${oc.decode:${oc.env:RATE}}'"]
    done = clrun(tmp_path, *words, TOKEN=SECRET, **lr)
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr and not holding(tmp_path, SECRET)
    [file] = tmp_path.rglob("run.json")
    run = json.loads(file.read_text())
    assert run["name"] == run["config"]["name"] == "run-${oc.env:TOKEN}"
    assert run["config"]["budget"]["optimizer"]["lr"] == "${oc.decode:${oc.env:RATE}}"
    assert list(run["environment"]) == ["budget.optimizer.lr"]

    folder = f"hydra.run.dir={file.parent}"
    assert "was complete already" in clrun(tmp_path, *words, folder, TOKEN="another", **lr).stdout
    other = clrun(tmp_path, *words, folder, TOKEN=SECRET, RATE="0.0777777")
    assert other.returncode == 2 and "holds a run of another configuration" in other.stderr

    for rate in ("0.012345", "0.0777777"):
        out = f"hydra.run.dir={tmp_path}/two/{rate[-3:]}"
        assert clrun(tmp_path, *words, out, TOKEN=SECRET, RATE=rate).returncode == 0
    assert clrun(tmp_path, "report", f"{tmp_path}/two").returncode == 0
    assert not holding(tmp_path, SECRET)
    assert {path.name for path in holding(tmp_path / "two", "0.0777777")} == {"metrics.jsonl"}, "the measured rate"
    two = load_sweep(tmp_path / "two")
    assert len(two._result.groups) == 2, "other values are other experiments"

    with pytest.raises(ConfigError, match=r"name, budget.optimizer.lr is read from the environment"):
        load(file.parent).learner()
    os.environ |= {"TOKEN": SECRET, **lr}
    try:
        assert load(file.parent).learner(trust=["oc.env"]).tasks
    finally:
        del os.environ["TOKEN"], os.environ["RATE"]


def test_a_sweep_records_the_expression(tmp_path):
    words = [*SHORT, "name=${oc.env:TOKEN}", "seed=0,1", "hydra.sweep.dir=s"]
    done = clrun(tmp_path, "-m", *words, TOKEN=SECRET)
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr and not holding(tmp_path, SECRET)
    assert [run.name for run in load_sweep(tmp_path / "s")] == ["${oc.env:TOKEN}"] * 2


def test_messages_have_the_expression(tmp_path):
    for key, value in (
        ("name=${oc.env:TOKEN}", f"{SECRET}/x"),
        ("dataset=folder dataset.root=${oc.env:TOKEN}", SECRET),
    ):
        done = clrun(tmp_path, *SHORT, *key.split(), TOKEN=value)
        assert done.returncode == 2 and "${oc.env:TOKEN}" in done.stderr and SECRET not in done.stderr + done.stdout
    assert not holding(tmp_path, SECRET)


@pytest.mark.parametrize("regular", [False, True], ids=["namespace", "package"])
def test_plugins_in_the_working_folder_are_used_only_when_asked_for(tmp_path, regular):
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins" / "evil.py").write_text("open('ran', 'w').close()\n")
    if regular:
        (tmp_path / "hydra_plugins" / "__init__.py").write_text("open('ran', 'w').close()\n")
    for words in (["--cfg", "job"], ["list", "methods"], ["--help"]):
        done = clrun(tmp_path, *words)
        assert done.returncode == 0 and not (tmp_path / "ran").exists(), done.stderr
        asked = "if you trust it, set CLRUN_HYDRA_PLUGINS=1" in done.stderr
        assert asked == (words[0] != "list")
    assert clrun(tmp_path, "--cfg", "job", CLRUN_HYDRA_PLUGINS="1").returncode == 0
    assert (tmp_path / "ran").exists()
