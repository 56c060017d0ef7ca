"""Every command, option and file that the README shows: it composes, and runs where nothing from outside is needed."""

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
from PIL import Image

import clrun.running.run
from clrun.cli import main
from clrun.running import jobs

ROOT = Path(__file__).parents[2]
README = re.sub(
    r"(<!-- (?:table: \w+|methods) -->).*?(<!-- end -->)", r"\1\2", (ROOT / "README.md").read_text(), flags=re.S
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
EXTENSION = README[README.index("\n## Add a method") : README.index("\n## Hardware")]
PROGRAMS = ("clrun", "python", "pip", "pytest", "torchrun", "eval", ".ci/run")
OVERRIDE = re.compile(r"'?[a-z_./]+=\S+")
STANDS_FOR = {"job.eval_every=N": "job.eval_every=2"}  # where composing needs a value
OF = {  # options that not every choice of the group has
    "dataset.images": ["dataset=folder", "dataset.root=my_images"],
    "dataset.download": ["dataset=mnist"],
    "method.forget_tasks": ["method=ncm"],
}

# What is not really run here, and why; the rest runs with pytest -m slow.
MACHINE, DATA, HOURS = (
    "another machine",
    "a data set or weights to be downloaded",
    "minutes to hours; has its own tests",
)
NOT_RUN = {
    "clrun dataset=cifar100 dataset.root=/data scenario.n_tasks=10 backbone=resnet32 "
    "budget.epochs=50 hardware=gpu": DATA,
    "clrun -m experiment=cifar100_superclass task_order.order=A,B,C,D,E method=finetune,ewc": DATA,
    "clrun backbone=vit_b16_in21k backbone.weights=FILE": DATA,
    "clrun experiment=l2p_cifar224": DATA,
    "clrun -m hydra/launcher=submitit_slurm hydra.launcher.partition=gpu hydra.launcher.timeout_min=60 method=er,ewc "
    "'seed=range(4)'": MACHINE,
    "torchrun --nnodes=2 --nproc-per-node=4 ... -m clrun hardware=ddp hydra.run.dir=outputs/big": MACHINE,
    'eval "$(clrun -sc install=bash)"': "changes the shell",
    "pip install -e .": "changes the environment",
    "pip install -e '.[test]'": "changes the environment",
    "pip install -e '.[joblib]'": "changes the environment",
    "pip install -e '.[slurm]'": "changes the environment",
    "pytest": HOURS,
    "pytest -m slow": HOURS,
    ".ci/run": HOURS,
    "python scripts/readme_results.py": HOURS,
    "python scripts/bench.py": HOURS,
    "python scripts/bench_overhead.py": HOURS,
    "python scripts/bench_data.py": HOURS,
    "python scripts/long_streams.py": HOURS,
}


def _commands() -> list[str]:
    """Return every command in blocks and in backticks; a block without language is commands unless text "prints" it."""
    found = []
    for block in BLOCK.finditer(README):
        if block[1] or README[: block.start()].rstrip().endswith("prints"):
            continue
        lines = block[2].splitlines()
        found += [line for line in lines if line.startswith("$")] if lines[0].startswith("$") else lines
    prose = BLOCK.sub("", README)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    found += [span for span in spans if span.split()[0] in PROGRAMS]
    parts = [part for line in found for part in line.split("  #")[0].strip().split(" && ")]
    return list(dict.fromkeys(parts))


def _fragments() -> list[str]:
    """Return the options that the text names without a command."""
    spans = re.findall(r"`([^`]+)`", BLOCK.sub("", README))
    return list(dict.fromkeys(s for s in spans if all(OVERRIDE.fullmatch(word) for word in s.split())))


def _files() -> dict[str, str]:
    """Return the files of the section on extensions: each block follows a text that ends with its path."""
    found = {}
    for block in BLOCK.finditer(EXTENSION):
        if block[1]:
            paths = re.findall(r"`(my_\w+/[\w/]+\.(?:py|yaml))`", EXTENSION[: block.start()])
            assert paths[-1].endswith({"python": ".py", "yaml": ".yaml"}[block[1]]), block[2]
            found[paths[-1]] = block[2]
    return found


COMMANDS, FRAGMENTS = _commands(), _fragments()
OF_EXTENSION = [command for command in COMMANDS if command in EXTENSION and "=" in command]


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """A folder with the files of the README's extensions, and data of the user's own."""
    house = tmp_path_factory.mktemp("house")
    for path, text in _files().items():
        (house / path).parent.mkdir(parents=True, exist_ok=True)
        (house / path).write_text(text)
    draw = np.random.default_rng(0)
    labels = np.arange(200) % 10
    pixels = draw.integers(0, 200, (200, 64)) + 5 * labels[:, None]
    np.savetxt(house / "my_rows.csv", np.c_[labels, pixels], fmt="%d", delimiter=",")
    for folder, classes in (("my_images", 10), ("my_domains/a", 2), ("my_domains/b", 2)):
        for row in range(10 * classes):
            path = house / folder / f"class{row % classes}" / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[row].reshape(8, 8).astype(np.uint8)).save(path)
    return house


@pytest.fixture
def inside(house, monkeypatch) -> Iterator[Path]:
    """Work in that folder, as the README says."""
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
    monkeypatch.setattr(jobs, "_single", lambda composer, cfg, *, main: starts.append(cfg))
    monkeypatch.setattr(
        jobs._FailureCollector, "launch", lambda self, batch, initial_job_idx: starts.extend(batch) or []
    )
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
    return shlex.split(command, comments=True)


def test_there_are_commands() -> None:
    """The patterns above find what they are to find."""
    assert len(COMMANDS) >= 40 and len(FRAGMENTS) >= 15
    assert len(OF_EXTENSION) >= 3
    assert {Path(path).parts[1] for path in _files() if "conf" in path} == {
        "method",
        "dataset",
        "task_order",
        "backbone",
    }
    assert not NOT_RUN.keys() - set(COMMANDS), "no longer in the README"


@pytest.mark.parametrize("command", COMMANDS)
def test_command_composes(command, starts, capsys) -> None:
    """A command of a kind that nobody thought of fails here."""
    words = _words(command)
    match words:
        case ["$", "clrun", *arguments]:
            assert _call(arguments) == 2
            expected = README[README.index(command) :].splitlines()[1]
            assert capsys.readouterr().err == f"{expected}\n" and not starts
        case ["clrun", "list" | "features", *_] | ["clrun", *_, "--cfg", "job"]:
            assert _call(words[1:]) == 0
            assert capsys.readouterr().out.strip() and not starts
        case ["clrun", "report", *_]:
            assert _call(["report", "nowhere"]) == 2  # reports are written below
        case ["clrun", *arguments]:
            assert _call(arguments) == 0
            said = re.search(rf"^{re.escape(command)}$\n```\n\nruns (\d+) jobs", README, re.M)
            assert len(starts) == int(said[1]) if said else len(starts) >= 1
        case ["torchrun", *launch]:
            assert _call(launch[launch.index("clrun") + 1 :]) == 0 and len(starts) == 1
        case ["eval", call]:
            assert _call(shlex.split(call.removeprefix("$(clrun").removesuffix(")"))) == 0
            assert "complete" in capsys.readouterr().out
        case ["python", script, *arguments]:
            text = (ROOT / script).read_text()
            assert all(argument in text for argument in arguments)
        case ["pip", "install", "-e", what]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert what == "." or what[2:-1] in extras
        case ["pytest"] | ["pytest", "-m", "slow"] | [".ci/run"]:
            assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
        case _:
            pytest.fail(f"the README has a command that no test knows: {command}")


@pytest.mark.parametrize("fragment", FRAGMENTS)
def test_option_composes(fragment, starts) -> None:
    """An option that the text names exists."""
    words = _words(fragment)
    sweep = any("," in word and "[" not in word or "range" in word or "sweep" in word for word in words)
    owner = next((owner for option, owner in OF.items() if option in fragment), [])
    assert _call([*(["-m"] if sweep else []), *owner, *words]) == 0 and starts


@pytest.mark.parametrize("command", OF_EXTENSION)
def test_extension_runs_as_written(command, inside, capsys) -> None:
    """The extensions are copied from the README into an empty folder and run."""
    arguments = shlex.split(command, comments=True)[1:]
    if arguments[0] != "list":
        small = [] if "backbone=" in command else ["backbone=cnn"]
        arguments += ["job=smoke", "job.picture=false", "hardware.threads=1", *small]
    assert _call(arguments) == 0
    printed = capsys.readouterr()
    assert printed.out and not printed.err


def test_files_of_a_run_are_read_as_written(inside, capsys) -> None:
    """The README's analysis of a run's files works on a run, and gives the matrix that the run printed."""
    assert _call(["backbone=cnn", "job=smoke", "hardware.threads=1", "hydra.run.dir=run"]) == 0
    [code] = [block[2] for block in BLOCK.finditer(README) if block[1] == "python" and "run.json" in block[2]]
    *lines, last = code.splitlines()
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir("run")
        exec("\n".join(lines), names)
        matrix = eval(last, names)
    stored = [[np.nan if x is None else x for x in row] for row in names["run"]["accuracy_matrix"]["cil"]]
    assert isinstance(matrix, pd.DataFrame) and matrix.shape == (3, 3)
    np.testing.assert_allclose(matrix.to_numpy(), np.array(stored))
    files = re.findall(r"^\| (`.*?) \|", README[README.index("\n## Files of a run") :], re.M)
    shown = {name for cell in files for name in re.findall(r"`([\w.]+)`", cell) if "." in name}
    assert {"run.json", "accuracy.csv"} <= shown & {path.name for path in Path("run").iterdir()}
    assert _call(["report", "run"]) == 0 and "report.html" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in NOT_RUN and c not in OF_EXTENSION and c[0] != "$"])
def test_command_runs(command, inside, capsys) -> None:
    """Commands really run, with the limits of a smoke run and a smaller search."""
    for name in ("DIR [DIR ...]", "DIR", "outputs/sweeps/FOLDER"):
        if name in command:
            sweep = ["-m", "backbone=cnn", "method=er,ncm", "job=smoke", "hardware.threads=1", "hydra.sweep.dir=swept"]
            assert _call(sweep) == 0
            command = command.replace(name, "swept")
            break
    arguments = _words(command.replace("budget=20", "budget=4").replace("=stability_decay", "=stability_decay_smoke"))
    if not arguments[1:2] or arguments[1] not in ("list", "report", "features"):
        limits = {"job=": "smoke", "hardware.threads=": "1"}
        arguments += [f"{key}{value}" for key, value in limits.items() if not any(a.startswith(key) for a in arguments)]
    if "task_order=adversarial" in arguments:
        arguments.append("job.max_tasks=null")  # a search learns every task
    assert _call(arguments[1:]) == 0
    assert capsys.readouterr().out
