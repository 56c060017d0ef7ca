"""What every form of curvature promises, sums of Kronecker products, and M-FAC, against dense matrices in float64."""

import pickle
from collections.abc import Callable
from math import prod

import pytest
import torch
from matrices import Dense, as_dense, stored_bytes
from torch import Tensor, nn

from clrun.blocks.curvature import (
    Composite,
    Curvature,
    Diagonal,
    GradientWindow,
    Identity,
    KroneckerFactored,
    QuadraticPenalty,
    Terms,
    isotropic,
)

LAYER = {"w": (3, 2, 2), "b": (3,)}  # out 3, in 2x2, and a bias
FORMS = ("identity", "diagonal", "kronecker", "no_bias", "terms", "composite", "dense")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def spd(size: int, seed: int, condition: float = 10.0) -> Tensor:
    """A positive definite matrix with eigenvalues from 1 to `condition`."""
    basis = torch.linalg.qr(draw(size, size, seed=seed))[0]
    return basis * torch.logspace(0, torch.tensor(condition).log10().item(), size, dtype=torch.float64) @ basis.T


def kron(seed: int = 0, condition: float = 10.0) -> KroneckerFactored:
    return KroneckerFactored(LAYER, spd(3, seed, condition), spd(5, seed + 1, condition))


def form(name: str, seed: int = 0) -> Curvature:
    rest = Diagonal({"n": (4,)}, draw(4, seed=seed + 9).square() + 0.1)
    return {
        "identity": lambda: Identity(LAYER, 0.7 + seed),
        "diagonal": lambda: Diagonal(LAYER, draw(15, seed=seed).square() + 0.1),
        "kronecker": lambda: kron(seed),
        "no_bias": lambda: KroneckerFactored({"w": (3, 4)}, spd(3, seed), spd(4, seed + 1)),
        "terms": lambda: Terms(LAYER, (kron(seed), kron(seed + 5))),
        "composite": lambda: Composite.of([kron(seed), rest]),
        "dense": lambda: Dense(LAYER, spd(15, seed)),
    }[name]()


def dense(k: Curvature) -> Tensor:
    """The matrix, built from what the form is defined as where that is easy."""
    if isinstance(k, KroneckerFactored):
        matrix = torch.kron(k.outer, k.inner)
        if len(k.shapes) == 1:
            return matrix
        out, inside = len(k.outer), len(k.inner)
        places = torch.arange(out * inside).view(out, inside)
        order = torch.cat([places[:, :-1].flatten(), places[:, -1]])
        return matrix[order[:, None], order]
    if isinstance(k, Composite):
        return torch.block_diag(*(dense(part) for part in k.parts))
    if isinstance(k, Terms):
        return sum(dense(term) for term in k.terms)
    return torch.diag(k.diag()) if isinstance(k, Identity | Diagonal) else k.matrix


@pytest.mark.parametrize("name", FORMS)
def test_products_and_diagonals_are_those_of_the_matrix(name: str) -> None:
    k = form(name)
    matrix, v = dense(k), draw(k.size, seed=3)
    torch.testing.assert_close(matrix, matrix.T)
    torch.testing.assert_close(k.mv(v), matrix @ v)
    torch.testing.assert_close(as_dense(k), matrix)
    torch.testing.assert_close(k.quad(v), v @ matrix @ v)
    torch.testing.assert_close(k.diag(), matrix.diagonal())
    torch.testing.assert_close(k.scale(3.0).mv(v), 3 * matrix @ v)
    assert k.size == len(v) == sum(prod(s) for s in k.shapes.values())


@pytest.mark.parametrize("name", FORMS)
def test_product_is_the_gradient_of_half_the_quadratic_form(name: str) -> None:
    k = form(name)
    v = draw(k.size, seed=3).requires_grad_()
    (grad,) = torch.autograd.grad(0.5 * k.quad(v), v)
    torch.testing.assert_close(grad, k.mv(v.detach()))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_inverse_solves(name: str, damping: float) -> None:
    k = form(name)
    v = draw(k.size, seed=3)
    if name == "terms":
        with pytest.raises(ValueError, match="cannot be inverted"):
            k.inverse(damping)
        return
    matrix, inverse = dense(k) + damping * eye(k.size), k.inverse(damping)
    torch.testing.assert_close(inverse.mv(v), torch.linalg.solve(matrix, v), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(inverse.mv(k.mv(v) + damping * v), v, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(inverse.diag(), torch.linalg.inv(matrix).diagonal(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", [f for f in FORMS if f != "terms"])
def test_proximal_step_is_the_minimiser(name: str) -> None:
    k = form(name)
    point, anchor, rate = draw(k.size, seed=3), draw(k.size, seed=4), 2.5
    for one in (k, k.decomposed()):
        moved = one.proximal(point, anchor, rate)
        torch.testing.assert_close(moved - point + rate * k.mv(moved - anchor), torch.zeros_like(moved))


@pytest.mark.parametrize("name", [f for f in FORMS if f not in ("kronecker", "no_bias", "composite")])
def test_sums_are_exact(name: str) -> None:
    a, b = form(name, 0), form(name, 20)
    torch.testing.assert_close(dense(a.add(b)), dense(a) + dense(b))


@pytest.mark.parametrize("name", FORMS)
def test_pickles_and_follows_to_other_types(name: str) -> None:
    k = form(name)
    twin = pickle.loads(pickle.dumps(k))
    assert torch.equal(twin.mv(draw(k.size, seed=3)), k.mv(draw(k.size, seed=3)))
    half = k.apply(Tensor.float)
    assert stored_bytes(half) * 2 == stored_bytes(k)
    if name != "identity":
        assert half.mv(draw(k.size).float()).dtype == torch.float32


def test_bytes() -> None:
    assert stored_bytes(form("identity")) == 0
    assert stored_bytes(form("kronecker")) == 8 * (3**2 + 5**2)
    assert stored_bytes(form("composite")) == 8 * (3**2 + 5**2 + 4)


def test_factored_damping() -> None:
    k, damping = kron(), 0.09
    pi = ((k.inner.trace() / 5) / (k.outer.trace() / 3)).sqrt()
    damped = KroneckerFactored(LAYER, k.outer + 0.3 / pi * eye(3), k.inner + 0.3 * pi * eye(5))
    torch.testing.assert_close(as_dense(k.inverse(damping, "factored")), torch.linalg.inv(dense(damped)))
    # It is the trace-balanced sum of the factors with (sqrt(damping) I, sqrt(damping) I).
    both = k.add(KroneckerFactored(LAYER, 0.3 * eye(3), 0.3 * eye(5)), "additive")
    torch.testing.assert_close(dense(both), dense(damped))


def test_a_factor_that_rounding_made_indefinite_still_has_an_inverse() -> None:
    basis = torch.linalg.qr(draw(5, 5))[0]
    inner = basis * torch.tensor([-1e-9, 1e-3, 1, 1, 1]).double() @ basis.T
    inverse = KroneckerFactored({"w": (3, 5)}, eye(3), inner).inverse(0.0, "factored")
    torch.testing.assert_close(torch.linalg.eigvalsh(inverse.inner), torch.tensor([1, 1, 1, 1e3, 2**23]).double())


def test_isotropic() -> None:
    k = isotropic(form("composite"), 0.25)
    assert isinstance(k, Composite)
    torch.testing.assert_close(as_dense(k), 0.25 * eye(19))
    assert k.parts[0].outer[0, 0] == k.parts[0].inner[0, 0] == 0.5


# --- sums of Kronecker products


@pytest.mark.parametrize("how", ["kl", "rank1"])
@pytest.mark.parametrize("case", ["proportional", "same inputs", "same outputs", "zero"])
def test_sum_is_exact_where_a_product_can_be(how: str, case: str) -> None:
    a = kron(0, 1e3)
    b = {
        "proportional": KroneckerFactored(LAYER, 0.3 * a.outer, 7 * a.inner),
        "same inputs": KroneckerFactored(LAYER, spd(3, 7, 100), a.inner / 4),
        "same outputs": KroneckerFactored(LAYER, 5 * a.outer, spd(5, 7, 100)),
        "zero": KroneckerFactored(LAYER, 0 * a.outer, a.inner),
    }[case]
    for x, y in ((a, b), (b, a)):
        torch.testing.assert_close(dense(x.add(y, how)), dense(x) + dense(y), rtol=1e-11, atol=1e-9)


def divergence(precision: Tensor, exact: Tensor) -> float:
    """KL divergence of the Gaussian of `precision` from that of `exact`."""
    ratio = torch.linalg.solve(precision, exact)
    return 0.5 * float(ratio.trace() - len(ratio) - torch.linalg.slogdet(ratio)[1])


def published(a: KroneckerFactored, b: KroneckerFactored, rounds: int) -> Tensor:
    """The damped fixed point as published, with a matrix inverse for each trace, from the balanced additive sum."""

    def balanced(k: KroneckerFactored) -> tuple[Tensor, Tensor]:
        scale = ((k.inner.trace() / len(k.inner)) / (k.outer.trace() / len(k.outer))).sqrt()
        return k.outer * scale, k.inner / scale

    (lb, rb), (lc, rc) = balanced(a), balanced(b)
    pi = (lb.trace() * rc.trace() / (lc.trace() * rb.trace())).sqrt()
    left, right = lb + pi * lc, rb + rc / pi
    for _ in range(rounds):
        eb, ec = (torch.linalg.solve(right, r).trace() / len(right) for r in (rb, rc))
        fb, fc = (torch.linalg.solve(left, x).trace() / len(left) for x in (lb, lc))
        left, right = 0.7 * left + 0.3 * (eb * lb + ec * lc), 0.7 * right + 0.3 * (fb * rb + fc * rc)
    return dense(KroneckerFactored(LAYER, left, right))


def test_kl_sum_is_the_published_fixed_point_and_the_closest() -> None:
    a, b = kron(0, 1e2), kron(5, 1e2).scale(0.3)
    exact, found = dense(a) + dense(b), a.add(b, "kl")
    torch.testing.assert_close(dense(found), published(a, b, 400), rtol=1e-9, atol=1e-9)
    best = divergence(dense(found), exact)
    assert best < divergence(dense(a.add(b, "additive")), exact)
    assert best < divergence(dense(a.add(b, "rank1")), exact)
    for seed in range(5):
        g, h = 1e-3 * (spd(3, seed) - 5 * eye(3)), 1e-3 * (spd(5, seed) - 5 * eye(5))
        near = KroneckerFactored(LAYER, found.outer @ (eye(3) + g), found.inner @ (eye(5) + h))
        sides = [(x + x.T) / 2 for x in (near.outer, near.inner)]
        assert divergence(dense(KroneckerFactored(LAYER, *sides)), exact) > best


def test_additive_sum_has_too_large_a_trace_and_rank1_is_closest_in_norm() -> None:
    a, b = kron(0, 1e2), kron(5, 1e2).scale(0.3)
    exact = dense(a) + dense(b)
    trace = (dense(a).trace().sqrt() + dense(b).trace().sqrt()).square()
    torch.testing.assert_close(dense(a.add(b, "additive")).trace(), trace)
    errors = {how: float((dense(a.add(b, how)) - exact).norm()) for how in ("kl", "additive", "rank1")}
    assert errors["rank1"] < errors["kl"] < errors["additive"]
    # Van Loan: the leading singular value of the rearranged sum.
    rearranged = sum(torch.outer(k.outer.flatten(), k.inner.flatten()) for k in (a, b))
    rest = torch.linalg.svdvals(rearranged)[1:].norm()
    assert errors["rank1"] == pytest.approx(float(rest), rel=1e-9)


@pytest.mark.parametrize("how", ["kl", "additive", "rank1"])
def test_sum_is_positive_balanced_and_blind_to_the_scale_of_factors(how: str) -> None:
    a, b = kron(0, 1e4), kron(5, 1e4)
    found = a.add(b, how)
    assert torch.linalg.eigvalsh(found.outer)[0] > 0
    assert torch.linalg.eigvalsh(found.inner)[0] > 0
    torch.testing.assert_close(found.outer.trace() / 3, found.inner.trace() / 5)
    moved = KroneckerFactored(LAYER, a.outer * 1e3, a.inner / 1e3)
    torch.testing.assert_close(dense(moved.add(b, how)), dense(found), rtol=1e-8, atol=1e-8)


def test_list_keeps_all_products() -> None:
    a, b, c = kron(0), kron(5), kron(9)
    found = a.add(b, "list").add(c, "list")
    assert len(found.terms) == 3
    torch.testing.assert_close(dense(found), dense(a) + dense(b) + dense(c))


def test_sum_of_singular_products_stays_finite_and_singular() -> None:
    dead = torch.diag(torch.tensor([1.0, 1, 0]).double())
    a = KroneckerFactored(LAYER, dead @ spd(3, 0) @ dead, spd(5, 1))
    b = KroneckerFactored(LAYER, dead @ spd(3, 2) @ dead, spd(5, 3))
    for how in ("kl", "additive", "rank1"):
        found = a.add(b, how)
        assert found.outer.isfinite().all()
        assert not found.outer[2].any()


# --- M-FAC


def recursion(gradients: Tensor, damping: float) -> Callable[[Tensor], Tensor]:
    """Frantar et al.: v_i = F_(i-1)^-1 g_i by rank-1 updates."""
    m, found = len(gradients), []

    def apply(x: Tensor) -> Tensor:
        y = x / damping
        for g, v in found:
            y = y - v * (v @ x) / (m + g @ v)
        return y

    for g in gradients:
        found.append((g, apply(g)))
    return apply


def test_window_is_the_dense_solve_and_the_published_recursion() -> None:
    gradients, x, damping = draw(9, 15), draw(15, seed=1), 1e-3
    window = GradientWindow(4, 15, damping, gradients)
    for seen, g in enumerate(gradients, start=1):
        window.insert(g)
        rows = torch.zeros(4, 15).double()  # gradients that are not seen yet count as zeros
        last = gradients[max(0, seen - 4) : seen]
        rows[: len(last)] = last
        matrix = rows.T @ rows / 4 + damping * eye(15)
        torch.testing.assert_close(window.solve(x), torch.linalg.solve(matrix, x), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(window.solve(x), recursion(rows, damping)(x), rtol=1e-8, atol=1e-8)
    heavy = GradientWindow(4, 15, 1e12, gradients)
    heavy.insert(gradients[0])
    torch.testing.assert_close(heavy.solve(x) * 1e12, x, rtol=1e-9, atol=1e-9)


# --- the penalty on any form


class Holder(nn.Module):
    """Parameters of the given shapes, in float64."""

    def __init__(self, k: Curvature, seed: int) -> None:
        super().__init__()
        for i, (name, shape) in enumerate(k.shapes.items()):
            self.register_parameter(name, nn.Parameter(draw(*shape, seed=seed + i)))


@pytest.mark.parametrize("name", FORMS)
def test_penalty_value_gradient_and_analytic_gradient_agree(name: str) -> None:
    k, penalty = form(name), QuadraticPenalty(1.0)
    start, module = Holder(k, 0), Holder(k, 50)
    assert penalty(module) == 0
    assert penalty.gradient(module) == {}
    penalty.update(start, k)
    assert penalty(start) == 0
    change = k.vector(dict(module.named_parameters())).detach() - penalty.anchor
    torch.testing.assert_close(penalty(module).detach(), 0.5 * change @ dense(k) @ change)
    params = list(module.parameters())
    by_autograd = torch.autograd.grad(3.0 * penalty(module), params)
    params[0].grad = torch.ones_like(params[0])
    penalty.add_grad_(module, 3.0)
    torch.testing.assert_close(params[0].grad, by_autograd[0] + 1)
    for p, g in zip(params[1:], by_autograd[1:], strict=True):
        torch.testing.assert_close(p.grad, g)
    penalty.add_grad_(module, 0.0)
    torch.testing.assert_close(params[0].grad, by_autograd[0] + 1)


def test_penalty_moves_decays_and_forgets_its_decomposition() -> None:
    a, b, penalty = form("composite"), form("composite", 20), QuadraticPenalty(0.5, how="additive")
    start, module = Holder(a, 0), Holder(a, 50)
    penalty.update(start, a)
    penalty.proximal_(module, 1.5)
    moved = a.vector(dict(module.named_parameters())).detach()
    torch.testing.assert_close(moved, a.proximal(a.vector(dict(Holder(a, 50).named_parameters())), penalty.anchor, 1.5))
    penalty.update(module, b)
    torch.testing.assert_close(as_dense(penalty.curvature), as_dense(a.scale(0.5).add(b, "additive")))
    assert torch.equal(penalty.anchor, moved)
    assert penalty.float().curvature.parts[0].outer.dtype == torch.float32
    penalty.replace(start, b)
    assert torch.equal(as_dense(penalty.curvature), as_dense(b))
