"""Waiting for Slurm jobs without Slurm: its commands are files here, and results appear as Slurm jobs write them."""

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.utils import JobReturn

from clrun.config.compose import Composer
from clrun.config.slurm import DEFAULTS
from clrun.running import slurm
from clrun.running.slurm import GRACE, SlurmError, Work, patient, slurm_states, waited
from clrun.system import signals

submitit = pytest.importorskip("submitit")
AGAIN = "the same command with hydra.sweep.dir=FOLDER goes on with it"


def job(folder: Path, name: str) -> Any:
    paths = SimpleNamespace(result_pickle=folder / f"{name}_result.pkl", stderr=folder / f"{name}.err")
    return SimpleNamespace(job_id=name, paths=paths)


def write(job: Any, outcome: str, result: Any) -> None:
    from submitit.core.utils import cloudpickle_dump

    cloudpickle_dump((outcome, result), job.paths.result_pickle)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which passes by sleeping alone."""
    now = [0.0]
    monkeypatch.setattr(slurm.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(slurm.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


def test_every_job_ends_with_its_result_or_with_what_slurm_says(tmp_path: Path, clock: list[float]) -> None:
    names = ("7_0", "7_1", "7_2", "7_3", "7_4", "7_5")
    jobs = [job(tmp_path, name) for name in names]
    write(jobs[0], "success", JobReturn(["seed=0"]))
    write(jobs[1], "error", "Traceback\nModuleNotFoundError: No module named 'torch'\n")
    write(jobs[2], "error", "Traceback\nUncompletedJobError: Job not requeued because: timed-out too many times.\n")
    asked = []

    def states(ids: Any) -> dict[str, str] | None:
        asked.append(list(ids))
        if len(asked) == 2:
            return None  # the controller restarts
        if len(asked) == 3:  # a node has failed, and its job is started again
            return {"7_3": "CANCELLED", "7_4": "NODE_FAIL"}
        if clock[0] > 10 * GRACE and not jobs[4].paths.result_pickle.exists():
            write(jobs[4], "success", JobReturn(["seed=4"]))
        return {"7_3": "CANCELLED", "7_4": "RUNNING"}

    ends = waited(jobs, states=states)
    assert asked[0] == ["7_3", "7_4", "7_5"] and asked[-1] == ["7_4"]
    assert [end.overrides for end in ends if isinstance(end, JobReturn)] == [["seed=0"], ["seed=4"]]
    said = [str(end) for end in ends if isinstance(end, SlurmError)]
    assert [text.split(" (its output")[0] for text in said] == [
        "Slurm job 7_1 failed: ModuleNotFoundError: No module named 'torch'",
        "Slurm job 7_2 reached its time limit and was not started again; raise hydra.launcher.timeout_min or "
        f"max_num_timeout; {AGAIN}",
        f"Slurm job 7_3 was cancelled; {AGAIN}",
        f"Slurm job 7_5 is unknown to Slurm, and left no result; {AGAIN}",
    ]


def test_a_result_may_come_some_time_after_the_end_of_its_job(tmp_path: Path, clock: list[float]) -> None:
    late = job(tmp_path, "7")

    def states(ids: Any) -> dict[str, str]:
        if clock[0] > GRACE:
            write(late, "success", JobReturn(["seed=0"]))
        return {"7": "COMPLETED"}

    assert [end.overrides for end in waited([late], states=states)] == [["seed=0"]]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("queue", "accounting", "expected"),
    [
        ("echo '7_0|RUNNING'; echo '7_1|PENDING'; echo '8|COMPLETED'", "exit 1", {"7_0": "RUNNING", "7_1": "PENDING"}),
        ("echo '7_0|RUNNING'", "echo '7_1|CANCELLED by 0'", {"7_0": "RUNNING", "7_1": "CANCELLED"}),
        (
            "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1",
            "echo '7_0|TIMEOUT'",
            {"7_0": "TIMEOUT"},
        ),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", "exit 1", None),
    ],
)
def test_slurm_is_asked_once_for_all(
    queue: str, accounting: str, expected: dict[str, str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("squeue", queue), ("sacct", accounting)):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = slurm_states(["7_0", "7_1"])
    assert (found and {name: found[name] for name in found if name != "8"}) == expected


def test_no_command_of_slurm_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert slurm_states(["7"]) is None


def composed(words: Sequence[str]) -> Any:
    with Composer.of(config_path=None, config_name=None, config_dir=None) as composer:
        return composer.compose(["hydra/launcher=submitit_slurm", *words], sweep=True).hydra.launcher


def test_defaults_let_a_job_go_on_and_can_be_changed() -> None:
    node = composed(["hydra.launcher.signal_delay_s=90"])
    assert {key: node[key] for key in DEFAULTS} == DEFAULTS | {"signal_delay_s": 90}
    assert node.timeout_min == 60 and node._target_.endswith(".SlurmLauncher")


def test_other_launchers_are_left_as_they_are() -> None:
    from hydra._internal.core_plugins.basic_launcher import BasicLauncher

    basic = BasicLauncher()
    assert patient(basic) is basic


@pytest.fixture
def queued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What runs a function as submitit does in a Slurm job; the command of Slurm is a file, which notes its use."""
    from submitit.core.utils import DelayedSubmission, JobPaths

    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $* >> {tmp_path}/queued\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    job = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}
    for name, value in (job | {"SUBMITIT_FOLDER": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    before = {number: signal.getsignal(number) for number in (*signals.SIGNALS, signal.SIGCONT)}

    def start(launcher: Any, *, left: int = 3) -> Any:
        delayed = DelayedSubmission(Work(launcher))
        delayed.set_timeout(0, left)
        submitit.JobEnvironment()._handle_signals(JobPaths(tmp_path, job_id="7", task_id=0), delayed)
        theirs = signal.getsignal(signal.SIGUSR2)
        try:
            return delayed.function()
        finally:
            assert signal.getsignal(signal.SIGUSR2) == theirs != signal.SIG_DFL

    yield start
    for number, handler in before.items():
        signal.signal(number, handler)


def work(number: int, done: list[str]) -> Any:
    """Return a job that gets a signal in the middle of a step."""

    def step() -> None:
        with signals.deferred():
            os.kill(os.getpid(), number)
            done.append("step")
        signals.raise_requested()
        done.append("end")

    return step


def test_a_job_that_is_asked_to_stop_ends_its_step_and_is_queued_again(queued: Any, tmp_path: Path) -> None:
    from submitit.core.utils import DelayedSubmission

    done: list[str] = []
    with pytest.raises(SystemExit):
        queued(work(signal.SIGUSR2, done))
    assert done == ["step"]
    assert (tmp_path / "queued").read_text() == "requeue 7\n"
    again = DelayedSubmission.load(tmp_path / "7_submitted.pkl")
    assert isinstance(again.function, Work) and again._timeout_countdown == 2


def test_a_job_with_too_many_time_limits_stops_with_that_reason(queued: Any, tmp_path: Path) -> None:
    with pytest.raises(submitit.core.utils.UncompletedJobError, match="timed-out too many times"):
        queued(work(signal.SIGUSR2, []), left=0)
    assert not (tmp_path / "queued").exists()


def test_a_job_that_slurm_ends_is_not_queued_by_itself(queued: Any, tmp_path: Path) -> None:
    done: list[str] = []
    with pytest.raises(signals.Stopped, match="SIGTERM"):
        queued(work(signal.SIGTERM, done))
    assert done == ["step"] and not (tmp_path / "queued").exists()


def test_a_job_that_nobody_stops_returns_its_result(queued: Any) -> None:
    assert queued(lambda: "result") == "result"
