"""Gaussians of tasks: centroids, classes that come again, draws and their labels."""

from typing import Any

import pytest
import torch
from helpers import configured, context, row_stream
from torch import Tensor

from clrun.blocks.gaussian import GaussianReplay
from clrun.blocks.task_gaussians import Centroids, TaskAlignment, TaskGaussians
from clrun.data.stream import Stream
from clrun.learning.heads import GrowingHead
from clrun.learning.method import Method

D, C = 5, 6


def features(*classes: int, seed: int = 0, count: int = 12) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    y = torch.tensor(classes).repeat_interleave(count)
    return torch.randn(len(y), D, generator=source) + 4 * y[:, None], y


def measured(kind: Any, *tasks: tuple[Tensor, Tensor], jitter: float = 0.0) -> tuple[TaskGaussians, Stream]:
    stream = row_stream(tasks, C)
    found = TaskGaussians(D, C, kind, jitter=jitter, centroids=3)
    for task in stream.tasks:
        found.measure(lambda x: x, task)
    return found, stream


def test_classes_of_one_task_each_are_one_set_of_gaussians() -> None:
    first, second = features(4, 1), features(2, 5, seed=1)
    found, _ = measured("full", first, second)
    assert len(found.parts) == 1 and found.labels.tolist() == [1, 4, 2, 5] and found.positions.tolist() == [0, 0, 1, 1]
    assert found.latest().tolist() == [-1, 0, 1, -1, 0, 1]
    sampler = found.sampler(torch.tensor([1.0, 1.0, 1.0, 0.5]))
    for place, label in enumerate((1, 4, 2, 5)):
        own = torch.cat([x[y == label] for x, y in (first, second)]).double()
        factor = 0.5 if label == 5 else 1.0
        torch.testing.assert_close(sampler.means[place], factor * own.mean(dim=0), rtol=1e-6, atol=1e-6)
        covariance = sampler.factors[place] @ sampler.factors[place].t()
        torch.testing.assert_close(covariance, own.t().cov(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.means()[0], sampler.means[0].float())


def test_a_class_of_two_domains_has_a_gaussian_in_each() -> None:
    for kind in ("full", "diagonal"):
        found, _ = measured(kind, features(0, 1), features(0, 1, seed=3))
        assert len(found.parts) == 2 and found.labels.tolist() == [0, 1, 0, 1] and found.latest()[:2].tolist() == [1, 1]
        again = features(0, 1, seed=3)[0][:12].double().mean(dim=0)
        torch.testing.assert_close(found.sampler().means[2], again, rtol=1e-6, atol=1e-6)


def test_centroids_are_the_parts_of_a_class() -> None:
    centres = torch.tensor([[0.0] * D, [9.0] * D, [-9.0] * D])
    noise = 0.1 * torch.randn(30, D, generator=torch.Generator().manual_seed(0))
    rows = centres.repeat_interleave(10, dim=0) + noise
    found = Centroids(D, 3, jitter=0.5)
    assert found.add(rows) == 3
    for centre, rows_of in zip(centres, rows.split(10), strict=True):
        place = (found.means - centre).norm(dim=1).argmin()
        torch.testing.assert_close(found.means[place], rows_of.double().mean(dim=0))
        torch.testing.assert_close(found.variances[place], rows_of.double().var(dim=0, unbiased=False))
    torch.testing.assert_close(found.sampler().factors[0], (found.variances[0] + 0.5).sqrt())
    assert found.add(rows[:2]) == 2 and not found.variances[3:].any(), "no more centroids than rows"


def test_draws_of_centroids_have_their_moments_and_labels() -> None:
    found, _ = measured("centroids", features(4, 1), features(2, 5, seed=1))
    assert found.labels.tolist() == [1] * 3 + [4] * 3 + [2] * 3 + [5] * 3
    sampler, count = found.sampler(), 20_000
    drawn = sampler(count, torch.Generator().manual_seed(0))
    error = found.centroids.variances.sqrt() / count**0.5
    assert ((drawn.mean(dim=1) - found.centroids.means).abs() < 5 * error + 1e-4).all()
    spread = 2**0.5 * found.centroids.variances / count**0.5
    assert ((drawn.var(dim=1) - found.centroids.variances).abs() < 5 * spread + 1e-4).all()


def test_bytes_are_those_of_the_formula() -> None:
    def size(module: torch.nn.Module) -> int:
        owners = (vars(m).values() for m in module.modules())
        return sum(t.nbytes for values in owners for t in values if isinstance(t, Tensor))

    four = measured("full", features(4, 1), features(2, 5, seed=1))[0]
    assert size(four) == 8 * C * D + 8 * C + 4 * 4 * D * D + 16 * 4
    parts = measured("centroids", features(4, 1))[0]
    assert size(parts) == (16 * D + 16) * 2 * 3


def test_an_alignment_reads_every_drawn_row_once_per_epoch() -> None:
    found, stream = measured("centroids", features(4, 1), features(2, 5, seed=1))
    budget = configured("budget", "sgd", epochs=2, batch_size=8)
    alignment = TaskAlignment("centroids", 0.0, 4, None, budget, 3)
    assert isinstance(alignment.gaussians(D, C), TaskGaussians)
    head, labels = GrowingHead(D, C), list[int]()
    head.grow(torch.arange(C))
    method = _Plain(head)
    start = head.weight.detach().clone()

    class Watched(TaskAlignment):
        def loss(self, logits: Tensor, y: Tensor, groups: Tensor) -> Tensor:
            labels.extend(y.tolist())
            return super().loss(logits, y, groups)

    Watched("centroids", 0.0, 4, None, budget, 3).align(method, head, context(stream, 1), found)
    assert sorted(labels) == sorted([1, 2, 4, 5] * 2 * 3 * 4)
    moved = (head.weight != start).any(dim=1)
    assert moved.tolist() == [False, True, True, False, True, True]


class _Plain(Method):
    """A method of a head alone."""

    def __init__(self, head: GrowingHead) -> None:
        backbone = torch.nn.Linear(D, D)
        backbone.num_features = D  # type: ignore[assignment]
        super().__init__(backbone, C)
        self.head = head


def test_zero_epochs_align_nothing() -> None:
    found, stream = measured("full", features(4, 1))
    budget = configured("budget", "sgd", epochs=0)
    head = GrowingHead(D, C)
    head.grow(torch.arange(C))
    before = head.weight.detach().clone()
    TaskAlignment("full", 0.0, 4, None, budget, 3).align(_Plain(head), head, context(stream), found)
    assert torch.equal(before, head.weight)


def test_single_gaussians_of_a_task_are_those_of_the_block() -> None:
    rows = features(0, 3)
    found, _ = measured("diagonal", rows, jitter=0.25)
    replay = GaussianReplay(D, C, covariance="diagonal", jitter=0.25)
    own = replay.empty()
    own.update(*rows)
    replay.add(own)
    one, other = found.sampler(), replay.sampler(torch.tensor([0, 3]))
    assert torch.equal(one.means, other.means) and all(map(torch.equal, one.factors, other.factors))
    assert pytest.approx(0.25) == float(
        found.sampler().factors[0][0] ** 2 - found.parts[0].covariance_of(0)[0].double()
    )
