"""A run with a method that selects prompts says what was selected, and whether the test batch had a say in it."""

import json
from pathlib import Path
from typing import Any

import pytest
from running import run

SHORT = ("backbone=glyph_vit", "job.max_tasks=2", "job.max_steps=1", "job.max_eval_rows=8")


def result(out: Path, *overrides: str) -> dict[str, Any]:
    run(out, *SHORT, *overrides)
    found: dict[str, Any] = json.loads((out / "run.json").read_text())
    return found


@pytest.mark.parametrize("selection", ["instance", "batch"])
def test_selection_is_recorded_and_a_vote_noted(tmp_path: Path, selection: str) -> None:
    found = result(tmp_path, "method=dualprompt", f"method.selection={selection}", "job.picture=true")
    assert [sum(row) for row in found["selection"]["counts"]] == [8, 8]
    assert 1 <= found["selection"]["used"] <= 2
    assert (tmp_path / "selection.png").exists()
    assert any("composition of the test batch" in note for note in found["notes"]) == (selection == "batch")


def test_other_methods_have_no_selection(tmp_path: Path) -> None:
    found = result(tmp_path, "method=vpt", "job.picture=true")
    assert "selection" not in found
    assert not (tmp_path / "selection.png").exists()
