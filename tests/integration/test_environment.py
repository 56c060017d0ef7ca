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


def test_a_secret_is_recorded_as_its_expression(command, tmp_path):
    """In name, which is shown everywhere, and in options that change the result, of a run and of a sweep."""
    lr = {"RATE": "0.012345"}
    words = [*SHORT, "name=run-${oc.env:TOKEN}", "budget.optimizer.lr='${oc.decode:${oc.env:RATE}}'"]
    code, out, err = command(*words, TOKEN=SECRET, **lr)
    assert code == 0, err
    assert SECRET not in out + err and not holding(tmp_path, SECRET)
    [file] = tmp_path.rglob("run.json")
    run = json.loads(file.read_text())
    assert run["name"] == run["config"]["name"] == "run-${oc.env:TOKEN}"
    assert run["config"]["budget"]["optimizer"]["lr"] == "${oc.decode:${oc.env:RATE}}"
    assert list(run["environment"]) == ["budget.optimizer.lr"]

    folder = f"hydra.run.dir={file.parent}"
    assert "was complete already" in command(*words, folder, TOKEN="an0ther-t0ken", **lr)[1]
    code, _, err = command(*words, folder, TOKEN=SECRET, RATE="0.0777777")
    assert code == 2 and "holds a run of another configuration" in err

    for rate in ("0.012345", "0.0777777"):
        out = f"hydra.run.dir={tmp_path}/two/{rate[-3:]}"
        assert command(*words, out, TOKEN=SECRET, RATE=rate)[0] == 0
    assert command("report", f"{tmp_path}/two")[0] == 0
    assert not holding(tmp_path, SECRET)
    assert {path.name for path in holding(tmp_path / "two", "0.0777777")} == {"metrics.jsonl"}, "the measured rate"
    two = load_sweep(tmp_path / "two")
    assert len(two._result.groups) == 2, "other values are other experiments"

    with pytest.raises(ConfigError, match=r"name, budget.optimizer.lr is read from the environment"):
        load(file.parent).learner()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKEN", SECRET)
        patch.setenv("RATE", "0.012345")
        assert load(file.parent).learner(trust=["oc.env"]).tasks


def test_a_sweep_records_the_expression(command, tmp_path):
    words = [*SHORT, "name=${oc.env:TOKEN}", "seed=0,1", "hydra.sweep.dir=s"]
    code, out, err = command("-m", *words, TOKEN=SECRET)
    assert code == 0, err
    assert SECRET not in out + err and not holding(tmp_path, SECRET)
    assert [run.name for run in load_sweep(tmp_path / "s")] == ["${oc.env:TOKEN}"] * 2


def test_messages_have_the_expression(command, tmp_path):
    for key, value in (
        ("name=${oc.env:TOKEN}", f"{SECRET}/x"),
        ("dataset=folder dataset.root=${oc.env:TOKEN}", SECRET),
    ):
        code, out, err = command(*SHORT, *key.split(), TOKEN=value)
        assert code == 2 and "${oc.env:TOKEN}" in err and SECRET not in err + out
    assert not holding(tmp_path, SECRET)


@pytest.mark.parametrize("regular", [False, True], ids=["namespace", "package"])
def test_plugins_in_the_working_folder_are_used_only_when_asked_for(tmp_path, regular):
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins" / "evil.py").write_text("open('ran', 'w').close()\n")
    if regular:
        (tmp_path / "hydra_plugins" / "__init__.py").write_text("open('ran', 'w').close()\n")
    for words in (["--cfg", "job"], *([] if regular else [["list", "methods"], ["--help"]])):
        done = clrun(tmp_path, *words)
        assert done.returncode == 0 and not (tmp_path / "ran").exists(), done.stderr
        asked = "if you trust it, set CLRUN_HYDRA_PLUGINS=1" in done.stderr
        assert asked == (words[0] == "--cfg")  # the others read files of choices alone
    assert clrun(tmp_path, "--cfg", "job", CLRUN_HYDRA_PLUGINS="1").returncode == 0
    assert (tmp_path / "ran").exists()
