"""ER, DER and A-GEM: stored rows, replayed rows, losses and constraints."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Identity, born, context, factory, image_stream, live, row_stream, sgd, trace
from torch import Tensor

from clrun.blocks.params import dot, gradients, select
from clrun.data.split import Batch
from clrun.data.stream import Stream
from clrun.learning.context import Context
from clrun.learning.method import Method
from clrun.running.accounting import state_bytes
from clrun.system.errors import ConfigError
from clrun.system.seeding import seed_all


def plain(name: str, **options: Any) -> tuple[Method, Stream]:
    """Return a linear learner (no augmentation, no dropout, no normalisation) and a stream of three tasks of rows."""
    source = torch.Generator().manual_seed(0)
    y = torch.arange(12) % 2
    tasks = [(torch.randn(12, 5, generator=source) + 2 * t, y + 2 * t) for t in range(3)]
    seed_all(0, "init")
    return factory(name, **options)(Identity(5), 6), row_stream(tasks, 6)


def begun(method: Method, stream: Stream, index: int, **options: Any) -> Context:
    """Return the context of a task that `method` has begun."""
    ctx = context(stream, index, **options)
    seed_all(0, "task", stream.tasks[index].id)
    method.begin_task(stream.tasks[index], ctx)
    return ctx


def first_batch(stream: Stream, index: int, size: int = 6) -> Batch:
    """Return the first rows of a task as `fit` hands them to `loss`."""
    batch = next(iter(stream.tasks[index].train.batches(size)))
    return Batch(batch.x, batch.y, batch.t, batch.i, batch.x)


def described(batch: Batch) -> list[list[int]]:
    """Return label, position and pixels of each row, sorted."""
    return sorted(torch.cat([batch.y[:, None], batch.t[:, None], batch.x.flatten(1).long()], dim=1).tolist())


@pytest.mark.parametrize("epochs", [1, 3])
def test_er_offers_each_row_once_and_stores_it_raw(epochs: int) -> None:
    method, stream = born(factory("er", capacity=1000), image_stream())
    live(method, stream, budget=sgd(epochs=epochs))
    assert method.memory.offered == len(method.memory) == 96
    stored = method.memory.read(torch.arange(96))
    rows = [next(iter(task.train.batches(100, view="raw"))) for task in stream.tasks]
    assert stored.x.dtype == torch.uint8
    assert described(stored) == sorted(line for r in rows for line in described(r))


def test_er_content_does_not_depend_on_what_is_replayed() -> None:
    memories = []
    for size in (0, 3, None):
        method, stream = born(factory("er", capacity=20, replay_size=size), image_stream())
        live(method, stream)
        memories.append(method.memory.read(torch.arange(20)).x)
    assert all(torch.equal(memories[0], other) for other in memories[1:])


def test_er_replays_as_many_rows_as_asked_and_marks_them() -> None:
    method, stream = plain("er", capacity=50, replay_size=4)
    ctx = begun(method, stream, 1)
    first = method.mix(first_batch(stream, 0), ctx)
    assert len(first) == 6, "a row does not meet itself in the step that brings it"
    mixed = method.mix(first_batch(stream, 1), ctx)
    assert mixed.i.tolist() == [0, 1, 2, 3, 4, 5, -1, -1, -1, -1]
    assert mixed.t.tolist() == [1] * 6 + [0] * 4
    ctx.progress.epoch = 1
    assert len(method.memory) == 12
    method.mix(first_batch(stream, 1), ctx)
    assert len(method.memory) == 12


def test_er_loss_is_the_mean_over_both_parts_each_row_among_its_own_candidates() -> None:
    method, stream = plain("er", capacity=50, replay_size=4)
    til = Stream(stream.tasks, 6, "til")
    ctx = begun(method, til, 0)
    method.mix(first_batch(til, 0), ctx)
    ctx = begun(method, til, 1)
    mixed = method.mix(first_batch(til, 1), ctx)
    logits = method(mixed.x)
    first = 2 * mixed.t[:, None] + torch.arange(2)  # the classes of each row's task
    own = logits.gather(1, first).log_softmax(1)
    likelihood = own.gather(1, mixed.y[:, None] - first[:, :1])
    torch.testing.assert_close(method.loss(mixed, ctx), -likelihood.mean())


def test_memories_take_the_bytes_the_cards_say() -> None:
    sizes = {}
    for name, options in (("er", {}), ("der", {}), ("a_gem", {})):
        method, stream = born(factory(name, capacity=40, **options), image_stream())
        live(method, stream)
        sizes[name] = state_bytes(method)["memory"]
    assert sizes == {"er": 40 * (64 + 8), "der": 40 * (64 + 8 + 4 * 6), "a_gem": 40 * (64 + 8)}


def der_loss(method: Method, stream: Stream, ctx: Context, index: int) -> Tensor:
    return method.loss(first_batch(stream, index), ctx)


@pytest.mark.parametrize("match", ["fixed", "seen"])
def test_der_logit_term_is_zero_while_the_network_stands_still(match: str) -> None:
    method, stream = plain("der", alpha=1.0, beta=0.0, match=match)
    ctx = begun(method, stream, 0)
    alone = der_loss(method, stream, ctx, 0)
    assert len(method.memory) == 6
    assert torch.equal(der_loss(method, stream, ctx, 0), alone)


def test_der_terms_by_hand() -> None:
    method, stream = plain("der", alpha=0.7, beta=0.4, replay_size=50)
    ctx = begun(method, stream, 0)
    der_loss(method, stream, ctx, 0)
    batch = first_batch(stream, 0)
    old = method(batch.x).detach()
    ctx = begun(method, stream, 1)
    with torch.no_grad():
        method.head.weight.add_(0.1)
    new = first_batch(stream, 1)
    seen = torch.tensor([True] * 4 + [False] * 2)

    def ce(rows: Batch) -> Tensor:
        return F.cross_entropy(method(rows.x).masked_fill(~seen, float("-inf")), rows.y)

    square = (method(batch.x) - old).square()
    expected = ce(new) + 0.7 * square.mean() + 0.4 * ce(batch)
    torch.testing.assert_close(der_loss(method, stream, ctx, 1), expected)


def test_der_seen_compares_only_columns_of_the_time() -> None:
    losses = {}
    for match in ("fixed", "seen"):
        method, stream = plain("der", alpha=1.0, beta=0.0, match=match, replay_size=50)
        der_loss(method, stream, begun(method, stream, 0), 0)
        ctx = begun(method, stream, 1)
        new = first_batch(stream, 1)
        ce = F.cross_entropy(method(new.x)[:, :4], new.y)
        losses[match] = (der_loss(method, stream, ctx, 1) - ce).item()
    # Old rows have not moved in old columns; the new columns, 0 when the rows were stored, are live now.
    assert losses["seen"] == pytest.approx(0, abs=1e-6)
    assert losses["fixed"] > 0.01


def test_der_with_labels_only_is_er_with_separate_batches() -> None:
    der, stream = plain("der", alpha=0.0, beta=1.0, replay_size=6)
    er, _ = plain("er", replay_size=6)
    ctx = begun(der, stream, 0), begun(er, stream, 0)
    der_loss(der, stream, ctx[0], 0)
    er.mix(first_batch(stream, 0), ctx[1])
    mixed = er.mix(first_batch(stream, 0), ctx[1])
    torch.testing.assert_close(der_loss(der, stream, ctx[0], 0), 2 * er.loss(mixed, ctx[1]))


@pytest.mark.parametrize(("store", "offered"), [("first_epoch", 96), ("last_epoch", 96), ("every_epoch", 288)])
def test_der_stores_when_told(store: str, offered: int) -> None:
    method, stream = born(factory("der", store=store), image_stream())
    live(method, stream, budget=sgd(epochs=3))
    assert method.memory.offered == offered


def test_der_stores_logits_from_before_the_update() -> None:
    method, stream = plain("der", capacity=100, store="first_epoch")
    twin, _ = plain("der", capacity=100)
    begun(twin, stream, 0)
    live(method, stream, budget=sgd(epochs=1, batch_size=12), until=1)
    stored = method.memory.read(torch.arange(12))
    torch.testing.assert_close(method.memory.logits[:12], twin(stored.x).detach())


def reference(method: Method, old: Batch, ctx: Context) -> dict[str, Tensor]:
    """Return the gradient of the loss on rows of the memory, each among the candidates of its own task."""
    params = select(method)
    logits = method(old.x).masked_fill(~ctx.mask(old.t), float("-inf"))
    return dict(zip(params, torch.autograd.grad(F.cross_entropy(logits, old.y), list(params.values())), strict=True))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_gem_projects_only_what_would_hurt_the_memory(sign: int) -> None:
    method, stream = plain("a_gem", memory_batch_size=100)
    live(method, stream, until=1)
    ctx = begun(method, stream, 1)
    r = reference(method, method.memory.read(torch.arange(12)), ctx)
    for name, parameter in select(method).items():
        parameter.grad = sign * r[name] + 0.01 * torch.randn_like(parameter)
    before = {name: g.clone() for name, g in gradients(select(method)).items()}
    method.adjust_gradients(ctx)
    after = gradients(select(method))
    if sign > 0:
        assert all(torch.equal(before[name], after[name]) for name in after)
    else:
        assert abs(dot(after, r)) < 1e-5 * dot(r, r)
        assert dot(after, after) > 0


def test_a_gem_missing_gradients_count_as_zero() -> None:
    method, stream = plain("a_gem")
    live(method, stream, until=1)
    ctx = begun(method, stream, 1)
    r = reference(method, method.memory.read(torch.arange(12)), ctx)
    method.head.weight.grad = -r["head.weight"]
    method.head.bias.grad = None
    method.adjust_gradients(ctx)
    assert method.head.bias.grad is not None
    assert abs(dot(gradients(select(method)), r)) < 1e-5 * dot(r, r)


def test_a_gem_memory_pass_leaves_statistics_and_random_numbers_alone() -> None:
    method, stream = born(factory("a_gem"), image_stream())
    live(method, stream, until=1)
    ctx = begun(method, stream, 1)
    method.train()
    statistics, numbers = method.backbone.norm.running_mean.clone(), torch.get_rng_state()
    method.adjust_gradients(ctx)
    assert torch.equal(statistics, method.backbone.norm.running_mean)
    assert torch.equal(numbers, torch.get_rng_state())
    assert method.backbone.norm.training


@pytest.mark.parametrize("memory", ["ring", "class_balanced"])
def test_a_gem_memory_rules(memory: str) -> None:
    method, stream = plain("a_gem", capacity=18, memory=memory)
    seen = trace(lambda m: m.memory.read(torch.arange(len(m.memory))).t.tolist(), method, stream)
    assert set(seen[0]) == {0}, "a task enters the memory when it ends"
    assert [seen[2].count(t) for t in range(3)] == [6, 6, 6]


def test_a_gem_refuses_a_ring_without_a_row_for_each_task() -> None:
    method, stream = plain("a_gem", capacity=2, memory="ring")
    with pytest.raises(ConfigError, match=r"method.capacity=2: a ring needs .* 3 tasks"):
        begun(method, stream, 0)
