"""`clrun status`: how far a sweep is, from files alone."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from test_reporting import write_run

from clrun.cli import main
from clrun.reporting import status
from clrun.reporting.status import JOBS, State, Watched, duration, left_seconds, page
from clrun.system.errors import ConfigError
from clrun.system.locks import locked


def ago(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat(timespec="seconds")


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep of six jobs, of which one was not begun."""
    (tmp_path / JOBS).write_text("done\nagain\nbroken\nlost\nnow\nlater\n")
    write_run(tmp_path / "done", started=ago(1000), finished=ago(900))
    write_run(tmp_path / "again", started=ago(900), finished=ago(700))
    write_run(tmp_path / "broken", status="failed", error="NumericalError: the loss is NaN")
    cost = {"tasks": [{"train_seconds": 1.0}]}
    for name in ("lost", "now"):
        write_run(tmp_path / name, status="running", started=ago(120), cost=cost)
    records = [json.dumps({"step": step, "loss": 0.5}) for step in range(300)]
    (tmp_path / "now" / "metrics.jsonl").write_text("\n".join(records) + "\n")
    return tmp_path


def test_every_run_is_in_one_state(sweep: Path) -> None:
    with locked(sweep / "now" / "lock"):
        found = Watched(sweep).look()
    assert {name: state.status for name, state in found.items()} == {
        "done": "completed",
        "again": "completed",
        "broken": "failed",
        "lost": "interrupted",
        "now": "running",
        "later": "missing",
    }
    assert found["now"].text.startswith("task 2 of 4, step 299, for 2 min, process ")
    assert found["broken"].text == "NumericalError: the loss is NaN"
    text = page(sweep, found)
    head = "6 runs: 2 completed, 1 running, 1 failed, 1 interrupted, 1 missing\nestimated end: "
    assert head in text and "missing (1):\n  later" in text and "done" not in text.partition("\n")[2]


def test_a_search_counts_by_its_runs_and_advice_names_the_folder(sweep: Path) -> None:
    write_run(sweep / "later" / "orders" / "first")
    found = Watched(sweep).look()
    assert "later" not in found and found["later/orders/first"].status == "completed"
    assert found["lost"].text.endswith(f"; the same command with hydra.sweep.dir={sweep} goes on with it")
    [alone] = Watched(sweep / "lost").look().values()
    assert alone.text.endswith(f"; the same command with hydra.run.dir={sweep / 'lost'} goes on with it")


def test_files_of_ended_runs_are_read_once(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched, read = Watched(sweep), []
    first = watched.look()
    whole = status.read_run
    monkeypatch.setattr(status, "read_run", lambda path: read.append(path.name) or whole(path))
    assert watched.look().keys() == first.keys()
    assert sorted(read) == ["lost", "now"]


def test_the_end_is_estimated_from_complete_runs() -> None:
    done, now, later = State("completed", "", 100.0), State("running", "", 30.0), State("missing")
    assert left_seconds([done, now, later, later]) == 270  # two of 100 s, and 70 s of the one that runs
    assert left_seconds([done, now, now, later, later]) == 170  # two at once
    assert left_seconds([now, later]) is None and left_seconds([done, later]) is None


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (725, "12 min"), (11100, "3 h 5 min"), (187200, "2 d 4 h")])
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_watching_ends_with_the_work(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    beats = []
    with locked(sweep / "sweep.lock") as _:
        pages = status.watch(sweep, seconds=0.0)
        beats += [next(pages), next(pages)]
    beats += list(pages)  # the process that held the sweep has ended
    assert len(beats) == 3
    with pytest.raises(SystemExit) as end:
        main(["status", str(sweep), "--watch", "0"])
    assert end.value.code == 2 and "--watch must be a number of seconds" in capsys.readouterr().err


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run"):
        Watched(tmp_path).look()


def test_damaged_files_are_listed(sweep: Path) -> None:
    (sweep / "done" / "run.json").write_text("{")
    (sweep / "now" / "metrics.jsonl").write_text("no record")
    with locked(sweep / "now" / "lock"):
        found = Watched(sweep).look()
    assert found["done"].status == "unreadable" and "run.json" in found["done"].text
    assert found["now"].text.startswith("task 2 of 4, for ")
