"""What a `_target_` may name: each place of a configuration expects a class or function of one kind."""

import functools
import shutil
import sys
import types
from collections.abc import Callable

import pytest
import torch
import yaml
from helpers import CONF
from torch import nn
from torch.optim import Optimizer

from clrun.api import Dataset, Method
from clrun.config.check import check
from clrun.config.kinds import ANY, KINDS, kind_of, wrong_kind
from clrun.config.signature import locate
from clrun.system.errors import ConfigError

pytestmark = pytest.mark.exact  # whole numbers, bytes and texts alone

GROUPS = list(KINDS)
FOREIGN = ["torch.load", "numpy.load", "shutil.copyfile", "os.system", "builtins.exec", "subprocess.Popen"]
FOREIGN += [
    "pathlib.Path",
    "torch.hub.load",
    "pickle.load",
    "torch.save",
    "functools.partial",
    "importlib.import_module",
]
FOREIGN += ["clrun.system.files.replace_text", "clrun.system.files.remove_empty", "torchvision.datasets.MNIST"]


def unannotated(*args, **options):
    return None


def images(**options) -> Dataset: ...


def text(**options) -> str: ...


def optimizer(params, **options) -> Optimizer: ...


class Mine(Method): ...


class Net(nn.Module): ...


class Callables:
    def __call__(self, n_tasks): ...


class Stranger: ...


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("name", FOREIGN)
def test_functions_of_other_kinds_are_refused_for_every_group(group, name):
    assert wrong_kind(locate(name), name, KINDS[group]).startswith(f"'{name}' is not {KINDS[group].words}")


@pytest.mark.parametrize("name", [name for name in FOREIGN if not name.startswith("clrun")])
def test_they_are_refused_where_nothing_is_known_and_for_optimizers(name):
    assert wrong_kind(locate(name), name, ANY) and wrong_kind(locate(name), name, kind_of(Callable[..., Optimizer]))


def test_what_is_refused_is_not_called(tmp_path):
    """`shutil.copyfile` as data set copied; now there is one line, in every place where a node can be."""
    (tmp_path / "a").write_text("a")
    node = {"_target_": "shutil.copyfile", "src": str(tmp_path / "a"), "dst": str(tmp_path / "b")}
    config = {"name": "x", "seed": 0, **{group: {"_target_": f"{__name__}.unannotated"} for group in GROUPS}}
    places = [("dataset", node)]
    places += [("dataset", {"_target_": f"{__name__}.unannotated", "images": node})]
    places += [("job", {"_target_": f"{__name__}.unannotated", "tuning": {"grid": [1, {"deep": node}]}})]
    for group, value in places:
        with pytest.raises(ConfigError, match=r"^[\w.\[\]]+_target_: 'shutil.copyfile' is not .*; it was not called$"):
            check(config | {group: value}, {})
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("target", "group", "fits"),
    [
        (unannotated, "dataset", True),
        (unannotated, "method", True),
        (images, "dataset", True),
        (images, "scenario", False),
        (text, "dataset", False),
        (functools.partial(images), "dataset", True),
        (functools.partial(torch.load), "dataset", False),
        (functools.partial(functools.partial(shutil.rmtree)), "task_order", False),
        (Mine, "method", True),
        (Net, "method", False),
        (Stranger, "method", False),
        (Stranger, "job", False),
        (Net, "backbone", True),
        (Stranger, "backbone", False),
        (nn.Linear, "backbone", True),
        (Callables, "task_order", True),
        (torch.optim.SGD, "backbone", False),
    ],
)
def test_parts_of_ones_own(target, group, fits):
    assert (wrong_kind(target, "own.part", KINDS[group]) is None) == fits


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("torch.optim.SGD", True),
        ("clrun.blocks.optimizers.Kfac", True),
        ("torch.optim.lr_scheduler.StepLR", False),
        ("torch.nn.Linear", False),
        (f"{__name__}.optimizer", True),
    ],
)
def test_optimizers(name, fits):
    assert (wrong_kind(locate(name), name, kind_of(Callable[..., Optimizer] | None)) is None) == fits


def test_a_name_in_a_module_of_ones_own_counts_as_what_it_is(monkeypatch):
    module = types.ModuleType("my_tools")
    module.copy = shutil.copyfile
    monkeypatch.setitem(sys.modules, "my_tools", module)
    assert wrong_kind(locate("my_tools.copy"), "my_tools.copy", KINDS["dataset"])


def test_a_package_that_needs_clrun_counts_as_ones_own(tmp_path, monkeypatch):
    site = tmp_path / "site-packages"
    for name, needs in (("written_for", "Requires-Dist: clrun>=0.1\n"), ("another", "Requires-Dist: numpy\n")):
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").write_text("def part(*args): ...\n")
        info = site / f"{name}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1\n{needs}")
        (info / "top_level.txt").write_text(name)
    monkeypatch.syspath_prepend(str(site))
    assert wrong_kind(locate("written_for.part"), "written_for.part", KINDS["dataset"]) is None
    assert wrong_kind(locate("another.part"), "another.part", KINDS["dataset"])


@pytest.mark.parametrize("group", GROUPS)
def test_every_choice_of_clrun_is_of_its_kind(group):
    names = set()
    for file in (CONF / group).glob("*.yaml"):
        if "_target_" in (content := yaml.safe_load(file.read_text())):
            names.add(content["_target_"])
    assert names
    for name in names:
        assert wrong_kind(locate(name), name, KINDS[group]) is None
