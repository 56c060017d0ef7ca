"""`clrun merge`: the networks of finished runs become one, which is written as a run."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from running import cells, run
from safetensors.torch import load_file

import clrun.api
from clrun.cli import main
from clrun.reporting import refresh
from clrun.results.records import RunRecord
from clrun.running.merge_runs import merge_runs
from clrun.system.errors import ConfigError

DATA = ("dataset=synthetic", "dataset.train_rows=20", "dataset.test_rows=10", "dataset.num_classes=6")
COMMON = (*DATA, "scenario.n_tasks=3", "method=finetune", "method.compete=current", "budget.epochs=2")
ONE = (*COMMON, "job.max_tasks=1", "job.save_model=true", "task_order=listed")
ORDERS = ((0, 1, 2), (1, 2, 0), (2, 0, 1))


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def listed(order: Sequence[int]) -> str:
    return f"task_order.tasks=[{','.join(map(str, order))}]"


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return three runs from the same initial network, each of which has learned another task."""
    folder = tmp_path_factory.mktemp("experts")
    for order in ORDERS:
        run(folder / str(order[0]), *ONE, listed(order))
    return [folder / str(order[0]) for order in ORDERS]


def merged(runs: Sequence[Path], out: Path, *options: str) -> Path:
    return merge_runs([*map(str, runs), f"out={out}", *options])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in load_file(folder / "model.safetensors").items() if "backbone" in name}


def test_the_result_is_a_run_with_its_own_matrix(experts: list[Path], tmp_path: Path) -> None:
    out = merged(experts, tmp_path / "out")
    found = record(out)
    assert found["status"] == "completed" and found["task_order"] == [0, 1, 2]
    assert [source["folder"] for source in found["merged"]] == [str(folder) for folder in experts]
    assert set(cells(out)) == {(p, t) for p in (1, 2, 3) for t in range(p)}
    assert cells(out)[1, 0] == cells(experts[0])[1, 0], "the merge of one network is that network"
    mean = weights(out)
    for name, value in mean.items():
        if value.is_floating_point():
            parts = torch.stack([weights(folder)[name].double() for folder in experts])
            torch.testing.assert_close(value.double(), parts.mean(dim=0), rtol=0, atol=1e-6)
    heads = [load_file(folder / "model.safetensors")["head.weight"] for folder in experts]
    head = load_file(out / "model.safetensors")["head.weight"]
    classes = [record(folder)["task_classes"][0] for folder in experts]
    for own, rows in zip(classes, heads, strict=True):
        assert torch.equal(head[own], rows[own])
    refresh(tmp_path)
    assert RunRecord.load(out).matrices["test", "til"].final().keys() == {0, 1, 2}


def test_the_result_predicts_and_can_be_merged_again(experts: list[Path], tmp_path: Path) -> None:
    out = merged(experts, tmp_path / "out", "rule=ties", "ties.keep=0.5")
    learner = clrun.api.load(out).learner()
    images, labels = learner.test_images(2)
    correct = (learner.predict(images, task=2).labels == labels).sum()
    assert (correct, len(labels)) == cells(out, "til")[3, 2]
    again = merged([out, out], tmp_path / "again")
    assert cells(again)[3, 0] == cells(out)[3, 0]


@pytest.mark.parametrize(
    "rule", ["fisher", "regmean", "regmean_pp", "imm_mode", "dare", "magmax", "opcm", "dop", "wise_ft"]
)
def test_every_rule_merges_runs(rule: str, experts: list[Path], tmp_path: Path) -> None:
    out = merged(experts[:2], tmp_path / "out", f"rule={rule}", "samples=20")
    found = record(out)
    assert found["config"]["method"]["rule"] == rule and found["task_order"] == [0, 1]
    assert all(bool(v.isfinite().all()) for v in weights(out).values())
    if rule in ("regmean", "regmean_pp", "opcm", "fisher"):  # no layer is linear: dop is the mean here
        mean = weights(merged(experts[:2], tmp_path / "mean"))
        assert any(not torch.allclose(v, mean[n]) for n, v in weights(out).items())


@pytest.mark.parametrize("rule", ["mean", "fisher", "regmean", "regmean_pp", "ties", "magmax"])
def test_merging_a_run_with_itself_is_that_run(rule: str, experts: list[Path], tmp_path: Path) -> None:
    scale = {"ties": ("ties.scale=1", "ties.keep=1"), "magmax": ("magmax.scale=1",)}.get(rule, ())
    out = merged([experts[1]] * 2, tmp_path / "out", f"rule={rule}", *scale)
    for name, value in weights(experts[1]).items():
        torch.testing.assert_close(weights(out)[name], value, rtol=0, atol=1e-5)
    if "regmean" not in rule:  # whose least squares are solved to a tolerance
        assert cells(out) == cells(experts[1])


def test_runs_of_all_tasks_in_several_orders_give_one_row(tmp_path: Path) -> None:
    folders = []
    for order in ORDERS[:2]:
        folders.append(tmp_path / str(order[0]))
        run(folders[-1], *COMMON, "job.keep_checkpoint=true", "task_order=listed", listed(order))
    out = merged(folders, tmp_path / "out", "weights=1,3")
    assert record(out)["task_order"] == [0, 1, 2]
    assert set(cells(out)) == {(3, 0), (3, 1), (3, 2)}
    metrics = record(out)["metrics"]["cil"]
    assert metrics["average_accuracy"] is not None and metrics["forgetting"] is None


def test_coefficients_weigh_networks(experts: list[Path], tmp_path: Path) -> None:
    out = merged(experts[:2], tmp_path / "out", "weights=[1,3]")
    for name, value in weights(out).items():
        a, b = (weights(folder)[name] for folder in experts[:2])
        torch.testing.assert_close(value, (a + 3 * b) / 4, rtol=0, atol=1e-6)
    assert [source["weight"] for source in record(out)["merged"]] == [1.0, 3.0]


def other(tmp_path: Path, *options: str) -> Path:
    run(tmp_path / "other", *ONE, listed(ORDERS[1]), *options)
    return tmp_path / "other"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("backbone.width=4",), r"other: its backbone has other shapes than that of .*0 \(layers.conv1.weight: \[4, "),
        (("seed=1",), r"other: started from other weights than .*0 \(the seeds draw other weights\); merge runs with"),
        (("dataset.seed=1",), r"other: has learned from other data than .*0: .*"),
        (("scenario.class_seed=1",), r"other: the data are cut into other tasks than in .*0 \(scenario.class_seed"),
        (("scenario.setting=til",), r"other: was trained in the setting til, and .*0 in cil; merge runs of one"),
        (("job.save_model=false",), r"other: has stored no network .*; run it again .* with job.save_model=true"),
        (("method=lda", "~method.compete"), r"other: Lda predicts with more than a trained backbone and a linear head"),
    ],
    ids=["shapes", "start", "data", "tasks", "setting", "no model", "method"],
)
def test_runs_that_do_not_fit_are_refused_by_name(
    options: tuple[str, ...], message: str, experts: list[Path], tmp_path: Path
) -> None:
    if "method=lda" in options:
        run(tmp_path / "other", *DATA, "scenario.n_tasks=3", "method=lda", "job.save_model=true", "job.max_tasks=1")
    else:
        other(tmp_path, *options)
    with pytest.raises(ConfigError, match=message) as caught:
        merged([experts[0], tmp_path / "other"], tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists(), "nothing is written"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("rule=means",), r"method.rule: .*means.*"),
        (("ties.keep=2", "rule=ties"), r"method.ties.keep: must be at most 1"),
        (("rule=ema",), r"rule=ema: averages over the steps"),
        (("keep=0.3",), r"method.keep: unknown option"),
        (("weights=1",), r"weights=1: expected 2 numbers above 0"),
        (("weights=1,0",), r"weights=1,0: expected 2 numbers above 0"),
        (("weights=1,2", "rule=opcm"), r"weights: rule=opcm gives networks no coefficients"),
        (("train_from=merged",), r"train_from: the runs are trained already"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_wrong_options_are_refused(words: tuple[str, ...], message: str, experts: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        merged(experts[:2], tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_folders_without_a_usable_run_are_refused(
    experts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: object) -> str:
        with pytest.raises(SystemExit) as end:
            main(["merge", *map(str, words)])
        assert end.value.code == 2
        return capsys.readouterr().err

    assert "merge: needs two runs or more" in refused(experts[0])
    assert f"{tmp_path / 'nothing'}: holds no run (no run.json)" in refused(experts[0], tmp_path / "nothing")
    assert f"out={experts[1]}: holds a run already" in refused(*experts[:2], f"out={experts[1]}")
    shutil.copytree(experts[1], tmp_path / "half")
    stored = record(experts[1])
    (tmp_path / "half" / "run.json").write_text(json.dumps(stored | {"status": "running"}))
    assert "half: the run is not complete (running); start its own command again first" in refused(
        experts[0], tmp_path / "half"
    )
    stored["config"]["backbone"]["_target_"] = "my_package.nets.net"
    (tmp_path / "half" / "run.json").write_text(json.dumps(stored))
    assert "add 'trust=['my_package.nets']' to the command" in refused(experts[0], tmp_path / "half")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half"]


def test_networks_with_texts_as_heads_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLRUN_CACHE", str(tmp_path / "cache"))
    common = ("backbone=glyph_clip", "backbone.head=fixed", "dataset=digits", "method=finetune", "job.max_tasks=1")
    for order, kept in (("canonical", "job.save_model=true"), ("reverse", "job.keep_checkpoint=true")):
        run(tmp_path / order, *common, kept, f"task_order={order}", "job.max_steps=1", "job.max_eval_rows=10")
    out = merged([tmp_path / "canonical", tmp_path / "reverse"], tmp_path / "out", "samples=10")
    assert cells(out).keys() == {(1, 0), (2, 0), (2, 4)}
    assert cells(out)[1, 0] == cells(tmp_path / "canonical")[1, 0]


def test_the_command_prints_the_table_and_the_folder(
    experts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["merge", *map(str, experts), "rule=regmean", f"out={tmp_path / 'out'}"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert f"results: {tmp_path / 'out'}" in printed
    assert printed.count(" | cil ") == 3, "a row for each position"
