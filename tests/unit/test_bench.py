"""The benchmarks' one command: verdicts, its table, and that every script offers what it calls."""

import ast
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for name in ("bench", "benchlib"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import bench

    return bench


@pytest.mark.parametrize(
    ("measured", "less", "met"), [(1.0, False, True), (0.9, False, False), (1.0, True, True), (1.1, True, False)]
)
def test_a_figure_meets_its_demand_at_the_bound(bench: ModuleType, measured: float, less: bool, met: bool) -> None:
    figure = bench.Figure("speed", measured, 1.0, less)
    assert figure.met is met
    assert figure.verdict == ("MET" if met else "MISSED")


def test_a_benchmark_that_breaks_off_is_missed(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = ModuleType("bench_broken")
    broken.QUICK = "--runs 1"  # type: ignore[attr-defined]
    broken.main = lambda words: 1 / 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bench_broken", broken)
    (figure,) = bench.figures_of("broken", True)
    assert not figure.met and figure.found == "none"
    with pytest.raises(SystemExit) as end:
        bench.finish([figure])
    assert end.value.code == 1


def test_the_table_has_a_line_for_each_figure(bench: ModuleType) -> None:
    fast, slow = bench.Figure("fast", 0.97, 0.95), bench.Figure("memory", 31.0, 20.0, True, ".1f", " MB")
    lines = bench.table({"a": [fast], "b": [slow]}).splitlines()
    cells = [re.split(" {2,}", line) for line in lines[1:]]
    assert cells == [
        ["a", "fast", "0.97", "at least 0.95", "MET"],
        ["b", "memory", "31.0 MB", "at most 20.0 MB", "MISSED"],
    ]


@pytest.mark.parametrize("file", sorted(SCRIPTS.glob("bench_*.py")), ids=lambda file: file.stem)
def test_every_benchmark_can_be_called(bench: ModuleType, file: Path) -> None:
    tree = ast.parse(file.read_text())
    assert file.stem.removeprefix("bench_") in bench.NAMES
    (main,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    assert [argument.arg for argument in main.args.args] == ["words"] and len(main.args.defaults) == 1
    assigned = {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    assert "QUICK" in assigned


@pytest.mark.parametrize(
    ("what", "each", "missed"),
    [
        ("resident", 0.0, []),
        ("resident", 1e6, ["resident memory"]),
        ("state", 1.0, ["state"]),
        ("train", 0.1, ["learning"]),
    ],
)
def test_long_streams_find_what_grows(bench: ModuleType, what: str, each: float, missed: list[str]) -> None:
    import long_streams

    sample = {"train": 1.0, "evaluate": 1.0, "records": 1.0, "resident": 1e9, "state": 1e6}
    samples = [sample | {what: sample[what] + each * task} for task in range(100)]
    found = long_streams.Comparison("er", samples)
    assert [f.name for f in found.figures if not f.met] == [f"er, growth of {name}" for name in missed]
    assert found.row[-1] == ("MISSED" if missed else "ok")
