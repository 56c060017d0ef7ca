"""CoMA and CoFiMA: limits of the weight of new parameters, Fisher information, averaged heads, running statistics."""

import copy
from typing import Any

import pytest
import torch
from helpers import assert_same, born, context, factory, image_stream, live, sgd, tiny_vit, trace
from torch import Tensor

from clrun.blocks.params import select
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.losses import masked_cross_entropy
from clrun.methods.cofima import Cofima, batch_squared
from clrun.methods.coma import Coma
from clrun.system.seeding import seed_all

BOTH = ("coma", "cofima")


def small(name: str, **options: Any) -> Any:
    options = {"alignment": {"rows_per_class": 8, "budget": {"batch_size": 8}}, "backbone_lr_scale": 1.0} | options
    return factory(name, **options)


def learner(name: str, **options: Any) -> tuple[Any, Any]:
    """Return a method on a vision transformer, which has no running statistics."""
    seed_all(0, "init")
    return small(name, **options)(tiny_vit(), 6), image_stream()


def weights(method: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in method.backbone.named_parameters()}


def stages(method: Any, stream: Any) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Return the backbone after stage 1 and after the average of each task."""
    before, combine = list[dict[str, Tensor]](), method.combine

    def watched(task: Task, ctx: Context) -> None:
        before.append(weights(method))
        combine(task, ctx)

    method.combine = watched
    after = trace(weights, method, stream)
    del method.combine
    return before, after


@pytest.mark.parametrize("name", BOTH)
def test_weight_one_is_slca(name: str) -> None:
    ends = []
    for method, stream in (learner("slca"), learner(name, alpha=1.0)):
        live(method, stream)
        ends.append(method.state_dict())
    assert_same(ends[0], {key: ends[1][key] for key in ends[0]})


@pytest.mark.parametrize("name", BOTH)
def test_weight_zero_keeps_the_backbone_of_the_first_task(name: str) -> None:
    _, after = stages(*learner(name, alpha=0.0))
    assert_same(after[0], after[1])
    assert_same(after[0], after[2])


def test_weight_one_over_t_is_the_arithmetic_mean() -> None:
    before, after = stages(*learner("coma", alpha=None))
    for position in range(3):
        for name, found in after[position].items():
            expected = torch.stack([found_before[name] for found_before in before[: position + 1]]).mean(dim=0)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_an_average_is_that_of_the_formula_and_the_next_task_starts_from_it() -> None:
    for anchor, first in (("previous", None), ("initial", 0)):
        method, stream = learner("coma", alpha=0.3, anchor=anchor)
        initial = weights(method)
        before, after = stages(method, stream)
        for position in range(first if first is not None else 1, 3):
            other = initial if anchor == "initial" else after[position - 1]
            for name, found in after[position].items():
                torch.testing.assert_close(found, 0.3 * before[position][name] + 0.7 * other[name])


@pytest.mark.parametrize("fisher", ["batch_squared", "exact", "sampled", "empirical"])
def test_an_average_weighted_by_fisher_information_is_that_of_the_formula(fisher: str) -> None:
    method, stream = learner("cofima", fisher=fisher, alpha=0.4, samples=12, clip=0.05)
    found: list[dict[str, Tensor]] = []
    own = method.evidence

    def watched(task: Task, ctx: Context) -> Any:
        evidence = own(task, ctx)
        found.append({name: value.clamp(1e-8, 0.05) for name, value in evidence.fisher.items()})
        return evidence

    method.evidence = watched
    before, after = stages(method, stream)
    assert any((f != 1e-8).any() and (f < 0.05).any() for f in found[0].values())
    for position in (1, 2):
        for name, average in after[position].items():
            now, past = 0.4 * found[position][name], 0.6 * found[position - 1][name]
            expected = (now * before[position][name] + past * after[position - 1][name]) / (now + past)
            torch.testing.assert_close(average, expected, rtol=1e-4, atol=1e-6)
            low = torch.minimum(before[position][name], after[position - 1][name])
            high = torch.maximum(before[position][name], after[position - 1][name])
            assert ((low <= average) & (average <= high)).all()


def test_equal_fisher_information_is_the_plain_average() -> None:
    plain, _ = learner("coma", alpha=0.4)
    method, stream = learner("cofima", alpha=0.4, floor=2.0**30, clip=None)
    for a, b in zip(stages(plain, stream)[1], stages(method, stream)[1], strict=True):
        assert_same(a, b)


def test_accumulated_fisher_information_is_the_sum_of_all_earlier_tasks() -> None:
    method, stream = learner("cofima", accumulate=True, alpha=1.0, clip=None)
    single, _ = learner("cofima", alpha=1.0, clip=None)
    summed = trace(lambda m: m.rule.information.clone(), method, stream)
    each = trace(lambda m: m.rule.information.clone(), single, stream)
    torch.testing.assert_close(summed[2], sum(each))


def test_batch_squared_is_the_mean_of_squared_gradients_of_batches_over_all_classes_so_far() -> None:
    method, _ = learner("cofima")
    stream = image_stream(augment=())
    live(method, stream, until=1)
    ctx = context(stream, 1, budget=sgd(batch_size=16))
    method.begin_task(stream.tasks[1], ctx)
    before, mode = copy.deepcopy(method.state_dict()), method.training
    found = batch_squared(method, stream.tasks[1], ctx, samples=None)
    params, total = select(method.backbone), {name: 0 for name in found}
    order = context(stream, 1).generator("fisher")
    batches = list(stream.tasks[1].train.batches(16, view="train", shuffle=order))
    for batch in batches:
        mask = torch.tensor([True] * 4 + [False] * 2)
        loss = masked_cross_entropy(method(batch.x), batch.y, mask)
        for name, grad in zip(params, torch.autograd.grad(loss, list(params.values())), strict=True):
            total[name] = total[name] + grad.square() / len(batches)
    assert len(batches) == 2
    for name, value in found.items():
        torch.testing.assert_close(value, total[name], rtol=1e-4, atol=1e-9)
    assert_same(before, method.state_dict())
    assert method.training == mode and all(p.grad is None for p in method.parameters())
    half = batch_squared(method, stream.tasks[1], ctx, samples=8)
    assert any(not torch.equal(half[name], found[name]) for name in found)


def test_old_rows_of_the_head_are_averaged_with_those_of_the_aligned_head_by_option() -> None:
    starts: dict[bool, list[Tensor]] = {}
    heads: list[Tensor] = []
    for merge in (False, True):
        method, stream = learner("coma", alpha=0.25, merge_heads=merge)
        starts[merge] = []
        align = method.align_head

        def watched(task: Task, ctx: Context, *, method: Any = method, merge: bool = merge, align: Any = align) -> None:
            starts[merge].append(method.head.weight.detach().clone())
            align(task, ctx)
            heads.append(method.head.weight.detach().clone())

        method.align_head = watched
        live(method, stream)
        method.begin_task(stream.tasks[2], context(stream, 2))
        assert torch.equal(method.head.weight[:4], method.unaligned.weight[:4]), "training starts from the plain head"
    plain, merged = starts[False][1], starts[True][1]
    torch.testing.assert_close(merged[:4], 0.25 * plain[:4] + 0.75 * heads[2][:4], rtol=1e-4, atol=1e-5)
    assert torch.equal(merged[4:], plain[4:])


@pytest.mark.parametrize("name", BOTH)
def test_running_statistics_are_those_of_the_averaged_weights_on_the_rows_of_the_task(name: str) -> None:
    method, stream = born(small(name), image_stream(augment=()))
    live(method, stream)
    x = torch.cat([batch.x for batch in stream.tasks[2].train.batches(100)])
    out = method.backbone.conv(x)
    torch.testing.assert_close(method.backbone.norm.running_mean, out.mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert isinstance(method, Cofima if name == "cofima" else Coma)


def test_state_between_tasks_is_that_of_the_formula() -> None:
    for name, copies in (("coma", 1), ("cofima", 2)):
        method, stream = learner(name)
        live(method, stream, until=2)
        size = sum(p.numel() for p in method.backbone.parameters())
        assert method.rule.bytes == 4 * copies * size
        assert method.aligned is None
