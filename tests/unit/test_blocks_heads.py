"""Classifier heads."""

import pytest
import torch
import torch.nn.functional as F

from clrun.learning.heads import CosineHead, GrowingHead, PrototypeHead, TaskHead


@pytest.mark.parametrize("head", [GrowingHead(4, 6), CosineHead(4, 6, scale=3.0)])
def test_rows_come_to_life_with_their_classes(head: GrowingHead) -> None:
    features = torch.randn(5, 4)
    head.grow(torch.tensor([4, 1]))
    first = head.weight.detach().clone()
    logits = head(features)
    assert not logits[:, [0, 2, 3, 5]].any()
    assert logits[:, [1, 4]].all()
    head.grow(torch.tensor([1, 0]))
    assert torch.equal(head.weight[[1, 4]], first[[1, 4]])
    assert head.weight[0].abs().max() <= 0.5
    assert head.initialised.tolist() == [True, True, False, False, True, False]


def test_rows_begin_uniform_on_both_sides_of_zero() -> None:
    head = GrowingHead(16, 500)
    head.grow(torch.arange(500), torch.Generator().manual_seed(0))
    for values in (head.weight, head.bias):
        assert -0.25 <= values.min() < -0.24 and 0.24 < values.max() <= 0.25, "within 1 / sqrt(D)"
        assert abs(values.mean()) < 0.02


def test_cosine_logits_ignore_lengths_and_scale_learns() -> None:
    head = CosineHead(3, 2, scale=5.0)
    head.grow(torch.arange(2))
    features = torch.randn(4, 3)
    logits = head(features)
    torch.testing.assert_close(head(features * 7), logits)
    assert logits.abs().max() <= 5.0 + 1e-5
    torch.testing.assert_close(logits, 5 * F.cosine_similarity(features[:, None], head.weight[None], dim=2))
    logits.sum().backward()
    assert head.scale.grad is not None
    assert "bias" not in dict(head.named_parameters())


def test_prototype_golden_values() -> None:
    # Class means of [[1,0],[1,1],[0,2],[2,1]] with labels [0,0,1,1].
    head = PrototypeHead(2, 3, metric="cosine").double()
    head.prototypes[:2] = torch.tensor([[1.0, 0.5], [1.0, 1.5]])
    scores = head(torch.tensor([[1.0, 1.0]], dtype=torch.float64))
    assert scores.tolist()[0] == pytest.approx([0.9486832981, 0.9805806757, 0.0], abs=1e-10)


def test_cosine_scores_ignore_rotation_and_length_of_prototypes() -> None:
    head, turned = PrototypeHead(4, 3, metric="cosine").double(), PrototypeHead(4, 3, metric="cosine").double()
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    head.prototypes.normal_()
    turned.prototypes.copy_(head.prototypes @ rotation.T * torch.tensor([[0.1], [1.0], [30.0]]))
    x = torch.randn(6, 4, dtype=torch.float64)
    torch.testing.assert_close(turned(x @ rotation.T), head(x), rtol=0, atol=1e-12)


def test_euclidean_scores_rank_by_distance() -> None:
    head = PrototypeHead(4, 5, metric="euclidean").double()
    head.prototypes.normal_()
    x = torch.randn(30, 4, dtype=torch.float64)
    distance = torch.cdist(x, head.prototypes)
    torch.testing.assert_close(head(x) - x.square().sum(1, keepdim=True), -distance.square())


def test_task_head_fills_the_columns_of_its_classes():
    head = TaskHead(3, torch.tensor([4, 1]), 6)
    x = torch.randn(5, 3)
    logits = head(x)
    torch.testing.assert_close(logits[:, [4, 1]], F.linear(x, head.weight, head.bias))
    assert not logits[:, [0, 2, 3, 5]].any()
    assert head.weight.abs().max() <= 3**-0.5
