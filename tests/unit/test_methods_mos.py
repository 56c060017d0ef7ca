"""MOS: pulled adapters, retrieval, prototypes of the first task, and what evaluation leaves alone."""

import copy
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    Net,
    answers,
    assert_same,
    born,
    context,
    copies,
    factory,
    image_stream,
    live,
    rows,
    sgd,
    state,
    trace,
)
from torch import Tensor, nn

from clrun.blocks.contrast import contrast
from clrun.blocks.inject import mlp_adapters
from clrun.data.stream import Stream
from clrun.methods.mos import pull
from clrun.running.accounting import parameter_counts
from clrun.system.errors import ConfigError

D, DEPTH, C, T, R = 32, 4, 6, 3, 16
ADAPTER = 2 * D * R + R + D
SHORT: dict[str, Any] = {"rows_per_class": 8, "budget": {"epochs": 2, "batch_size": 8}}


def mos(**options: Any) -> tuple[Any, Stream]:
    """Return a method whose adapters are large enough to tell tasks apart, and its stream."""
    return born(factory("mos", **({"alignment": SHORT, "adapter_scale": 1.0} | options)), image_stream())


def budget(**options: Any) -> Any:
    return sgd(**({"epochs": 1, "weight_decay": 0.01} | options))


@cache
def _lived() -> tuple[Any, Stream]:
    method, stream = mos()
    live(method, stream, budget=budget())
    return method, stream


def lived() -> tuple[Any, Stream]:
    method, stream = _lived()
    return copy.deepcopy(method), stream


def test_stored_adapters_and_the_backbone_stand_still_and_evaluation_changes_nothing() -> None:
    method, stream = mos()
    backbone = copies(method.backbone)
    found = trace(lambda m: [copies(a) for a in m.adapters], method, stream, budget=budget())
    for place in range(T):
        for later in found[place + 1 :]:
            assert_same(found[place][place], later[place])
    assert_same(backbone, copies(method.backbone))
    x, before = rows(stream), state(method)
    first = answers(method, x)
    assert torch.equal(first, answers(method, x))
    assert_same(before, state(method))


def test_a_pull_during_evaluation_would_be_seen() -> None:
    """The test above can fail: the public code pulls stored adapters in every forward pass."""
    method, stream = lived()
    x, inside = rows(stream), method.inside

    def pulling(place: int, x: Tensor) -> Tensor:
        if place:
            pull(method.adapters[place], method.adapters[0], 0.5)
        return inside(place, x)

    method.inside = pulling
    assert not torch.equal(answers(method, x), answers(method, x))


def test_the_pull_has_its_closed_form() -> None:
    one, mean = nn.Linear(1, 2, bias=False), nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        one.weight.copy_(torch.tensor([[1.0], [0.0]]))
        mean.weight.copy_(torch.tensor([[0.0], [1.0]]))
    found = []
    for _ in range(13):
        pull(one, mean, 0.1)
        found.append(one.weight[:, 0].tolist())
    assert found[0] == pytest.approx([0.9, 0.1]) and found[1] == pytest.approx([0.81, 0.19])
    assert [found[k - 1][0] for k in (12, 13)] == pytest.approx([0.2824295, 0.2541866], abs=1e-6)


@pytest.mark.parametrize("pulls", [1, 13])
def test_adapters_are_pulled_once_per_step_and_not_by_the_alignment(pulls: int) -> None:
    method, stream = mos(pulls_per_step=pulls)
    live(method, stream, until=2, budget=budget())
    task, ctx = stream.tasks[2], context(stream, 2, budget=budget(lr=0.0, momentum=0.0, weight_decay=0.0))
    method.begin_task(task, ctx)
    start, steps = copies(method.adapters[2]), 4
    first, second = copies(method.adapters[0]), copies(method.adapters[1])
    mean = {name: (first[name] + second[name]) / 2 for name in first}
    method.learn(task, ctx)
    assert ctx.progress.step == steps
    for name, found in copies(method.adapters[2]).items():
        expected = mean[name] + 0.9 ** (pulls * steps) * (start[name] - mean[name])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    trained = copies(method.adapters[2])
    method.end_task(task, ctx)
    assert_same(trained, copies(method.adapters[2]))


def test_without_momentum_adapters_are_trained_in_sequence_and_with_one_they_are_the_mean() -> None:
    method, stream = mos(momentum=1.0)
    live(method, stream, budget=budget())
    for name, found in copies(method.adapters[1]).items():
        assert torch.equal(found, copies(method.adapters[0])[name])
    found = [copies(method.adapters[place]) for place in range(T)]
    for name in found[0]:
        torch.testing.assert_close(found[2][name], (found[0][name] + found[1][name]) / 2)
    method, _ = mos(momentum=0.0)
    method.begin_task(stream.tasks[0], context(stream))
    method.adapters.append(copy.deepcopy(method.adapters[0]))
    before = copies(method.adapters[1])
    method.after_step(context(stream))
    assert_same(before, copies(method.adapters[1]))


def test_stored_means_are_those_of_the_trained_earlier_adapters() -> None:
    method, stream = mos(stored="mean_of_earlier")
    live(method, stream, budget=budget())
    first, second, third = (copies(method.adapters[place]) for place in range(T))
    assert_same(first, second)
    assert not all(torch.equal(third[name], first[name]) for name in first), "the mean holds the second set as trained"


def test_trained_parameters_and_their_rates() -> None:
    method, stream = mos()
    method.begin_task(stream.tasks[0], context(stream))
    adapters, head = method.trainable()
    assert sum(p.numel() for p in adapters["params"]) == DEPTH * ADAPTER
    assert sum(p.numel() for p in head["params"]) == C * (D + 1)
    assert (adapters["lr_factor"], head["lr_factor"]) == (1.0, 0.1)
    trained = parameter_counts(method)["trainable"]
    assert trained == DEPTH * ADAPTER + C * (D + 1), "what is not in a group is frozen"


def test_the_published_number_of_parameters() -> None:
    adapters = mlp_adapters(12, 768, 16, scale=0.1, dropout=0.1)
    assert sum(p.numel() for p in adapters.parameters()) == 304_320


def test_golden_contrast() -> None:
    features, mean = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.6, 0.8]])
    assert float(contrast(features, mean, space="raw")) == pytest.approx(0.7442660, abs=1e-6)
    assert float(contrast(7 * features, mean, space="cosine")) == pytest.approx(0.7442660, abs=1e-6)
    directions = F.normalize(torch.rand(48, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    norms = []
    for size in (1.0, 10.0):
        rows = (size * directions).requires_grad_()
        contrast(rows, mean.new_zeros(0, 64), space="raw").backward()
        norms.append(float(rows.grad.norm()))
    assert norms[0] > 0.1 and norms[1] < 1e-6, "without effect for large features"
    assert torch.isfinite(contrast(features[:1], mean[:0], space="raw"))


def test_the_loss_is_cross_entropy_and_contrast_with_all_earlier_means() -> None:
    method, stream = mos(contrast_space="cosine", dropout=0.0)
    live(method, stream, until=2, budget=budget())
    task, ctx = stream.tasks[2], context(stream, 2)
    method.begin_task(task, ctx)
    batch = next(task.train.batches(8))
    features = method.inside(2, batch.x)
    means = method.gaussians.means()
    assert means.shape == (4, D)
    ce = F.cross_entropy(method.head(features)[:, 4:], batch.y - 4)
    expected = ce + 0.1 * contrast(features, means, space="cosine")
    torch.testing.assert_close(method.loss(batch, ctx), expected)


def test_prototypes_are_class_means_with_the_first_adapters() -> None:
    method, stream = lived()
    with torch.inference_mode():
        for task in stream.tasks:
            batch = next(task.train.batches(100))
            features = method.inside(0, batch.x)
            for label in task.classes.tolist():
                expected = features[batch.y == label].mean(dim=0)
                torch.testing.assert_close(method.first.head.prototypes[label], expected, rtol=1e-5, atol=1e-5)


def test_prototypes_of_the_first_task_do_not_depend_on_the_order_of_later_ones() -> None:
    found = []
    for order in ((0, 1, 2), (0, 2, 1)):
        method, stream = born(factory("mos", alignment=SHORT), image_stream("cil", order))
        live(method, stream, budget=budget())
        found.append(method.first.head.prototypes.clone())
    assert torch.equal(*found)


def test_retrieval_ends_in_a_fixed_point_or_after_its_last_round() -> None:
    method, _ = mos()
    method.owner = torch.tensor([0, 0, 1, 1, 2, 2])
    z = torch.zeros(T, 3, C)
    o = F.one_hot(torch.tensor([0, 0, 4]), C).float()
    for task, (first, second, third) in enumerate(((2, 0, 0), (4, 0, 0), (0, 0, 4))):
        for image, label in enumerate((first, second, third)):
            z[task, image, label] = 1.0
    # Image 0: 0 -> 1 -> 2 -> 0 -> ...; image 1: 0 -> 0; image 2: 2 -> 2.
    found = []
    for rounds in (1, 2, 3, 4):
        method.rounds = rounds
        found.append(method.retrieved(z, o).tolist())
    assert found == [[0, 0, 2], [1, 0, 2], [2, 0, 2], [0, 0, 2]]
    method.owner[2:4] = -1
    method.rounds = 2
    assert 1 not in method.retrieved(z, o).tolist(), "classes that have not come own nothing"


def test_scores_are_the_sum_of_two_softmaxes_and_alone_the_same() -> None:
    method, stream = lived()
    x = rows(stream)
    found = answers(method, x)
    with torch.inference_mode():
        features = [method.inside(place, x) for place in range(T)]
        o = F.cosine_similarity(features[0][:, None], method.first.head.prototypes[None], dim=2)
        chosen = method.choices(x).argmax(dim=1)
        own = torch.stack([method.head(features[task])[image] for image, task in enumerate(chosen.tolist())])
    expected = (own.softmax(dim=1) + (T * o).softmax(dim=1)) / 2
    torch.testing.assert_close(found.exp(), expected, rtol=1e-4, atol=1e-5)
    alone = torch.cat([answers(method, image[None]) for image in x[::6]])
    torch.testing.assert_close(alone, found[::6], rtol=1e-5, atol=1e-5)
    method.ensemble = False
    torch.testing.assert_close(answers(method, x).exp(), own.softmax(dim=1), rtol=1e-4, atol=1e-5)


def test_untrained_adapters_are_simplecil() -> None:
    method, stream = mos()
    live(method, stream, budget=sgd(epochs=0))
    x = rows(stream)
    with torch.inference_mode():
        assert all(torch.equal(method.inside(place, x), method.query(x)) for place in range(T))
        train = [batch for task in stream.tasks for batch in task.train.batches(100)]
        plain, y = torch.cat([method.query(b.x) for b in train]), torch.cat([b.y for b in train])
        means = torch.stack([plain[y == label].mean(dim=0) for label in range(C)])
        expected = F.cosine_similarity(method.query(x)[:, None], means[None], dim=2)
        torch.testing.assert_close(method.first.head(method.query(x)), expected, rtol=1e-5, atol=1e-5)


def test_one_task_has_no_alignment_and_retrieves_itself() -> None:
    method, stream = mos()
    phases: list[str] = []
    ctx = context(stream, on_step=lambda progress: phases.append(progress.phase))
    method.begin_task(stream.tasks[0], ctx)
    method.learn(stream.tasks[0], ctx)
    method.end_task(stream.tasks[0], ctx)
    assert set(phases) == {"fit"} and method.choices(rows(stream)).tolist() == [[1]] * len(rows(stream))


def test_an_alignment_moves_the_head_alone_in_steps_of_classes_and_epochs() -> None:
    method, stream = mos()
    live(method, stream, until=1, budget=budget())
    steps: list[str] = []
    ctx = context(stream, 1, budget=budget(), on_step=lambda progress: steps.append(progress.phase))
    method.begin_task(stream.tasks[1], ctx)
    before = {name: p for name, p in copies(method).items() if not name.startswith("head")}
    head = method.head.weight.clone()
    method.end_task(stream.tasks[1], ctx)
    assert steps == ["align"] * 2 * 4
    unmoved = {name: p for name, p in copies(method).items() if name in before and not name.startswith("mean")}
    assert_same({name: before[name] for name in unmoved}, unmoved)
    assert not torch.equal(head, method.head.weight) and not method.head.weight[4:].any()


def test_a_given_task_has_its_adapters_and_streams_of_domains_are_refused() -> None:
    method, stream = lived()
    method.needs_task_id = True
    x = rows(stream)
    with torch.inference_mode():
        assert torch.equal(method(x, 1), method.head(method.inside(1, x)))
    assert method.settings == {"til", "cil"} and method.choices(x) is None
    given, _ = mos(task_id="given")
    with pytest.raises(ConfigError, match=r"^method\.task_id=given: needs the task id"):
        given.check(stream)
    with pytest.raises(ConfigError, match=r"^backbone: Mos needs a transformer with blocks"):
        factory("mos")(Net(), C)
