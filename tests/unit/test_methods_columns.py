"""BLIP and Progress & Compress: bits, columns, and which weights do not change."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Net, born, context, cpu, factory, image_stream, live, row_stream, sgd, tiny_vit, trace
from torch import Tensor, nn

from clrun.backbones.small import cnn
from clrun.blocks.distillation import distillation_loss
from clrun.blocks.lateral import Lateral, block_paths, block_widths
from clrun.blocks.params import flatten, select
from clrun.methods.blip import BitGrid
from clrun.methods.finetune import Finetune
from clrun.running import checkpoint
from clrun.running.accounting import state_bytes
from clrun.running.checkpoint import RunState
from clrun.system.errors import ConfigError
from clrun.system.seeding import seed_all


def copy_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


# --- BLIP


def two_layers() -> nn.Sequential:
    seed_all(0, "layers")
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))


def informed(net: nn.Module, factor: float, grid: BitGrid) -> dict[str, Tensor]:
    """Return a Fisher information that is a multiple of the mean information of each weight."""
    return {name: factor * info.clone() for name, _, _, _, info in grid.parts(net)}


def test_blip_bits_are_the_information_gain() -> None:
    net = two_layers()
    grid = BitGrid(net, 1e-6, 20)
    grid.update(net, informed(net, 31.0, grid), 0)  # (G + 31 G) / 2 = 16 G: half of log2 is 2
    assert grid.bits.unique().tolist() == [2]
    grid.update(net, informed(net, 1.0, grid), 1)
    assert grid.bits.unique().tolist() == [2], "what is no news brings no bit"
    grid.update(net, informed(net, 0.1, grid), 2)
    grid.update(net, informed(net, 1.01, grid), 3)
    assert grid.bits.unique().tolist() == [3], "any gain is rounded up"
    grid.update(net, informed(net, 1e30, grid), 4)
    assert grid.bits.unique().tolist() == [20]


def test_blip_starts_from_the_prior_of_each_layer_and_leaves_norms_out() -> None:
    net = two_layers()
    grid = BitGrid(net, 1e-3, 20)
    assert list(grid.bounds) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert grid.bounds == pytest.approx({"0.weight": 3.0, "0.bias": 1.0, "2.weight": 6 / 3**0.5, "2.bias": 1.0})
    found = {name: info.unique().item() for name, _, _, _, info in grid.parts(net)}
    assert found == pytest.approx({"0.weight": 4e-3, "0.bias": 4e-3, "2.weight": 3e-3, "2.bias": 3e-3})


def test_blip_quantises_and_bounds_the_movement() -> None:
    net = two_layers()
    grid = BitGrid(net, 1e-6, 20)
    grid.update(net, informed(net, 31.0, grid), 0)
    before = net[0].weight.detach().clone()
    grid.quantise_(net)
    quantum = 3.0 / 4
    torch.testing.assert_close(net[0].weight / quantum, (before / quantum).round(), rtol=0, atol=0)
    assert (net[0].weight - before).abs().max() <= quantum / 2
    anchor = net[0].weight.detach().clone()
    grid.open(net)
    with torch.no_grad():
        net[0].weight.add_(torch.linspace(-9, 9, 12).view(3, 4))
    grid.clamp_(net)
    assert (net[0].weight - anchor).abs().max() <= quantum
    assert net[0].weight.abs().max() < 3.0
    assert (net[0].weight - anchor).abs().max() > 0.9 * quantum


def test_blip_weight_without_a_bit_becomes_zero() -> None:
    net = two_layers()
    grid = BitGrid(net, 1e-6, 20)
    with torch.no_grad():
        net[0].weight.fill_(2.9)  # rounding to the next multiple of u would give u
    grid.quantise_(net)
    assert not net[0].weight.any()
    assert grid.dead() == "0.weight"


@pytest.mark.parametrize("kind", ["net", "vit"])
def test_blip_bits_never_fall_and_weights_keep_within_a_quantum(kind: str) -> None:
    stream = image_stream("til")
    seed_all(0, "init")
    method = factory("blip")(Net() if kind == "net" else tiny_vit(), 6)

    def read(method: Any) -> list[tuple[Tensor, ...]]:
        return [tuple(x.clone() for x in parts[1:4]) for parts in method.grid.parts(method.backbone)]

    seen = trace(read, method, stream, budget=sgd(momentum=0.0, lr=0.1))
    bounds = list(method.grid.bounds.values())
    for before, after in zip(seen, seen[1:], strict=False):
        for u, (old, old_bits, _), (new, new_bits, value) in zip(bounds, before, after, strict=True):
            assert (new_bits >= old_bits).all() and new_bits.max() <= 20
            moved, quantum = (new - old).abs(), u * 2.0 ** -old_bits.float()
            half = u * 2.0 ** -new_bits.float() / 2
            assert (moved <= torch.where(new_bits > 0, quantum + half, u) * 1.0001).all()
            assert torch.equal(new, value)
    assert any((b[1] > 3).any() for b in seen[0])


def test_blip_twenty_bits_leave_a_weight_as_good_as_frozen() -> None:
    method, stream = born(factory("blip", prior=1e-30, labels="exact"), image_stream("til", augment=()))
    live(method, stream, until=1)
    full = [bits == 20 for _, _, bits, _, _ in method.grid.parts(method.backbone)]
    before = [weight.clone() for _, weight, *_ in method.grid.parts(method.backbone)]
    live(method, stream, learned=1)
    for (name, weight, *_), old, held in zip(method.grid.parts(method.backbone), before, full, strict=True):
        assert held.float().mean() > 0.3
        torch.testing.assert_close(weight[held], old[held], rtol=0, atol=4 * method.grid.bounds[name] * 2.0**-20)
        assert (weight[~held] != old[~held]).any() or held.all()


def test_blip_refuses_a_prior_that_nothing_exceeds() -> None:
    method, stream = born(factory("blip", prior=1.0), image_stream())
    with pytest.raises(ConfigError, match=r"method.prior=1: no weight of backbone.conv.weight got a bit"):
        live(method, stream)


@pytest.mark.parametrize("rest", ["train", "freeze_after_first"])
def test_blip_rest(rest: str) -> None:
    method, stream = born(factory("blip", rest=rest), image_stream())
    seen = trace(lambda m: flatten(m.backbone.norm.state_dict()).clone(), method, stream)
    assert torch.equal(seen[0], seen[2]) == (rest == "freeze_after_first")


def test_blip_state_is_nine_bytes_a_weight() -> None:
    method, stream = born(factory("blip"), image_stream())
    live(method, stream)
    protected = sum(p.numel() for name, p in method.backbone.named_parameters() if not name.startswith("norm"))
    assert state_bytes(method)["grid"] == 9 * protected


def test_blip_draws_initial_weights_within_their_bounds() -> None:
    method, stream = born(factory("blip", initial="normal"), image_stream())
    before = method.backbone.linear.weight.detach().clone()
    ctx = context(stream)
    method.begin_task(stream.tasks[0], ctx)
    drawn = method.backbone.linear.weight
    assert not torch.equal(before, drawn)
    assert drawn.std().item() == pytest.approx(54**-0.5, rel=0.1)


# --- Progress & Compress


def begun(index: int = 0, setting: str = "til", **options: Any) -> tuple[Any, Any, Any]:
    """Return a learner of P&C that has begun the task at position `index`."""
    method, stream = born(factory("progress_compress", **options), image_stream(setting, augment=()))
    if index:
        live(method, stream, until=index)
    ctx = context(stream, index)
    seed_all(0, "task", stream.tasks[index].id)
    method.begin_task(stream.tasks[index], ctx)
    return method, stream, ctx


@pytest.mark.parametrize("column", ["reset", "keep"])
def test_progress_leaves_the_knowledge_base_bitwise_alone(column: str) -> None:
    method, stream, ctx = begun(1, column=column)
    method.compress = sgd(epochs=0)
    before = copy_of(method.knowledge_base())
    active = copy_of(method.active)
    method.learn(stream.tasks[1], ctx)
    after = copy_of(method.knowledge_base())
    assert all(torch.equal(before[name], after[name]) for name in before)
    moved = {name for name, tensor in copy_of(method.active).items() if not torch.equal(tensor, active[name])}
    assert {"column.conv.weight", "adaptors.0.alpha", "adaptors.1.down", "head.weight"} <= moved
    assert all(p.requires_grad and p.grad is None for p in method.parameters())


def test_progress_without_lateral_connections_is_independent_training() -> None:
    method, stream, ctx = begun(1, lateral=0.0, strength=5.0)
    alone = Finetune(Net(), 6, compete="seen")
    ctx.hardware.place(alone)
    alone.backbone.load_state_dict(method.initial.state_dict())
    alone.head.load_state_dict(method.active.head.state_dict())
    method.compress = sgd(epochs=0)
    method.learn(stream.tasks[1], ctx)
    ctx = context(stream, 1)
    alone.learn(stream.tasks[1], ctx)
    learned = copy_of(method.active)
    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor, learned[name.replace("backbone.", "column.")]), name


def test_compress_without_penalty_is_pure_distillation() -> None:
    method, stream, ctx = begun(1, strength=0.0, tau=2.0)
    batch = next(iter(stream.tasks[1].train.batches(12)))
    method.eval()
    target = method.active_logits(batch.x, method.backbone).detach()
    now = method(batch.x)
    expected = distillation_loss(now, target, [torch.tensor([2, 3])], tau=2.0)
    p, q = (z[:, 2:4].div(2.0).softmax(1) for z in (target, now))
    torch.testing.assert_close(expected, (p * (p / q).log()).sum(1).mean())
    assert method.compress_loss(batch, target, ctx).item() == expected.item()
    held, _, ctx = begun(1, strength=5.0, tau=2.0, solver="grad")
    with torch.no_grad():
        held.backbone.linear.weight.add_(0.1)
    held.eval()
    penalty = held.penalty(held.knowledge_base())
    plain = distillation_loss(held(batch.x), target, [torch.tensor([2, 3])], tau=2.0)
    assert penalty > 0
    torch.testing.assert_close(held.compress_loss(batch, target, ctx), plain + 5.0 * penalty)


def test_compress_is_stable_for_any_strength() -> None:
    method, _, ctx = begun(1, strength=1e8)
    base = method.knowledge_base()
    before = flatten(dict(base.named_parameters())).detach().clone()
    method.learn(ctx.task, ctx)
    importance = method.penalty.curvature.diag()
    held, free = importance > 1e-3, importance == 0
    moved = (flatten(dict(base.named_parameters())).detach() - before).abs()
    assert held.any()
    assert moved[held].max() < 1e-4
    assert moved[free].max() > 1e-3  # it learned


def test_compress_moves_the_knowledge_base_alone_towards_the_column() -> None:
    method, stream, ctx = begun(0)
    seen = {}

    def spy(batch: Any, target: Tensor, ctx: Any) -> Tensor:
        seen.setdefault("active", copy_of(method.active))
        loss = original(batch, target, ctx)
        seen.setdefault("first", loss.item())
        seen["last"] = loss.item()
        return loss

    original, method.compress_loss = method.compress_loss, spy
    method.compress = sgd(epochs=20, lr=0.02)
    method.learn(stream.tasks[0], ctx)
    after = copy_of(method.active)
    assert all(torch.equal(seen["active"][name], after[name]) for name in after)
    assert seen["last"] < 0.5 * seen["first"]


def test_importance_is_that_of_the_knowledge_base_and_protects_its_head() -> None:
    method, stream = born(factory("progress_compress", normalise="mean"), image_stream("til"))
    live(method, stream, until=1)
    names = set(method.penalty.curvature.shapes)
    assert names == {f"backbone.{n}" for n in select(Net())} | {"head.weight", "head.bias"}
    values = method.penalty.curvature.diag()
    assert values.mean().item() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("column", ["reset", "keep"])
def test_columns_begin_from_where_they_should(column: str) -> None:
    method, stream, ctx = begun(1, column=column)
    seed_all(0, "init")
    fresh = copy_of(Net())
    now = copy_of(method.active.column)
    assert all(torch.equal(fresh[name], now[name]) for name in fresh) == (column == "reset")
    assert method.active.head.initialised.tolist() == [column == "keep"] * 2 + [True, True, False, False]


def test_progress_compress_state() -> None:
    for column in ("reset", "keep"):
        method, stream = born(factory("progress_compress", column=column, bottleneck=4), image_stream("til"))
        live(method, stream)
        sizes = state_bytes(method)
        knowledge = sum(p.numel() for p in (*method.backbone.parameters(), *method.head.parameters()))
        assert sizes["penalty"] == 2 * 4 * knowledge
        backbone = sizes["backbone"]
        if column == "reset":
            assert sizes["initial"] == backbone and "active" not in sizes
        else:
            adaptors = sum(4 * ((2 * 4 + 1) * width + 4) for width in (6, 12))
            assert sizes["active"] == backbone + sizes["head"] + adaptors and "initial" not in sizes


def test_blocks_of_every_kind_of_backbone() -> None:
    assert list(block_paths(tiny_vit())) == [f"blocks.{i}" for i in range(4)]
    assert block_widths(tiny_vit(), torch.zeros(1, 1, 8, 8)) == {f"blocks.{i}": 32 for i in range(4)}
    network = cnn((1, 8, 8), width=8, depth=2)
    assert block_widths(network, torch.zeros(1, 1, 8, 8)) == {"layers.conv1": 8, "layers.conv2": 16}
    assert block_widths(Net(), torch.zeros(1, 1, 8, 8)) == {"conv": 6, "linear": 12}


def test_lateral_works_on_channels() -> None:
    seed_all(0, "lateral")
    lateral = Lateral(5, 3, 0.1)
    assert lateral.alpha.min() >= 0 and lateral.alpha.max() <= 0.1
    x = torch.randn(2, 5, 4, 4)
    expected = lateral.alpha * ((x.permute(0, 2, 3, 1) @ lateral.down.T + lateral.shift).relu() @ lateral.up.T)
    torch.testing.assert_close(lateral(x), expected.permute(0, 3, 1, 2))
    assert lateral(torch.randn(2, 7, 5)).shape == (2, 7, 5)


def test_active_column_reads_the_knowledge_base() -> None:
    method, stream, _ = begun(1)
    x = next(iter(stream.tasks[1].train.batches(12))).x
    method.eval()
    before = method.active_logits(x, method.backbone)
    with torch.no_grad():
        method.backbone.conv.weight.add_(0.5)
    assert not torch.allclose(before, method.active_logits(x, method.backbone))
    assert not any(module._forward_hooks for module in method.modules())


CHECKPOINTED = [
    *(("progress_compress", {"column": column}) for column in ("reset", "keep")),
    *((name, {}) for name in ("ebll", "blip", "si", "mas", "qr")),
]


@pytest.mark.parametrize(("name", "options"), CHECKPOINTED, ids=str)
def test_checkpoints_of_any_state_are_accepted(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    """A checkpoint may name only what a learner at birth is made of: no layer that its backbone lacks."""
    network = cnn((1, 8, 8), width=8, depth=1)
    stream = image_stream()
    method = factory(name, **options)(copy.deepcopy(network), 6)
    live(method, stream, until=1)
    checkpoint.save(tmp_path / "c.pt", method, RunState(), config_hash="", backbone={}, hardware=cpu())
    fresh = factory(name, **options)(network, 6)
    loaded, _ = checkpoint.load(tmp_path / "c.pt", fresh, config_hash="", hardware=cpu())
    live(method, stream, learned=1)
    live(loaded, stream, learned=1)
    here, there = copy_of(method), copy_of(loaded)
    assert here.keys() == there.keys()
    assert all(torch.equal(here[key], there[key]) for key in here)


def test_compress_needs_steps() -> None:
    compress = {"epochs": 0}
    with pytest.raises(ConfigError, match="method.compress: .* at least one epoch or step"):
        factory("progress_compress", compress=compress)(Net(), 6)
    with pytest.raises(ConfigError, match="method.encoding: .* at least one epoch or step"):
        factory("ebll", encoding=compress)(Net(), 6)


def test_row_stream_backbone_without_blocks() -> None:
    from helpers import Identity

    rows = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    stream = row_stream([(rows, torch.arange(12) % 2), (rows + 1, 2 + torch.arange(12) % 2)], 4)
    method = factory("progress_compress")(Identity(5), 4)
    live(method, stream)
    assert method.head.initialised.all()
