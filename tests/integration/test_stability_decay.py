"""job=stability_decay from the command: what it prints, records, refuses, and how it goes on after an interruption."""

import json
from pathlib import Path
from typing import Any

import pytest
from running import run

from clrun.cli import main
from clrun.running import tuning
from clrun.running.loggers import Console

SMALL = ("job.max_tasks=2", "job.max_steps=3", "dataset.val_fraction=0.2", "scenario.setting=til")
SEARCH = ("job=stability_decay", "job.tuning.lrs=[0.05,0.02]", "job.tuning.first_lrs=[]", *SMALL)
QUICK = ("backbone=cnn", "hardware.threads=1", "job.picture=false")


def searches(out: Path) -> list[dict[str, Any]]:
    """Return what run.json says of the searches."""
    return [cost["tuning"] for cost in json.loads((out / "run.json").read_text())["cost"]["tasks"]]


def without_times(value: Any) -> Any:
    """Return the record without what a clock said."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key != "seconds"}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def command(*arguments: str) -> int:
    """Run a command line and return its exit code."""
    with pytest.raises(SystemExit) as end:
        main([*QUICK, *arguments])
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.mark.parametrize("method", ["ewc", "er"])
def test_interrupted_within_a_search(method, tmp_path, monkeypatch):
    options = (f"method={method}", *SEARCH, "job.tuning.max_attempts=3", "job.tuning.drop=0.0")
    if method == "ewc":
        options += ("method.strength=1e6",)
    moments, stop = 0, None
    step = Console.step

    def watched(console: Console, progress: Any) -> None:
        nonlocal moments
        moments += 1
        if moments == stop:
            raise KeyboardInterrupt
        step(console, progress)

    monkeypatch.setattr(Console, "step", watched)
    value = run(tmp_path / "whole", *options)
    whole, record = (tmp_path / "whole" / "accuracy.csv").read_bytes(), searches(tmp_path / "whole")
    total = moments
    if method == "ewc":
        assert len(record[1]["stability"]["attempts"]) > 1
    else:
        assert record[1]["stability"] is None
    for at in (2, total // 2 + 4, total):
        out = tmp_path / f"at{at}"
        moments, stop = 0, at
        with pytest.raises(KeyboardInterrupt):
            run(out, *options)
        moments, stop = 0, None
        assert run(out, *options) == value
        assert (out / "accuracy.csv").read_bytes() == whole
        assert without_times(searches(out)) == without_times(record)


def test_the_command_searches_records_and_prints(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command("method=ewc", *SEARCH, "hydra.run.dir=s") == 0
    out, error = capfd.readouterr()
    assert error == ""
    for record in searches(Path("s")):
        grid, stability = record["plasticity"]["grid"], record["stability"]
        assert [entry["lr"] for entry in grid] == [0.05, 0.02]
        assert record["plasticity"]["accuracy"] == max(entry["accuracy"] for entry in grid)
        assert stability["threshold"] == pytest.approx(0.8 * record["plasticity"]["accuracy"])
        assert stability["converged"] == (stability["attempts"][-1]["accuracy"] >= stability["threshold"])
        assert record["plasticity"]["seconds"] > 0 and stability["seconds"] > 0
        assert stability["attempts"][0]["knobs"] == record["start"]
    table = out[out.index("hyper-parameters chosen") :].splitlines()
    assert table[1].split() == ["lr", "finetuned", "wanted", "reached", "trainings", "seconds", "options"]
    assert [line.split()[0] for line in table[2:4]] == ["1/2", "2/2"] and "strength 100" in table[2]
    logged = [json.loads(line) for line in Path("s/metrics.jsonl").read_text().splitlines()]
    assert {record["trial"] for record in logged} == {0, 1, 2}


def test_the_smoke_preset_is_cheap(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    counts: list[float] = []
    trial = tuning._Trials.run
    monkeypatch.setattr(tuning._Trials, "run", lambda *a, **k: counts.append(1) or trial(*a, **k))
    assert command("method=ewc", "job=stability_decay_smoke", "dataset.val_fraction=0.2", "hydra.run.dir=s") == 0
    assert len(counts) == 2 * 3 and len(searches(Path("s"))) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "job.tuning: needs validation rows of every task; set dataset.val_fraction above 0, e.g. 0.1"),
        (("job.eval_every=5",), "job.eval_every: excludes job.tuning, which learns each task several times"),
        (("job.tuning.lrs=[]",), "job.tuning.lrs: empty; give at least one learning rate"),
        (("job.tuning.lrs=[0]",), "job.tuning.lrs: in each item must be greater than 0, got [0]"),
        (("job.tuning.decay=1",), "job.tuning.decay: a factor of 1 leaves the knobs unchanged"),
        (("job.tuning.drop=2",), "job.tuning.drop: must be at most 1, got 2"),
        (("job.tuning=3",), "job.tuning: expected a node with a _target_ or null, got 3"),
        (("job.tuning.drops=1",), "job.tuning.drops: unknown option of job=stability_decay; did you mean 'drop'?"),
    ],
)
def test_mistakes(arguments, message, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command("job=stability_decay", *arguments, "hydra.run.dir=s") == 2
    _, error = capfd.readouterr()
    assert message in error and error.count("\n") == 1
    assert not Path("s").exists()
