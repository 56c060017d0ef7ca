"""The rules of the design that a reader cannot check by eye: layers, forbidden calls, YAML against code, sizes."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import yaml
from running import member

from clrun.config.signature import locate, parameters

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "clrun"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {file: ast.parse(file.read_text()) for file in FILES}

# The rooms of the package, lowest first. A module imports its own room and lower ones, never a higher one.
ROOMS = ("system", "results", "config", "reporting", "data", "backbones", "learning", "blocks", "methods", "running")
ROOMS += ("api", "cli", "__main__")
# Narrower than the order of the rooms: what these modules import of clrun besides their own room and `system`.
NARROW: dict[str, tuple[str, ...]] = {
    "config": ("results.identity",),
    "reporting": ("results",),
    "data": ("results.metrics",),
    "backbones": ("data.byte_pairs", "data.tokens"),
    "learning": ("data",),
    "blocks": ("data", "learning"),
    "methods": ("data", "learning", "blocks"),
    "cli": ("config", "data.feature_cache", "reporting", "running.jobs", "running.merge_runs"),
}
SLOW = ("timm", "torchvision", "pandas", "sklearn", "matplotlib")
# What the command line imports before it knows that a run begins: no torch.
LIGHT = ("results", "reporting", "config", "cli", "running.jobs", "data.feature_cache", "data.orders")
LIGHT += ("system.errors", "system.failures", "system.files", "system.libraries", "system.locks")
LIGHT += ("system.processes", "system.yaml_files")

FILE_LINES, FUNCTION_LINES = 350, 60


def module_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def within(module: str, names: tuple[str, ...]) -> str | None:
    """The longest of `names` that is `module` or a package around it."""
    found = [name for name in names if module == name or module.startswith(f"{name}.")]
    return max(found, key=len) if found else None


def imports(tree: ast.AST, *, nested: bool, typing: bool = False) -> Iterator[str]:
    """Dotted names imported; with `nested` also inside functions, with `typing` also for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not typing:
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not nested:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from _modules(node)
        else:
            yield from imports(node, nested=nested, typing=typing)


def _modules(node: ast.ImportFrom) -> Iterator[str]:
    """The modules that a `from` import names, also where it imports a module from a package."""
    folder = PACKAGE.parent.joinpath(*(node.module or "").split("."))
    for alias in node.names:
        module = (folder / f"{alias.name}.py").exists() or (folder / alias.name / "__init__.py").exists()
        yield f"{node.module}.{alias.name}" if module else node.module or ""


def of_clrun(names: Iterator[str]) -> set[str]:
    return {name.removeprefix("clrun.") for name in names if name.startswith("clrun.") and name != "clrun.__version__"}


def of_clrun_in(file: Path) -> set[str]:
    """The modules of clrun that a file imports anywhere, for type checkers too."""
    return of_clrun(imports(TREES[file], nested=True, typing=True))


def strangers(file: Path) -> set[str]:
    """The modules that a file imports and must not."""
    module = module_of(file)
    if module == "__init__":
        return of_clrun_in(file)
    room = module.partition(".")[0]
    assert room in ROOMS, f"{module}: clrun/{room} is no room; add it to ROOMS"
    below = NARROW.get(room, ROOMS[: ROOMS.index(room)])
    allowed = (*below, "system") if room == "methods" else (*below, room, "system")
    found = {name for name in of_clrun_in(file) if not within(name, allowed)}
    if room == "methods":
        others = {name for name in found if name.startswith("methods.")}
        assert len(others) <= 1, f"{module} is built on several methods: {others}"
        found -= others  # one direct base
    return found


def test_modules_import_only_their_room_and_those_below():
    assert not {module_of(file): found for file in FILES if (found := strangers(file))}


def test_no_modules_import_each_other_in_a_circle():
    graph = {module_of(file): of_clrun_in(file) for file in FILES}
    names = set(graph)
    left = {module: {within(name, tuple(names)) for name in found} - {module, None} for module, found in graph.items()}
    while free := {module for module, found in left.items() if not found & left.keys()}:
        left = {module: found for module, found in left.items() if module not in free}
    assert not left, "these import each other, or what does"


def test_slow_libraries_are_imported_inside_functions():
    found = {}
    for file in FILES:
        heavy = SLOW + (("torch",) if within(module_of(file), LIGHT) else ())
        found[module_of(file)] = {name for name in imports(TREES[file], nested=False) if within(name, heavy)}
    # A class of timm's is the base of one in two_towers; others import it inside functions.
    assert not {module: names for module, names in found.items() if names and module != "backbones.two_towers"}


def test_command_line_and_reports_leave_torch_alone():
    code = (
        "import sys, clrun.cli, clrun.reporting; print([m for m in sys.modules if m in ('torch', 'timm', 'sklearn')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


FORBIDDEN_NAMES = {"print", "random", "np.random", "numpy.random"}
FORBIDDEN_ENDS = ("F.cross_entropy", "functional.cross_entropy", "manual_seed", "optimizer.step", ".cuda")


def test_methods_leave_seeding_printing_and_stepping_to_others():
    found = {}
    for file in (PACKAGE / "methods").glob("*.py"):
        drawn = {n for n in imports(TREES[file], nested=True) if n in ("random", "numpy.random")}
        calls = {ast.unparse(node.func) for node in ast.walk(TREES[file]) if isinstance(node, ast.Call)}
        called = {c for c in calls if within(c, tuple(FORBIDDEN_NAMES)) or c.endswith(FORBIDDEN_ENDS)}
        found[file.stem] = drawn | called
    assert not {method: names for method, names in found.items() if names}


def nodes(value: Any, where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping with a `_target_`, at any depth."""
    if isinstance(value, dict):
        if "_target_" in value:
            yield where, value
        for key, item in value.items():
            yield from nodes(item, f"{where}.{key}")
    elif isinstance(value, list):
        for item in value:
            yield from nodes(item, where)


YAMLS = sorted((ROOT / "conf").rglob("*.yaml"))
OPTIONS = {
    f"{file.parent.name}/{file.stem}{where}": node
    for file in YAMLS
    for where, node in nodes(
        member(file) if file.parent.name in ("dataset", "backbone") else yaml.safe_load(file.read_text())
    )
}


def differing(node: dict[str, Any]) -> set[str]:
    """The options that a node of a YAML file lacks or has too many."""
    takes = parameters(locate(node["_target_"]))
    given = {key for key in node if key not in ("_target_", "_partial_", "_convert_")}
    if not node["_target_"].startswith("clrun."):
        return given - set(takes)  # the options of other people's code are theirs
    partial = node.get("_partial_", False)
    return given ^ {name for name, p in takes.items() if not partial or p.kind is p.KEYWORD_ONLY}


def test_yaml_lists_exactly_the_options_of_its_target():
    assert not {place: found for place, node in OPTIONS.items() if (found := differing(node))}


def test_defaults_of_options_live_in_yaml_alone():
    budgets = ("clrun.learning.budget.Budget", "clrun.learning.budget.TaskBudget")  # methods and tests make them, too
    found = {}
    for place, node in OPTIONS.items():
        if node["_target_"].startswith("clrun.") and node["_target_"] not in budgets:
            takes = parameters(locate(node["_target_"]))
            found[place] = {name for name, p in takes.items() if name in node and p.default is not p.empty}
    assert not {place: names for place, names in found.items() if names}


def test_every_choice_says_what_it_is():
    silent = []
    for file in YAMLS:
        comments = [x for x in file.read_text().splitlines() if x.startswith("#") and "@package" not in x]
        if file.parent != ROOT / "conf" and not (comments and len(comments[0]) > 5):
            silent.append(f"{file.parent.name}/{file.stem}")
    assert not silent


def test_method_classes_are_named_as_their_files():
    for file in (ROOT / "conf/method").glob("*.yaml"):
        target = yaml.safe_load(file.read_text())["_target_"]
        assert target.rpartition(".")[2].lower() == file.stem.replace("_", "")


def test_methods_say_what_verifies_them():
    texts = {file.stem: file.read_text() for file in (ROOT / "tests").rglob("*.py")}
    for file in (ROOT / "conf/method").glob("*.yaml"):
        _, _, verified = ast.get_docstring(TREES[PACKAGE / f"methods/{file.stem}.py"]).partition("Verified: ")
        words, _, tests = " ".join(verified.split()).removesuffix(").").rpartition(" (")
        assert words, file.stem
        for name in tests.split(", "):
            assert name in texts, (file.stem, name)
            assert file.stem in texts[name] or "methods" not in name, (file.stem, name)  # blocks are tested apart


def code_lines(file: Path) -> list[int]:
    """Numbers of the lines that hold code: no blank lines, comments and docstrings."""
    text = file.read_text()
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in silent:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            lines.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return sorted(lines)


def long_functions(tree: ast.AST) -> dict[str, int]:
    """Lines of the functions that are too long, by name."""
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno >= FUNCTION_LINES}


def test_files_and_functions_are_short():
    assert not {module_of(file): n for file in FILES if (n := len(code_lines(file))) > FILE_LINES}
    assert not {module_of(file): found for file in FILES if (found := long_functions(TREES[file]))}


def test_functions_of_scripts_and_tests_are_short():
    files = [*(ROOT / "scripts").glob("*.py"), *(ROOT / "tests").rglob("*.py")]
    found = {file.name: long_functions(ast.parse(file.read_text())) for file in files}
    assert not {name: long for name, long in found.items() if long}


# Calls that write a file or folder by its path, and would follow a link that someone has put there.
WRITERS = {"write_text", "write_bytes", "touch", "mkdir", "makedirs", "mkdtemp", "mkstemp", "NamedTemporaryFile"}
WRITERS |= {"TemporaryDirectory", "FileHandler", "SummaryWriter", "copyfile", "copy2", "copytree", "extractall"}
WRITERS |= {"save_file", "save_model", "serialize_file", "tofile", "to_csv", "fdopen", "symlink_to", "os.open"}
# Calls that write into an open file as well: their target is a buffer, or a file that `clrun.system.files` has opened.
SAVERS = {"savefig", "print_png", "print_svg", "torch.save", "np.save", "np.savez", "np.savez_compressed", "np.savetxt"}
OPENERS = ("io.BytesIO", "BytesIO", "io.StringIO", "replacing", "open_own")
# Justified exceptions: why it can hit no file of the user.
ELSEWHERE = {
    ("cli", "os.open"): "os.devnull",
    ("running.accounting", "write_text"): "a file of /proc",
    ("data.feature_cache", "mkdir"): "the cache's own folder; tells whether this process made it",
    ("system.hardware", "TemporaryDirectory"): "a new folder with a random name that only the user can enter",
}


def writes(tree: ast.AST) -> set[str]:
    """The calls in a module that write a file by its path, by the name of what is called."""
    opened = {"BytesIO"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            pairs = [(t, node.value) for t in node.targets]
            if isinstance(node.value, ast.Tuple) and isinstance(node.targets[0], ast.Tuple):
                pairs = list(zip(node.targets[0].elts, node.value.elts, strict=True))
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            pairs = [(node.optional_vars, node.context_expr)]
        else:
            continue
        calls = [(ast.unparse(t), v) for t, v in pairs if isinstance(v, ast.Call)]
        opened |= {name for name, call in calls if ast.unparse(call.func) in OPENERS}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            whole = ast.unparse(node.func)
            name = whole.rpartition(".")[2]
            saved = ast.unparse(node.args[0]) if node.args else ""
            saved = ast.unparse(node.args[1]) if whole == "torch.save" and len(node.args) > 1 else saved
            if name in WRITERS or whole in WRITERS:
                found.add(whole if whole in WRITERS else name)
            elif (name in SAVERS or whole in SAVERS) and saved not in opened:
                found.add(name)
            elif name == "open" and any(
                isinstance(a, ast.Constant)
                and isinstance(a.value, str)
                and re.fullmatch(r"[rbt]*[wax+][rbt+]*", a.value)
                for a in (*node.args, *(k.value for k in node.keywords if k.arg == "mode"))
            ):
                found.add("open")
    return found


def test_files_are_written_by_one_module_alone_and_exceptions_are_still_needed():
    found = {(module_of(file), call) for file in FILES for call in writes(TREES[file])}
    assert not {(module, call) for module, call in found if module != "system.files"} - set(ELSEWHERE)
    assert set(ELSEWHERE) <= found


@pytest.mark.parametrize(
    ("code", "call"),
    [
        ('open(path, "w")', "open"),
        ('path.open("ab", buffering=0)', "open"),
        ('path.open(mode="r+b")', "open"),
        ('path.write_text("")', "write_text"),
        ("path.parent.mkdir(exist_ok=True)", "mkdir"),
        ("figure.savefig(path)", "savefig"),
        ("torch.save(method, path)", "save"),
        ("np.savez(path, a=1)", "savez"),
        ("os.open(path, flags)", "os.open"),
        ("save_model(method, str(path))", "save_model"),
    ],
)
def test_calls_that_write_are_found(code, call):
    assert writes(ast.parse(code)) == {call}


@pytest.mark.parametrize(
    "code",
    [
        'path.open("rb")',
        "open(path)",
        'archive.open("w.png")',
        "buffer = io.BytesIO()\ntorch.save(method, buffer)",
        "png, svg = io.BytesIO(), io.BytesIO()\ncanvas.print_svg(svg)",
        "with replacing(path) as file:\n    np.savez(file, a=1)",
    ],
)
def test_calls_that_read_or_write_into_an_open_file_are_allowed(code):
    assert not writes(ast.parse(code))


METHODS = sorted((PACKAGE / "methods").glob("*.py"))
METHOD_LINES = 140  # median of a file of methods, docstrings included; options and their meaning are half of it
COPIED, WINDOW = 0.03, 6  # share of the learners' lines that may stand elsewhere, too; lines that make a copy
# How every learner's constructor begins, word for word, when the formatter breaks it into lines.
HEAD = "def __init__(\nself,\nbackbone: nn.Module,\nnum_classes: int,\n*,\n"


def statements(file: Path) -> list[str]:
    """Lines of code, without indentation and imports; the head of a constructor, which all share, is one line."""
    imported: set[int] = set()
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported.update(range(node.lineno, node.end_lineno + 1))
    text = file.read_text().splitlines()
    lines = [text[number - 1].strip() for number in code_lines(file) if number not in imported]
    return "\n".join(lines).replace(HEAD, HEAD.replace("\n", " ").strip() + "\n").split("\n")


def copies(files: dict[str, list[str]]) -> dict[str, set[int]]:
    """Numbers of the lines in windows of WINDOW lines that stand, letter for letter, at another place, too."""
    places: dict[tuple[str, ...], list[tuple[str, int]]] = {}
    for name, lines in files.items():
        for start in range(len(lines) - WINDOW + 1):
            places.setdefault(tuple(lines[start : start + WINDOW]), []).append((name, start))
    found: dict[str, set[int]] = {}
    for same in places.values():
        for name, start in same:
            if any(other != name or abs(begin - start) >= WINDOW for other, begin in same):
                found.setdefault(name, set()).update(range(start, start + WINDOW))
    return found


def test_copies_are_windows_that_stand_twice():
    lines = [f"line {number}" for number in range(20)]
    assert not copies({"a": lines, "b": [*lines[:5], "other", *lines[5:10]]})
    assert copies({"a": lines, "b": ["before", *lines[3:10]]}) == {"a": set(range(3, 10)), "b": set(range(1, 8))}
    assert copies({"a": ["x"] * 11}) == {} and copies({"a": ["x"] * 12}) == {"a": set(range(12))}


def test_learners_do_not_copy_from_each_other():
    files = {module_of(file): statements(file) for file in METHODS}
    found = copies(files)
    share = sum(map(len, found.values())) / sum(map(len, files.values()))
    assert share <= COPIED, {name: [files[name][number] for number in sorted(lines)] for name, lines in found.items()}


def test_a_learner_is_one_short_file():
    assert median(len(file.read_text().splitlines()) for file in METHODS) < METHOD_LINES


def test_the_page_on_architecture_names_what_is_there():
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = {name for name in re.findall(r"[\w/]+(?:\.py|\.yaml|/)(?!\w)", text) if "NAME" not in name}
    assert not {name for name in named if not (PACKAGE / name).exists() and not (ROOT / name).exists()}
    folders = {f"{file.parent.relative_to(PACKAGE)}/" for file in FILES if file.parent != PACKAGE}
    modules = {file.name for file in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert not (folders | modules) - named


def test_text_names_no_folder_of_this_machine():
    pattern = ("/work/", "/root/", "/home/")
    files = [*FILES, *YAMLS, ROOT / "pyproject.toml", *(ROOT / "tests").rglob("*.py")]
    texts = {file: file.read_text() for file in files if file != Path(__file__)}
    assert not [file for file, text in texts.items() if any(p in text for p in pattern)]
