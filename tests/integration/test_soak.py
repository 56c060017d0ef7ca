"""The soak test's short form, and that it counts what is wrong."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    import soak

    yield soak


def test_nothing_is_wrong_in_the_short_form() -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / "soak.py"), "--quick"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    rows = {line[:14].strip(): line[14:].split() for line in done.stdout.splitlines()[1:9]}
    kinds = {"kill", "flip", "torn", "full disk", "two writers", "processes", "hostile"}
    assert rows.keys() == {*kinds, "all"}, done.stdout + done.stderr
    left_out = {line.partition(":")[0] for line in done.stdout.splitlines() if ": left out, " in line}
    assert {kind for kind in kinds if rows[kind][0] == "0"} == left_out <= {"full disk", "two writers"}
    assert rows["all"][-1] == "0" and done.returncode == 0, done.stdout


def test_wrong_outcomes_are_counted_and_refusals_after_a_kill_are_wrong(soak: ModuleType) -> None:
    result = soak.Result
    kinds = {"kill": [lambda: soak.without_refusal(result("refused", "why"))], "flip": [lambda: result("refused")] * 2}
    counts, lines = soak.soak({kind: iter(attempts) for kind, attempts in kinds.items()}, float("inf"))
    assert counts == {"kill": {"wrong": 1}, "flip": {"refused": 2}}
    assert lines == ["kill: why"]
    assert soak.table(counts).splitlines()[-1].split() == ["all", "3", "0", "2", "1"]


def test_a_traceback_and_a_hang_are_no_refusals(soak: ModuleType, tmp_path: Path) -> None:
    def bug() -> None:
        raise ZeroDivisionError

    def mistake() -> None:
        raise soak.lib.ConfigError("seed: must be a number; set seed=0")

    assert not soak.forked(bug, tmp_path / "log").refused
    assert not soak.forked(soak.lib.kill_myself, tmp_path / "log").refused
    assert soak.forked(mistake, tmp_path / "log").refused
