"""The rules of the tests themselves: each checks something, and none ends before its check."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent
FILES = sorted(ROOT.rglob("test_*.py"))
CHECKS = ("raises", "warns", "fail")  # functions of pytest that fail a test


def own(function: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a function without those of the functions within it."""
    for node in ast.iter_child_nodes(function):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            yield node
            yield from own(node)


def checks(function: ast.AST, helpers: frozenset[str] = frozenset()) -> list[int]:
    """Return the lines in which a function asserts, expects an exception, or calls a helper of its file that does."""
    lines = []
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            lines.append(node.lineno)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            if name in helpers or name in CHECKS or name.startswith("assert_"):
                lines.append(node.lineno)
    return sorted(lines)


def weak(source: str) -> dict[str, str]:
    """Return what is wrong with the tests of a file, by the name of the test."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    helpers = frozenset(f.name for f in functions if not f.name.startswith("test_") and checks(f))
    found = {}
    for test in functions:
        if not test.name.startswith("test_"):
            continue
        lines = checks(test, helpers)
        if not lines:
            found[test.name] = "checks nothing"
        elif any(isinstance(node, ast.Return) and node.lineno < lines[0] for node in own(test)):
            found[test.name] = "may return before it checks anything: leave such cases out of its parameters"
    return found


def test_every_test_checks_something() -> None:
    assert not {file.name: found for file in FILES if (found := weak(file.read_text()))}


def test_tests_that_check_nothing_are_found() -> None:
    source = """
def helper():
    assert True
def test_good():
    assert 1
def test_by_helper():
    helper()
def test_with_inner_function():
    def inner():
        return 1
    assert inner()
def test_empty():
    print("runs")
def test_early(x):
    if x:
        return
    assert x
"""
    assert list(weak(source)) == ["test_empty", "test_early"]
