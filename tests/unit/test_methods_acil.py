"""ACIL and its relatives: recursion, joint ridge, AIR, DS-AL, the kernel and base training, against worked numbers."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Identity, Net, born, context, factory, image_stream, live, row_stream, sgd
from torch import Tensor

from clrun.blocks.ridge import ridge
from clrun.blocks.statistics import ClassStats
from clrun.data.stream import Stream
from clrun.methods.acil import balanced_ridge
from clrun.system.errors import ConfigError

H = torch.tensor([[1.0, 0], [1, 1], [0, 2], [2, 1]])
Y = torch.tensor([0, 0, 1, 1])


def stats(rows: Tensor, y: Tensor, moments: Any = "pooled", classes: int = 2) -> ClassStats:
    found = ClassStats(rows.shape[1], classes, moments=moments)
    found.update(rows, y)
    return found


def recursion(batches: list[tuple[Tensor, Tensor]], gamma: float, classes: int) -> tuple[Tensor, Tensor]:
    """Return R and W of the published recursion over batches (H, y), in the type of H."""
    first = batches[0][0]
    r = torch.eye(first.shape[1]).to(first) / gamma
    w = torch.zeros(first.shape[1], classes).to(first)
    for h, y in batches:
        r = r - r @ h.t() @ torch.linalg.inv(torch.eye(len(h)).to(h) + h @ r @ h.t()) @ h @ r
        w = w + r @ h.t() @ (F.one_hot(y, classes).to(h) - h @ w)
    return r, w


def learned(tasks: list[tuple[Tensor, Tensor]], classes: int = 2, **options: Any) -> Any:
    """Return the method after a life on rows of features.

    Entries of a projection are multiples of 1/8: those of `coarse` rows are then lifted without rounding, in any batch.
    """
    method = factory("acil", **({"m": 0, "gamma": 1.0} | options))(Identity(tasks[0][0].shape[1]), classes)
    if hasattr(method.projection, "weight"):
        method.projection.weight.copy_(method.projection.weight.mul(8).round() / 8)
    live(method, row_stream(tasks, classes))
    return method


def coarse(rows: int, width: int) -> Tensor:
    """Return rows of multiples of 1/4 between -2 and 2."""
    return torch.randint(-8, 9, (rows, width)) / 4


def test_weights_equal_worked_numbers() -> None:
    half = ridge(1.0, stats(H[:2], Y[:2]))
    torch.testing.assert_close(half, torch.tensor([[0.6, 0], [0.2, 0]], dtype=torch.float64))
    r, w = recursion([(H[:2].double(), Y[:2])], 1.0, 2)
    torch.testing.assert_close(r, torch.tensor([[0.4, -0.2], [-0.2, 0.6]], dtype=torch.float64))
    torch.testing.assert_close(w, half)
    expected = torch.tensor([[0.275, 0.125], [0.025, 0.375]], dtype=torch.float64)
    for order in ((0, 1), (1, 0)):
        tasks = [(H[2 * k : 2 * k + 2], Y[2 * k : 2 * k + 2]) for k in order]
        torch.testing.assert_close(learned(tasks).head.weight.t(), expected)
        r, w = recursion([(h.double(), y) for h, y in tasks], 1.0, 2)
        torch.testing.assert_close(r, torch.tensor([[0.175, -0.075], [-0.075, 0.175]], dtype=torch.float64))
        torch.testing.assert_close(w, expected)


def test_air_equals_worked_numbers_and_equal_counts_make_no_difference() -> None:
    rows, y = torch.cat([H, torch.tensor([[1.0, 2]])]), torch.cat([Y, torch.tensor([1])])
    balanced = torch.tensor([[0.34422311, 0.09880478], [-0.03346614, 0.37928287]], dtype=torch.float64)
    plain = torch.tensor([[0.26984127, 0.12698413], [-0.03174603, 0.39682540]], dtype=torch.float64)
    torch.testing.assert_close(balanced_ridge(1.0, stats(rows, y, "class")), balanced, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(ridge(1.0, stats(rows, y)), plain, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(balanced_ridge(1.0, stats(H, Y, "class")), ridge(1.0, stats(H, Y)))
    weights = torch.tensor([1.2, 0.8], dtype=torch.float64)[y][:, None]
    by_rows = torch.linalg.solve(
        (weights * rows).t() @ rows.double() + torch.eye(2, dtype=torch.float64),
        (weights * rows).t() @ F.one_hot(y, 2).double(),
    )
    torch.testing.assert_close(by_rows, balanced, rtol=1e-7, atol=1e-7)
    absent = balanced_ridge(1.0, stats(rows, y, "class", classes=4))
    assert not absent[:, 2:].any()
    torch.testing.assert_close(absent[:, :2], balanced, rtol=1e-7, atol=1e-7)


def second_stream(tasks: list[tuple[Tensor, Tensor]], batch: int = 4096) -> Any:
    """Return DS-AL with the identity as its projection, after a life."""
    method = factory("acil", m=2, gamma=1.0, gamma_comp=1.0, compensation=0.6, batch=batch)(Identity(2), 2)
    method.projection.weight.copy_(torch.eye(2))
    live(method, row_stream(tasks, 2))
    return method


def test_ds_al_equals_worked_numbers_and_depends_on_order_and_batches() -> None:
    z = H - 0.5
    one, two = (z[:2], Y[:2]), (z[2:], Y[2:])
    main = torch.tensor([[0.24880383, 0.27751196], [0.06698565, 0.45933014]], dtype=torch.float64)
    forward = torch.tensor([[0.23320094, 0.07185612], [-0.02591122, 0.18094914]], dtype=torch.float64)
    swapped = torch.tensor([[0.32268141, 0.03729756], [-0.00629184, 0.13701864]], dtype=torch.float64)
    for tasks, expected in (([one, two], forward), ([two, one], swapped)):
        method = second_stream(tasks)
        torch.testing.assert_close(method.head.weight.t(), main, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(method.second.weight.t(), expected, rtol=1e-6, atol=1e-7)
        assert not method.order_invariant
    single = second_stream([one, two], batch=1).second.weight.t()[:, 0]
    several = torch.tensor([0.25392991, -0.04664019], dtype=torch.float64)
    torch.testing.assert_close(single, several, rtol=1e-6, atol=1e-7)
    scores = method(z)
    expected = z.relu().double() @ method.head.weight.t() + 0.6 * torch.tanh(z).double() @ method.second.weight.t()
    torch.testing.assert_close(scores, expected.float())


def test_the_main_stream_is_acil_and_the_second_one_is_a_ridge_of_its_residual() -> None:
    torch.manual_seed(0)
    rows, y = coarse(60, 5), torch.arange(60) % 4
    tasks = [(rows[y < 2], y[y < 2]), (rows[y >= 2], y[y >= 2])]
    plain = learned(tasks, 4, m=12, gamma=0.1)
    both = learned(tasks, 4, m=12, gamma=0.1, compensation=1.5, batch=7)
    torch.testing.assert_close(both.head.weight, plain.head.weight, rtol=1e-9, atol=1e-12)
    first = learned(tasks[:1], 4, m=12, gamma=0.1, compensation=1.5)
    x = tasks[0][0]
    residual = F.one_hot(tasks[0][1], 4).double() - first.lift(x).double() @ first.head.weight.t()
    residual[:, 2:] = 0
    t = first.second_lift(x).double()
    expected = torch.linalg.solve(t.t() @ t + 0.1 * torch.eye(12, dtype=torch.float64), t.t() @ residual)
    torch.testing.assert_close(first.second.weight.t(), expected, rtol=1e-9, atol=1e-12)
    old = first.second.weight[:2].norm()
    assert both.second.weight[:2].norm() < old, "old columns see new rows with the target 0"


@pytest.mark.parametrize("options", [{}, {"balance": "air"}, {"projection": "normal"}, {"m": 0}], ids=str)
def test_any_order_and_batches_give_joint_ridge_and_repeats_divide_it(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    rows, y = coarse(90, 6), torch.arange(90) % 6
    parts = [(rows[y // 2 == t], y[y // 2 == t]) for t in range(3)]
    ends = [learned([parts[t] for t in order], 6, **({"m": 20} | options)) for order in ((0, 1, 2), (2, 0, 1))]
    assert torch.equal(ends[0].head.weight, ends[1].head.weight) and ends[0].order_invariant
    split = learned([(rows[:50], y[:50]), (rows[50:], y[50:])], 6, **({"m": 20} | options))
    torch.testing.assert_close(split.head.weight, ends[0].head.weight, rtol=1e-9, atol=1e-11)
    lifted = ends[0].lift(rows).double()
    weights = torch.ones(90, 1, dtype=torch.float64)
    gram = (weights * lifted).t() @ lifted + torch.eye(lifted.shape[1], dtype=torch.float64)
    joint = torch.linalg.solve(gram, lifted.t() @ F.one_hot(y, 6).double())
    torch.testing.assert_close(ends[0].head.weight.t(), joint, rtol=1e-9, atol=1e-11)
    again = learned(parts, 6, **({"m": 20, "gamma": 3.0, "repeats": 3} | options))
    torch.testing.assert_close(again.head.weight, ends[0].head.weight, rtol=1e-9, atol=1e-11)
    assert not learned(parts[:1], 6, **({"m": 20} | options)).head.weight[2:].any()


def test_a_recursion_in_single_precision_loses_digits() -> None:
    torch.manual_seed(0)
    h = torch.randn(800, 40).relu() @ torch.randn(40, 200) / 6
    h, y = h.relu(), torch.arange(800) % 5
    exact = ridge(0.01, stats(h, y, classes=5))
    batches = list(zip(h.split(64), y.split(64), strict=True))
    for dtype, bound in ((torch.float32, 1e-3), (torch.float64, 1e-8)):
        _, w = recursion([(x.to(dtype), labels) for x, labels in batches], 0.01, 5)
        error = (w.double() - exact).norm() / exact.norm()
        assert (error > bound) if dtype == torch.float32 else (error < bound)


def test_with_a_normal_projection_it_is_ranpac_with_a_fixed_ridge() -> None:
    ends = []
    for name, options in (
        ("acil", {"m": 30, "projection": "normal", "gamma": 5.0}),
        ("ranpac", {"m": 30, "rule": "fixed", "strengths": [5.0]}),
    ):
        method, stream = born(factory(name, **options), image_stream())
        live(method, stream)
        ends.append(method.head.weight)
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


def test_a_uniform_projection_is_a_narrower_one() -> None:
    normal, uniform = (
        factory("acil", m=4000, projection=kind)(Identity(64), 2).projection for kind in ("normal", "uniform")
    )
    f = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    ratio = float(normal(f).square().sum() / uniform(f).square().sum())
    assert ratio == pytest.approx(3 * 64, rel=0.05)
    assert float(uniform.weight.abs().max()) <= 1 / 8


def test_kernel_features_are_those_of_rows_of_the_first_task() -> None:
    rows, y = torch.randn(30, 3, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 2
    method = learned([(rows, y)], 2, m=8, projection="gaussian_kernel", sigma=2.0)
    centres = method.projection.centres
    distances = torch.cdist(centres.double(), rows.double())
    assert (distances.min(dim=1).values < 1e-6).all() and len(centres.unique(dim=0)) == 8
    h = method.lift(rows[:4])
    expected = torch.exp(-(rows[:4, None] - centres).square().sum(dim=2) / 8)
    torch.testing.assert_close(h, expected)
    assert not method.order_invariant
    with pytest.raises(ConfigError, match=r"^method\.m: .* draws 31 centres .* has 30 rows"):
        factory("acil", m=31, projection="gaussian_kernel")(Identity(3), 2).check(row_stream([(rows, y)], 2))


def test_base_training_trains_the_first_task_and_then_stands_still() -> None:
    method, stream = factory("acil", base="sgd", m=20)(Net(), 6), image_stream()
    assert not method.uses_frozen_features and not method.order_invariant
    before = method.backbone.linear.weight.clone()
    journal = live(method, stream, until=1, budget=sgd(epochs=3))
    weight = method.backbone.linear.weight.clone()
    assert method.base_head is None and not torch.equal(before, weight) and journal.steps
    ctx = context(stream, 1)
    live(method, stream, learned=1)
    assert torch.equal(method.backbone.linear.weight, weight)
    x = next(ctx.task.test.batches(8)).x
    method.eval()
    torch.testing.assert_close(method.forward_with(method.constant(x), x), method(x))


MISFITS = [
    ({"projection": "gaussian_kernel", "m": 0}, r"^method\.m: the number of centres"),
    ({"compensation": 0.6, "m": 0}, r"^method\.compensation: needs a random projection"),
    ({"compensation": 0.6, "balance": "air"}, r"^method\.compensation: needs a random projection"),
    ({"compensation": 0.6, "forget_tasks": [1]}, r"^method\.compensation: residuals depend"),
]


@pytest.mark.parametrize(("options", "message"), MISFITS, ids=str)
def test_options_that_do_not_suit_each_other(options: dict[str, Any], message: str) -> None:
    make = factory("acil", **options)
    with pytest.raises(ConfigError, match=message):
        make.func.check_options(make.keywords)  # type: ignore[attr-defined]


def test_the_task_that_shaped_the_features_cannot_be_unlearned() -> None:
    stream: Stream = row_stream([(H[:2], Y[:2]), (H[2:], Y[2:])], 2)
    method = factory("acil", projection="gaussian_kernel", m=1, forget_tasks=[0])(Identity(2), 2)
    with pytest.raises(ConfigError, match=r"^method\.forget_tasks: task 0 comes first"):
        method.check(stream)
    factory("acil", m=2, forget_tasks=[0])(Identity(2), 2).check(stream)
