"""GEM, MER and DGC: the constraints and formulas that their gradients and steps satisfy."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Identity, born, context, factory, image_stream, live, row_stream, sgd
from torch import Tensor

from clrun.blocks.params import flatten, gradients, select
from clrun.data.split import Batch
from clrun.data.stream import Stream
from clrun.learning.budget import Budget
from clrun.learning.context import Context
from clrun.learning.method import Method
from clrun.methods.mer import _Sequences
from clrun.running.accounting import state_bytes
from clrun.system.errors import ConfigError
from clrun.system.seeding import seed_all


def plain(
    name: str, *, setting: Any = "cil", rows: Iterable[int] = (12, 6, 12), **options: Any
) -> tuple[Method, Stream]:
    """Return a linear learner and a stream of three tasks of rows, of unequal length."""
    source = torch.Generator().manual_seed(0)
    tasks = []
    for k, n in enumerate(rows):
        tasks.append((torch.randn(n, 5, generator=source) + 2 * k, torch.arange(n) % 2 + 2 * k))
    seed_all(0, "init")
    return factory(name, **options)(Identity(5), 6), row_stream(tasks, 6, setting)


def begun(method: Method, stream: Stream, index: int, **options: Any) -> Context:
    """Return the context of a task that `method` has begun."""
    ctx = context(stream, index, **options)
    seed_all(0, "task", stream.tasks[index].id)
    method.begin_task(stream.tasks[index], ctx)
    return ctx


def loss_gradient(method: Method, batch: Batch, ctx: Context, weight: Tensor | None = None) -> Tensor:
    """Return the gradient [P] of the mean cross-entropy of prepared rows, each among the candidates of its task."""
    params = list(select(method).values())
    terms = F.cross_entropy(method(batch.x).masked_fill(~ctx.mask(batch.t), float("-inf")), batch.y, reduction="none")
    mean = terms.mean() if weight is None else (terms * weight).sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(mean, params)])


# --- GEM


@pytest.mark.parametrize("setting", ["cil", "til"])
@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_gem_step_hurts_no_earlier_task(setting: str, margin: float) -> None:
    method, stream = plain("gem", setting=setting, capacity=30, margin=margin)
    live(method, stream, until=2)
    ctx = begun(method, stream, 2)
    references = []
    for task in range(2):
        slots = (method.memory.t[: len(method.memory)] == task).nonzero()[:, 0]
        references.append(loss_gradient(method, method.memory.read(slots), ctx))
    against = -(references[0] + 2 * references[1])
    position = 0
    for parameter in select(method).values():
        parameter.grad = against[position : position + parameter.numel()].view_as(parameter).clone()
        position += parameter.numel()
    method.adjust_gradients(ctx)
    after = flatten(gradients(select(method)))
    for reference in references:
        assert torch.dot(after, reference) > -1e-5 * reference.norm() * against.norm()
    assert not torch.allclose(after, against)


def test_gem_leaves_a_gradient_that_hurts_nobody() -> None:
    method, stream = plain("gem", capacity=30)
    live(method, stream, until=1)
    ctx = begun(method, stream, 1)
    slots = torch.arange(len(method.memory))
    reference = loss_gradient(method, method.memory.read(slots), ctx)
    position = 0
    for parameter in select(method).values():
        parameter.grad = reference[position : position + parameter.numel()].view_as(parameter).clone()
        position += parameter.numel()
    method.adjust_gradients(ctx)
    assert torch.equal(flatten(gradients(select(method))), reference)


def test_gem_with_one_constraint_is_a_gem() -> None:
    ends = {}
    for name, options in (("gem", {"margin": 0.0}), ("a_gem", {"memory_batch_size": 1000})):
        method, stream = plain(name, capacity=30, memory="ring", **options)
        live(method, stream, until=2, budget=sgd(momentum=0.0, lr=0.3, epochs=4))
        ends[name] = method.head.weight.detach()
    free, stream = plain("finetune")
    live(free, stream, until=2, budget=sgd(momentum=0.0, lr=0.3, epochs=4))
    torch.testing.assert_close(ends["gem"], ends["a_gem"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(free.head.weight, ends["gem"], atol=1e-3)


def test_gem_clips_before_it_projects() -> None:
    method, stream = plain("gem", capacity=30, margin=0.5)
    live(method, stream, until=1)
    ctx = begun(method, stream, 1, budget=sgd(clip_norm=0.01))
    reference = loss_gradient(method, method.memory.read(torch.arange(len(method.memory))), ctx)
    position = 0
    for parameter in select(method).values():
        parameter.grad = -reference[position : position + parameter.numel()].view_as(parameter)
        position += parameter.numel()
    method.adjust_gradients(ctx)
    after = flatten(gradients(select(method)))
    # g shrinks to length 0.01, then the margin and the constraint decide: the step goes along the reference.
    expected = 0.5 * reference - 0.01 * reference / reference.norm()
    torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-5)


def test_gem_memory_is_a_ring_of_each_task() -> None:
    method, stream = born(factory("gem", capacity=30), image_stream())
    live(method, stream)
    assert method.memory.t.bincount().tolist() == [10, 10, 10]
    assert state_bytes(method)["memory"] == 30 * (64 + 8)
    assert [len(method._slots(k, context(stream, 2))) for k in range(3)] == [10, 10, 10]
    method.memory_batch_size = 4
    assert [len(method._slots(k, context(stream, 2))) for k in range(3)] == [4, 4, 4]


def test_a_ring_too_small_is_refused_before_anything_is_written() -> None:
    for name in ("gem", "a_gem"):
        method, stream = plain(name, capacity=2, memory="ring")
        with pytest.raises(ConfigError, match=r"method.capacity=2: a ring needs a row for each of 3 tasks"):
            method.check(stream)


# --- MER


def plain_sgd(lr: float = 0.05, **options: Any) -> Budget:
    return Budget(partial(torch.optim.SGD, lr=lr), **({"epochs": 1, "batch_size": 7} | options))


@pytest.mark.parametrize("algorithm", [1, 6, 7])
def test_mer_all_the_way_without_memory_is_online_sgd(algorithm: int) -> None:
    options = {"algorithm": algorithm, "sequences": 1, "draws": 0, "beta": 1.0, "gamma": 1.0}
    budget = sgd(momentum=0.9, weight_decay=1e-3, batch_size=1)
    mer, stream = born(factory("mer", **options), image_stream())
    live(mer, stream, budget=sgd(momentum=0.9, weight_decay=1e-3, batch_size=10))
    online, _ = born(factory("finetune"), image_stream())
    live(online, image_stream(), budget=budget)
    for name, value in online.state_dict().items():
        assert torch.equal(value, mer.state_dict()[name]), name


@pytest.mark.parametrize("options", [{"algorithm": 1, "beta": 0.0}, {"algorithm": 6, "gamma": 0.0}], ids=str)
def test_mer_that_goes_no_way_does_not_move(options: dict[str, Any]) -> None:
    method, stream = plain("mer", draws=2, sequences=2, **options)
    ctx = begun(method, stream, 0)
    before = flatten(select(method)).detach().clone()
    method.learn(stream.tasks[0], ctx)
    assert torch.equal(flatten(select(method)), before)
    assert len(method.memory) == 12


def sequence_of(method: Method, stream: Stream, index: int) -> list[Batch]:
    ctx = begun(method, stream, index)
    incoming = next(iter(stream.tasks[index].train.batches(1, view="raw")))
    return method.steps_of(incoming, ctx)


@pytest.mark.parametrize(("algorithm", "place"), [(1, 0), (6, 3)])
def test_mer_place_of_the_incoming_row(algorithm: int, place: int) -> None:
    method, stream = plain("mer", draws=3, algorithm=algorithm, sequences=2)
    live(method, stream, until=1, budget=plain_sgd())
    steps = sequence_of(method, stream, 1)
    assert len(steps) == {1: 8, 6: 4}[algorithm]
    assert [len(b) for b in steps] == [1] * len(steps)
    for start in range(0, len(steps), 4):
        assert [int(b.i) >= 0 for b in steps[start : start + 4]] == [k == place for k in range(4)]
    assert method.memory.offered == 13, "the row itself comes into the memory once its steps are drawn"


def test_mer_weighs_the_incoming_row_in_algorithm_7() -> None:
    method, stream = plain("mer", draws=3, algorithm=7, sequences=5)
    live(method, stream, until=1, budget=plain_sgd())
    places = [[int(b.i) >= 0 for b in sequence_of(method, stream, 1)].index(True)]
    ctx = begun(method, stream, 1)
    incoming = next(iter(stream.tasks[1].train.batches(1, view="raw")))
    places += [[int(b.i) >= 0 for b in method.steps_of(incoming, ctx)].index(True) for _ in range(40)]
    assert set(places) == {0, 1, 2, 3}
    old = method.memory.read(torch.tensor([0]))
    plain_loss = {int(b.i): F.cross_entropy(method(b.x)[:, :4], b.y) for b in (incoming, old)}
    torch.testing.assert_close(method.loss(incoming, ctx), 5 * plain_loss[0])
    torch.testing.assert_close(method.loss(old, ctx), plain_loss[-1])


def displacement(lr: float) -> tuple[Tensor, Tensor]:
    """Return where a sequence of single steps ends, and where one batched step ends, both from the origin."""
    method, stream = plain("mer", draws=4, algorithm=6, gamma=1.0, rows=(12, 1, 1))
    method, stream = method.double(), row_stream([(t.train.images.double(), t.train.labels) for t in stream.tasks], 6)
    live(method, stream, until=1, budget=plain_sgd(lr=0.01))
    ctx = begun(method, stream, 1, budget=plain_sgd(lr=lr))
    start = flatten(select(method)).detach().clone()
    twin, _ = plain("mer", draws=4, algorithm=6, gamma=1.0, rows=(12, 1, 1))
    memory = method.memory.draw(4, context(stream, 1).generator("replay", 0))
    batch = Batch.cat(next(iter(stream.tasks[1].train.batches(1))), method.memory.read(memory))
    total = 5 * loss_gradient(method, batch, ctx)
    method.learn(stream.tasks[1], ctx)
    return flatten(select(method)).detach() - start, -lr * total


def test_mer_differs_from_a_batched_step_at_second_order() -> None:
    gaps = []
    for lr in (1e-4, 2e-4):
        moved, batched = displacement(lr)
        gaps.append((moved - batched).norm())
        assert gaps[-1] < 0.01 * batched.norm()
    assert gaps[1] / gaps[0] == pytest.approx(4, rel=0.01)


def test_mer_by_hand() -> None:
    # Algorithm 1 with two sequences of the row alone: each goes half the way, and so does the whole.
    options = {"algorithm": 1, "sequences": 2, "draws": 0, "beta": 0.5, "gamma": 0.5}
    method, stream = plain("mer", rows=(1, 1, 1), **options)
    ctx = begun(method, stream, 0, budget=plain_sgd(lr=0.1))
    row = next(iter(stream.tasks[0].train.batches(1)))
    start = flatten(select(method)).detach().clone()
    twin, _ = plain("mer", rows=(1, 1, 1), **options)
    begun(twin, stream, 0)
    for _ in range(2):
        step = 0.5 * 0.1 * loss_gradient(twin, row, ctx)
        position = 0
        with torch.no_grad():
            for parameter in select(twin).values():
                parameter -= step[position : position + parameter.numel()].view_as(parameter)
                position += parameter.numel()
    expected = start + 0.5 * (flatten(select(twin)).detach() - start)
    method.learn(stream.tasks[0], ctx)
    torch.testing.assert_close(flatten(select(method)).detach(), expected)


def test_mer_counts_steps_and_keeps_each_row_once() -> None:
    method, stream = born(factory("mer", draws=2, capacity=1000), image_stream())
    assert live(method, stream, budget=plain_sgd(epochs=2)).steps == 2 * 96 * 3
    assert method.memory.offered == len(method.memory) == 96
    method, stream = born(factory("mer", draws=2, chunk=5, capacity=40), image_stream())
    assert live(method, stream, budget=plain_sgd()).steps == 3 * 7 * 3
    assert state_bytes(method)["memory"] == 40 * (64 + 8)
    rows = _Sequences(stream.tasks[0].train, method, context(stream))
    assert len(rows) == 7 * 3 * 5


def test_mer_refuses_processes_without_a_row() -> None:
    method, stream = plain("mer")
    ctx = context(stream)
    ctx.hardware.world = 2
    with pytest.raises(ConfigError, match=r"method.chunk=1: less than one row per process"):
        method.begin_task(stream.tasks[0], ctx)


# --- DGC


def calibrated(index: int = 2, **options: Any) -> tuple[Method, Stream, Context]:
    """Return a method whose memory holds everything, in its last task."""
    options = {"zeta": 1.0, "period": 1, "memory_batch_size": None, "host": {"capacity": 1000}} | options
    method, stream = plain("dgc", setting="til", **options)
    live(method, stream, until=index, budget=sgd(momentum=0.0))
    return method, stream, begun(method, stream, index)


def past_gradient(method: Method, stream: Stream, ctx: Context) -> Tensor:
    """Return the gradient [P] of the mean over earlier tasks of their mean losses."""
    parts = [next(iter(task.train.batches(100))) for task in stream.tasks[: ctx.task.index]]
    return torch.stack([loss_gradient(method, batch, ctx) for batch in parts]).mean(dim=0)


def test_dgc_with_everything_in_memory_knows_the_past_gradient() -> None:
    method, stream, ctx = calibrated()
    for step in range(5):
        ctx.progress.step = step
        with torch.no_grad():
            for parameter in select(method).values():
                parameter.add_(0.3 * torch.randn_like(parameter))
        torch.testing.assert_close(method._estimate(ctx), past_gradient(method, stream, ctx), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(method.past.gradient, past_gradient(method, stream, ctx), rtol=1e-4, atol=1e-6)


def test_dgc_corrects_nothing_at_the_snapshot() -> None:
    method, _, ctx = calibrated(memory_batch_size=3)
    now = flatten(select(method)).detach()
    assert (method._difference(now, ctx) != 0).any()
    method.past.snapshot = now.clone()
    assert not method._difference(now, ctx).any()


@pytest.mark.parametrize("mode", ["svrg", "released"])
def test_dgc_adds_the_estimate_to_every_gradient(mode: str) -> None:
    method, _, ctx = calibrated(mode=mode, period=1000, zeta=0.5)
    before, total = method.past.gradient.clone(), method.past.total.clone()
    difference = method._difference(flatten(select(method)).detach(), ctx)
    method.head.weight.grad = torch.ones_like(method.head.weight)
    method.head.bias.grad = None
    method.adjust_gradients(ctx)
    estimate = before + difference if mode == "svrg" else before
    expected = 0.5 * estimate + torch.cat([torch.ones(30), torch.zeros(6)])
    torch.testing.assert_close(flatten(gradients(select(method))), expected)
    assert torch.equal(method.past.gradient, before)
    torch.testing.assert_close(method.past.total, total + difference if mode == "released" else total)


def test_dgc_as_released_moves_its_history_every_period() -> None:
    method, _, ctx = calibrated(mode="released", period=2)
    history, snapshot, total = method.past.gradient.clone(), method.past.snapshot.clone(), torch.zeros(36)
    for step in range(2):
        ctx.progress.step = step
        with torch.no_grad():
            method.head.weight.add_(0.1)
        now = flatten(select(method)).detach().clone()
        total = total + method._difference(now, ctx)
        assert torch.equal(method.past.snapshot, snapshot)
        assert torch.equal(method._estimate(ctx), history if step == 0 else method.past.gradient)
    torch.testing.assert_close(method.past.gradient, history + total / (2 * 3))
    assert torch.equal(method.past.snapshot, now)
    assert not method.past.total.any()


HOSTS = {
    "er": {"capacity": 20},
    "der": {"_target_": "clrun.methods.der.Der", "capacity": 20, "alpha": 0.5, "beta": 0.5, "store": "last_epoch"}
    | {"match": "fixed"},
}


@pytest.mark.parametrize("host", HOSTS)
def test_dgc_without_weight_is_its_host(host: str) -> None:
    budget = sgd(momentum=0.9, weight_decay=1e-3)
    options = {name: value for name, value in HOSTS[host].items() if name != "_target_"}
    alone, stream = born(factory(host, **options), image_stream())
    live(alone, stream, budget=budget)
    ends = {}
    for zeta in (0.0, 0.1):
        method, stream = born(factory("dgc", zeta=zeta, host=HOSTS[host]), image_stream())
        live(method, stream, budget=budget)
        ends[zeta] = flatten(select(method)).detach()
        size = len(ends[zeta])
        assert state_bytes(method).get("past", 0) == (3 * size * 4 if zeta else 0)
        assert state_bytes(method)["host"] - state_bytes(alone)["memory"] <= 3 * 6
    assert torch.equal(ends[0.0], flatten(select(alone)))
    assert not torch.equal(ends[0.1], ends[0.0])


def test_dgc_refuses_a_host_without_memory() -> None:
    with pytest.raises(ConfigError, match=r"method.host: Finetune has no memory"):
        from clrun.methods.dgc import Dgc
        from clrun.methods.finetune import Finetune

        Dgc(
            Identity(5),
            6,
            host=partial(Finetune, compete="seen"),
            zeta=1.0,
            mode="svrg",
            period=1,
            memory_batch_size=None,
        )
