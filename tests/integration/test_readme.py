"""Every command, option, file and link of README, CONTRIBUTING and docs/: commands compose, and run where nothing from
outside is needed. docs/methods.md is generated; `tests/unit/test_readme_results.py` holds it to the code."""

import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

import clrun.running.run
from clrun.cli import main
from clrun.results import metrics, robustness
from clrun.running import jobs

ROOT = Path(__file__).parents[2]
GENERATED = re.compile(r"(<!-- (?:table: \w+|long streams|headline) -->).*?(<!-- end -->)", re.S)
PAGES = {
    path.relative_to(ROOT).as_posix(): GENERATED.sub(r"\1\2", path.read_text())
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
    if path.name not in ("methods.md", "reproduction.md")  # generated; below are the commands that were typed
}
TYPED = yaml.safe_load((ROOT / "scripts" / "published.yaml").read_text())
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
SPAN = re.compile(r"`([^`]+)`")
TOOLS = {"ruff": "dev", "mypy": "dev", "coverage": "dev", "mkdocs": "docs"}
PROGRAMS = ("clrun", "python", "pip", "pytest", "torchrun", "eval", ".ci/run", *TOOLS)
OVERRIDE = re.compile(r"'?[a-z_./]+=(?!False|True)\S+")  # False and True are arguments in Python
OF: dict[str, list[str] | None] = {  # options that not every choice of the group has
    "dataset.images": ["dataset=folder", "dataset.root=my_images"],
    "dataset.splits": ["dataset=folder", "dataset.root=my_images"],
    "dataset.classes": ["dataset=folder", "dataset.root=my_images"],
    "dataset.empty_classes": ["dataset=folder", "dataset.root=my_images"],
    "dataset.columns": ["dataset=list", "dataset.file=my_images/list.csv"],
    "dataset=list": ["dataset.file=my_images/list.csv"],
    "dataset=text_folder": ["dataset.root=my_texts/folders"],
    "dataset=hf_text": None,  # OWNER/NAME stands for a data set
    "dataset.text": ["dataset=text_table", "dataset.file=my_texts/rows.csv"],
    "dataset.empty=": ["dataset=text_table", "dataset.file=my_texts/rows.csv"],
    "dataset.encoding": ["dataset=text_table", "dataset.file=my_texts/rows.csv"],
    "dataset.max_bytes": ["dataset=text_table", "dataset.file=my_texts/rows.csv"],
    "dataset.delimiter": ["dataset=text_table", "dataset.file=my_texts/rows.csv"],
    "dataset=text_table": ["dataset.file=my_texts/rows.csv"],
    "modality=Texts": None,  # an argument in Python
    "dataset.download": ["dataset=mnist"],
    "dataset.archive": ["dataset=folder", "dataset.root=my_images"],
    "dataset.sort": ["dataset=folder", "dataset.root=my_images"],
    "backbone.folder": ["backbone=open_clip"],
    "trust=": None,  # of clrun.api
    "name=${oc.env": None,  # wants a variable of the environment
    "method.forget_tasks": ["method=ncm"],
    "task_order.order": ["dataset=cifar100", "scenario.n_tasks=10", "task_order=cifar100_split"],
    "job.eval_split": ["dataset.val_fraction=0.2"],
    "job.eval_initial": ["scenario=domain_shift"],
    "dataset=folder_domains": ["dataset.root=my_domains", "scenario=dataset_sequence", "scenario.setting=dil"],
    "dataset=folder": ["dataset.root=my_images"],
    "scenario=fixed_groups scenario.groups=mine": None,  # the groups of the reader's own data set
    "dataset._target_": None,  # an example of what is refused
    "data=1f2e3d...": None,  # part of a printed line
    "ties.keep": None,  # of clrun merge, as the three below
    "samples=null": None,
    "weights=1,3": None,
    "device=cpu": None,
}
STANDS_FOR = {"job.eval_every=N": "job.eval_every=2", "METHOD": "l2p"}  # where composing needs a value

# What is not really run here, and why; the rest runs with pytest -m slow.
MACHINE, DATA, HOURS, CHANGES = (
    "another machine",
    "a data set or weights to be downloaded",
    "minutes to hours; has its own tests",
    "changes the environment",
)
NOT_RUN = {
    "clrun dataset=hpo_linking_3 scenario=fixed_groups scenario.groups=branch backbone=minilm_adapter "
    "backbone.head=fixed method=finetune budget=adamw": DATA,
    "clrun dataset=cifar100 dataset.root=/data scenario.n_tasks=10 backbone=resnet32 "
    "budget.epochs=50 hardware=gpu": DATA,
    "clrun -m experiment=cifar100_superclass task_order.order=A,B,C,D,E method=finetune,ewc": DATA,
    "clrun backbone=vit_b16_in21k backbone.weights=FILE": DATA,
    "clrun backbone=clip_vit_b16 backbone.weights=FILE method=coop dataset=cifar100": DATA,
    "clrun experiment=l2p_cifar224": DATA,
    "clrun -m hydra/launcher=submitit_slurm hydra.launcher.partition=gpu hydra.launcher.timeout_min=60 method=er,ewc "
    "'seed=range(4)'": MACHINE,
    "torchrun --nnodes=2 --nproc-per-node=4 ... -m clrun hardware=ddp hydra.run.dir=outputs/big": MACHINE,
    'eval "$(clrun -sc install=bash)"': "changes the shell",
    "clrun report": "needs a folder; other commands give one",
    "clrun merge": "needs folders of finished runs; has its own tests",
    "clrun merge outputs/first outputs/second rule=regmean regmean.alpha=0.95 out=outputs/both": "likewise",
}


def _blocks(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield (language, content, the text before it) of each fenced block."""
    for block in BLOCK.finditer(text):
        yield block[1], block[2], text[: block.start()].rstrip()


def _prose(text: str) -> str:
    return BLOCK.sub("", text)


def _commands() -> dict[str, str]:
    """Return {command: page} of blocks and backticks; blocks of commands are marked bash or have no language."""
    found: dict[str, str] = {}
    for page, text in PAGES.items():
        lines = []
        for language, content, before in _blocks(text):
            if content.startswith("$ "):
                lines += [line for line in content.splitlines() if line.startswith("$ ")]
            elif language in ("bash", "sh") or (not language and not before.endswith("prints")):
                lines += content.replace("\\\n", " ").splitlines()
        spans = [" ".join(span.split()) for span in SPAN.findall(_prose(text))]
        lines += [span for span in spans if _bare(span).split()[:1] and _bare(span).split()[0] in PROGRAMS]
        for line in lines:
            if not line.strip() or line.startswith("# "):
                continue
            for part in line.split("  #")[0].strip().split(" && "):
                found.setdefault(part.strip(), page)
    return {command: page for command, page in found.items() if " " in command or command in (*PROGRAMS[:1], "pytest")}


def _bare(command: str) -> str:
    """Return a command without the environment variables set before it."""
    return re.sub(r"^(?:[A-Z_]+=\S+ )+", "", command)


def _fragments() -> dict[str, str]:
    """Return {options: page} that the text names without a command."""
    found: dict[str, str] = {}
    for page, text in PAGES.items():
        for span in SPAN.findall(_prose(text)):
            if all(OVERRIDE.fullmatch(word) for word in span.split()) and _owner(span) is not None:
                found.setdefault(" ".join(span.split()), page)
    return found


def _owner(fragment: str) -> list[str] | None:
    """Return the choice that an option needs."""
    return next((owner for option, owner in OF.items() if fragment.lstrip("'").startswith(option)), [])


def _files() -> dict[str, str]:
    """Return the example files: each block follows a text that ends with its path in backticks."""
    found = {}
    for text in PAGES.values():
        for language, content, before in _blocks(text):
            path = re.search(r"`(my_\w+/[\w/]+\.(?:py|yaml))`[^`]*$", before)
            if language in ("python", "yaml") and path:
                assert path[1].endswith({"python": ".py", "yaml": ".yaml"}[language]), content
                assert path[1] not in found, f"{path[1]} twice"
                found[path[1]] = content
    return found


def _code(page: str, word: str) -> str:
    """Return the one Python block of a page that contains `word`."""
    [code] = [content for language, content, _ in _blocks(PAGES[page]) if language == "python" and word in content]
    return code


COMMANDS, FRAGMENTS = _commands(), _fragments()
OF_EXTENSION = [command for command in COMMANDS if "--config-dir" in command and "=" in command]


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """A folder with the example files of the pages, and data of the user's own."""
    house = tmp_path_factory.mktemp("house")
    for path, text in _files().items():
        (house / path).parent.mkdir(parents=True, exist_ok=True)
        (house / path).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(house)
        exec(_code("docs/extending.md", "savetxt"), {})
    table = np.loadtxt(house / "my_rows.csv", delimiter=",", dtype=int)
    for folder, classes in (("my_images", 10), ("my_domains/a", 2), ("my_domains/b", 2)):
        for row in range(10 * classes):
            path = house / folder / f"class{row % classes}" / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(table[row, 1:].reshape(8, 8).astype(np.uint8)).save(path)
    texts = [(f"text {row} of class {row % 10}", row % 10) for row in range(100)]
    for row, (text, label) in enumerate(texts):
        path = house / "my_texts" / "folders" / str(label) / f"{row}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    lines = "\n".join(f"{text},{label}" for text, label in texts)
    (house / "my_texts" / "rows.csv").write_text(f"text,label\n{lines}\n")
    listed = sorted(path.relative_to(house / "my_images") for path in (house / "my_images").rglob("*.png"))
    (house / "my_images" / "list.csv").write_text("".join(f"{path},{path.parent}\n" for path in listed))
    return house


@pytest.fixture
def inside(house, monkeypatch) -> Iterator[Path]:
    """Work in that folder, as the pages say."""
    monkeypatch.chdir(house)
    monkeypatch.setattr(sys, "path", sys.path[:])
    _forget()
    yield house
    _forget()


def _forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "my_package"]:
        del sys.modules[name]


@pytest.fixture
def starts(inside, monkeypatch) -> list[Any]:
    """The runs that the command line would start; data, weights and machines are not looked at."""
    starts: list[Any] = []
    monkeypatch.setattr(jobs, "_single", lambda composer, cfg, job, *, main: starts.append(cfg))
    monkeypatch.setattr(jobs.Collector, "launch", lambda self, batch, initial_job_idx: starts.extend(batch) or [])
    monkeypatch.setattr(clrun.running.run, "preflight", lambda config: None)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    return starts


def _call(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return int(end.value.code)


def _words(command: str) -> list[str]:
    for name, value in STANDS_FOR.items():
        command = command.replace(name, value)
    return shlex.split(_bare(command), comments=True)


def _shorter(words: list[str]) -> list[str]:
    """Return the words of a sweep with two values instead of a long range."""
    return [re.sub(r"range\(\d+\)", "range(2)", word) for word in words]


def _extras() -> dict[str, list[str]]:
    extras: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    return extras


def test_the_patterns_find_what_they_are_to_find() -> None:
    assert len(COMMANDS) >= 50 and len(FRAGMENTS) >= 25
    assert {COMMANDS[command] for command in COMMANDS} >= {f"docs/{n}.md" for n in ("running", "data", "orders")}
    assert len(OF_EXTENSION) >= 4
    groups = {Path(path).parts[1] for path in _files() if path.startswith("my_conf")}
    assert groups == {"method", "dataset", "task_order", "backbone"}
    assert not NOT_RUN.keys() - set(COMMANDS), "on no page any more"


def test_the_readme_is_short_and_keeps_its_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 220
    assert "\npip install -e . && clrun\npip install -e '.[test]' && pytest\n" in text
    groups = set(re.findall(r"^\| `(\w+)` \|", text[text.index("| group |") : text.index("A mistake")], re.M))
    assert groups == {path.name for path in (ROOT / "conf").iterdir() if path.is_dir() and path.name != "hydra"}


@pytest.mark.parametrize(
    "command", [pytest.param(c, marks=pytest.mark.slow) if "robustness_report" in c else c for c in COMMANDS]
)
def test_command_composes(command, starts, capsys) -> None:
    """A command of a kind that nobody thought of fails here."""
    words = _words(command)
    text = PAGES[COMMANDS[command]]
    match words:
        case ["$", "clrun", *arguments]:
            assert _call(arguments) == 2
            expected = text[text.index(command) :].splitlines()[1]
            assert capsys.readouterr().err == f"{expected}\n" and not starts
        case ["clrun", "list" | "features", *_] | ["clrun", *_, "--cfg", "job"]:
            assert _call(words[1:]) == 0
            assert capsys.readouterr().out.strip() and not starts
        case ["clrun", "merge", *_]:
            assert _call(["merge", "nowhere"]) == 2  # merging has its own tests
        case ["clrun", "report" | "status" as name, *_]:
            assert _call([name, "nowhere"]) == 2  # reports are written below
        case ["clrun", *arguments]:
            said = re.search(rf"^{re.escape(command)}$\n```\n\nruns (\d+) jobs", text, re.M)
            assert _call(arguments if said else _shorter(arguments)) == 0
            assert len(starts) == int(said[1]) if said else len(starts) >= 1
        case ["torchrun", *launch]:
            assert _call(launch[launch.index("clrun") + 1 :]) == 0 and len(starts) == 1
        case ["eval", call]:
            assert _call(shlex.split(call.removeprefix("$(clrun").removesuffix(")"))) == 0
            assert "complete" in capsys.readouterr().out
        case _:
            assert _other(words), f"{COMMANDS[command]} has a command that no test knows: {command}"


def _other(words: list[str]) -> bool:
    """Return whether a command that is not clrun's exists here."""
    match words:
        case ["python", script, *arguments]:
            source = (ROOT / script).read_text()
            return all(f'"{word}"' in source for word in arguments if not word.endswith(".json"))
        case ["pip", "install", "-e", what]:
            return what == "." or set(what[2:-1].split(",")) <= set(_extras())
        case ["pip", "install", what]:
            return any(what == re.match(r"[\w-]+", name)[0] for extra in _extras().values() for name in extra)
        case [".ci/run"]:
            return bool((ROOT / ".ci" / "run").stat().st_mode & 0o100)
        case ["pytest", *arguments]:
            return _pytest_knows(arguments)
        case [tool, *_] if tool in TOOLS:
            return any(re.match(rf"{tool}\b", requirement) for requirement in _extras()[TOOLS[tool]])
    return False


def _pytest_knows(arguments: list[str]) -> bool:
    """Return whether the paths and markers of a test command exist."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    marks = [marker.split(":")[0] for marker in settings["markers"]]
    paths = [word.split("::")[0] for word in arguments if word.startswith("tests")]
    expressions = [word for before, word in zip(arguments, arguments[1:], strict=False) if before == "-m"]
    named = [word for text in expressions for word in re.findall(r"\w+", text) if word not in ("and", "or", "not")]
    return all((ROOT / path).exists() for path in paths) and set(named) <= set(marks)


@pytest.mark.parametrize("fragment", FRAGMENTS)
def test_option_composes(fragment, starts) -> None:
    """An option that the text names exists."""
    words = _shorter(_words(fragment))
    sweep = any("," in word and "[" not in word or "range" in word or "sweep" in word for word in words)
    assert _call([*(["-m"] if sweep else []), *(_owner(fragment) or []), *words]) == 0 and starts


@pytest.mark.parametrize("method", TYPED)
def test_settings_of_published_numbers_compose(method, starts) -> None:
    for entry in TYPED[method]:
        assert "command" not in entry or _call(entry["command"].split()) == 0


@pytest.mark.parametrize("command", OF_EXTENSION)
def test_extension_runs_as_written(command, inside, capsys) -> None:
    """The extensions are copied from the pages into an empty folder and run."""
    arguments = shlex.split(command, comments=True)[1:]
    small = [] if "backbone=" in command else ["backbone=cnn"]
    arguments += ["job=smoke", "job.picture=false", "hardware.threads=1", *small]
    assert _call(_shorter(arguments)) == 0
    printed = capsys.readouterr()
    notes = printed.err.splitlines()  # where the feature cache is, once
    assert printed.out and all(line.startswith("clrun: features of frozen backbones are kept in") for line in notes)


def test_files_of_a_run_are_read_as_written(inside, capsys) -> None:
    """The analysis of a run's files works on a run, and gives the matrix that the run printed."""
    assert _call(["backbone=cnn", "job=smoke", "hardware.threads=1", "hydra.run.dir=run"]) == 0
    *lines, last = _code("docs/running.md", "run.json").splitlines()
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir("run")
        exec("\n".join(lines), names)
        matrix = eval(last, names)
    stored = [[np.nan if x is None else x for x in row] for row in names["run"]["accuracy_matrix"]["cil"]]
    assert isinstance(matrix, pd.DataFrame) and matrix.shape == (3, 3)
    np.testing.assert_allclose(matrix.to_numpy(), np.array(stored))
    written = {path.name for path in Path("run").iterdir()}
    for page in ("README.md", "docs/running.md"):
        section = PAGES[page].partition("\n## Files of a run")[2].partition("\n\nThey are read")[0]
        shown = {name for name in SPAN.findall(section) if "." in name}
        assert {"run.json", "accuracy.csv"} <= shown <= written
    columns = Path("run/accuracy.csv").read_text().partition("\n")[0].split(",")
    section = PAGES["docs/running.md"].partition("The columns of")[2].partition("More on request")[0]
    cells = " ".join(re.findall(r"^\| (`.*?) \|", section, re.M))
    assert sorted(SPAN.findall(cells)) == sorted(columns)
    assert _call(["report", "run"]) == 0 and "report.html" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page) -> None:
    """Links and pictures exist, and so do the headings that links name."""
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", _prose(PAGES[page])):
        name, _, anchor = target.partition("#")
        path = (folder / name) if name else ROOT / page
        if path.name == "contributing.md" and folder.name == "docs":
            path = ROOT / "CONTRIBUTING.md"  # a page of the site
        assert path.exists(), target
        headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", path.read_text()), re.M) if anchor else []
        slugs = [re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings]
        assert not anchor or anchor in slugs, target


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page) -> None:
    """Paths in backticks are files or folders of the repository, of the package, of the examples or of a run."""
    text = _prose(PAGES[page])
    if page == "docs/testing.md":
        text = re.sub(r"^\|.*$", "", text, flags=re.M)  # what a run of the mutations printed
    named = [span for span in SPAN.findall(text) if re.fullmatch(r"\.?[\w-]+(/[\w.*-]+)*/?", span)]
    paths = [span for span in named if "/" in span and not re.search(r"[A-Z]{3,}|\*", span)]
    examples = {str(parent) for path in _files() for parent in (Path(path), *Path(path).parents)}
    for path in paths:
        if path.split("/")[0] in ("data", "outputs", "train", "test", "val", "report", "logits", "hydra"):
            continue
        found = any((ROOT / base / path).exists() for base in ("", "clrun", "docs", "tests", "scripts"))
        assert found or path.rstrip("/") in examples, path


def _table(text: str) -> list[list[str]]:
    """Return the cells of a table, without its head."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()[2:]]


def test_the_glossary_computes_what_the_code_computes() -> None:
    text = PAGES["docs/glossary.md"]
    matrix = _table(text[text.index("| R | task 1") : text.index("## Metrics over task orders")])
    correct = 100 * np.array([[float(value) for value in row[1:]] for row in matrix])
    m = metrics.AccuracyMatrix(correct, np.full(4, 100), (0, 1, 2, 3))
    section = text[text.index("| metric | formula") : text.index("Forgetting, backward and forward")]
    said = {row[0].strip("`"): float(row[-1]) for row in _table(section)}
    assert said == pytest.approx(metrics.summary(m), abs=1e-6) and list(said) == list(metrics.METRICS)

    rows = _table(text[text.index("| order | task 0") : text.index("OPD is 9")])
    finals = np.array([[[float(value) for value in row[1:]]] for row in rows])
    opd, aopd, mopd = re.search(r"OPD is (.*?) points; AOPD is ([\d.]+) and MOPD is (\d+)\.", text).groups()
    assert robustness.opd(finals) == pytest.approx([float(v) for v in re.findall(r"\d+", opd)])
    assert robustness.aopd(finals) == float(aopd) and robustness.mopd(finals) == float(mopd)
    averages = re.search(r"averages of the orders, (.*?), hide", text)[1]
    assert robustness.order_means(finals) == pytest.approx([float(v) for v in re.findall(r"[\d.]+\d", averages)])


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [c for c in COMMANDS if c.startswith("clrun") and c not in NOT_RUN and c not in OF_EXTENSION],
)
def test_command_runs(command, inside, capsys) -> None:
    """Commands really run, with the limits of a smoke run and a smaller search."""
    for name in ("DIR [DIR ...] --out FOLDER", "DIR [DIR ...]", "DIR", "FOLDER"):
        if name in command:
            sweep = ["-m", "backbone=cnn", "method=er,ncm", "job=smoke", "hardware.threads=1", "hydra.sweep.dir=swept"]
            assert _call(sweep) == 0
            command = command.replace("outputs/sweeps/FOLDER", "swept").replace(name, "swept")
            break
    arguments = _words(command.replace("budget=20", "budget=4").replace("=stability_decay", "=stability_decay_smoke"))
    if not arguments[1:2] or arguments[1] not in ("list", "report", "features"):
        limits = {"job=": "smoke", "hardware.threads=": "1"}
        arguments += [f"{key}{value}" for key, value in limits.items() if not any(a.startswith(key) for a in arguments)]
    if "task_order=adversarial" in arguments:
        arguments.append("job.max_tasks=null")  # a search learns every task
    assert _call(_shorter(arguments[1:])) == 0
    assert capsys.readouterr().out
