"""APD: weights from shared and own parts, drift, grouping; the invariants of its definition."""

from typing import Any

import pytest
import torch
from helpers import Net, born, context, factory, image_stream, live, sgd, trace
from torch import nn

from clrun.blocks.additive import Additive, additive_layers, cluster, consolidate, sparse
from clrun.blocks.low_rank import layers_of

OFF = {"l1": 0.0, "decay": 0.0, "drift": 0.0, "group_every": 0}


def parts(values: list[list[float]]) -> list[Additive]:
    """One layer of each task, whose own parts are given."""
    shared = nn.Linear(len(values[0]), 1)
    layers = []
    for index, own in enumerate(values):
        layer = nn.Linear(len(own), 1)
        layer.weight = shared.weight
        gated = Additive(layer, logits=torch.tensor([float(index)]), threshold=0.0, gate_threshold=0.0)
        gated.own.data = torch.tensor([own])
        layers.append(gated)
    return layers


def test_a_task_begins_as_shared_weights_times_gate_plus_one():
    method, stream = born(factory("apd"), image_stream("til"))
    method.begin_task(stream.tasks[0], context(stream))
    base = layers_of(method.backbone)
    for name, layer in additive_layers(method.networks[0]).items():
        gate = layer.logits.sigmoid().view(-1, *(1,) * (layer.own.dim() - 1))
        torch.testing.assert_close(layer.theta(), base[name].weight * (gate + 1))
        assert layer.layer.weight is base[name].weight
        assert layer.logits.std() < 1


def test_without_penalties_the_loss_is_cross_entropy():
    method, stream = born(factory("apd", **OFF), image_stream("til"))
    live(method, stream, until=1)
    ctx = context(stream, 1)
    method.begin_task(stream.tasks[1], ctx)
    method.eval()
    batch = next(stream.tasks[1].train.batches(4))
    logits = method(batch.x, 1)[:, stream.tasks[1].classes]
    expected = nn.functional.cross_entropy(logits, batch.y - stream.tasks[1].classes[0])
    torch.testing.assert_close(method.loss(batch, ctx), expected)


def test_penalties():
    method, stream = born(factory("apd"), image_stream("til"))
    live(method, stream, until=1)
    ctx = context(stream, 1)
    method.begin_task(stream.tasks[1], ctx)
    method.eval()
    batch = next(stream.tasks[1].train.batches(4))
    method.l1 = method.decay = method.drift = method.gate_l1 = 0.0
    plain = method.loss(batch, ctx)
    first, second = (additive_layers(network).values() for network in method.networks)
    with torch.no_grad():
        for layer in first:
            layer.own += 0.5
    method.l1, method.decay, method.drift, method.gate_l1 = 0.3, 0.2, 0.1, 0.7
    expected = plain
    for layer in second:
        expected = expected + 0.3 * layer.own.abs().sum() + 0.7 * layer.logits.abs().sum()
        expected = expected + 0.1 * (layer.own.square().sum() + layer.logits.square().sum())
    for layer in first:
        expected = expected + 0.3 * layer.own.abs().sum() + 0.05 * 0.25 * layer.own.numel()
    torch.testing.assert_close(method.loss(batch, ctx), expected)


@pytest.mark.parametrize("retroactive", [True, False])
def test_drift_holds_what_earlier_tasks_use(retroactive: bool):
    moved = []
    for drift in (0.0, 10.0, 100.0):
        options = OFF | {"drift": drift, "retroactive": retroactive}
        method, stream = born(factory("apd", **options), image_stream("til"))
        thetas: list[Any] = trace(
            lambda m: [layer.theta().clone() for layer in additive_layers(m.networks[0]).values()],
            method,
            stream,
            until=2,
            budget=sgd(lr=0.01, epochs=10, momentum=0.0),
        )
        moved.append(max(float((a - b).abs().max()) for a, b in zip(*thetas, strict=True)))
    assert moved[0] > moved[1] > moved[2] > 0
    assert moved[0] > 4 * moved[2], moved


def test_earlier_parts_move_only_when_asked():
    for retroactive in (True, False):
        method, stream = born(factory("apd", retroactive=retroactive), image_stream("til"))
        own = trace(lambda m: additive_layers(m.networks[0])["linear"].own.clone(), method, stream, until=2)
        assert torch.equal(*own) != retroactive
        assert method.targets == [] and not any(p.requires_grad for p in method.parameters())


def test_gates_norms_and_heads_of_earlier_tasks_stand_still():
    method, stream = born(factory("apd"), image_stream("til"))

    def still(m: Any) -> list[torch.Tensor]:
        gates = [layer.logits for layer in additive_layers(m.networks[0]).values()]
        return [t.clone() for t in (*gates, *m.networks[0].norm.state_dict().values(), *m.heads[0].parameters())]

    first, second = trace(still, method, stream, until=2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_evaluation_counts_small_entries_as_zero():
    (layer,) = parts([[0.1, -0.3, 0.05]])
    layer.threshold = 0.1
    gate = layer.logits.sigmoid()
    expected = layer.layer.weight * gate + torch.tensor([[0.0, -0.3, 0.0]])
    torch.testing.assert_close(layer.eval().weight, expected)
    torch.testing.assert_close(layer.train().weight, layer.theta())
    layer.gate_threshold = 0.6
    torch.testing.assert_close(layer.eval().weight, torch.tensor([[0.0, -0.3, 0.0]]))


def test_threshold_is_idempotent_and_capacity_falls_with_it():
    values = torch.randn(100, generator=torch.Generator().manual_seed(0))
    once = sparse(values, 0.5)
    assert torch.equal(sparse(once, 0.5), once)
    method, stream = born(factory("apd"), image_stream("til"))
    live(method, stream)
    capacities = []
    for method.l1 in (0.0, 0.01, 0.05, 0.2, 10.0):
        capacities.append(method.capacity())
    assert capacities == sorted(capacities, reverse=True) and capacities[0] > capacities[-1]
    own = sum(layer.own.numel() for n in method.networks for layer in additive_layers(n).values())
    single = sum(p.numel() for m in (method.backbone, method.heads) for p in m.parameters())
    assert capacities[0] - capacities[-1] == pytest.approx(own / single, rel=1e-6)


# --- grouping


def test_groups_share_the_middle_of_what_they_agree_on():
    layers = parts([[1.0, 0.5, 3.0], [1.008, 0.9, 3.0], [5.0, 5.0, 5.0]])
    before = [layer.theta().detach() for layer in layers]
    consolidate(layers, [0, 0, 1], gap=0.01)
    assert layers[0].common is layers[1].common and layers[2].common is None
    torch.testing.assert_close(layers[0].common.data, torch.tensor([[1.004, 0.0, 3.0]]))
    torch.testing.assert_close(layers[0].own.data, torch.tensor([[0.0, 0.5, 0.0]]))
    assert torch.equal(layers[2].theta(), before[2]), "a group of one keeps its part"
    assert all((a.theta() - b).abs().max() <= 0.005 + 1e-6 for a, b in zip(layers, before, strict=True))


def test_no_weight_moves_by_more_than_half_the_gap_and_the_next_grouping_begins_whole():
    generator = torch.Generator().manual_seed(0)
    layers = parts(torch.randn(6, 40, generator=generator).mul(0.01).tolist())
    for groups in ([0, 0, 0, 1, 1, 2], [0, 1, 0, 1, 0, 1]):
        before = [layer.theta().detach().clone() for layer in layers]
        consolidate(layers, groups, gap=0.02)
        assert all((a.theta() - b).abs().max() <= 0.01 + 1e-6 for a, b in zip(layers, before, strict=True))
    assert any(layer.own.eq(0).any() for layer in layers)


def test_clusters():
    rows = torch.tensor([[0.0, 0], [0, 1], [9, 9], [9, 8], [-9, 9]])
    groups = cluster(rows, 3, before=[])
    assert groups[0] == groups[1] and groups[2] == groups[3] and len(set(groups)) == 3
    assert cluster(rows, 3, before=groups) == [sorted(set(groups)).index(g) for g in groups], "it stays as it is"
    assert len(set(cluster(rows, 9, before=[]))) == 5
    assert cluster(rows, 1, before=[]) == [0] * 5


def test_tasks_are_grouped_as_often_as_asked():
    method, stream = born(factory("apd", group_every=2, groups=1, gap=10.0), image_stream("til"))
    shared = trace(lambda m: [additive_layers(n)["linear"].common for n in m.networks], method, stream)
    assert shared[0] == [None] and shared[1][0] is shared[1][1] is not None
    assert shared[2][:2] == shared[1] and shared[2][2] is None
    assert not shared[1][0].requires_grad
    plain, stream = born(factory("apd", group_every=0), image_stream("til"))
    live(plain, stream)
    assert all(layer.common is None for n in plain.networks for layer in additive_layers(n).values())


def test_the_network_keeps_its_shape():
    method, stream = born(factory("apd"), image_stream("til"))
    live(method, stream, until=1)
    assert additive_layers(method.networks[0]).keys() == layers_of(Net()).keys()
