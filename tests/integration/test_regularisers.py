"""Distillation, importance and columns, as a user runs them: state in run.json, settings, backbones, sanity."""

import json
from pathlib import Path
from typing import Any

import pytest
from running import run

BYTES = 4  # of a number
SHORT = ("job.max_tasks=2", "budget.epochs=1", "job.max_steps=3", "job.max_eval_rows=8")
# Eight images of each of ten classes: a transformer takes long to look at all digits.
FEW = ("dataset=synthetic", "dataset.image_shape=[1,8,8]", "dataset.train_rows=8", "dataset.test_rows=4")
METHODS = ("lwf", "ebll", "si", "mas", "qr", "blip", "progress_compress")


def record(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "run.json").read_text())
    return found


def cost(out: Path) -> dict[str, int]:
    """Return the state after the last task, bytes by attribute."""
    found: dict[str, int] = record(out)["cost"]["tasks"][-1]["state_bytes"]
    return found


# Bytes beside backbone and head, for P numbers in the backbone (its head of C classes apart) of D features.
FORMULAS = {
    "lwf": lambda p, d, c: 0,
    "ebll": lambda p, d, c: 2 * d * 100 * BYTES,
    "si": lambda p, d, c: 3 * p * BYTES,
    "mas": lambda p, d, c: 2 * p * BYTES,
    "qr": lambda p, d, c: 3 * p * BYTES,
    "blip": lambda p, d, c: 9 * p,
    "progress_compress": lambda p, d, c: 2 * (p + c * (d + 1)) * BYTES + p * BYTES,
}


@pytest.mark.parametrize("method", METHODS)
def test_state_in_run_json_is_the_formula_of_the_card(tmp_path: Path, method: str) -> None:
    run(tmp_path, f"method={method}", *SHORT)
    sizes = cost(tmp_path)
    p, d = sizes["backbone"] // BYTES, 256
    expected = FORMULAS[method](p, d, 10)
    beside = sizes["total"] - sizes["backbone"] - sizes["head"]
    assert beside == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("setting", [pytest.param("til", marks=pytest.mark.slow), "cil"])
@pytest.mark.parametrize("method", [*METHODS, "vit_pad"])
def test_runs_on_a_transformer(tmp_path: Path, method: str, setting: str) -> None:
    options = ("method.samples=16",) if method in ("mas", "blip", "progress_compress") else ()
    run(tmp_path, f"method={method}", "backbone=glyph_vit", f"scenario.setting={setting}", *SHORT, *FEW, *options)
    assert record(tmp_path)["status"] == "completed"


@pytest.mark.slow
def test_regularisers_forget_less_than_finetuning(tmp_path: Path) -> None:
    def mean(method: str, setting: str) -> float:
        options = (f"method={method}", f"scenario.setting={setting}", "task_order=random")
        runs = [
            run(tmp_path / f"{method}{setting}{seed}", *options, f"seed={seed}", f"task_order.seed={seed}")
            for seed in range(4)
        ]
        return sum(runs) / len(runs)

    til = {method: mean(method, "til") for method in ("finetune", "si", "mas", "qr", "blip")}
    assert all(til[method] > til["finetune"] for method in til if method != "finetune"), til
    cil = {method: mean(method, "cil") for method in ("finetune", "lwf", "progress_compress")}
    assert cil["lwf"] > 2 * cil["finetune"] and cil["progress_compress"] > 2 * cil["finetune"], cil
