"""Rescaling, low-rank residuals, choice of ranks, pruning: the worked numbers of HALRP and its invariants."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Identity, Net, context, row_stream
from torch import Tensor, nn

from clrun.blocks.low_rank import (
    Factor,
    LowRank,
    copy_for_task,
    decompose,
    install,
    layer_curvature,
    layers_of,
    low_rank_layers,
    prune,
    rescaling,
    select_ranks,
    stored_bytes,
)
from clrun.learning.losses import masked_cross_entropy
from clrun.learning.method import Method, freeze


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight(parts: dict[str, Tensor], base: Tensor) -> Tensor:
    """W of a layer on `base`, in float64."""
    layer: Any = nn.Linear(1, 1) if base.dim() == 2 else nn.Conv2d(1, 1, 1)
    layer.weight = nn.Parameter(base.double())
    return LowRank(layer, **{key: value.double() for key, value in parts.items()}).weight.detach()


# --- closed forms


def test_worked_example_of_rescaling():
    base, warm = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[2.0, 3], [3, 5]])
    found = decompose(base, warm, sweeps=1, unfold=False)
    torch.testing.assert_close(found.rows, torch.tensor([1.6, 1.16]).double())
    torch.testing.assert_close(found.columns, torch.tensor([0.929763, 1.032434]).double(), atol=1e-6, rtol=0)
    expected = torch.tensor([[0.512379, -0.303787], [-0.235576, 0.209508]]).double()
    torch.testing.assert_close(found.matrix, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.energy.sqrt(), torch.tensor([0.671842, 0.053260]).double(), atol=1e-6, rtol=0)
    assert found.matrix.square().sum() == pytest.approx(0.454209, abs=1e-6)
    dropped = (weight(found.parts(1), base) - warm).square().sum()
    assert dropped == pytest.approx(0.002837, abs=1e-6)


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (4, 3, 3, 3), (6, 2, 2, 3)])
def test_columns_solve_their_least_squares_and_more_sweeps_never_fit_worse(shape: tuple[int, ...]):
    base, warm = randn(*shape), randn(*shape, seed=1)
    errors = [(warm - base).double().square().sum().item()]
    for sweeps in (1, 2, 5):
        rows, columns = rescaling(base, warm, sweeps=sweeps)
        scaled = torch.einsum("o,oi...->oi...", rows, base.double())
        error = warm.double() - torch.einsum("oi...,i->oi...", scaled, columns)
        other = (0, *range(2, len(shape)))
        assert (error * scaled).sum(dim=other).abs().max() < 1e-9
        errors.append(error.square().sum().item())
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("shape", [(5, 7), (7, 5)])
@pytest.mark.parametrize("rank", [0, 1, 3, 5])
def test_truncation_error_of_a_linear_layer_is_the_energy_left_out(shape: tuple[int, int], rank: int):
    base, warm = randn(*shape), randn(*shape, seed=1)
    found = decompose(base, warm, sweeps=1, unfold=False)
    error = (weight(found.parts(rank), base) - warm).square().sum().item()
    assert error == pytest.approx(found.energy[rank:].sum().item(), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("rank", [0, 2, 3])
def test_truncation_error_of_a_convolution(rank: int):
    base, warm = randn(4, 3, 5, 5), randn(4, 3, 5, 5, seed=1)
    found = decompose(base, warm, sweeps=1, unfold=False)
    rows, columns = found.rows[:, None, None, None], found.columns[:, None, None]
    residual = warm.double() - rows * base.double() * columns
    beyond = (residual - residual.mean(dim=(2, 3), keepdim=True)).square().sum()  # no rank recovers this
    expected = beyond + 25 * found.energy[rank:].sum()
    error = (weight(found.parts(rank), base) - warm).square().sum()
    torch.testing.assert_close(error, expected)
    unfolded = decompose(base, warm, sweeps=1, unfold=True)
    assert (weight(unfolded.parts(4), base) - warm).abs().max() < 1e-9
    assert unfolded.cells == 1 and found.cells == 25


def test_a_change_that_is_constant_over_the_window_is_explained_exactly():
    base = randn(4, 3, 3, 3)
    base[:, :, 1, 1] -= base.sum(dim=(2, 3))  # of mean 0 over the window, hence rescaling cannot help
    warm = base + randn(4, 3, seed=1)[:, :, None, None]
    found = decompose(base, warm, sweeps=20, unfold=False)
    assert (weight(found.parts(3), base) - warm).abs().max() < 1e-5


# --- layers


def explained(base: nn.Module, rank: int, *, unfold: bool = False) -> tuple[nn.Module, nn.Module]:
    """A copy of `base` with other weights, and the low-rank network that explains it, both in eval mode."""
    freeze(base)
    warm = copy_for_task(base)
    with torch.no_grad():
        for index, parameter in enumerate(p for p in warm.parameters() if p.requires_grad):
            parameter += 0.1 * randn(*parameter.shape, seed=index)
    network = copy.deepcopy(warm)
    layers = layers_of(base)
    parts = {
        name: decompose(layers[name].weight, layer.weight, sweeps=1, unfold=unfold).parts(rank)
        for name, layer in layers_of(warm).items()
    }
    install(network, base, parts)
    return warm.eval(), network.eval()


def test_full_ranks_give_back_the_warmed_up_network():
    warm, network = explained(Net(), 100, unfold=True)
    x = randn(9, 1, 8, 8)
    torch.testing.assert_close(network(x), warm(x), atol=1e-5, rtol=1e-5)
    rough = explained(Net(), 100)[1]
    assert not torch.allclose(rough(x), warm(x), atol=1e-3), "a window of 3x3 has more than its mean"


def test_rank_zero_without_scales_is_the_base_bit_for_bit():
    base = Net().eval()
    freeze(base)
    network = copy_for_task(base)
    parts = {}
    for name, layer in layers_of(base).items():
        m, n = layer.weight.shape[:2]
        parts[name] = dict(rows=torch.ones(m), columns=torch.ones(n), left=torch.ones(m, 0), right=torch.ones(0, n))
    install(network, base, parts)
    x = randn(9, 1, 8, 8)
    assert torch.equal(network.eval()(x), base(x))
    assert all(torch.equal(layer.weight, layer.layer.weight) for layer in low_rank_layers(network).values())


def test_linear_layer_in_training_equals_its_weight():
    layer = low_rank_layers(explained(nn.Sequential(nn.Linear(7, 5)), 2)[1])["0"]
    x = randn(3, 4, 7)
    expected = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer.train()(x), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.eval()(x), expected)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("padding", "stride"), [(2, 1), (0, 1), (2, 2)])
def test_convolution_equals_the_factored_form_of_the_paper(padding: int, stride: int, groups: int):
    conv = nn.Conv2d(4, 6, 5, padding=padding, stride=stride, groups=groups)
    layer = low_rank_layers(explained(nn.Sequential(conv), 2)[1])["0"]
    x = randn(2, 4, 9, 9)
    options = {"padding": padding, "stride": stride, "groups": groups}
    scaled = F.conv2d(x * layer.columns.repeat(groups)[:, None, None], conv.weight, **options)
    low = []
    for group, left in zip(x.chunk(groups, dim=1), layer.left().chunk(groups), strict=True):
        inner = 25 * F.avg_pool2d(F.conv2d(group, layer.right()[..., None, None]), 5, stride, padding)
        low.append(F.conv2d(inner, left[..., None, None]))
    expected = scaled * layer.rows[:, None, None] + torch.cat(low, dim=1) + layer.bias[:, None, None]
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)


def test_a_copy_shares_what_no_task_owns():
    class Tokens(Net):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.ones(1, 3, 4))
            self.register_buffer("table", torch.arange(9))

    base = Tokens()
    network: Any = copy_for_task(base)
    assert network.position is base.position and network.table is base.table
    assert not base.position.requires_grad, "it would change under the tasks that share it"
    own = ("conv.weight", "conv.bias", "norm.weight", "norm.bias", "linear.weight", "linear.bias")
    assert {name for name, p in network.named_parameters() if p.requires_grad} == set(own)
    assert network.norm.running_mean is not base.norm.running_mean
    vectors = sum(p.nbytes for p in base.parameters() if p is not base.position)
    assert stored_bytes([network, network], without=base) == vectors + sum(b.nbytes for b in base.norm.buffers())


# --- curvature and ranks


class Softmax(Method):
    """A linear classifier that starts at 0."""

    def loss(self, batch, ctx):
        return masked_cross_entropy(self.backbone(batch.x), batch.y, ctx.mask(batch.t))


def test_worked_example_of_curvature():
    x, y = torch.tensor([[1.0, 0], [0, 1], [1, 1]]), torch.tensor([0, 1, 0])
    stream = row_stream([(x, y)], 2)
    method = Softmax(Identity(2), 2)
    method.backbone = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(method.backbone.weight)
    options = {"loss": method.loss, "weights": {"linear": method.backbone.weight}, "batch_size": 2}
    assert layer_curvature(method, stream.tasks[0].train, context(stream), **options) == {
        "linear": pytest.approx(0.1875)
    }
    assert method.backbone.weight.grad is None and method.training


SCORES = {"a": torch.tensor([8.0, 2]), "b": 0.5 * 9 * torch.tensor([1.0, 0.25, 0.04])}
FREE = {"lowest": 0, "highest": 100}


@pytest.mark.parametrize(
    ("share", "ranks"), [(0.0, (0, 0)), (0.79, (1, 1)), (0.8, (2, 1)), (0.9, (2, 1)), (0.95, (2, 2)), (1.0, (2, 3))]
)
def test_worked_example_of_ranks(share: float, ranks: tuple[int, int]):
    assert tuple(select_ranks(SCORES, alpha=share, **FREE).values()) == ranks


def test_ranks_are_clipped_last():
    assert select_ranks(SCORES, alpha=1.0, lowest=0, highest=2) == {"a": 2, "b": 2}
    assert select_ranks(SCORES, alpha=0.0, lowest=1, highest=2) == {"a": 1, "b": 1}
    assert select_ranks(SCORES, alpha=0.0, lowest=7, highest=9) == {"a": 2, "b": 3}


def test_ranks_keep_what_they_promise():
    sizes = {"a": 5, "b": 9, "c": 4}
    scores = {name: randn(n, seed=n).square().sort(descending=True).values for name, n in sizes.items()}
    total = sum(s.sum().item() for s in scores.values())
    before = dict.fromkeys(scores, 0)
    for share in torch.linspace(0, 1, 21).tolist():
        ranks = select_ranks(scores, alpha=share, **FREE)
        assert sum(s[ranks[name] :].sum().item() for name, s in scores.items()) <= (1 - share) * total + 1e-5
        assert all(before[name] <= ranks[name] for name in ranks), "monotone in the share"
        assert select_ranks({n: 1e6 * s for n, s in scores.items()}, alpha=share, **FREE) == ranks
        before = ranks
    assert before == {name: len(s) for name, s in scores.items()}
    alone = select_ranks({"b": scores["b"]}, alpha=0.6, **FREE)["b"]
    heavy = scores | {"b": 1e12 * scores["b"]}
    assert select_ranks(heavy, alpha=0.6, lowest=1, highest=100) == {"a": 1, "b": alone, "c": 1}


def test_ranks_end_where_the_room_does():
    costs = {"a": 10.0, "b": 3.0}
    assert select_ranks(SCORES, alpha=1.0, costs=costs, budget=13.0, **FREE) == {"a": 1, "b": 1}
    assert select_ranks(SCORES, alpha=1.0, costs=costs, budget=26.0, **FREE) == {"a": 2, "b": 2}
    assert select_ranks(SCORES, alpha=1.0, costs=costs, budget=9.0, **FREE) == {"a": 0, "b": 0}
    assert select_ranks(SCORES, alpha=1.0, costs=costs, budget=16.0, lowest=0, highest=1) == {"a": 1, "b": 1}


# --- pruning


def test_pruning_keeps_the_largest_of_all_factors():
    factors = [Factor(torch.tensor([[3.0, -1], [0.5, -9]])), Factor(torch.tensor([[2.0, 0.1]]))]
    prune(factors, entries=3)
    assert factors[0]().tolist() == [[3, 0], [0, -9]] and factors[1]().tolist() == [[2, 0]]
    prune(factors, entries=3)
    assert factors[0]().tolist() == [[3, 0], [0, -9]] and factors[1]().tolist() == [[2, 0]]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_compressed_factors_are_the_same_matrix_in_fewer_bytes(share: float):
    factor = Factor(randn(13, 9))
    prune([factor], entries=int(share * 117))
    before, dense = factor().detach().clone(), stored_bytes([factor])
    factor.compress()
    assert torch.equal(factor(), before)
    assert not factor.value.requires_grad
    assert stored_bytes([factor]) == (dense if share == 1 else 4 * int(share * 117) + 15)
