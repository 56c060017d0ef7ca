"""LwF, EBLL and PAD: losses that keep a network near its former outputs, codes and attention maps."""

from functools import partial
from typing import Any

import pytest
import torch
from helpers import Net, born, context, factory, image_stream, live, sgd, tiny_vit, trace
from torch import Tensor

from clrun.blocks.distillation import (
    Teacher,
    attention_scores,
    code_loss,
    distillation_loss,
    head_groups,
    pooled,
    pooled_distance,
)
from clrun.blocks.params import flatten, select
from clrun.data.split import Batch
from clrun.data.stream import Stream
from clrun.learning.budget import Budget
from clrun.learning.method import Method
from clrun.running.accounting import state_bytes
from clrun.system.errors import ConfigError
from clrun.system.seeding import seed_all

POOLS = ("height", "width", "spatial", "gap", "pixel")
MEMBERS = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0]]).bool()


def weights(method: Method) -> Tensor:
    """Return all trainable weights [P]."""
    return flatten(select(method)).detach().clone()


def second_task(name: str, setting: str = "til", **options: Any) -> tuple[Method, Stream, Any, Batch]:
    """Return a method that has begun its second task, unchanged since the first, in eval mode, and a batch."""
    method, stream = born(factory(name, **options), image_stream(setting, augment=()))
    live(method, stream, until=1)
    ctx = context(stream, 1)
    method.begin_task(stream.tasks[1], ctx)
    batch = next(iter(stream.tasks[1].train.batches(12)))
    return method.eval(), stream, ctx, batch


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("per_head", [True, False])
def test_distillation_by_hand(per_head: bool) -> None:
    now, then, tau = rows(0, 5, 6), rows(1, 5, 6), 3.0
    groups = head_groups(MEMBERS, per_head=per_head)
    expected = 0.0
    for columns in (slice(0, 2), slice(2, 4)) if per_head else (slice(0, 4),):
        # p^(1 / tau), renormalised, as published
        p, q = (z[:, columns].softmax(1) ** (1 / tau) for z in (then, now))
        p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
        expected += (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(distillation_loss(now, then, groups, tau=tau), expected)


def test_heads_of_different_sizes_add_up() -> None:
    now, then = rows(0, 5, 6), rows(1, 5, 6)
    heads = [torch.tensor(classes) for classes in ([0, 1], [2, 3, 4], [1, 5])]
    alone = [distillation_loss(now, then, [head], tau=2.0) for head in heads]
    torch.testing.assert_close(distillation_loss(now, then, heads, tau=2.0), sum(alone))


def test_distillation_has_no_gradient_where_both_agree() -> None:
    now = rows(0, 5, 6).requires_grad_(True)
    loss = distillation_loss(now, now.detach().clone(), head_groups(MEMBERS, per_head=True), tau=2.0)
    loss.backward()
    assert loss.item() == 0
    assert now.grad.abs().max() < 1e-7


def test_distillation_ignores_constants_of_a_head() -> None:
    now, then = rows(0, 5, 6), rows(1, 5, 6)
    shift = torch.tensor([3.0, 3.0, -1.0, -1.0, 0.0, 7.0])
    groups = head_groups(MEMBERS, per_head=True)
    plain = distillation_loss(now, then, groups, tau=2.0)
    torch.testing.assert_close(distillation_loss(now + shift, then - 2 * shift, groups, tau=2.0), plain)
    together = head_groups(MEMBERS, per_head=False)
    moved = distillation_loss(now + shift, then, together, tau=2.0)
    assert not torch.isclose(moved, distillation_loss(now, then, together, tau=2.0))


def test_tasks_of_the_same_classes_share_a_head() -> None:
    groups = head_groups(torch.cat([MEMBERS[:1]] * 3), per_head=True)
    assert [g.tolist() for g in groups] == [[0, 1]]


def test_teacher_is_a_frozen_copy_in_eval_mode_outside_of_the_learner() -> None:
    method, _, ctx, batch = second_task("lwf")
    method.train()
    features, logits = method.teacher(batch.x)
    assert not logits.requires_grad
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(1.0)
    assert torch.equal(method.teacher(batch.x)[1], logits)
    torch.testing.assert_close(method.teacher(batch.x[:3])[0], features[:3])  # not the statistics of the batch
    assert not any("teacher" in name for name in method.state_dict())
    method.end_task(ctx.task, ctx)
    assert method.teacher is None


@pytest.mark.parametrize("setting", ["til", "cil", "dil"])
def test_lwf_adds_nothing_before_it_moves(setting: str) -> None:
    method, _, ctx, batch = second_task("lwf", setting, strength=5.0)
    params = list(method.parameters())
    grads = []
    for teacher in (method.teacher, None):
        method.teacher = teacher
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(method.loss(batch, ctx), params)]))
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-6)


def test_lwf_holds_old_outputs() -> None:
    kept = {}
    for strength in (0.0, 3.0):
        method, stream = born(factory("lwf", strength=strength), image_stream("til", augment=()))
        live(method, stream, until=1, budget=sgd(epochs=10))
        x = next(iter(stream.tasks[1].train.batches(100))).x
        before = method.eval()(x)[:, :2].softmax(1)
        live(method, stream, learned=1, until=2, budget=sgd(epochs=10))
        kept[strength] = (method.eval()(x)[:, :2].softmax(1) - before).abs().mean().item()
    assert kept[3.0] < 0.3 * kept[0.0]


def test_lwf_first_task_is_finetuning() -> None:
    ends = []
    for name in ("finetune", "lwf"):
        method, stream = born(factory(name), image_stream())
        live(method, stream, until=1)
        ends.append(weights(method))
    assert torch.equal(*ends)


@pytest.mark.parametrize("setting", ["cil", "til", "dil"])
def test_lwf_warms_up_the_new_rows_alone(setting: str) -> None:
    warmup = sgd(lr=0.5, weight_decay=0.1, epochs=2)
    method, stream = born(factory("lwf"), image_stream(setting))
    method.warmup = warmup
    live(method, stream, until=1)
    ctx = context(stream, 1, budget=sgd(epochs=0))
    method.begin_task(stream.tasks[1], ctx)
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    method.learn(stream.tasks[1], ctx)
    changed = {name for name, tensor in method.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == (set() if setting == "dil" else {"head.weight", "head.bias"})
    moved = (method.head.weight != before["head.weight"]).any(1)
    assert moved.tolist() == [False, False, setting != "dil", setting != "dil", False, False]
    assert all(p.requires_grad and p.grad is None for p in method.parameters())


def test_lwf_current_heads_leave_old_rows_to_the_teacher() -> None:
    method, stream = born(factory("lwf", compete="current", strength=0.0), image_stream("cil"))
    seen = trace(lambda m: m.head.weight[:2].detach().clone(), method, stream)
    assert torch.equal(seen[0], seen[2])


# --- EBLL


def test_ebll_without_codes_is_lwf() -> None:
    ends = []
    for name, options in (("lwf", {}), ("ebll", {"code_strength": 0.0})):
        method, stream = born(factory(name, **options), image_stream())
        live(method, stream)
        ends.append(weights(method))
    assert torch.equal(*ends)
    assert not len(method.encoders)


def test_ebll_codes_stand_still_with_the_trunk() -> None:
    method, _, ctx, batch = second_task("ebll", code_strength=10.0)
    assert len(method.encoders) == 1
    features = method.backbone(batch.x)
    then, _ = method.teacher(batch.x)
    assert code_loss(method.encoders[0](features), method.encoders[0](then)).item() == 0
    with torch.no_grad():
        method.backbone.linear.weight.add_(0.1)
    features = method.backbone(batch.x)
    expected = (method.encoders[0](features) - method.encoders[0](then)).square().sum(1).mean()
    logits = method.head(features)
    term = method.preservation(batch.x, features, logits) - method.distilled(logits, method.teacher(batch.x)[1])
    torch.testing.assert_close(term, 5.0 * expected)
    assert expected > 0


def test_ebll_encoders_are_kept_as_they_were_learned() -> None:
    method, stream = born(factory("ebll"), image_stream())
    seen = trace(lambda m: [flatten(dict(e.named_parameters())).clone() for e in m.encoders], method, stream)
    assert [len(s) for s in seen] == [1, 2, 3]
    assert torch.equal(seen[0][0], seen[2][0]) and torch.equal(seen[1][1], seen[2][1])
    assert state_bytes(method)["encoders"] == 3 * 4 * 100 * (12 + 1)


def test_ebll_autoencoder_keeps_what_the_head_reads() -> None:
    method, stream = born(factory("ebll", code_size=6, alpha=0.1), image_stream(augment=()))
    before = []

    def spy(task: Any, ctx: Any) -> Any:
        before.append({name: tensor.clone() for name, tensor in method.state_dict().items()})
        return original(task, ctx)

    original, method._encoder = method._encoder, spy
    live(method, stream, until=1, budget=sgd(epochs=5))
    after = method.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before[0].items()), "trunk and head are frozen"
    assert all(p.grad is None for p in method.parameters())


# --- PAD


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_equal_maps_have_no_distance_and_a_finite_gradient(pool: str, symmetric: bool) -> None:
    now = rows(0, 4, 3, 5, 5).requires_grad_(True)
    distance = pooled_distance(now, now.detach().clone(), pool=pool, symmetric=symmetric)
    distance.backward()
    assert distance.item() == 0
    assert torch.equal(now.grad, torch.zeros_like(now))


@pytest.mark.parametrize("pool", POOLS)
def test_asymmetric_is_at_most_the_unsquared_symmetric(pool: str) -> None:
    now, then = rows(0, 40, 3, 5, 5), rows(1, 40, 3, 5, 5)
    for i in range(40):
        one = slice(i, i + 1)
        whole = (pooled(then[one], pool) - pooled(now[one], pool)).norm()
        assert pooled_distance(now[one], then[one], pool=pool, symmetric=False) <= whole


def test_nothing_lost_from_positive_maps_means_nothing_changed() -> None:
    # b >= a with equal lengths forces b = a: any change of a softmaxed map loses something.
    now, then = (rows(seed, 40, 3, 5, 5).softmax(-1) for seed in (0, 1))
    for i in range(40):
        assert pooled_distance(now[i : i + 1], then[i : i + 1], pool="pixel", symmetric=False) > 0.01


def test_pooled_by_hand() -> None:
    maps = rows(0, 2, 3, 4, 5)
    flat = {
        "height": maps.sum(2).flatten(1),
        "width": maps.sum(3).flatten(1),
        "gap": maps.mean((2, 3)),
        "pixel": maps.flatten(1),
    }
    for pool, vector in flat.items():
        torch.testing.assert_close(pooled(maps, pool), vector / vector.norm(dim=1, keepdim=True))
    both = pooled(maps, "spatial")
    assert both.shape == (2, 3 * (5 + 4))
    torch.testing.assert_close(both.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_scores_are_those_the_attention_uses(qk_norm: bool) -> None:
    vit = tiny_vit(qk_norm=qk_norm).eval()
    attention = vit.blocks[0].attn
    x = rows(0, 2, 17, 32)
    qkv = attention.qkv(x)
    values = qkv.reshape(2, 17, 3, 4, 8).permute(2, 0, 3, 1, 4)[2]
    answer = (attention_scores(attention, qkv).softmax(-1) @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention.proj(answer), attention(x))


@pytest.mark.parametrize("regularise", ["attention", "functional", "weight"])
def test_vit_pad_without_maps_is_lwf(regularise: str) -> None:
    ends = []
    for name, options in (("lwf", {}), ("vit_pad", {"strength": 3.0, "map_strength": 0.0, "regularise": regularise})):
        stream = image_stream()
        seed_all(0, "init")
        method = factory(name, **options)(tiny_vit(), 6)
        live(method, stream, until=2)
        ends.append(weights(method))
    assert torch.equal(*ends)


@pytest.mark.parametrize("regularise", ["attention", "functional", "weight"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_vit_pad_holds_what_it_regularises(regularise: str, symmetric: bool) -> None:
    options = {"strength": 0.0, "regularise": regularise, "symmetric": symmetric}
    method, _, ctx, batch = second_task("vit_pad", map_strength=1.0, **options)
    plain = method.loss(batch, ctx).item()
    method.map_strength = 0.0
    assert method.loss(batch, ctx).item() == plain, "an unchanged model has no distance"
    method.map_strength = 1.0
    with torch.no_grad():
        for parameter in method.backbone.blocks.parameters():
            parameter.mul_(1 + 0.3 * rows(7, *parameter.shape))
    loss = method.loss(batch, ctx)
    method.map_strength = 0.0
    change = loss - method.loss(batch, ctx)
    assert change > 1e-4
    grads = torch.autograd.grad(loss, list(method.backbone.blocks.parameters()))
    assert all(g.isfinite().all() for g in grads)
    assert not any(module._forward_hooks for module in method.backbone.modules())


def test_vit_pad_distance_by_hand_and_fused_attention_stays_on() -> None:
    method, _, ctx, batch = second_task("vit_pad", strength=0.0, map_strength=2.0, symmetric=False, pool="width")
    assert all(block.attn.fused_attn for block in method.backbone.blocks)
    with torch.no_grad():
        method.backbone.blocks[1].attn.qkv.weight.mul_(1.5)
    maps: dict[str, list[Tensor]] = {"now": [], "then": []}
    for name, network in (("now", method.backbone), ("then", method.teacher.backbone)):
        handles = [
            block.attn.qkv.register_forward_hook(
                lambda m, a, out, block=block, name=name: maps[name].append(attention_scores(block.attn, out))
            )
            for block in network.blocks
        ]
        network(batch.x)
        for handle in handles:
            handle.remove()
    lost = 0.0
    for now, then in zip(maps["now"], maps["then"], strict=True):
        a, b = (m.sum(3).flatten(1) for m in (then, now))
        a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
        lost += (a - b).clamp(min=0).norm(dim=1).mean() / 4
    loss = method.loss(batch, ctx)
    method.map_strength = 0.0
    torch.testing.assert_close(loss - method.loss(batch, ctx), 2 * lost, rtol=1e-4, atol=1e-6)


def test_vit_pad_weights_take_two_numbers_a_weight_and_maps_none() -> None:
    for regularise, expected in (("weight", 2), ("attention", 0)):
        method, stream = born(factory("vit_pad", regularise=regularise), image_stream())
        live(method, stream, until=2)
        numbers = sum(p.numel() for p in method.backbone.parameters())
        assert state_bytes(method).get("penalty", 0) == expected * 4 * numbers
        assert set(state_bytes(method)) <= {"backbone", "head", "penalty", "total"}


def test_vit_pad_needs_a_transformer() -> None:
    with pytest.raises(ConfigError, match="vit_pad needs a vision transformer"):
        factory("vit_pad")(Net(), 6)


def test_budgets_of_phases_are_their_own() -> None:
    method, stream = born(factory("ebll"), image_stream())
    method.warmup = Budget(partial(torch.optim.SGD, lr=0.1), steps=2, batch_size=8)
    method.encoding = Budget(partial(torch.optim.SGD, lr=0.1), steps=3, batch_size=8)
    assert live(method, stream, budget=sgd(steps=5, epochs=None)).steps == (5 + 3) + 2 * (2 + 5 + 3)


def test_teacher_takes_no_part_in_random_numbers() -> None:
    method, stream = born(factory("lwf"), image_stream())
    live(method, stream, until=1)
    numbers = torch.get_rng_state()
    Teacher(method.backbone, method.head)(rows(0, 2, 1, 8, 8))
    assert torch.equal(numbers, torch.get_rng_state())
