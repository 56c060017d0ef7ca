"""Runs on frozen features: cached or live, swept over orders, listed, pruned, and what they record."""

import csv
import json
import os
from pathlib import Path

import pytest
import torch
from running import run

from clrun.blocks.logme import logme
from clrun.blocks.statistics import ClassStats
from clrun.data.features import frozen_features
from clrun.running.build import build_images
from clrun.running.parts import Parts
from clrun.system.seeding import seed_all

QUIET = ("job.progress=false", "job.picture=false", "hardware.threads=1")
METHODS = ("simplecil", "lda", "ncm")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache of its own for each test."""
    monkeypatch.setenv("CLRUN_CACHE", str(tmp_path / "cache"))


def stored(out: Path) -> dict:
    return json.loads((out / "run.json").read_text())


@pytest.mark.parametrize("scenario", ["class_split", "domain_shift"])
def test_cached_and_live_features_give_the_same_run(scenario: str, tmp_path: Path) -> None:
    options = ("method=linear_probe", "backbone=mlp", f"scenario={scenario}", "scenario.n_tasks=3", "budget.epochs=1")
    options += ("job.save_predictions=final",)
    ways = {"cold": f"'{tmp_path / 'cache'}'", "warm": f"'{tmp_path / 'cache'}'", "live": "false"}
    for name, way in ways.items():
        run(tmp_path / name, *options, f"job.feature_cache={way}")
    for file in ("accuracy.csv", "predictions.csv"):
        texts = {(tmp_path / name / file).read_text() for name in ways}
        assert len(texts) == 1
    domains = 3 if scenario == "domain_shift" else 1
    features = {name: stored(tmp_path / name)["features"] for name in ways}
    for name, reused in (("cold", False), ("warm", True)):
        assert [file["reused"] for file in features[name]["files"]] == [reused] * (2 * domains)
        assert features[name]["bytes"] == 4 * 100 * 1797 * domains
    assert features["live"] == {"folder": None, "files": [], "bytes": 0}
    assert len({stored(tmp_path / name)["config_hash"] for name in ways}) == 1


def test_a_sweep_over_orders_reads_one_cache_and_finds_no_difference(command, tmp_path: Path) -> None:
    sweep = ("-m", f"method={','.join(METHODS)}", "backbone=mlp", "task_order=random", "task_order.seed=range(3)")
    code, out, _ = command(*sweep, *QUIET, "hydra.sweep.dir=s")
    assert code == 0
    entries = [e for e in json.loads(Path("s/order_robustness.json").read_text())]
    assert {(e["method"], e["setting"]) for e in entries} == {(m, s) for m in METHODS for s in ("cil", "til")}
    assert all(e["aopd"] == e["mopd"] == e["sd"] == 0 and e["n_orders"] == 3 for e in entries)
    with Path("s/sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9 and len({row["logme"] for row in rows}) == 1
    assert "LogME" in out and f"{float(rows[0]['logme']):.3f}" in out
    assert len(list(Path("cache/features").glob("*.npy"))) == 2
    reused = [
        file["reused"] for path in Path("s").glob("*/run.json") for file in stored(path.parent)["features"]["files"]
    ]
    assert sorted(reused) == [False] * 2 + [True] * 16


def test_logme_ranks_backbones(command, tmp_path: Path) -> None:
    sweep = ("-m", "backbone=mlp,lenet", "method=simplecil", *QUIET)
    code, out, _ = command(*sweep, "hydra.sweep.dir=s")
    assert code == 0
    scores = {}
    for path in Path("s").glob("*/run.json"):
        record = stored(path.parent)
        name = record["choices"]["backbone"]
        scores[name] = record["logme"]
        parts = Parts(record["config"])
        hardware = parts.hardware
        hardware.setup()
        backbone, images, _ = build_images(parts)
        stream, _ = frozen_features(images, backbone, hardware)
        parts = {str(task.id): next(task.train.batches(10_000)) for task in stream.tasks}
        everything = [torch.cat([getattr(part, key) for part in parts.values()]) for key in ("x", "y")]
        for key, (x, y) in {"all": everything, **{k: (p.x, p.y) for k, p in parts.items()}}.items():
            stats = ClassStats(x.shape[1], 10, moments="pooled")
            stats.update(x, y)
            found = record["logme"]["all"] if key == "all" else record["logme"]["tasks"][key]
            assert found == pytest.approx(logme(stats), rel=1e-9)
    assert set(scores) == {"mlp", "lenet"} and set(scores["mlp"]["tasks"]) == set("01234")
    assert all(f"{score['all']:.3f}" in out for score in scores.values())


def test_features_are_listed_and_pruned(command, tmp_path: Path) -> None:
    code, out, _ = command("features")
    assert (code, out) == (0, f"0 files, 0.0 MB in {tmp_path}/cache/features\n")
    assert command("method=simplecil", "backbone=mlp", *QUIET, "hydra.run.dir=r")[0] == 0
    code, out, _ = command("features", "list")
    lines = out.splitlines()
    assert [line.split()[:6] for line in lines[1:3]] == [
        ["digits", part, "mlp", rows, "x", "100"] for part, rows in (("test", "355"), ("train", "1442"))
    ]
    Path("elsewhere").mkdir()
    assert command("features", "list", "--dir", "elsewhere")[1].startswith("0 files")
    code, _, err = command("features", "list", "--dir", "nowhere")
    assert (code, err.count("\n")) == (2, 1) and "nowhere" in err
    assert "2 files, 0.7 MB" in command("features", "prune", "--keep", "1")[1]
    code, out, _ = command("features", "prune")
    assert out.startswith("0 files") and not list(Path("cache/features").iterdir())
    code, _, err = command("features", "prun")
    assert code == 2 and err.count("\n") == 1 and "prune" in err


def test_a_new_cache_folder_is_announced_once_with_its_limit(command, tmp_path: Path) -> None:
    options = ("method=simplecil", "backbone=mlp", *QUIET, "job.feature_cache_gb=0.5")
    _, _, err = command(*options, "hydra.run.dir=r1")
    [line] = [line for line in err.splitlines() if "features of frozen backbones" in line]
    assert f" kept in {tmp_path}/cache/features, up to 0.5 GB; " in line
    for advice in ("job.feature_cache_gb=N", "job.feature_cache=FOLDER", "job.feature_cache=false"):
        assert advice in line
    assert "features of frozen backbones" not in command(*options, "hydra.run.dir=r2")[2]


def test_the_size_limit_of_the_cache_is_an_option(command, tmp_path: Path) -> None:
    options = ("method=simplecil", "backbone=mlp", *QUIET)
    assert command(*options, "hydra.run.dir=r1", "job.feature_cache_gb=1e-4")[0] == 0  # 0.1 MB; the features need 0.7
    assert command("features")[1].startswith("0 files")
    assert any("0.0001 GB" in note for note in json.loads(Path("r1/run.json").read_text())["notes"])
    assert command(*options, "hydra.run.dir=r2")[0] == 0
    assert command("features")[1].splitlines()[-1].startswith("2 files")
    code, _, err = command(*options, "hydra.run.dir=r3", "job.feature_cache_gb=0")
    assert (code, err) == (2, "clrun: job.feature_cache_gb: must be greater than 0, got 0\n")


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (
            "file/cache",
            "file/cache: features cannot be stored there (Not a directory); set job.feature_cache=FOLDER, or",
        ),
        ("''", "job.feature_cache: give a folder, true (the default folder) or false"),
        ("3", "job.feature_cache: expected bool or str, got 3"),
    ],
)
def test_a_cache_that_cannot_be(value: str, line: str, command) -> None:
    Path("file").touch()
    code, _, err = command("method=simplecil", *QUIET, "hydra.run.dir=r", f"job.feature_cache={value}")
    assert code == 2 and err.count("\n") == 1 and line in err
    assert not Path("r").exists()


def test_augmentation_without_effect_is_noted(tmp_path: Path) -> None:
    run(tmp_path / "r", "method=simplecil", "backbone=mlp", "dataset.augment=[crop]")
    assert any("dataset.augment has no effect" in note for note in stored(tmp_path / "r")["notes"])


def test_forgetting_as_a_user_asks_for_it(command) -> None:
    options = ("method=lda", "backbone=mlp", *QUIET)
    assert command(*options, "method.forget_tasks=[1]", "hydra.run.dir=forgotten")[0] == 0
    assert command(*options, "hydra.run.dir=kept")[0] == 0
    last = {name: stored(Path(name))["accuracy_matrix"]["cil"][-1] for name in ("forgotten", "kept")}
    assert last["forgotten"][1] == 0
    assert all(a >= b for k, (a, b) in enumerate(zip(last["forgotten"], last["kept"], strict=True)) if k != 1)
    code, _, err = command(*options, "method.forget_tasks=[5]", "hydra.run.dir=none")
    assert code == 2 and "method.forget_tasks: no task 5 (the stream has [0, 1, 2, 3, 4])" in err


def test_a_dry_run_computes_no_features(command, tmp_path: Path) -> None:
    code, out, _ = command("method=ranpac", "backbone=mlp", "method.m=100", "job=dry_run", "hardware.threads=1")
    assert code == 0 and "estimated time" in out
    assert not (tmp_path / "cache").exists()


def test_backbones_are_reused_by_frozen_learners_alone(tmp_path: Path) -> None:
    from clrun.running import backbone_reuse as frozen

    made = []

    def new() -> torch.nn.Module:
        made.append(1)
        return torch.nn.Linear(2, 2)

    seed_all(0)
    first = frozen.reused_backbone("a", new)
    assert frozen.reused_backbone("a", new) is first and len(made) == 1
    assert frozen.remembered(first, "x", lambda: 1) == 1 and frozen.remembered(first, "x", lambda: 2) == 1
    assert frozen.remembered(torch.nn.Linear(2, 2), "x", lambda: 2) == 2
    assert frozen.reused_backbone("b", new) is not first
    assert frozen.remembered(first, "x", lambda: 3) == 3


def test_a_short_run_waits_for_the_disk_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "first", "method=simplecil", "backbone=mlp")  # computes the features
    waits = []
    wait = os.fsync
    monkeypatch.setattr("clrun.system.files.os.fsync", lambda file: waits.append(file) or wait(file))
    run(tmp_path / "second", "method=simplecil", "backbone=mlp")
    assert len(waits) == 1, "how the run ended"
