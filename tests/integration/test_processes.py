"""Several processes share each batch and end where one process ends."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from running import THREADS, cells, quiet, run
from safetensors.torch import load_file

from clrun.running.checkpoint_file import read
from clrun.running.parts import Parts
from clrun.system.errors import ConfigError, NumericalError
from clrun.system.hardware import launch

OPTIONS = ("hardware=cpu", "job.max_tasks=2", "budget.epochs=1", "budget.batch_size=50", "job.save_model=true")


def assert_same_cells(one: Path, other: Path) -> None:
    """Fail unless two runs evaluated the same cells and differ by at most one correct answer in each.

    Processes add up the parts of a batch in another order than one process: weights agree to about seven digits, and
    an image whose two best classes are that close may be answered differently.
    """
    a, b = ({(s, *cell): n for s in ("cil", "til") for cell, n in cells(out, s).items()} for out in (one, other))
    assert a and a.keys() == b.keys()
    for cell, (correct, total) in a.items():
        assert b[cell][1] == total and abs(b[cell][0] - correct) <= 1, cell


# These have sums over processes, or networks of their own that all processes must begin alike.
SLOW = ("ewc", "kfac_ewc", "ncl", "ebll", "si", "qr method.importance=mas", "progress_compress")
SLOW += ("gem", "icarl", *(f"{name} scenario.setting=til" for name in ("packnet", "hat", "fish")))


@pytest.mark.parametrize("method", ["finetune", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_two_processes_reproduce_one(tmp_path: Path, method: str) -> None:
    options = (*f"method={method}".split(), *OPTIONS)
    run(tmp_path / "one", *options)
    run(tmp_path / "two", *options, "hardware.processes=2")
    assert json.loads((tmp_path / "two" / "run.json").read_text())["versions"]["processes"] == 2
    assert_same_cells(tmp_path / "one", tmp_path / "two")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(b[name].float(), a[name].float(), rtol=0, atol=1e-5, msg=name)


@pytest.mark.slow
def test_closed_form_is_the_same_and_replay_keeps_its_share(tmp_path: Path) -> None:
    for name, extra in (("one", ()), ("two", ("hardware.processes=2",))):
        run(tmp_path / name, "method=simplecil", *OPTIONS, *extra)
    assert_same_cells(tmp_path / "one", tmp_path / "two")
    run(
        tmp_path / "er", "method=er", "method.capacity=21", *OPTIONS, "hardware.processes=2", "job.keep_checkpoint=true"
    )
    first, second = (read(tmp_path / "er" / "checkpoint.pt", rank=rank) for rank in (0, 1))
    assert first[0].world == 2
    assert first[1] and second[1] and first[1] != second[1]


@pytest.mark.slow
def test_resume_with_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("method=er", *OPTIONS, "hardware.processes=2")
    run(tmp_path / "whole", *options)
    whole = (tmp_path / "whole" / "accuracy.csv").read_bytes()
    # A file in the way of the second task's checkpoint stops the run there.
    script = f"""
import sys; sys.path[:0] = {[str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]!r}
from running import run
from clrun.running import checkpoint
if __name__ == "__main__":
    run(__import__("pathlib").Path({str(tmp_path / "out")!r}), *{options!r})
"""
    (tmp_path / "start.py").write_text(script)
    process = subprocess.Popen([sys.executable, str(tmp_path / "start.py")], stderr=subprocess.DEVNULL)
    stored = tmp_path / "out" / "checkpoint.pt"
    deadline = time.monotonic() + 60
    while not stored.exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.wait()
    if not stored.exists():
        pytest.skip("the run ended before it could be killed")
    # Orphans end by themselves; the lock of the dead process is taken over.
    run(tmp_path / "out", *options)
    assert (tmp_path / "out" / "accuracy.csv").read_bytes() == whole


WAIT = 600  # seconds: beyond what a busy machine takes to start processes


def _mistake(rank: int, world: int) -> float:
    if rank == 1:
        raise ConfigError("method: rank 1 does not like this")
    time.sleep(WAIT)
    return 0.0


def _bug(rank: int, world: int) -> float:
    if rank == 1:
        raise ZeroDivisionError("a bug in rank 1")
    time.sleep(WAIT)
    return 0.0


@pytest.mark.parametrize(
    ("work", "error", "words"),
    [
        (_mistake, ConfigError, "rank 1 does not like this"),
        pytest.param(_bug, RuntimeError, "a bug in rank 1", marks=pytest.mark.slow),
    ],
)
def test_one_failing_process_ends_all_with_its_message(work: Any, error: type[Exception], words: str) -> None:
    start = time.monotonic()
    with pytest.raises(error, match=words):
        launch(work, (), processes=2, device="cpu")
    assert time.monotonic() - start < WAIT / 2, "the other process was not waited for"


@pytest.fixture
def spawned_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `launch` work in this process, as rank 0 of one."""

    def spawn(worker: Any, meeting: tuple[Any, ...], *, nprocs: int, join: bool) -> None:
        assert not join, "signals are sent on while the processes work"
        folder, work, arguments, _, backend = meeting
        worker(0, folder, work, arguments, 1, backend)

    monkeypatch.setattr("clrun.system.hardware.spawn", spawn)


def test_divergence_in_a_process_is_no_bug(spawned_here: None) -> None:
    def diverged(rank: int, world: int) -> float:
        raise NumericalError("the loss is nan")

    with pytest.raises(NumericalError, match="^the loss is nan$"):
        launch(diverged, (), processes=2, device="cpu")


def test_a_bug_in_a_process_is_not_taken_for_a_mistake(spawned_here: None) -> None:
    def broken(rank: int, world: int) -> float:
        raise ZeroDivisionError("a bug")

    with pytest.raises(RuntimeError, match="^a process of the run failed: a bug$"):
        launch(broken, (), processes=2, device="cpu")


def test_torchrun_starts_the_same_run(tmp_path: Path) -> None:
    options = ("method=finetune", "backbone=cnn", *OPTIONS, THREADS, "job.picture=false")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--master-port=29517",
        "-m",
        "clrun",
    ]
    done = subprocess.run(
        [*torchrun, *options, f"hydra.run.dir={tmp_path / 'two'}"],
        env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results:") == 1
    run(tmp_path / "one", "method=finetune", *OPTIONS)
    assert_same_cells(tmp_path / "one", tmp_path / "two")
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


def test_torchrun_without_a_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    env |= {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29518", "LOCAL_RANK": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "clrun"], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "hydra.run.dir" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_hardware_that_is_not_here() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    config, _ = quiet("hardware=gpu")
    hardware = Parts(config).hardware
    with pytest.raises(ConfigError, match=r"hardware\.device=cuda: torch sees no GPU"):
        hardware.setup()
    config, _ = quiet("hardware.precision=tf32")
    with pytest.raises(ConfigError, match=r"hardware\.precision=tf32 needs a GPU"):
        Parts(config).hardware.setup()


def test_switches_do_not_leak_into_the_next_job(tmp_path: Path) -> None:
    options = ("method=finetune", "job.max_tasks=1", "budget.epochs=1")
    run(tmp_path / "a", *options)
    first = (tmp_path / "a" / "accuracy.csv").read_bytes()
    run(tmp_path / "bf16", *options, "hardware.precision=bf16", "hardware.deterministic=false", "seed=3")
    torch.rand(7)
    run(tmp_path / "b", *options)
    assert (tmp_path / "b" / "accuracy.csv").read_bytes() == first
    assert torch.are_deterministic_algorithms_enabled()
