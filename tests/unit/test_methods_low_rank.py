"""Methods with one network per task: nothing is forgotten, the order matters only where it can, growth is bounded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Net, born, context, factory, image_stream, live, sgd, trace
from running import configuration, run
from torch import nn

from clrun.blocks.low_rank import layers_of, low_rank_layers, stored_bytes
from clrun.data.stream import Stream
from clrun.learning.method import Method
from clrun.running import checkpoint
from clrun.running.accounting import state_bytes
from clrun.system.errors import ConfigError

PER_TASK = [
    ("halrp", {}),
    ("halrp", {"base": "backbone", "ranks": "flat"}),
    ("halrp", {"ranks": "cost_aware", "conv": "unfold"}),
    ("halrp", {"growth": 0.8, "lowest_rank": 0, "threshold": 0.01}),
    ("stl", {}),
    ("batchensemble", {}),
]


def rows(stream: Stream) -> torch.Tensor:
    """Prepared test rows of the first task in the data set."""
    first = next(task for task in stream.tasks if task.id == 0)
    return next(first.test.batches(8)).x


def outputs(method: Any, stream: Stream) -> list[torch.Tensor]:
    """Logits of the same rows for every learned task."""
    method.eval()
    with torch.inference_mode():
        return [method(rows(stream), position) for position in range(len(method.networks))]


@pytest.mark.parametrize(("name", "options"), PER_TASK, ids=str)
def test_learned_tasks_are_never_touched_again(name: str, options: dict[str, Any]):
    method, stream = born(factory(name, **options), image_stream("til"))
    tensors = lambda m: [[t.clone() for t in n.state_dict().values()] for n in m.networks]  # noqa: E731
    found: list[Any] = []
    journal = live(method, stream, after=lambda task, m, run_state: found.append((tensors(m), outputs(m, stream))))
    for earlier, later in zip(found, found[1:], strict=False):
        for before, after in zip(earlier[0], later[0], strict=False):
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(earlier[1], later[1], strict=False))
    counts = {(r["position"], r["task"]): (r["correct"], r["nll"]) for r in journal.recorded}
    assert all(counts[position, task] == counts[task + 1, task] for position, task in counts)
    assert not any(p.requires_grad for p in method.parameters())


@pytest.mark.parametrize(("name", "options"), PER_TASK, ids=str)
def test_a_task_depends_on_the_first_one_and_itself(name: str, options: dict[str, Any]):
    ends = []
    for order in ((1, 0, 2), (1, 2, 0)):
        method, stream = born(factory(name, **options), image_stream("til", order))
        live(method, stream)
        ends.append(outputs(method, stream))
    (first, second, third), (one, two, three) = ends
    assert torch.equal(first, one) and torch.equal(second, three) and torch.equal(third, two)


def test_the_first_task_is_the_order_that_is_left():
    ends = []
    for order in ((0, 1, 2), (1, 0, 2)):
        method, stream = born(factory("halrp"), image_stream("til", order))
        live(method, stream)
        ends.append(outputs(method, stream)[2])
    assert not torch.equal(*ends)


# --- halrp


def test_the_base_stands_still_and_is_shared():
    method, stream = born(factory("halrp"), image_stream("til"))
    live(method, stream, until=1)
    assert not any(p.requires_grad for p in method.backbone.parameters())
    before = {name: p.clone() for name, p in method.backbone.state_dict().items()}
    live(method, stream, learned=1)
    assert all(torch.equal(p, before[name]) for name, p in method.backbone.state_dict().items())
    base = layers_of(method.backbone)
    for network in method.networks[1:]:
        layers = low_rank_layers(network)
        assert layers.keys() == base.keys()
        assert all(layer.layer.weight is base[name].weight for name, layer in layers.items())


@pytest.mark.parametrize("ranks", ["curvature", "flat", "cost_aware"])
@pytest.mark.parametrize("base", ["first_task", "backbone"])
@pytest.mark.parametrize("growth", [1.0, 1.5])
def test_growth_counts_everything_that_is_stored(ranks: str, base: str, growth: float):
    options = {"ranks": ranks, "base": base, "growth": growth, "share": 1.0, "lowest_rank": 0, "conv": "unfold"}
    method, stream = born(factory("halrp", **options), image_stream("til"))
    before = state_bytes(method)["total"]
    sizes = trace(lambda m: state_bytes(m)["total"], method, stream)
    if base == "first_task":
        before = sizes[0]  # with the head of the task that trained the base
    added = sizes[-1] - before
    assert 0.8 * growth < added / before <= growth
    assert method.growth_of()["growth"] == pytest.approx(added / before)
    factors = [f for n in method.networks for layer in low_rank_layers(n).values() for f in (layer.left, layer.right)]
    assert any(f.bits is not None for f in factors) == (ranks != "cost_aware"), "only this one needs no pruning"


def test_a_task_is_pruned_to_its_own_share():
    method, stream = born(factory("halrp", growth=1.0, share=1.0, lowest_rank=0), image_stream("til"))
    base = trace(lambda m: stored_bytes([m.backbone, m.heads[0]]), method, stream)[-1]
    for network, head in zip(method.networks[1:], method.heads[1:], strict=True):
        assert stored_bytes([network, head], without=method.backbone) <= base / 2


@pytest.mark.parametrize("base", ["first_task", "backbone"])
def test_the_share_of_a_task_is_the_same_before_and_after_it_has_begun(base: str):
    method, stream = born(factory("halrp", base=base, growth=1.0), image_stream("til"))
    method.check(stream)
    before = method.allowance
    method.begin_task(stream.tasks[0], context(stream))
    assert method.allowance == before > 0


def test_growth_too_small_for_what_is_never_pruned_is_refused_at_once():
    method, stream = born(factory("halrp", growth=0.1), image_stream("til"))
    with pytest.raises(
        ConfigError, match=r"^method\.growth=0\.1: scales, biases, norms and heads of 2 tasks take 0\.\d+"
    ):
        method.check(stream)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": "cost_aware", "growth": None}, r"method\.ranks=cost_aware: needs a budget"),
        ({"lowest_rank": 9, "highest_rank": 3}, r"method\.lowest_rank: must be at most method\.highest_rank=3"),
        ({"warmup": {"epochs": 0}}, r"method\.warmup: .* at least one epoch"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        factory("halrp", **options)(Net(), 6)


def test_validation_rows_must_exist():
    method, stream = born(factory("halrp", curvature_data="val"), image_stream("til"))
    with pytest.raises(ConfigError, match=r"method\.curvature_data=val: .* dataset\.val_fraction"):
        method.check(stream)


@pytest.mark.parametrize("value", ["1.01", "-0.1", "95"])
def test_shares_above_one_are_refused(value: str):
    with pytest.raises(ConfigError, match=r"method\.share"):
        configuration("method=halrp", "scenario.setting=til", f"method.share={value}")


def test_the_task_must_be_known():
    with pytest.raises(ConfigError, match="task id"):
        configuration("method=halrp", "scenario.setting=cil")


def ready(**options: Any) -> tuple[Any, Any]:
    """A learner in its second task, after the warm-up, and the context."""
    method, stream = born(factory("halrp", **options), image_stream("til"))
    live(method, stream, until=1)
    ctx = context(stream, 1)
    method.begin_task(stream.tasks[1], ctx)
    with torch.no_grad():
        for layer in layers_of(method.networks[1]).values():
            layer.weight += 0.1 * torch.randn(layer.weight.shape, generator=ctx.generator("test"))
    method.install_residuals(stream.tasks[1], ctx)
    return method, ctx


@pytest.mark.parametrize("centre", ["one", "zero"])
def test_penalties_of_fine_tuning(centre: str):
    method, ctx = ready(l1=0.5, l2=0.25, l2_centre=centre)
    batch = next(ctx.task.train.batches(4))
    method.eval()
    expected = method.loss(batch, ctx)
    for layer in low_rank_layers(method.networks[1]).values():
        for factor in (layer.left(), layer.right()):
            expected = expected + 0.5 * factor.abs().sum() + 0.125 * factor.square().sum()
        for scale in (layer.rows, layer.columns):
            expected = expected + 0.125 * (scale - (1 if centre == "one" else 0)).square().sum()
    torch.testing.assert_close(method.fine_loss(batch, ctx), expected)


def test_penalty_of_the_first_task():
    method, stream = born(factory("halrp", l2=0.5), image_stream("til"))
    ctx = context(stream)
    method.begin_task(stream.tasks[0], ctx)
    method.eval()
    batch = next(stream.tasks[0].train.batches(4))
    squares = method.backbone.conv.weight.square().sum() + method.backbone.linear.weight.square().sum()
    torch.testing.assert_close(method.first_loss(batch, ctx), method.loss(batch, ctx) + 0.25 * squares)


def test_fine_tuning_moves_what_belongs_to_the_task_alone():
    method, _ = ready()
    moving = {id(p) for p in method.trainable()}
    assert not moving & {id(p) for p in method.backbone.parameters()}
    layers = low_rank_layers(method.networks[1]).values()
    parts = [
        p for layer in layers for p in (layer.rows, layer.columns, layer.left.value, layer.right.value, layer.bias)
    ]
    norm = method.networks[1].norm
    expected = [*parts, norm.weight, norm.bias, *method.heads[1].parameters()]
    assert moving == {id(p) for p in expected}


def test_steps_on_scales_are_as_long_as_steps_on_the_weight():
    method, ctx = ready()
    layer = low_rank_layers(method.networks[1])["linear"]
    with torch.no_grad():
        layer.layer.weight *= 20
        layer.layer.weight[0] *= 0.001
    rows, columns = layer.stretches()
    expected = (layer.layer.weight * layer.columns).square().sum(dim=1)
    torch.testing.assert_close(rows[1:], expected[1:].detach())
    assert rows[0] == 1, "small weights need no care"
    torch.testing.assert_close(columns, (layer.rows[:, None] * layer.layer.weight).square().sum(dim=0).detach())
    method.stretches = [(layer, rows, columns)]
    layer.rows.grad, layer.columns.grad = torch.ones_like(layer.rows), torch.ones_like(layer.columns)
    method.adjust_gradients(ctx)
    torch.testing.assert_close(layer.rows.grad, 1 / rows)
    torch.testing.assert_close(layer.columns.grad, 1 / columns)
    method.end_task(ctx.task, ctx)
    assert method.stretches == [], "nothing of it is stored"


def test_full_ranks_begin_fine_tuning_where_the_warm_up_ended():
    method, stream = born(
        factory("halrp", share=1.0, conv="unfold", growth=None, warmup={"epochs": 3}), image_stream("til")
    )
    live(method, stream, until=1)
    ctx, seen = context(stream, 1), []
    method.begin_task(stream.tasks[1], ctx)
    with torch.no_grad():
        for layer in layers_of(method.networks[1]).values():
            layer.weight += 0.1 * torch.randn(layer.weight.shape, generator=ctx.generator("test"))
    for _ in range(2):
        seen.append(outputs(method, stream)[1])
        if len(seen) == 1:
            method.install_residuals(stream.tasks[1], ctx)
    torch.testing.assert_close(*seen, atol=1e-5, rtol=1e-5)


class Vit(nn.Module):
    """A transformer of timm, for 8x8 grey images."""

    num_features, input_size, mean, std = 12, (1, 8, 8), None, None

    def __init__(self) -> None:
        super().__init__()
        timm = pytest.importorskip("timm.models.vision_transformer")
        options = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 0, "mlp_ratio": 2.0}
        self.vit = timm.VisionTransformer(embed_dim=12, depth=2, num_heads=2, init_values=0.1, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.vit(x)


def vit_life(order: tuple[int, ...], **options: Any) -> tuple[Any, Stream, Any]:
    """A life of halrp on a frozen transformer."""
    torch.manual_seed(3)
    method: Method = factory("halrp", base="backbone", growth=None, **options)(Vit(), 6)
    stream = image_stream("til", order)
    return method, stream, live(method, stream, budget=sgd(epochs=1))


def test_a_pretrained_transformer_makes_every_order_the_same():
    lives = [vit_life(order) for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0))]
    finals = []
    for method, stream, journal in lives:
        last = {r["task"]: (r["correct"], r["nll"]) for r in journal.recorded if r["position"] == 3}
        by_task = dict(zip(stream.order, outputs(method, stream), strict=True))
        finals.append((last, [by_task[task] for task in range(3)]))
    for last, found in finals[1:]:
        assert last == finals[0][0]
        assert all(torch.equal(a, b) for a, b in zip(found, finals[0][1], strict=True))


def test_every_linear_map_of_a_transformer_is_perturbed():
    method, _, _ = vit_life((0, 1, 2))
    maps = {f"blocks.{i}.{name}" for i in range(2) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    network = method.networks[0].vit
    assert low_rank_layers(network).keys() == {"patch_embed.proj", *maps}
    base = method.backbone.vit
    assert network.pos_embed is base.pos_embed and network.cls_token is base.cls_token
    assert not torch.equal(network.blocks[0].norm1.bias, base.blocks[0].norm1.bias)
    assert not torch.equal(network.blocks[0].ls1.gamma, base.blocks[0].ls1.gamma)


def test_the_output_layer_of_torch_attention_is_left_alone():
    assert layers_of(nn.MultiheadAttention(4, 2)) == {}


# --- the baselines


def test_stl_learns_each_task_as_if_it_were_alone():
    method, stream = born(factory("stl"), image_stream("til"))
    live(method, stream)
    alone, short = born(factory("stl"), image_stream("til", (2, 0, 1)))
    live(alone, short, until=1)
    assert torch.equal(outputs(method, stream)[2], outputs(alone, short)[0])


def test_batchensemble_is_an_outer_product():
    method, stream = born(factory("batchensemble"), image_stream("til"))
    live(method, stream)
    base = layers_of(method.backbone)
    for network in method.networks[1:]:
        for name, layer in low_rank_layers(network).items():
            m, n = base[name].weight.shape[:2]
            outer = torch.outer(layer.rows, layer.columns).view(m, n, *(1,) * (base[name].weight.dim() - 2))
            torch.testing.assert_close(layer.weight, base[name].weight * outer)
            assert not torch.equal(layer.weight, base[name].weight)
            assert layer.rank == 0


# --- checkpoints


@pytest.mark.parametrize("method", ["halrp", "batchensemble"])
def test_a_frozen_backbone_is_stored_by_reference_and_resumed(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options = (f"method={method}", "method.base=backbone", "scenario.setting=til", "job.max_tasks=3", "job.max_steps=4")
    value = run(tmp_path / "whole", *options)
    save, sizes = checkpoint.save, []

    def saving(path: Path, method: Any, *args: Any, **kwargs: Any) -> None:
        save(path, method, *args, **kwargs)
        sizes.append((path.stat().st_size, state_bytes(method)["backbone"]))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("clrun.running.checkpoint.save", saving)
        run(tmp_path / "stopped", *options)
    assert run(tmp_path / "stopped", *options) == value
    csv = [(tmp_path / name / "accuracy.csv").read_bytes() for name in ("whole", "stopped")]
    assert csv[0] == csv[1]
    (stored, backbone), *_ = sizes
    assert stored < backbone
