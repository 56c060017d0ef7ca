"""SD-LoRA: directions and magnitudes, their norms, what happens at a boundary, ranks, and pairs that are dropped."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from helpers import assert_same, born, context, factory, image_stream, live, sgd, tiny_vit
from torch import Tensor

from clrun.blocks.lora import LinearLoRA
from clrun.data.stream import Stream
from clrun.learning.context import Context
from clrun.methods.sd_lora import Directions
from clrun.system.errors import ConfigError
from clrun.system.seeding import seed_all

PLAIN = partial(sgd, momentum=0.0)


def begun(learned: int, name: str = "sd_lora", **options: Any) -> tuple[Any, Context]:
    """Return a method that has learned some tasks and begun the next one."""
    method, stream = born(factory(name, **({"rank": 3} | options)), image_stream())
    live(method, stream, until=learned, budget=PLAIN()) if learned else None
    ctx = context(stream, learned, budget=PLAIN())
    begin(method, stream, learned)
    return method, ctx


def begin(method: Any, stream: Stream, position: int) -> None:
    seed_all(0, "task", position)
    method.begin_task(stream.tasks[position], context(stream, position))


def features(method: Any, stream: Stream) -> Tensor:
    method.eval()
    with torch.inference_mode():
        return method.features(torch.cat([b.x for task in stream.tasks for b in task.test.batches(100)]))


def linear(down: list[list[float]], up: list[list[float]]) -> LinearLoRA:
    update = LinearLoRA(len(down[0]), len(up), len(down))
    with torch.no_grad():
        update.down.copy_(torch.tensor(down))
        update.up.copy_(torch.tensor(up))
    return update


def settled(*updates: LinearLoRA, norm: Any = "factors") -> Directions:
    """Return a sum of directions of unit magnitudes, all of them finished."""
    alphas = torch.nn.ParameterList()
    total = Directions(alphas, 1)
    for update in updates:
        alphas.append(torch.nn.Parameter(torch.tensor(1.0)))
        total.begin(alphas)
        total.updates.append(update)
        total.inverse[-1] = 1 / total.norms(norm).detach()
    return total


def test_directions_equal_worked_numbers() -> None:
    direction = settled(linear([[1, 2, 2]], [[3], [4]])).delta()
    expected = [[0.2, 0.4, 0.4], [0.2666667, 0.5333333, 0.5333333]]
    torch.testing.assert_close(direction, torch.tensor(expected))
    torch.testing.assert_close(direction.norm(), torch.tensor(1.0))
    unit = [[1.0, 0.0], [0.0, 1.0]]
    for norm, length in (("factors", 0.7071068), ("product", 1.0)):
        torch.testing.assert_close(settled(linear(unit, unit), norm=norm).delta().norm(), torch.tensor(length))


def test_the_first_task_is_lora_with_a_trained_scale() -> None:
    ends = []
    for name, options in (("sd_lora", {"magnitude": 0.8}), ("lora", {"scale": 0.8})):
        method, ctx = begun(0, name, **options)
        seed_all(0, "step")
        ctx = context(ctx.stream, 0, budget=PLAIN(), max_steps=1)
        method.learn(ctx.task, ctx)
        ends.append(method)
    for ours, plain in zip(ends[0].newest().values(), ends[1].newest().values(), strict=True):
        torch.testing.assert_close(ours.up, plain.up, rtol=1e-5, atol=1e-7)
        assert torch.equal(ours.down, plain.down) and ours.up.any()
    assert float(ends[0].magnitudes[0].detach()) == pytest.approx(0.8), "with B = 0 its gradient is 0"


def test_directions_stand_still_while_magnitudes_move_and_begin_anew() -> None:
    method, ctx = begun(2, magnitude=0.7)
    assert [float(a.detach()) for a in method.magnitudes] == pytest.approx([0.7] * 3)
    assert sum(p.numel() for g in method.trainable() for p in g["params"]) == 4 * 4 * 32 * 3 + 3 + 6 * 33
    frozen = {n: p for n, p in method.sums.named_parameters() if not p.requires_grad}
    before = {n: p.detach().clone() for n, p in frozen.items()}
    inverse = [total.inverse.clone() for total in method.directions()]
    method.learn(ctx.task, ctx)
    assert len(frozen) == 2 * 4 * 2
    assert_same(before, {n: p.detach() for n, p in frozen.items()})
    assert all(torch.equal(a, t.inverse) for a, t in zip(inverse, method.directions(), strict=True))
    assert all(float(a.detach()) != pytest.approx(0.7, abs=1e-7) for a in method.magnitudes)


@pytest.mark.parametrize("norm", ["factors", "product"])
def test_old_directions_have_unit_norm_whatever_the_size_of_their_pair(norm: str) -> None:
    found = []
    for factor in (1.0, 5.0):
        method, stream = born(factory("sd_lora", rank=3, norm=norm), image_stream())
        live(method, stream, until=1)
        with torch.no_grad():
            for update in method.newest().values():
                update.up.mul_(factor)
        begin(method, stream, 1)
        found.append(features(method, stream))
        for total in method.directions():
            (down, up), scale = total.updates[0].factors(), total.inverse[0]
            length = (up @ down).flatten(1).norm(dim=1) * scale
            assert (length < 0.95).all() if norm == "factors" else ((length - 1).abs() < 1e-5).all()
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_carried_magnitudes_keep_the_function_at_a_boundary_and_new_ones_do_not() -> None:
    for carry in (True, False):
        method, stream = born(factory("sd_lora", rank=3, carry=carry), image_stream())
        for position in range(2):
            live(method, stream, learned=position, until=position + 1)
            learned = [float(a.detach()) for a in method.magnitudes]
            before = features(method, stream)
            begin(copy_of := copy.deepcopy(method), stream, position + 1)
            after = features(copy_of, stream)
            assert torch.allclose(before, after, rtol=1e-4, atol=1e-5) == carry
            if carry:
                values = [float(a.detach()) for a in copy_of.magnitudes]
                assert values[:position] == pytest.approx(learned[:position]) and values[-1] == pytest.approx(0.8)


def test_magnitudes_of_zero_are_the_plain_model() -> None:
    method, ctx = begun(2)
    with torch.no_grad():
        for alpha in method.magnitudes:
            alpha.zero_()
    vit = method.backbone
    x = next(ctx.stream.tasks[0].test.batches(8)).x
    with torch.inference_mode():
        assert torch.equal(method.eval().features(x), vit(x))


def test_a_task_without_training_has_no_direction() -> None:
    method, stream = born(factory("sd_lora", rank=3), image_stream())
    live(method, stream, until=1, budget=sgd(lr=0.0))
    begin(method, stream, 1)
    assert all(not total.inverse[0].any() for total in method.directions())
    assert features(method, stream).isfinite().all()


def test_ranks_fall_in_later_tasks() -> None:
    method, stream = born(factory("sd_lora", rank=5, later_ranks=[[2, 2], [1, 3]]), image_stream())
    live(method, stream)
    assert [update.down.shape[1] for update in method.by_path()["blocks.0.attn.qkv"]] == [5, 3, 2]
    assert [method.rank_of(position) for position in (0, 1, 2, 9)] == [5, 3, 2, 2]
    with pytest.raises(ConfigError, match=r"^method\.later_ranks: \[4\] is no pair"):
        factory("sd_lora", later_ranks=[[4]])(tiny_vit(), 6)


def test_a_dependent_direction_is_dropped_without_a_change() -> None:
    torch.manual_seed(0)
    first, second = (linear(torch.randn(2, 5).tolist(), torch.randn(4, 2).tolist()) for _ in range(2))
    matrix = 0.3 * first.delta() - 2 * second.delta()
    u, s, v = torch.linalg.svd(matrix.detach())
    third = linear((s[:4, None] * v[:4]).tolist(), u[:, :4].tolist())
    total = settled(first, second, third)
    with torch.no_grad():
        for alpha, value in zip(total._magnitudes[0], (0.5, -1.0, 2.0), strict=True):
            alpha.fill_(value)
    before = total.delta().detach()
    assert total.drop_if_dependent(9e-4)
    torch.testing.assert_close(total.delta().detach(), before, rtol=1e-5, atol=1e-5)
    assert len(total.updates) == 2 and total.mix.shape == (3, 2, 1)
    other = settled(first, second, linear(torch.randn(2, 5).tolist(), torch.randn(4, 2).tolist()))
    assert not other.drop_if_dependent(9e-4) and len(other.updates) == 3


def test_a_life_with_dropped_pairs_goes_on() -> None:
    method, stream = born(factory("sd_lora", rank=2, merge_below=10.0), image_stream())
    journal = live(method, stream)
    logged = [record for record in journal.logged if record.get("phase") == "merge"]
    assert [(record["dropped"], record["layers"]) for record in logged] == [(0, 4), (4, 4)]
    assert [len(total.updates) for total in method.directions()] == [2] * 4 and len(method.magnitudes) == 3
