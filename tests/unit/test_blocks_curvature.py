"""Diagonal Fisher estimators and the quadratic penalty."""

import copy
from typing import Any

import pytest
import torch
from helpers import Identity, Net, context, image_stream, row_stream, sgd
from torch import Tensor, nn

from clrun.blocks.curvature import Diagonal, QuadraticPenalty, diagonal_fisher, gradients, normalised
from clrun.blocks.curvature import forms as curvature_forms
from clrun.data.stream import Stream
from clrun.learning.method import Method

PER_SAMPLE = ("exact", "sampled", "empirical", "predicted")


def softmax_regression(weight: Tensor, x: Tensor, y: Tensor | None = None) -> tuple[Method, Stream]:
    """Return a linear classifier with these weights [C, D] and no bias, and rows of one task with all classes."""
    y = torch.arange(len(x)) % len(weight) if y is None else y
    # A second, unread split makes every class of the data set a class of the task.
    stream = row_stream(
        [(torch.cat([x, x[:1].expand(len(weight), -1)]), torch.cat([y, torch.arange(len(weight))]))], len(weight)
    )
    task = stream.tasks[0]
    stream = Stream(
        (type(task)(0, 0, "", task.classes, task.train.select(torch.arange(len(x))), task.test),), len(weight), "cil"
    )
    method = Method(Identity(x.shape[1]), len(weight))
    method.head.grow(torch.arange(len(weight)))
    with torch.no_grad():
        method.head.weight.copy_(weight)
        method.head.bias.zero_()
    method.head.bias.requires_grad_(False)
    return method, stream


def fisher(method: Method, stream: Stream, *, of: nn.Module, index: int = 0, **options: Any) -> dict[str, Tensor]:
    """Return the estimate on the training rows of a task."""
    budget = sgd(batch_size=options.pop("batch_size", 16))
    ctx = context(stream, index, budget=budget, seed=options.pop("seed", 0))
    options = {"labels": "exact", "samples": None} | options
    found = diagonal_fisher(method, stream.tasks[index].train, ctx, of=of, **options)
    return found.params(found.values)


def net(setting: Any = "cil") -> tuple[Method, Stream]:
    """Return a learner with normalisation and dropout that knows two tasks, in mixed modes, and its stream."""
    torch.manual_seed(0)
    stream = image_stream(setting)
    method = Method(Net(), 6)
    method.head.grow(torch.arange(4))
    method.train()
    method.backbone.norm.eval()
    return method, stream


def test_exact_golden_value() -> None:
    weight = torch.tensor([[0.5, -0.5], [0, 1], [1, 0]])
    method, stream = softmax_regression(weight, torch.tensor([[1.0, 2], [0, 1]]))
    expected = torch.tensor([[0.026703, 0.167102], [0.107012, 0.544789], [0.094672, 0.467568]])
    torch.testing.assert_close(fisher(method, stream, of=method.head)["weight"], expected, rtol=0, atol=1e-6)


def test_exact_is_the_closed_form_of_softmax_regression() -> None:
    torch.manual_seed(1)
    weight, x = torch.randn(4, 5), torch.randn(30, 5)
    method, stream = softmax_regression(weight, x)
    p = (x @ weight.T).softmax(1)
    closed = torch.einsum("nc,nd->cd", p * (1 - p), x.square()) / len(x)
    torch.testing.assert_close(fisher(method, stream, of=method.head)["weight"], closed, rtol=1e-5, atol=1e-7)


def test_columns_equal_the_gradients_weighted_by_their_probability() -> None:
    method, stream = net()
    split, ctx = stream.tasks[1].train, context(stream, 1)
    diagonal = diagonal_fisher(method, split, ctx, of=method.backbone, labels="exact", samples=None)
    found = diagonal.params(diagonal.values)
    method.eval()
    params = dict(method.backbone.named_parameters())
    expected = {name: torch.zeros_like(p) for name, p in params.items()}
    for batch in split.batches(1):
        logits = method(batch.x)[0].masked_fill(~ctx.mask(batch.t)[0], float("-inf"))
        logp = logits.log_softmax(0)
        for c in range(4):
            grads = torch.autograd.grad(logp[c], list(params.values()), retain_graph=True)
            for name, grad in zip(params, grads, strict=True):
                expected[name] += logp[c].exp().detach() * grad.square() / len(split)
    for name in params:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-8)


def test_empirical_and_predicted_labels_take_that_gradient() -> None:
    method, stream = net()
    split, ctx = stream.tasks[1].train, context(stream, 1)
    method.eval()
    for labels in ("empirical", "predicted"):
        found = fisher(method, stream, of=method.head, index=1, labels=labels)["weight"]
        expected = torch.zeros_like(found)
        for batch in split.batches(1):
            logits = method(batch.x).masked_fill(~ctx.mask(batch.t), float("-inf"))
            y = batch.y if labels == "empirical" else logits.argmax(1)
            (grad,) = torch.autograd.grad(nn.functional.cross_entropy(logits, y), [method.head.weight])
            expected += grad.square() / len(split)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(("labels", "batch_size"), [("sampled", 16), ("batched", 16), ("batched", 7)])
def test_drawn_labels_are_unbiased(labels: str, batch_size: int) -> None:
    torch.manual_seed(0)
    method, stream = softmax_regression(torch.randn(3, 4), torch.randn(40, 4))
    exact = fisher(method, stream, of=method.head)["weight"]
    draws = [
        fisher(method, stream, of=method.head, labels=labels, batch_size=batch_size, seed=seed)["weight"]
        for seed in range(300)
    ]
    mean = torch.stack(draws).mean(0)
    error = torch.stack(draws).std(0) / 300**0.5
    assert ((mean - exact).abs() < 4.5 * error).all()
    assert (mean.sum() / exact.sum()).item() == pytest.approx(1, abs=0.05)


def test_drawn_labels_follow_p_and_never_a_class_out_of_play() -> None:
    method, stream = net("til")
    own = fisher(method, stream, of=method.head, index=1, labels="sampled")["weight"]
    assert own[[2, 3]].any(1).all()
    assert not own[[0, 1, 4, 5]].any()
    method, stream = net("cil")
    seen = fisher(method, stream, of=method.head, index=1, labels="exact")["weight"]
    assert seen[:4].any(1).all()
    assert not seen[4:].any()


def test_top_k_of_all_classes_is_exact_and_of_one_is_a_part() -> None:
    method, stream = net()
    exact, all_four, one = (fisher(method, stream, of=method.backbone, index=1, top_k=k) for k in (None, 9, 1))
    for name in exact:
        torch.testing.assert_close(all_four[name], exact[name], rtol=1e-5, atol=0)
        assert (one[name] <= exact[name] * (1 + 1e-5)).all()
    assert one["conv.weight"].sum() < 0.9 * exact["conv.weight"].sum()


@pytest.mark.parametrize("labels", PER_SAMPLE)
def test_batch_size_and_memory_limit_do_not_matter(labels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, stream = net()
    reference = fisher(method, stream, of=method.backbone, index=1, labels=labels)
    for count, numbers in ((1, 2**24), (3, 2**24), (5, 2**24), (64, 3000), (64, 1)):
        monkeypatch.setattr(gradients, "GRADIENTS", {"cpu": count})
        monkeypatch.setattr(gradients, "NUMBERS", {"cpu": numbers})
        other = fisher(method, stream, of=method.backbone, index=1, labels=labels)
        for name in reference:
            torch.testing.assert_close(other[name], reference[name], rtol=1e-4, atol=1e-9)


def test_rows_twice_give_the_same_scale() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(3, 4), torch.randn(10, 4)
    once, stream = softmax_regression(weight, x)
    twice, double = softmax_regression(weight, x.repeat(2, 1))
    a, b = fisher(once, stream, of=once.head), fisher(twice, double, of=twice.head)
    torch.testing.assert_close(a["weight"], b["weight"])


@pytest.mark.parametrize("labels", [*PER_SAMPLE, "batched"])
def test_leaves_the_learner_and_the_random_numbers_as_they_were(labels: str) -> None:
    method, stream = net()
    before = {name: t.clone() for name, t in method.state_dict().items()}
    modes = [m.training for m in method.modules()]
    numbers = torch.get_rng_state()
    found = fisher(method, stream, of=method.backbone, index=1, labels=labels, samples=11)
    assert torch.equal(numbers, torch.get_rng_state())
    assert modes == [m.training for m in method.modules()]
    assert all(torch.equal(before[name], t) for name, t in method.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in method.parameters())
    assert found.keys() == dict(method.backbone.named_parameters()).keys()
    assert all((f >= 0).all() and not f.requires_grad for f in found.values())


def test_samples_are_a_seeded_subset() -> None:
    method, stream = net()
    few = [fisher(method, stream, of=method.head, index=1, samples=5, seed=seed)["weight"] for seed in (0, 0, 1)]
    assert torch.equal(few[0], few[1])
    assert not torch.equal(few[0], few[2])


def test_frozen_parameters_have_no_importance() -> None:
    method, stream = net()
    for p in method.backbone.conv.parameters():
        p.requires_grad_(False)
    assert not any(name.startswith("conv") for name in fisher(method, stream, of=method.backbone, index=1))
    for p in method.backbone.parameters():
        p.requires_grad_(False)
    assert fisher(method, stream, of=method.backbone, index=1) == {}
    assert QuadraticPenalty(1.0)(method.backbone).item() == 0


def test_normalised() -> None:
    f = Diagonal.of({"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([8.0])})
    assert normalised(f, "none").values.tolist() == [1, 3, 8]
    assert normalised(f, "mean").values.tolist() == [0.25, 0.75, 2]
    assert normalised(f, "max").values.tolist() == [0.125, 0.375, 1]
    zero = normalised(Diagonal.of({"a": torch.zeros(2)}), "mean")
    assert zero.values.tolist() == [0, 0]


class Vector(nn.Module):
    """Parameters theta [P] in float64."""

    def __init__(self, *theta: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def set(self, *theta: float) -> "Vector":
        with torch.no_grad():
            self.theta.copy_(torch.tensor(theta))
        return self


def importance(*f: float) -> Diagonal:
    return Diagonal.of({"theta": torch.tensor(f, dtype=torch.float64)})


def test_penalty_and_its_gradient() -> None:
    module, penalty = Vector(1, 2), QuadraticPenalty(1.0)
    assert penalty(module).item() == 0
    penalty.update(module, importance(3, 0.5))
    value = penalty(module)
    value.backward()
    assert value.item() == 0
    assert module.theta.grad is not None
    assert not module.theta.grad.any()
    module.theta.grad = None
    value = penalty(module.set(2, 6))
    value.backward()
    assert value.item() == 0.5 * (3 * 1 + 0.5 * 16)
    assert module.theta.grad.tolist() == [3, 2]


@pytest.mark.parametrize("decay", [1.0, 0.5, 0.0])
def test_online_keeps_the_latest_anchor_and_decayed_sums(decay: float) -> None:
    module, penalty = Vector(0, 0), QuadraticPenalty(decay)
    penalty.update(module, importance(1, 2))
    penalty.update(module.set(4, 4), importance(3, 0))
    assert penalty.importance.tolist() == [decay + 3, 2 * decay]
    assert penalty.anchor.tolist() == [4, 4]


def test_separate_equals_the_sum_of_penalties_up_to_a_constant() -> None:
    together, alone = QuadraticPenalty(0.5, "separate"), []
    lives = [
        ((1.0, 2.0, 5.0), (4.0, 1.0, 0.0)),
        ((3.0, -1.0, 6.0), (2.0, 0.0, 0.0)),
        ((0.0, 5.0, 7.0), (1.0, 3.0, 0.0)),
    ]
    for age, (theta, f) in enumerate(lives):
        module = Vector(*theta)
        together.update(module, importance(*f))
        one = QuadraticPenalty(1.0)
        one.update(module, importance(*f).scale(0.5 ** (2 - age)))
        alone.append(one)
    probes = [Vector(*torch.randn(3).tolist()) for _ in range(4)]
    differences = [sum(one(p) for one in alone) - together(p) for p in probes]
    torch.testing.assert_close(torch.stack(differences), differences[0].expand(4), rtol=0, atol=1e-12)


def test_proximal_is_the_minimiser_and_stable() -> None:
    module, penalty = Vector(0, 0, 0), QuadraticPenalty(1.0)
    penalty.update(module, importance(0, 2, 1e8))
    penalty.proximal_(module.set(3, 3, 3), 0.5)
    assert module.theta.tolist() == pytest.approx([3, 1.5, 3 / (1 + 5e7)], rel=1e-12)
    before = module.theta.clone()
    penalty.proximal_(module, 0.0)
    assert torch.equal(before, module.theta)


def test_gaussian_linear_regression_equals_joint_least_squares() -> None:
    # Orthogonal design: the curvature X'X/N is diagonal; strength N1/N2 is Bayes exact.
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 3, dtype=torch.float64))[0]
    x1 = basis * torch.tensor([3.0, 1.0, 0.2])
    x2, y1, y2 = torch.randn(5, 3).double(), torch.randn(12).double(), torch.randn(5).double()
    module, penalty = Vector(*torch.linalg.lstsq(x1, y1[:, None]).solution[:, 0].tolist()), QuadraticPenalty(1.0)
    penalty.update(module, Diagonal.of({"theta": x1.square().sum(0) / 12}))
    optimizer = torch.optim.LBFGS(
        module.parameters(), max_iter=500, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = 0.5 * (y2 - x2 @ module.theta).square().mean() + 12 / 5 * penalty(module)
        value.backward()
        return value

    optimizer.step(loss)
    joint = torch.linalg.lstsq(torch.cat([x1, x2]), torch.cat([y1, y2])[:, None]).solution[:, 0]
    torch.testing.assert_close(module.theta.detach(), joint, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["diagonal", "identity"])
def test_a_penalty_does_not_depend_on_how_weights_lie_in_memory(kind: str) -> None:
    torch.manual_seed(0)
    rows = nn.Conv2d(3, 4, 2).double()
    other = copy.deepcopy(rows).to(memory_format=torch.channels_last)
    shapes = {name: tuple(p.shape) for name, p in rows.named_parameters()}
    values = torch.rand(sum(p.numel() for p in rows.parameters())).double()
    curvature = Diagonal(shapes, values) if kind == "diagonal" else curvature_forms.Identity(shapes, 0.7)
    penalties = [QuadraticPenalty(1.0), QuadraticPenalty(1.0)]
    for _ in range(2):  # the second time the anchor is another one
        found = []
        for module, penalty in zip((rows, other), penalties, strict=True):
            penalty.replace(module, curvature)
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter += torch.arange(parameter.numel()).view_as(parameter) / 10
            module.zero_grad()
            value = penalty(module)
            value.backward()  # type: ignore[no-untyped-call]
            found.append((value.detach(), module.weight.grad, module.bias.grad))
        torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)
        pull = penalties[1].gradient(other)
        torch.testing.assert_close(found[1][1:], (pull["weight"], pull["bias"]), rtol=1e-12, atol=0)
