"""The stability-plasticity framework: what is tried in which order, what is kept, and that nothing leaks."""

import math
from itertools import islice
from typing import Any, ClassVar

import pytest
import torch
from helpers import METHODS, Net, Recorder, assert_same, born, configured, cpu, factory, sgd, state
from omegaconf import OmegaConf
from torch import Tensor, nn

from clrun.data.split import Batch
from clrun.data.stream import Stream
from clrun.data.transforms import fit_transform
from clrun.learning.context import Context
from clrun.learning.knobs import Knob, decays, read, write
from clrun.learning.method import Method
from clrun.running.checkpoint import RunState
from clrun.running.engine import Engine
from clrun.running.evaluation import Evaluation
from clrun.running.tuning import StabilityDecay, _Trials
from clrun.system.errors import ConfigError, NumericalError
from clrun.system.seeding import seed_all

KNOWN = {name: factory(name).func.knobs for name in METHODS}  # type: ignore[attr-defined]
KNOBBED = [name for name, knobs in KNOWN.items() if knobs]


def stream(setting: Any = "til") -> Stream:
    """Return three tasks of two classes (domain-incremental: of six) with validation rows."""
    rows = {"train_rows": 8, "test_rows": 4} if setting == "dil" else {"train_rows": 24, "test_rows": 8}
    shape = {"num_classes": 6, "image_shape": [1, 8, 8], "augment": ["crop"], "difficulty": 0.4}
    dataset = configured("dataset", "synthetic", val_fraction=0.25, **shape, **rows)
    transform, _ = fit_transform(dataset, Net())
    name, more = ("domain_shift", {}) if setting == "dil" else ("class_split", {"setting": setting})
    made: Stream = configured("scenario", name, n_tasks=3, **more)(dataset, lambda n: [1, 0, 2], transform)
    return made


def options(**changed: Any) -> StabilityDecay:
    """Return the search of job=stability_decay with one learning rate, some options changed."""
    one = {"lrs": [0.05], "first_lrs": []}
    node = OmegaConf.load("conf/job/stability_decay.yaml").tuning
    values: dict[str, Any] = OmegaConf.to_container(node)  # type: ignore[assignment]
    del values["_target_"]
    assert not changed.keys() - values.keys()
    return StabilityDecay(**(values | one | changed))


def engine(tasks: Stream, tuning: StabilityDecay | None, after: Any = None, epochs: int = 2, **more: Any) -> Engine:
    """Return an engine on one thread."""
    evaluation, journal = Evaluation(cpu(), "test", 64, None), Recorder(after, None)
    return Engine(tasks, sgd(epochs=epochs), cpu(), 0, evaluation, journal, tuning=tuning, state=RunState(), **more)


def lived(method: Method, tasks: Stream, tuning: StabilityDecay | None, **more: Any) -> tuple[Engine, list[Any]]:
    """Let `method` live; return the engine and the learner's state after each task."""
    states: list[Any] = []
    run = engine(tasks, tuning, after=lambda task, method, run_state: states.append(state(method)), **more)
    run.run(method)
    return run, states


def searches(run: Engine) -> list[dict[str, Any]]:
    """Return the records of the searches."""
    return [cost["tuning"] for cost in run.state.costs]


class Rigid(Method):
    """Learns only with a strength below `yields`; guesses otherwise. Notes the strength of every training."""

    knobs = (Knob("strength"),)
    strengths: ClassVar[list[float]] = []

    def __init__(self, backbone: nn.Module, num_classes: int, *, strength: float, yields: float) -> None:
        super().__init__(backbone, num_classes)
        self.strength, self.yields = strength, yields

    def learn(self, task: Any, ctx: Context) -> None:
        self.strengths.append(self.strength)
        if self.strength < self.yields:
            return super().learn(task, ctx)
        for parameter in self.head.parameters():
            parameter.data.zero_()
        return None


def rigid(strength: float, yields: float) -> Rigid:
    seed_all(0, "init")
    Rigid.strengths.clear()
    return Rigid(Net(), 6, strength=strength, yields=yields)


class Explosive(Rigid):
    """Its loss is infinite while its strength is not below `yields`."""

    def learn(self, task: Any, ctx: Context) -> None:
        self.strengths.append(self.strength)
        Method.learn(self, task, ctx)

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        return super().loss(batch, ctx) * (math.inf if self.strength >= self.yields else 1)


# --- the order of decay


@pytest.mark.parametrize(
    ("start", "knobs", "expected"),
    [
        ((4,), "a", [(4,), (2,), (1,), (0.5,)]),
        ((5, 2), "ab", [(5, 2), (2.5, 2), (5, 1), (2.5, 1), (1.25, 1), (2.5, 0.5), (1.25, 0.5), (0.625, 0.5)]),
        ((8, 4, 2), "abc", [(8, 4, 2), (4, 4, 2), (8, 2, 2), (8, 4, 1), (4, 2, 1), (2, 2, 1), (4, 1, 1), (4, 2, 0.5)]),
        ((5, 0), "ab", [(5, 0), (2.5, 0), (1.25, 0)]),
    ],
)
def test_knobs_take_turns(start, knobs, expected):
    found = decays(dict(zip(knobs, start, strict=True)), [Knob(name) for name in knobs], 0.5)
    assert [tuple(values.values()) for values in islice(found, len(expected))] == expected


def test_decay_ends_at_the_bounds():
    knobs = [Knob("a", bound=3.0), Knob("b", "divide", bound=0.5)]
    found = [(v["a"], v["b"]) for v in decays({"a": 8.0, "b": 0.25}, knobs, 0.5)]
    assert found == [(8, 0.25), (4, 0.25), (8, 0.5), (4, 0.5), (3, 0.5)]
    assert list(decays({"a": 2.0, "b": 1.0}, knobs, 0.5)) == [{"a": 2.0, "b": 1.0}]  # never against the decay
    assert list(decays({"a": 0.0}, [Knob("a")], 0.5)) == [{"a": 0.0}]
    assert [v["a"] for v in islice(decays({"a": 1.0}, [Knob("a", "divide")], 0.5), 4)] == [1, 2, 4, 8]


def test_values_are_read_and_written_by_path():
    module = nn.Sequential(nn.Dropout(0.5))
    assert read(module, [Knob("0.p"), Knob("training")]) == {"0.p": 0.5, "training": 1.0}
    write(module, {"0.p": 0.25, "fresh": 3.0})
    assert (module[0].p, module.fresh) == (0.25, 3.0)


@pytest.mark.parametrize("name", KNOBBED)
def test_declared_knobs_are_options_that_a_method_holds(name):
    node = OmegaConf.load(f"conf/method/{name}.yaml")
    method, _ = born(factory(name), stream())
    values = read(method, method.knobs)
    for knob in method.knobs:
        assert values[knob.name] == node[knob.name]
        assert knob.decayed(500.0, 0.5) != 500.0
    assert "capacity" not in values


# --- what is tried, and what is kept


def test_accepted_at_once_means_one_training():
    run, _ = lived(rigid(4.0, yields=9.0), stream(), options(), epochs=6)
    for record in searches(run):
        assert len(record["stability"]["attempts"]) == 1 and record["stability"]["converged"]
        assert record["stability"]["trained"] == record["stability"]["carried"] == {"strength": 4.0}
        assert record["stability"]["threshold"] == 0.8 * record["plasticity"]["accuracy"]
        # There is nothing stable about this learner: it is finetuning.
        assert record["stability"]["attempts"][0]["accuracy"] == record["plasticity"]["accuracy"] > 0.8
    assert Rigid.strengths == [4.0] * 3


@pytest.mark.parametrize("reset", [False, True])
def test_unattainable_accuracy_means_all_attempts(reset):
    run, _ = lived(rigid(4.0, yields=0.0), stream(), options(max_attempts=3, drop=0.1, reset=reset), epochs=6)
    start = 4.0
    for record in searches(run):
        found = record["stability"]
        assert [a["knobs"]["strength"] for a in found["attempts"]] == [start, start / 2, start / 4]
        assert [a["accuracy"] for a in found["attempts"]] == [0.5] * 3  # of two classes
        assert not found["converged"]
        assert (found["trained"], found["carried"]) == ({"strength": start / 4}, {"strength": start / 8})
        assert record["start"] == {"strength": start}
        start = 4.0 if reset else start / 8
    assert len(Rigid.strengths) == 9


def test_decay_stops_where_accuracy_holds_and_goes_on_from_there():
    run, _ = lived(rigid(4.0, yields=2.0), stream(), options(), epochs=6)
    attempts = [[a["knobs"]["strength"] for a in r["stability"]["attempts"]] for r in searches(run)]
    assert attempts == [[4, 2, 1], [1], [1]]
    again, _ = lived(rigid(4.0, yields=2.0), stream(), options(reset=True), epochs=6)
    assert [len(r["stability"]["attempts"]) for r in searches(again)] == [3, 3, 3]


def test_without_a_knob_that_moves_there_is_one_training():
    run, _ = lived(rigid(0.0, yields=0.0), stream(), options(), epochs=6)
    assert [len(r["stability"]["attempts"]) for r in searches(run)] == [1, 1, 1]
    assert not any(r["stability"]["converged"] for r in searches(run))


def test_grid_best_rate_and_first_task():
    tasks = stream()
    run, _ = lived(born(factory("ewc"), tasks)[0], tasks, options(lrs=[0.0001, 0.05, 0.05], first_lrs=[0.02]))
    grids = [record["plasticity"] for record in searches(run)]
    assert [[entry["lr"] for entry in grid["grid"]] for grid in grids] == [
        [0.02, 0.0001, 0.05, 0.05],
        [0.0001, 0.05, 0.05],
        [0.0001, 0.05, 0.05],
    ]
    for grid in grids:
        best = max(entry["accuracy"] for entry in grid["grid"])
        first = next(entry for entry in grid["grid"] if entry["accuracy"] == best)
        assert (grid["lr"], grid["accuracy"]) == (first["lr"], best)
    # The rate is that of the training which is kept.
    lrs = {r["lr"] for r in run.recorder.logged if r.get("trial") == 4 and r["position"] == 0}
    assert lrs == {grids[0]["lr"]}


def test_a_method_without_knobs_keeps_its_best_training():
    tasks = stream("cil")
    method = born(factory("er"), tasks)[0]
    run, states = lived(method, tasks, options(lrs=[0.05, 0.0001]))
    plain, expected = lived(born(factory("er"), tasks)[0], tasks, None)
    assert [r["stability"] for r in searches(run)] == [None] * 3
    assert [r["plasticity"]["lr"] for r in searches(run)] == [0.05] * 3
    for a, b in zip(states, expected, strict=True):
        assert_same(a, b)
    assert run.recorder.recorded == plain.recorder.recorded  # steps of the training that was thrown away do not count
    assert run.recorder.steps == 2 * plain.recorder.steps


def test_repeats_average_over_seeds():
    tasks = stream()
    one, _ = lived(rigid(4.0, yields=9.0), tasks, options(lrs=[0.002]))
    two, _ = lived(rigid(4.0, yields=9.0), tasks, options(lrs=[0.002], repeats=3))
    a, b = (searches(run)[0]["plasticity"]["grid"][0]["accuracy"] for run in (one, two))
    assert a != b
    assert two.state.steps == one.state.steps


def test_a_training_that_leaves_the_numbers_counts_as_no_accuracy():
    seed_all(0, "init")
    Rigid.strengths.clear()
    run, _ = lived(Explosive(Net(), 6, strength=4.0, yields=2.0), stream(), options(), epochs=6)
    attempts = searches(run)[0]["stability"]["attempts"]
    assert [a["accuracy"] for a in attempts[:2]] == [0.0, 0.0] and attempts[2]["accuracy"] > 0.8
    for drop in (0.2, 1.0):
        with pytest.raises(NumericalError):
            lived(Explosive(Net(), 6, strength=4.0, yields=0.0), stream(), options(max_attempts=2, drop=drop))


# --- nothing leaks


@pytest.mark.parametrize("name", KNOBBED)
def test_attempts_are_the_same_in_any_order_and_knobs_matter(name):
    tasks = stream("til")
    method, _ = born(factory(name), tasks)
    run = engine(tasks, None)
    run.train(method, run.context(method, tasks.tasks[0]))
    run.state.steps = 7
    before = state(method)
    low, high = ({knob.name: value for knob in method.knobs} for value in (0.1, 0.7))
    trials = _Trials(run, method, tasks.tasks[1])
    first = [trials.run(0.05, knobs=low), trials.run(0.02, plain=True), trials.run(0.05, knobs=high)]
    second = [trials.run(0.05, knobs=high), trials.run(0.02, plain=True), trials.run(0.05, knobs=low)]
    for a, b in zip(first, reversed(second), strict=True):
        assert_same(state(a.method), state(b.method))
        assert (a.accuracy, a.steps) == (b.accuracy, b.steps)
    assert_same(before, state(method))
    assert any(not torch.equal(a, b) for a, b in zip(*(state(t.method).values() for t in first[::2]), strict=True))


OFTEN = ("ewc", "der", "packnet", "gem", "progress_compress", "joint", "simplecil")


@pytest.mark.parametrize("name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in METHODS])
def test_one_rate_one_attempt_and_no_demand_are_the_plain_run(name):
    settings = factory(name).func.settings  # type: ignore[attr-defined]
    setting = "cil" if "cil" in settings else "til"
    make = factory(name, **({"m": 100} if name == "ranpac" else {}))
    method, tasks = born(make, stream(setting))
    run, states = lived(method, tasks, options(drop=1.0, max_attempts=1))
    method, tasks = born(make, stream(setting))
    plain, expected = lived(method, tasks, None)
    for a, b in zip(states, expected, strict=True):
        assert_same(a, b)
    assert run.recorder.recorded == plain.recorder.recorded and run.state.steps == plain.state.steps


def test_tasks_are_evaluated_before_they_are_learned():
    runs = [
        lived(born(factory("ewc"), stream("dil"))[0], stream("dil"), tuning, eval_initial=True)[0]
        for tuning in (options(drop=1.0, max_attempts=1), None)
    ]
    assert runs[0].recorder.recorded == runs[1].recorder.recorded
    assert [row["position"] for row in runs[0].recorder.recorded[:3]] == [0, 0, 0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lrs": []}, "job.tuning.lrs: empty"),
        ({"decay": 1.0}, "job.tuning.decay: a factor of 1 leaves the knobs unchanged"),
    ],
)
def test_options_that_make_no_sense(changed, message):
    with pytest.raises(ConfigError, match=message):
        options(**changed)


def test_an_optimizer_needs_a_rate():
    options().check(sgd())
    budget = sgd()
    object.__setattr__(budget, "optimizer", torch.optim.Adam)
    with pytest.raises(ConfigError, match=r"budget.optimizer has no option lr"):
        options().check(budget)


# --- what particular methods declare


def test_icarl_has_a_knob_only_where_its_strength_counts():
    for loss, knobs in (("bce", []), ("ce", ["strength"])):
        method, _ = born(factory("icarl", loss=loss), stream("cil"))
        assert [knob.name for knob in method.knobs] == knobs


def test_soft_gates_of_earlier_tasks_outlive_the_decay_of_their_slope():
    tasks = stream()
    method, _ = born(factory("hat", binarise="paper", s_max=50.0), tasks)
    run = engine(tasks, options(max_attempts=2, drop=0.0))
    kept: list[Tensor] = []
    run.recorder.after = lambda task, method, run_state: kept.append(method.gates(0))
    learned = run.run(method)
    assert torch.equal(kept[0], kept[2])
    write(learned, {"s_max": 1.0})
    assert torch.equal(learned.gates(0), kept[0])
