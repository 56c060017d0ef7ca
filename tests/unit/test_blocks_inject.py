"""What is injected is what the formulas say, the plain model is untouched, and hooks leave no trace."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Net, tiny_vit
from matrices import folded, lora_matrix
from torch import Tensor, nn

from clrun.blocks.inject import (
    Adapter,
    Injector,
    Plan,
    Prefix,
    ScaleShift,
    mlp_adapters,
    require_blocks,
    require_depth,
    require_vit,
    scale_shift_sites,
)
from clrun.blocks.lora import QkvLoRA
from clrun.system.errors import ConfigError

# Every kind of vision transformer that timm builds from plain blocks.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "average": {"class_token": False, "global_pool": "avg"},
    "registers": {"reg_tokens": 4, "no_embed_class": True},
    "layer scale": {"init_values": 0.1},
    "pre-normalised": {"pre_norm": True},
    "attention pooling": {"class_token": False, "global_pool": "map"},
    "q and k normalised": {"qk_norm": True},
}


def vit(kind: str = "plain", *, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    options = dict(KINDS.get(kind, {}))
    if kind == "SwiGLU":
        from timm.layers import SwiGLU

        options["mlp_layer"] = SwiGLU
    return tiny_vit(**options).eval()


ALL = (*KINDS, "SwiGLU")


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def run(model: nn.Module, plan: Plan, x: Tensor) -> Tensor:
    with Injector().use(model, plan):
        return model(x)


def trained(module: nn.Module) -> nn.Module:
    """Return the module with values as after training: none of them 0."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def neutral() -> dict[str, Plan]:
    """Plans that change nothing, bit for bit."""
    adapter = Adapter(32, 5, activation="gelu", dropout=0.5, scale=1.0, learn_scale=True).eval()
    scales = {path: ScaleShift(width, std=0.0) for path, width in scale_shift_sites(vit()).items()}
    return {
        "empty": Plan(),
        "no tokens": Plan(tokens={0: torch.zeros(0, 32), 2: torch.zeros(3, 0, 32)}),
        "no prefix": Plan(prefix={1: Prefix(torch.zeros(0, 32), torch.zeros(0, 32))}),
        "adapter": Plan(parallel={"blocks.1.attn": adapter}),
        "sequential adapter": Plan(sequential={"blocks.1.attn": adapter, "blocks.2.mlp": adapter}),
        "adapter beside the MLP": Plan(beside_mlp={2: adapter}),
        "LoRA": Plan(parallel={"blocks.1.attn.qkv": QkvLoRA(32, 3, "kv", learn_scale=True)}),
        "SSF": Plan(scaled=scales),
    }


@pytest.mark.parametrize("name", neutral())
def test_a_plan_of_nothing_is_the_plain_model(name: str) -> None:
    model, x = vit(), images()
    assert torch.equal(run(model, neutral()[name], x), model(x))


def everything(model: Any) -> Plan:
    """Return a plan with all that may come together."""
    depth, width = len(model.blocks), model.embed_dim
    beside = trained(mlp_adapters(depth, width, 4, scale=0.5, dropout=0.0))
    after = trained(Adapter(width, 4, activation="relu", dropout=0.0, scale=1.0, learn_scale=False))
    return Plan(
        tokens={0: torch.randn(2, width), 2: torch.randn(3, width)},
        prefix={1: Prefix(torch.randn(4, width), torch.randn(4, width))},
        parallel={"blocks.3.attn.qkv": trained(QkvLoRA(width, 2, "kv", learn_scale=True))},
        sequential={"blocks.0.mlp": after},
        beside_mlp={int(block): module for block, module in beside.items()},
        scaled={p: ScaleShift(w, std=0.1) for p, w in scale_shift_sites(model).items()},
    )


@pytest.mark.parametrize("kind", ALL)
def test_every_kind_of_transformer_takes_everything(kind: str) -> None:
    model, x = vit(kind), images()
    require_vit(model, "m")
    plain, weights = model(x), copy.deepcopy(model.state_dict())
    changed = run(model, everything(model), x)
    assert changed.shape == plain.shape
    assert not torch.allclose(changed, plain, atol=1e-2)
    assert hooks(model) == 0
    assert torch.equal(model(x), plain)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ALL)
def test_tokens_are_those_of_a_model_written_out(kind: str) -> None:
    model, x, p = vit(kind), images(), vit(kind).num_prefix_tokens
    first, second = torch.randn(2, 32), torch.randn(3, 4, 32)
    z = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    z = torch.cat([z[:, :p], first.expand(3, -1, -1), z[:, p:]], dim=1)
    z = model.blocks[1](model.blocks[0](z))
    z = torch.cat([z[:, :p], second, z[:, p + 2 :]], dim=1)
    z = model.blocks[3](model.blocks[2](z))
    plan = Plan(tokens={0: first, 2: second})
    expected = model.forward_head(model.norm(torch.cat([z[:, :p], z[:, p + 4 :]], dim=1)), pre_logits=True)
    torch.testing.assert_close(run(model, plan, x), expected, rtol=0, atol=0)
    with Injector().use(model, Plan(tokens=plan.tokens, keep_tokens=True)):
        assert torch.equal(model.forward_features(x), model.norm(z))


def test_the_place_and_order_of_tokens_do_not_matter_to_the_class_token() -> None:
    model, x, tokens = vit(), images(), torch.randn(4, 32)
    z = model._pos_embed(model.patch_embed(x))
    last = model.norm(model.blocks(torch.cat([z, tokens.expand(3, -1, -1)], dim=1)))[:, 0]
    found = run(model, Plan(tokens={0: tokens}), x)
    torch.testing.assert_close(found, last, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, run(model, Plan(tokens={0: tokens.flip(0)}), x), rtol=1e-5, atol=1e-5)


def explicit(attention: Any, x: Tensor, prefix: Prefix) -> Tensor:
    """Attention over [prefix; tokens] by its formula; compensated: the prefix part divided by its share."""
    b, n, _ = x.shape

    def split(z: Tensor) -> Tensor:
        return z.expand(b, -1, -1).unflatten(2, (attention.num_heads, -1)).transpose(1, 2)

    q, k, v = (split(z) for z in attention.qkv(x).chunk(3, dim=2))
    keys = attention.k_norm(torch.cat([split(prefix.keys), k], dim=2))
    share = (attention.q_norm(q) @ keys.transpose(2, 3) * attention.scale).softmax(dim=3)
    length = prefix.length
    before = share[..., :length] @ split(prefix.values)
    if prefix.compensated:
        before = before / share[..., :length].sum(dim=3, keepdim=True)
    out = before + share[..., length:] @ v
    return attention.proj(out.transpose(1, 2).reshape(b, n, -1))


@pytest.mark.parametrize("kind", ["plain", "q and k normalised"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_prefix_is_the_softmax_formula(kind: str, fused: bool, compensated: bool, own: bool) -> None:
    model, x = vit(kind), images()
    model.blocks[1].attn.fused_attn = fused
    shape = (3, 5, 32) if own else (5, 32)
    keys, values = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
    prefix = Prefix(keys, values, compensated)
    z = model.blocks[0](model._pos_embed(model.patch_embed(x)))
    block = model.blocks[1]
    z = z + explicit(block.attn, block.norm1(z), prefix)
    z = z + block.mlp(block.norm2(z))
    expected = model.norm(model.blocks[3](model.blocks[2](z)))[:, 0]
    found = run(model, Plan(prefix={1: prefix}), x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(y.square().sum(), [keys, values], retain_graph=True) for y in (found, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_prefix_of_an_image_is_its_own() -> None:
    """The published reshape of gathered prefixes gives images keys of other images, and keys where values belong."""
    model, x = vit(), images(4)
    pairs = torch.randn(4, 2, 5, 32)
    together = run(model, Plan(prefix={1: Prefix(pairs[:, 0], pairs[:, 1])}), x)
    alone = [run(model, Plan(prefix={1: Prefix(p[0], p[1])}), row[None]) for p, row in zip(pairs, x, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    wrong = pairs.reshape(2, 4, 5, 32)
    mixed = run(model, Plan(prefix={1: Prefix(wrong[0], wrong[1])}), x)
    assert not torch.allclose(mixed, together, atol=1e-2)


def test_adapters_are_where_their_papers_put_them() -> None:
    model, x = vit("layer scale"), images()
    a, b, c = (
        trained(Adapter(32, 4, activation="gelu", dropout=0.0, scale=0.7, learn_scale=s)) for s in (True, False, True)
    )
    z = model._pos_embed(model.patch_embed(x))
    for index, block in enumerate(model.blocks):
        h = block.norm1(z)
        out = block.attn(h) + a(h) if index == 1 else block.attn(h)
        z = z + block.ls1(out)
        out = block.mlp(block.norm2(z))
        out = out + b(out) if index == 2 else out
        z = z + block.ls2(out) + (c(z) if index == 3 else 0)
    plan = Plan(parallel={"blocks.1.attn": a}, sequential={"blocks.2.mlp": b}, beside_mlp={3: c})
    torch.testing.assert_close(run(model, plan, x), model.norm(z)[:, 0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ALL)
def test_folded_weights_give_the_same_features(kind: str) -> None:
    model, x = vit(kind), images()
    scales = {path: ScaleShift(width, std=0.2) for path, width in scale_shift_sites(model).items()}
    lora = {f"blocks.{b}.attn.qkv": trained(QkvLoRA(32, 3, "kv", learn_scale=True)) for b in (0, 2)}
    for plan in (Plan(parallel=lora), Plan(scaled=scales), Plan(parallel=lora, scaled=scales)):
        before = model(x)
        merged = folded(model, plan).eval()
        torch.testing.assert_close(merged(x), run(model, plan, x), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(merged(x), before, atol=1e-2)
        assert torch.equal(model(x), before)


def test_lora_leaves_queries_alone_and_counts_its_parameters() -> None:
    lora = trained(QkvLoRA(32, 5, "kv", learn_scale=True))
    x = torch.randn(7, 32)
    change = lora(x)
    assert not change[:, :32].any()
    torch.testing.assert_close(change, F.linear(x, lora_matrix(lora)), rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in lora.parameters()) == 4 * 32 * 5 + 2
    adapter = Adapter(32, 5, activation="gelu", dropout=0.0, scale=1.0, learn_scale=True)
    assert sum(p.numel() for p in adapter.parameters()) == 2 * 32 * 5 + 5 + 32 + 1
    assert 2 * sum(scale_shift_sites(vit()).values()) == 22 * 32 * 4 + 4 * 32


def gradients(model: Any, tensors: list[Tensor], plan: Plan, x: Tensor, injector: Injector) -> list[Tensor]:
    with injector.use(model, plan):
        value = model(x).square().sum()
    found = torch.autograd.grad(value, tensors)
    injector.release()
    return list(found)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model, x = vit().requires_grad_(False), images()
    shallow, deep = torch.randn(2, 32, requires_grad=True), torch.randn(3, 4, 32, requires_grad=True)
    keys, values = torch.randn(5, 32, requires_grad=True), torch.randn(5, 32, requires_grad=True)
    lora = trained(QkvLoRA(32, 2, "kv", learn_scale=True))
    adapter = trained(Adapter(32, 2, activation="relu", dropout=0.0, scale=1.0, learn_scale=False))
    plan = Plan(
        tokens={0: shallow, 2: deep},
        prefix={1: Prefix(keys, values, compensated=True)},
        parallel={"blocks.2.attn.qkv": lora},
        beside_mlp={3: adapter},
    )
    tensors = [shallow, deep, keys, values, *lora.parameters(), *adapter.parameters()]
    injector = Injector()
    expected = gradients(model, tensors, plan, x, injector)
    model.set_grad_checkpointing(True)
    found = gradients(model, tensors, plan, x, injector)
    assert hooks(model) == 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_hooks_that_wait_for_a_backward_pass_are_gone_at_the_next() -> None:
    model, x, injector = vit(), images(), Injector()
    model.set_grad_checkpointing(True)
    plan = Plan(tokens={0: torch.zeros(1, 32, requires_grad=True)})
    with injector.use(model, plan):
        model(x)
    assert hooks(model) == 2
    with injector.use(model, Plan()):
        assert hooks(model) == 0
    with torch.no_grad(), injector.use(model, plan):
        model(x)
    assert hooks(model) == 0


@pytest.mark.parametrize("change", [lambda m: copy.deepcopy(m), lambda m: reloaded(m)], ids=["copied", "unpickled"])
def test_copies_have_no_hooks_and_go_on(change: Callable[[Any], Any]) -> None:
    owner = nn.Module()
    owner.vit, owner.injector = vit(), Injector()
    plan = Plan(tokens={0: torch.ones(2, 32)})
    with owner.injector.use(owner.vit, plan):
        expected = owner.vit(images())
    twin = change(owner)
    assert hooks(twin) == 0
    with twin.injector.use(twin.vit, plan):
        assert torch.equal(twin.vit(images()), expected)


def reloaded(module: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_an_error_in_the_pass_leaves_no_hooks() -> None:
    model = vit()
    with pytest.raises(ZeroDivisionError), Injector().use(model, everything(model)):
        raise ZeroDivisionError
    assert hooks(model) == 0


def test_bfloat16_autocast() -> None:
    model, x = vit(), images()
    plan = everything(model)
    exact = run(model, plan, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = run(model, plan, x)
    assert F.cosine_similarity(rough.float(), exact, dim=1).min() > 0.95


def test_a_compiled_backbone_is_refused() -> None:
    model = vit()
    model.compile()
    with pytest.raises(ConfigError, match=r"hardware\.compile.*set it to false"):
        run(model, Plan(), images())


def test_other_models_are_refused_by_name() -> None:
    from timm.models.vision_transformer import ParallelScalingBlock

    with pytest.raises(ConfigError, match="L2p needs a vision transformer, not Net; use the backbones vit_"):
        require_vit(Net(), "L2p")
    with pytest.raises(ConfigError, match="not ParallelScalingBlock"):
        require_vit(tiny_vit(block_fn=ParallelScalingBlock), "L2p")
    with pytest.raises(ConfigError, match="needs plain transformer blocks, not DiffAttention"):
        require_vit(tiny_vit(attn_layer="diff"), "L2p")
    with pytest.raises(ConfigError, match="blocks of attention and MLP, not Net"):
        require_blocks(Net(), "Aper")
    with pytest.raises(ConfigError, match=r"method\.blocks: there is no block 4; the backbone has the blocks 0 to 3"):
        require_depth(vit(), [1, 4], "method.blocks")
    with pytest.raises(ConfigError, match=r"method\.blocks: a block is listed twice"):
        require_depth(vit(), [1, 1], "method.blocks")


def test_adapters_and_scales_on_a_rotary_transformer() -> None:
    from timm.models.eva import Eva

    torch.manual_seed(0)
    model = Eva(img_size=8, patch_size=2, in_chans=1, embed_dim=32, depth=2, num_heads=2, num_classes=0).eval()
    require_blocks(model, "Aper")
    with pytest.raises(ConfigError, match="not Eva"):
        require_vit(model, "L2p")
    x = images()
    adapters = trained(mlp_adapters(2, 32, 4, scale=0.5, dropout=0.0))
    scales = {path: ScaleShift(width, std=0.1) for path, width in scale_shift_sites(model).items()}
    for plan in (
        Plan(beside_mlp={0: adapters["0"]}),
        Plan(parallel={"blocks.1.attn": adapters["1"]}),
        Plan(scaled=scales),
    ):
        assert not torch.allclose(run(model, plan, x), model(x), atol=1e-4)
