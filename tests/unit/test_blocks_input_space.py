"""Protected input directions: worked numbers, orthonormal bases, keep and complement, chunked moments."""

import pytest
import torch
from helpers import Net, tiny_vit
from torch import Tensor, nn

from clrun.blocks.input_space import InputSpace
from clrun.blocks.moments import second_moments

FIRST = torch.tensor([[3.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0.1]], dtype=torch.float64)
SECOND = torch.tensor([[1.0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1], [0, 0, 0, 1]], dtype=torch.float64)


def moments(rows: Tensor) -> Tensor:
    return rows.t() @ rows / len(rows)


def space(width: int = 4, **options: object) -> InputSpace:
    return InputSpace(width, **({"energy": "squared", "dual": False, "at_least": 1} | options))  # type: ignore[arg-type]


def test_worked_numbers() -> None:
    first, second = moments(FIRST), moments(SECOND)
    torch.testing.assert_close(first, torch.diag(torch.tensor([2.25, 1, 0.25, 0.0025], dtype=torch.float64)))
    for energy, count in (("squared", 1), ("plain", 2)):
        one = space(energy=energy)
        assert (one.update(first, 0.95), one.dimension) == (count, count)
    # Shares of the first 1, 2, 3 directions: just below and just above each.
    for energy, shares in (
        ("squared", [0.8265298, 0.9897949, 0.9999990]),
        ("plain", [0.6423983, 0.9279086, 0.9992862]),
    ):
        for k, share in enumerate(shares, start=1):
            assert space(energy=energy).update(first, share + 1e-7) == k
            assert space(energy=energy, at_least=0).update(first, share - 1e-7) == k - 1
            assert space(energy=energy, first="reach").update(first, share - 1e-7) == k
    expected = torch.tensor([[0.25, 0.25, 0, 0], [0.25, 0.25, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0.5]])
    torch.testing.assert_close(second, expected.double())
    one = space()
    one.update(first, 0.95)
    values = torch.linalg.svdvals(one.remainder(second))
    torch.testing.assert_close(values, torch.tensor([1, 0.5, 0.125**0.5, 0], dtype=torch.float64))
    row = one.leading(second, 1)[0] / 3**0.5
    torch.testing.assert_close(row.abs(), torch.tensor([0, 0, 3**-0.5, 0], dtype=torch.float64))


def test_directions_are_added_until_the_share_is_covered() -> None:
    first, second = moments(FIRST), moments(SECOND)
    for share, added in ((0.08, 0), (0.7, 1), (0.9, 2), (0.955, 3)):
        one = space()
        one.update(first, 0.5)
        assert one.covered(second) == pytest.approx(1 / 12)
        assert one.update(second, share) == added
        assert one.covered(second) == pytest.approx([1 / 12, 0.75, 11 / 12, 1.0][added])
        assert one.update(second, share) == 0, "the same inputs are covered already"


@pytest.mark.parametrize("energy", ["squared", "plain"])
def test_basis_and_complement_are_one_projection_and_orthonormal(energy: str) -> None:
    torch.manual_seed(0)
    keep, dual = space(12, energy=energy), space(12, energy=energy, dual=True)
    for step in range(6):
        rows = torch.randn(40, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64) ** 3
        before = keep.dimension
        for one in (keep, dual):
            one.update(moments(rows), 0.6 + 0.06 * step)
            unit = torch.eye(one.basis.shape[1], dtype=torch.float64)
            torch.testing.assert_close(one.basis.t() @ one.basis, unit, rtol=0, atol=1e-10)
            assert step == 0 or one.covered(moments(rows)) >= 0.6 + 0.06 * step - 1e-12
        assert before <= keep.dimension == dual.dimension
        x = torch.randn(5, 12, dtype=torch.float64)
        torch.testing.assert_close(keep.outside(x), dual.outside(x), rtol=0, atol=1e-10)
        torch.testing.assert_close(keep.remainder(moments(rows)), dual.remainder(moments(rows)), rtol=0, atol=1e-9)
        rows = keep.leading(moments(rows), 3)
        assert not (rows @ keep.basis).abs().max() > 1e-12
    assert dual.complement and dual.basis.shape[1] == 12 - dual.dimension < 6


def test_a_first_update_of_most_directions_stores_the_rest() -> None:
    one = space(dual=True)
    one.update(moments(FIRST), 0.9999999)
    assert (one.complement, one.dimension, one.basis.shape) == (True, 3, (4, 1))
    torch.testing.assert_close(one.basis[:, 0].abs(), torch.tensor([0, 0, 0, 1], dtype=torch.float64))


def test_scale_and_rotation_of_the_inputs() -> None:
    torch.manual_seed(0)
    rows, rotation = torch.randn(9, 6, dtype=torch.float64), torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    plain, scaled, rotated = space(6), space(6), space(6)
    for one, x in ((plain, rows), (scaled, 7 * rows), (rotated, rows @ rotation)):
        one.update(moments(x), 0.9)
        one.update(moments(x.flip(1)), 0.9) if one is scaled else None
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(rotated.outside(x @ rotation), plain.outside(x) @ rotation)
    again = space(6)
    again.update(moments(rows), 0.9)
    again.update(moments(rows.flip(1)), 0.9)
    torch.testing.assert_close(again.outside(x), scaled.outside(x))


def test_arbitrary_vectors_of_no_energy_are_left_out() -> None:
    basis = torch.eye(8, dtype=torch.float64)
    one = space(8)
    one.basis, one.started = basis[:, :5].contiguous(), True
    rows = one.leading(moments(torch.randn(50, 8, dtype=torch.float64)), 5)
    assert not rows[3:].any() and (rows[:3].norm(dim=1) - 1).abs().max() < 1e-12
    assert (rows @ one.basis).abs().max() < 1e-12
    one.basis = basis
    assert not one.leading(moments(torch.randn(50, 8, dtype=torch.float64)), 5).any()
    assert not one.outside(basis).abs().max() > 1e-12


def test_moments_in_chunks_are_those_of_all_rows() -> None:
    vit, x = tiny_vit(), torch.randn(6, 1, 8, 8)
    layers = {path: vit.get_submodule(path) for path in ("blocks.0.attn.qkv", "blocks.3.mlp.fc2")}
    whole = second_moments(vit, layers, [x.double()], bias=False, forward=vit.double())  # type: ignore[arg-type]
    parts = second_moments(vit, layers, x.double().split(2), bias=False)  # type: ignore[arg-type]
    for path, gram in whole.items():
        assert gram.rows == parts[path].rows == 6 * 17
        torch.testing.assert_close(gram.matrix, parts[path].matrix, rtol=1e-12, atol=1e-12)
    assert vit.training


def test_moments_of_patches_multiply_the_weight_of_a_convolution() -> None:
    net, x = Net(), torch.randn(3, 1, 8, 8)
    found = second_moments(net, {"conv": net.conv}, [x], bias=False)["conv"]
    patches = nn.functional.unfold(x, 3, stride=2).transpose(1, 2).flatten(0, 1).double()
    torch.testing.assert_close(found.matrix, patches.t() @ patches)
    assert second_moments(net, {"conv": net.conv}, [x], bias=True)["conv"].matrix.shape == (10, 10)


@pytest.mark.slow  # torch's compiler takes seconds to load
def test_second_moments_are_those_of_a_network_that_is_compiled() -> None:
    """Compiled code that has run before would ignore the hooks."""
    net, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval(), torch.randn(8, 4)
    layers = {"0": net[0], "2": net[2]}
    plain = second_moments(net, layers, [x], bias=False)  # type: ignore[arg-type]
    net.compile(backend="eager")
    with torch.no_grad():
        net(x)
    found = second_moments(net, layers, [x], bias=False)  # type: ignore[arg-type]
    assert all(torch.equal(found[name].matrix, plain[name].matrix) for name in layers)
