"""Class statistics and the pass that extracts features."""

import itertools

import torch
from helpers import Net, image_stream

from clrun.blocks.statistics import ClassStats, extract
from clrun.method import Method


def test_golden_means_and_counts() -> None:
    stats = ClassStats(2, 3)
    stats.update(torch.tensor([[1.0, 0], [1, 1], [0, 2], [2, 1]]), torch.tensor([0, 0, 1, 1]))
    assert stats.means().tolist() == [[1, 0.5], [1, 1.5], [0, 0]]
    assert stats.counts().tolist() == [2, 2, 0]


def test_chunks_equal_one_pass() -> None:
    features, y = torch.randn(200, 5) + 100, torch.randint(4, (200,))
    whole, parts = ClassStats(5, 4), ClassStats(5, 4)
    whole.update(features, y)
    for start in range(0, 200, 33):
        parts.update(features[start : start + 33], y[start : start + 33])
    assert torch.equal(whole.counts(), parts.counts())
    torch.testing.assert_close(whole.means(), parts.means(), rtol=1e-12, atol=0)
    expected = torch.stack([features[y == c].double().mean(0) for c in range(4)])
    torch.testing.assert_close(whole.means(), expected, rtol=1e-12, atol=0)


def test_order_of_domains_and_classes_does_not_show_in_the_last_bit() -> None:
    # Values of very different size: their float64 sum depends on the order of addition.
    source = torch.Generator().manual_seed(0)
    parts = [torch.randn(7, 3, generator=source) * 10.0**power for power in (-3, 0, 8)]
    y = torch.tensor([0, 1, 0, 1, 2, 0, 2])
    totals = [part.double().sum(0) for part in parts]
    sums = {tuple((a + b + c).tolist()) for a, b, c in itertools.permutations(totals)}
    assert len(sums) > 1, "the data must be able to show an order"
    means = []
    for order in itertools.permutations(range(3)):
        stats = ClassStats(3, 3)
        for domain in order:
            stats.update(parts[domain], y, source=domain)
        means.append(stats.means())
    assert all(torch.equal(means[0], other) for other in means[1:])


def test_extract_reads_the_eval_view_in_order_and_changes_nothing() -> None:
    stream = image_stream()
    method = Method(Net(), 6).train()
    method.backbone.norm.running_mean.normal_()
    before = {name: t.clone() for name, t in method.state_dict().items()}
    features, y = extract(method, stream.tasks[1].train, size=10)
    assert torch.equal(y, stream.tasks[1].train.y)
    assert not features.requires_grad
    assert all(m.training for m in method.modules())
    assert all(torch.equal(before[name], t) for name, t in method.state_dict().items())
    method.eval()
    x = torch.cat([batch.x for batch in stream.tasks[1].train.batches(10)])
    torch.testing.assert_close(features, method.backbone(x))
