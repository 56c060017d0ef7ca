"""Methods with low-rank updates beside a frozen transformer: lora, o_lora, sd_lora; what they share with inflora."""

import copy
from functools import cache, partial
from typing import Any

import pytest
import torch
from helpers import assert_same, born, context, factory, image_stream, live, rows, sgd, state, tiny_vit
from torch import Tensor, nn

from clrun.blocks.lora import LinearLoRA, merged
from clrun.data.stream import Stream
from clrun.learning.budget import Budget
from clrun.learning.context import Context
from clrun.methods.lora import overlap
from clrun.system.errors import ConfigError
from clrun.system.seeding import seed_all

D, DEPTH, CLASSES = 32, 4, 6
HEAD = CLASSES * (D + 1)
WAYS: list[tuple[str, dict[str, Any]]] = [
    ("lora", {}),
    ("lora", {"growth": "per_task", "layers": ["*.mlp.fc?"], "parts": "qkv", "scale": 2.0}),
    ("o_lora", {"norm_penalty": 0.01, "penalty": "cosine", "dropout": 0.1}),
    ("inflora", {"rank": 3}),
    ("inflora", {"rank": 3, "fold": False, "layers": ["*.mlp.fc1"], "basis": "keep", "moment_view": "eval"}),
    ("sd_lora", {"rank": 3}),
    ("sd_lora", {"rank": 3, "carry": True, "norm": "product", "layers": ["*.proj"], "merge_below": 1e-9}),
]
PER_TASK = [WAYS[1], WAYS[2], *WAYS[4:]]  # those with a new update per task that is kept


def decaying(**options: Any) -> Budget:
    """Return a budget with momentum and weight decay, which would move a parameter that should stand still."""
    optimizer = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    return Budget(optimizer, **({"epochs": 1, "batch_size": 8} | options))


def make(name: str, setting: Any = "cil", **options: Any) -> tuple[Any, Stream]:
    method, stream = born(factory(name, **options), image_stream(setting))
    return method, stream


def begun(name: str, learned: int, *, budget: Budget | None = None, **options: Any) -> tuple[Any, Context]:
    """Return a method that has learned some tasks and begun the next one."""
    method, stream = make(name, **options)
    live(method, stream, until=learned, budget=decaying()) if learned else None
    ctx = context(stream, learned, budget=budget or decaying())
    seed_all(0, "task", learned)
    method.begin_task(stream.tasks[learned], ctx)
    return method, ctx


@cache
def _lived(index: int) -> tuple[Any, Stream]:
    name, options = WAYS[index]
    method, stream = make(name, **options)
    live(method, stream, budget=decaying())
    return method, stream


def lived(way: tuple[str, dict[str, Any]]) -> tuple[Any, Stream]:
    """Return a copy of a method after three tasks, and its stream."""
    method, stream = _lived(WAYS.index(way))
    return copy.deepcopy(method), stream


def logits(method: Any, x: Tensor) -> Tensor:
    method.eval()
    with torch.inference_mode():
        return method(x)


def backbone(method: Any) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in [*method.backbone.named_parameters(), *method.backbone.named_buffers()]}


def step(method: Any, ctx: Context, optimizer: Any) -> None:
    """Take one optimizer step by hand on the first eight rows of the task."""
    batch = next(ctx.task.train.batches(8))
    optimizer.zero_grad()
    method.loss(batch, ctx).backward()
    optimizer.step()


# --- what all have in common


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_new_updates_are_the_plain_model(way: tuple[str, dict[str, Any]]) -> None:
    method, ctx = begun(way[0], 0, **way[1])
    x = rows(ctx.stream)
    method.eval()
    with torch.inference_mode():
        assert torch.equal(method(x), method.head(method.backbone(x)))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_backbone_stands_still_and_no_hook_is_left(way: tuple[str, dict[str, Any]]) -> None:
    method, _ = lived(way)
    seed_all(0, "init")
    assert_same(backbone(method), {n: t.detach() for n, t in tiny_vit().state_dict().items()})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in method.backbone.modules())
    assert not any(p.requires_grad for p in method.backbone.parameters())


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_evaluation_changes_nothing(way: tuple[str, dict[str, Any]]) -> None:
    method, stream = lived(way)
    before, x = state(method), rows(stream)
    assert torch.equal(logits(method, x), logits(method, x))
    assert_same(before, state(method))


@pytest.mark.parametrize("way", PER_TASK, ids=str)
def test_updates_of_finished_tasks_and_rows_of_their_classes_stand_still(way: tuple[str, dict[str, Any]]) -> None:
    method, ctx = begun(way[0], 1, **way[1])
    old = {f"{path}.{n}": p for path, total in method.by_path().items() for n, p in total.updates[0].named_parameters()}
    before = {n: p.detach().clone() for n, p in old.items()}
    kept = {n: p.detach()[:2].clone() for n, p in method.head.named_parameters()}
    newest = {n: p.detach().clone() for n, p in method.sums.named_parameters()}
    method.learn(ctx.task, ctx)
    assert_same(before, {n: p.detach() for n, p in old.items()})
    assert_same(kept, {n: p.detach()[:2] for n, p in method.head.named_parameters()})
    assert sum(not torch.equal(newest[n], p) for n, p in method.sums.named_parameters()) >= DEPTH
    assert not any(p.requires_grad for p in old.values())


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_trained_tensor_is_in_one_group_and_no_frozen_one_is(way: tuple[str, dict[str, Any]]) -> None:
    method, _ = begun(way[0], 1, **way[1])
    inside = [id(p) for group in method.trainable() for p in group["params"]]
    assert sorted(inside) == sorted({id(p) for p in method.parameters() if p.requires_grad})


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_folded_weights_give_the_same_features(way: tuple[str, dict[str, Any]]) -> None:
    method, stream = lived(way)
    x, before = rows(stream), backbone(method)
    sums = {path: total for path, total in method.by_path().items() if len(total.updates)}
    folded = merged(method.backbone, sums)
    for path, weight in method.plan().weights.items():
        folded.get_submodule(path).weight.data.copy_(weight)
    with torch.inference_mode():
        torch.testing.assert_close(method.head(folded(x)), logits(method, x), rtol=1e-4, atol=1e-5)
    assert_same(before, backbone(method))


COUNTS: list[tuple[str, dict[str, Any], int]] = [
    ("lora", {"rank": 5}, DEPTH * 4 * D * 5),
    ("lora", {"rank": 5, "parts": "", "layers": ["*.proj", "*.fc1"]}, DEPTH * (2 + 5) * D * 5),
    ("lora", {"rank": 5, "blocks": [0, 3], "parts": "k"}, 2 * 2 * D * 5),
    ("o_lora", {"rank": 3}, DEPTH * 4 * D * 3),
    ("inflora", {"rank": 3}, DEPTH * 2 * D * 3),
]


@pytest.mark.parametrize(("name", "options", "count"), COUNTS, ids=str)
def test_a_task_trains_as_many_numbers_as_its_formula_says(name: str, options: dict[str, Any], count: int) -> None:
    for learned in (0, 1):
        method, _ = begun(name, learned, **options)
        assert sum(p.numel() for group in method.trainable() for p in group["params"]) == count + HEAD


def test_numbers_of_the_published_transformer() -> None:
    assert 12 * 2 * 2 * 768 * 10 == 368_640  # A and B of queries and values at rank 10
    for rank, parts, expected in ((10, "qv", 368_640), (8, "qv", 294_912)):
        update = factory("lora", rank=rank, parts=parts)(tiny_vit(embed_dim=96, depth=1), 2)
        update.grow_updates(rank)
        assert sum(p.numel() for p in update.sums.parameters()) * 12 * 8 == expected


@pytest.mark.parametrize("name", ["lora", "inflora", "sd_lora"])
def test_updates_work_on_separate_layers_of_a_text_encoder(name: str) -> None:
    torch.manual_seed(0)
    method = factory(name, parts="kv", rank=2)(Encoder(), CLASSES)
    stream = image_stream()
    live(method, stream, until=2, budget=decaying())
    assert method.sites == {f"layers.{i}.{n}": None for i in range(2) for n in ("key", "value")}
    assert logits(method, rows(stream)).isfinite().all()


class Encoder(nn.Module):
    """Two blocks of attention with a layer for each of queries, keys and values."""

    num_features = 8

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(8, 8)
        names = ("query", "key", "value")
        self.layers = nn.ModuleList(nn.ModuleDict({n: nn.Linear(8, 8) for n in names}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x.flatten(1, 2))
        for layer in self.layers:
            q, k, v = (layer[n](x) for n in ("query", "key", "value"))  # type: ignore[index,operator]
            x = x + nn.functional.scaled_dot_product_attention(q, k, v)
        return x.mean(dim=1)


# --- lora and o_lora


def test_the_first_step_moves_b_alone() -> None:
    method, ctx = begun("lora", 0, growth="per_task")
    before = {path: update.down.detach().clone() for path, update in method.newest().items()}
    method.train()
    step(method, ctx, torch.optim.SGD(method.sums.parameters(), lr=0.1))
    for path, update in method.newest().items():
        assert torch.equal(update.down, before[path]) and update.up.any()


def test_growth_and_penalty_make_no_difference_on_one_task() -> None:
    ends = []
    for name, options in (("lora", {}), ("lora", {"growth": "per_task"}), ("o_lora", {"orthogonality": 5.0})):
        method, stream = make(name, **options)
        live(method, stream, until=1)
        ends.append(state(method))
    for other in ends[1:]:
        assert_same(ends[0], other)


def test_o_lora_without_penalty_is_inc_lora() -> None:
    ends = []
    for name, options in (("lora", {"growth": "per_task"}), ("o_lora", {"orthogonality": 0.0})):
        method, stream = make(name, **options)
        live(method, stream, until=2)
        ends.append(state(method))
    assert_same(*ends)


def test_one_update_for_all_tasks_is_trained_in_turn() -> None:
    method, stream = make("lora")
    live(method, stream, until=2)
    assert all(len(total.updates) == 1 for total in method.by_path().values())
    assert all(p.requires_grad for p in method.sums.parameters())
    inc, stream = make("lora", growth="per_task")
    live(inc, stream, until=2)
    assert all(len(total.updates) == 2 for total in inc.by_path().values())


FIRST, SECOND = torch.tensor([[1.0, 0, 2], [0, 1, -1]]), torch.tensor([[1.0, 1, 0], [0, 2, 1]])


def test_the_penalty_equals_worked_numbers() -> None:
    assert torch.equal(FIRST @ SECOND.t(), torch.tensor([[1.0, 2], [1, 1]]))
    assert overlap([FIRST, SECOND], "sum") == 5
    assert overlap([FIRST, SECOND], "squares") == 7
    cosines = torch.tensor([1 / 10**0.5, 2 / 5, 1 / 2, 1 / 10**0.5])
    torch.testing.assert_close(overlap([FIRST, SECOND], "cosine"), cosines.mean())
    for penalty in ("sum", "squares", "cosine"):
        assert overlap([FIRST], penalty) == 0  # type: ignore[arg-type]
        several = overlap([FIRST, SECOND, SECOND + 1], penalty)  # type: ignore[arg-type]
        swapped = overlap([SECOND.flip(0), FIRST, (SECOND + 1).flip(0)], penalty)  # type: ignore[arg-type]
        torch.testing.assert_close(several, swapped)


@pytest.mark.parametrize("penalty", ["sum", "squares", "cosine"])
def test_orthogonal_maps_have_no_penalty_and_b_has_no_gradient_of_it(penalty: str) -> None:
    method, _ = begun("o_lora", 1, rank=2, penalty=penalty)
    method.overlap().backward()
    for update in method.newest().values():
        assert update.up.grad is None and update.down.grad.any()
    axes = torch.eye(D)
    with torch.no_grad():
        for total in method.by_path().values():
            for place, update in enumerate(total.updates):
                update.down.copy_(axes[2 * place : 2 * place + 2].expand_as(update.down))
                update.down.grad = None
    assert method.overlap() == 0
    method.overlap().backward()
    if penalty == "squares":
        assert not any(update.down.grad.any() for update in method.newest().values())


def test_the_loss_has_the_weights_of_the_schedule() -> None:
    method, ctx = begun("o_lora", 1, orthogonality=0.5, schedule=[0.0, 3.0], norm_penalty=0.1)
    method.eval()
    batch = next(ctx.task.train.batches(8))
    factors = [p for update in method.newest().values() for p in (update.down, update.up)]
    norms = sum(p.norm() for p in factors)
    plain = method.classification_loss(batch, ctx)
    torch.testing.assert_close(method.loss(batch, ctx), plain + 1.5 * method.overlap() + 0.1 * norms)
    method.loss(batch, ctx).backward()
    assert all(p.grad.isfinite().all() for p in factors), "the norm of a new B is 0"
    assert method.strength(context(ctx.stream, 0)) == 0
    assert method.strength(context(ctx.stream, 2)) == 1.5


def test_a_large_penalty_makes_new_maps_orthogonal() -> None:
    found = {}
    for weight in (0.0, 1.0):
        method, ctx = begun("o_lora", 1, rank=2, orthogonality=weight, budget=sgd(lr=0.02, momentum=0.0))
        method.learn(ctx.task, ctx)
        found[weight] = float(method.overlap().detach())
    assert found[1.0] < 0.5 * found[0.0]


MISFITS = [
    ("lora", {"orthogonality": 0.1}, r"^method\.orthogonality: compares updates .* method\.growth=per_task"),
    ("o_lora", {"schedule": []}, r"^method\.schedule: must list"),
    ("inflora", {"parts": "vk"}, r"^method\.parts: 'vk' is none"),
]


@pytest.mark.parametrize(("name", "options", "message"), MISFITS, ids=str)
def test_options_that_do_not_suit_each_other(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        factory(name, **options)(tiny_vit(), CLASSES)


def test_updates_of_different_layers_have_the_size_of_their_layer() -> None:
    method, _ = begun("lora", 0, layers=["*.mlp.fc?", "*.attn.proj"])
    for path, update in method.newest().items():
        layer = method.backbone.get_submodule(path)
        assert update.delta().shape == layer.weight.shape
        assert isinstance(update, LinearLoRA) == (not path.endswith("qkv"))
