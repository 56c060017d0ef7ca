"""Low-rank updates: side path and merged weight agree, B = 0 is the plain model, a sum is one update."""

import pytest
import torch
import torch.nn.functional as F
from helpers import Net, tiny_vit
from torch import Tensor, nn

from clrun.blocks.inject import Injector, Plan
from clrun.blocks.lora import LinearLoRA, QkvLoRA, Summed, linear_at, merged
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
