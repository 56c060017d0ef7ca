"""Checkpoints inside a task: what a run writes, reads and refuses, and how signals stop it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from running import flip, quiet, run
from safetensors.torch import load_file

from clrun.cli import main
from clrun.learning.progress import Progress
from clrun.running import checkpoint_file, task_file
from clrun.running.recorder import Recorder
from clrun.running.task_fits import TaskFits
from clrun.system import signals
from clrun.system.errors import ConfigError
from clrun.system.signals import EXIT_CODE, Stopped

pytestmark = pytest.mark.records  # files, and bits of runs of one layout

OPTIONS = ("method=ewc", "backbone=mlp", "job.max_tasks=2", "budget.epochs=1", "job.max_steps=6", "job.save_model=true")
EVERY_STEP = "job.checkpoint_minutes=1e-9"
FILE, BEFORE = "checkpoint.task.pt", "checkpoint.task.previous.pt"


def run_signalled(out: Path, *overrides: str, at: int, number: int = signal.SIGTERM) -> None:
    """Run a configuration in `out` as `run` does; this process gets a signal in step `at` of the run."""
    steps = 0
    report = Recorder.step

    def step(self: Recorder, progress: Any) -> None:
        nonlocal steps
        steps += 1
        report(self, progress)
        if steps == at:
            os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Recorder, "step", step)
        run(out, *overrides)


def notes(out: Path) -> list[str]:
    """Return the notes of a run."""
    found: list[str] = json.loads((out / "run.json").read_text())["notes"]
    return found


def assert_same_run(out: Path, whole: Path) -> None:
    """Fail unless two complete runs have the same files, and none of them a checkpoint."""
    for name in ("accuracy.csv", "metrics.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    a, b = load_file(out / "model.safetensors"), load_file(whole / "model.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not list(out.glob("checkpoint*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    run(out, *OPTIONS)
    return out


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """The folder of a run that was stopped in the fourth step of its second task, with two generations."""
    run_signalled(tmp_path / "run", *OPTIONS, EVERY_STEP, at=10)
    return tmp_path / "run"


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_signal_stops_after_the_step_and_the_run_goes_on_there(tmp_path: Path, whole: Path, number: int) -> None:
    run_signalled(tmp_path / "run", *OPTIONS, at=4, number=number)
    name = signal.Signals(number).name
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    where = f"stopped by {name} in the task at position 0, at step 4 of 6 of its fit 'fit'"
    assert (stored["status"], stored["error"], stored["notes"][-1]) == ("interrupted", where, where)
    assert (tmp_path / "run" / FILE).exists() and not (tmp_path / "run" / "checkpoint.pt").exists()
    run(tmp_path / "run", *OPTIONS)
    assert_same_run(tmp_path / "run", whole)
    resumed = ["resumed after 0 tasks", "resumed in the task at position 0, in its fit 'fit'"]
    assert notes(tmp_path / "run")[-3:] == [where, *resumed]
    assert signal.getsignal(number) is signal.SIG_DFL, "the handlers are those of before"


def test_two_generations_are_kept_and_the_task_checkpoint_beside_them(stopped: Path, whole: Path) -> None:
    names = {"checkpoint.pt", FILE, BEFORE}
    assert {path.name for path in stopped.glob("checkpoint*")} == names
    contents = [task_file.read(stopped / name, rank=0, main=True, tasks=2) for name in (FILE, BEFORE)]
    assert [(c.learned, c.fits[-1].steps, c.fits[-1].finished) for c in contents] == [(1, 4, False), (1, 3, False)]
    run(stopped, *OPTIONS)
    assert_same_run(stopped, whole)


def test_a_damaged_file_gives_way_to_the_one_before_it(stopped: Path, whole: Path) -> None:
    flip(stopped / FILE, 8 * 5000)
    run(stopped, *OPTIONS)
    assert_same_run(stopped, whole)
    because = f"because {FILE} was refused (its checksum does not match its content)"
    assert notes(stopped)[-1] == f"resumed in the task at position 1, in its fit 'fit' of {BEFORE}, {because}"


def test_a_damaged_file_does_not_replace_the_one_before_it(stopped: Path) -> None:
    """It would else be the only one while a new one is written."""
    intact = (stopped / BEFORE).read_bytes()
    flip(stopped / FILE, 8 * 5000)
    run_signalled(stopped, *OPTIONS, at=1)
    assert (stopped / BEFORE).read_bytes() == intact
    steps = [task_file.read(stopped / n, rank=0, main=True, tasks=2).fits[-1].steps for n in (BEFORE, FILE)]
    assert steps == [3, 4]


def test_without_an_intact_file_the_task_begins_anew_and_says_so(stopped: Path, whole: Path) -> None:
    for name in (FILE, BEFORE):
        content = (stopped / name).read_bytes()
        (stopped / name).write_bytes(content[:-1])
    run(stopped, *OPTIONS)
    assert_same_run(stopped, whole)
    because = f"because {FILE} was refused (it has another length than its header says)"
    assert notes(stopped)[-1] == f"the task at position 1 began anew, {because}"


def rewrite(path: Path, change: Any) -> None:
    """Change a file inside a task and make its checksums right again."""
    content = task_file.read(path, rank=0, main=True, tasks=2)
    task_file.write(path, change(content), flush=False)


def renamed(content: task_file.TaskFile) -> task_file.TaskFile:
    content.fits[-1].name = "another"
    return content


def with_code(content: task_file.TaskFile) -> task_file.TaskFile:
    content.fits[-1].parts = [b"cos\nsystem\n(S'touch owned'\ntR."]
    return content


def with_steps(content: task_file.TaskFile) -> task_file.TaskFile:
    content.fits[-1].steps = -1
    return content


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (renamed, "does not belong to fit 0 .'another'. of task 1 .it is named 'fit' and was named 'another'.; delete"),
        (with_code, "refused, nothing in it was run .*; delete checkpoint.task[*].pt in its folder to learn"),
        (with_steps, "the field fits.0..steps of its header is -1, and must be a whole number from 0; delete"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line(stopped: Path, change: Any, words: str) -> None:
    rewrite(stopped / FILE, change)
    with pytest.raises(ConfigError, match=rf"{FILE}: {words}"):
        run(stopped, *OPTIONS)
    assert not Path("owned").exists()
    checkpoint_file.remove(stopped / FILE)
    run(stopped, *OPTIONS)


def test_the_file_that_was_read_is_named_and_the_advice_works(stopped: Path, whole: Path) -> None:
    (stopped / FILE).unlink()
    rewrite(stopped / BEFORE, renamed)
    with pytest.raises(ConfigError, match=rf"{BEFORE}: does not belong .*; delete checkpoint.task[*].pt in its folder"):
        run(stopped, *OPTIONS)
    for file in stopped.glob("checkpoint.task*.pt"):
        file.unlink()
    run(stopped, *OPTIONS)
    assert_same_run(stopped, whole)


def test_what_null_leaves_unused_is_noted(stopped: Path, whole: Path) -> None:
    run(stopped, *OPTIONS, "job.checkpoint_minutes=null")
    assert_same_run(stopped, whole)
    because = f"because job.checkpoint_minutes is null, so that {FILE} was not used"
    assert notes(stopped)[-1] == f"the task at position 1 began anew, {because}"


def test_several_processes_write_once_per_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they ask for in one step is known to all of them after the next one."""
    now, steps = [0.0], list[float]()
    monkeypatch.setattr("clrun.running.task_fits.time.monotonic", lambda: now[0])
    hardware: Any = SimpleNamespace(world=2, main=True, asking=0, asked_for=0)
    fits = TaskFits(tmp_path / FILE, hardware, interval=10, config_hash="", backbone={}, allowed=[])
    monkeypatch.setattr(fits, "_keep", lambda *_, **__: True)
    monkeypatch.setattr(fits, "write", lambda _: steps.append(now[0]))
    for _ in range(40):
        now[0] += 1
        hardware.asked_for = 2 * hardware.asking  # as the average of the gradients does
        fits.after_step(SimpleNamespace(progress=Progress(step=1, total=40)))  # type: ignore[arg-type]
    assert steps == [11, 22, 33]


def test_null_writes_after_tasks_only(tmp_path: Path, whole: Path) -> None:
    run_signalled(tmp_path / "run", *OPTIONS, "job.checkpoint_minutes=null", at=10)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint*")] == ["checkpoint.pt"]
    run(tmp_path / "run", *OPTIONS)
    assert_same_run(tmp_path / "run", whole)


def test_evaluations_within_a_task_are_not_repeated(tmp_path: Path) -> None:
    options = (*OPTIONS, "job.eval_every=2")
    run(tmp_path / "whole", *options)
    for at in (2, 3, 8):
        run_signalled(tmp_path / f"at{at}", *options, at=at)
        run(tmp_path / f"at{at}", *options)
        assert_same_run(tmp_path / f"at{at}", tmp_path / "whole")


BUDGETS = [("foof",), ("m_fac",), ("kfac",), ("adamw",), ("sgd_cosine",), ("sgd", "budget.clip_norm=1.0")]


@pytest.mark.parametrize("options", BUDGETS, ids=lambda options: options[0])
def test_optimizers_and_schedules_go_on(tmp_path: Path, options: tuple[str, ...]) -> None:
    budget, *more = options
    options = ("method=finetune", *OPTIONS[1:], f"budget={budget}", *more)
    run(tmp_path / "whole", *options)
    run_signalled(tmp_path / "run", *options, at=3)
    run_signalled(tmp_path / "run", *options, at=1)
    run(tmp_path / "run", *options)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def tuning(out: Path) -> list[Any]:
    """Return the records of a search in run.json without its times."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(part) for key, part in value.items() if key != "seconds"}
        return [plain(part) for part in value] if isinstance(value, list) else value

    found: list[Any] = plain([c["tuning"] for c in json.loads((out / "run.json").read_text())["cost"]["tasks"]])
    return found


def test_a_search_goes_on_in_the_training_that_was_stopped(tmp_path: Path) -> None:
    options = (*OPTIONS, "job=stability_decay_smoke", "dataset.val_fraction=0.2", "job.max_steps=2")
    run(tmp_path / "whole", *options)
    for at in (3, 2):
        run_signalled(tmp_path / "run", *options, EVERY_STEP, at=at)
    run(tmp_path / "run", *options, EVERY_STEP)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert tuning(tmp_path / "run") == tuning(tmp_path / "whole")


def of_other_data(content: task_file.TaskFile) -> task_file.TaskFile:
    """Return what a run has written that learns from other rows of its first task."""
    assert content.data is not None
    record = content.data["record"]
    record["digest"], record["per_task"]["0"] = record["digest"][::-1], record["per_task"]["0"][::-1]
    return content


def test_changed_data_begin_the_task_anew(stopped: Path, whole: Path) -> None:
    rewrite(stopped / FILE, of_other_data)
    run(stopped, *OPTIONS)
    assert_same_run(stopped, whole)
    because = "because the data have changed since its checkpoint"
    assert notes(stopped)[-1] == f"the task at position 1 began anew, {because}"


# --- signals


def test_outside_a_step_a_signal_ends_at_once_and_what_was_learned_is_written(tmp_path: Path, whole: Path) -> None:
    """Fisher information is measured after the fit, whose result is then kept."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("clrun.methods.ewc.Ewc.end_task", lambda *_: os.kill(os.getpid(), signal.SIGUSR2))
        patch.setattr(TaskFits, "end", written_late(TaskFits.end))
        run(tmp_path / "run", *OPTIONS, EVERY_STEP)
    found = task_file.read(tmp_path / "run" / FILE, rank=0, main=True, tasks=2)
    assert [(fit.finished, fit.steps) for fit in found.fits] == [(True, 6)]
    run(tmp_path / "run", *OPTIONS)
    assert_same_run(tmp_path / "run", whole)
    assert notes(tmp_path / "run")[-1] == "resumed in the task at position 0, after its fit 'fit'"


def written_late(end: Any) -> Any:
    """Return `TaskFits.end` for fits that end shortly after a checkpoint was written."""

    def ending(self: TaskFits, running: Any) -> None:
        self.written = float("inf")
        end(self, running)

    return ending


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Collect the codes with which the process would end at once."""
    codes: list[int] = []
    monkeypatch.setattr("clrun.system.signals.os._exit", codes.append)
    yield codes


def test_a_second_signal_ends_at_once_but_not_within_two_seconds(
    quick: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell whose terminal is closed and the system send SIGHUP within a millisecond of each other."""
    with signals.caught(), signals.deferred():
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert (quick, signals.requested()) == ([], signal.SIGHUP)
        monkeypatch.setattr(signals._request, "since", -signals.SAME)
        os.kill(os.getpid(), signal.SIGUSR1)
    assert quick == [128 + signal.SIGUSR1]


def test_a_step_that_takes_too_long_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "PATIENCE", 0.01)
    with signals.caught(), pytest.raises(Stopped), signals.deferred():
        os.kill(os.getpid(), signal.SIGHUP)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            continue


def test_a_signal_that_is_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with signals.caught():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.requested() is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_command_ends_with_the_code_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = quiet(*OPTIONS)[0]
    assert config["job"]["checkpoint_minutes"] == 10
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(Recorder, "step", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        patch.setenv("CLRUN_DATA", str(tmp_path))
        main(
            [*OPTIONS, "job.progress=false", "hardware=cpu", "hardware.threads=1", f"hydra.run.dir={tmp_path / 'run'}"]
        )
    assert end.value.code == EXIT_CODE == 75
    assert capsys.readouterr().err.splitlines()[-1].startswith("clrun: stopped by SIGTERM; the same command with")


SCRIPT = """
import sys; sys.path[:0] = {paths!r}
from pathlib import Path
from running import run
if __name__ == "__main__":
    run(Path({out!r}), *{options!r})
"""


@pytest.mark.slow
def test_several_processes_stop_together_and_go_on(tmp_path: Path) -> None:
    options = (*OPTIONS, "hardware=cpu", "hardware.processes=2", "job.max_steps=null", "budget.epochs=15")
    run(tmp_path / "whole", *options)
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    script = tmp_path / "start.py"
    script.write_text(SCRIPT.format(paths=paths, out=str(tmp_path / "run"), options=options))
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert "Stopped: stopped by SIGTERM" in process.communicate(timeout=60)[1]
    found = task_file.read(tmp_path / "run" / FILE, rank=0, main=True, tasks=2)
    assert found.world == 2 and all(found.fits[-1].parts)
    run(tmp_path / "run", *options)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


TUNED = ("compress=magnitude_prune", "compress.epochs=1", "compress.samples=32", "budget=foof", *OPTIONS)


def test_fine_tuning_after_a_compression_is_kept_like_other_fits(tmp_path: Path) -> None:
    """Also with an optimizer that reads layers of the learner."""
    run(tmp_path, *TUNED, "job.max_tasks=1", "job.max_steps=1", EVERY_STEP)
    assert not [note for note in notes(tmp_path) if "checkpoint" in note]


@pytest.mark.slow
@pytest.mark.parametrize("at", [8, 20])
def test_a_run_that_stops_in_the_fine_tuning_after_a_compression_goes_on_there(at: int, tmp_path: Path) -> None:
    run(tmp_path / "whole", *TUNED)
    run_signalled(tmp_path / "again", *TUNED, EVERY_STEP, at=at)
    run(tmp_path / "again", *TUNED, EVERY_STEP)
    assert [note for note in notes(tmp_path / "again") if "in its fit 'compress'" in note]
    assert_same_run(tmp_path / "again", tmp_path / "whole")
