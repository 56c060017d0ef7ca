"""A run that was stopped at any moment and started again ends as if it had never been stopped."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import fitting, run, run_interrupted

from clrun.system import files
from clrun.system.yaml_files import conf_dir

pytestmark = pytest.mark.records  # files, and bits of runs of one layout

METHODS = sorted(path.stem for path in (conf_dir() / "method").glob("*.yaml"))
SHORT = ("job.max_tasks=2", "budget.epochs=1", "job.max_steps=3")
LONG = ("job.max_tasks=3", "budget.epochs=3")


# All learners write the same files at the same moments, and the contract tests resume each of them after every task.
# One learner is interrupted at every moment in the default run. One of each other kind of state is interrupted at every
# third moment, which is at least one between any two checkpoints. The slow tests interrupt all at every moment.
SOME = [("er", 1, 1), ("ewc", 1, 3), ("halrp", 2, 3)]
ALL = [(method, 1, 1) for method in METHODS if method != "er"]


class Write:
    """Counts the moments at which a file of a run changes, and raises at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.at = 0, None
        replace, append = os.replace, files.append_text

        def replacing(source: str, target: str, **folders: int) -> None:
            self.moment()  # the temporary file is written, its rename not yet done
            replace(source, target, **folders)
            self.moment()

        def appending(path: Path, text: str) -> None:
            append(path, text)
            self.moment()

        monkeypatch.setattr("clrun.system.files.os.replace", replacing)
        monkeypatch.setattr("clrun.results.records.append_text", appending)

    def moment(self) -> None:
        self.count += 1
        if self.count == self.at:
            raise KeyboardInterrupt


def parameters(out: Path) -> dict[str, int]:
    """Return the numbers of parameters that a run noted at its end."""
    counts: dict[str, int] = json.loads((out / "run.json").read_text())["cost"]["parameters"]
    return counts


@pytest.mark.parametrize(("method", "first", "step"), SOME + [pytest.param(*x, marks=pytest.mark.slow) for x in ALL])
def test_interrupted_at_every_write(
    method: str, first: int, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (f"method={method}", *fitting(method), *SHORT)
    run(tmp_path / "first", *options)  # features of a frozen backbone are in the cache from here on
    write = Write(monkeypatch)
    value = run(tmp_path / "whole", *options)
    whole = (tmp_path / "whole" / "accuracy.csv").read_bytes()
    assert len(whole.splitlines()) > 3
    moments = write.count
    assert moments > 12
    for at in range(first, moments + 1, step):
        out = tmp_path / f"at{at}"
        write.count, write.at = 0, at
        with pytest.raises(KeyboardInterrupt):
            run(out, *options)
        write.at = None
        assert run(out, *options) == value
        assert (out / "accuracy.csv").read_bytes() == whole
        assert parameters(out) == parameters(tmp_path / "whole")
        assert not (out / "checkpoint.pt").exists()
        shutil.rmtree(out)


def notes(out: Path) -> list[str]:
    """Return the notes of a run."""
    found: list[str] = json.loads((out / "run.json").read_text())["notes"]
    return found


def test_a_resumed_run_notes_what_may_change_its_last_bits(tmp_path: Path) -> None:
    options = ("method=finetune", "job.max_tasks=3", "budget.epochs=1", "job.max_steps=1")
    run_interrupted(tmp_path, *options)
    stored = json.loads((tmp_path / "run.json").read_text())
    here = stored["versions"]["cpu_capability"]
    stored["versions"] |= {"cpu_capability": "AVX9", "platform": "one that does not matter"}
    (tmp_path / "run.json").write_text(json.dumps(stored))
    run_interrupted(tmp_path, *options)
    elsewhere = f"resumed on other hardware or software (cpu_capability was AVX9 and is {here}): "
    elsewhere += "an uninterrupted run may differ slightly"
    assert notes(tmp_path) == ["resumed after 1 tasks", elsewhere]
    run(tmp_path, *options)
    assert notes(tmp_path) == ["resumed after 1 tasks", elsewhere, "resumed after 2 tasks"]


@pytest.fixture(scope="module")
def processes() -> Iterator[multiprocessing.context.ForkServerContext]:
    """Processes that begin with everything imported, so that a kill falls into the run and not into the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["running", "clrun.reporting.figures", "sklearn.datasets"])
    yield context


def killed(
    context: multiprocessing.context.ForkServerContext, out: Path, options: tuple[str, ...], after: float
) -> int:
    """Run `options` in a new process and kill it after some seconds; return its exit code."""
    process = context.Process(target=run, args=(out, *options))
    process.start()
    process.join(after)
    process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def one_kill(context, tmp_path: Path, method: str, seed: int) -> None:
    options = (f"method={method}", *fitting(method), *LONG)
    start = time.perf_counter()
    assert killed(context, tmp_path / "whole", options, 60) == 0
    duration = time.perf_counter() - start
    whole = (tmp_path / "whole" / "accuracy.csv").read_bytes()
    stored = json.loads((tmp_path / "whole" / "run.json").read_text())
    value = stored["metrics"][stored["setting"]]["average_accuracy"]
    draw = random.Random(f"{method} {seed}")
    out = tmp_path / "killed"
    for _ in range(5):  # a kill that came after the end is no kill
        if killed(context, out, options, draw.uniform(0.02, duration)) == -signal.SIGKILL:
            break
        shutil.rmtree(out)
    else:
        pytest.fail("the run was never caught alive")
    assert run(out, *options) == value
    assert (out / "accuracy.csv").read_bytes() == whole


KILLS = [(method, seed) for seed in range(3) for method in METHODS]


@pytest.mark.parametrize(("method", "seed"), [("er", 0)])
def test_killed_at_a_random_moment(processes, tmp_path: Path, method: str, seed: int) -> None:
    one_kill(processes, tmp_path, method, seed)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "seed"), KILLS)
def test_killed_at_more_random_moments(processes, tmp_path: Path, method: str, seed: int) -> None:
    one_kill(processes, tmp_path, method, seed + 100)
