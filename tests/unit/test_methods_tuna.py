"""TUNA: fused adapters, the least entropy, cosine heads with a margin, and factors of the public code."""

import copy
import math
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import answers, assert_same, born, context, copies, factory, image_stream, live, rows, sgd, state, trace
from torch import Tensor

from clrun.data.stream import Stream
from clrun.methods.tuna import apart, direction, fuse, inverted_factors, shares, surest
from clrun.running.accounting import parameter_counts
from clrun.system.errors import ConfigError

D, DEPTH, C, T, R = 32, 4, 6, 3, 16
ADAPTER = 2 * D * R + R + D
SHORT: dict[str, Any] = {"rows_per_class": 8, "budget": {"epochs": 2, "batch_size": 8}}


def tuna(setting: Any = "cil", **options: Any) -> tuple[Any, Stream]:
    """Return a method whose adapters are large enough to tell tasks apart, and its stream."""
    return born(factory("tuna", **({"alignment": SHORT, "adapter_scale": 1.0} | options)), image_stream(setting))


def budget(**options: Any) -> Any:
    return sgd(**({"epochs": 1, "weight_decay": 0.01} | options))


@cache
def _lived(setting: str) -> tuple[Any, Stream]:
    method, stream = tuna(setting)
    live(method, stream, budget=budget())
    return method, stream


def lived(setting: str = "cil") -> tuple[Any, Stream]:
    method, stream = _lived(setting)
    return copy.deepcopy(method), stream


GOLDEN = ((0.9, -0.1, 0.5, 0, -0.7), (0.2, 0.8, -0.6, 0.1, -0.3), (-0.4, 0.6, 0.3, -0.2, -0.9))


def sets(*values: tuple[float, ...]) -> list[dict[str, Tensor]]:
    return [{"w": torch.tensor(each)} for each in values]


def test_golden_fusion() -> None:
    assert fuse(sets(*GOLDEN))["w"].tolist() == pytest.approx([0.9, 0.8, 0.5, -0.2, -0.9])
    assert fuse(sets((1.0, -1.0), (-1.0, -2.0)))["w"].tolist() == [-1.0, -2.0], "a mean of 0 elects the negative sign"


def test_fusion_is_idempotent_and_does_not_depend_on_the_order() -> None:
    source = torch.Generator().manual_seed(0)
    found = [{"a": torch.randn(7, generator=source), "b": torch.randn(3, 2, generator=source)} for _ in range(4)]
    assert_same(fuse([found[0]]), found[0])
    assert_same(fuse([found[0]] * 3), found[0])
    whole = fuse(found)
    for order in ((3, 1, 0, 2), (2, 3, 1, 0)):
        assert_same(whole, fuse([found[place] for place in order]))
    for name, value in whole.items():
        inputs = torch.stack([each[name] for each in found])
        assert ((value == inputs).any(dim=0) | (value == 0)).all()
        torch.testing.assert_close(fuse([{name: 4 * e[name]} for e in found])[name], 4 * value)
    assert shares([whole, {k: v + 1 for k, v in whole.items()}], whole) == [1.0, 0.0]


def test_the_universal_adapters_are_fused_of_all_stored_ones_which_stand_still() -> None:
    method, stream = tuna(ortho=0.1)
    found = trace(lambda m: ([copies(a) for a in m.adapters], copies(m.fused)), method, stream, budget=budget())
    for place, (_, fused) in enumerate(found):
        assert_same(fused, fuse(found[place][0]))
        for later, _ in found[place + 1 :]:
            assert_same(found[place][0][place], later[place])
    x, before = rows(stream), state(method)
    assert torch.equal(answers(method, x), answers(method, x))
    assert_same(before, state(method))


def test_an_optimizer_over_all_adapters_would_move_old_ones() -> None:
    """The test above can fail: with weight decay a gradient of zero is enough."""
    method, stream = lived()
    ctx = context(stream, 2, budget=budget())
    old = copies(method.adapters[0])
    method.adapters[0].requires_grad_(True)
    loss, method.loss = (
        method.loss,
        lambda batch, ctx: loss(batch, ctx) + 0 * sum(p.sum() for p in method.adapters[0].parameters()),
    )
    method.adapters[2].requires_grad_(True)
    method.learn(stream.tasks[2], ctx)
    assert not all(torch.equal(p, old[name]) for name, p in method.adapters[0].named_parameters())


def test_trained_parameters() -> None:
    for start in ("previous", "fresh"):
        method, stream = tuna(start=start)
        live(method, stream, until=1, budget=budget())
        method.begin_task(stream.tasks[1], context(stream, 1))
        assert parameter_counts(method)["trainable"] == DEPTH * ADAPTER + C * D
        same = all(map(torch.equal, copies(method.adapters[0]).values(), copies(method.adapters[1]).values()))
        assert same == (start == "previous") and all(p.requires_grad for p in method.adapters[1].parameters())


def test_the_loss_is_the_masked_cross_entropy_of_scaled_cosines_with_a_margin() -> None:
    method, stream = tuna(dropout=0.0)
    live(method, stream, until=2, budget=budget())
    task, ctx = stream.tasks[2], context(stream, 2)
    method.begin_task(task, ctx)
    batch = next(task.train.batches(8))
    f = method.inside(2, batch.x)
    cosine = F.cosine_similarity(f[:, None], method.head.weight[None, 4:], dim=2)
    torch.testing.assert_close(method.loss(batch, ctx), F.cross_entropy(20 * cosine, batch.y - 4), rtol=1e-5, atol=1e-6)
    method.margin = 0.3
    cosine = cosine - 0.3 * F.one_hot(batch.y - 4, 2)
    torch.testing.assert_close(method.loss(batch, ctx), F.cross_entropy(20 * cosine, batch.y - 4), rtol=1e-5, atol=1e-6)
    before = method.loss(batch, ctx)
    method.ortho = 10.0
    ups = [[F.normalize(a.up.weight, dim=1) for a in method.of(place).values()] for place in range(3)]
    term = sum(
        torch.stack([(a @ b.t()).mean().abs() for a, b in zip(ups[2], ups[i], strict=True)]).mean() for i in (0, 1)
    )
    expected = before + 10.0 * math.exp(-3) * term
    torch.testing.assert_close(method.loss(batch, ctx), expected, rtol=1e-5, atol=1e-6)
    assert apart(direction(method.of(0)), method.directions[:0]) == 0


def test_golden_factors_of_the_public_code() -> None:
    found = inverted_factors(torch.tensor([0, 1, 20, 21, 181, 199]), 20, 10)
    assert found.tolist() == pytest.approx([0.91, 0.9, 0.9, 0.89, 0.81, 0.81])


def test_factors_of_the_alignment_follow_the_arrival_of_classes() -> None:
    method, stream = lived()
    assert method.mean_factors(stream.tasks[2]) is None
    method.mean_factor = "inverted"
    expected = inverted_factors(torch.arange(6), 2, 3)
    torch.testing.assert_close(method.mean_factors(stream.tasks[2]), expected)


def test_the_least_entropy_is_found_per_image() -> None:
    sure, flat = [0.97, 0.01, 0.02], [0.3, 0.3, 0.4]
    each = torch.tensor([[flat, sure], [sure, flat], [flat, flat]])
    assert surest(each).tolist() == [1, 0]
    method, stream = lived()
    x = rows(stream)
    alone = torch.cat([method.choices(image[None]) for image in x[::5]])
    assert torch.equal(alone, method.choices(x)[::5])


@pytest.mark.parametrize("universal", ["fused", "newest"])
def test_scores_are_those_of_the_surest_and_of_the_universal_adapters(universal: str) -> None:
    method, stream = lived()
    method.universal = universal
    x = rows(stream)
    found = answers(method, x)
    with torch.inference_mode():
        each = torch.stack([method.head(method.inside(place, x)).softmax(dim=1) for place in range(T)])
        best = each[method.choices(x).argmax(dim=1), torch.arange(len(x))]
        last = method.fused if universal == "fused" else method.of(2)
        expected = (best + method.head(method.with_adapters(last, x)).softmax(dim=1)) / 2
    torch.testing.assert_close(found.exp(), expected, rtol=1e-4, atol=1e-5)
    alone = torch.cat([answers(method, image[None]) for image in x[::6]])
    torch.testing.assert_close(alone, found[::6], rtol=1e-5, atol=1e-5)


def test_the_first_task_is_not_affected_by_fusion() -> None:
    method, stream = tuna()
    live(method, stream, until=1, budget=budget())
    x = rows(stream)
    with torch.inference_mode():
        own = method.head(method.eval().inside(0, x))[:, :2]
    torch.testing.assert_close(answers(method, x)[:, :2], own.log_softmax(dim=1), rtol=1e-4, atol=1e-5)
    assert_same(copies(method.fused), copies(method.adapters[0]))


def test_untrained_adapters_are_the_plain_model_in_every_pass() -> None:
    method, stream = tuna()
    live(method, stream, budget=sgd(epochs=0))
    x = rows(stream)
    with torch.inference_mode():
        plain = method.query(x)
        assert all(torch.equal(method.inside(place, x), plain) for place in range(T))
        assert torch.equal(method.with_adapters(method.fused, x), plain)


def test_a_given_task_scores_with_its_adapters_among_its_classes() -> None:
    method, stream = lived()
    method.needs_task_id = True
    x = rows(stream)
    with torch.inference_mode():
        found = method(x, 1)
        parts = [
            method.head(f)[:, 2:4].softmax(dim=1) for f in (method.inside(1, x), method.with_adapters(method.fused, x))
        ]
    torch.testing.assert_close(found[:, 2:4].exp(), (parts[0] + parts[1]) / 2, rtol=1e-4, atol=1e-5)
    assert not found[:, :2].any() and not found[:, 4:].any() and method.choices(x) is None
    given, _ = tuna(task_id="given")
    with pytest.raises(ConfigError, match=r"^method\.task_id=given: needs the task id"):
        given.check(stream)


def test_classes_of_domains_are_replayed_per_domain() -> None:
    method, stream = lived("dil")
    assert method.gaussians.labels.tolist() == [*range(6)] * 3 and len(method.gaussians.parts) == 3
    assert answers(method, rows(stream)).shape == (len(rows(stream)), C)


def test_the_public_codes_ways_live() -> None:
    method, stream = tuna(universal="newest", mean_factor="inverted", ortho=1e-3, start="fresh")
    live(method, stream, budget=budget())
    assert not len(method.fused) and answers(method, rows(stream)).any()
