"""Signatures against values, whole configurations, hashes, names of sweep folders."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from torch import Tensor

from clrun.config.check import check
from clrun.config.compose import Composer, slug
from clrun.config.signature import locate, mismatch, parameters
from clrun.config.sweep_jobs import JobComposer
from clrun.learning.method import Method
from clrun.results.identity import OUTSIDE_HASH, config_hash, differing_keys, flatten
from clrun.running.loggers import Console
from clrun.system.errors import ConfigError, Count, Fraction, NonNegative, Positive, PositiveInt

pytestmark = pytest.mark.exact  # whole numbers, bytes and texts alone

NODE = {"_target_": "builtins.dict"}


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (1, int),
        (1, float),
        (1e-3, float),
        (True, bool),
        ("a", str),
        (None, int | None),
        (3, int | None),
        ("cil", Literal["til", "cil"]),
        (0, Count),
        (0.0, NonNegative),
        (1, Fraction),
        (None, PositiveInt | None),
        ([1, 2], list[int]),
        ([], tuple[float, ...]),
        ([0.9, 0.99], tuple[float | Tensor, float | Tensor]),
        ([[1], [2, 3]], Sequence[Sequence[int]]),
        ("superclass", str | list[list[int]]),
        ({"a": 1}, dict[str, int]),
        (NODE, Callable[..., Any]),
        (NODE, Tensor | None),
        ([1, "a", None], Any),
        ("x", Any),
        ("data", Path),
    ],
)
def test_fitting_values(value, hint):
    assert mismatch(value, hint) is None


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        ("abc", float, "expected float"),
        ("3", int, "expected int"),
        (1.0, int, "expected int"),
        (True, int, "expected int"),
        (True, float, "expected float"),
        (1, bool, "expected bool"),
        (1, str, "expected str"),
        (None, int, "expected int"),
        ("x", int | None, "expected int or null"),
        ("abc", float | Tensor, "expected float"),
        (NODE, float, "expected float"),
        (3, Tensor, "expected a node with a _target_"),
        ("adam", Callable[..., Any], "expected a node with a _target_"),
        ("cosine", Callable[..., Any] | None, "expected a node with a _target_ or null"),
        (float("nan"), float, "must be a number"),
        ("CIL", Literal["til", "cil"], "expected one of til, cil"),
        (True, Literal[1, 2], "expected one of 1, 2"),
        (-1, Count, "must be at least 0"),
        (0, PositiveInt | None, "must be at least 1"),
        ("0", PositiveInt | None, "expected int or null"),
        (1.5, Fraction, "must be at most 1"),
        (0, Positive, "must be greater than 0"),
        (float("nan"), NonNegative, "must be a number"),
        (3, list[int], "expected a list"),
        ("abc", list[str], "expected a list"),
        ([1, "a"], list[int], "in each item expected int"),
        ([3, 0], list[PositiveInt], "in each item must be at least 1"),
        ([1.0], tuple[float, float], "expected a list of 2"),
        ([1], dict[str, int], "expected a mapping"),
        ({"a": "b"}, Mapping[str, int], "in each item expected int"),
    ],
)
def test_unfitting_values(value, hint, message):
    assert mismatch(value, hint) == message


@dataclass
class Once(Console):
    """A configured data class whose options must not both be set."""

    a: int | None
    b: int | None

    def __post_init__(self) -> None:
        if self.a is not None and self.b is not None:
            raise ConfigError("logger: a and b exclude each other")


class Learner(Method):
    settings = frozenset({"til"})
    needs_task_id = True

    def __init__(self, backbone, num_classes, *, strength: NonNegative, inner: Callable[..., Any] | None): ...


def scenario(dataset, order, transform, *, n_tasks: PositiveInt, setting: Literal["til", "cil", "dil"]): ...


def anything(**options: int): ...


HERE = __name__
GOOD: dict[str, Any] = {
    "name": "test",
    "seed": 0,
    **{group: {"_target_": f"{HERE}.anything"} for group in ("dataset", "task_order", "backbone", "budget", "job")},
    "hardware": {"_target_": f"{HERE}.anything", "_partial_": True},
    "logger": {"_target_": f"{HERE}.Once", "a": 1, "b": None},
    "scenario": {"_target_": f"{HERE}.scenario", "_partial_": True, "n_tasks": 5, "setting": "til"},
    "method": {"_target_": f"{HERE}.Learner", "_partial_": True, "strength": 1.0, "inner": None},
}


def problems(changes: dict[str, Any], without: tuple[str, ...] = ()) -> list[str]:
    """The lines that `check` raises for the good configuration with dotted changes."""
    config: dict[str, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in GOOD.items()}
    for key, value in changes.items():
        group, _, name = key.partition(".")
        if name:
            config[group][name] = value
        else:
            config[group] = value
    for key in without:
        group, _, name = key.partition(".")
        del (config[group] if name else config)[name or group]
    try:
        check(config, {"method": "learner", "scenario": "class_split"})
    except ConfigError as error:
        return str(error).splitlines()
    return []


def test_a_good_configuration_passes():
    assert problems({}) == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"method.strenght": 1.0}, "method.strenght: unknown option of method=learner; did you mean 'strength'?"),
        ({"method.strength": "abc"}, "method.strength: expected float, got 'abc'"),
        ({"method.strength": -1.0}, "method.strength: must be at least 0, got -1.0"),
        ({"method.strength": "???"}, "method.strength: needs a value; set method.strength=..."),
        ({"method.backbone": 1, "method.x": 1}, "method.x: unknown option of method=learner"),
        (
            {"method": None},
            "method: expected a node with a _target_, got None; set method=CHOICE (see clrun list method)",
        ),
        (
            {"method": [1]},
            "method: expected a node with a _target_, got [1]; set method=CHOICE (see clrun list method)",
        ),
        ({"method._target_": "clrun.config.check.Jobb"}, "method._target_: cannot import 'clrun.config.check.Jobb': "),
        (
            {"method._target_": "no_such_package.Mine"},
            "method._target_: cannot import 'no_such_package.Mine': No module",
        ),
        ({"method._target_": "clrun.no_such.Mine"}, "method._target_: cannot import 'clrun.no_such': 'clrun' has no"),
        ({"method._target_": "Mine"}, "method._target_: cannot import 'Mine'"),
        ({"method._target_": 3}, "method._target_: cannot import '3'"),
        ({"method._target_": f"{HERE}.HERE"}, f"method._target_: '{HERE}.HERE' is not callable"),
        (
            {"scenario.setting": "cil"},
            "Learner needs the task id at test time; scenario.setting=cil cannot use it (til)",
        ),
        ({"seed": -1}, "seed: must be at least 0, got -1"),
        ({"seed": "1"}, "seed: expected int, got '1'"),
        (
            {"name": "a/b"},
            "name: must be a valid folder name (not empty, no slash, no leading dot or space), got 'a/b'",
        ),
        ({"name": ".."}, "name: must be a valid folder name"),
        ({"name": ""}, "name: must be a valid folder name"),
        ({"methd": 3}, "methd: unknown option; did you mean 'method'?"),
        ({"dataset.a": "x"}, None),
        ({"logger.b": 2}, "logger: a and b exclude each other"),
        ({"logger.b": "x"}, "logger.b: expected int or null, got 'x'"),
        (
            {"method.inner": {"_target_": f"{HERE}.Once", "a": 1.5, "b": None}},
            "method.inner.a: expected int or null, got 1.5",
        ),
        ({"dataset.a": [{"_target_": f"{HERE}.Once", "a": 1, "b": 2}]}, "logger: a and b exclude each other"),
        (
            {"budget.optimizer": {"_target_": "torch.optim.SGD", "_partial_": True, "lr": -1}},
            "budget.optimizer: Invalid learning rate: -1",
        ),
        (
            {"budget.optimizer": {"_target_": "torch.optim.SGD", "_partial_": True, "lr": "fast"}},
            "budget.optimizer.lr: expected float, got 'fast'",
        ),
    ],
)
def test_each_problem_has_one_line(changes, line):
    found = problems(changes)
    if line is None:
        assert found == []
    else:
        assert len(found) == 1
        assert found[0].startswith(line)


@pytest.mark.parametrize(
    ("without", "line"),
    [
        ("method", "method: is missing; set method=CHOICE (see clrun list method)"),
        ("seed", "seed: is missing; set seed=..."),
        (
            "method.inner",
            "method.inner: is missing; method=learner needs it: add it to the YAML file, or set +method.inner=...",
        ),
        ("logger.a", "logger.a: is missing; logger needs it: add it to the YAML file, or set +logger.a=..."),
    ],
)
def test_missing_options(without, line):
    assert problems({}, (without,)) == [line]


def test_all_problems_are_collected():
    found = problems({"seed": 1.5, "method.strength": True, "scenario.n_tasks": 0, "scenario.n_task": 3})
    assert [line.partition(":")[0] for line in found] == [
        "seed",
        "scenario.n_tasks",
        "scenario.n_task",
        "method.strength",
    ]


def test_a_broken_module_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("x = 1\nraise ZeroDivisionError('two\\nlines')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert problems({"method._target_": "broken_module.Mine"}) == [
        "method._target_: cannot import 'broken_module.Mine': two lines"
    ]


def test_methods_of_classes_are_found():
    assert locate("pathlib.Path.cwd") == Path.cwd
    assert "strength" in parameters(Learner)


def test_flatten_keeps_lists_and_empty_mappings():
    assert flatten({"a": {"b": {"c": 1}, "d": [1, 2]}, "e": {}}) == {"a.b.c": 1, "a.d": [1, 2], "e": {}}


@pytest.mark.parametrize("key", OUTSIDE_HASH)
def test_hash_ignores_what_cannot_change_a_result(key):
    group, _, name = key.partition(".")
    a = {"seed": 0, group: {name: 1, "kept": 1} if name else 1}
    b = {"seed": 0, group: {name: 2, "kept": 1} if name else {"_target_": "x"}}
    assert config_hash(a) == config_hash(b)
    assert differing_keys(a, b) == []


def test_hash_depends_on_everything_else():
    base = {"seed": 0, "job": {"max_steps": None}, "method": {"x": [1, 2], "namely": 1}, "hardware": {"workers_": 1}}
    others = [
        base | {"seed": 1},
        base | {"seed": False},
        base | {"job": {"max_steps": 3}},
        base | {"method": {"x": [2, 1], "namely": 1}},
        base | {"method": {"x": [1, 2], "namely": 2}},
        base | {"hardware": {"workers_": 2}},
        base | {"more": 1},
    ]
    assert len({config_hash(config) for config in [base, *others]}) == len(others) + 1
    assert config_hash(dict(reversed(base.items()))) == config_hash(base)


def test_hash_does_not_distinguish_one_from_one_point_zero():
    assert config_hash({"lr": 1, "betas": [0, 1]}) == config_hash({"lr": 1.0, "betas": [0.0, 1.0]})


def test_differing_keys_are_sorted_and_dotted():
    a = {"seed": 0, "method": {"strength": 1.0, "decay": 1.0}, "name": "x"}
    b = {"seed": 1, "method": {"strength": 2.0, "samples": 3}, "name": "y"}
    assert differing_keys(a, b) == ["method.decay", "method.samples", "method.strength", "seed"]


def test_slug_is_readable_and_does_not_depend_on_order_or_display():
    a = slug(["method=er", "task_order.seed=1", "job.progress=false", "logger=tensorboard", "logger.x=1"])
    assert a == slug(["hardware.workers=3", "task_order.seed=1", "method=er"])
    assert a.startswith("method-er_task_order.seed-1-")


def test_slugs_differ_where_results_differ():
    jobs = [["seed=1"], ["seed=2"], ["seed=1", "job=smoke"], ["job.max_steps=1"], ["job.max_steps=2"], [], ["+seed=1"]]
    assert len({slug(job) for job in jobs}) == len(jobs)


def test_slug_of_a_long_order_is_a_file_name(tmp_path):
    orders = [list(range(100)), [*range(98), 99, 98]]
    names = {slug([f"task_order.tasks={order}", "method={a: '/x y'}"]) for order in orders}
    assert len(names) == 2
    for name in names:
        (tmp_path / name).mkdir()
        assert len(name) < 120


def test_a_class_without_partial_is_told_so():
    [line] = problems({"method._partial_": False, "method.num_classes": 2})
    assert line.startswith("method.backbone: is missing; method=learner needs it: add _partial_: true to the YAML file")


def test_a_choice_without_target_is_named():
    assert problems({}, ("method._target_",)) == [
        "method=learner: its YAML file has no _target_, which names the class or function"
    ]


@pytest.mark.parametrize("group", ["method=ewc,si", "experiment=null,null"])
def test_an_option_below_a_swept_choice_is_left_to_the_jobs(group):
    overrides = [group, "method.strength=3", "+method.new=[1,2]", "seed=1"]
    with Composer.of(config_path=None, config_name=None, config_dir=None) as composer:
        cfg = composer.compose(overrides, sweep=True)
        assert list(cfg.hydra.overrides.task) == overrides
        assert cfg.seed == 1 and "strength" not in cfg.method
        jobs = JobComposer(composer.hydra.config_loader)
        words = ["method=ewc", "method.strength=3", "+method.new=[1,2]"]
        job = composer.explained(words, lambda: jobs.load_sweep_config(cfg, words))
        assert job.method.strength == 3 and job.method.new == [1, 2]
        with pytest.raises(ConfigError, match="^method.strength: unknown option of method=er$"):
            others = ["method=er", "method.strength=3"]
            composer.explained(others, lambda: jobs.load_sweep_config(cfg, others))
        with pytest.raises(ConfigError, match="^method.strength: unknown option of method=er$"):
            composer.compose(["seed=1,2", "method.strength=3"], sweep=True)
