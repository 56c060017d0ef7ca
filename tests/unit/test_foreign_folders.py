"""Folders of runs from somebody else: what is read of them, how much, and what of it reaches terminal and browser."""

import base64
import csv
import hashlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from html import unescape
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_report_page import full, search_record
from test_reporting import config_of, sweep, write_run

from clrun.api import ConfigError, load, load_sweep
from clrun.cli import main
from clrun.reporting import refresh, report
from clrun.reporting.tables import command
from clrun.results.records import RunRecord
from clrun.system import reading
from clrun.system.files import csv_cell, csv_text
from clrun.system.reading import read_json, read_regular

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\r"


def printed(capsys, *words):
    """What the command writes to both streams, and its exit code."""
    with pytest.raises(SystemExit) as end:
        main([*words])
    out, err = capsys.readouterr()
    return out + err, end.value.code


def changed(folder, **keys):
    """Change keys of a run.json; None removes nothing."""
    path = Path(folder) / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


# --- what is read


def test_only_regular_json_files_up_to_a_size_are_read(tmp_path):
    (tmp_path / "good").write_text('{"a": 1}')
    assert read_json(tmp_path / "good", remedy="remove it", limit=8) == {"a": 1}
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "good")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "bad").write_text("{")
    (tmp_path / "nan").write_text("NaN")
    (tmp_path / "deep").write_text("[" * 100_000)
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**40)
    for name, reason in (
        ("pipe", "not a regular file"),
        ("link", "a link, which is not followed"),
        ("zero", "a link, which is not followed"),
        ("huge", "1,048,576.0 MB, at most 1 MB are read"),
        ("absent", "No such file"),
        ("bad", "Expecting"),
        ("nan", "NaN is no number"),
        ("deep", ""),
    ):
        with pytest.raises(ConfigError, match=rf"/{name}: cannot be read \(.*{reason}.*\); remove it$"):
            read_json(tmp_path / name, remedy="remove it", limit=2**20)


def test_a_file_that_grows_is_read_up_to_the_limit(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"x" * 100)
    state = os.stat(tmp_path / "file")
    (tmp_path / "file").write_bytes(b"x" * 1000)
    monkeypatch.setattr(reading.os, "fstat", lambda descriptor: state)
    assert read_regular(tmp_path / "file", 200) == b"x" * 200


def test_json_of_too_many_values_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "VALUES", 10)
    (tmp_path / "file").write_text(json.dumps([0] * 20))
    monkeypatch.setattr(reading.json, "loads", lambda *_, **__: pytest.fail("parsed"))
    with pytest.raises(ConfigError, match="too many values"):
        read_json(tmp_path / "file", remedy="", limit=1000)


@pytest.mark.parametrize("name", ["run.json", "accuracy.csv", "order_search.json"])
@pytest.mark.parametrize("kind", ["pipe", "zero", "huge"])
def test_one_bad_file_is_named_and_the_other_runs_are_reported(tmp_path, name, kind):
    sweep(tmp_path / "s")
    bad = tmp_path / "s" / "bad"
    write_run(bad)
    (bad / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(bad / name)
    elif kind == "zero" and name != "run.json":
        (bad / name).symlink_to("/dev/zero")
    else:
        with (bad / name).open("wb") as file:
            file.truncate(2**34)
    text = report([tmp_path / "s"], pictures=False).text
    assert "3 x 1" in text
    assert f"bad/{name}:cannotberead" in "".join(text.split()), "lines are wrapped"


@pytest.mark.parametrize("name", ["metrics.jsonl", "predictions.csv"])
def test_logs_and_predictions_of_others_are_bounded(tmp_path, name):
    write_run(tmp_path)
    read = {"metrics.jsonl": "training_log", "predictions.csv": "predictions"}[name]
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match="not a regular file"):
        getattr(load(tmp_path), read)()
    (tmp_path / name).unlink()
    with (tmp_path / name).open("wb") as file:
        file.truncate(2**34)
    with pytest.raises(ConfigError, match="at most"):
        getattr(load(tmp_path), read)()


def test_the_lock_of_a_foreign_folder_is_not_waited_for(tmp_path):
    write_run(tmp_path, status="running")
    os.mkfifo(tmp_path / "lock")
    assert load(tmp_path).status == "interrupted"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"task_names": ["a"]}, "task_names: has 1 entries for 4 tasks"),
        ({"task_names": [1, 2, 3, 4]}, "task_names[0]: expected a text"),
        ({"task_classes": [[0], ["x"], [2], [3]]}, "task_classes[1][0]: expected a whole number"),
        ({"status": "\x1b[2J"}, "status: expected one of running, completed, failed, interrupted"),
        ({"setting": "xil"}, "setting: expected one of"),
        ({"seed": 2**70}, "a whole number beyond 64 bits"),
        ({"cost": {"tasks": [{"train_seconds": "x"}]}}, "cost.tasks[0].train_seconds: expected a number"),
        ({"cost": {"state_bytes": {"total": -1}}}, "cost.state_bytes.total: expected a whole number of at least 0"),
        ({"cost": {"tasks": [3]}}, "cost.tasks[0]: expected a mapping"),
        ({"logme": {"all": "x"}}, "logme.all: expected a number"),
        ({"overrides": "x"}, "overrides: expected a list"),
        ({"versions": {"torch": {}}}, "versions.torch: expected a text or a number"),
        ({"name": "\ud800"}, "half a character"),
        ({"name": "x" * 200_000}, "a text of more than 100,000 characters"),
        ({"config": {str(k): k for k in range(30_000)}}, "config: has more than 20,000 keys"),
        ({"config": {"job": [[]]}, "extra": json.loads("[" * 60 + "]" * 60)}, "more than 40 levels"),
        ({"task_order": list(range(200_000))}, "task_order: has 200,000 entries, at most 100,000 are read"),
    ],
)
def test_values_of_other_types_and_sizes_are_named_and_left_out(tmp_path, change, says):
    sweep(tmp_path)
    changed(tmp_path / "er-0-0", **change)
    result = refresh(tmp_path)
    assert len(result.runs) == 2
    assert [folder for folder, _ in result.skipped] == ["er-0-0"] and says in result.skipped[0][1]
    with pytest.raises(ConfigError, match=re.escape(says)):
        load(tmp_path / "er-0-0")


@pytest.mark.parametrize("row", ["1,1,0,0,0,evil,cil,1,2,1,0,end", f"1,1,0,0,0,test,cil,1,{10**30},1,0,end"])
def test_rows_of_other_kinds_are_refused(tmp_path, row):
    write_run(tmp_path)
    with (tmp_path / "accuracy.csv").open("a") as file:
        file.write(row + "\n")
    with pytest.raises(ConfigError, match=r"accuracy\.csv: cannot be read"):
        RunRecord.load(tmp_path)


def test_many_tasks_and_few_rows_need_little_memory(tmp_path):
    """A run.json of 6,000 task ids with one row took 862 MB; it is named and left out, and others stay small."""
    sweep(tmp_path)
    for k in range(3):
        write_run(tmp_path / f"many{k}")
        changed(tmp_path / f"many{k}", task_order=list(range(6000)), task_names=None)
        write_run(tmp_path / f"some{k}")
        changed(tmp_path / f"some{k}", task_order=list(range(900)), task_names=None, status="completed")
        for kind, last in (("many", 5999), ("some", 899)):
            head = (tmp_path / f"{kind}{k}" / "accuracy.csv").read_text().splitlines()[0]
            row = f"1,{last + 1},{last},0,0,test,cil,1,2,1,0,end"
            (tmp_path / f"{kind}{k}" / "accuracy.csv").write_text(f"{head}\n{row}\n")
    program = (
        "import resource, sys; from pathlib import Path; from clrun.reporting import refresh\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "result = refresh(Path(sys.argv[1]))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
        "print(len(result.runs), [reason for _, reason in result.skipped][0])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    used, said = done.stdout.splitlines()
    assert int(used) < 200_000, "kilobytes"
    assert said.startswith("6 ") and "1 rows of test cil are too few for a matrix of 6000 tasks" in said


def test_a_complete_run_of_many_tasks_is_read(tmp_path, monkeypatch):
    """Many tasks alone are no reason to refuse a run: its own rows are proportionate to its matrix."""
    tasks = 60
    monkeypatch.setattr("clrun.results.records.ALWAYS", 100)
    monkeypatch.setattr("clrun.results.records.BLOCK", 7)
    write_run(tmp_path)
    changed(tmp_path, task_order=list(range(tasks)), task_names=None)
    head = (tmp_path / "accuracy.csv").read_text().splitlines()[0]
    rows = (f"1,{i},{i - 1},{j},{j},test,cil,1,2,1,0,end\n" for i in range(1, tasks + 1) for j in range(i))
    (tmp_path / "accuracy.csv").write_text(head + "\n" + "".join(rows))
    matrix = RunRecord.load(tmp_path).matrices["test", "cil"]
    assert matrix.final() == dict.fromkeys(range(tasks), 0.5)


# --- what reaches the terminal, the shell and the browser


def test_escapes_never_reach_the_terminal(tmp_path, capsys):
    folder = tmp_path / "s"
    sweep(folder)
    hostile = config_of("ewc") | {"name": ESCAPES, "extra": ESCAPES}
    write_run(
        folder / f"x{ESCAPES.strip()}",
        config=hostile,
        name=ESCAPES,
        status="failed",
        error=ESCAPES,
        notes=[ESCAPES],
        overrides=[f"name={ESCAPES}"],
        task_names=[ESCAPES] * 4,
        choices={"method": ESCAPES, "dataset": ESCAPES, "backbone": ESCAPES},
    )
    search_record(folder / "search", method=ESCAPES)
    changed_search = json.loads((folder / "search/order_search.json").read_text())
    changed_search |= {"name": ESCAPES, "again": f"clrun {ESCAPES}"}
    (folder / "search/order_search.json").write_text(json.dumps(changed_search))
    (folder / "bad").mkdir()
    (folder / "bad" / "run.json").write_text(json.dumps({"schema": 1, "status": "failed", "seed": 0, ESCAPES: 1}))
    for words in (("report", str(folder)), ("report", str(tmp_path / ESCAPES))):
        text, _ = printed(capsys, *words)
        assert not set(text) & set(ESCAPES) - {"o", "w", "n", "e", "d", "m", "0", "1", "2", "3", "J", "[", "]", ";"}
        assert all(c.isprintable() or c == "\n" for c in text)
    written = b"".join(path.read_bytes() for path in folder.glob("*.csv"))
    assert not any(byte in written for byte in (0x1B, 0x07))


@pytest.mark.parametrize(
    "word",
    [
        "--config-dir=/tmp/evil",
        "-cd",
        "hydra.launcher._target_=os.system",
        "+hydra/launcher=x",
        "dataset._target_=os.system",
        "name=a\nrm -rf ~",
        "name=\x1b[2J",
        "; rm -rf ~",
        "$(rm -rf ~)=1",
        "",
    ],
)
def test_a_suggested_command_has_only_overrides(tmp_path, word):
    assert command(["method=er", word]) is None
    sweep(tmp_path)
    changed(tmp_path / "er-0-0", overrides=["method=er", word])
    search_record(tmp_path / "search", trials=3)
    stored = json.loads((tmp_path / "search/order_search.json").read_text())
    stored["again"] = f"clrun -m {word}" if word.startswith(";") else shlex.join(["clrun", "-m", word])
    (tmp_path / "search/order_search.json").write_text(json.dumps(stored))
    text = report([tmp_path], pictures=False).text
    page = unescape((tmp_path / "report.html").read_text())
    assert "clrun -m" not in text and "clrun -m" not in page and "is not shown" in text
    if not word.startswith("hydra."):  # those are left out of every command
        assert "clrun method=er" not in page and "The commands of 1 runs are not shown" in page


def test_a_suggested_command_is_quoted(tmp_path):
    sweep(tmp_path)
    search_record(tmp_path / "search", trials=3)
    stored = json.loads((tmp_path / "search/order_search.json").read_text())
    stored["again"] = "clrun -m 'name=a; rm -rf ~' method=$(reboot)"
    (tmp_path / "search/order_search.json").write_text(json.dumps(stored))
    text = report([tmp_path], pictures=False).text
    [line] = [line for line in text.splitlines() if line.startswith("clrun -m")]
    assert shlex.split(line)[1:4] == ["-m", "name=a; rm -rf ~", "method=$(reboot)"]
    assert "'name=a; rm -rf ~'" in line and "'method=$(reboot)'" in line


def test_the_page_allows_its_own_style_and_script_alone(tmp_path):
    full(tmp_path)
    refresh(tmp_path)
    page = (tmp_path / "report.html").read_text()
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    rules = dict(rule.strip().partition(" ")[::2] for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data:" and "http" not in policy and "unsafe" not in policy
    for tag in ("style", "script"):
        [inline] = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    assert page.index("Content-Security-Policy") < page.index("<style>")
    assert not re.search(r"<[^>]* (style|on\w+)=", page), "the policy forbids them"


# --- CSV


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n", "\u2028", "\u2029"])
@pytest.mark.parametrize("sign", ["=", "+", "-", "@", " =", "\uff1d"])
def test_formulas_are_disarmed_after_every_line_break(end, sign):
    cell = csv_cell(f"a{end}{sign}1")
    assert not re.search(rf"(?:^|[\n\r\u2028\u2029])\s*{re.escape(sign.strip())}", cell)
    assert cell.replace("'", "") == f"a{end}{sign}1"
    for line in csv_text([[f"{end}{sign}1"]]).splitlines():
        assert line.lstrip('"').lstrip()[:1] not in tuple("=+-@\uff1d")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.text(max_size=8), min_size=2, max_size=2), min_size=1, max_size=4))
def test_csv_is_read_alike_by_pandas_and_by_python(rows):
    text = csv_text(rows)
    expected = [[csv_cell(cell) for cell in row] for row in rows]
    assert list(csv.reader(io.StringIO(text, newline=""))) == expected
    frame = pd.read_csv(
        io.BytesIO(text.encode()), header=None, dtype=str, keep_default_na=False, skip_blank_lines=False
    )
    assert frame.values.tolist() == expected


# --- anything at all

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=6) | st.just(ESCAPES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
KEYS = ("status", "seed", "config", "name", "error", "choices", "overrides", "task_order", "task_names", "task_classes")
KEYS += (
    "data",
    "environment",
    "setting",
    "notes",
    "accuracy_matrix",
    "metrics",
    "cost",
    "versions",
    "logme",
    "finished",
    "schema",
)
INNER = ("cost.tasks", "cost.parameters", "cost.state_bytes", "config.scenario", "config.job", "config.method")
INNER += ("choices.method", "choices.task_order", "versions.torch", "logme.all", "accuracy_matrix.cil")
CELLS = st.sampled_from([*"01x4", "-1", "", "=1", "9" * 30, "nan", "test", "cil", "end", '"', "\x00", "\ud800"])


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_folder_at_all_ends_in_a_traceback(tmp_path_factory, data):
    """Changed keys, rows and files of any kind: the folder is reported or named and left out; reading is bounded."""
    folder = tmp_path_factory.mktemp("hostile")
    sweep(folder, orders=(0, 1))
    search_record(folder / "search")
    path = folder / "er-0-0" / "run.json"
    run = json.loads(path.read_text())
    for key in data.draw(st.lists(st.sampled_from(KEYS + INNER), min_size=1, max_size=3)):
        outer, _, inner = key.partition(".")
        value = data.draw(VALUES)
        if inner and isinstance(run.get(outer), dict):
            run[outer][inner] = value
        else:
            run[outer] = value
    path.write_text(json.dumps(run))
    search = json.loads((folder / "search/order_search.json").read_text())
    if data.draw(st.booleans()):
        search[data.draw(st.sampled_from(sorted(search)))] = data.draw(VALUES)
    else:
        search["trials"][0][data.draw(st.sampled_from(sorted(search["trials"][0])))] = data.draw(VALUES)
    (folder / "search/order_search.json").write_text(json.dumps(search))
    row = data.draw(st.lists(CELLS, min_size=10, max_size=13))
    with (folder / "er-1-0" / "accuracy.csv").open("a", errors="surrogatepass") as file:
        file.write(",".join(row) + "\n")
    result = report([folder], pictures=False)
    assert all(c.isprintable() or c == "\n" for c in result.text)
    assert len(result.runs) + len(result.skipped) >= 2
    for run in result.runs:
        load(run.folder).metrics_frame()
    load_sweep(folder).frame()
