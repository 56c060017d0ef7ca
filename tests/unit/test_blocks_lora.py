"""Low-rank updates: side path and merged weight agree, B = 0 is the plain model, a sum is one update."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Net, configured, tiny_towers, tiny_vit
from torch import Tensor, nn

from clrun.blocks.inject import Injector, Plan
from clrun.blocks.lora import PARTS, LinearLoRA, QkvLoRA, Summed, linear_at, merged, new_update, sites
from clrun.system.errors import ConfigError

PATHS = ("blocks.0.attn.qkv", "blocks.2.attn.qkv", "blocks.1.mlp.fc1", "blocks.3.mlp.fc2")


def trained(update: nn.Module) -> nn.Module:
    for parameter in update.parameters():
        nn.init.normal_(parameter, std=0.2)
    return update


def output(vit: nn.Module, updates: dict[str, nn.Module], x: Tensor) -> Tensor:
    with Injector().use(vit, Plan(parallel=updates)):
        result: Tensor = vit(x)
    return result


def test_a_new_update_does_nothing_and_its_first_gradient_reaches_b_alone() -> None:
    vit, x = tiny_vit(), torch.randn(3, 1, 8, 8)
    updates = {path: LinearLoRA.beside(linear_at(vit, path, "Own"), 3, scale=0.8) for path in PATHS}
    assert torch.equal(output(vit, updates, x), vit(x))
    output(vit, updates, x).square().sum().backward()
    for update in updates.values():
        assert update.up.grad.any() and not update.down.grad.any()


def test_merged_weights_give_the_same_features_and_leave_the_network_alone() -> None:
    vit, x = tiny_vit().eval(), torch.randn(3, 1, 8, 8)
    updates = {path: trained(LinearLoRA.beside(linear_at(vit, path, "Own"), 3, scale=0.8)) for path in PATHS}
    updates["blocks.3.attn.qkv"] = trained(QkvLoRA(32, 2, "qv"))
    before = vit(x)
    folded = merged(vit, updates)
    torch.testing.assert_close(folded(x), output(vit, updates, x), rtol=1e-4, atol=1e-4)
    assert torch.equal(vit(x), before) and not torch.allclose(folded(x), before, atol=1e-2)
    change = folded.get_submodule(PATHS[0]).weight - vit.get_submodule(PATHS[0]).weight
    assert int(torch.linalg.matrix_rank(change.double(), rtol=1e-5)) == 3


@pytest.mark.parametrize("parts", ["q", "kv", "qv", "qkv"])
def test_parts_of_qkv_that_are_not_named_stay_as_they_are(parts: str) -> None:
    update, x = trained(QkvLoRA(32, 3, parts, learn_scale=True)), torch.randn(5, 32)
    torch.testing.assert_close(update(x), F.linear(x, update.delta()), rtol=1e-5, atol=1e-5)
    for place, part in enumerate("qkv"):
        changed = update.delta()[32 * place : 32 * (place + 1)]
        assert bool(changed.any()) == (part in parts)
        if part in parts:
            k = parts.index(part)
            torch.testing.assert_close(changed, update.scale[k] * update.up[k] @ update.down[k])


def test_a_sum_of_updates_is_one_update() -> None:
    parts, x = [trained(LinearLoRA(7, 4, rank, scale=0.5)) for rank in (1, 3, 2)], torch.randn(5, 7)
    torch.testing.assert_close(Summed(parts)(x), sum(part(x) for part in parts))
    gains = [torch.tensor(float(g), requires_grad=True) for g in (2, -1, 0.5)]
    total = Summed(parts, gains)
    torch.testing.assert_close(total(x), sum(g * part(x) for g, part in zip(gains, parts, strict=True)))
    torch.testing.assert_close(total(x), F.linear(x, total.delta()))
    total(x).sum().backward()
    assert all(gain.grad is not None for gain in gains)


def test_scaling_a_against_b_changes_nothing_and_one_of_them_can_be_trained_alone() -> None:
    update, x = trained(LinearLoRA(7, 4, 2)), torch.randn(5, 7)
    before = update(x)
    with torch.no_grad():
        update.down *= 4
        update.up /= 4
    torch.testing.assert_close(update(x), before)
    update.trains(down=False, up=True)
    assert [name for name, p in update.named_parameters() if p.requires_grad] == ["up"]


def test_singular_vectors_of_the_weight_are_the_rows_of_a() -> None:
    weight = torch.randn(12, 7)
    update = LinearLoRA(7, 12, 3)
    update.align_with(weight)
    torch.testing.assert_close(update.down @ update.down.t(), torch.eye(3), rtol=1e-5, atol=1e-5)
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close((update.down @ weight.t()).norm(dim=1), values[:3], rtol=1e-4, atol=1e-4)


def test_a_layer_that_is_not_linear_is_refused() -> None:
    for path, found in (("conv", "a Conv2d"), ("none.here", "no layer")):
        with pytest.raises(ConfigError, match=f"^backbone: Own needs a linear layer {path}, .* {found} there"):
            linear_at(Net(), path, "Own")


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("parts", PARTS)
def test_a_sum_of_updates_of_parts_is_one_update(parts: str, shared: bool) -> None:
    updates = [trained(QkvLoRA(8, rank, parts, scale=0.5, share_down=shared)) for rank in (1, 3, 2)]
    gains, x = [torch.randn(len(parts)) for _ in updates], torch.randn(5, 8)
    expected = 0
    for gain, update in zip(gains, updates, strict=True):
        rows = torch.zeros(3, 8)
        rows[["qkv".index(part) for part in parts]] = gain[:, None]
        expected = expected + rows.flatten() * update(x)
        torch.testing.assert_close(update(x), F.linear(x, update.delta()))
    torch.testing.assert_close(Summed(updates, gains)(x), expected)
    torch.testing.assert_close(F.linear(x, Summed(updates, gains).delta()), expected)
    torch.testing.assert_close(Summed(updates)(x), sum(update(x) for update in updates))
    assert updates[0].down.shape == (1 if shared else len(parts), 1, 8)


def test_the_order_of_the_components_of_a_rank_does_not_matter() -> None:
    update, x, order = trained(QkvLoRA(8, 4, "qv")), torch.randn(5, 8), [2, 0, 3, 1]
    before = update(x)
    with torch.no_grad():
        update.down.copy_(update.down[:, order])
        update.up.copy_(update.up[..., order])
    torch.testing.assert_close(update(x), before)


def test_dropout_acts_on_the_common_input_of_a_sum_and_in_training_alone() -> None:
    updates, x = [trained(LinearLoRA(400, 3, 2)) for _ in range(2)], torch.ones(1, 400)
    total = Summed(updates, dropout=0.5)
    torch.manual_seed(1)
    kept = F.dropout(x, 0.5)
    torch.manual_seed(1)
    torch.testing.assert_close(total(x), sum(update(kept) for update in updates))
    assert torch.equal(total.eval()(x), Summed(updates)(x))
    alone = QkvLoRA(400, 2, "kv", dropout=0.5)
    nn.init.normal_(alone.up)
    torch.manual_seed(1)
    found = alone(x)
    torch.testing.assert_close(found, alone.eval()(kept))


def test_a_trained_scale_begins_at_the_constant_one() -> None:
    constant, learned = QkvLoRA(8, 2, "kv", scale=0.5), QkvLoRA(8, 2, "kv", scale=0.5, learn_scale=True)
    with torch.no_grad():
        learned.down.copy_(constant.down)
        for update in (constant, learned):
            update.up.fill_(0.3)
    x = torch.randn(5, 8)
    torch.testing.assert_close(constant(x), learned(x))
    torch.testing.assert_close(Summed([constant])(x), Summed([learned])(x))
    assert learned.trains(down=False, up=True).scale is not None


def test_another_weight_stands_in_for_that_of_a_layer_during_a_pass_alone() -> None:
    vit, x = tiny_vit().eval(), torch.randn(3, 1, 8, 8)
    update = trained(QkvLoRA(32, 2, "kv"))
    layer, before = vit.get_submodule(PATHS[0]), vit(x)
    plan = Plan(weights={PATHS[0]: (layer.weight + update.delta()).detach()}, parallel={PATHS[1]: update})
    own = layer.weight
    with Injector().use(vit, plan):
        found = vit(x)
        assert layer.weight is own
        with pytest.raises(RuntimeError):
            layer(x)  # has the wrong width
        assert layer.weight is own
    torch.testing.assert_close(found, output(vit, {PATHS[0]: update, PATHS[1]: update}, x), rtol=1e-4, atol=1e-4)
    assert torch.equal(vit(x), before)


class Separate(nn.Module):
    """Two blocks with a linear layer each for queries, keys and values, as text encoders have them."""

    def __init__(self) -> None:
        super().__init__()
        names = ("query", "key", "value", "proj")
        self.layers = nn.ModuleList(nn.ModuleDict({n: nn.Linear(4, 4) for n in names}) for _ in range(2))
        self.pooler = nn.Linear(4, 4)


def test_sites_are_found_in_fused_and_in_separate_attention() -> None:
    vit, separate = tiny_vit(), Separate()
    assert sites(vit, "Own", parts="qv") == {f"blocks.{b}.attn.qkv": "qv" for b in range(4)}
    some = sites(vit, "Own", parts="k", layers=["*.mlp.fc?"], blocks=[1])
    assert some == {"blocks.1.attn.qkv": "k", "blocks.1.mlp.fc1": None, "blocks.1.mlp.fc2": None}
    assert sites(separate, "Own", parts="qv", blocks=[1]) == {"layers.1.query": None, "layers.1.value": None}
    assert sites(tiny_towers(), "Own", parts="v").keys() == {f"blocks.{b}.attn.qkv" for b in range(2)}
    glyph = configured("backbone", "glyph_vit", pretrained=False)((1, 28, 28))
    for path, parts in sites(glyph, "Own", parts="qv", layers=["*.proj"]).items():
        update = new_update(glyph, path, parts, 2, scale=0.5)
        layer = glyph.get_submodule(path)
        assert update.delta().shape == layer.weight.shape and not update.delta().any()


MISPLACED = [
    ({"parts": "vq"}, r"^method\.parts: 'vq' is none of q, k, v, qk"),
    ({"parts": ""}, r"^method\.parts: no layer gets an update"),
    ({"parts": "", "layers": ["*.fc9"]}, r"^method\.layers: no linear layer .* like '\*\.fc9'; there are blocks\.0"),
    ({"parts": "q", "layers": ["*.qkv"]}, r"^method\.layers: '\*\.qkv' names blocks\.0\.attn\.qkv a second time"),
    ({"parts": "q", "blocks": [7]}, r"^method\.blocks: VisionTransformer has no block 7"),
]


@pytest.mark.parametrize(("options", "message"), MISPLACED, ids=str)
def test_sites_that_are_not_there_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sites(tiny_vit(), "Own", **options)
    with pytest.raises(ConfigError, match=r"^backbone: Own needs attention .* but Net has none"):
        sites(Net(), "Own", parts="qv")
