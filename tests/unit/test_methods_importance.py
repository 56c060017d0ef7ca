"""SI, MAS and QR: the importance of a weight, and how important weights are kept."""

from functools import partial
from typing import Any

import pytest
import torch
from helpers import Identity, born, context, factory, image_stream, live, row_stream, sgd, tiny_vit, trace
from torch import Tensor, nn

from clrun.blocks.curvature import Diagonal, QuadraticPenalty
from clrun.blocks.params import clone, flatten, gradients, select, shapes_of
from clrun.data.split import Batch
from clrun.data.stream import Stream
from clrun.learning.method import Method
from clrun.running.accounting import state_bytes
from clrun.system.seeding import seed_all


class Affine(nn.Module):
    """A backbone whose features are one linear map of the rows."""

    def __init__(self, inputs: int = 5, num_features: int = 4) -> None:
        super().__init__()
        self.num_features = num_features
        self.map = nn.Linear(inputs, num_features)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.map(x)
        return features


def weights(method: Method) -> Tensor:
    """Return the weights of the backbone [P]."""
    return flatten(select(method.backbone)).detach().clone()


def rows(tasks: int = 2) -> Stream:
    """Return tasks of two classes of 24 rows."""
    source = torch.Generator().manual_seed(0)
    y = torch.arange(24) % 2
    made = [(torch.randn(24, 5, generator=source) + y[:, None] * (1 + t), y + 2 * t) for t in range(tasks)]
    return row_stream(made, 2 * tasks, "til")


def linear(name: str, **options: Any) -> Method:
    """Return a learner on `Affine`."""
    seed_all(0, "init")
    return factory(name, **options)(Affine(), 4)


def full_loss(method: Method, stream: Stream, index: int) -> float:
    """Return the cross-entropy of a task's training rows."""
    ctx = context(stream, index)
    with torch.no_grad():
        return float(Method.loss(method, next(iter(stream.tasks[index].train.batches(100))), ctx))


# --- SI


def test_si_path_sums_to_the_fall_of_the_loss() -> None:
    method, stream = linear("si"), rows()
    ctx = context(stream, budget=sgd(lr=1e-3, momentum=0.0, epochs=200, batch_size=24))
    seed_all(0, "task", 0)
    method.begin_task(stream.tasks[0], ctx)
    for parameter in method.head.parameters():
        parameter.requires_grad_(False)  # its part of the fall is not counted
    before = full_loss(method, stream, 0)
    method.learn(stream.tasks[0], ctx)
    fall = before - full_loss(method, stream, 0)
    assert fall > 0.01
    assert method.path.omega.sum().item() == pytest.approx(fall, rel=2e-3)


def test_si_of_a_quadratic_is_half_its_curvature() -> None:
    curvature, target = torch.tensor([1.0, 1.5, 3.0, 4.0]), torch.tensor([1.0, -2.0, 0.5, 3.0])

    class Free(nn.Module):
        num_features = 4

        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            return x[:, :4] * 0 + self.theta

    method, stream = factory("si", xi=1e-12)(Free(), 4), rows()

    def loss(batch: Batch, ctx: Any) -> Tensor:
        return 0.5 * (curvature * (method.backbone.theta - target).square()).sum()

    method.loss = loss
    live(method, stream, until=1, budget=sgd(lr=2e-3, momentum=0.0, epochs=4000, batch_size=24))
    torch.testing.assert_close(method.backbone.theta.detach(), target, rtol=1e-3, atol=0)
    # The path is summed over finite steps: (1 + lr h / 2) / 2 h.
    torch.testing.assert_close(method.penalty.importance, curvature / 2, rtol=1e-2, atol=0)


def test_si_takes_the_gradient_of_the_task_alone() -> None:
    method, stream = linear("si", strength=50.0), rows()
    live(method, stream, until=1)
    ctx = context(stream, 1)
    method.begin_task(stream.tasks[1], ctx)
    with torch.no_grad():
        method.backbone.map.weight.add_(0.3)
    batch = next(iter(stream.tasks[1].train.batches(24)))
    method.loss(batch, ctx).backward()
    task = flatten(gradients(select(method.backbone))).clone()
    method.adjust_gradients(ctx)
    assert torch.equal(method.path.gradient, task)
    pulled = flatten(gradients(select(method.backbone)))
    held = select(method.backbone)
    penalty = 0.5 * (method.penalty.importance * (flatten(held) - method.penalty.anchor).square()).sum()
    expected = task + 50.0 * flatten(dict(zip(held, torch.autograd.grad(penalty, list(held.values())), strict=True)))
    torch.testing.assert_close(pulled, expected)
    assert (pulled - task).abs().max() > 1e-3


def test_si_importance_is_never_negative_and_frozen_weights_have_none() -> None:
    method, stream = born(factory("si"), image_stream("til"))
    method.backbone.conv.bias.requires_grad_(False)
    seen = trace(lambda m: m.penalty.importance.clone(), method, stream, budget=sgd(lr=0.5))
    assert all((omega >= 0).all() for omega in seen)
    method, stream = linear("si"), rows()
    method.backbone.map.weight.register_hook(torch.zeros_like)
    live(method, stream)
    importance = method.penalty.curvature.params(method.penalty.importance)
    assert not importance["map.weight"].any()
    assert importance["map.bias"].any()


@pytest.mark.parametrize("name", ["si", "mas", "qr"])
def test_first_task_is_finetuning(name: str) -> None:
    ends = []
    for chosen in ("finetune", name):
        method, stream = born(factory(chosen), image_stream())
        live(method, stream, until=1)
        ends.append(weights(method))
    assert torch.equal(*ends)


@pytest.mark.parametrize(("name", "options"), [("si", {"strength": 2.0}), ("mas", {"strength": 3.0}), ("qr", {})])
def test_important_weights_are_held(name: str, options: dict[str, Any]) -> None:
    drift = {}
    for strength in (0.0, options.get("strength", 1.0)):
        method, stream = born(factory(name), image_stream("til", augment=()))
        live(method, stream, until=1, budget=sgd(epochs=10, lr=0.02))
        before, importance = weights(method), method.penalty.importance.clone()
        method.strength = strength
        live(method, stream, learned=1, until=2, budget=sgd(epochs=10, lr=0.02))
        drift[strength > 0] = (importance * (weights(method) - before).square()).sum()
    assert drift[True] < 0.5 * drift[False]


# --- MAS


def mas_of(factor: float, *, per_sample: bool = True, batch_size: int = 10) -> tuple[Method, Stream, Tensor]:
    """Return a learner whose logits were scaled by `factor`, its stream, and the importances it finds."""
    method, stream = linear("mas", per_sample=per_sample, samples=None), rows()
    ctx = context(stream, budget=sgd(batch_size=batch_size))
    seed_all(0, "task", 0)
    method.begin_task(stream.tasks[0], ctx)
    with torch.no_grad():
        for parameter in method.head.parameters():
            parameter.mul_(factor)
    method.end_task(stream.tasks[0], ctx)
    return method, stream, method.penalty.importance


def test_mas_of_a_linear_map_in_closed_form() -> None:
    method, stream, importance = mas_of(1.0)
    x = next(iter(stream.tasks[0].train.batches(100))).x
    head, affine = method.head, method.backbone.map
    with torch.no_grad():
        logits = (head.weight @ (affine.weight @ x.T + affine.bias[:, None]) + head.bias[:, None])[:2]  # [2, N]
        pull = 2 * head.weight[:2].T @ logits  # d |f|^2 / d features, [4, N]
        expected = torch.stack([torch.outer(p, row).abs() for p, row in zip(pull.T, x, strict=True)]).mean(0)
    found = method.penalty.curvature.params(importance)
    torch.testing.assert_close(found["map.weight"], expected)
    torch.testing.assert_close(found["map.bias"], pull.abs().mean(1))


def test_mas_grows_with_the_square_of_the_outputs() -> None:
    torch.testing.assert_close(mas_of(3.0)[2], 9 * mas_of(1.0)[2])


def test_mas_of_batches_cancels_and_depends_on_their_size() -> None:
    single, *sizes = (mas_of(1.0)[2], *(mas_of(1.0, per_sample=False, batch_size=b)[2] for b in (1, 24)))
    torch.testing.assert_close(sizes[0], single)
    assert (sizes[1] <= single + 1e-6).all()
    assert sizes[1].sum() < 0.9 * single.sum()


def test_mas_needs_no_labels() -> None:
    found = []
    for flip in (False, True):
        method, stream = linear("mas"), rows()
        split = stream.tasks[0].train
        if flip:
            split.labels.copy_(1 - split.labels)
        ctx = context(stream)
        seed_all(0, "task", 0)
        method.begin_task(stream.tasks[0], ctx)
        method.end_task(stream.tasks[0], ctx)
        found.append(method.penalty.importance)
    assert torch.equal(*found)


# --- QR


def begun(importance: str, strength: float = 1.0, merge: str = "average") -> tuple[Method, Stream, Any]:
    method, stream = linear("qr", importance=importance, strength=strength, merge=merge), rows()
    live(method, stream, until=1)
    ctx = context(stream, 1)
    seed_all(0, "task", 1)
    method.begin_task(stream.tasks[1], ctx)
    return method, stream, ctx


def test_penalty_step_is_an_interpolation() -> None:
    backbone, rate, strength = Affine(), 0.1, 2.0
    values = torch.rand(24, generator=torch.Generator().manual_seed(0))
    shapes = shapes_of(dict(backbone.named_parameters()))
    penalty = QuadraticPenalty(decay=1.0)
    penalty.replace(backbone, Diagonal(shapes, values))
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(1.0)
    start = flatten(clone(dict(backbone.named_parameters())))
    task = torch.randn(24, generator=torch.Generator().manual_seed(1))
    explicit = start - rate * (task + strength * values * (start - penalty.anchor))
    penalty.interpolate_(backbone, 1 - rate * strength * values)
    torch.testing.assert_close(flatten(dict(backbone.named_parameters())).detach() - rate * task, explicit)


@pytest.mark.parametrize("merge", ["average", "normalise"])
def test_qr_share_is_free_of_scale(merge: str) -> None:
    method, _, _ = begun("ewc", merge=merge)
    method.running.importance = torch.rand(24, generator=torch.Generator().manual_seed(1))
    share = method.present_weight()
    past = method.penalty.importance
    expected = (method.running.importance / (method.running.importance.sum() if merge == "normalise" else 1)).sqrt()
    torch.testing.assert_close(share, expected / (expected + past.sqrt()))
    method.running.importance = method.running.importance * 1e-4
    method.penalty.curvature = Diagonal(method.penalty.shapes, past * (1 if merge == "normalise" else 1e-4))
    torch.testing.assert_close(method.present_weight(), share)


@pytest.mark.parametrize("importance", ["ewc", "mas", "si"])
def test_qr_extremes(importance: str) -> None:
    method, stream, ctx = begun(importance)
    frozen, free = (Diagonal(method.penalty.shapes, torch.full((24,), value)) for value in (1e12, 0.0))
    anchor = method.penalty.anchor.clone()
    method.penalty.curvature = frozen
    method.learn(stream.tasks[1], ctx)
    torch.testing.assert_close(weights(method), anchor, rtol=0, atol=1e-5)
    ends = []
    for name, options in (("qr", {"importance": importance}), ("finetune", {})):
        method, stream = linear(name, **options), rows()
        live(method, stream, until=1)
        if name == "qr":
            method.penalty.curvature = free
        live(method, stream, learned=1)
        ends.append(weights(method))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("importance", ["ewc", "mas", "si"])
def test_qr_running_importance_by_hand(importance: str) -> None:
    method, stream, ctx = begun(importance)
    batch = next(iter(stream.tasks[1].train.batches(24)))
    held = select(method.backbone)
    found = []
    for _ in range(2):
        method.zero_grad()
        method.loss(batch, ctx).backward()
        gradient = flatten(gradients(held)).clone()
        start = flatten(clone(held))
        if importance == "mas":
            logits = method(batch.x)[:, 2:4]
            outputs = torch.autograd.grad(logits.square().sum(1).mean(), list(held.values()))
            found.append(torch.cat([g.flatten() for g in outputs]).abs())
        method.adjust_gradients(ctx)
        with torch.no_grad():
            for parameter in held.values():
                parameter.sub_(0.1 * parameter.grad)
        if importance != "mas":
            moved = flatten(clone(held)) - start
            found.append(gradient.square() if importance == "ewc" else (-gradient * moved).clamp(min=0))
        method.after_step(ctx)
    torch.testing.assert_close(method.running.importance, 0.8 * found[1] + 0.2 * 0.8 * found[0])


def test_qr_merges_the_past() -> None:
    for merge in ("average", "normalise"):
        method, stream, ctx = begun("ewc", merge=merge)
        past, now = method.penalty.importance.clone(), torch.rand(24)
        method.running.importance = now.clone()
        method.end_task(stream.tasks[1], ctx)
        if merge == "average":
            torch.testing.assert_close(method.penalty.importance, (past + now) / 2)
        else:
            torch.testing.assert_close(method.penalty.importance, (past + now / now.sum()) / 2)
        assert torch.equal(method.penalty.anchor, weights(method))
        assert not method.running.importance.any()


# --- all


@pytest.mark.parametrize(
    ("name", "numbers", "options"),
    [
        ("si", 3, {}),
        ("mas", 2, {}),
        ("mas", 2, {"per_sample": False}),
        *(("qr", 3, {"importance": i}) for i in ("ewc", "mas", "si")),
    ],
)
def test_state_is_what_the_card_says(name: str, numbers: int, options: dict[str, Any]) -> None:
    for network in (None, tiny_vit):
        stream = image_stream("til")
        if network is None:
            method, stream = born(factory(name, **options), stream)
        else:
            seed_all(0, "init")
            method = factory(name, **options)(network(), 6)
        live(method, stream, until=2)
        sizes = state_bytes(method)
        assert sizes["total"] - sizes["backbone"] - sizes["head"] == numbers * 4 * len(weights(method))


def test_backbones_without_parameters_are_fine() -> None:
    for name in ("si", "mas", "qr"):
        method = factory(name)(Identity(5), 4)
        live(method, rows())
        assert method.head.initialised.all()


def test_si_with_adam_learns() -> None:
    method, stream = born(factory("si", strength=100.0), image_stream("til", augment=()))
    from clrun.learning.budget import Budget

    live(method, stream, budget=Budget(partial(torch.optim.Adam, lr=1e-2), epochs=5, batch_size=16))
    assert method.penalty.importance.isfinite().all()
