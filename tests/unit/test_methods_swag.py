"""SWA and SWAG: golden values, the mean and the covariance of snapshots, the tail, running statistics, importance."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Net, born, context, factory, image_stream, live, sgd
from running import run, run_interrupted
from torch import Tensor, nn

from clrun.blocks.iterates import Iterates
from clrun.blocks.merging import estimate_statistics
from clrun.blocks.params import clone
from clrun.data.stream import Stream
from clrun.learning.budget import Budget, cosine
from clrun.methods.swag import Swag, tail
from clrun.system.errors import ConfigError

TAIL = {"start_fraction": 0.5, "collect_every": 0.25}


def iterates(*snapshots: list[float], rank: int = 20) -> Iterates:
    found = Iterates(rank)
    for snapshot in snapshots:
        found.add({"w": torch.tensor(snapshot)})
    return found


def samples(found: Iterates, count: int, scale: float = 0.5) -> Tensor:
    """Return draws [count, P] around the mean."""
    draw = torch.Generator().manual_seed(0)
    mean = found.mean()
    return torch.stack([found.sample(mean, draw, scale)["w"] for _ in range(count)])


def test_golden_values() -> None:
    found = iterates([1.0], [3.0], [5.0])
    assert found.mean()["w"].item() == 3
    assert found.variance()["w"].item() == pytest.approx(8 / 3)
    assert found.deviations.flatten().tolist() == [0, 1, 2]
    assert samples(found, 5_000).var().item() == pytest.approx(2.5833333, rel=5 * (2 / 5_000) ** 0.5)


@pytest.mark.parametrize("count", [1, 4])
def test_equal_snapshots_have_no_covariance(count: int) -> None:
    found = iterates(*[[0.1, -7.3, 0.0]] * count)
    assert not found.variance()["w"].any() and not found.deviations.any()
    assert (samples(found, 5) == found.mean()["w"]).all()
    torch.testing.assert_close(found.mean()["w"], torch.tensor([0.1, -7.3, 0.0]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rank", [3, 1])
def test_samples_have_the_covariance_of_the_definition(rank: int) -> None:
    snapshots = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 2, 0.1])
    found = iterates(*snapshots.tolist(), rank=rank)
    means = torch.stack([snapshots[: k + 1].mean(dim=0) for k in range(6)])
    deviations = (snapshots - means)[-rank:]
    torch.testing.assert_close(found.deviations, deviations, rtol=1e-5, atol=1e-6)
    expected = snapshots.var(dim=0, correction=0).diag()
    if rank > 1:
        expected = expected + deviations.T @ deviations / (rank - 1)
    count = 5_000
    drawn = torch.cov(samples(found, count).T)
    error = ((0.25 * (expected.diag().outer(expected.diag()) + expected.square())) / count).sqrt()
    assert ((drawn - expected / 2).abs() < 5 * error).all()


def test_variances_have_digits_where_the_mean_is_large() -> None:
    found = Iterates(0)
    values = 1000 + 0.01 * torch.arange(5.0)
    for value in values:
        found.add({"w": value[None]})
    assert found.variance()["w"].item() == pytest.approx(values.double().var(correction=0).item(), rel=0.05)


def test_the_mean_of_noisy_iterates_is_nearer_to_the_minimum_than_the_last() -> None:
    draw, means, last = torch.Generator().manual_seed(0), [], []
    for _ in range(20):
        weight, found = torch.zeros(5), Iterates(0)
        for _ in range(200):
            weight = weight - 0.2 * (weight - 1 + torch.randn(5, generator=draw))
            found.add({"w": weight})
        means.append((found.mean()["w"] - 1).square().sum())
        last.append((weight - 1).square().sum())
    assert torch.stack(means).mean() < torch.stack(last).mean() / 5


def test_the_tail_has_the_published_rates() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule, found = tail(optimizer, 200, start_fraction=0.5, lr_ratio=0.5), []
    for _ in range(200):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert found[:51] == [2.0] * 51 and found[90:] == pytest.approx([1.0] * 110)
    assert found[70] == pytest.approx(1.5)


def lived(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Swag, Stream, list[dict[str, Tensor]]]:
    """Return a method after a task, its stream, and the snapshots that it has taken."""
    method, stream = born(factory("swag", **(TAIL | options)), image_stream())
    assert isinstance(method, Swag)
    taken: list[dict[str, Tensor]] = []
    add = Iterates.add

    def adding(self: Iterates, snapshot: dict[str, Tensor]) -> None:
        taken.append(clone(snapshot))
        add(self, snapshot)

    monkeypatch.setattr(Iterates, "add", adding)
    live(method, stream, until=1)
    return method, stream, taken


def test_a_task_ends_at_the_mean_of_its_tail_with_statistics_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    method, stream, taken = lived(monkeypatch)
    assert len(taken) == 4  # 8 steps, 4 per epoch: after the steps 5, 6, 7 and 8
    for name, value in method.averaged().items():
        torch.testing.assert_close(value.detach(), torch.stack([t[name] for t in taken]).mean(dim=0))
    found = method.backbone.norm.running_mean.clone()  # type: ignore[union-attr, operator]
    estimate_statistics(method.backbone, stream.tasks[0].train)
    assert torch.equal(found, method.backbone.norm.running_mean)  # type: ignore[union-attr, arg-type]
    assert method.iterates is None


def test_parameters_that_match_no_pattern_end_as_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    method, _, taken = lived(monkeypatch, modules=["head.*"])
    plain, stream = born(factory("swag", **TAIL, modules=["head.bias"]), image_stream())
    live(plain, stream, until=1)
    assert set(taken[0]) == {"head.weight", "head.bias"}
    assert torch.equal(method.backbone.linear.weight, plain.backbone.linear.weight)  # type: ignore[union-attr, arg-type]
    assert not torch.equal(method.head.weight, plain.head.weight)  # type: ignore[arg-type]


def test_swag_predicts_the_mean_probability_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    method, stream, _ = lived(monkeypatch, predict="swag", samples=3)
    x, twin = next(stream.tasks[0].test.batches(8)).x, born(factory("swag"), stream)[0].eval()
    twin.load_state_dict(method.state_dict())
    mean, total = {n: p.detach().clone() for n, p in method.averaged().items()}, torch.zeros(8, 2)
    with torch.no_grad():
        for number, statistics in enumerate(method.ensemble):
            twin.load_state_dict(method.draw(number, mean) | statistics, strict=False)
            total += twin(x)[:, stream.tasks[0].classes].softmax(dim=1) / 3
        method.eval()
        torch.testing.assert_close(method(x)[:, stream.tasks[0].classes].exp(), total)
        assert torch.equal(method(x), method(x))
        assert not torch.allclose(method(x), super(Swag, method).forward(x).log_softmax(dim=1))
    drawn = method.draw(0, mean)
    method._set(drawn)
    estimate_statistics(method.backbone, stream.tasks[0].train)
    assert torch.equal(method.ensemble[0]["backbone.norm.running_mean"], method.backbone.norm.running_mean)  # type: ignore


@pytest.mark.parametrize("normalise", ["none", "mean"])
def test_the_importance_is_the_precision_of_the_iterates(monkeypatch: pytest.MonkeyPatch, normalise: str) -> None:
    method, _, taken = lived(monkeypatch, strength=0.1, damping=1e-4, normalise=normalise)
    names = [name for name, _ in method.backbone.named_parameters()]
    stacked = torch.cat([torch.stack([t[f"backbone.{n}"].flatten() for t in taken]) for n in names], dim=1)
    precision = 1 / (stacked.var(dim=0, correction=0) + 1e-4)
    precision = precision if normalise == "none" else precision / precision.mean()
    torch.testing.assert_close(method.penalty.importance, precision, rtol=1e-2, atol=1e-3)
    theta = torch.cat([p.detach().flatten() for p in method.backbone.parameters()])
    torch.testing.assert_close(method.penalty.anchor, theta)


def test_its_own_schedule_replaces_none() -> None:
    method = factory("swag")(Net(), 6)
    with pytest.raises(ConfigError, match=r"^budget.schedule: swag brings its own.*budget.schedule=null"):
        method.check_budget(Budget(sgd().optimizer, epochs=1, schedule=partial(cosine, warmup=0.0)))
    method.begin_task((stream := image_stream()).tasks[0], context(stream))
    with pytest.raises(ConfigError, match=r"^method.modules: no parameter matches 'body"):
        factory("swag", modules=["body.*"])(Net(), 6)


def test_samples_survive_an_interruption(tmp_path: Path) -> None:
    words = ["method=swag", "method.predict=swag", "method.samples=2", "method.strength=0.01", "dataset=synthetic"]
    words += [
        "backbone=lenet",
        "job.max_tasks=2",
        "job.max_steps=6",
        "job.max_eval_rows=8",
        "method.start_fraction=0.3",
    ]
    run(tmp_path / "whole", *words)
    run_interrupted(tmp_path / "cut", *words)
    run(tmp_path / "cut", *words)
    assert (tmp_path / "cut" / "accuracy.csv").read_bytes() == (tmp_path / "whole" / "accuracy.csv").read_bytes()
