"""The scripts of generated pages: which tables are stale, and that page and headline are what code and ledger say."""

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


def test_the_page_of_methods_says_what_the_code_says(script: ModuleType) -> None:
    import method_page

    stale = method_page.PAGE.read_text() != method_page.page()
    assert not stale, "docs/methods.md is stale: run python scripts/method_page.py"


def test_a_method_has_its_equation_card_and_options(script: ModuleType) -> None:
    from method_page import Entry

    section = Entry(ROOT / "conf/method/ewc.yaml").section()
    assert section.startswith("## ewc\n")
    assert "```text\nloss = CE + strength * 1/2 sum_i F_i (theta_i - theta*_i)^2" in section
    assert "| settings | til cil dil |" in section and "| memory between tasks | 2 P floats" in section
    assert "| `strength` | `100.0` | weight of the penalty" in section
    nested = Entry(ROOT / "conf/method/halrp.yaml").section()
    assert "| `warmup.optimizer.lr` | `0.05` |" in nested and "_target_" not in nested


def test_a_word_of_the_text_changes_nothing_in_markdown(script: ModuleType) -> None:
    from method_page import escaped

    assert escaped("theta*_i <b> a_b `c*d`") == "theta\\*\\_i \\<b> a_b `c*d`"


def test_every_table_says_where_it_comes_from(script: ModuleType) -> None:
    for name, entry in script.ledger().items():
        assert script.between(f"table: {name}").endswith(script.stamp(entry))
    assert set(script.ledger()) == set(script.TABLES)


def test_the_headline_of_the_readme_is_that_of_the_ledger(script: ModuleType) -> None:
    assert script.page("headline").name == "README.md"
    assert script.between("headline") == script.headline()


def test_a_table_is_put_into_the_page_that_has_its_place(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "a.md", tmp_path / "b.md"
    first.write_text("text\n")
    second.write_text("before\n<!-- table: x -->\nold\n\n*old.*\n<!-- end -->\nafter\n")
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "PAGES", (first, second))
    script.amend("x", "*new.*")
    assert script.between("table: x") == "old\n\n*new.*"
    assert second.read_text() == "before\n<!-- table: x -->\nold\n\n*new.*\n<!-- end -->\nafter\n"
    with pytest.raises(SystemExit, match="no place for 'table: y'"):
        script.place("table: y", "text")
