"""Compression of weights: closed forms, worked numbers, exactness of each removal, and forms that hold."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from helpers import Net, configured, context, factory, image_stream
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clrun.blocks.compress.base import FORMS, Evidence, hold, install, unpack_state
from clrun.blocks.compress.factors import (
    SOLVERS,
    enough,
    entry_weighted,
    row_weighted,
    row_weights,
    spread,
    truncated,
    weighted_error,
)
from clrun.blocks.compress.forms import LowRank, Quantised, Sparse, pack_bits, pattern_bits, unpack_bits
from clrun.blocks.compress.grid import grid_of
from clrun.blocks.compress.m_fac import removed_from, scores_of
from clrun.blocks.compress.obs import (
    damped,
    error_of,
    refit,
    removal_in_groups,
    removal_of_blocks,
    removal_order,
    rounded,
)
from clrun.blocks.curvature import BlockInverse
from clrun.running.compression import Stage
from clrun.system.errors import ConfigError, DataWarning


def double(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- low rank

W = double([2, 0.5, 0], [1, 1, 0.5], [0, -1, 1])
I = double([4, 1, 1], [1, 1, 0], [0.25, 0.25, 0.5])  # noqa: E741  # the card's name


def test_worked_numbers_of_weighted_factorisations():
    assert weighted_error(W, I, truncated(W, 1)) == pytest.approx(1.2829803, abs=1e-7)
    out, inner = (row_weighted(W, I, 1, side) for side in ("out", "in"))
    assert row_weights(I).square().tolist() == pytest.approx([6, 2, 1])
    assert row_weights(I.T).square().tolist() == pytest.approx([5.25, 2.25, 1.5])
    assert weighted_error(W, I, out) == pytest.approx(1.1756986, abs=1e-7)
    assert weighted_error(W, I, inner) == pytest.approx(1.1781083, abs=1e-7)
    assert (out[0] @ out[1])[0].tolist() == pytest.approx([1.9494322, 0.6448868, 0.0717145], abs=1e-7)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("start", ["svd", "out", "in"])
def test_every_solver_of_tfwsvd_finds_the_minimum_from_every_start(solver, start):
    begun = truncated(W, 1) if start == "svd" else row_weighted(W, I, 1, start)
    factors = begun
    for _, factors in zip(  # noqa: B007
        range({"als": 60, "em": 400, "adam_sgd": 1500}[solver]), SOLVERS[solver](W, I, begun), strict=False
    ):
        pass
    assert weighted_error(W, I, factors) == pytest.approx(1.0984827, abs=1e-4 if solver == "adam_sgd" else 2e-6)


@pytest.mark.parametrize("solver", ["als", "em"])
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_the_weighted_error_never_grows_and_is_at_most_that_of_the_start(solver, seed, rank):
    matrix, fisher = drawn(seed, 6, 5), drawn(seed + 1, 6, 5).abs().pow(3)
    start = row_weighted(matrix, fisher, rank, "in")
    errors = [weighted_error(matrix, fisher, start)]
    for _, factors in zip(range(6), SOLVERS[solver](matrix, fisher, start), strict=False):
        errors.append(weighted_error(matrix, fisher, factors))
    assert all(b <= a * (1 + 1e-7) + 1e-12 for a, b in itertools.pairwise(errors))
    best = weighted_error(matrix, fisher, entry_weighted(matrix, fisher, start, solver, 20))
    assert best <= errors[0]


@given(seed=st.integers(0, 10**6), rank=st.integers(1, 5), scale=st.floats(1e-6, 1e6))
@settings(max_examples=20, deadline=None)
def test_identities_of_svd_and_fwsvd(seed, rank, scale):
    matrix, fisher = drawn(seed, 7, 5), drawn(seed + 1, 7, 5).square()
    values = torch.linalg.svdvals(matrix)
    left, right = truncated(matrix, rank)
    tail = values[rank:].square().sum()
    assert torch.allclose((matrix - left @ right).square().sum(), tail, atol=1e-10)
    equal = row_weighted(matrix, torch.full_like(matrix, scale), rank, "out")
    assert torch.allclose(equal[0] @ equal[1], left @ right, atol=1e-9)  # equal weights: plain SVD
    for side, weighted in (("out", matrix), ("in", matrix.T)):
        own = fisher if side == "out" else fisher.T
        a, b = row_weighted(matrix, fisher, rank, side)
        scaled = row_weighted(matrix, scale * fisher, rank, side)
        assert torch.allclose(a @ b, scaled[0] @ scaled[1], atol=1e-9)
        d = row_weights(own)
        product = a @ b if side == "out" else (a @ b).T
        error = (d[:, None] * (weighted - product)).square().sum()
        assert torch.allclose(error, torch.linalg.svdvals(d[:, None] * weighted)[rank:].square().sum(), rtol=1e-9)
        plain = left @ right if side == "out" else (left @ right).T
        assert error <= (d[:, None] * (weighted - plain)).square().sum() + 1e-10


def test_the_predictor_of_failure_is_zero_for_equal_weights_and_grows_with_their_variance():
    assert spread(torch.ones(3, 4)) == 0 == spread(torch.zeros(3, 4))
    assert spread(torch.tensor([1.0, 3.0])) == pytest.approx(0.25)


# --- optimal brain surgery

X = double([1, 2, 0, 1], [0, 1, 1, 0], [1, 1, 1, 2])
H = 2 / 4 * X @ X.T
ROW = double([0.9, -0.35, 0.62])
NONE = torch.zeros(1, 3, dtype=torch.bool)


def spd(seed, size, rows=40):
    x = drawn(seed, size, rows)
    return 2 / rows * x @ x.T


def test_worked_numbers_of_pruning():
    assert torch.equal(H, double([3, 1, 2.5], [1, 1, 1], [2.5, 1, 3.5]))
    order, increments = removal_order(ROW, torch.linalg.inv(H), NONE)
    assert order.tolist() == [[1, 2, 0]]
    assert increments[0, :2].tolist() == pytest.approx([0.0396324, 0.2373176], abs=1e-7)
    first = refit(ROW, torch.linalg.inv(H), torch.tensor([[True, False, True]]))
    assert first.tolist()[0] == pytest.approx([0.8176471, 0, 0.5788235], abs=1e-7)
    second = refit(ROW, torch.linalg.inv(H), torch.tensor([[True, False, False]]))
    assert second.tolist()[0] == pytest.approx([1.3, 0, 0], abs=1e-7)


def test_worked_numbers_of_quantisation():
    grid = grid_of(ROW, 3, symmetric=True)
    grid = type(grid)(3, double(0.25), double(4))
    values = rounded(ROW, torch.linalg.inv(H), grid)
    assert values.tolist() == [[0.75, -0.25, 0.75]]
    assert float(error_of(values - ROW, H)) == pytest.approx(0.017575, abs=1e-9)
    every = torch.cartesian_prod(*[(torch.arange(8, dtype=torch.float64) - 4) / 4] * 3)
    assert float(error_of(every - ROW, H).min()) == pytest.approx(0.017575, abs=1e-9)
    assert float(error_of(grid.nearest(ROW) - ROW, H)) == pytest.approx(0.08195, abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_a_removal_is_the_best_single_one_and_refits_the_others_exactly(seed):
    """On a quadratic: against least squares on every subset."""
    size, hessian = 6, spd(seed, 6)
    weights = drawn(seed + 100, 3, size)
    order, increments = removal_order(weights, torch.linalg.inv(hessian), torch.zeros(3, size, dtype=torch.bool))
    for row, places, steps in zip(weights, order, increments, strict=True):
        kept, before = list(range(size)), 0.0
        for place, step in zip(places.tolist(), steps.tolist(), strict=True):
            losses = {p: solved(row, hessian, [k for k in kept if k != p])[1] for p in kept}
            assert losses[place] == pytest.approx(min(losses.values()), rel=1e-9)
            assert step == pytest.approx(losses[place] - before, rel=1e-6, abs=1e-10)
            kept.remove(place)
            before = losses[place]
        mask = torch.ones(1, size, dtype=torch.bool)
        mask[0, places[:4]] = False
        assert torch.allclose(
            refit(row[None], torch.linalg.inv(hessian), mask)[0],
            solved(row, hessian, mask[0].nonzero()[:, 0].tolist())[0],
            atol=1e-9,
        )


def solved(row, hessian, kept):
    """The weights of least 1/2 (w - row)' H (w - row) that are 0 outside of `kept`, and this error, densely."""
    w = torch.zeros_like(row)
    if kept:
        w[kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ row)
    return w, float(0.5 * (w - row) @ hessian @ (w - row))


@given(seed=st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_without_correlation_it_is_pruning_by_magnitude_and_rounding_to_the_nearest(seed):
    weights, inverse = drawn(seed, 4, 8), torch.eye(8, dtype=torch.float64) / 3
    order, _ = removal_order(weights, inverse, torch.zeros(4, 8, dtype=torch.bool))
    assert torch.equal(order, weights.abs().argsort(dim=1))
    grid = grid_of(weights, 3, symmetric=False)
    assert torch.equal(rounded(weights, inverse, grid), grid.nearest(weights))


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (3, 4), (4, 8)])
def test_a_pattern_holds_in_every_group(pattern):
    n, m = pattern
    kept = removal_in_groups(
        drawn(0, 5, 16), torch.linalg.inv(spd(1, 16)), torch.zeros(5, 16, dtype=torch.bool), pattern
    )
    assert (kept.view(5, -1, m).sum(dim=2) == n).all()


def test_removal_goes_on_where_an_earlier_one_stopped():
    weights, inverse = drawn(3, 2, 8), torch.linalg.inv(spd(4, 8))
    order, _ = removal_order(weights, inverse, torch.zeros(2, 8, dtype=torch.bool))
    gone = torch.zeros(2, 8, dtype=torch.bool).scatter_(1, order[:, :3], True)
    fitted = refit(weights, inverse, ~gone)
    again, increments = removal_order(fitted, inverse, gone)
    assert torch.equal(again[:, 3:], order[:, 3:]) and (increments[:, :3].abs() < 1e-12).all()


def test_blocks_of_one_weight_are_single_weights_and_larger_ones_the_best_pair():
    weights, inverse, hessian = drawn(5, 3, 8), torch.linalg.inv(spd(6, 8)), spd(6, 8)
    order, increments = removal_order(weights, inverse, torch.zeros(3, 8, dtype=torch.bool))
    single = removal_of_blocks(weights, inverse, torch.zeros(3, 8, dtype=torch.bool), 1)
    assert torch.equal(single.order, order) and torch.allclose(single.increments, increments, rtol=1e-6)
    pairs = removal_of_blocks(weights, inverse, torch.zeros(3, 4, dtype=torch.bool), 2)
    for row, first, step in zip(weights, pairs.order[:, 0], pairs.increments[:, 0], strict=True):
        losses = [solved(row, hessian, [k for k in range(8) if k // 2 != block])[1] for block in range(4)]
        assert int(first) == losses.index(min(losses)) and float(step) == pytest.approx(min(losses), rel=1e-6)


def test_the_sum_of_the_increments_is_the_error_of_the_row():
    weights, hessian = drawn(7, 4, 9), spd(8, 9)
    _, increments = removal_order(weights, torch.linalg.inv(hessian), torch.zeros(4, 9, dtype=torch.bool))
    assert torch.allclose(increments.sum(dim=1), error_of(weights, hessian), rtol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantised_rows_lie_on_their_grid_keep_zeros_and_are_left_alone_the_second_time(bits, symmetric):
    weights, inverse = drawn(9, 5, 12), torch.linalg.inv(spd(10, 12))
    weights[:, ::3] = 0
    grid = grid_of(weights, bits, symmetric=symmetric)
    values = rounded(weights, inverse, grid)
    assert torch.equal(values, grid.nearest(values)) and (values[:, ::3] == 0).all()
    assert max(len(row.unique()) for row in values) <= 2**bits
    assert torch.equal(rounded(values, inverse, grid), values)


def test_the_grid_by_hand():
    row = double([-1, -0.4, 0.1, 0.7])
    for symmetric, fit, step, expected in (
        (True, "minmax", 0.2857143, [-0.8571, -0.2857, 0, 0.5714]),
        (True, "mse", 0.2371428, [-0.9486, -0.4743, 0, 0.7114]),
        (False, "minmax", 0.2428571, [-0.9714, -0.4857, 0, 0.7286]),
    ):
        grid = grid_of(row, 3, symmetric=symmetric, fit=fit)
        assert float(grid.steps) == pytest.approx(step, abs=1e-6)
        assert grid.nearest(row)[0].tolist() == pytest.approx(expected, abs=1e-4)
    assert float(grid_of(row, 3, symmetric=False, fit="minmax").zeros) == 4
    positive = grid_of(double([0, 0.25, 0.5, 1]), 4, symmetric=True, fit="minmax")
    assert positive.nearest(double([0, 0.25, 0.5, 1]))[0].tolist() == pytest.approx([0, 0.267, 0.533, 0.933], abs=1e-3)
    empty = grid_of(torch.zeros(1, 3, dtype=torch.float64), 4, symmetric=True)
    assert float(empty.steps) > 0 and not empty.nearest(torch.zeros(1, 3, dtype=torch.float64)).any()


def test_the_inverse_exists_with_inputs_that_are_always_zero():
    hessian = spd(11, 4)
    hessian[2] = hessian[:, 2] = 0
    order, _ = removal_order(
        drawn(12, 2, 4), torch.linalg.inv(damped(hessian, 1e-4)), torch.zeros(2, 4, dtype=torch.bool)
    )
    assert (order[:, 0] == 2).all()
    assert torch.equal(damped(torch.zeros(2, 2), 1e-4), torch.eye(2))


# --- M-FAC

G = double([1, 0, 1, 0], [0, 1, 1, 0])
FOUR = double([0.3, -0.5, 0.8, 0.1])


def test_worked_numbers_of_m_fac():
    inverse = BlockInverse(G[None], 0.5)
    dense = torch.linalg.inv(0.5 * torch.eye(4, dtype=torch.float64) + G.T @ G / 2)
    assert torch.allclose(inverse.block(0), dense) and torch.allclose(inverse.diagonal()[0], dense.diagonal())
    assert inverse.diagonal()[0].tolist() == pytest.approx([1.25, 1.25, 1, 2])
    assert scores_of(FOUR, inverse)[0].tolist() == pytest.approx([0.036, 0.1, 0.32, 0.0025])
    mask = torch.tensor([[True, False, False, True]])
    moved = removed_from(FOUR, inverse, mask, "joint")
    assert moved[0].tolist() == pytest.approx([0, -0.56, 0.92, 0])
    model = torch.linalg.inv(dense)
    for values, increase in ((moved[0], 0.0385), (FOUR[0].masked_fill(mask[0], 0), 0.0475)):
        change = values - FOUR[0]
        assert float(0.5 * change @ model @ change) == pytest.approx(increase, abs=1e-6)


@given(seed=st.integers(0, 10**6), count=st.integers(1, 6))
@settings(max_examples=15, deadline=None)
def test_the_joint_update_is_exact_and_never_worse_than_the_others(seed, count):
    gradients, weights = drawn(seed, 5, 8), drawn(seed + 1, 1, 8)
    inverse = BlockInverse(gradients[None], 0.1)
    fisher = 0.1 * torch.eye(8, dtype=torch.float64) + gradients.T @ gradients / 5
    mask = torch.zeros(1, 8, dtype=torch.bool)
    mask[0, scores_of(weights, inverse)[0].argsort()[:count]] = True
    loss = {}
    for update in ("joint", "simultaneous", "none"):
        change = removed_from(weights, inverse, mask, update) - weights
        loss[update] = float(0.5 * (change @ fisher * change).sum())
    kept = (~mask[0]).nonzero()[:, 0].tolist()
    assert loss["joint"] == pytest.approx(solved(weights[0], fisher, kept)[1], rel=1e-6)
    assert loss["joint"] <= min(loss.values()) + 1e-12
    if count == 1:
        assert loss["simultaneous"] == pytest.approx(loss["joint"], rel=1e-9)


def test_without_gradients_it_is_pruning_by_magnitude():
    inverse = BlockInverse(torch.zeros(1, 2, 8), 1e-5)
    weights = drawn(3, 1, 8)
    assert torch.equal(scores_of(weights, inverse)[0].argsort(), weights[0].abs().argsort())
    mask = torch.tensor([[True, False] * 4])
    assert torch.equal(removed_from(weights, inverse, mask, "joint"), weights.masked_fill(mask, 0))


# --- forms


@given(numbers=st.lists(st.integers(0, 7), min_size=1, max_size=40))
@settings(max_examples=20, deadline=None)
def test_packed_bits_are_read_back_and_take_no_byte_too_many(numbers):
    packed = pack_bits(torch.tensor(numbers), 3)
    assert len(packed) == math.ceil(3 * len(numbers) / 8)
    assert unpack_bits(packed, 3, len(numbers)).tolist() == numbers


def some_forms():
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    left, right = (x.float() for x in truncated(weight.flatten(1).double(), 2))
    low = LowRank((6, 4, 3, 3), left, right)
    yield "low rank", low, low.weight, 4 * 2 * (6 + 36)
    some = weight.abs() > 1
    yield "sparse", Sparse((6, 4, 3, 3), some), weight.masked_fill(~some, 0), 4 * int(some.sum()) + 27
    dense = torch.ones_like(some)
    yield "sparse without zeros", Sparse((6, 4, 3, 3), dense), weight, 4 * 216
    groups = torch.zeros(6, 3, 3, 4, dtype=torch.bool)
    groups[..., :2] = True
    groups = groups.movedim(-1, 1)
    form = Sparse((6, 4, 3, 3), groups, pattern=(2, 4), channels_last=True)
    yield "2:4", form, weight.masked_fill(~groups, 0), 4 * 108 + math.ceil(54 * 3 / 8)
    blocks = Sparse((6, 4, 3, 3), groups, block=2, channels_last=True)
    yield "blocks", blocks, weight.masked_fill(~groups, 0), 4 * 108 + math.ceil(108 / 8)
    for symmetric in (True, False):
        grid = grid_of(weight.flatten(1).double(), 3, symmetric=symmetric)
        codes = grid.codes(weight.flatten(1).double()).to(torch.uint8)
        zeros = grid.zeros.to(torch.uint8)
        on = Quantised((6, 4, 3, 3), 3, grid.steps.float(), zeros, codes, symmetric=symmetric)
        yield f"3 bits {symmetric}", on, on.weight, 81 + (24 if symmetric else 30)


@pytest.mark.parametrize(("form", "weight", "size"), [pytest.param(*rest, id=name) for name, *rest in some_forms()])
def test_a_packed_form_gives_the_weight_back_bit_for_bit_and_takes_the_stated_bytes(form, weight, size):
    parts = form.pack(weight)
    assert form.stored_bytes == size == sum(part.nbytes for part in parts.values())
    other, restored = type(form).unpack(parts, form.facts())
    assert torch.equal(restored, weight) and other.stored_bytes == size and other.facts() == form.facts()
    held = weight.clone()
    other.hold_(held)
    assert torch.allclose(held, weight, atol=1e-5)
    if isinstance(form, Sparse):
        moved = weight + 1
        form.hold_(moved)
        assert torch.equal(moved == 0, ~form.kept)


def test_low_rank_is_held_near_the_best_approximation():
    weight = torch.randn(9, 12, generator=torch.Generator().manual_seed(1))
    left, right = (x.float() for x in truncated(weight.double(), 3))
    form = LowRank((9, 12), left, right)
    moved = form.weight + 1e-3 * torch.randn(9, 12, generator=torch.Generator().manual_seed(2))
    best = truncated(moved.double(), 3)
    form.hold_(held := moved.clone())
    assert torch.linalg.matrix_rank(held.double(), rtol=1e-5) == 3
    assert torch.linalg.norm(held - (best[0] @ best[1]).float()) < 1e-5 < torch.linalg.norm(held - moved)


def test_the_bits_of_a_pattern():
    assert [pattern_bits(*p) for p in ((2, 4), (1, 4), (4, 8), (1, 2))] == [3, 2, 7, 1]


HOSTILE = {
    "another shape": {"shape": [6, 4, 9]},
    "a huge shape": {"shape": [10**9, 10**9]},
    "too many patterns": {"pattern": [32, 64]},
    "no such form": {"form": "Forms"},
}


@pytest.mark.parametrize("changed", HOSTILE.values(), ids=HOSTILE)
def test_facts_that_do_not_fit_are_refused_before_memory_is_taken(changed):
    _, form, weight, _ = next(each for each in some_forms() if each[0] == "2:4")
    packed = {f"{FORMS}.layer.{name}": part for name, part in form.pack(weight).items()}
    shapes = {"backbone.layer.weight": (6, 4, 3, 3)}
    state, _ = unpack_state(packed, json.dumps({"layer": form.facts()}), shapes)
    assert torch.equal(state["backbone.layer.weight"], weight)
    with pytest.raises((ValueError, KeyError)):
        unpack_state(packed, json.dumps({"layer": form.facts() | changed}), shapes)
    with pytest.raises(ValueError, match="bits"):
        Quantised.unpack({}, {"shape": [2, 2], "bits": 10**9, "symmetric": True})


# --- compressors on a network

SMALL = {"samples": 16}
AMOUNTS = {
    "svd": {"amount": 0.6},
    "fwsvd": {"amount": 0.6},
    "tfwsvd": {"amount": 0.6, "sweeps": 3},
    "magnitude_prune": {},
    "obc_prune": {},
    "obc_quant": {"amount": 3},
    "mfac_prune": {"gradients": 3, "batch_size": 8, "rounds": 2, "block": 32},
}


def trained():
    stream = image_stream()
    torch.manual_seed(0)
    method = factory("finetune")(Net(), stream.num_classes)
    ctx = context(stream)
    method.begin_task(stream.tasks[0], ctx)
    return method, ctx


@pytest.fixture(scope="module")
def network():
    return trained()


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("name", AMOUNTS)
def test_a_compressor_reaches_its_target_and_changes_nothing_but_what_it_returns(name, scope, network):
    method, ctx = network
    options = {**SMALL, **AMOUNTS[name], "scope": scope}
    compressor = configured("compress", name, **options)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    layers = compressor.check(method)
    assert list(layers) == ["conv", "linear"] and compressor.name == name
    found = compressor.compress(Evidence(method, ctx, layers, compressor.samples))
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())
    stored = sum(compressed.form.stored_bytes for compressed in found.values())
    dense = sum(compressed.form.dense_bytes for compressed in found.values())
    assert set(found) <= set(layers) and stored < dense
    limit = {"svd": 0.6, "fwsvd": 0.6, "tfwsvd": 0.6, "obc_quant": 3 / 32 + 0.08}.get(name, 0.5 + 1 / 32 + 0.01)
    assert stored <= limit * dense
    for layer, compressed in found.items():
        weight = compressed.weight
        form, again = type(compressed.form).unpack(compressed.form.pack(weight), compressed.form.facts())
        assert torch.equal(again, weight) and weight.shape == layers[layer].weight.shape and weight.isfinite().all()
        assert form.describe() == compressed.form.describe()


@pytest.mark.parametrize("name", AMOUNTS)
@pytest.mark.parametrize("amount", ["neutral"])
def test_neutral_targets_change_nothing(name, amount, network):
    method, ctx = network
    neutral = {"svd": ("rank", 100), "fwsvd": ("rank", 100), "tfwsvd": ("ratio", 1), "obc_quant": ("bits", 16)}
    target, value = neutral.get(name, ("sparsity", 0))
    options = {**SMALL, **AMOUNTS[name], "target": target, "amount": value}
    compressor = configured("compress", name, **options)
    found = compressor.compress(Evidence(method, ctx, compressor.check(method), 16))
    assert not found and (compressor.neutral or target == "rank")


def test_obc_is_at_least_as_good_as_magnitude_at_the_same_sparsity(network):
    method, ctx = network
    errors = {}
    for name in ("magnitude_prune", "obc_prune"):
        compressor = configured("compress", name, samples=32)
        evidence = Evidence(method, ctx, compressor.check(method), 32)
        found = compressor.compress(evidence)
        errors[name] = {
            layer: float(
                error_of(
                    (compressed.weight - evidence.weight(layer)).flatten(1).double(), evidence.hessians(layer)[0]
                ).sum()
            )
            for layer, compressed in found.items()
        }
    assert all(errors["obc_prune"][layer] < error for layer, error in errors["magnitude_prune"].items())


@pytest.mark.parametrize("name", ["magnitude_prune", "obc_prune"])
def test_a_pattern_runs_over_the_inputs_of_a_convolution(name):
    net = Net()
    net.conv = nn.Conv2d(1, 6, 3, stride=2)
    net.more = nn.Conv2d(6, 8, 1)
    stream = image_stream()
    method = factory("finetune")(net, stream.num_classes)
    compressor = configured("compress", name, pattern="1:2", exclude=["conv", "more"], **SMALL)
    ctx = context(stream)
    method.begin_task(stream.tasks[0], ctx)
    found = compressor.compress(Evidence(method, ctx, compressor.check(method), 16))
    kept = found["linear"].form.kept
    assert list(found) == ["linear"] and (kept.view(12, -1, 2).sum(dim=2) == 1).all()
    with pytest.raises(ConfigError, match=r"layer conv has 9 columns, .* compress.exclude=\[conv\]$"):
        configured("compress", name, pattern="1:2").check(method)


def test_groups_of_a_convolution_have_inputs_of_their_own():
    torch.manual_seed(1)
    net = Net()
    net.linear = nn.Sequential(nn.Unflatten(1, (6, 9)), nn.Conv1d(6, 6, 1), nn.Flatten(), nn.Linear(54, 12))
    net.norm = nn.Sequential(nn.Conv2d(6, 6, 1, groups=3), nn.BatchNorm2d(6))
    stream = image_stream()
    method, ctx = factory("finetune")(net, stream.num_classes), context(stream)
    method.begin_task(stream.tasks[0], ctx)
    compressor = configured("compress", "obc_quant", amount=2, layers=["norm.0"], **SMALL)
    evidence = Evidence(method, ctx, compressor.check(method), 16)
    assert evidence.hessians("norm.0").shape == (3, 2, 2)
    assert compressor.compress(evidence)["norm.0"].weight.shape == (6, 2, 1, 1)


def test_installed_forms_hold_the_weights_of_a_method():
    method, ctx = trained()
    compressor = configured("compress", "magnitude_prune", amount=0.75)
    install(method, compressor.compress(Evidence(method, ctx, compressor.check(method), 16)))
    with torch.no_grad():
        method.backbone.linear.weight.add_(1)
    hold(method)
    assert (method.backbone.linear.weight == 0).float().mean() == 0.75
    again = compressor.compress(Evidence(method, ctx, compressor.check(method), 16))
    assert not again  # the target is met
    further = configured("compress", "magnitude_prune", amount=0.8)
    found = further.compress(Evidence(method, ctx, further.check(method), 16))
    assert not (found["linear"].form.kept & ~method.compressed.of("linear").kept).any()  # removed for good


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_no_layer_is_factorised_into_more_bytes_than_it_has(scope, network):
    """A rank at which A and B have as many numbers as W leaves W as it is: of conv [6, 9] from 4, of linear from 10."""
    method, ctx = network
    sides = [layer.weight.flatten(1).shape for layer in configured("compress", "svd").check(method).values()]
    assert [enough(*side) for side in sides] == [4, 10] and enough(1, 9) == enough(2, 2) == 1
    assert all(r * (n + m) < n * m <= (r + 1) * (n + m) for n, m in sides for r in [enough(n, m) - 1])
    compressor = configured("compress", "svd", target="rank", amount=4, scope=scope)
    found = compressor.compress(Evidence(method, ctx, compressor.check(method), 16))
    assert list(found) == ["linear"] and all(c.form.stored_bytes < c.form.dense_bytes for c in found.values())
    for amount in (0.5, 0.7, 0.9, 0.97):
        compressor = configured("compress", "svd", amount=amount, scope=scope)
        layers = compressor.check(method)
        found = compressor.compress(Evidence(method, ctx, layers, 16))
        assert all(c.form.stored_bytes < c.form.dense_bytes for c in found.values())
        stored = {n: found[n].form.stored_bytes if n in found else layer.weight.nbytes for n, layer in layers.items()}
        assert sum(stored.values()) <= amount * sum(layer.weight.nbytes for layer in layers.values())


def test_a_layer_of_one_column_is_not_quantised_into_more_bytes_than_it_has():
    method, ctx = trained()
    method.backbone.norm = nn.Sequential(
        method.backbone.norm, nn.Conv2d(6, 6, 1, groups=6)
    )  # [6, 1]: a step per weight
    compressor = configured("compress", "obc_quant", amount=2, **SMALL)
    layers = compressor.check(method)
    assert list(compressor.compress(Evidence(method, ctx, layers, 16))) == [n for n in layers if n != "norm.1"]


def test_a_layer_that_no_ratio_makes_smaller_is_to_be_excluded(network):
    with pytest.raises(ConfigError, match=r"layer one \[1, 7\] is as small as factors of rank 1; .*exclude=\[one\]$"):
        configured("compress", "svd", amount=0.9).check_layer("one", nn.Linear(7, 1))


def test_the_fisher_information_of_a_layer_without_any_loses_nothing_when_ranks_are_chosen():
    compressor = configured("compress", "fwsvd", scope="global")
    assert not compressor.losses(W, torch.zeros_like(W), "layer", None).any()
    assert compressor.losses(W, I, "layer", None).all()


@pytest.mark.parametrize("name", ["magnitude_prune", "obc_prune", "mfac_prune"])
def test_a_ratio_that_leaves_no_weight_of_a_layer_is_refused(name, network):
    options = {"target": "ratio", "amount": 0.04}
    with pytest.raises(ConfigError, match=r"^compress.amount=0.04: no weight of layer conv would be left; "):
        configured("compress", name, **options).check(network[0])
    configured("compress", name, **options, scope="global").check(network[0])


@pytest.mark.parametrize(("name", "what"), [("obc_prune", "stay as they are"), ("obc_quant", "are rounded to the")])
def test_layers_that_no_row_passes_are_named(name, what):
    method, ctx = trained()
    method.backbone.unread = nn.Linear(4, 4)
    compressor = configured("compress", name, **SMALL)
    with pytest.warns(DataWarning, match=f"^compress: no row of task 0 passes the layers unread, which {what}"):
        found = compressor.compress(Evidence(method, ctx, compressor.check(method), 16))
    assert ("unread" in found) == (name == "obc_quant")


def test_the_record_of_quantised_layers_is_that_after_the_fine_tuning(monkeypatch):
    method, ctx = trained()
    compressor, numbers = configured("compress", "obc_quant", epochs=1, rounding="nearest", **SMALL), itertools.count(1)
    compress = type(compressor).compress

    def counted(self, evidence):
        number = next(numbers)
        return {n: replace(c, facts={"number": number}) for n, c in compress(self, evidence).items()}

    monkeypatch.setattr(type(compressor), "compress", counted)
    record = Stage(compressor)(method, replace(ctx, max_steps=1), lambda phase: [])
    assert {layer["number"] for layer in record["layers"].values()} == {2}
