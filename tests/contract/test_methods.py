"""Promises of every method, tested for every file in conf/method: a new file is tested without further code."""

import copy
import inspect
import io
import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
import yaml
from helpers import CONF, METHODS, assert_same, born, context, cpu, factory, image_stream, live, sgd, state
from omegaconf import OmegaConf
from torch import Tensor, nn

from clrun.data.stream import Stream, Task
from clrun.learning.method import Method
from clrun.learning.training import fit
from clrun.running.checkpoint import RunState
from clrun.running.evaluation import Evaluation, Row

SETTINGS = ("cil", "til", "dil")
NEUTRAL_BUDGET = partial(sgd, momentum=0.9, weight_decay=1e-3, clip_norm=1.0)
# Options under which a learner must be finetuning, bit for bit.
NEUTRAL: list[tuple[str, dict[str, Any]]] = [
    ("er", {"capacity": 0}),
    ("er", {"replay_size": 0}),
    ("der", {"alpha": 0.0, "beta": 0.0}),
    ("der", {"capacity": 0, "beta": 1.0}),
    ("a_gem", {"capacity": 0}),
    ("gem", {"capacity": 0}),
    ("icarl", {"capacity": 0, "loss": "ce", "strength": 0.0}),
    ("replay_finetune", {"per_task": 0}),
    ("replay_finetune", {"per_task": 0, "memory": "partial"}),
    ("dgc", {"zeta": 0.0, "host": {"capacity": 0}}),
    ("ewc", {"strength": 0.0}),
    ("ewc", {"strength": 0.0, "solver": "proximal", "labels": "exact", "mode": "separate"}),
    ("ewc", {"strength": 0.0, "labels": "batched"}),
    ("l2", {"strength": 0.0}),
    ("l2", {"strength": 0.0, "solver": "proximal"}),
    ("kfac_ewc", {"strength": 0.0}),
    ("kfac_ewc", {"strength": 0.0, "solver": "grad", "add": "list", "prior": 1.0, "sharing": "reduce"}),
    ("lwf", {"strength": 0.0, "compete": "seen"}),
    ("lwf", {"strength": 0.0, "compete": "seen", "per_head": False}),
    ("ebll", {"strength": 0.0, "compete": "seen", "code_strength": 0.0}),
    ("si", {"strength": 0.0}),
    ("mas", {"strength": 0.0}),
    ("mas", {"strength": 0.0, "per_sample": False}),
    ("qr", {"strength": 0.0}),
    ("qr", {"strength": 0.0, "importance": "mas"}),
    ("qr", {"strength": 0.0, "importance": "si"}),
    ("merge", {"rule": "wise_ft", "wise_ft": {"alpha": 1.0}, "train_from": "merged", "compete": "seen"}),
    ("imm", {"matching": "mean", "alpha": 1.0, "l2_transfer": 0.0, "compete": "seen"}),
    ("slca", {"backbone_lr_scale": 1.0, "compete": "seen", "alignment": {"budget": {"epochs": 0}}}),
    ("coma", {"alpha": 1.0, "backbone_lr_scale": 1.0, "compete": "seen", "alignment": {"budget": {"epochs": 0}}}),
    ("swag", {"start_fraction": 1.0, "lr_ratio": 1.0}),
    ("b_tuning", {"strength": 0.0, "head_std": None, "head_lr_factor": 1.0}),
]
# Options under which a method claims that the order of the tasks does not matter; {} are those of its YAML file.
INVARIANT: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ("acil", "fecam", "lda", "ncm", "ncm_names", "rail", "ranpac", "simplecil", "stl")),
    ("zero_shot", {}),
    ("joint", {"mode": "once"}),
    ("simplecil", {"metric": "euclidean", "normalise_before_mean": True}),
    ("simplecil", {"keep_task_statistics": True}),
    ("ncm", {"normalise": True}),
    ("lda", {"shrinkage": 0.1, "priors": "empirical"}),
    ("ranpac", {"m": 100, "rule": "gcv"}),
    ("acil", {"m": 0, "repeats": 3}),
    ("acil", {"balance": "air", "m": 20}),
    ("acil", {"projection": "normal", "keep_task_statistics": True}),
    ("ranpac", {"m": 0, "rule": "fixed", "strengths": [1.0]}),
    ("ranpac", {"m": 100, "keep_task_statistics": True}),
    ("rail", {"form": "dual"}),
    ("rail", {"m": 0, "gate": "none", "keep_task_statistics": True}),
    ("fecam", {"recipe": "cnn", "alpha2": 1.0, "shrinkages": 2}),
    ("fecam", {"covariance": "common"}),
    ("fecam", {"covariance": "diagonal"}),
    ("halrp", {"base": "backbone", "growth": 2.0}),
    ("batchensemble", {"base": "backbone"}),
    ("esn", {"vote": "single"}),
    ("esn", {"vote": "single", "head": "mlp"}),
]


# Options that make a learner cheap enough for its many lives here; no promise depends on them.
SMALL: dict[str, dict[str, Any]] = {"mer": {"draws": 1, "chunk": 5}, "ranpac": {"m": 100}, "rail": {"m": 100}}
SMALL |= {"acil": {"m": 50}}
SMALL |= {name: {"alignment": {"rows_per_class": 16}} for name in ("slca", "slca_pp", "coma", "cofima")}
SMALL |= {name: {"alignment": {"rows_per_class": 8, "budget": {"epochs": 2}}} for name in ("mos", "tuna")}
REPLAYED = {"rows_per_class": 4, "centroids": 2, "budget": {"epochs": 1}}
SMALL |= {"hide_prompt": {"alignment": REPLAYED, "tii": {"budget": {"epochs": 1}, "alignment": REPLAYED}}}
SMALL |= {"sema": {"code": 8, "threshold": 0.0, "rd": {"epochs": 1, "optimizer": {"lr": 0.001}}}}
# Published strengths are for other learning rates than that of these short lives.
SMALL |= {"moe_adapters": {"experts": 4, "bottleneck": 4, "selector_budget": {"steps": 10}}}
SMALL |= {"zscl": {"reference_rows": 8, "reference_size": 4}}
SMALL |= {"dlcft": {"target_scale": 1.0}, "b_tuning": {"strength": 1.0, "head_lr_factor": 1.0}}


# Three tasks of two classes; each epoch is a full batch and a short one.
short_stream = partial(image_stream, train_rows=8)


def small(name: str, **options: Any) -> Callable[..., Method]:
    """Return `method=name` with some options changed, and small."""
    return factory(name, **(SMALL.get(name, {}) | options))


def allowed() -> list[tuple[str, str]]:
    """Return every method with every setting it works in."""
    return [(name, s) for name in METHODS for s in SETTINGS if s in target(name).settings]


@cache
def target(name: str) -> type[Method]:
    """Return the class behind conf/method/`name`.yaml."""
    return factory(name).func  # type: ignore[attr-defined]


def eval_rows(stream: Stream) -> Tensor:
    """Return prepared test rows of all tasks, in order of the data set."""
    tasks = sorted(stream.tasks, key=lambda task: task.id)
    return torch.cat([batch.x for task in tasks for batch in task.test.batches(100)])


def logits(method: Method, x: Tensor, position: int = 2) -> Tensor:
    """Return the logits in eval mode, with a task's position (the last one's) for methods that need one."""
    method.eval()
    with torch.inference_mode():
        return method(x, position) if method.needs_task_id else method(x)


@dataclass(frozen=True)
class Life:
    """One life of a method through three tasks. Tests that only look at it share it.

    Attributes:
        stream: the three tasks.
        recorded: the rows of all evaluations.
        unseen: per task, the columns of the logits that belong to classes not seen by then.
        no_gradients: whether no parameter has a gradient at the end.
        state: weights, buffers and tensors at the end.
        logits: those of all test rows at the end.
        method: the method at the end, for tests that let it predict.
        pickled: its pickle after one task.
        saved: what `torch.save` makes of it after two tasks.
        copied: its deep copy after two tasks.
    """

    stream: Stream
    recorded: list[Row]
    unseen: list[Tensor]
    no_gradients: bool
    state: dict[str, Any]
    logits: Tensor
    method: Method
    pickled: bytes
    saved: bytes
    copied: Method


@lru_cache(maxsize=8)  # conftest.py puts the tests of a method together
def life(name: str, setting: Any = "cil", order: tuple[int, ...] = (0, 1, 2)) -> Life:
    """Let a method live through three tasks, whose classes are dealt at random."""
    method, stream = born(small(name), short_stream(setting, order, class_seed=1))
    unseen, pickled, saved, copies = [], [], io.BytesIO(), []

    def look(task: Task, method: Method, run_state: RunState) -> None:
        seen = stream.candidates(run_state.learned, "cil")[0]
        unseen.append(logits(method, eval_rows(stream))[:, ~seen])
        if run_state.learned == 1:
            pickled.append(pickle.dumps(method))
        elif run_state.learned == 2:
            torch.save(method, saved)
            copies.append(copy.deepcopy(method))

    recorded = live(method, stream, after=look).recorded
    no_gradients = all(p.grad is None for p in method.parameters())
    end = logits(method, eval_rows(stream))
    return Life(stream, recorded, unseen, no_gradients, state(method), end, method, *pickled, saved.getvalue(), *copies)


@pytest.mark.parametrize("name", METHODS)
def test_files(name: str) -> None:
    text = (CONF / "method" / f"{name}.yaml").read_text()
    assert text.startswith("# "), "the first line says what it is and its source"
    cls = target(name)
    assert cls.__name__ == "".join(part.capitalize() for part in name.split("_"))
    keys = {key for key in OmegaConf.create(text) if not str(key).startswith("_")}
    parameters = inspect.signature(cls).parameters
    assert keys == parameters.keys() - {"backbone", "num_classes"}
    assert all(p.default is p.empty for p in parameters.values()), "defaults belong into the YAML"
    assert issubclass(cls, Method)


@pytest.mark.parametrize("name", METHODS)
def test_no_choice_is_a_word_that_yaml_reads_as_something_else(name: str) -> None:
    for option, hint in get_type_hints(target(name).__init__).items():
        choices = [c for part in (hint, *get_args(hint)) if get_origin(part) is Literal for c in get_args(part)]
        for choice in choices:
            assert yaml.safe_load(str(choice)) == choice, (option, choice)


@pytest.mark.parametrize("name", METHODS)
def test_an_instance_reads_features_as_its_options_say(name: str) -> None:
    make = small(name)
    method = born(make, short_stream())[0]
    assert method.uses_frozen_features == target(name).reads_features(make.keywords)  # type: ignore[attr-defined]


def test_one_place_says_whether_a_method_reads_features() -> None:
    with pytest.raises(TypeError, match=r"^Own.uses_frozen_features follows from reads_features\(options\)"):
        type("Own", (Method,), {"uses_frozen_features": True})


@pytest.mark.parametrize(("name", "setting"), allowed())
def test_lives_through_a_stream(name: str, setting: Any) -> None:
    found = life(name, setting, (2, 0, 1))
    needs_task_id = target(name).needs_task_id
    settings = {"dil"} if setting == "dil" else ({"til"} if needs_task_id else {"cil", "til"})
    expected = {(p, t, s) for p in (1, 2, 3) for t in range(p) for s in settings}
    assert {(r["position"], r["task_position"], r["setting"]) for r in found.recorded} == expected
    assert all(0 <= r["correct"] <= r["total"] and r["nll"] < 27 for r in found.recorded)
    assert len(found.unseen) == 3 and all(not columns.any() for columns in found.unseen), "of unseen classes: 0"
    assert found.no_gradients


@pytest.mark.parametrize("name", METHODS)
def test_predicts_seen_classes_only(name: str) -> None:
    method, stream = copy.deepcopy(life(name).copied), life(name).stream
    setting = "til" if method.needs_task_id else "cil"
    first_two = Stream(stream.tasks[:2], 6, "cil", transform=stream.transform)
    rows, _ = Evaluation(cpu(), "test", 64, None).predictions(method, first_two, 2)
    assert {row[setting] for row in rows} <= set(torch.cat([task.classes for task in first_two.tasks]).tolist())
    assert {row["task"] for row in rows} == {0, 1}


@pytest.mark.records  # bits of one layout
@pytest.mark.parametrize("name", METHODS)
def test_same_first_task_twice(name: str) -> None:
    """The rest of the life is the same twice, because it goes on from copies of this state (below)."""
    first = life(name)
    torch.rand(7)  # what ran before in this process must not matter
    method, stream = born(small(name), short_stream(class_seed=1))
    journal = live(method, stream, until=1)
    assert_same(state(pickle.loads(first.pickled)), state(method))
    assert journal.recorded == [row for row in first.recorded if row["position"] == 1]


# A dry run of a method that reads features times the evaluation alone.
@pytest.mark.parametrize("name", [n for n in METHODS if not target(n).reads_features(factory(n).keywords)])
def test_a_dry_run_can_time_a_fit(name: str) -> None:
    method, stream = born(small(name), short_stream())
    ctx = context(stream, max_steps=3)
    method.begin_task(stream.tasks[0], ctx)
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    fit(method, stream.tasks[0].train, ctx)
    assert ctx.progress.step == 3, "the timed steps are taken without `learn`"
    assert ctx.progress.trained and any(not torch.equal(before[n], t) for n, t in method.state_dict().items())


def tensors(*modules: nn.Module) -> set[int]:
    """Return the identities of all parameters and buffers."""
    return {id(t) for module in modules for t in (*module.parameters(), *module.buffers())}


@pytest.mark.parametrize("name", METHODS)
def test_what_a_task_begins_is_moved_to_the_device(name: str) -> None:
    for learned in (0, 1):
        if learned:
            method, stream = pickle.loads(life(name).pickled), life(name).stream
        else:
            method, stream = born(small(name), short_stream())
        before = tensors(method)
        method.begin_task(stream.tasks[learned], context(stream, learned))
        assert tensors(method) - before <= tensors(*method.new_parts())


@pytest.mark.records  # bits of one layout
@pytest.mark.parametrize("name", METHODS)
def test_goes_on_from_copies(name: str) -> None:
    whole = life(name)
    pickled, saved = pickle.loads(whole.pickled), torch.load(io.BytesIO(whole.saved), weights_only=False)
    for learned, twin in ((1, pickled), (2, saved), (2, copy.deepcopy(whole.copied))):
        torch.rand(7)  # what ran before in this process must not matter
        journal = live(twin, whole.stream, learned=learned)
        later = [row for row in whole.recorded if row["position"] > learned]
        assert [row | {"step": 0} for row in journal.recorded] == [row | {"step": 0} for row in later]
        assert_same(whole.state, state(twin))
        assert torch.equal(whole.logits, logits(twin, eval_rows(whole.stream)))


# Closed forms, and temporary heads that are discarded; methods for task-incremental streams have a head per task.
WITHOUT_COMPETE = {
    "acil",
    "aper",
    "cl_lora",
    "ease",
    "esn",
    "fecam",
    "lda",
    "ncm",
    "ncm_names",
    "rail",
    "ranpac",
    "simplecil",
    "text_to_text",
    "zero_shot",
}
DEFAULTS = {name: OmegaConf.load(CONF / "method" / f"{name}.yaml") for name in METHODS}
COMPETE = {name: node.get("compete") or node.get("host", {}).get("compete") for name, node in DEFAULTS.items()}


def test_every_method_with_a_cross_entropy_says_what_competes() -> None:
    without = {name for name, value in COMPETE.items() if value is None}
    assert without == WITHOUT_COMPETE | {name for name in METHODS if target(name).settings == {"til"}}


@pytest.mark.records  # bits of one layout
@pytest.mark.parametrize(
    ("name", "compete"),
    [(n, v) for n, default in COMPETE.items() if default for v in ("current", "seen", "all") if v != default],
)
def test_every_value_of_compete_trains_resumes_and_evaluates(name: str, compete: str) -> None:
    options: dict[str, Any] = {"host": {"compete": compete}} if name == "dgc" else {"compete": compete}
    method, stream = born(small(name, **options), short_stream())
    live(method, stream, until=1, budget=sgd(epochs=1))
    twin = pickle.loads(pickle.dumps(method))
    journal, again = (live(m, stream, learned=1, until=2, budget=sgd(epochs=1)) for m in (method, twin))
    assert_same(state(method), state(twin))
    assert journal.recorded == again.recorded
    assert {r["setting"] for r in journal.recorded} == {"cil", "til"}
    assert all(0 <= r["correct"] <= r["total"] and math.isfinite(r["nll"]) for r in journal.recorded)
    if compete == "all":
        twin, stream = born(small(name, **options), short_stream())
        twin.begin_task(stream.tasks[0], context(stream))
        assert twin.head.initialised.all(), "every class has a row from the first task on"


@pytest.mark.parametrize("name", METHODS)
def test_prediction_depends_on_the_sample_alone(name: str) -> None:
    method, stream = life(name).method, life(name).stream
    x = eval_rows(stream)
    others = x[8:16].flip(0)
    mates = torch.cat([x[:8], others * 3 + 1 if others.is_floating_point() else others])
    together, apart = logits(method, x[:16])[:8], logits(method, mates)[:8]
    torch.testing.assert_close(together, apart, rtol=1e-6, atol=1e-6)
    alone = torch.cat([logits(method, row[None]) for row in x[:8]])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def claims(name: str, options: dict[str, Any]) -> bool:
    """Return whether a method with these options claims that the order of the tasks does not matter."""
    return born(small(name, **options), short_stream())[0].order_invariant


def final(name: str, options: dict[str, Any], setting: Any, order: Sequence[int]) -> tuple[Tensor, dict[int, Any]]:
    """Return the logits of all test rows and the results by task after a life with this order of tasks."""
    method, stream = born(small(name, **options), image_stream(setting, order))
    journal = live(method, stream)
    counts = {r["task"]: (r["correct"], r["nll"]) for r in journal.recorded if r["position"] == 3}
    x = eval_rows(stream if method.uses_frozen_features or method.needs_decoder else image_stream(setting))
    return logits(method, x, stream.order.index(0)), counts


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("name", "options"), INVARIANT, ids=str)
def test_the_order_does_not_matter_where_a_method_claims_so(name: str, options: dict[str, Any], setting: Any) -> None:
    assert claims(name, options)
    first, counts = final(name, options, setting, (0, 1, 2))
    for order in ((2, 0, 1), (1, 2, 0)):
        other, found = final(name, options, setting, order)
        assert torch.equal(first, other)
        assert counts == found


@pytest.mark.records  # only whether two results differ at all
@pytest.mark.parametrize("name", [name for name in METHODS if (name, {}) not in INVARIANT])
def test_the_order_matters_where_a_method_does_not_claim_otherwise(name: str) -> None:
    first = life(name)
    assert not first.method.order_invariant, "a claim is tested: add the method to INVARIANT"
    x = eval_rows(first.stream)
    expected = logits(first.method, x, 0)

    def differs(order: tuple[int, ...]) -> bool:
        return not torch.equal(expected, logits(life(name, "cil", order).method, x, order.index(0)))

    natural = (final(name, {}, "cil", order)[0] for order in ((0, 1, 2), (2, 0, 1)))
    assert differs((2, 0, 1)) or differs((1, 2, 0)) or not torch.equal(*natural)


@cache
def finetuned() -> dict[str, Any]:
    """Return the state of `method=finetune` after its life with the budget of the neutral options."""
    plain, stream = born(small("finetune"), short_stream())
    live(plain, stream, budget=NEUTRAL_BUDGET())
    return state(plain)


@pytest.mark.parametrize(("name", "options"), NEUTRAL, ids=str)
def test_neutral_option_is_finetuning(name: str, options: dict[str, Any]) -> None:
    method, stream = born(small(name, **options), short_stream())
    live(method, stream, budget=NEUTRAL_BUDGET())
    weights, plain = state(method), finetuned()
    assert_same(plain, {key: weights[key] for key in plain})


REPLAY = ("er", "der", "a_gem", "gem", "icarl", "mer", "replay_finetune", "joint")
MEMORY_FREE = ("l2", "ewc", "kfac_ewc", "ncl", "si", "mas", "qr", "blip", "lwf", "ebll", "progress_compress")


@pytest.mark.parametrize("name", [*REPLAY, *MEMORY_FREE])
def test_a_real_option_is_not_finetuning(name: str) -> None:
    plain = life("finetune")
    assert not torch.equal(plain.state["head.weight"], life(name).state["head.weight"])
