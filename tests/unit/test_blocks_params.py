"""The algebra on named tensors, and state that follows its module."""

import copy

import pytest
import torch
from helpers import Net
from torch import nn

from clrun.blocks.params import (
    Carrier,
    clone,
    dot,
    eval_mode,
    flatten,
    gradients,
    hold_statistics,
    select,
    unflatten,
)


def test_select_leaves_out_frozen_parameters() -> None:
    net = Net()
    net.conv.bias.requires_grad_(False)
    assert list(select(net)) == ["conv.weight", "norm.weight", "norm.bias", "linear.weight", "linear.bias"]


def test_flatten_and_back() -> None:
    params = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7.0)}
    flat = flatten(params)
    assert flat.tolist() == [0, 1, 2, 3, 4, 5, 7]
    back = unflatten(flat, {name: tuple(p.shape) for name, p in params.items()})
    assert all(torch.equal(back[name], params[name]) for name in params)
    assert flatten({}).numel() == 0


def test_dot_sums_in_float64() -> None:
    a = {"x": torch.tensor([1e8, 1.0, -1e8]), "y": torch.tensor(2.0)}
    ones = {name: torch.ones_like(t) for name, t in a.items()}
    assert dot(a, ones).item() == 3.0


def test_gradients_and_clone_do_not_alias() -> None:
    layer = nn.Linear(2, 1)
    layer(torch.ones(1, 2)).sum().backward()
    layer.bias.grad = None
    grads, copies = gradients(select(layer)), clone(select(layer))
    assert grads["weight"].tolist() == [[1, 1]]
    assert grads["bias"].tolist() == [0]
    with torch.no_grad():
        layer.weight.add_(1)
    assert not torch.equal(copies["weight"], layer.weight)
    assert not copies["weight"].requires_grad


def test_eval_mode_restores_each_submodule() -> None:
    net = Net().train()
    net.norm.eval()
    with pytest.raises(RuntimeError), eval_mode(net):
        assert not any(m.training for m in net.modules())
        raise RuntimeError
    assert net.training
    assert net.dropout.training
    assert not net.norm.training


def test_hold_statistics_stops_batch_normalisation_only() -> None:
    net = Net().train()
    before = net.norm.running_mean.clone()
    hold_statistics(net)
    net(torch.randn(8, 1, 8, 8))
    assert torch.equal(before, net.norm.running_mean)
    assert net.dropout.training


def test_carrier_state_moves_but_is_no_weight() -> None:
    class Memory(Carrier):
        def __init__(self) -> None:
            super().__init__()
            self.rows = torch.zeros(3)
            self.labels = torch.zeros(3, dtype=torch.int32)

    owner = nn.Module()
    owner.memory = Memory()
    owner.to("meta")
    assert owner.memory.rows.device.type == owner.memory.labels.device.type == "meta"
    assert not owner.state_dict()
    assert not list(owner.buffers())
    assert copy.deepcopy(owner).memory.labels.dtype == torch.int32
