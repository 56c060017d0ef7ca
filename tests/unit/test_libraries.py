"""What pip must install for each third-party module, and how a missing library is reported."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from clrun.system import libraries
from clrun.system.errors import ConfigError

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEVELOPERS = {"test", "dev", "browser", "docs"}  # extras that clrun itself never imports
LOADERS = ("libraries.load", "load", "not_installed", "importlib.import_module")
TABLES = {**libraries.REQUIRED, **{name: wanted for name, (_, wanted) in libraries.OPTIONAL.items()}}


def imported(file: Path) -> Iterator[str]:
    """Modules that a file imports anywhere, by statement or by `libraries.load` and `not_installed`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in LOADERS:
            yield from (str(argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant))


FILES = sorted((ROOT / "clrun").rglob("*.py"))
THIRD_PARTY = sorted(
    {
        name
        for file in FILES
        for name in imported(file)
        if name.partition(".")[0] not in (*sys.stdlib_module_names, "clrun", "")
    }
)


def test_every_imported_module_is_declared():
    wanted = {module: libraries.requirement(module) for module in THIRD_PARTY}
    unknown = [module for module, requirement in wanted.items() if requirement is None]
    assert not unknown, "add them to clrun/system/libraries.py and to pyproject.toml"
    assert set(wanted.values()) <= {*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), [])}


def test_the_tables_are_those_of_pyproject():
    assert sorted(libraries.REQUIRED.values()) == sorted(PROJECT["dependencies"])
    extras = {
        (extra, wanted)
        for extra, requirements in PROJECT["optional-dependencies"].items()
        if extra not in DEVELOPERS
        for wanted in requirements
    }
    assert set(libraries.OPTIONAL.values()) <= extras
    assert {extra for extra, _ in libraries.OPTIONAL.values()} == {extra for extra, _ in extras}


def test_every_entry_of_the_tables_is_imported_or_a_plugin_of_hydra():
    tops = {module.partition(".")[0] for module in THIRD_PARTY}
    assert {name for name in TABLES if not name.startswith("hydra_plugins.")} == tops


def test_packages_are_the_ones_that_provide_the_modules():
    provided = importlib.metadata.packages_distributions()
    checked = 0
    for module, wanted in TABLES.items():
        if "." not in module and module in provided:
            name = Requirement(wanted).name
            with_it = [Requirement(other).name for other in importlib.metadata.requires(name) or ()]
            found = set(map(canonicalize_name, provided[module]))  # itself, or one that it brings
            assert found & set(map(canonicalize_name, (name, *with_it))), module
            checked += 1
    assert checked >= 10


@pytest.mark.parametrize("module", sorted(TABLES))
def test_a_missing_library_names_its_package_and_the_command_that_installs_it(module, monkeypatch):
    if module.startswith("hydra_plugins."):
        command = libraries.pip_install(module)
    else:
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ConfigError) as error:
            libraries.load(module)
        line, _, command = str(error.value).partition("; run ")
        assert line == f"{module} cannot be imported: the package of '{module}' is not installed"
    found = re.fullmatch(r"pip install '?([^']+)'?", command)
    assert found and Requirement(found[1]) == Requirement(TABLES[module])
    assert "[" not in command  # an extra of clrun would need its checkout or a release


def test_a_missing_dependency_of_a_library_leads_to_that_library(tmp_path, monkeypatch):
    (tmp_path / "open_clip").mkdir()
    (tmp_path / "open_clip" / "__init__.py").write_text("import nosuchtokenizer\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "open_clip"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match="; run pip install 'open_clip_torch>=3.3,<4'$"):
        libraries.load("open_clip")


def test_no_advice_is_written_by_hand():
    """Every advice to install a package comes from the tables; the one for mismatched builds is explained there."""
    texts = {file.relative_to(ROOT).as_posix(): file.read_text() for file in FILES}
    by_hand = {name for name, text in texts.items() if "pip install" in text or "clrun[" in text}
    assert by_hand == {"clrun/system/libraries.py"}


def test_a_library_that_is_not_installed() -> None:
    message = "^nosuchlibrary.part cannot be imported: no installed package has the module 'nosuchlibrary'; install"
    with pytest.raises(ConfigError, match=message):
        libraries.load("nosuchlibrary.part")


def test_torch_and_torchvision_of_different_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = "operator torchvision::nms does not exist"
    (tmp_path / "brokenvision.py").write_text(f"raise RuntimeError({message!r})\n")
    (tmp_path / "otherwise.py").write_text("raise RuntimeError('something else')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError) as error:
        libraries.load("brokenvision")
    assert message in str(error.value) and "pip install --upgrade --force-reinstall torch torchvision" in str(
        error.value
    )
    with pytest.raises(RuntimeError, match="^something else$"):
        libraries.load("otherwise")
