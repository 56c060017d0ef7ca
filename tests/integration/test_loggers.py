"""What the loggers show: bars on a terminal, and the numbers of run.json as TensorBoard events."""

import json
import sys
from types import SimpleNamespace

import pytest
from running import run, run_interrupted

from clrun.system.errors import ConfigError

SMALL = ("method=finetune", "job.max_tasks=2", "budget.epochs=1", "job.max_steps=3")


class Writer:
    """Stands in for TensorBoard's."""

    opened: list["Writer"] = []

    def __init__(self, folder, filename_suffix):
        self.folder, self.suffix, self.scalars, self.closed = folder, filename_suffix, [], False
        self.opened.append(self)

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def close(self):
        self.closed = True


@pytest.fixture
def writers(monkeypatch):
    """The writers that a run opens."""
    monkeypatch.setattr(Writer, "opened", [])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    return Writer.opened


def accuracies(out):
    """Return {(name, tasks learned): accuracy} as run.json has them."""
    stored = json.loads((out / "run.json").read_text())
    return {
        (f"accuracy_{setting}/task {stored['task_order'][column]}", learned): value
        for setting, matrix in stored["accuracy_matrix"].items()
        for learned, row in enumerate(matrix, start=1)
        for column, value in enumerate(row)
        if value is not None
    }


def test_tensorboard_gets_losses_and_accuracies(tmp_path, writers):
    run(tmp_path, "logger=tensorboard", *SMALL)
    (writer,) = writers
    assert writer.folder == str(tmp_path / "tensorboard") and writer.closed
    assert {(n, s): v for n, v, s in writer.scalars if n.startswith("accuracy")} == accuracies(tmp_path)
    assert [(n, s) for n, _, s in writer.scalars if n == "train/loss"] == [("train/loss", 3), ("train/loss", 6)]


def test_steps_go_on_where_a_killed_run_stopped(tmp_path, writers):
    run_interrupted(tmp_path, "logger=tensorboard", *SMALL)
    run(tmp_path, "logger=tensorboard", *SMALL)
    assert [[s for n, _, s in writer.scalars if n == "train/loss"] for writer in writers] == [[3], [6]]
    assert len({writer.suffix for writer in writers}) == 2, "names of event files cannot be guessed"


def test_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="^logger=tensorboard: .*is not installed; run pip install tensorboard$"):
        run(tmp_path / "run", "logger=tensorboard", *SMALL)
    assert not (tmp_path / "run").exists()


def test_events_can_be_read(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(tmp_path, "logger=tensorboard", *SMALL)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = {(tag, e.step): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    for key, value in accuracies(tmp_path).items():
        assert found[key] == pytest.approx(value)


def test_bars_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run(tmp_path, *SMALL, "job.progress=true")
    shown = capsys.readouterr()
    assert "task 1 0/1" in shown.err and "tasks:   0%" in shown.err
    assert shown.out.splitlines()[-1] == f"results: {tmp_path}"
    assert shown.out == (tmp_path / "clrun.log").read_text()
