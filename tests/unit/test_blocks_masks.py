"""Owners of weights, guards against optimizers, sparse differences, and gates on units."""

from functools import partial

import pytest
import torch
from helpers import Net, tiny_vit
from torch import Tensor, nn

from clrun.backbones.small import cnn, mlp, resnet18
from clrun.blocks.gates import UnitGates, gated_layers, spread
from clrun.blocks.masks import Guard, OwnershipMask, Snapshot, SparseDelta, largest
from clrun.system.errors import ConfigError

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": partial(torch.optim.Adam, lr=0.1, weight_decay=0.1),
    "adamw": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1),
}
NETWORKS = {
    "net": Net,
    "mlp": partial(mlp, (1, 8, 8), hidden=[20, 30]),
    "cnn": partial(cnn, (1, 8, 8), width=8, depth=2),
    "resnet": partial(resnet18, (1, 16, 16), width=4, bias=True, pool=None),
    "vit": tiny_vit,
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_guard_holds_what_a_zero_gradient_does_not(optimizer: str) -> None:
    ends = {}
    for guarded in (True, False):
        torch.manual_seed(0)
        layer = nn.Linear(4, 3)
        before = {name: p.detach().clone() for name, p in layer.named_parameters()}
        mask = torch.arange(12).view(3, 4) % 2 == 0
        guard = Guard(dict(layer.named_parameters()), {"weight": mask, "bias": torch.zeros(3)})
        step = OPTIMIZERS[optimizer](layer.parameters())
        for _ in range(4):
            step.zero_grad()
            layer(torch.randn(5, 4)).square().sum().backward()
            guard.mask_gradients()
            assert (layer.weight.grad[~mask] == 0).all()
            step.step()
            if guarded:
                guard.restore()
        ends[guarded] = torch.equal(layer.weight[~mask], before["weight"][~mask])
        assert not (layer.weight[mask] == before["weight"][mask]).any()
        assert torch.equal(layer.bias, before["bias"]) == guarded
    assert ends == {True: True, False: False}


@pytest.mark.parametrize("fraction", [0.0, 0.29, 0.5, 1.0])
def test_pruning_releases_exactly_the_smallest(fraction: float) -> None:
    params = {"a": torch.randn(10, 10), "b": torch.ones(7, 3)}  # b: all of one size, where a threshold takes all
    before = {name: p.clone() for name, p in params.items()}
    mask = OwnershipMask(params)
    mask.claim(0)
    mask.prune(params, 0, fraction)
    for name, owned in mask.owned(0).items():
        released = ~owned
        assert int(released.sum()) == int(fraction * owned.numel() + 1e-9)
        assert (params[name][released] == 0).all()
        assert torch.equal(params[name][owned], before[name][owned])
        if 0 < fraction < 1 and name == "a":
            assert before[name][released].abs().max() <= before[name][owned].abs().min()


def test_every_weight_has_one_owner_and_tasks_see_earlier_ones() -> None:
    params = {"a": torch.randn(40, 5)}
    mask = OwnershipMask(params)
    free = [mask.free()]
    for task in range(3):
        mask.claim(task)
        params["a"][mask.owned(task)["a"]] = torch.randn(int(mask.owned(task)["a"].sum()))
        mask.prune(params, task, 0.5)
        free.append(mask.free())
    assert free == [1.0, 0.5, 0.25, 0.125]
    owners = torch.stack([mask.owned(task)["a"] for task in range(3)])
    assert (owners.sum(dim=0) <= 1).all()
    live = params["a"].clone()
    for task in range(3):
        seen = owners[: task + 1].any(dim=0)
        assert torch.equal(mask.view(params, task)["a"], params["a"] * seen)
    assert torch.equal(live, params["a"]), "reading a task does not touch the weights"
    assert mask.owner.nbytes == 200


def test_largest_is_nested_and_takes_the_first_of_equals() -> None:
    scores = torch.randint(0, 20, (300,), generator=torch.Generator().manual_seed(0)).float()
    sets = [set(largest(scores, count).tolist()) for count in range(0, 301, 7)]
    assert all(a < b for a, b in zip(sets, sets[1:], strict=False))
    assert [len(s) for s in sets] == list(range(0, 301, 7))
    assert largest(torch.tensor([1.0, 3.0, 3.0, 3.0]), 2).tolist() == [1, 2]


def test_sparse_differences_and_snapshots_give_back_what_they_took() -> None:
    base, moved = torch.randn(50), torch.randn(50)
    delta = SparseDelta(torch.tensor([3, 17, 49]))
    delta.take(moved)
    weights = base.clone()
    delta.put(weights)
    assert (weights != base).nonzero()[:, 0].tolist() == [3, 17, 49]
    assert torch.equal(weights[[3, 17, 49]], moved[[3, 17, 49]])
    assert delta.entries.nbytes + delta.values.nbytes == 3 * 8
    tensors = {"a": torch.randn(2, 3), "b": torch.randn(4)}
    copy = Snapshot(tensors)
    kept = {name: t.clone() for name, t in tensors.items()}
    tensors["a"].zero_()
    assert all(torch.equal(copy.read()[name], kept[name]) for name in kept)


# --- gates


def test_where_the_gates_are() -> None:
    found = {
        name: [(g.producer, g.consumer, g.units, g.mixed) for g in gated_layers(network(name))] for name in NETWORKS
    }
    assert found["net"] == [("conv", "linear", 6, False), ("linear", None, 12, False)]
    assert found["mlp"] == [("layers.linear1", "layers.linear2", 20, False), ("layers.linear2", None, 30, False)]
    assert found["cnn"] == [("layers.conv1", "layers.conv2", 8, True), ("layers.conv2", None, 16, True)]
    assert [g[:2] for g in found["resnet"]] == [
        (f"layers.stage{s}_{b}.conv1", f"layers.stage{s}_{b}.conv2") for s in (1, 2, 3, 4) for b in (1, 2)
    ]
    assert found["vit"][:2] == [
        ("blocks.0.attn.qkv", "blocks.0.attn.proj", 4, False),
        ("blocks.0.mlp.fc1", "blocks.0.mlp.fc2", 128, False),
    ]


def test_spread_follows_channels_heads_and_flattened_maps() -> None:
    values = torch.tensor([1.0, 2.0])
    assert spread(values, 3, 6).tolist() == [1, 1, 1, 2, 2, 2]
    assert spread(values, 2, 12).tolist() == [1, 1, 2, 2] * 3


@pytest.mark.parametrize("name", NETWORKS)
def test_open_gates_change_nothing(name: str) -> None:
    net = network(name).eval()
    gates, x = UnitGates(net), torch.randn(3, *net.input_size)
    assert torch.equal(gates.features(net, x, torch.ones_like(gates.used)), net(x))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("name", NETWORKS)
def test_unprotected_weights_do_not_reach_the_outputs(name: str) -> None:
    net = network(name).eval()
    units, x = UnitGates(net), torch.randn(3, *net.input_size)
    gates = (torch.rand(len(units.used)) < 0.5).float()
    before = units.features(net, x, gates)
    free = units.plasticity(net)
    assert all((mask == 1).any() for n, mask in free.items() if n.endswith("conv1.weight")), "all is free at first"
    units.use(gates)
    changed = 0
    with torch.no_grad():
        for key, mask in units.plasticity(net).items():
            assert set(mask.unique().tolist()) <= {0.0, 1.0}
            changed += int(mask.sum())
            net.get_parameter(key).add_(mask * 5 * torch.randn_like(mask))
    assert changed > 20
    assert torch.equal(units.features(net, x, gates), before)
    assert not torch.equal(units.features(net, x, 1 - gates), before)


@pytest.mark.parametrize("name", NETWORKS)
def test_protected_weights_are_those_that_matter(name: str) -> None:
    net = network(name).eval()
    units, x = UnitGates(net), torch.randn(8, *net.input_size)
    units.use(torch.ones_like(units.used))
    assert all(not mask.any() for mask in units.plasticity(net).values()), "everything is used"
    units.used.zero_()
    gates = (torch.rand(len(units.used)) < 0.5).float()
    before = units.features(net, x, gates)
    units.use(gates)
    with torch.no_grad():
        for key, mask in units.plasticity(net).items():
            net.get_parameter(key).add_((1 - mask) * 0.5 * torch.randn_like(mask))
    assert not torch.allclose(units.features(net, x, gates), before, atol=1e-3)


def test_a_weight_is_used_as_the_less_used_of_its_units() -> None:
    net = network("mlp")
    units = UnitGates(net)
    units.used = torch.rand(50)
    first, second = units.used[:20], units.used[20:]
    masks = units.plasticity(net)
    torch.testing.assert_close(masks["layers.linear1.weight"], (1 - first)[:, None].expand(20, 64))
    torch.testing.assert_close(masks["layers.linear1.bias"], 1 - first)
    torch.testing.assert_close(masks["layers.linear2.weight"], 1 - torch.minimum(second[:, None], first[None]))


def test_a_convolution_before_a_linear_layer_repeats_its_channels() -> None:
    net = network("net")
    units = UnitGates(net)
    units.used = torch.tensor([1.0, 0, 0, 0, 0, 0] + [1.0] * 12)
    mask = units.plasticity(net)["linear.weight"]
    assert (mask[:, :9] == 0).all()
    assert (mask[:, 9:] == 1).all()
    assert units.plasticity(net)["norm.weight"].tolist() == [0, 1, 1, 1, 1, 1]


def test_spent_counts_what_is_newly_opened() -> None:
    units = UnitGates(network("mlp"))
    units.use(torch.cat([torch.ones(10), torch.zeros(40)]))
    gates = torch.cat([torch.ones(20), torch.zeros(30)])
    assert units.spent(gates).item() == pytest.approx(10 / 40)
    units.use(torch.ones(50))
    assert units.spent(gates).item() == 0


class Loop(nn.Module):
    """A network that torch.fx cannot follow."""

    num_features, input_size = 3, (1, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1)) if x.sum() > 0 else self.linear(-x.flatten(1))


class Bare(nn.Module):
    """A network without any layer."""

    num_features = 64

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def test_networks_without_a_place_for_gates_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"backbone: torch.fx cannot trace the layers of Loop"):
        UnitGates(Loop())
    with pytest.raises(ConfigError, match=r"backbone: no unit of Bare can have a gate"):
        UnitGates(Bare())
