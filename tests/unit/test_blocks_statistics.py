"""Sums over features, linear discriminants from them, and the pass that extracts features."""

import itertools

import pytest
import torch
from helpers import Net, image_stream
from torch import Tensor

from clrun.blocks.statistics import (
    TILE,
    ClassStats,
    ExactSum,
    SymmetricSum,
    extract,
    lda,
    oas,
    solve_positive,
    together,
)
from clrun.learning.method import Method

TOY = torch.tensor([[1.0, 0], [1, 1], [0, 2], [2, 1]]), torch.tensor([0, 0, 1, 1])
MOMENTS = ("none", "pooled", "class", "diagonal")


def measured(features: Tensor, y: Tensor, num_classes: int, moments: str = "pooled") -> ClassStats:
    stats = ClassStats(features.shape[1], num_classes, moments=moments)  # type: ignore[arg-type]
    stats.update(features, y)
    return stats


def gaussians(rows: int = 300, width: int = 16, num_classes: int = 6) -> tuple[Tensor, Tensor]:
    """Features far from the origin: careless variances would cancel."""
    source = torch.Generator().manual_seed(0)
    y = torch.randint(num_classes, (rows,), generator=source)
    centres = torch.randn(num_classes, width, generator=source)
    return torch.randn(rows, width, generator=source) * 0.3 + centres[y] + 20, y


def tensors(stats: ClassStats) -> list[Tensor]:
    whole = [stats.gram()] if stats.moments == "pooled" else []
    return [
        stats.rows,
        stats.sums.value(),
        *whole,
        *(stats.products.value()[p] for _, p in sorted(stats.slots.items())),
    ]


def test_golden_sums() -> None:
    stats = measured(*TOY, 3)
    assert stats.means().tolist() == [[1, 0.5], [1, 1.5], [0, 0]]
    assert stats.counts().tolist() == [2, 2, 0]
    assert stats.gram().tolist() == [[6, 3], [3, 6]]
    assert stats.sums.value().t().tolist() == [[2, 2, 0], [1, 3, 0]]
    assert stats.scatter().tolist() == [[2, -1], [-1, 1]]


def test_golden_discriminants() -> None:
    weights, biases = lda(measured(*TOY, 3), shrinkage=0.0, ridge=0.1, priors="equal")
    x = torch.tensor([[2.0, 0], [0, 1]], dtype=torch.float64)
    scores = x @ weights.t() + biases
    expected = torch.tensor([[3.2051579, 0.8322766, 0], [0.4932935, -1.2016218, 0]], dtype=torch.float64)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-7)


def test_discriminants_are_log_posteriors() -> None:
    features, y = gaussians()
    stats = measured(features, y, 6)
    weights, biases = lda(stats, shrinkage=0.2, ridge=0.01, priors="empirical")
    within = torch.cat([features[y == c].double() - features[y == c].double().mean(0) for c in range(6)])
    covariance = within.t() @ within / 300
    covariance = 0.8 * covariance + (0.2 * covariance.trace() / 16 + 0.01) * torch.eye(16)
    means = torch.stack([features[y == c].double().mean(0) for c in range(6)])
    normal = [torch.distributions.MultivariateNormal(mean, covariance) for mean in means]
    joint = torch.stack([n.log_prob(features.double()) for n in normal], dim=1) + y.bincount().div(300).log()
    ours = features.double() @ weights.t() + biases
    torch.testing.assert_close(ours.log_softmax(1), joint.log_softmax(1), rtol=1e-6, atol=1e-6)


def test_oas_is_near_the_best_shrinkage_and_safe_at_the_ends() -> None:
    source = torch.Generator().manual_seed(0)
    true = torch.diag(torch.linspace(0.5, 2, 20, dtype=torch.float64))
    for rows in (10, 200):
        draws = torch.randn(rows, 20, generator=source, dtype=torch.float64) @ true.sqrt()
        sample = draws.t() @ draws / rows
        spread = sample.trace() / 20 * torch.eye(20)
        errors = [((1 - s) * sample + s * spread - true).norm() for s in torch.linspace(0, 1, 101)]
        share = oas(sample, rows)
        assert abs(share - int(torch.stack(errors).argmin()) / 100) < 0.15
    assert oas(torch.eye(3), 10) == 1.0
    assert oas(sample, 0) == 1.0


@pytest.mark.parametrize("moments", MOMENTS)
def test_chunks_equal_one_pass(moments: str) -> None:
    features, y = gaussians()
    whole, parts = measured(features, y, 6, moments), ClassStats(16, 6, moments=moments)  # type: ignore[arg-type]
    for start in range(0, 300, 33):
        parts.update(features[start : start + 33], y[start : start + 33])
    assert torch.equal(whole.counts(), parts.counts())
    for a, b in zip(tensors(whole), tensors(parts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_covariances_equal_those_of_the_rows() -> None:
    features, y = gaussians()
    whole, diagonal = measured(features, y, 6, "class"), measured(features, y, 6, "diagonal")
    pooled = torch.zeros(16, 16, dtype=torch.float64)
    for label in range(6):
        expected = features[y == label].double().t().cov()
        torch.testing.assert_close(whole.class_covariance(label), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(diagonal.class_covariance(label), expected.diagonal(), rtol=1e-9, atol=1e-9)
        pooled += expected * (int((y == label).sum()) - 1)
    torch.testing.assert_close(measured(features, y, 6).scatter(), pooled, rtol=1e-9, atol=1e-9)
    single = measured(features[:1], y[:1], 6, "class")
    assert not single.class_covariance(int(y[0])).any()


@pytest.mark.parametrize("moments", MOMENTS)
def test_order_does_not_show_in_the_last_bit_and_parts_can_be_taken_back(moments: str) -> None:
    # Values of very different size: their float64 sum depends on the order of addition.
    source = torch.Generator().manual_seed(0)
    scales = (1e-2, 1.0, 1e4, 37.0)
    labels = ([0, 1, 0, 1, 2, 0, 2], [2, 2, 1, 0, 0, 1, 0], [1, 0, 2, 2, 1, 1, 0], [3, 3, 3, 3, 4, 4, 4])
    parts = [
        measured(torch.randn(7, 8, generator=source, dtype=torch.float64) * scale, torch.tensor(own), 5, moments)
        for scale, own in zip(scales, labels, strict=True)
    ]
    values = [part.sums.value() for part in parts]
    naive = {tuple((a + b + c).flatten().tolist()) for a, b, c in itertools.permutations(values[:3])}
    assert len(naive) > 1, "the data must be able to show an order"
    sums = [tensors(together(*order)) for order in itertools.permutations(parts)]
    assert all(torch.equal(a, b) for other in sums[1:] for a, b in zip(sums[0], other, strict=True))
    for gone in range(4):
        left = together(*parts)
        left.merge(parts[gone], sign=-1)
        expected = together(*(part for k, part in enumerate(parts) if k != gone))
        assert torch.equal(left.counts(), expected.counts())
        assert torch.equal(left.means(), expected.means())
        for label in expected.slots:
            if moments != "none":
                assert torch.equal(left.class_covariance(label), expected.class_covariance(label))


def test_exact_sum_keeps_what_float64_loses() -> None:
    total = ExactSum(1)
    for number in (1e16, 1.0, -1e16):
        term = ExactSum(1)
        term.high = torch.tensor([number], dtype=torch.float64)
        total.add(term)
    assert total.value().item() == 1.0
    assert (1e16 + 1.0) - 1e16 != 1.0


@pytest.mark.parametrize("width", [1, 2, TILE - 1, TILE, 2 * TILE + 1])
def test_a_symmetric_sum_is_that_of_its_entries_whatever_its_width(width: int) -> None:
    source, terms = torch.Generator().manual_seed(0), []
    for scale in (1e-2, 1.0, 1e8, 37.0):
        term, same = SymmetricSum(width), ExactSum(width, width)
        term.update(torch.randn(5, width, generator=source, dtype=torch.float64) * scale)
        same.high = term.value()
        terms.append((term, same))
    naive = sum(same.high for _, same in terms) - terms[2][1].high
    total, entries = SymmetricSum(width), ExactSum(width, width)
    for (term, same), sign in [*((pair, 1) for pair in terms), (terms[2], -1)]:
        total.add(term, sign=sign)
        entries.add(same, sign=sign)
        assert torch.equal(total.value(), entries.value())
    assert not torch.equal(total.value(), naive), "the data must be able to show that errors are lost"
    whole, expected = SymmetricSum(width), ExactSum(width, width)
    for _ in range(2):  # the terms have rounding errors of their own
        whole.add(total)
        expected.add(entries)
    assert torch.equal(whole.value(), expected.value())


def test_solving_repairs_a_matrix_that_rounding_made_indefinite() -> None:
    matrix = torch.ones(3, 3, dtype=torch.float64)  # rank 1
    matrix[0, 0] -= 1e-15
    solution = solve_positive(matrix, torch.ones(3, 1, dtype=torch.float64))
    torch.testing.assert_close(matrix @ solution, torch.ones(3, 1, dtype=torch.float64), rtol=1e-3, atol=0)
    with pytest.raises(ArithmeticError, match="not finite"):
        solve_positive(matrix * torch.nan, matrix)


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
