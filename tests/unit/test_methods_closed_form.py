"""Closed-form methods on frozen features: their scores, and their state after unlearning."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import Identity, born, context, factory, image_stream, live, row_stream
from test_blocks_statistics import TOY, gaussians
from torch import Tensor

from clrun.blocks.statistics import cholesky, shrunk
from clrun.data.stream import Stream
from clrun.learning.method import Method
from clrun.methods.fecam import correlation
from clrun.methods.ranpac import uniform
from clrun.system.errors import ConfigError

# Every kind of statistics and of solution.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("simplecil", {}),
    ("ncm", {"normalise": True}),
    ("lda", {}),
    ("lda", {"priors": "empirical", "shrinkage": 0.1}),
    ("ranpac", {"m": 100}),
    ("ranpac", {"m": 100, "rule": "gcv"}),
    ("ranpac", {"m": 0, "rule": "fixed", "strengths": [1.0]}),
    ("fecam", {}),
    ("fecam", {"covariance": "common"}),
    ("fecam", {"covariance": "diagonal"}),
    ("fecam", {"recipe": "cnn", "alpha2": 1.0, "shrinkages": 2}),
]


def toy(name: str, **options: Any) -> Method:
    """Return a method that has learned the toy rows, one class per task."""
    features, y = TOY
    stream = row_stream([(features[:2], y[:2]), (features[2:], y[2:])], 2)
    method = factory(name, **options)(Identity(2), 2)
    live(method, stream)
    return method.eval()


def scores(method: Method, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return method.eval()(x)


def test_golden_cosines() -> None:
    expected = torch.tensor([[0.9486832981, 0.9805806757]])
    torch.testing.assert_close(scores(toy("simplecil"), torch.ones(1, 2)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("normalise", [False, True])
def test_ncm_is_simplecil_with_the_euclidean_metric(normalise: bool) -> None:
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    other = toy("simplecil", metric="euclidean", normalise_before_mean=normalise)
    assert torch.equal(scores(toy("ncm", normalise=normalise), x), scores(other, x))


def test_golden_discriminants() -> None:
    method = toy("lda", shrinkage=0.0, ridge=0.1)
    expected = torch.tensor([[3.2051579, 0.8322766], [0.4932935, -1.2016218]])
    torch.testing.assert_close(scores(method, torch.tensor([[2.0, 0], [0, 1]])), expected, rtol=0, atol=1e-6)


def test_golden_ridge() -> None:
    method = toy("ranpac", m=0, rule="fixed", strengths=[1.0])
    expected = torch.tensor([[0.275, 0.125], [0.025, 0.375]])
    torch.testing.assert_close(scores(method, torch.eye(2)), expected, rtol=0, atol=1e-6)


def test_golden_shrinkage_and_correlation() -> None:
    covariance = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    smaller = shrunk(covariance, 1.0, 1.0)
    assert smaller.tolist() == [[3.5, 1.0], [1.0, 2.5]]
    scaled = correlation(smaller)
    assert scaled.diagonal().tolist() == [1.0, 1.0] and scaled[0, 1] == pytest.approx(0.338062, abs=1e-6)
    away = torch.linalg.solve_triangular(cholesky(scaled), torch.tensor([[1.0], [-1.0]]).double(), upper=False)
    assert float(away.square().sum()) == pytest.approx(3.0214296494, abs=1e-9)


def test_nearest_mean_is_nearest() -> None:
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    distance = torch.cdist(x, torch.tensor([[1, 0.5], [1, 1.5]]))
    assert torch.equal(scores(toy("ncm", normalise=False), x).argmax(1), distance.argmin(1))


def gaussian_stream(*, cnn: bool = False) -> tuple[Stream, Tensor, Tensor]:
    features, y = gaussians(width=8)
    features = features - 20
    features = features.clamp(min=0) if cnn else features
    tasks = [(features[mask], y[mask]) for mask in ((y // 2 == t) for t in range(3))]
    return row_stream(tasks, 6), features, y


def test_fecam_for_transformers_is_what_the_paper_says() -> None:
    stream, features, y = gaussian_stream()
    method = factory("fecam", alpha1=1.0, alpha2=0.5)(Identity(8), 6)
    live(method, stream)
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    for label in range(6):
        own = unit[y == label]
        inverse = torch.linalg.inv(correlation(shrunk(own.t().cov(), 1.0, 0.5)))
        away = unit - own.mean(0)
        expected = -((away @ inverse) * away).sum(1)
        torch.testing.assert_close(scores(method, features)[:, label].double(), expected, rtol=1e-4, atol=1e-4)


def test_fecam_for_networks_with_relu_is_what_the_code_does() -> None:
    stream, features, y = gaussian_stream(cnn=True)
    method = factory("fecam", recipe="cnn", alpha1=1.0, alpha2=1.0, shrinkages=2, tukey=0.5)(Identity(8), 6)
    live(method, stream)
    rows = features.double()

    def shown(x: Tensor) -> Tensor:
        return torch.nn.functional.normalize(torch.nn.functional.normalize(x, dim=-1).sqrt(), dim=-1)

    for label in range(6):
        covariance = rows[y == label].sqrt().t().cov()
        inverse = torch.linalg.inv(correlation(shrunk(shrunk(covariance, 1.0, 1.0), 1.0, 1.0)))
        away = shown(rows) - shown(rows[y == label].mean(0))
        expected = -((away @ inverse) * away).sum(1)
        torch.testing.assert_close(scores(method, features)[:, label].double(), expected, rtol=1e-4, atol=1e-4)


def test_fecam_shrunk_to_the_identity_is_the_nearest_mean() -> None:
    stream, features, _ = gaussian_stream()
    unit = torch.nn.functional.normalize(features, dim=1)
    tasks = [(torch.nn.functional.normalize(next(t.train.batches(999)).x, dim=1), t.train.y) for t in stream.tasks]
    methods = [factory("fecam", covariance=kind, alpha1=1e9)(Identity(8), 6) for kind in ("class", "common")]
    methods.append(factory("ncm", normalise=False)(Identity(8), 6))
    for method in methods:
        live(method, row_stream(tasks, 6))
    choices = [scores(method, unit).argmax(1) for method in methods]
    assert torch.equal(choices[0], choices[2]) and torch.equal(choices[1], choices[2])


def test_fecam_refuses_signed_features_in_the_recipe_for_relu() -> None:
    stream, _, _ = gaussian_stream()
    with pytest.raises(ConfigError, match=r"method\.recipe"):
        live(factory("fecam", recipe="cnn")(Identity(8), 6), stream)


def test_ranpac_without_projection_learns_what_joint_ridge_learns() -> None:
    stream, features, y = gaussian_stream()
    method = factory("ranpac", m=0, rule="fixed", strengths=[3.0])(Identity(8), 6)
    live(method, stream)
    x, targets = features.double(), torch.nn.functional.one_hot(y, 6).double()
    joint = torch.linalg.solve(x.t() @ x + 3 * torch.eye(8), x.t() @ targets)
    torch.testing.assert_close(method.head.weight, joint.t(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", ["heldout", "gcv", "author"])
def test_rules_choose_a_sensible_strength_and_log_it(rule: str) -> None:
    stream, features, y = gaussian_stream()
    method = factory("ranpac", m=60, rule=rule)(Identity(8), 6)
    journal = live(method, stream)
    chosen = [record["strength"] for record in journal.logged]
    assert len(chosen) == 3 and all(1e-8 < strength < 1e8 for strength in chosen)
    assert (scores(method, features).argmax(1) == y).float().mean() > 0.9
    assert method.order_invariant == (rule != "author")


def test_the_authors_rule_depends_on_the_last_task() -> None:
    features, y = gaussians(width=8)
    noise = torch.randn(300, 8, generator=torch.Generator().manual_seed(3))
    tasks = [((features - 20 + 4 * t * noise)[y // 2 == t], y[y // 2 == t]) for t in range(3)]
    chosen = []
    for order in ((0, 1, 2), (2, 1, 0)):
        method = factory("ranpac", m=60, rule="author")(Identity(8), 6)
        chosen.append(live(method, row_stream([tasks[t] for t in order], 6)).logged[-1]["strength"])
    assert chosen[0] != chosen[1]


def test_the_authors_rule_is_the_same_in_both_forms() -> None:
    """Fewer rows than projections take the dual form."""
    stream, _, _ = gaussian_stream()
    for width in (40, 300):
        method = factory("ranpac", m=width, rule="author")(Identity(8), 6)
        ctx = context(stream, 0)
        method.begin_task(stream.tasks[0], ctx)
        strength = method._by_author(stream.tasks[0], ctx)
        lifted = method.lift(stream.tasks[0].train.images).double()
        targets = torch.nn.functional.one_hot(stream.tasks[0].train.y, 6).double()
        from clrun.system.seeding import generator

        order = torch.randperm(len(lifted), generator=generator(0, "task", 0, "ridge"))
        apart, rest = order[: int(0.2 * len(order))], order[int(0.2 * len(order)) :]
        errors = {}
        for s in method.strengths:
            gram = lifted[rest].t() @ lifted[rest] + s * torch.eye(width)
            weights = torch.linalg.solve(gram, lifted[rest].t() @ targets[rest])
            errors[s] = float((lifted[apart] @ weights - targets[apart]).square().mean())
        assert strength == min(errors, key=errors.__getitem__)


def test_held_out_rows_are_a_fifth_wherever_they_lie() -> None:
    rows = torch.arange(100_000)
    numbers = uniform(rows)
    assert torch.equal(numbers[500:600], uniform(rows[500:600]))
    assert float(numbers.min()) >= 0 and float(numbers.max()) < 1
    for part in (numbers, numbers[::10], numbers[3::7], numbers[:20_000]):
        assert abs(float((part < 0.2).double().mean()) - 0.2) < 5 * (0.16 / len(part)) ** 0.5
    pairs = (numbers[1:] < 0.2) & (numbers[:-1] < 0.2)
    assert abs(float(pairs.double().mean()) - 0.04) < 0.004


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
@pytest.mark.parametrize("setting", ["cil", "dil"])
@pytest.mark.parametrize("keep", [False, True], ids=["measured", "kept"])
def test_forgetting_leaves_what_never_saw_the_task(
    name: str, options: dict[str, Any], setting: Any, keep: bool
) -> None:
    options = {**options, "keep_task_statistics": keep}
    method, stream = born(factory(name, forget_tasks=[1], **options), image_stream(setting))
    tasks = [replace(task, index=k) for k, task in enumerate(t for t in stream.tasks if t.id != 1)]
    live(method, stream)
    other = born(factory(name, **options), image_stream(setting))[0]
    live(other, Stream(tuple(tasks), 6, setting))
    for part in method.statistics:
        ours, theirs = method.stats(part), other.stats(part)
        assert torch.equal(ours.counts(), theirs.counts())
        pairs = [(ours.sums.value(), theirs.sums.value()), (ours.pooled.value(), theirs.pooled.value())]
        if ours.moments in ("class", "diagonal"):
            pairs += [(ours.class_covariance(c), theirs.class_covariance(c)) for c in theirs.slots]
        for a, b in pairs:
            if keep:
                assert torch.equal(a, b)
            else:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()) if b.numel() else 0)
    x = torch.cat([batch.x for task in stream.tasks for batch in task.test.batches(100)])
    seen = torch.cat([task.classes for task in tasks]).unique()
    ours, theirs = scores(method, x)[:, seen], scores(other, x)[:, seen]
    assert torch.equal(ours.argmax(1), theirs.argmax(1))
    if keep:
        assert torch.equal(ours, theirs)
    gone = sorted(set(range(6)) - set(seen.tolist()))
    assert bool(gone) == (setting == "cil")
    assert torch.isin(scores(method, x).argmax(1), seen).all()


def test_kept_statistics_need_no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    method, stream = born(factory("lda", forget_tasks=[0], keep_task_statistics=True), image_stream())
    live(method, stream, until=2)
    assert sorted(method.kept) == ["0", "1"]
    measured = []
    monkeypatch.setattr(type(method), "measure", lambda self, *args: measured.append(args) or measure(self, *args))
    measure = type(method).__mro__[1].measure
    live(method, stream, learned=2)
    assert len(measured) == 1 and sorted(method.kept) == ["1", "2"]


@pytest.mark.parametrize("tasks", [[7], [0, 1, 2]])
def test_forgetting_what_is_not_there_or_everything_is_refused(tasks: list[int]) -> None:
    method, stream = born(factory("simplecil", forget_tasks=tasks), image_stream())
    with pytest.raises(ConfigError, match=r"method\.forget_tasks"):
        method.check(stream)


def test_domains_of_a_class_add_up() -> None:
    method, stream = born(factory("lda"), image_stream("dil"))
    live(method, stream)
    parts = [next(task.train.batches(1000)) for task in stream.tasks]
    whole = row_stream([(torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts]))], 6)
    joint = born(factory("lda"), image_stream("dil"))[0]
    live(joint, whole)
    torch.testing.assert_close(method.head.weight, joint.head.weight, rtol=1e-9, atol=1e-12)


def test_linear_probe_trains_the_head_alone() -> None:
    method, stream = born(factory("linear_probe"), image_stream())
    live(method, stream)
    assert {name for name, _ in method.named_parameters()} == {"head.weight", "head.bias"}
    assert method.head.weight.any() and not method.order_invariant
