"""DLCFT: the tangent model, its gradient, and penalties that equal the loss of earlier tasks."""

from itertools import permutations
from typing import Any

import pytest
import torch
from helpers import Identity, Linear, Net, context, factory, image_stream, live, row_stream, tiny_vit
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.func import functional_call, jvp

from clrun.backbones.small import resnet18
from clrun.blocks.curvature import Composite, KroneckerFactored
from clrun.blocks.tangent import leaky, tangent
from clrun.data.split import Batch
from clrun.data.stream import Stream
from clrun.methods.dlcft import Dlcft
from clrun.system.errors import ConfigError

NETWORKS = {"vit": tiny_vit, "resnet": lambda: resnet18((1, 16, 16), width=4, bias=False, pool=None), "net": Net}


def dlcft(backbone: nn.Module, classes: int = 6, **options: Any) -> Dlcft:
    method = factory("dlcft", **options)(backbone.double(), classes).double()
    assert isinstance(method, Dlcft)
    return method


def changed(name: str, **options: Any) -> tuple[Dlcft, Tensor]:
    """Return a method after a random change of body and head, and images for it."""
    torch.manual_seed(0)
    method = dlcft(NETWORKS[name](), **options).eval()
    with torch.no_grad():
        for parameter in (*method.change.parameters(), *method.head.parameters()):
            parameter.copy_(0.1 * torch.randn_like(parameter) * parameter.requires_grad)
    return method, torch.randn(3, 1, *((16, 16) if name == "resnet" else (8, 8))).double()


def network(method: Dlcft, x: Tensor, step: float) -> Tensor:
    """Return the features of the network itself with its weights moved by `step` times the change."""
    weights = dict(method.backbone.named_parameters())
    moved = {name: weights[name] + step * p for name, p in method.change.named_parameters() if name in method.names}
    with leaky(method.relu_slope):
        return functional_call(method.backbone, moved, (x,))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_tangent_model_is_the_network_at_the_start_and_its_derivative(name: str) -> None:
    method, x = changed(name)
    with torch.no_grad():
        value, moved = method.features(x)
        torch.testing.assert_close(value, network(method, x, 0.0))
        slope = (network(method, x, 1e-5) - network(method, x, -1e-5)) / 2e-5
        torch.testing.assert_close(moved, slope, rtol=1e-4, atol=1e-6)
        assert float(moved.abs().max()) > 1e-3
        for parameter in method.change.parameters():
            parameter.mul_(-3)
        torch.testing.assert_close(method.features(x)[1], -3 * moved)
    with torch.inference_mode():
        torch.testing.assert_close(method.features(x.clone())[1], -3 * moved)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("linearise", ["body", "all"])
def test_the_gradient_is_that_through_the_tangent(name: str, linearise: str) -> None:
    method, x = changed(name, linearise=linearise)
    method.initial_rows.normal_()
    goal = torch.randn(3, 6).double()
    (method(x) * goal).sum().backward()
    found = {n: p.grad.clone() for n, p in method.change.named_parameters() if p.grad is not None}
    weights = dict(method.backbone.named_parameters())
    base = {n: weights[n].detach() for n in method.names}
    change = {n: p for n, p in method.change.named_parameters() if n in method.names}

    def features(params: Any) -> Tensor:
        with leaky(method.relu_slope):
            return functional_call(method.backbone, params, (x,))

    method.zero_grad()
    value, moved = jvp(features, (base,), (change,))
    rows = method.initial_rows if linearise == "all" else method.head.weight
    (method.head(value) + moved @ rows.T).mul(goal).sum().backward()
    assert found.keys() == change.keys()
    for n, grad in found.items():
        torch.testing.assert_close(grad, change[n].grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("padding", [1, "same"])
def test_the_derivative_of_convolutions_of_images_and_features(padding: Any) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, padding=padding), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3, padding=padding, groups=2)]
    network, x = nn.Sequential(*layers).double(), torch.randn(2, 2, 5, 5).double()
    weights = {name: p.detach() for name, p in network.named_parameters()}
    change = {name: torch.randn_like(p).requires_grad_(name != "0.bias") for name, p in weights.items()}
    value, moved = tangent(network, change, x, slope=0.0)
    own = {name: p.detach() for name, p in change.items()}
    torch.testing.assert_close((value, moved), jvp(lambda w: functional_call(network, w, (x,)), (weights,), (own,)))
    moved.square().sum().backward()  # type: ignore[no-untyped-call]
    assert change["0.bias"].grad is None
    expected = torch.func.vjp(lambda w: functional_call(network, w, (x,)), weights)[1](2 * moved.detach())[0]
    for name in set(change) - {"0.bias"}:
        torch.testing.assert_close(change[name].grad, expected[name])


def test_relus_of_the_body_leak_wherever_they_are() -> None:
    method, x = changed("net")
    net: Any = method.backbone
    with torch.no_grad():
        inner = nn.functional.leaky_relu(net.norm(net.conv(x)), 0.01).flatten(1)
        torch.testing.assert_close(method.features(x)[0], nn.functional.leaky_relu(net.linear(inner), 0.01))


# --- heads on frozen features


def solve(method: Dlcft, stream: Stream, index: int) -> None:
    """Learn a task: move the head's weight, in whose entries the loss is quadratic, to the minimum."""
    ctx, task = context(stream, index), stream.tasks[index]
    method.begin_task(task, ctx)
    weight = method.head.weight
    batch = next(task.train.batches(100))

    def loss(flat: Tensor) -> Tensor:
        return functional_call(_Loss(method, batch, ctx), {"method.head.weight": flat.view_as(weight)}, ())

    point = weight.detach().flatten()
    matrix = hessian(loss, point)
    gradient = torch.func.grad(loss)(point)
    known = matrix.diagonal() > 0
    with torch.no_grad():
        point[known] -= torch.linalg.solve(matrix[known][:, known], gradient[known])
        weight.copy_(point.view_as(weight))
    method.end_task(task, ctx)


class _Loss(nn.Module):
    def __init__(self, method: Dlcft, batch: Batch, ctx: Any) -> None:
        super().__init__()
        self.method, self.batch, self.ctx = method, batch, ctx

    def forward(self) -> Tensor:
        return self.method.loss(self.batch, self.ctx)


HEAD = {"linearise": "head", "curvature": "exact_head", "weighting": "rows", "prior": 1.0}


def test_golden_heads() -> None:
    rows, y = torch.tensor([[1.0, 0], [1, 1], [0, 2], [2, 1]]).double(), torch.tensor([0, 0, 1, 1])
    stream = row_stream([(rows[:2], y[:2]), (rows[2:], y[2:])], 2)
    method = dlcft(Identity(2), 2, **HEAD)
    for index, expected in enumerate(([[9, 0], [3, 0]], [[4.125, 1.875], [0.375, 5.625]])):
        solve(method, stream, index)
        torch.testing.assert_close(method.head.weight.T.detach(), torch.tensor(expected).double(), rtol=0, atol=1e-10)


def test_heads_are_learned_as_by_joint_ridge_regression_in_any_order() -> None:
    draw = torch.Generator().manual_seed(0)
    parts = []
    for label, count in enumerate((5, 9, 7)):
        y = torch.tensor([2 * label, 2 * label + 1])[torch.arange(count) % 2]
        parts.append((torch.randn(count, 4, generator=draw).double(), y))
    x, y = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    goal = 15 * nn.functional.one_hot(y, 6).double()
    joint = torch.linalg.solve(x.T @ x + torch.eye(4), x.T @ goal)
    for order in list(permutations(range(3)))[::2]:
        stream, method = row_stream([parts[k] for k in order], 6), dlcft(Identity(4), **HEAD)
        for index in range(3):
            solve(method, stream, index)
        torch.testing.assert_close(method.head.weight.T.detach(), joint, rtol=0, atol=1e-9)


# --- the body


def linear(**options: Any) -> tuple[Dlcft, Stream]:
    """Return a method on a linear network whose body alone learns, after its first task, and its stream."""
    torch.manual_seed(0)
    tasks = [(torch.randn(12, 4).double(), torch.arange(12) % 2 + 2 * k) for k in range(2)]
    stream = row_stream(tasks, 4)
    method = dlcft(Linear(), 4, linearise="all", residuals="exact", samples=None, compete="all", **options)
    method.begin_task(stream.tasks[0], context(stream))
    method.initial_rows.normal_()
    with torch.no_grad():
        for parameter in method.change.parameters():
            parameter.normal_()
    return method, stream


def earlier_loss(method: Dlcft, batch: Batch) -> Any:
    """Return the loss of a batch as a function of the changes [15], written out for the changed network."""
    rows, bias = method.initial_rows, method.head.bias.detach()
    weight, offset = (p.detach().clone() for p in method.backbone.parameters())
    goal = 15 * nn.functional.one_hot(batch.y, 4)
    start = method.head.weight.detach() - rows

    def loss(flat: Tensor) -> Tensor:
        value = nn.functional.linear(batch.x, weight, offset)
        moved = nn.functional.linear(batch.x, weight + flat[:12].view(3, 4), offset + flat[12:])
        return 0.5 * (moved @ rows.T + value @ start.T + bias - goal).square().sum(dim=1).mean()

    return loss


def set_change(method: Dlcft, flat: Tensor) -> None:
    with torch.no_grad():
        method.change.get_parameter("layer.weight").copy_(flat[:12].view(3, 4))
        method.change.get_parameter("layer.bias").copy_(flat[12:])


@pytest.mark.parametrize("curvature", ["kfac", "tkfac"])
def test_a_linear_network_is_learned_as_by_ewc_with_the_exact_hessian(curvature: str) -> None:
    method, stream = linear(curvature=curvature)
    ctx, batch = context(stream), next(stream.tasks[0].train.batches(100))
    anchor = torch.cat([p.detach().flatten() for p in method.change.parameters()])
    first = earlier_loss(method, batch)
    assert float(method.loss(batch, ctx).detach()) == pytest.approx(float(first(anchor)), rel=1e-12)
    exact = hessian(first, anchor)
    method.end_task(stream.tasks[0], ctx)
    curvature_of = method.penalty.curvature
    assert curvature_of is not None
    found = torch.stack([curvature_of.mv(column) for column in torch.eye(15).double()])
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)
    later, now = context(stream, 1), next(stream.tasks[1].train.batches(100))
    method.begin_task(stream.tasks[1], later)
    move = torch.randn(15).double()
    set_change(method, anchor + move)
    both = method.loss(now, later).detach()
    method.strength = 0.0
    penalty = 2 * (both - method.loss(now, later).detach())
    torch.testing.assert_close(penalty, 0.5 * move @ exact @ move)  # EWC with the exact Hessian
    gradient = torch.func.grad(first)(anchor)
    torch.testing.assert_close(penalty, first(anchor + move) - first(anchor) - gradient @ move)  # the earlier loss


def test_traces_of_tkfac_are_those_of_the_true_blocks() -> None:
    torch.manual_seed(0)
    method = factory("dlcft", residuals="exact", samples=None)(Net(), 6)
    stream = image_stream()
    ctx, task = context(stream), stream.tasks[0]
    method.begin_task(task, ctx)
    nn.init.normal_(method.head.weight)
    scaled = method.curvature(task, ctx)
    method.form = "kfac"
    plain = method.curvature(task, ctx)
    batch = next(task.train.batches(100))
    rows = method.head.weight.detach()[task.classes]
    net: Any = method.backbone
    assert isinstance(scaled, Composite) and isinstance(plain, Composite)
    for path in ("conv", "linear"):
        block = next(part for part in scaled.parts if f"{path}.weight" in part.shapes)
        other = next(part for part in plain.parts if f"{path}.weight" in part.shapes)
        total, weights = 0.0, list(net.get_submodule(path).requires_grad_(True).parameters())
        for x in batch.x:
            with leaky(method.relu_slope):
                outputs = rows @ net.eval()(x[None])[0]
            for output in outputs:
                grads = torch.autograd.grad(output, weights, retain_graph=True)
                total += sum(float(g.square().sum()) for g in grads)
        assert float(block.diag().sum()) == pytest.approx(total / len(batch), rel=1e-3)
        assert isinstance(block, KroneckerFactored) and isinstance(other, KroneckerFactored)
        ratio = block.outer @ torch.eye(len(block.outer)) / block.outer.norm() - other.outer / other.outer.norm()
        assert float(ratio.abs().max()) < 1e-5
    assert "norm.weight" not in scaled.shapes


def test_sampled_residuals_estimate_the_exact_curvature() -> None:
    torch.manual_seed(0)
    method, stream = factory("dlcft", residuals="exact", samples=None, curvature="kfac")(Net(), 6), image_stream()
    ctx, task = context(stream), stream.tasks[0]
    method.begin_task(task, ctx)
    nn.init.normal_(method.head.weight)
    exact = method.curvature(task, ctx).diag().sum()
    method.fisher = type(method.fisher)(**{**vars(method.fisher), "labels": "normal"})
    draws = torch.stack([method.curvature(task, ctx).diag().sum() for _ in range(60)])
    error = draws.std() / 60**0.5
    assert abs(float(draws.mean() - exact)) < 5 * float(error) and float(error) < 0.2 * float(exact)


@pytest.mark.parametrize(("setting", "matrices"), [("cil", 1), ("til", 3), ("dil", 1)])
def test_the_head_has_a_matrix_for_each_set_of_classes(setting: Any, matrices: int) -> None:
    torch.manual_seed(0)
    stream = image_stream(setting)
    method = factory("dlcft", target_scale=1.0)(Net(), 6)
    live(method, stream)
    assert method.head_penalty.grams.shape == (matrices, 13, 13)
    rows = method._rows().detach()
    assert float(method.head_penalty(rows)) == 0 and float(method.penalty(method.change)) == 0
    assert float(method.head_penalty(rows + torch.randn_like(rows))) > 0


def test_an_exact_head_has_no_body() -> None:
    with pytest.raises(ConfigError, match="^method.curvature=exact_head: there is a body; set method.linearise=head"):
        factory("dlcft", curvature="exact_head")(Net(), 6)
