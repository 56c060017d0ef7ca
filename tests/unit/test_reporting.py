"""Tables, statistics and pictures from run folders alone."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from clrun.reporting import refresh, report
from clrun.reporting.figures import draw_accuracy_matrix
from clrun.reporting.groups import Group, labels
from clrun.reporting.tables import Line, Standing, comparison_table, final_table, matrix_header, matrix_row
from clrun.results.metrics import AccuracyMatrix, summary
from clrun.results.records import RunFolder
from clrun.system.errors import ConfigError
from clrun.system.files import json_value

ORDERS = [(0, 1, 2, 3), (2, 0, 3, 1), (3, 2, 1, 0)]
FINALS = [(70, 80, 60, 90), (63, 66, 88, 84), (91, 54, 78, 75)]  # by position


def rows_of(order, finals, settings=("cil",), total=100):
    """Return rows of a run whose accuracies are its final ones from the start."""
    return [
        {
            "step": i,
            "position": i,
            "after": order[i - 1],
            "task": order[j],
            "task_position": j,
            "split": "test",
            "setting": setting,
            "correct": finals[j],
            "total": total,
            "task_correct": finals[j],
            "nll": 0.5,
            "phase": "end",
        }
        for i in range(1, len(order) + 1)
        for j in range(i)
        for setting in settings
    ]


def config_of(method="er", seed=0, order_seed=0, **options):
    return {
        "name": f"{method}-digits",
        "seed": seed,
        "method": {"_target_": f"clrun.methods.{method}.X", "capacity": 200} | options,
        "backbone": {"_target_": "clrun.backbones.small.small_cnn"},
        "dataset": {"_target_": "clrun.data.sources.digits.digits"},
        "scenario": {"_target_": "clrun.data.scenarios.class_split", "n_tasks": 4, "setting": "cil"},
        "task_order": {"_target_": "clrun.data.orders.random", "seed": order_seed},
        "job": {"resume": True, "max_tasks": None, "eval_split": "test"},
    }


def write_run(folder, *, order=ORDERS[0], finals=FINALS[0], settings=("cil",), config=None, **changes):
    config = config or config_of()
    matrices = {}
    rows = rows_of(order, finals, settings)
    for setting in settings:
        own = [row for row in rows if row["setting"] == setting]
        matrices[setting] = AccuracyMatrix.from_rows(own, order=order)
    run = {
        "schema": 1,
        "status": "completed",
        "error": None,
        "name": config["name"],
        "choices": {"method": config["method"]["_target_"].split(".")[2], "backbone": "small_cnn", "dataset": "digits"},
        "seed": config["seed"],
        "setting": "cil",
        "task_order": list(order),
        "task_names": [f"name {i}" for i in order],
        "accuracy_matrix": {s: m.by_position()[1:] for s, m in matrices.items()},
        "metrics": {s: summary(m) for s, m in matrices.items()},
        "cost": {
            "tasks": [{"train_seconds": 1.5, "parameters": {"total": 10}, "state_bytes": {"total": 40}} for _ in order]
        },
        "config": config,
    } | changes
    files = RunFolder(Path(folder))
    files.create()
    files.write_run(run)
    files.write_rows(rows)
    return json_value(run)


def sweep(folder, method="er", orders=(0, 1, 2), seeds=(0,), **options):
    for r in orders:
        for s in seeds:
            config = config_of(method, seed=s, order_seed=r, **options)
            write_run(folder / f"{method}-{r}-{s}", order=ORDERS[r], finals=FINALS[r], config=config)


def robustness_of(folder):
    return json.loads((folder / "order_robustness.json").read_text())


# --- robustness to the order


def test_robustness_of_the_worked_example_by_task_id(tmp_path):
    sweep(tmp_path)
    refresh(tmp_path)
    (entry,) = robustness_of(tmp_path)
    assert list(entry)[:16] == [
        "method",
        "backbone",
        "dataset",
        "group",
        "setting",
        "opd",
        "aopd",
        "mopd",
        "mean",
        "sd",
        "ci95",
        "worst_order",
        "n_orders",
        "n_seeds",
        "orders",
        "missing",
    ]
    assert entry["opd"] == pytest.approx({"0": 0.09, "1": 0.06, "2": 0.09, "3": 0.03})
    assert entry["aopd"] == pytest.approx(0.0675)
    assert entry["mopd"] == pytest.approx(0.09)
    assert entry["mean"] == pytest.approx(0.7491666667)
    assert entry["sd"] == pytest.approx(0.00381881, abs=1e-8)
    assert entry["ci95"][1] - entry["ci95"][0] == pytest.approx(2 * 0.00948646, abs=1e-7)
    assert entry["worst_order"] == [3, 2, 1, 0]
    assert (entry["n_orders"], entry["n_seeds"], entry["missing"]) == (3, 1, [])
    assert sorted(entry["orders"]) == sorted(map(list, ORDERS))
    assert (entry["method"], entry["backbone"], entry["dataset"], entry["setting"]) == (
        "er",
        "small_cnn",
        "digits",
        "cil",
    )


def test_what_varies_inside_a_group_and_what_makes_another(tmp_path):
    config = config_of(seed=1, order_seed=5) | {"name": "other", "logger": {"_target_": "x"}}
    config["job"]["resume"] = False
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", config=config, order=ORDERS[1], finals=FINALS[1])
    write_run(tmp_path / "c", config=config_of(capacity=100))
    write_run(tmp_path / "d", config=config_of(capacity=200.0, seed=7))
    entries = refresh(tmp_path).robustness
    assert sorted(entry["n_orders"] for entry in entries) == [1, 2]
    assert {entry["group"].partition(" ")[2] for entry in entries} == {"method.capacity=200", "method.capacity=100"}
    both = [entry["group"] for entry in entries]
    (tmp_path / "c" / "run.json").unlink()
    (alone,) = refresh(tmp_path).robustness
    assert alone["group"] in [title.partition(" ")[0] for title in both]


def test_one_order_has_no_disparity(tmp_path):
    sweep(tmp_path, orders=[1], seeds=[0, 1])
    refresh(tmp_path)
    (entry,) = robustness_of(tmp_path)
    assert entry["opd"] is entry["aopd"] is entry["mopd"] is entry["sd"] is entry["ci95"] is None
    assert entry["mean"] == pytest.approx(0.7525)
    assert (entry["n_orders"], entry["n_seeds"]) == (1, 2)


def test_failed_and_absent_runs_are_listed_as_missing(tmp_path):
    sweep(tmp_path, seeds=(0, 1))
    failed, gone = tmp_path / "er-0-1", tmp_path / "er-1-1"
    write_run(failed, config=config_of(seed=1), status="failed", error="RuntimeError: boom")
    (gone / "run.json").unlink()
    result = refresh(tmp_path)
    (entry,) = result.robustness
    assert entry["missing"] == [
        {"order": [0, 1, 2, 3], "seed": 1, "reason": "failed", "folder": "er-0-1"},
        {"order": [2, 0, 3, 1], "seed": 1, "reason": "no run", "folder": None},
    ]
    assert entry["aopd"] == pytest.approx(0.0675)
    assert [run.label for run in result.runs if run.status == "failed"] == ["er-0-1"]
    assert "er-0-1" in result.text and "RuntimeError: boom" in result.text and "missing" in result.text


def test_orders_with_seeds_of_their_own_miss_nothing(tmp_path):
    for r in range(3):
        write_run(tmp_path / str(r), order=ORDERS[r], finals=FINALS[r], config=config_of(seed=r, order_seed=r))
    (entry,) = refresh(tmp_path).robustness
    assert (entry["n_orders"], entry["n_seeds"], entry["missing"]) == (3, 1, [])


def test_an_unfinished_run_does_not_count(tmp_path):
    sweep(tmp_path)
    path = tmp_path / "er-2-0" / "accuracy.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    (entry,) = refresh(tmp_path).robustness
    assert entry["n_orders"] == 2
    assert entry["missing"][0]["reason"] == "some tasks were not evaluated in the setting cil"


def test_the_same_run_twice_counts_once(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", finals=(0, 0, 0, 0))
    (entry,) = refresh(tmp_path).robustness
    assert (entry["mean"], entry["n_seeds"], entry["missing"]) == (0.75, 1, [])


def test_orders_of_different_tasks_have_averages_but_no_disparity(tmp_path):
    write_run(tmp_path / "a", order=(0, 1), finals=(50, 70))
    write_run(tmp_path / "b", order=(2, 1), finals=(60, 80), config=config_of(order_seed=1))
    (entry,) = refresh(tmp_path).robustness
    assert entry["mean"] == pytest.approx(0.65)
    assert entry["opd"] is entry["aopd"] is entry["mopd"] is None


def test_orders_of_different_length_do_not_break_the_table(tmp_path):
    write_run(tmp_path / "a", order=(0, 1), finals=(50, 70))
    write_run(tmp_path / "b", order=(0, 1, 2), finals=(90, 90, 90), config=config_of(order_seed=1))
    (entry,) = refresh(tmp_path).robustness
    assert entry["mean"] == pytest.approx(0.75) and entry["aopd"] is None


def test_a_run_that_failed_before_its_stream_was_built(tmp_path):
    write_run(tmp_path / "a", status="failed", error="MemoryError", task_order=None)
    (entry,) = refresh(tmp_path).robustness
    assert entry["setting"] == "cil" and entry["mean"] is None and entry["worst_order"] is None
    assert entry["missing"][0]["reason"] == "failed"


# --- files of a sweep


def test_sweep_csv_has_a_row_a_run_with_full_precision(tmp_path):
    third = [33, 33, 33, 34]
    sweep(tmp_path, method="ewc", strength=2.5)
    write_run(tmp_path / "er", order=ORDERS[1], finals=third, settings=("cil", "til"))
    refresh(tmp_path)
    table = pd.read_csv(tmp_path / "sweep.csv").set_index("folder")
    assert list(table.index) == ["er", "ewc-0-0", "ewc-1-0", "ewc-2-0"]
    er = table.loc["er"]
    assert (er["order"], er["seed"], er["setting"], er["status"]) == ("2 0 3 1", 0, "cil", "completed")
    assert er["cil_average_accuracy"] == er["til_average_accuracy"] == np.mean(np.array(third) / 100)
    assert np.isnan(table.loc["ewc-0-0", "til_average_accuracy"]) and np.isnan(er["cil_forward_transfer"])
    assert (er["parameters"], er["state_bytes"], er["train_seconds"]) == (10, 40, 6.0)
    assert np.isnan(er["method.strength"]) and table.loc["ewc-0-0", "method.strength"] == 2.5
    assert {"task_order.seed", "method._target_"} <= set(table.columns)
    assert not {"seed.1", "method.capacity", "job.resume", "dataset._target_"} & set(table.columns)


def test_cells_of_sweep_csv_are_safe_in_a_spreadsheet(tmp_path):
    config = config_of() | {"name": "=HYPERLINK(1)"}
    write_run(tmp_path / "@a", config=config, status="failed", error="-boom\nsecond, line")
    refresh(tmp_path)
    text = (tmp_path / "sweep.csv").read_text()
    assert text.splitlines()[1].startswith("'@a,'=HYPERLINK(1),failed")
    assert '"\'-boom second, line"' in text


def test_refresh_changes_nothing_the_second_time_and_makes_no_folder(tmp_path):
    sweep(tmp_path / "s")
    refresh(tmp_path / "s")
    before = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir() if path.is_file()}
    refresh(tmp_path / "s")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir() if path.is_file()}
    assert set(before) == {"sweep.csv", "order_robustness.json", "method_comparison.json", "report.html", ".lock"}
    assert refresh(tmp_path / "absent").text == "" and not (tmp_path / "absent").exists()
    (tmp_path / "empty").mkdir()
    assert refresh(tmp_path / "empty").runs == [] and not list((tmp_path / "empty").iterdir())


def test_unreadable_and_foreign_folders_are_listed_and_skipped(tmp_path):
    sweep(tmp_path)
    for name, text in {"broken": "{", "foreign": '{"schema": 9}'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(text)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "run.json")
    (tmp_path / "er-0-0" / "accuracy.csv").write_text("x\n")
    result = refresh(tmp_path)
    assert [folder for folder, _ in result.skipped] == ["broken", "er-0-0", "foreign", "pipe"]
    assert len(result.runs) == 2
    assert all(folder in result.text for folder in ("broken", "foreign", "pipe"))


def test_links_and_hidden_folders_are_not_followed(tmp_path):
    write_run(tmp_path / "elsewhere" / "run")
    write_run(tmp_path / "s" / "run")
    write_run(tmp_path / "s" / ".hidden" / "run")
    (tmp_path / "s" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "s" / "circle").symlink_to(tmp_path / "s")
    (tmp_path / "s" / "file").mkdir()
    (tmp_path / "s" / "file" / "run.json").symlink_to(tmp_path / "elsewhere" / "run" / "run.json")
    assert [run.label for run in refresh(tmp_path / "s").runs] == ["run"]


def test_a_running_run_without_a_living_process_is_interrupted(tmp_path):
    write_run(tmp_path / "dead", status="running")
    write_run(tmp_path / "alive", status="running", config=config_of(seed=1))
    with RunFolder(tmp_path / "alive").locked():
        result = refresh(tmp_path)
    assert {run.label: run.status for run in result.runs} == {"dead": "interrupted", "alive": "running"}


def test_a_sweep_folder_that_cannot_be_written_is_one_clear_line(tmp_path):
    sweep(tmp_path)
    (tmp_path / "sweep.csv").unlink(missing_ok=True)
    (tmp_path / "sweep.csv").mkdir()
    with pytest.raises(ConfigError, match="sweep.csv: cannot be written"):
        refresh(tmp_path)


# --- clrun report


def test_report_rebuilds_one_folder_in_place(tmp_path):
    sweep(tmp_path)
    refreshed = refresh(tmp_path)
    before = (tmp_path / "sweep.csv").read_bytes()
    (tmp_path / "sweep.csv").unlink()
    (tmp_path / "order_robustness.json").unlink()
    assert report([tmp_path], pictures=False).text == refreshed.text
    assert (tmp_path / "sweep.csv").read_bytes() == before
    assert len(robustness_of(tmp_path)) == 1


@pytest.fixture
def no_figures(monkeypatch):
    """Let reports write no figures for papers, which have a test of their own: they take seconds."""
    monkeypatch.setattr("clrun.reporting.paper.FIGURES", {})


def test_report_joins_several_folders_and_writes_only_where_told(tmp_path, no_figures):
    sweep(tmp_path / "a", orders=[0, 1])
    sweep(tmp_path / "b", orders=[2])
    result = report([tmp_path / "a", tmp_path / "b", tmp_path / "b"], pictures=False)
    assert not list(tmp_path.glob("*/*/*.png"))
    assert result.robustness[0]["aopd"] == pytest.approx(0.0675)
    assert not list(tmp_path.glob("*/sweep.csv"))
    report([tmp_path / "a", tmp_path / "b"], out=tmp_path / "joint")
    assert len(pd.read_csv(tmp_path / "joint" / "sweep.csv")) == 3
    with pytest.raises(ConfigError, match=r"sweep.csv: cannot be written \(File exists\)"):
        report([tmp_path / "a", tmp_path / "b"], out=tmp_path / "joint" / "sweep.csv")


def test_report_draws_the_pictures_that_are_missing(tmp_path, no_figures):
    sweep(tmp_path, orders=[0, 1])
    write_run(tmp_path / "odd", accuracy_matrix={"cil": [[0.5, "x"]]})
    (tmp_path / "er-0-0" / "accuracy_matrix.png").write_bytes(b"kept")
    result = report([tmp_path])
    assert (tmp_path / "er-0-0" / "accuracy_matrix.png").read_bytes() == b"kept"
    assert (tmp_path / "er-1-0" / "accuracy_matrix.png").read_bytes().startswith(b"\x89PNG")
    assert "figures that could not be drawn (1)" in result.text


def test_many_missing_pictures_are_drawn_only_when_asked_for(tmp_path, no_figures, monkeypatch):
    monkeypatch.setattr("clrun.reporting.sweep.FEW", 1)
    sweep(tmp_path, orders=[0, 1])
    text = report([tmp_path]).text
    assert "2 runs have no accuracy_matrix.png (job.picture=false); to draw them, run clrun report --pictures" in text
    assert list(tmp_path.glob("*/accuracy_matrix.png")) == []
    assert "accuracy_matrix.png" not in report([tmp_path], every_picture=True).text
    assert len(list(tmp_path.glob("*/accuracy_matrix.png"))) == 2


def test_report_of_a_single_run_leaves_no_tables_in_it(tmp_path):
    write_run(tmp_path / "run")
    result = report([tmp_path / "run"])
    assert len(result.runs) == 1
    assert not (tmp_path / "run" / "sweep.csv").exists() and not (tmp_path / "run" / "report").exists()
    assert result.page == tmp_path / "run" / "report.html" and "<title>run: clrun report" in result.page.read_text()


def test_report_refuses_what_holds_no_run(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        report([tmp_path / "absent"])
    with pytest.raises(ConfigError, match="no run"):
        report([tmp_path])


# --- tables


def standing(accuracy, **changes):
    return Standing(**({"accuracy": accuracy, "sd": 0.01, "aopd": 0.1, "mopd": 0.2, "forgetting": 0.3} | changes))


def test_the_comparison_is_sorted_by_class_incremental_accuracy():
    lines = [
        Line("low", {"cil": standing(0.2), "til": standing(0.9)}, 3, 1, 0),
        Line("none", {"cil": standing(None)}, 0, 0, 3),
        Line("high", {"cil": standing(0.8), "til": standing(0.1)}, 3, 1, 0),
    ]
    labels = [line.split()[0] for line in comparison_table(lines).splitlines()[2:5]]
    assert labels == ["high", "low", "none"]


@pytest.mark.parametrize("settings", [["cil"], ["cil", "til"], ["dil"]])
def test_the_comparison_fits_a_terminal(settings):
    wide = {setting: standing(1.0, sd=0.5, aopd=1.0, mopd=1.0, forgetting=-1.0) for setting in settings}
    label = "a_method_with_a_long_name resnet18 mini_imagenet capacity=2000 " + "x" * 120
    text = comparison_table([Line(label, wide, 100, 20, 1234), Line("er", {}, 0, 0, 0)])
    assert max(map(len, text.splitlines())) <= 100
    assert text.isascii()
    assert "100.0 +-50.0 100.0 100.0 -100.0" in text


def test_the_table_of_a_sweep_names_what_varies(tmp_path):
    sweep(tmp_path)
    sweep(tmp_path, method="ewc", capacity=7)
    sweep(tmp_path / "more", method="ewc", capacity=8)
    text = refresh(tmp_path).text
    assert "er " in text and "ewc capacity=7" in text and "ewc capacity=8" in text
    assert "digits" not in text
    assert "74.9 +- 0.4   6.7   9.0" in text


def test_lines_on_different_sets_of_runs_are_pointed_out(tmp_path):
    sweep(tmp_path)
    sweep(tmp_path, method="ewc", orders=[0, 1, 2])
    assert "different sets" not in refresh(tmp_path).text
    sweep(tmp_path, method="joint", orders=[0, 1])
    assert "different sets" in refresh(tmp_path).text


def test_text_from_elsewhere_cannot_steer_the_terminal(tmp_path):
    write_run(tmp_path / "a", status="failed", error="\x1b[2J\x07gone")
    assert "\x1b" not in refresh(tmp_path).text and "\\x1b[2J\\x07gone" in refresh(tmp_path).text


def test_final_table_in_points(tmp_path):
    run = write_run(tmp_path / "a", settings=("cil", "til"))
    lines = final_table(run).splitlines()
    assert lines[0].split() == ["class-incremental", "task-incremental"]
    rows = {line[:30].strip(): line[30:].split() for line in lines[1:]}
    assert rows["average accuracy"] == ["75.0", "75.0"]
    assert rows["forgetting"] == rows["backward transfer"] == ["0.0", "0.0"]
    assert rows["worst task"] == ["60.0", "60.0"]
    assert (rows["parameters"], rows["stored bytes"], rows["training seconds"]) == (["10"], ["40"], ["6.0"])
    assert "forward transfer" not in rows


def test_totals_of_the_cost_win_over_those_of_its_last_task(tmp_path):
    run = write_run(tmp_path / "a")
    run["cost"] |= {"parameters": {"total": 1234567}, "state_bytes": {"total": 7}}
    assert "1,234,567\n" in final_table(run)


def matrix_lines(order, run):
    costs = run["cost"]["tasks"]
    return [matrix_row(run | {"cost": {"tasks": costs[: k + 1]}}) for k in range(len(order))]


def test_matrix_rows_are_aligned_with_their_header(tmp_path):
    run = write_run(tmp_path / "a", order=ORDERS[1], finals=FINALS[1], settings=("cil", "til"))
    header = matrix_header(run | {"accuracy_matrix": {}}).splitlines()
    assert len(header) == 2
    rows = matrix_lines(ORDERS[1], run)
    assert " ".join(rows[1].split()) == "2/4 task 0: name 0 63.0 66.0 | cil 64.5 til 64.5"
    for task in "2031":
        column = header[1].index(f"  {task}") + 3
        assert rows[3][column - 5 : column].strip().replace(".", "").isdigit()
    assert {row.index("|") for row in rows} == {header[1].index("|")}


def test_matrix_rows_of_many_tasks_stay_short(tmp_path):
    order = tuple(reversed(range(100)))
    run = write_run(tmp_path / "a", order=order, finals=[50] * 99 + [10], settings=("cil", "til"))
    rows = matrix_lines(order, run)
    assert max(map(len, rows)) <= 100 and max(map(len, matrix_header(run).splitlines())) <= 100
    assert " ".join(rows[0].split()) == "1/100 task 99: name 99 50.0 - 50.0 (99) | cil 50.0 til 50.0"
    assert " ".join(rows[-1].split()) == "100/100 task 0: name 0 10.0 50.0 10.0 (0) | cil 49.6 til 49.6"
    ten = tuple(range(10))
    run = write_run(tmp_path / "b", order=ten, finals=[100] * 10, settings=("cil", "til"), task_names=["n" * 30] * 10)
    assert max(map(len, matrix_lines(ten, run))) <= 100


# --- pictures


def test_pictures_of_one_to_a_hundred_tasks_are_drawn_whatever_the_names(tmp_path, recwarn):
    for tasks in (1, 100):
        order = tuple(range(tasks))
        run = write_run(tmp_path / str(tasks), order=order, finals=[50] * tasks)
        run["task_names"][0] = "$x_1$ 猫\n\x07 $"
        draw_accuracy_matrix(run, tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert not recwarn.list


def test_the_same_run_gives_the_same_picture(tmp_path):
    run = write_run(tmp_path / "a", settings=("cil", "til"))
    for name in ("a.png", "b.png"):
        draw_accuracy_matrix(run, tmp_path / name)
    picture = (tmp_path / "a.png").read_bytes()
    assert picture == (tmp_path / "b.png").read_bytes() and b"Software" not in picture


def test_the_picture_shows_cells_and_blanks(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))[1])
    run = write_run(tmp_path / "a", order=(1, 0), finals=(25, 75), settings=("cil", "til"))
    draw_accuracy_matrix(run, tmp_path / "a.png")
    left, right = drawn[0].axes[:2]
    assert [text.get_text() for text in left.texts] == ["25.0", "25.0", "75.0"]
    assert [text.get_text() for text in left.get_yticklabels()] == ["1: name 1", "0: name 0"]
    assert left.images[0].get_array().mask.tolist() == [[False, True], [False, False]]
    assert left.images[0].get_clim() == (0, 100)
    assert left.get_title() == "class-incremental\naverage accuracy 50.0" and "task" in right.get_title()
    assert "1 0" in drawn[0].get_suptitle()


def test_numbers_on_the_picture_contrast_with_their_cells(tmp_path):
    from matplotlib import colormaps

    from clrun.reporting import figures

    def luminance(color):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3]]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for value in np.linspace(0, 1, 101):
        cell, text = luminance(colormaps["viridis"](value)), 1.0 if figures.is_dark(float(value)) else 0.0
        assert (max(cell, text) + 0.05) / (min(cell, text) + 0.05) >= 4.5


def test_pyplot_stays_out(tmp_path):
    run = write_run(tmp_path / "a")
    (tmp_path / "run.json").write_text(json.dumps(run))
    code = (
        "import json, pathlib, sys; from clrun.reporting.figures import draw_accuracy_matrix\n"
        "assert 'matplotlib' not in sys.modules\n"
        "here = pathlib.Path(sys.argv[1]); run = json.loads((here / 'run.json').read_text())\n"
        "draw_accuracy_matrix(run, here / 'x')\n"
        "print(sorted({'torch', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_run_without_matrix_is_one_clear_line(tmp_path):
    run = write_run(tmp_path / "a")
    for matrix in ({}, {"cil": [[0.5]]}, {"cil": None}, None):
        with pytest.raises(ConfigError, match="no accuracy matrix"):
            draw_accuracy_matrix(run | {"accuracy_matrix": matrix}, tmp_path / "x.png")
    assert math.isfinite(run["metrics"]["cil"]["average_accuracy"])


def test_label_of_another_class_has_the_options_that_it_has():
    runs = [SimpleNamespace(method="er", backbone="cnn", dataset="digits")]
    common = {"job.max_steps": None, "scenario._target_": "clrun.data.scenarios.class_split"}
    first = Group("a", common | {"scenario.groups": None, "scenario.n_tasks": 4}, runs)
    other = {"scenario._target_": "clrun.data.scenarios.fixed_groups", "scenario.groups": "pairs"}
    second = Group("b", common | other | {"scenario.n_tasks": None}, runs)
    assert labels([first, second]) == [
        "er max_steps=null scenario=class_split n_tasks=4",
        "er max_steps=null scenario=fixed_groups groups=pairs",
    ]
