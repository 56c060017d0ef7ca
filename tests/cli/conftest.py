"""Fixtures of the command-line tests: the command in this process, and configurations whose targets need no torch."""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from clrun.cli import main

TARGETS = '''
"""Targets that build nothing, importable without torch."""

from typing import Literal

from clrun.system.errors import Count, PositiveInt


def dataset(): ...
def scenario(dataset, order, transform, *, n_tasks: PositiveInt, setting: Literal["til", "cil", "dil"]): ...
def order(n_tasks, *, tasks: list[Count] | None): ...
def backbone(shape): ...
def budget(*, batch_size: PositiveInt): ...
def hardware(*, device: str, processes: PositiveInt, workers: Count): ...
def logger(): ...


def Method(backbone, num_classes, *, strength: Count): ...
def TaskAware(backbone, num_classes, *, strength: Count): ...


TaskAware.settings = frozenset({"til"})
TaskAware.needs_task_id = True
'''
RUN = '''
"""Stands for clrun.running.run in processes that find this folder on their path: leaves what it was given as a file."""

import json
import sys
from dataclasses import asdict
from types import ModuleType

from clrun.system.errors import ConfigError

def preflight(config):
    if config["scenario"]["n_tasks"] > 10:
        raise ConfigError("scenario.n_tasks: 11 tasks of 10 classes")

def check_method(config):
    if config["method"]["strength"] == 13:
        raise ConfigError("method.strength: 13 is refused")

def run_config(config, out, *, job):
    if config["seed"] == 13:
        raise RuntimeError("unlucky")
    if config["seed"] == 14:
        raise ConfigError("seed: 14 is refused late")
    out.mkdir(parents=True, exist_ok=True)
    (out / "given.json").write_text(json.dumps({"config": config, "job": asdict(job)}))
    return config["seed"] / 10

module = ModuleType("clrun.running.run")
module.run_config, module.preflight, module.check_method = run_config, preflight, check_method
sys.modules["clrun.running.run"] = module
'''
YAMLS = {
    "dataset/none": "_target_: targets.dataset",
    "scenario/none": "_target_: targets.scenario\n_partial_: true\nn_tasks: 5\nsetting: cil",
    "task_order/none": "_target_: targets.order\n_partial_: true\ntasks: null",
    "backbone/none": "_target_: targets.backbone\n_partial_: true",
    "method/none": "# Does nothing\n_target_: targets.Method\n_partial_: true\nstrength: 1",
    "method/task_aware": "_target_: targets.TaskAware\n_partial_: true\nstrength: 1",
    "method/gone": "_target_: no_such_package.Gone\n_partial_: true",
    "budget/none": "_target_: targets.budget\nbatch_size: 1",
    "hardware/none": "_target_: targets.hardware\ndevice: cpu\nprocesses: 1\nworkers: 0",
    "logger/none": "_target_: targets.logger",
    "experiment/stub": "# @package _global_\n# Nothing\ndefaults:\n"
    + "".join(
        f"  - override /{group}: none\n"
        for group in ("dataset", "scenario", "task_order", "backbone", "method", "budget", "hardware", "logger")
    ),
    "experiment/stub_sweep": "# @package _global_\ndefaults:\n  - stub\n"
    "hydra: {mode: MULTIRUN, sweeper: {params: {seed: 'range(2)'}}}",
}


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """What it said on stderr."""
        return self.err.splitlines()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    path = tmp_path / "cwd"
    path.mkdir()
    monkeypatch.chdir(path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    return path


@pytest.fixture
def clrun(folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """The command in this process."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def command(*argv: str) -> Done:
        with pytest.raises(SystemExit) as end:
            main(argv)
        out, err = capfd.readouterr()
        return Done(int(end.value.code or 0), out, err)

    return command


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ...]]:
    """Arguments that compose a configuration of targets that do nothing."""
    (tmp_path / "targets.py").write_text(TARGETS)
    (tmp_path / "sitecustomize.py").write_text(RUN)
    for name, text in YAMLS.items():
        file = tmp_path / "conf" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])]))
    yield ("--config-dir", str(tmp_path / "conf"), "experiment=stub")
    sys.modules.pop("targets", None)


@pytest.fixture
def stub_run(stub: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """The same, with a run in this process that only leaves what it was given."""
    monkeypatch.setitem(sys.modules, "clrun.running.run", sys.modules.get("clrun.running.run"))
    exec(RUN, {})
    return stub
