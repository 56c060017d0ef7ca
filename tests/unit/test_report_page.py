"""report.html and the files for papers, from made-up runs; what a browser makes of the page is tested beside."""

import html
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from test_reporting import FINALS, ORDERS, config_of, sweep, write_run

from clrun.reporting import refresh, report
from clrun.reporting.appendix import commands
from clrun.reporting.charts import Axis, heat
from clrun.reporting.collect import collect
from clrun.reporting.paper import escaped

HOSTILE = '<script>alert("1")</script><img src=x onerror=alert(2)>&\'\x1b'


class Reader(HTMLParser):
    """Tags with their attributes, and whether every tag is closed in order."""

    VOID = ("meta", "link", "img", "br", "input")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def page_of(folder):
    refresh(folder)
    return (folder / "report.html").read_text()


def full(folder):
    """Write a sweep of two methods, three orders, two seeds."""
    sweep(folder, seeds=(0, 1))
    for r, order in enumerate(ORDERS):
        for seed in (0, 1):
            finals = [value - 10 - 3 * r + seed for value in FINALS[r]]
            write_run(folder / f"ewc-{r}-{seed}", order=order, finals=finals, config=config_of("ewc", seed, r))


def search_record(folder, method="er", trials=3):
    """Write the record of a search whose last order is the worst."""
    orders = [[0, 1, 2, 3], [1, 0, 2, 3], [3, 2, 1, 0]]
    found = [
        {
            "number": k + 1,
            "order": orders[k % 3],
            "accuracy": None if k == 1 else 0.9 - k / 100,
            "source": "move" if k else "design",
            "parent": k or None,
            "move": "tasks at 1 and 2 swapped" if k else "",
            "reused": k == 0,
            "status": "failed" if k == 1 else "completed",
            "folder": f"orders/{k}",
        }
        for k in range(trials)
    ]
    record = {"schema": 1, "name": "x", "choices": {"method": method}, "config_hash": "0", "setting": "cil"}
    record |= {"budget": 5, "started": trials - 1, "status": "running", "trials": found}
    record |= {"again": "clrun -m task_order=listed", "worst": {"order": orders[(trials - 1) % 3], "accuracy": 0.88}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "order_search.json").write_text(json.dumps(record))


# --- statistics of a sweep


def test_further_statistics_stand_beside_the_first_keys(tmp_path):
    full(tmp_path)
    er = next(entry for entry in refresh(tmp_path).robustness if entry["method"] == "er")
    entry = json.loads((tmp_path / "order_robustness.json").read_text())[0]
    assert entry["worst_cell"] == {"accuracy": 0.54, "order": [3, 2, 1, 0], "task": 2}
    assert entry["best_order"] == [2, 0, 3, 1] and entry["best_order_mean"] == pytest.approx(0.7525)
    assert entry["worst_order_mean"] == pytest.approx(0.745)
    assert round(100 * entry["aopd_normalised"], 3) == 3.988
    assert round(100 * entry["task_sd"], 4) == 3.4186
    assert entry["position_effect"]["spearman"] == pytest.approx(0.172733, abs=1e-6)
    assert entry["order_share"] == entry["task_order_share"] == 1 and entry["seed_variance"] == 0
    assert entry["aopd_floor"] == 0 and entry["order_effect"] == pytest.approx(entry["aopd_normalised"])
    assert len(entry["order_means"]) == 3 and len(entry["caveats"]) == 2
    assert entry["aopd"] == er["aopd"]


def test_methods_are_compared_on_the_orders_and_seeds_that_both_have(tmp_path):
    full(tmp_path)
    (tmp_path / "ewc-2-1" / "run.json").unlink()
    (entry,) = refresh(tmp_path).comparisons
    (pair,) = entry["pairs"]
    # Order 2 is left with its first seed, in which ewc trails by 16 points; elsewhere by 9.5 and 12.5 on average.
    assert (pair["a"], pair["b"], pair["n"]) == ("er", "ewc", 3)
    assert pair["mean"] == pytest.approx(np.mean([0.095, 0.125, 0.16]))
    assert pair["p_holm"] == pair["p_wilcoxon"] == 0.25 and pair["ci95"][0] < pair["mean"]
    assert (entry["kendall_w"], entry["mean_ranks"], entry["n_orders"]) == (1, [1, 2], 3)
    assert json.loads((tmp_path / "method_comparison.json").read_text())[0]["methods"] == ["er", "ewc"]


def test_other_scenarios_are_not_compared(tmp_path):
    sweep(tmp_path)
    config = config_of("ewc")
    config["scenario"]["class_seed"] = 3
    write_run(tmp_path / "other", config=config)
    assert refresh(tmp_path).comparisons == []


# --- the page


def test_no_interval_goes_beyond_0_and_100(tmp_path):
    for method, finals in (("er", ([99, 99, 99, 99], [60, 60, 60, 60])), ("ewc", ([1, 1, 1, 1], [40, 40, 40, 40]))):
        for r, values in enumerate(finals):
            write_run(tmp_path / f"{method}{r}", order=ORDERS[r], finals=values, config=config_of(method, order_seed=r))
    text = page_of(tmp_path)
    assert "0.0 to 100.0" in text and "cut at 0 and 100" in text
    assert "-100.0 to +100.0" in text and "cut at -100 and 100" in text
    assert not re.search(r"\d to \+?(?!100)\d{3}|-(?!100\.0)\d{3}\.\d to ", text)


def test_the_page_is_well_formed_and_fetches_nothing(tmp_path):
    full(tmp_path)
    text = page_of(tmp_path)
    reader = Reader(text)
    assert reader.open == []
    for tag, attributes in reader.tags:
        assert tag not in ("iframe", "object", "embed", "form", "base", "img")
        assert not {"src", "action", "srcset", "style"} & set(attributes)
        assert attributes.get("href", "data:,") == "data:,"
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"url\(|@import|https?://(?!www\.w3)", text)


def test_the_same_runs_give_the_same_page(tmp_path):
    full(tmp_path)
    assert page_of(tmp_path) == page_of(tmp_path)


def test_everything_from_elsewhere_is_escaped(tmp_path):
    config = config_of(capacity=HOSTILE) | {"name": HOSTILE}
    write_run(tmp_path / "a", config=config, task_names=[HOSTILE] * 4, overrides=[HOSTILE], versions={HOSTILE: HOSTILE})
    write_run(tmp_path / "b", config=config_of(seed=1), status="failed", error=HOSTILE, finished=HOSTILE)
    choices = {"method": HOSTILE, "backbone": HOSTILE, "dataset": HOSTILE}
    for r, order in enumerate(ORDERS):
        write_run(tmp_path / f"c{r}", order=order, choices=choices, task_names=[HOSTILE] * 4)
    (tmp_path / "<b>").mkdir()
    (tmp_path / "<b>" / "run.json").write_text("{")
    text = page_of(tmp_path)
    reader = Reader(text)
    assert [tag for tag, _ in reader.tags if tag == "script"] == ["script"]  # ours
    assert "<img" not in text and "\x1b" not in text and html.escape('<script>alert("1")') in text


def test_what_failed_and_what_is_missing_comes_first(tmp_path):
    full(tmp_path)
    write_run(tmp_path / "er-0-1", config=config_of(seed=1), status="failed", error="RuntimeError: boom")
    (tmp_path / "ewc-1-1" / "run.json").unlink()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    text = page_of(tmp_path)
    top = text[text.index('class="problems"') : text.index('class="in-cil"')]
    assert "3 runs failed or missing" in top
    for said in ("RuntimeError: boom", "er-0-1", "no run", "2 0 3 1", "broken", "unreadable"):
        assert said in top
    assert "problems" not in re.sub(r"<style>.*?</style>", "", page_of_complete(tmp_path / "whole"), flags=re.S)


def page_of_complete(folder):
    full(folder)
    return page_of(folder)


def test_runs_without_any_number_still_make_a_page(tmp_path):
    write_run(tmp_path / "a", status="failed", error="MemoryError", task_order=None)
    assert "MemoryError" in page_of(tmp_path)
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "run.json").write_text("{")
    assert "unreadable" in page_of(tmp_path / "only")


@pytest.mark.parametrize("orders,seeds", [([0], [0]), ([0, 1], [0]), ([0, 1, 2], [0, 1])])
def test_few_orders_and_seeds_still_make_a_page(tmp_path, orders, seeds):
    sweep(tmp_path, orders=orders, seeds=seeds)
    text = page_of(tmp_path)
    assert ("What these runs cannot show" in text) and text.count("<svg") >= 4
    assert ("One order says nothing" in text) == (orders == [0])


def test_tasks_of_different_numbers_still_make_a_page(tmp_path):
    write_run(tmp_path / "a", order=(0, 1), finals=(50, 70))
    write_run(tmp_path / "b", order=(0, 1, 2), finals=(90, 90, 90), config=config_of(order_seed=1))
    assert Reader(page_of(tmp_path)).open == []


def test_differences_of_configurations(tmp_path):
    sweep(tmp_path, method="ewc", strength=2.5)
    sweep(tmp_path, method="er")
    text = page_of(tmp_path)
    part = text[text.index("Differences of the configurations") :]
    assert "method.strength" in part and "2.5" in part and "task_order.seed" in part
    assert "dataset._target_" not in part


def test_writing_the_page_imports_neither_matplotlib_nor_torch(tmp_path):
    full(tmp_path)
    code = (
        "import pathlib, sys; from clrun.reporting import refresh; refresh(pathlib.Path(sys.argv[1]));"
        "print(sorted({'torch', 'matplotlib', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_commands_start_the_runs_that_are_there(tmp_path):
    def started(folder, *overrides):
        write_run(tmp_path / folder, overrides=["method=er", "hydra.x=1", *overrides])

    for number, (order, seed) in enumerate([(0, 0), (10, 0), (2, 0), (0, 1), (10, 1), (2, 1)]):
        started(str(number), f"task_order.seed={order}", f"seed={seed}")
    assert commands(collect([tmp_path])[0]) == ["clrun -m method=er seed=0,1 task_order.seed=0,2,10"]
    (tmp_path / "5" / "run.json").unlink()
    (line,) = commands(collect([tmp_path])[0])
    assert line.endswith("  # starts 6 runs; 5 of them are in this report")
    started("list", "task_order.tasks=[0, 1]")
    assert commands(collect([tmp_path])[0])[-1] == "clrun method=er 'task_order.tasks=[0, 1]'"


# --- pictures by hand


def test_ticks_are_round_and_inside():
    axis = Axis.of([13.1, 88.7], 0, 100)
    assert axis.ticks() == [20, 40, 60, 80]
    assert Axis.of([0, 41], 0, 100, zero=True).ticks()[0] == 0
    assert Axis.of([0, 0], 0, 100, zero=True).ticks() and Axis.of([5], 0, 100).ticks()
    assert Axis.of([3e3, 2e6], 0, 100, log=True).ticks() == [1e4, 1e5, 1e6]
    assert Axis.of([3, 20], 0, 100, log=True).ticks() == [3, 10, 30]
    assert Axis(0, 10, 100, 0)(2.5) == 75


def test_heat_maps_keep_their_numbers_and_blanks():
    text = heat(np.array([[1.0, np.nan], [0.123, 0.5]]), ["0: a", '"1"'], numbers=True)
    assert 'data-m="[[1000,null],[123,500]]"' in text
    assert text.count("<path") == 3 and text.count("<text") == 3 and ">12<" in text
    assert json.loads(dict(Reader(text).tags[0][1])["data-n"]) == ["0: a", '"1"']


# --- files for papers


def test_figures_and_tables_for_papers_are_the_same_for_the_same_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("clrun.reporting.sweep.FEW", 0)  # draws no pictures of single runs
    full(tmp_path)
    report([tmp_path])
    names = {path.name for path in (tmp_path / "report").iterdir()}
    figures = ("accuracy", "order_effect", "order_and_seed", "cost", "accuracy_matrices", "accuracy_curves")
    figures += ("opd_by_task", "position_effect")
    assert {f"{figure}_cil.{kind}" for figure in figures for kind in ("png", "svg")} <= names
    assert {"comparison_cil.csv", "comparison_cil.tex", "opd_cil.csv", "pairs_cil.csv", "pairs_cil.tex"} <= names
    assert "er & 74.9 & 0.4 & 6.7" in (tmp_path / "report" / "comparison_cil.tex").read_text()
    assert (tmp_path / "report" / "accuracy_cil.png").read_bytes().startswith(b"\x89PNG")
    before = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    report([tmp_path])
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}


def test_latex_is_escaped():
    assert escaped(r"a_b 5% \x{}~^$&#") == r"a\_b 5\% \textbackslash{}x\{\}\textasciitilde{}\textasciicircum{}\$\&\#"


def test_refresh_draws_nothing_for_papers(tmp_path):
    full(tmp_path)
    refresh(tmp_path)
    assert not (tmp_path / "report").exists()


# --- LogME and searches


def test_logme_is_a_column_only_where_runs_carry_it(tmp_path, monkeypatch):
    monkeypatch.setattr("clrun.reporting.sweep.FEW", 0)
    monkeypatch.setattr("clrun.reporting.paper.FIGURES", {})
    sweep(tmp_path)
    assert "LogME" not in (refresh(tmp_path).page.read_text())
    write_run(tmp_path / "closed", config=config_of("simplecil"), logme={"all": -0.25}, order=ORDERS[0])
    page = report([tmp_path]).page.read_text()
    heads = re.search("<thead>(.*?)</thead>", page)[1].split("</th>")
    place = next(k for k, head in enumerate(heads) if ">LogME<" in head)
    rows = re.search("<tbody>(.*?)</tbody>", page)[1].split("</tr>")
    cells = {row.split("</th>")[0].rpartition(">")[2]: re.findall("<td.*?>(.*?)</td>", row) for row in rows if row}
    assert (cells["simplecil"][place - 1], cells["er"][place - 1]) == ("-0.250", "–")
    header, *lines = (tmp_path / "report" / "comparison_cil.csv").read_text().splitlines()
    assert header.endswith(",LogME") and {line.rpartition(",")[2] for line in lines} == {"-0.25", ""}
    assert r"& -0.250 \\" in (tmp_path / "report" / "comparison_cil.tex").read_text()


def test_modules_per_task_are_a_picture_only_where_a_method_adds_them(tmp_path):
    sweep(tmp_path)
    assert "Modules after each task" not in page_of(tmp_path)
    for r, order in enumerate(ORDERS):
        tasks = [{"train_seconds": 1.5, "modules": {"block 2": k + 1, "block 3": 1 + r}} for k in range(len(order))]
        config = config_of("sema", order_seed=r)
        write_run(tmp_path / f"sema-{r}", order=order, finals=FINALS[r], config=config, cost={"tasks": tasks})
    found = page_of(tmp_path)
    assert found.count("Modules after each task") == 1 and "after 4 tasks: mean 6.0; orders from 5.0 to 7.0" in found
    assert re.search("block 3.*?2.0", found)


def test_the_path_of_a_search_is_shown(tmp_path):
    sweep(tmp_path)
    search_record(tmp_path / "search", method=HOSTILE)
    result = refresh(tmp_path)
    page = result.page.read_text()
    section = page[page.index("<h2>Search for the worst order: ") :].split("</section>")[0]
    assert HOSTILE not in page and "The worst of 2 orders (1 of them reused) is 3 2 1 0 with 88.0 points" in section
    assert "clrun -m task_order=listed" in section and "task_order.tasks=[3,2,1,0]" in section
    assert section.count("<circle") == 2 and "#2: tasks at 1 and 2 swapped" in section and "failed" in section
    assert "search for the worst order" in result.text and max(map(len, result.text.splitlines())) <= 100


def test_a_search_that_ties_or_has_nothing_yet_says_so(tmp_path):
    sweep(tmp_path)
    search_record(tmp_path / "one", trials=1)
    search_record(tmp_path / "two", trials=2)
    search_record(tmp_path / "none", trials=0)
    (tmp_path / "one/old").mkdir()
    (tmp_path / "one/old/order_search.json").write_text('{"schema": 0}')
    result = refresh(tmp_path)
    text = " ".join(result.text.split())
    assert text.count("one order has been evaluated so far: 90.0 points.") == 2, "the second one failed"
    assert "no order has been evaluated yet." in text
    assert [folder for folder, _ in result.skipped] == ["one/old"]
