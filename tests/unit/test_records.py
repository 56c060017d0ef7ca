"""The files of one run."""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import yaml

from clrun.results.records import COLUMNS, RunFolder, RunRecord
from clrun.system.errors import ConfigError


def row(position, task, task_position, setting="cil", **changes):
    content = {
        "step": 30 * position,
        "position": position,
        "after": 4,
        "task": task,
        "task_position": task_position,
        "split": "test",
        "setting": setting,
        "correct": 3,
        "total": 10,
        "task_correct": 5,
        "nll": 1 / 3,
        "phase": "end",
    }
    return content | changes


ROWS = [row(1, 4, 0), row(1, 4, 0, "til"), row(2, 4, 0), row(2, 4, 0, "til"), row(2, 1, 1), row(2, 1, 1, "til")]
RUN = {
    "schema": 1,
    "status": "completed",
    "error": None,
    "name": "er-digits",
    "seed": 3,
    "config": {"method": {"_target_": "os.system", "command": "true"}, "seed": 3},
    "choices": {"method": "er"},
    "task_order": [4, 1],
    "cost": {"tasks": []},
    "versions": {"python": "3.11"},
}


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "a" / "run")
    folder.create()
    return folder


def test_rows_are_appended_sorted_with_one_header(folder):
    folder.append_rows([ROWS[1], ROWS[0]])
    folder.append_rows(ROWS[:1:-1])
    text = (folder.path / "accuracy.csv").read_bytes().decode()
    assert text.splitlines()[0] == ",".join(COLUMNS)
    assert text.splitlines()[1] == "30,1,4,4,0,test,cil,3,10,5,0.333333333,end"
    assert text.endswith("\n") and "\r" not in text
    table = pd.read_csv(folder.path / "accuracy.csv")
    assert table[["position", "task_position", "setting"]].values.tolist() == [
        [r["position"], r["task_position"], r["setting"]] for r in ROWS
    ]


def test_rewriting_gives_the_bytes_of_appending(folder):
    for start in (0, 2):
        folder.append_rows(ROWS[start : start + 2 + start])
    appended = (folder.path / "accuracy.csv").read_bytes()
    folder.append_rows(ROWS[:1])
    folder.write_rows(ROWS)
    assert (folder.path / "accuracy.csv").read_bytes() == appended
    table = pd.read_csv(folder.path / "accuracy.csv").to_dict("records")
    assert table == [r | {"nll": 0.333333333} for r in ROWS]


def test_the_matrix_can_be_read_with_pandas_alone(folder):
    folder.append_rows(ROWS)
    table = pd.read_csv(folder.path / "accuracy.csv").query("phase=='end' and setting=='cil'")
    matrix = table.pivot(index="position", columns="task", values="correct")
    assert matrix.loc[2].tolist() == [3, 3] and np.isnan(matrix.loc[1, 1])


def test_config_survives_yaml(folder):
    config = {"name": "café: #1", "lr": 1e-5, "big": float("inf"), "x": None, "list": [0, "a"], "deep": {"on": "yes"}}
    folder.write_config(config)
    assert yaml.safe_load((folder.path / "config.yaml").read_text("utf-8")) == config


def test_run_json_is_read_back_without_nan(folder):
    assert folder.read_run() is None
    folder.write_run(RUN | {"metrics": {"cil": {"forgetting": float("nan")}}})
    assert "NaN" not in (folder.path / "run.json").read_text()
    assert folder.read_run()["metrics"] == {"cil": {"forgetting": None}}
    assert os.listdir(folder.path) == ["run.json"]


def test_the_log_is_cut_before_the_unfinished_task(folder):
    folder.truncate_log(1)
    for position in (0, 0, 1, 2):
        folder.append_log({"position": position, "loss": 0.5})
    log = folder.path / "metrics.jsonl"
    with log.open("a") as file:
        file.write('{"position": 2, "lo')
    folder.truncate_log(3)
    assert [json.loads(line)["position"] for line in log.read_text().splitlines()] == [0, 0, 1, 2]
    folder.truncate_log(1)
    assert [json.loads(line)["position"] for line in log.read_text().splitlines()] == [0, 0]
    folder.truncate_log(0)
    assert log.read_text() == ""


def test_a_folder_in_use_is_refused(folder):
    with folder.locked():
        with pytest.raises(ConfigError, match="run: in use by process"), folder.locked():
            pytest.fail("the folder was given to two holders")
        assert (folder.path / "lock").exists(), "whoever was refused leaves the lock of the holder alone"
    assert not (folder.path / "lock").exists()


def test_a_folder_made_for_a_lock_and_left_empty_is_removed_with_its_parents(tmp_path):
    nested = RunFolder(tmp_path / "a" / "b")
    with nested.locked():
        assert nested.path.is_dir()
    assert not (tmp_path / "a").exists()
    with nested.locked():
        (nested.path / "file").touch()
    assert (nested.path / "file").exists()


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/run: cannot be written \(Not a directory\)"):
        RunFolder(tmp_path / "file" / "run").create()


def test_a_record_holds_what_the_folder_says(folder):
    folder.write_run(RUN)
    folder.append_rows(ROWS)
    record = RunRecord.load(folder.path)
    assert (record.name, record.status, record.error, record.seed, record.order) == (
        "er-digits",
        "completed",
        "",
        3,
        (4, 1),
    )
    assert record.choices == {"method": "er"}
    assert set(record.matrices) == {("test", "cil"), ("test", "til")}
    assert record.matrices["test", "cil"].final() == {4: 0.3, 1: 0.3}


def test_a_torn_last_line_is_left_out(folder):
    folder.write_run(RUN)
    folder.append_rows(ROWS)
    path = folder.path / "accuracy.csv"
    path.write_bytes(path.read_bytes()[:-5])
    matrices = RunRecord.load(folder.path).matrices
    assert matrices["test", "cil"].final() == {4: 0.3, 1: 0.3}
    assert matrices["test", "til"].total.tolist() == [10, 0]


def test_a_run_that_ended_before_its_stream_has_no_matrices(folder):
    folder.write_run(RUN | {"task_order": None, "status": "failed", "error": "boom"})
    record = RunRecord.load(folder.path)
    assert record.order == () and record.matrices == {} and record.error == "boom"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": 2}, "not written by this version"),
        ({"config": None}, "config: expected a mapping"),
        ({"seed": "0"}, "seed: expected a whole number"),
        ({"seed": True}, "seed: expected a whole number"),
        ({"task_order": [1, 1]}, "task_order: has a task twice"),
        ({"task_order": "01"}, "task_order: expected a list"),
        ({"cost": [1]}, "cost: expected a mapping"),
        ({"task_order": [1, 4]}, "position 1"),
    ],
)
def test_foreign_content_is_refused_by_name(folder, change, says):
    folder.write_run(RUN | change)
    folder.append_rows(ROWS)
    with pytest.raises(ConfigError, match=says) as caught:
        RunRecord.load(folder.path)
    assert str(folder.path) in str(caught.value)


def test_an_empty_list_of_costs_is_no_cost(folder):
    folder.write_run(RUN | {"cost": []})
    folder.append_rows(ROWS)
    assert not RunRecord.load(folder.path).cost


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000, "\udcff"])
def test_unreadable_run_json_is_refused(folder, text):
    (folder.path / "run.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ConfigError, match="run.json"):
        RunRecord.load(folder.path)


@pytest.mark.parametrize(
    "text", ["", "a,b\n", ",".join(COLUMNS) + "\n1,2\n", ",".join(COLUMNS) + "\n" + "x," * 11 + "\n"]
)
def test_unreadable_accuracy_csv_is_refused(folder, text):
    folder.write_run(RUN)
    (folder.path / "accuracy.csv").write_text(text)
    with pytest.raises(ConfigError, match="accuracy.csv"):
        RunRecord.load(folder.path)


def test_a_pipe_does_not_block_the_reader(folder):
    os.mkfifo(folder.path / "run.json")
    with pytest.raises(ConfigError, match="not a regular file"):
        RunRecord.load(folder.path)


def test_reading_imports_nothing(folder):
    folder.write_run(RUN)
    folder.append_rows(ROWS)
    code = (
        "import sys, pathlib; from clrun.results.records import RunRecord; from clrun import reporting\n"
        "from clrun.results import metrics, robustness\n"
        "RunRecord.load(pathlib.Path(sys.argv[1]))\n"
        "reporting.refresh(pathlib.Path(sys.argv[1]).parent)\n"
        "print(sorted({'torch', 'timm', 'torchvision', 'pickle5', 'hydra', 'pandas', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder.path)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
