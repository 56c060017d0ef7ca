"""Kronecker-factored and label-free estimates, against matrices of gradients in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Net, context, image_stream, row_stream, tiny_vit
from matrices import as_dense, stored_bytes
from torch import Tensor, nn

from clrun.blocks.curvature import Composite, Curvature, Diagonal, KroneckerFactored, Tape, estimate, kfac, layers_of
from clrun.blocks.curvature.layers import inner_sum, inputs
from clrun.data.stream import Stream
from clrun.learning.method import Method


class Wrapped(nn.Module):
    """A backbone around any network."""

    def __init__(self, net: nn.Module, num_features: int) -> None:
        super().__init__()
        self.net, self.num_features = net, num_features

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def learner(net: nn.Module, classes: int, x: Tensor, y: Tensor | None = None) -> tuple[Method, Stream]:
    """A learner in float64 whose logits are the output of `net`, and the rows of one task with all classes."""
    y = torch.arange(len(x)) % classes if y is None else y
    method = Method(Wrapped(net, classes), classes).double()
    method.head = nn.Identity()
    stream = row_stream([(x.double(), y)], classes)
    # The classes that compete are those of the task; a small task may lack some.
    task = stream.tasks[0]
    task = type(task)(0, 0, "", torch.arange(classes), task.train, task.test)
    return method, Stream((task,), classes, "cil")


def found(method: Method, stream: Stream, kind: Any, **options: Any) -> Curvature:
    options = {"labels": "exact", "samples": None} | options
    index = options.pop("index", 0)
    ctx = context(stream, index, seed=options.pop("seed", 0))
    return estimate(kind, method, stream.tasks[index].train, ctx, **({"of": method.backbone} | options))


def fisher(method: Method, stream: Stream) -> Tensor:
    """The Fisher information of the backbone by brute force: one gradient for each row and class."""
    params, total = list(method.backbone.parameters()), 0
    for batch in stream.tasks[0].train.batches(1):
        logp = method(batch.x)[0].log_softmax(0)
        for value in logp:
            grads = torch.autograd.grad(value, params, retain_graph=True)
            g = torch.cat([grad.flatten() for grad in grads])
            total = total + value.exp().detach() * torch.outer(g, g)
    return total / len(stream.tasks[0].train)


def batch(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# --- where the factorisation is exact, and where it is not


@pytest.mark.parametrize("bias", [True, False])
def test_softmax_regression_is_exact_for_one_row_only(bias: bool) -> None:
    torch.manual_seed(0)
    errors = {}
    for rows in (1, 2, 40):
        method, stream = learner(nn.Linear(5, 4, bias=bias), 4, batch(rows, 5))
        errors[rows] = error(as_dense(found(method, stream, "kfac_expand")), fisher(method, stream))
    assert errors[1] < 1e-12
    # E[G (x) A] is not E[G] (x) E[A]: the rest is small, and no mistake to be repaired.
    assert 1e-3 < errors[2] < 0.6
    assert 1e-3 < errors[40] < 0.4


def test_diagonal_is_exact() -> None:
    torch.manual_seed(0)
    method, stream = learner(nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 4)), 4, batch(12, 5))
    exact = fisher(method, stream)
    torch.testing.assert_close(found(method, stream, "diag").diag(), exact.diagonal(), rtol=1e-9, atol=1e-12)


def squared(net: nn.Module, x: Tensor, sharing: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The factors of the layers of `net`, and the exact blocks, under squared loss: a unit column for each output."""
    layers = layers_of(net)
    outer: dict[str, Any] = {name: 0 for name in layers}
    exact = {name: 0 for name in layers}
    with Tape(layers, training=True).recording() as tape:
        values = net(x)
        inner = tape.inner(sharing, len(x))
        directions = torch.eye(values[0].numel(), dtype=torch.float64).view(-1, *values.shape[1:])
        for direction in directions:
            for name, part in tape.outer(values, direction.expand_as(values), sharing, keep=True).items():
                outer[name] = outer[name] + part
            for row in values:
                for name, layer in layers.items():
                    grads = torch.autograd.grad(row, list(layer.parameters()), direction, retain_graph=True)
                    g = torch.cat([grads[0], grads[1][:, None]], dim=1).flatten()
                    exact[name] = exact[name] + torch.outer(g, g)
    n = len(x)
    return {name: torch.kron(outer[name] / n, inner[name] / n) for name in layers}, {
        name: block / n for name, block in exact.items()
    }


def test_one_linear_layer_under_squared_loss_is_exact() -> None:
    torch.manual_seed(0)
    product, exact = squared(nn.Sequential(nn.Linear(3, 2)).double(), batch(6, 3), "expand")
    torch.testing.assert_close(product, exact)


class Average(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


def test_expand_is_exact_for_independent_positions_and_reduce_for_averaged_ones() -> None:
    torch.manual_seed(0)
    x = batch(5, 4, 3)
    linear = [nn.Linear(3, 3), nn.Linear(3, 2)]
    for sharing, net in (("expand", nn.Sequential(*linear)), ("reduce", nn.Sequential(*linear, Average()))):
        product, exact = squared(net.double(), x, sharing)
        torch.testing.assert_close(product, exact)
        other, _ = squared(net.double(), x, "reduce" if sharing == "expand" else "expand")
        assert error(other["0"], exact["0"]) > 0.1


def test_a_shared_layer_has_as_many_positions_as_calls() -> None:
    torch.manual_seed(0)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.layer(x[:, 0]), self.layer(x[:, 1])], dim=1)

    net = Twice().double()
    x = batch(5, 2, 3)
    twice = squared(net, x, "expand")
    once = squared(nn.Sequential(net.layer), x, "expand")
    torch.testing.assert_close(twice[0]["layer"], once[0]["0"])
    torch.testing.assert_close(twice[0]["layer"], twice[1]["layer"])


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": (3, 2), "stride": 2, "padding": 1, "dilation": (1, 2)},
        {"kernel_size": 3, "padding": "same", "padding_mode": "circular", "bias": False},
        {"kernel_size": 1, "padding_mode": "zeros"},
    ],
    ids=str,
)
def test_inputs_of_a_convolution_are_its_patches(options: dict[str, Any]) -> None:
    conv = nn.Conv2d(2, 4, **options).double()
    x = batch(3, 2, 7, 6)
    patches = inputs(conv, x, 3)
    matrix = conv.weight.flatten(1)
    if conv.bias is not None:
        matrix = torch.cat([matrix, conv.bias[:, None]], dim=1)
    torch.testing.assert_close(patches @ matrix.T, conv(x).flatten(2).transpose(1, 2))
    flat = patches.flatten(0, 1)
    torch.testing.assert_close(inner_sum(patches, "expand") / 3, flat.T @ flat / len(flat))


def test_groups_of_a_convolution_are_left_out_or_taken_as_positions() -> None:
    conv = nn.Conv2d(4, 6, 3, groups=2).double()
    assert layers_of(nn.Sequential(conv)) == {}
    assert layers_of(nn.Sequential(conv), groups="average") == {"0": conv}
    x = batch(3, 4, 5, 5)
    both = inputs(conv, x, 3)
    assert both.shape == (3, 2 * 9, 2 * 9 + 1)
    one = nn.Conv2d(2, 6, 3).double()
    apart = torch.stack([inputs(one, x[:, i : i + 2], 3) for i in (0, 2)], dim=2).flatten(1, 2)
    torch.testing.assert_close(both, apart)


# --- what the estimate promises


def net() -> tuple[Method, Stream]:
    """A learner with normalisation and dropout that knows two tasks, in mixed modes, and its stream."""
    torch.manual_seed(0)
    stream = image_stream("cil")
    method = Method(Net(), 6)
    method.head.grow(torch.arange(4))
    method.train()
    method.backbone.norm.eval()
    return method, stream


@pytest.mark.parametrize("kind", ["kfac_expand", "kfac_reduce", "diag", "abs_output"])
@pytest.mark.parametrize("labels", ["exact", "batched"])
def test_leaves_the_learner_and_the_random_numbers_as_they_were(kind: str, labels: str) -> None:
    method, stream = net()
    method.backbone.linear.weight.grad = torch.ones(12, 54)
    before = {name: t.clone() for name, t in method.state_dict().items()}
    modes = [m.training for m in method.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in method.modules()]
    numbers = torch.get_rng_state()
    k = found(method, stream, kind, labels=labels, samples=11, index=1)
    assert torch.equal(numbers, torch.get_rng_state())
    assert modes == [m.training for m in method.modules()]
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in method.modules()]
    assert all(torch.equal(before[name], t) for name, t in method.state_dict().items())
    assert [p.grad is None for p in method.parameters()].count(False) == 1
    assert torch.equal(method.backbone.linear.weight.grad, torch.ones(12, 54))
    assert set(k.shapes) == dict(method.backbone.named_parameters()).keys()
    assert not k.diag().requires_grad
    assert (k.diag() >= 0).all()


def test_composite_is_a_product_for_each_layer_and_the_diagonal_of_the_rest() -> None:
    method, stream = net()
    k, diagonal = (found(method, stream, kind, index=1) for kind in ("kfac_expand", "diag"))
    assert isinstance(k, Composite)
    kinds = {tuple(part.shapes): type(part) for part in k.parts}
    assert kinds == {
        ("conv.weight", "conv.bias"): KroneckerFactored,
        ("linear.weight", "linear.bias"): KroneckerFactored,
        ("norm.weight", "norm.bias"): Diagonal,
    }
    assert stored_bytes(k) == 4 * (6**2 + 10**2 + 12**2 + 55**2 + 12)
    own = diagonal.params(diagonal.values)
    torch.testing.assert_close(k.parts[2].values, torch.cat([own["norm.weight"], own["norm.bias"]]), rtol=1e-5, atol=0)
    for part in k.parts[:2]:
        for factor in (part.outer, part.inner):
            torch.testing.assert_close(factor, factor.T)
            assert torch.linalg.eigvalsh(factor.double())[0] > -1e-6


@pytest.mark.parametrize(
    ("options", "layers"),
    [({"modules": ["conv"]}, {"conv"}), ({"largest": 12}, {"conv"}), ({"modules": []}, set())],
    ids=str,
)
def test_layers_without_factors_have_a_diagonal(options: dict[str, Any], layers: set[str]) -> None:
    method, stream = net()
    k = found(method, stream, "kfac_expand", index=1, **options)
    factored = {tuple(part.shapes) for part in k.parts if isinstance(part, KroneckerFactored)}
    assert factored == {(f"{layer}.weight", f"{layer}.bias") for layer in layers}
    assert set(k.shapes) == dict(method.backbone.named_parameters()).keys()


def test_layers_that_share_a_weight_have_a_diagonal_or_one_product() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    layers[2].weight = layers[0].weight
    k = found(*learner(layers, 4, batch(9, 4)), "kfac_expand")
    assert [list(part.shapes) for part in k.parts] == [["net.0.weight", "net.0.bias"], ["net.2.bias"]]


@pytest.mark.parametrize("kind", ["kfac_expand", "kfac_reduce"])
@pytest.mark.parametrize("labels", ["exact", "sampled", "empirical", "predicted"])
def test_rows_at_once_and_rows_twice_do_not_matter(kind: str, labels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, stream = net()
    reference = found(method, stream, kind, index=1, labels=labels)
    monkeypatch.setattr(kfac, "ROWS", 5)
    other = found(method, stream, kind, index=1, labels=labels)
    torch.testing.assert_close(other.mv(torch.ones(other.size)), reference.mv(torch.ones(other.size)))
    if labels in ("sampled", "predicted"):
        return
    x, y = batch(8, 5), torch.arange(8) % 3
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    once = as_dense(found(*learner(layer, 3, x, y), kind, labels=labels))
    twice = as_dense(found(*learner(layer, 3, x.repeat(2, 1), y.repeat(2)), kind, labels=labels))
    torch.testing.assert_close(once, twice)


def test_drawn_labels_are_unbiased() -> None:
    torch.manual_seed(0)
    method, stream = learner(nn.Linear(4, 3), 3, batch(20, 4))
    exact = found(method, stream, "kfac_expand").parts[0].outer
    draws = torch.stack(
        [found(method, stream, "kfac_expand", labels="sampled", seed=seed).parts[0].outer for seed in range(200)]
    )
    assert ((draws.mean(0) - exact).abs() < 4.5 * draws.std(0) / 200**0.5).all()


def test_an_activation_in_place_does_not_move_the_gradient() -> None:
    results = []
    for inplace in (False, True):
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace), nn.Linear(6, 3))
        method, stream = learner(layers, 3, batch(9, 5))
        results.append(as_dense(found(method, stream, "kfac_expand")))
    assert torch.equal(*results)


def test_a_layer_that_is_bypassed_counts_among_the_others() -> None:
    class Bypassed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.a(x), self.b.weight, self.b.bias)

    torch.manual_seed(0)
    method, stream = learner(Bypassed(), 3, batch(9, 5))
    k, diagonal = found(method, stream, "kfac_expand"), found(method, stream, "diag")
    assert [type(part) for part in k.parts] == [KroneckerFactored, Diagonal]
    ours, own = (part.params(part.values)["net.b.weight"] for part in (k.parts[1], diagonal))
    torch.testing.assert_close(ours, own)


def test_transformer() -> None:
    method = Method(tiny_vit(depth=1), 6)
    method.head.grow(torch.arange(6))
    k = found(method, image_stream("cil"), "kfac_expand", samples=10)
    layers = ["patch_embed.proj", *(f"blocks.0.{n}" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))]
    assert [next(iter(part.shapes)) for part in k.parts[:-1]] == [f"{name}.weight" for name in layers]
    norms = [f"{n}.{kind}" for n in ("norm", "blocks.0.norm1", "blocks.0.norm2") for kind in ("weight", "bias")]
    assert set(k.parts[-1].shapes) == {"cls_token", "pos_embed", *norms}
    assert all(part.diag().sum() > 0 for part in k.parts)


# --- importances without labels


class Scaled(nn.Module):
    """factor * W x."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.layer, self.factor = nn.Linear(4, 3, bias=False), factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.layer(x)


def scaled(factor: float) -> tuple[Method, Stream, Tensor]:
    torch.manual_seed(0)
    x = batch(7, 4)
    return *learner(Scaled(factor), 3, x), x


def test_output_importance_of_a_linear_map() -> None:
    method, stream, x = scaled(1.0)
    weight = method.backbone.net.layer.weight.detach()
    expected = (2 * (x @ weight.T)[:, :, None] * x[:, None, :]).abs().mean(dim=0)
    omega = found(method, stream, "abs_output", labels="empirical")
    torch.testing.assert_close(omega.params(omega.values)["net.layer.weight"], expected)
    torch.testing.assert_close(found(*scaled(3.0)[:2], "abs_output").values, 9 * omega.values)
    whole = (2 * (x @ weight.T)[:, :, None] * x[:, None, :]).mean(dim=0).abs()
    cancelled = found(method, stream, "abs_output", labels="batched")
    torch.testing.assert_close(cancelled.params(cancelled.values)["net.layer.weight"], whole)


def test_output_importance_sees_competing_classes_only() -> None:
    method, stream = net()
    k = found(method, stream, "abs_output", index=1, of=method.head)
    weight = k.params(k.values)["weight"]
    assert weight[:4].any(dim=1).all()
    assert not weight[4:].any()


# --- an independent implementation


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.filterwarnings("ignore")
def test_factors_are_those_of_curvlinops(sharing: str) -> None:
    curvlinops = pytest.importorskip("curvlinops")
    torch.manual_seed(0)
    conv, dense = nn.Conv2d(2, 3, 3, padding=1), (nn.Linear(75, 4), nn.Linear(4, 3))
    layers = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), dense[0], nn.Tanh(), dense[1])
    x, y = batch(6, 2, 5, 5), torch.arange(6) % 3
    method, stream = learner(layers, 3, x, y)
    ours = found(method, stream, f"kfac_{sharing}")
    params = {name: p for name, p in layers.named_parameters()}
    theirs = curvlinops.KFACLinearOperator(
        layers, nn.CrossEntropyLoss(), list(params.values()), [(x, y)], fisher_type="type-2", kfac_approx=sharing,
        separate_weight_and_bias=False, check_deterministic=False,
    )  # fmt: skip
    v = batch(ours.size, seed=1)
    product = theirs @ v
    torch.testing.assert_close(ours.mv(v), product)
