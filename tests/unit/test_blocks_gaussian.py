"""Replay of features: moments of what is drawn, classes that come again, and the loop of the alignment."""

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Net, context, image_stream
from torch import Tensor

from clrun.blocks.gaussian import Alignment, Covariance, GaussianReplay, normalised_logits
from clrun.learning.budget import Budget, stepped_cosine
from clrun.learning.method import Method

KINDS: tuple[Covariance, ...] = ("full", "diagonal", "shared")
D, C = 5, 6


def rows(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return rows of the classes 1, 3 and 4 with correlated features, and their labels."""
    source = torch.Generator().manual_seed(seed)
    y = torch.tensor([1, 3, 4]).repeat_interleave(count)
    mixing = torch.randn(C, D, D, generator=source)
    noise = torch.randn(len(y), D, generator=source)
    return torch.einsum("nij,nj->ni", mixing[y], noise) + 3 * torch.randn(C, D, generator=source)[y], y


def measured(kind: Covariance, *parts: tuple[Tensor, Tensor], jitter: float = 0.0) -> GaussianReplay:
    replay = GaussianReplay(D, C, covariance=kind, jitter=jitter)
    for features, y in parts:
        stats = replay.empty()
        stats.update(features, y)
        replay.add(stats)
    return replay


def covariance(kind: Covariance, features: Tensor, y: Tensor, label: int) -> Tensor:
    """Return what a covariance of this kind is by its definition."""
    if kind == "shared":
        away = torch.cat([f - f.mean(dim=0) for f in (features[y == c] for c in y.unique())])
        return away.t() @ away / (len(y) - len(y.unique()))
    found = features[y == label].t().cov()
    return found.diagonal() if kind == "diagonal" else found


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_class_that_come_in_several_tasks_count_as_if_they_came_together(kind: Covariance) -> None:
    features, y = rows(20)
    part = torch.rand(len(y), generator=torch.Generator().manual_seed(1)) < 0.3
    whole = measured(kind, (features, y))
    split = measured(kind, (features[part], y[part]), (features[~part], y[~part]))
    assert whole.classes.tolist() == split.classes.tolist() == [1, 3, 4]
    assert torch.equal(whole.rows, split.rows)
    torch.testing.assert_close(whole.means, split.means)
    for label in (1, 3, 4):
        expected = covariance(kind, features.double(), y, label).float()
        for replay in (whole, split):
            torch.testing.assert_close(replay.covariance_of(label), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_have_the_moments_of_the_class(kind: Covariance) -> None:
    features, y = rows(50)
    replay, count = measured(kind, (features, y)), 20_000
    labels = torch.tensor([4, 1])
    drawn = replay.sampler(labels, mean_factors=torch.tensor([1.0, 0.5]))(count, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.float32 and drawn.shape == (2, count, D)
    for place, (label, factor) in enumerate(((4, 1.0), (1, 0.5))):
        own = replay.covariance_of(label)
        matrix = own.diag() if kind == "diagonal" else own
        error = matrix.diagonal().sqrt() / count**0.5
        assert ((drawn[place].mean(dim=0) - factor * replay.means[label]).abs() < 5 * error).all()
        variances = matrix.diagonal()
        error = ((variances[:, None] * variances + matrix**2) / count).sqrt()
        assert ((drawn[place].t().cov() - matrix).abs() < 5 * error).all()


@pytest.mark.parametrize("kind", KINDS)
def test_zero_covariance_repeats_the_means(kind: Covariance) -> None:
    features, y = rows(1)
    features = (features * 4).round() / 4  # sums of these are exact
    same, labels = features.repeat(3, 1), y.repeat(3)
    for replay in (measured(kind, (same, labels)), measured(kind, (features, y))):
        assert not replay.covariances.any()
        drawn = replay.sampler(torch.tensor([1, 3, 4]))(7, torch.Generator().manual_seed(0))
        assert torch.equal(drawn, replay.means[[1, 3, 4], None].float().expand(-1, 7, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_with_one_row_has_the_covariance_of_the_jitter(kind: Covariance) -> None:
    replay = measured(kind, rows(1), jitter=0.04)
    drawn = replay.sampler(torch.tensor([3]))(4, torch.Generator().manual_seed(0))
    noise = torch.randn(4, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(drawn[0], (replay.means[3] + 0.2 * noise).float())


def test_fewer_rows_than_features_can_be_drawn_with_and_without_jitter() -> None:
    features, y = rows(3)
    for jitter in (0.0, 1e-4):
        drawn = measured("full", (features, y), jitter=jitter).sampler(torch.tensor([1]))(50, torch.Generator())
        away = (drawn[0] - features[y == 1].mean(dim=0)).double()
        assert torch.isfinite(drawn).all() and away.any()
        assert torch.linalg.svdvals(away)[2:].max() < 0.2, "the rows of a class span two directions"


def test_the_same_generator_draws_the_same_rows_from_copies() -> None:
    replay = measured("full", rows(20), jitter=1e-4)
    drawn = [
        twin.sampler(torch.tensor([3, 1]))(4, torch.Generator().manual_seed(5))
        for twin in (replay, copy.deepcopy(replay), pickle.loads(pickle.dumps(replay)))
    ]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_bytes_are_those_of_the_formula() -> None:
    for kind, size in (("full", 4 * 3 * D * D), ("diagonal", 4 * 3 * D), ("shared", 4 * D * D)):
        replay = measured(kind, rows(4))  # type: ignore[arg-type]
        assert sum(t.nbytes for t in vars(replay).values() if isinstance(t, Tensor)) == 8 * C * D + 8 * C + size


# --- logits and the loop


def test_golden_loss_of_normalised_logits() -> None:
    z, groups = torch.tensor([[2.0, 1, 0, -1, 9]]), torch.tensor([0, 0, 1, 1, -1])
    found = normalised_logits(z, groups, 0.1)
    assert float(z[0, 0] / found[0, 0] / 0.1) == pytest.approx(1.6180340, abs=1e-6)
    assert float(F.cross_entropy(found[:, :4], torch.tensor([0]))) == pytest.approx(0.0020718699, abs=1e-7)


def test_the_scale_of_logits_does_not_matter_and_logits_of_zero_have_a_gradient() -> None:
    z, groups = torch.randn(4, 6), torch.tensor([2, 0, 0, 2, 1, 1])
    torch.testing.assert_close(normalised_logits(7 * z, groups, 0.1), normalised_logits(z, groups, 0.1))
    zero = torch.zeros(1, 6, requires_grad=True)
    normalised_logits(zero, groups, 0.1).sum().backward()
    assert torch.isfinite(zero.grad).all()


def aligned(*, epochs: int, batch_size: int, width: int) -> tuple[list[Any], list[float], list[Tensor]]:
    """Return the batches, learning rates and draws of an alignment of 3 classes with 4 rows per class."""
    stream, batches, rates, draws = image_stream(), list[Any](), list[float](), list[Tensor]()
    source = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        draws.append(torch.randn(3, 4, width, generator=source))
        return draws[-1]

    class Watched(Alignment):
        def loss(self, logits: Tensor, y: Tensor, groups: Tensor) -> Tensor:
            batches.append((seen[-1], y))
            return super().loss(logits, y, groups)

    method, seen = Method(Net(), 6), list[Tensor]()
    method.head.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    budget = Budget(
        partial(torch.optim.SGD, lr=1.0),
        epochs=epochs,
        batch_size=batch_size,
        schedule=partial(stepped_cosine, levels=epochs),
    )
    ctx = context(stream, 1, on_step=lambda progress: rates.append(progress.lr))
    groups = torch.tensor([0, -1, 0, -1, -1, 1])
    Watched("full", 0.0, 4, 0.1, budget).fit(method, method.head, ctx, draw=draw, groups=groups)
    return batches, rates, draws


def test_every_epoch_of_an_alignment_reads_new_rows_once_each() -> None:
    batches, rates, draws = aligned(epochs=5, batch_size=4, width=12)
    assert len(batches) == 5 * 3, "epochs times classes, for batches as large as the rows of a class"
    assert rates[::3] == pytest.approx([1, 0.9045, 0.6545, 0.3455, 0.0955], abs=1e-4)
    for epoch, draw in enumerate(draws):
        own = batches[3 * epoch : 3 * epoch + 3]
        x, y = (torch.cat(column) for column in zip(*own, strict=True))
        for place, label in enumerate((0, 2, 5)):
            assert torch.equal(x[y == label].sort(dim=0).values, draw[place].sort(dim=0).values)
    assert len(draws) == 5 and not torch.equal(batches[0][1], batches[3][1])
