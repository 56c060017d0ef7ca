"""A real Slurm: a sweep survives cancelled jobs, time limits and failing nodes, and ends as a serial one.

eval "$(scripts/slurm_local.sh start)"
pytest -n 0 -m slurm
scripts/slurm_local.sh stop
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SLURM = "hydra/launcher=submitit_slurm"
# Long enough to be disturbed after the first of five tasks.
EPOCHS = 30
OPTIONS = ("method=finetune", "seed=range(4)", "backbone=cnn", "hardware.threads=1", f"budget.epochs={EPOCHS}")
OPTIONS += ("job.picture=false", "job.progress=false")
WAIT = 600.0  # seconds


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def asked(*words: str) -> str:
    """Return what scontrol prints; nothing where no Slurm answers."""
    return subprocess.run(["scontrol", *words], capture_output=True, text=True, check=False, timeout=120).stdout


@pytest.fixture(autouse=True)
def nodes() -> Iterator[list[str]]:
    """The names of the nodes, which accept jobs again afterwards; nothing runs before and after."""
    pytest.importorskip("submitit")
    # Never another Slurm than that of the script: these tests cancel jobs and take nodes away.
    if shutil.which("scontrol") is None or not re.search(r"^ClusterName += clrun$", asked("show", "config"), re.M):
        pytest.skip('there is no Slurm for tests; eval "$(scripts/slurm_local.sh start)" sets one up')
    names = sorted(set(slurm("sinfo", "-h", "-N", "-o", "%N").split()))
    yield names
    subprocess.run(["scancel", "--user=root"], check=False)
    for name in names:
        subprocess.run(["scontrol", "update", f"nodename={name}", "state=resume"], capture_output=True, check=False)


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    """Start the sweep in `folder`."""
    command = [sys.executable, "-m", "clrun", "-m", *OPTIONS, *words, f"hydra.sweep.dir={folder}"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=folder.parent, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str, list[str]]:
    """Return the exit code, the output and the lines on stderr that are clrun's."""
    out, err = process.communicate(timeout=WAIT)
    return process.returncode, out, [line for line in err.splitlines() if line.startswith("clrun: ")]


def until(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def results(folder: Path) -> dict[str, bytes]:
    """Return the accuracy.csv of every run by the name of its folder."""
    return {path.parent.name: path.read_bytes() for path in folder.glob("*/accuracy.csv")}


def table(out: str) -> list[str]:
    """Return the printed comparison."""
    lines = out.splitlines()
    return lines[lines.index(next(line for line in lines if line.startswith("method "))) :][:-1]


def at_work(folder: Path, seed: int) -> str:
    """Return the id of the Slurm job of a seed when it has learned a task."""
    until(lambda: list(folder.glob(f"*seed-{seed}-*/checkpoint.pt")))
    return next(
        name for name in slurm("squeue", "-h", "-r", "-t", "R", "-o", "%i").split() if name.endswith(f"_{seed}")
    )


def states(*names: str) -> set[str]:
    lines = slurm("squeue", "-h", "-r", "-t", "all", "-o", "%i %T").splitlines()
    return {state for name, state in map(str.split, lines) if name in names}


@pytest.mark.slurm
def test_disturbed_jobs_end_as_undisturbed_ones_or_are_named(tmp_path: Path, nodes: list[str]) -> None:
    code, serial, _ = end(start(tmp_path / "serial"))
    assert code == 0
    folder = tmp_path / "slurm"
    process = start(folder, SLURM)
    limited, cancelled, failing = (at_work(folder, seed) for seed in (0, 1, 3))
    slurm("scancel", cancelled)
    slurm("scancel", "--signal=USR2", limited)  # as Slurm does before the time limit
    node = slurm("squeue", "-h", "-o", "%N", "-j", failing).strip()  # the third job is there, too
    slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    until(lambda: states(failing) == {"RUNNING"})  # again, on whichever node: this one comes back by itself
    code, _, errors = end(process)
    expected = results(tmp_path / "serial")
    [missing] = [name for name in expected if "seed-1-" in name]
    assert code == 1 and len(errors) == 1
    assert errors[0].startswith("clrun: failed: method=finetune seed=1 ")
    assert f": SlurmError: Slurm job {cancelled} was cancelled; the same command with hydra.sweep.dir=" in errors[0]
    assert {k: v for k, v in results(folder).items() if k != missing} == {
        k: v for k, v in expected.items() if k != missing
    }
    [stopped] = folder.glob("*seed-0-*/run.json")
    notes = json.loads(stopped.read_text())["notes"]
    assert any(note.startswith("stopped by SIGUSR2 in the task at position") for note in notes), notes
    code, again, errors = end(start(folder, SLURM))
    assert (code, errors) == (0, [])
    assert results(folder) == expected and table(again) == table(serial)


@pytest.mark.slurm
def test_a_time_limit_is_no_end(tmp_path: Path) -> None:
    """Slurm's own limit, which is one minute at least; the run takes longer, however fast this machine is."""
    began = time.monotonic()
    assert end(start(tmp_path / "short", "seed=0"))[0] == 0
    long = ("seed=0", f"budget.epochs={1 + round(EPOCHS * 75 / (time.monotonic() - began))}")
    assert end(start(tmp_path / "serial", *long))[0] == 0
    limits = ("hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=15")
    code, _, errors = end(start(tmp_path / "slurm", SLURM, *long, *limits))
    assert (code, errors) == (0, [])
    assert results(tmp_path / "slurm") == results(tmp_path / "serial")
    logs = "".join(path.read_text() for path in (tmp_path / "slurm").rglob("*_log.*"))
    assert "this job is timed-out" in logs and "Requeued job" in logs


@pytest.mark.slurm
def test_jobs_that_slurm_refuses_are_one_line(tmp_path: Path) -> None:
    code, _, errors = end(start(tmp_path / "slurm", SLURM, "hydra.launcher.partition=nowhere"))
    assert code == 2 and len(errors) == 1
    assert errors[0].startswith("clrun: hydra/launcher=submitit_slurm: Slurm refuses the jobs: ")
    assert "invalid partition" in errors[0]
