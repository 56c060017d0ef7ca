"""PackNet, HAT and FISH: earlier tasks stay bitwise the same, and each method follows its own rules."""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import pytest
import torch
from helpers import Net, context, factory, image_stream, live, sgd, tiny_vit, trace
from torch import Tensor, nn

from clrun.backbones.small import cnn, resnet18
from clrun.blocks.params import flatten, select
from clrun.data.stream import Stream, Task
from clrun.learning.budget import Budget
from clrun.learning.method import Method
from clrun.methods.hat import compensation, slope
from clrun.running.accounting import state_bytes
from clrun.system.errors import ConfigError
from clrun.system.seeding import seed_all

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "net": Net,
    "cnn": partial(cnn, (1, 8, 8), width=8, depth=2),
    "resnet": partial(resnet18, (1, 16, 16), width=4, bias=False, pool=None),
    "vit": tiny_vit,
}
BUDGETS = {
    "sgd": Budget(partial(torch.optim.SGD, lr=0.03, momentum=0.9, weight_decay=0.1), epochs=2, batch_size=10),
    "adamw": Budget(partial(torch.optim.AdamW, lr=0.01, weight_decay=0.5), epochs=2, batch_size=10),
}
METHODS = [
    ("packnet", {"rest": "freeze_after_first"}),
    ("packnet", {"rest": "per_task"}),
    ("hat", {}),
    ("fish", {"mode": "isolated"}),
    ("fish", {"mode": "sequential"}),
]
NO_STEPS = {"epochs": 0, "steps": None}


def made(name: str, network: str = "net", **options: Any) -> tuple[Method, Stream]:
    """Return a new method on a new network, and the task-incremental stream."""
    seed_all(0, "init")
    return factory(name, **options)(NETWORKS[network](), 6), image_stream("til")


def own_logits(method: Method, stream: Stream, task: int) -> Tensor:
    """Return the logits of all test rows, read as rows of a task, for its classes."""
    method.eval()
    x = torch.cat([batch.x for t in stream.tasks for batch in t.test.batches(100)])
    with torch.inference_mode():
        return method(x, task)[:, stream.tasks[task].classes]


PAIRS = [("net", "sgd"), ("cnn", "adamw"), ("vit", "sgd")]
PAIRS_SLOW = [("net", "adamw"), ("vit", "adamw"), ("resnet", "sgd"), ("resnet", "adamw"), ("cnn", "sgd")]


@pytest.mark.parametrize(
    ("network", "budget"), [*PAIRS, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS_SLOW)]
)
@pytest.mark.parametrize(("name", "options"), METHODS, ids=str)
def test_old_tasks_stay_bitwise(name: str, options: dict[str, Any], network: str, budget: str) -> None:
    method, stream = made(name, network, **options)
    seen = trace(lambda m: [own_logits(m, stream, k) for k in range(3)], method, stream, budget=BUDGETS[budget])
    for task in range(3):
        assert all(torch.equal(seen[task][task], later[task]) for later in seen[task:])
        assert seen[task][task].std() > 0
    assert not seen[0][2].any(), "a task that has not begun has logits 0"


@pytest.mark.parametrize(("name", "options"), METHODS, ids=str)
def test_every_task_learns(name: str, options: dict[str, Any]) -> None:
    # So few units and steps want a small penalty.
    method, stream = made(name, "cnn", **(options if name != "hat" else {"strength": 0.1}))
    journal = live(method, stream, budget=sgd(epochs=8, lr=0.02 if name == "hat" else 0.1))
    correct = [row["correct"] for row in journal.recorded if row["position"] == 3]
    assert min(correct) > 8, "each task has 16 test rows of two classes"
    assert sum(correct) > 36


def finetuned(stream: Stream, budget: Budget, network: str = "net") -> Method:
    plain, _ = made("finetune", network)
    live(plain, stream, budget=budget, until=1)
    return plain


# --- PackNet


def test_packnet_without_pruning_is_finetuning_on_one_task() -> None:
    budget = sgd(momentum=0.9, weight_decay=1e-2, clip_norm=1.0)
    method, stream = made("packnet", prune=0.0)
    live(method, stream, budget=budget, until=1)
    plain = finetuned(stream, budget)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, method.state_dict()[name]), name
    assert_same_logits(method, plain, stream)
    assert method.mask.free() == 0


def assert_same_logits(method: Method, plain: Method, stream: Stream) -> None:
    """The logits agree to 1e-6: masked weights may have another memory order, whose kernels round differently."""
    expected = own_logits_of_finetune(plain, stream)
    torch.testing.assert_close(own_logits(method, stream, 0), expected, rtol=0, atol=1e-6)


def own_logits_of_finetune(method: Method, stream: Stream) -> Tensor:
    method.eval()
    x = torch.cat([batch.x for t in stream.tasks for batch in t.test.batches(100)])
    with torch.inference_mode():
        return method(x)[:, stream.tasks[0].classes]


def test_packnet_capacity_shrinks_as_it_should_and_is_logged() -> None:
    method, stream = made("packnet", prune=0.5)
    journal = live(method, stream)
    free = [r["free_weights"] for r in journal.logged if r["phase"] == "capacity"]
    assert free == pytest.approx([1.0, 0.5, 0.25], abs=0.01)
    counts = torch.bincount(method.mask.owner, minlength=4)
    total = sum(prod(shape) for shape in method.mask.shapes.values())
    assert int(counts.sum()) == total == method.mask.owner.nbytes
    assert state_bytes(method)["mask"] == total
    assert {r["phase"] for r in journal.logged} == {"capacity", "fit", "retrain"}


def test_packnet_moves_only_the_weights_of_the_task() -> None:
    method, stream = made("packnet")
    live(method, stream, until=1, budget=BUDGETS["sgd"])
    before = {name: p.detach().clone() for name, p in method.backbone.named_parameters()}
    live(method, stream, learned=1, until=2, budget=BUDGETS["sgd"])
    for name, p in method.backbone.named_parameters():
        if name in method.mask.shapes:
            assert torch.equal(p[method.mask.owned(0)[name]], before[name][method.mask.owned(0)[name]])
            assert (p[method.mask.owned(1)[name]] != 0).any()
        else:
            assert torch.equal(p, before[name]), "biases and normalisation belong to the first task"


def test_packnet_does_not_prune_patch_embeddings_and_norms() -> None:
    method, _ = made("packnet", "vit")
    names = set(method.mask.shapes)
    assert all(name.rpartition(".")[0].endswith(("qkv", "proj", "fc1", "fc2")) for name in names)
    assert not any("patch_embed" in name or "norm" in name for name in names)
    assert {"patch_embed.proj.weight", "pos_embed", "norm.weight"} <= set(method.others)


def test_packnet_refuses_more_tasks_than_owners() -> None:
    method, stream = made("packnet")
    many = Stream(stream.tasks * 85, 6, "til", transform=stream.transform)
    with pytest.raises(ConfigError, match="supports at most 254 tasks, not 255"):
        method.check(many)


# --- HAT


def test_hat_slope_runs_through_each_epoch() -> None:
    stream = image_stream("til")  # 32 rows
    ctx = context(stream, budget=sgd(batch_size=8))
    values = []
    for step in range(8):
        ctx.progress.step = step
        values.append(slope(ctx, 400.0))
    rise = (400 - 1 / 400) / 3
    assert values == pytest.approx([1 / 400 + k * rise for k in range(4)] * 2)
    assert slope(context(stream, budget=sgd(batch_size=100)), 400.0) == 400.0


@pytest.mark.parametrize("s", [1 / 400, 0.3, 1.0, 3.0])
def test_hat_compensation_makes_the_gradient_that_of_slope_one(s: float) -> None:
    e = torch.linspace(-4, 4, 25, dtype=torch.float64, requires_grad=True)
    (given,) = torch.autograd.grad(torch.sigmoid(s * e).sum(), e)
    (wanted,) = torch.autograd.grad(torch.sigmoid(e).sum(), e)
    torch.testing.assert_close(given * compensation(e.detach(), s, 400.0), 400 * wanted)


def test_hat_with_open_gates_is_finetuning(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = sgd(momentum=0.9, weight_decay=1e-2)
    monkeypatch.setattr("clrun.methods.hat.slope", lambda ctx, s_max: 1e4)  # gates that are exactly 1
    method, stream = made("hat", strength=0.0, init="uniform")
    begin = method.begin_task

    def begin_open(task: Task, ctx: Any) -> None:
        begin(task, ctx)
        method.embeddings[-1].data.fill_(6.0)

    object.__setattr__(method, "begin_task", begin_open)
    live(method, stream, budget=budget, until=1)
    plain = finetuned(stream, budget)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, method.state_dict()[name]), name
    assert torch.equal(own_logits(method, stream, 0), own_logits_of_finetune(plain, stream))


def test_hat_under_a_heavy_penalty_opens_no_new_unit() -> None:
    method, stream = made("hat", "cnn", init="uniform")
    live(method, stream, until=1)
    used = method.units.used.clone()
    method.strength = 1e5
    method.warmup_epochs = 0
    live(method, stream, learned=1, until=2, budget=sgd(epochs=6))
    assert 0 < used.sum() < len(used)
    assert torch.equal(method.units.used, used)
    assert (method.gates(1) <= used).all()


def test_hat_masks_of_tasks_are_within_the_cumulative_one() -> None:
    method, stream = made("hat", "cnn")
    journal = live(method, stream)
    gates = torch.stack([method.gates(task) for task in range(3)])
    assert torch.equal(gates.amax(dim=0), method.units.used)
    assert set(gates.unique().tolist()) <= {0.0, 1.0}
    logged = [r for r in journal.logged if r["phase"] == "gates"]
    assert [r["open_units"] for r in logged] == pytest.approx(gates.mean(dim=1).tolist())
    assert all(-1 <= r["binarisation_gain"] <= 1 for r in logged)
    assert method.embeddings[0].abs().max() <= 6


def test_hat_paper_gates_leak() -> None:
    method, stream = made("hat", "vit", binarise="paper", s_max=30.0)
    seen = trace(lambda m: own_logits(m, stream, 0), method, stream)
    assert not torch.equal(seen[0], seen[2])


def test_hat_state_is_what_the_card_says() -> None:
    method, stream = made("hat", "vit")
    live(method, stream)
    units = 4 * (4 + 128)
    sizes = state_bytes(method)
    assert sizes["units"] + sizes["embeddings"] == (3 + 1) * units * 4
    assert set(sizes) == {"backbone", "head", "units", "embeddings", "total"}


def test_hat_warmup_is_without_penalty() -> None:
    ends = []
    for options in ({"strength": 0.0}, {"strength": 50.0, "warmup_epochs": 2}, {"strength": 50.0}):
        method, stream = made("hat", "cnn", **options)
        live(method, stream, until=1)
        ends.append(method.embeddings[0].detach().clone())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


# --- FISH


@pytest.mark.parametrize("mode", ["isolated", "sequential"])
def test_fish_changes_few_weights_and_leaves_the_backbone_as_it_was(mode: str) -> None:
    method, stream = made("fish", mode=mode, ratio=0.2)
    base = flatten(select(method.backbone)).detach().clone()
    head = 2 * 13
    count = int(0.2 * (len(base) + head)) - head
    trained: list[Tensor] = []
    after = method.end_task

    def look(task: Task, ctx: Any) -> None:
        trained.append(flatten(select(method.backbone)).detach().clone())
        after(task, ctx)

    object.__setattr__(method, "end_task", look)
    live(method, stream, budget=BUDGETS["adamw"])
    assert torch.equal(flatten(select(method.backbone)), base)
    entries = [set(delta.entries.tolist()) for delta in method.deltas]
    assert all(len(e) == count for e in entries)
    for task, weights in enumerate(trained):
        allowed = set().union(*entries[: task + 1]) if mode == "sequential" else entries[task]
        changed = set((weights != base).nonzero()[:, 0].tolist())
        assert changed <= allowed
        assert len(changed & entries[task]) > 0.9 * count
    if mode == "sequential":
        assert not entries[0] & entries[1] and not (entries[0] | entries[1]) & entries[2]
    assert state_bytes(method)["deltas"] == 3 * count * 8


def test_fish_masks_are_nested_and_take_the_largest_fisher() -> None:
    masks = {}
    for ratio in (0.1, 0.3, 1.0):
        method, stream = made("fish", ratio=ratio)
        ctx = context(stream)
        seed_all(0, "task", 0)
        method.begin_task(stream.tasks[0], ctx)
        method.base = flatten(select(method.backbone)).detach()
        masks[ratio] = set(method._chosen(stream.tasks[0], ctx).tolist())
    assert masks[0.1] < masks[0.3] < masks[1.0] == set(range(len(flatten(select(method.backbone)))))
    ctx = context(stream)
    scores = method._scores(stream.tasks[0], ctx)
    rest = sorted(masks[1.0] - masks[0.1])
    assert scores[sorted(masks[0.1])].min() >= scores[rest].max()


def test_fish_of_all_weights_is_finetuning() -> None:
    budget = sgd(momentum=0.9, weight_decay=1e-2, clip_norm=1.0)
    method, stream = made("fish", ratio=1.0, warmup=NO_STEPS)
    live(method, stream, budget=budget, until=1)
    plain = finetuned(stream, budget)
    assert torch.equal(method.deltas[0].values, flatten(select(plain.backbone)))
    assert torch.equal(method.head.weight, plain.head.weight)
    assert_same_logits(method, plain, stream)


def test_fish_warms_up_the_head_alone() -> None:
    method, stream = made("fish")
    seen: list[Tensor] = []
    chosen = method._chosen

    def look(task: Task, ctx: Any) -> Tensor:
        seen.append(flatten(select(method.backbone)).detach().clone())
        seen.append(method.head.weight.detach().clone())
        return chosen(task, ctx)

    object.__setattr__(method, "_chosen", look)
    base = flatten(select(method.backbone)).detach().clone()
    live(method, stream, until=1)
    assert torch.equal(seen[0], base)
    assert seen[1][:2].abs().max() > 1 / 12**0.5, "beyond the initial bound"


@pytest.mark.parametrize("score", ["fisher", "absolute"])
def test_fish_scores(score: str) -> None:
    method, stream = made("fish", score=score, labels="exact")
    live(method, stream)
    assert len(method.deltas) == 3


def test_fish_refuses_a_ratio_that_the_head_uses_up() -> None:
    method, stream = made("fish", ratio=0.03)
    with pytest.raises(ConfigError, match=r"method.ratio=0.03: the head takes 26 of 7.. weights"):
        method.check(stream)
