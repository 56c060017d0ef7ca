"""The script of the README's tables: what it calls stale, and that the list of methods is generated."""

import copy
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    sys.modules.pop("readme_results", None)
    import readme_results

    return readme_results


def entry_of_today(script: ModuleType, name: str) -> dict:
    """The ledger's entry of a table made at this very moment."""
    sweeps = script.TABLES[name].sweeps(list(script.DATA), None)
    commands = {s.slug: {"command": s.parts["command"]} for s in sweeps}
    return {"parts": script.rests_on([s.parts for s in sweeps]), "sweeps": commands}


def test_a_table_is_stale_when_code_configuration_or_command_has_changed(script: ModuleType) -> None:
    entry = entry_of_today(script, "logme")
    assert script.changes("logme", entry) == ([], [])
    for part in ("clrun.methods.simplecil", "conf/method/simplecil.yaml", "clrun.running.engine"):
        other = copy.deepcopy(entry)
        assert part in other["parts"]
        other["parts"][part] = "another"
        assert script.changes("logme", other) == ([part], [])
    slug = next(iter(entry["sweeps"]))
    entry["sweeps"][slug]["command"] = "another"
    assert script.changes("logme", entry) == ([], [slug])


def test_comments_and_docstrings_make_no_table_stale(script: ModuleType, tmp_path: Path) -> None:
    plain = "def f(x):\n    return x\n"
    found = set()
    for text in (plain, '"""Doc."""\n# why\n' + plain, plain.replace(":\n", ':\n    """Doc."""\n'), plain + "f(1)\n"):
        script.code.cache_clear()
        (tmp_path / "m.py").write_text(text)
        script.source = lambda module: tmp_path / "m.py"
        found.add(script.code("m"))
    assert len(found) == 2


def test_sweeps_of_other_words_have_other_names(script: ModuleType) -> None:
    sweeps = {s for table in script.TABLES.values() for s in table.sweeps(list(script.DATA), None)}
    assert len({s.slug for s in sweeps}) == len(sweeps)


def test_the_list_of_methods_is_that_of_the_configurations(script: ModuleType) -> None:
    section = (ROOT / "README.md").read_text().partition("<!-- methods -->\n")[2].partition("\n<!-- end -->")[0]
    assert section == script.methods()


def test_every_table_of_the_readme_says_where_it_comes_from(script: ModuleType) -> None:
    readme = (ROOT / "README.md").read_text()
    for name, entry in script.ledger().items():
        table = readme.partition(f"<!-- table: {name} -->\n")[2].partition("\n<!-- end -->")[0]
        assert table.endswith(script.stamp(entry))
    assert set(script.ledger()) == set(script.TABLES)
