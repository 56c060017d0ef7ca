"""Sweeps of real runs: orders compared by task id, launchers that agree, what is finished is not run again."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SMALL = (
    "backbone=cnn",
    "hardware.threads=1",
    "job.max_steps=2",
    "job.picture=false",
    "job.progress=false",
    "budget.epochs=1",
)


def runs(folder: Path) -> dict[str, bytes]:
    """Return the accuracy.csv of every run below `folder` by the name of its folder."""
    return {path.parent.name: path.read_bytes() for path in folder.glob("*/accuracy.csv")}


def test_orders_are_compared_by_task(command, tmp_path: Path) -> None:
    sweep = ("-m", "method=finetune,simplecil", "task_order=random", "task_order.seed=range(3)", *SMALL)
    code, out, _ = command(*sweep, "hydra.sweep.dir=s")
    assert code == 0
    entries = {(e["method"], e["setting"]): e for e in json.loads(Path("s/order_robustness.json").read_text())}
    assert set(entries) == {(m, s) for m in ("finetune", "simplecil") for s in ("cil", "til")}
    closed = entries["simplecil", "cil"]
    assert closed["aopd"] == closed["mopd"] == closed["sd"] == 0
    assert closed["opd"] == {str(task): 0 for task in range(5)}
    assert (closed["n_orders"], closed["n_seeds"], closed["missing"]) == (3, 1, [])
    assert len({tuple(order) for order in closed["orders"]}) == 3
    assert entries["finetune", "cil"]["aopd"] > 0.1
    with Path("s/sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["completed"] * 6
    table = [line for line in out.splitlines() if line.startswith(("simplecil", "finetune"))]
    assert [line.split()[0] for line in table] == ["simplecil", "finetune"], "best first"


def test_what_is_finished_is_not_run_again(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = ("-m", "method=finetune", "seed=0,1", *SMALL, "hydra.sweep.dir=s")
    assert command(*sweep)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in Path("s").glob("*/*") if path.is_file()}
    first = runs(Path("s"))
    victim = next(Path("s").glob("*seed-1*"))
    for name in ("run.json", "accuracy.csv"):
        (victim / name).unlink()
    assert command(*sweep)[0] == 0
    assert runs(Path("s")) == first
    after = {path: path.stat().st_mtime_ns for path in Path("s").glob("*/*") if path.is_file()}
    changed = {path.parent.name for path in before if before[path] != after.get(path)}
    assert changed == {victim.name}
    monkeypatch.setitem(sys.modules, "clrun.running.run", None)  # a complete sweep is noticed without what runs it
    code, out, _ = command(*sweep)
    assert code == 0 and "2 of 2 runs were complete already" in out and "finetune" in out
    assert command("status", "s")[1].startswith("s: 2 runs: 2 completed\n")
    assert command(*sweep, "budget.optimizer.lr=0.3")[0] == 1  # another configuration would run


def test_files_of_complete_runs_that_have_changed_are_told(command, tmp_path: Path) -> None:
    for name in ("train", "test"):
        for label, start in (("a", 0), ("b", 9)):
            (tmp_path / "data" / name / label).mkdir(parents=True)
            for k in range(3):
                pixels = np.full((8, 8, 3), 10 * k + start + 100 * (name == "test"), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / name / label / f"{k}.png")
    data = ("dataset=folder", f"dataset.root={tmp_path}/data", "dataset.images.size=8", "scenario.n_tasks=2")
    sweep = ("-m", "method=finetune", "seed=0,1", *data, *SMALL, "hydra.sweep.dir=s")
    assert command(*sweep)[0] == 0
    assert "note:" not in command(*sweep)[1]
    (tmp_path / "data" / "test" / "a" / "0.png").unlink()
    [note] = [line for line in command(*sweep)[1].splitlines() if line.startswith("note: the data")]
    assert note.startswith("note: the data have changed since this run: 1 test row gone")
    assert note.endswith("[2 of 2 runs]")


def test_a_failing_job_is_listed_and_stops_nobody(command, tmp_path: Path) -> None:
    sweep = ("-m", "method=finetune", "budget.optimizer.lr=1e30,0.05", *SMALL, "hydra.sweep.dir=s")
    code, out, err = command(*sweep, "job.max_steps=50")
    assert code == 1
    with Path("s/sweep.csv").open() as file:
        status = {row["budget.optimizer.lr"]: (row["status"], row["error"]) for row in csv.DictReader(file)}
    assert status["0.05"][0] == "completed"
    assert status["1e+30"][0] == "failed" and "the loss is" in status["1e+30"][1]
    assert "NumericalError: the loss is" in err
    assert "failed" in out


@pytest.mark.parametrize("launcher", ["joblib", pytest.param("submitit_local", marks=pytest.mark.slow)])
def test_parallel_launchers_agree_with_the_serial_one(launcher: str, command, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher" if launcher == "joblib" else "submitit")
    sweep = ("-m", "method=er", "seed=0,1", *SMALL)
    assert command(*sweep, "hydra.sweep.dir=serial")[0] == 0
    assert command(*sweep, "hydra.sweep.dir=parallel", f"hydra/launcher={launcher}")[0] == 0
    serial = runs(Path("serial"))
    assert len(serial) == 2
    assert runs(Path("parallel")) == serial
    used = [json.loads(p.read_text())["versions"]["threads"] for p in Path("parallel").glob("*/run.json")]
    assert used == [1, 1]


def test_report_rebuilds_tables_from_runs_alone(command, tmp_path: Path) -> None:
    for name, method in (("a", "finetune"), ("b", "simplecil")):
        assert (
            command("-m", f"method={method}", "task_order=reverse,canonical", *SMALL, f"hydra.sweep.dir={name}")[0] == 0
        )
    kept = Path("a/order_robustness.json").read_text()
    for name in ("order_robustness.json", "sweep.csv"):
        Path("a", name).unlink()
    code, out, _ = command("report", "a")
    assert code == 0 and "finetune" in out
    assert Path("a/order_robustness.json").read_text() == kept
    code, out, _ = command("report", "a", "b")
    assert code == 0 and "finetune" in out and "simplecil" in out
    assert not list(Path("b").glob("*.tmp"))
    assert len(list(Path("a").glob("*/accuracy_matrix.png"))) == 2, "pictures that were switched off are drawn"
