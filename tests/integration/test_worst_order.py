"""task_order=adversarial from the command: what is run, reused, recorded, resumed and shown; task_order=edge."""

import json
import shutil
from itertools import permutations
from pathlib import Path

import pytest
from running import quiet, run

from clrun.cli import main
from clrun.config.job import JobInfo
from clrun.reporting import report
from clrun.running.build import build_images
from clrun.running.parts import Parts
from clrun.running.run import run_config
from clrun.running.similarity import task_similarities
from clrun.system.errors import ConfigError

CANONICAL = "clrun.data.orders.canonical"
SMALL = ("backbone=cnn", "hardware.threads=1", "job.max_steps=2", "job.picture=false", "budget.epochs=1")
SEARCH = ("task_order=adversarial", "task_order.starts=2", "job.max_steps=2", "budget.epochs=1")


def search(out: Path, *overrides: str, stop: int | None = None) -> dict:
    """Search in `out`, interrupted before run number `stop`, and return the record."""
    config, choices = quiet(*SEARCH, *overrides)
    job = JobInfo(None, 1, choices, False, [*SEARCH, *overrides], {})
    if stop is None:
        value = run_config(config, out, job=job)
    else:
        from clrun.running import run as running
        from clrun.running.worst_order import search_worst_order

        def limited(parts, folder, job, counts=[0]):  # noqa: B006 - the count lives as long as the search
            counts[0] += 1
            if counts[0] == stop:
                raise KeyboardInterrupt
            return running._run(parts, folder, job)

        with pytest.raises(KeyboardInterrupt):
            search_worst_order(Parts(config), out, job, run=limited)
    record = json.loads((out / "order_search.json").read_text())
    if stop is None:
        assert value == record["worst"]["accuracy"]
    return record


def test_the_command_searches_records_and_reports(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["method=finetune", "task_order=adversarial", "task_order.budget=5", *SMALL, "hydra.run.dir=s"])
    out, error = capfd.readouterr()
    assert (end.value.code, error) == (0, "")
    record = json.loads(Path("s/order_search.json").read_text())
    accuracies = [trial["accuracy"] for trial in record["trials"]]
    assert (record["started"], record["status"], len(accuracies)) == (5, "budget spent", 5)
    assert record["worst"]["accuracy"] == min(accuracies)
    for trial in record["trials"]:
        run = json.loads((Path("s") / trial["folder"] / "run.json").read_text())
        assert run["task_order"] == trial["order"] and run["status"] == "completed"
        assert run["metrics"]["cil"]["average_accuracy"] == pytest.approx(trial["accuracy"], abs=1e-12)
        assert run["config"]["task_order"]["_target_"] == "clrun.data.orders.listed"
    worst = ",".join(map(str, record["worst"]["order"]))
    said = "search for the worst order, finetune: the worst of 5 orders (0 of them reused) is"
    assert said in " ".join(out.split())
    assert f"seed=range(1,6)' task_order=listed 'task_order.tasks=[{worst}]'" in out
    page = Path("s/report.html").read_text()
    assert "Search for the worst order: finetune" in page and "chosen by a search" in page


def test_an_order_invariant_learner_ties(tmp_path, capfd):
    record = search(tmp_path / "s", "method=simplecil", "task_order.budget=4", "job.progress=true")
    assert len({trial["accuracy"] for trial in record["trials"]}) == 1
    assert "all 4 orders (0 of them reused) have the same accuracy" in " ".join(capfd.readouterr().out.split())


def test_an_interrupted_search_goes_on_as_if_nothing_had_happened(tmp_path):
    options = ("method=finetune", "task_order.budget=5")
    whole = search(tmp_path / "whole", *options)
    early = search(tmp_path / "cut", *options, stop=4)
    assert early["trials"] == whole["trials"][:3]
    assert search(tmp_path / "cut", *options) == whole
    more = search(tmp_path / "cut", "method=finetune", "task_order.budget=6")
    assert more["trials"][:5] == whole["trials"] and more["started"] == 6
    with pytest.raises(ConfigError, match="holds a search with another configuration"):
        search(tmp_path / "cut", *options, "seed=1")


def test_finished_runs_that_differ_in_the_order_alone_are_reused(tmp_path):
    first = search(tmp_path / "first", "method=finetune", "task_order.budget=3")
    shutil.copytree(tmp_path / "first/orders", tmp_path / "runs")
    search(tmp_path / "other", "method=finetune", "seed=5", "task_order.budget=1")
    reuse = f"task_order.reuse=[{tmp_path / 'runs'},{tmp_path / 'other'}]"
    record = search(tmp_path / "second", "method=finetune", "task_order.budget=2", reuse)
    known, new = record["trials"][:3], record["trials"][3:]
    assert {tuple(t["order"]) for t in known} == {tuple(t["order"]) for t in first["trials"]}
    assert all(t["reused"] and t["source"] == "earlier run" for t in known), "another seed is another experiment"
    assert record["started"] == len(new) == 2 and not any(t["reused"] for t in new)
    assert not {tuple(t["order"]) for t in known} & {tuple(t["order"]) for t in new}


def test_orders_of_a_search_do_not_count_as_random_ones(tmp_path):
    search(tmp_path / "s/a", "method=finetune", "task_order.budget=3")
    config, choices = quiet("method=finetune", "job.max_steps=2", "budget.epochs=1")
    run_config(config, tmp_path / "s/b", job=JobInfo(None, 1, choices, False, [], {}))
    (tmp_path / "s/a2").mkdir()
    (tmp_path / "s/a2/order_search.json").write_text("{")
    result = report([tmp_path / "s"], pictures=False)
    assert sorted(len(group.runs) for group in result.groups) == [1, 3]
    assert "note: orders=searched: orders were chosen by a search" in " ".join(result.text.split())
    assert result.comparisons == [], "bad orders of one method are no sample"
    assert [folder for folder, _ in result.skipped] == ["a2"]


def test_what_cannot_be_searched_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^job.max_tasks: with a limit, orders would differ"):
        search(tmp_path / "s", "method=finetune", "job.max_tasks=2")
    assert not (tmp_path / "s").exists()


def test_a_run_that_fails_is_left_out_unless_it_is_the_first(tmp_path, monkeypatch, capfd):
    from clrun.running import run as running

    done, whole = [], running._run

    def failing(parts, out, job):
        done.append(out)
        if len(done) == 2:
            raise FloatingPointError("loss is nan")
        return whole(parts, out, job)

    monkeypatch.setattr(running, "_run", failing)
    with pytest.raises(FloatingPointError):
        search(tmp_path / "s", "method=finetune", "task_order.budget=3")
    record = json.loads((tmp_path / "s/order_search.json").read_text())
    assert [t["status"] for t in record["trials"]] == ["completed", "failed", "completed"]
    done.append(Path())
    monkeypatch.setattr(running, "_run", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        search(tmp_path / "t", "method=finetune", "task_order.budget=3")
    assert json.loads((tmp_path / "t/order_search.json").read_text())["started"] == 0


def test_a_hard_and_an_easy_order_are_learned_as_the_features_say(tmp_path):
    shared = ("method=finetune", "backbone=glyph_vit", "task_order=edge", "job.max_steps=1", "job.max_eval_rows=8")
    order = {}
    for kind in ("hard", "easy"):
        run(tmp_path / kind, *shared, f"task_order.kind={kind}", "budget.epochs=1")
        order[kind] = json.loads((tmp_path / kind / "run.json").read_text())["task_order"]
    config, _ = quiet(*shared)
    backbone, stream, _ = build_images(
        Parts(config | {"task_order": {"_target_": CANONICAL, "_partial_": True}}), place=False
    )
    table = task_similarities(stream, backbone, "features")
    sums = {kind: sum(table[a, b] for a, b in zip(found, found[1:], strict=False)) for kind, found in order.items()}
    every = [sum(table[a, b] for a, b in zip(o, o[1:], strict=False)) for o in permutations(range(5))]
    assert sums["hard"] == pytest.approx(min(every)) and sums["easy"] == pytest.approx(max(every))
