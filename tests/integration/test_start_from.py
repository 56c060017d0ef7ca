"""A complete run goes on in a new folder from its kept checkpoint, and stays as it is."""

import json
from pathlib import Path
from typing import Any

import pytest
from running import fitting, run, run_interrupted

from clrun.learning.progress import Progress
from clrun.reporting import refresh
from clrun.running.recorder import Recorder
from clrun.system.errors import ConfigError
from clrun.system.yaml_files import conf_dir

pytestmark = pytest.mark.records  # files, and bits of runs of one layout

METHODS = sorted(path.stem for path in (conf_dir() / "method").glob("*.yaml"))
KINDS = ("er", "ewc", "hat", "simplecil")
SHORT = ("budget.epochs=1", "job.max_steps=2")
ER = ("method=er", "method.capacity=20", *SHORT)
KEPT = ("job.max_tasks=2", "job.keep_checkpoint=true")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("method", [m if m in KINDS else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_more_tasks_end_as_an_uninterrupted_run(method: str, tmp_path: Path) -> None:
    options = (f"method={method}", *fitting(method), *SHORT)
    run(tmp_path / "short", *options, *KEPT)
    before = files(tmp_path / "short")
    longer = (*options, "job.max_tasks=3")
    try:
        value = run(tmp_path / "long", *longer, f"job.start_from={tmp_path / 'short'}")
    except ConfigError as error:
        assert "divides something among all tasks" in str(error)
        return
    assert value == run(tmp_path / "whole", *longer)
    for name in ("accuracy.csv", "metrics.jsonl"):
        assert files(tmp_path / "long").get(name) == files(tmp_path / "whole").get(name)
    assert files(tmp_path / "short") == before
    assert record(tmp_path / "long")["config_hash"] == record(tmp_path / "whole")["config_hash"]


@pytest.fixture
def short(tmp_path: Path) -> Path:
    run(tmp_path / "short", *ER, *KEPT)
    return tmp_path / "short"


def test_the_start_is_recorded_and_survives_an_interruption(short: Path, tmp_path: Path) -> None:
    options = (*ER, "job.max_tasks=4", f"job.start_from={short}")
    run_interrupted(tmp_path / "long", *options)
    assert record(tmp_path / "long")["cost"]["tasks"][2]["position"] == 2
    run(tmp_path / "long", *options)
    found = record(tmp_path / "long")
    assert found["started_from"]["folder"] == str(short) and found["started_from"]["identical"]
    assert found["started_from"]["changed"] == {"job.max_tasks": [2, 4]}
    assert f"went on after 2 tasks from {short} (job.max_tasks was 2 and is 4)" in found["notes"]
    run(tmp_path / "whole", *ER, "job.max_tasks=4")
    assert (tmp_path / "long" / "accuracy.csv").read_bytes() == (tmp_path / "whole" / "accuracy.csv").read_bytes()


def test_another_budget_is_noted_and_reported_apart(short: Path, tmp_path: Path) -> None:
    other = ("method=er", "method.capacity=20", "budget.epochs=2", "job.max_steps=3", "job.max_tasks=3")
    run(tmp_path / "sweep" / "long", *other, f"job.start_from={short}")
    found = record(tmp_path / "sweep" / "long")
    assert not found["started_from"]["identical"]
    assert any("no uninterrupted run has this result" in note for note in found["notes"])
    run(tmp_path / "sweep" / "whole", *other)
    assert [cost["steps"] for cost in found["cost"]["tasks"]] == [2, 4, 7]
    groups = refresh(tmp_path / "sweep").groups
    assert sorted(str(group.differing.get("start")) for group in groups) == [
        "2 tasks with budget.epochs=1 job.max_steps=2",
        "None",
    ]


def test_a_begun_task_goes_on_from_the_same_run(short: Path) -> None:
    """Its checkpoint within the task has the weights of that run."""
    out, options = short.parent / "long", (*ER, "job.max_tasks=3", "job.checkpoint_minutes=1e-9")
    options += (f"job.start_from={short}",)

    def stopping(_: Recorder, progress: Progress) -> None:
        if progress.step == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Recorder, "step", stopping)
        run(out, *options)
    found = record(out)
    other = found | {"started_from": found["started_from"] | {"config_hash": "1"}}
    (out / "run.json").write_text(json.dumps(other))
    with pytest.raises(ConfigError, match="went on from .*short, which was another one, and has begun a task; name"):
        run(out, *options)
    (out / "run.json").write_text(json.dumps(found))
    run(out, *options)
    assert "resumed in the task at position 2, in its fit 'fit'" in record(out)["notes"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("job.max_tasks=3", "seed=1"), "another configuration .seed differ"),
        (("job.max_tasks=3", "budget.batch_size=8"), "another configuration .budget.batch_size differ"),
        (("job.max_tasks=2",), "nothing is left to learn .*its 2 tasks are learned, and this run has 2"),
        (("job.max_tasks=1",), "nothing is left to learn .*its 2 tasks are learned, and this run has 1"),
    ],
)
def test_refusals(options: tuple[str, ...], words: str, short: Path, tmp_path: Path) -> None:
    before = files(short)
    with pytest.raises(ConfigError, match=words) as raised:
        run(tmp_path / "long", *ER, *options, f"job.start_from={short}")
    assert "\n" not in str(raised.value)
    assert files(short) == before and not (tmp_path / "long").exists()


def test_what_cannot_be_gone_on_from(tmp_path: Path) -> None:
    long = (*ER, "job.max_tasks=3", f"job.start_from={tmp_path / 'short'}")
    with pytest.raises(ConfigError, match="there is no run in .*short"):
        run(tmp_path / "long", *long)
    run_interrupted(tmp_path / "short", *ER, *KEPT)
    with pytest.raises(ConfigError, match="is not complete .interrupted."):
        run(tmp_path / "long", *long)
    run(tmp_path / "short", *ER, *KEPT)
    (tmp_path / "short" / "checkpoint.pt").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="has kept no checkpoint"):
        run(tmp_path / "long", *long)
    (tmp_path / "short" / "checkpoint.pt").write_bytes((tmp_path / "moved").read_bytes()[:-5])
    with pytest.raises(ConfigError, match="checkpoint.pt: refused"):
        run(tmp_path / "long", *long)


def test_a_method_that_divides_its_memory_among_all_tasks_is_refused(tmp_path: Path) -> None:
    options = ("method=a_gem", "method.memory=ring", "method.capacity=20", *SHORT)
    run(tmp_path / "short", *options, *KEPT)
    with pytest.raises(ConfigError, match="AGem, as configured, divides something among all tasks"):
        run(tmp_path / "long", *options, "job.max_tasks=3", f"job.start_from={tmp_path / 'short'}")
