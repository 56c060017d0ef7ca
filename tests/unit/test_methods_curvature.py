"""L2, EWC with Kronecker factors and NCL: exact cases, limits, memory, and lives on several networks."""

from functools import partial
from typing import Any

import pytest
import torch
from helpers import born, context, factory, image_stream, live, sgd, tiny_vit
from matrices import Dense, as_dense
from torch import Tensor, nn

from clrun.blocks.curvature import Diagonal, KroneckerFactored, QuadraticPenalty, isotropic
from clrun.blocks.params import flatten, shapes_of, unflatten
from clrun.learning.budget import Budget
from clrun.learning.method import Method
from clrun.running.accounting import state_bytes
from clrun.system.errors import ConfigError

PENALTIES = ("l2", "ewc", "kfac_ewc")
STRONG: dict[str, dict[str, Any]] = {
    "l2": {"strength": 10.0},
    "ewc": {"strength": 1e6, "solver": "proximal"},
    "kfac_ewc": {"strength": 1e4, "solver": "proximal"},
    "ncl": {"prior_rows": 1e9, "damping": 0.0},
}


def backbone(method: Method) -> Tensor:
    return flatten({name: p.detach() for name, p in method.backbone.named_parameters()})


def ended(name: str, *, budget: Budget | None = None, until: int | None = None, **options: Any) -> Method:
    method, stream = born(factory(name, **options), image_stream())
    live(method, stream, budget=budget, until=until)
    return method


# --- exact Bayesian updates, in float64


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Weights(nn.Module):
    """W [out, in] of a linear model, in float64."""

    def __init__(self, out: int, inside: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(out, inside, dtype=torch.float64))


def learn(module: Weights, x: Tensor, y: Tensor, penalty: QuadraticPenalty) -> None:
    """Move the weights to where the gradient of the squared loss and the penalty is 0."""
    n, k = len(x), as_dense(penalty.curvature)
    hessian = torch.kron(torch.eye(len(module.w)).double(), x.T @ x / n)
    with torch.no_grad():
        solution = torch.linalg.solve(hessian + k, (y.T @ x / n).flatten() + k @ penalty.anchor)
        module.w.copy_(solution.view_as(module.w))
    loss = 0.5 * (y - x @ module.w.T).square().sum(1).mean() + penalty(module)
    (gradient,) = torch.autograd.grad(loss, module.w)
    assert gradient.abs().max() < 1e-11


@pytest.mark.parametrize("how", ["dense", "kl", "additive", "list"])
def test_sequential_learning_of_a_linear_gaussian_model_is_joint_learning(how: str) -> None:
    # Unit noise: G = I is shared by all tasks, so that products add exactly with kl and list, whatever the inputs.
    # strength N_k / N is Bayes exact; all tasks have as many rows here.
    module = Weights(2, 4)
    scales = torch.tensor([3, 1, 0.5, 0.1]).double()
    tasks = [(draw(6, 4, seed=i) * scales, draw(6, 2, seed=i + 9)) for i in range(3)]
    penalty = QuadraticPenalty(1.0, how="kl" if how == "dense" else how)
    penalty.replace(module, form(how, 1e-2 * torch.eye(4).double()))
    for x, y in tasks:
        learn(module, x, y, penalty)
        penalty.update(module, form(how, x.T @ x / 6))
    x, y = (torch.cat(parts) for parts in zip(*tasks, strict=True))
    joint = torch.linalg.solve(x.T @ x / 6 + 1e-2 * torch.eye(4).double(), x.T @ y / 6).T
    difference = float((module.w.detach() - joint).norm() / joint.norm())
    assert difference > 1e-2 if how == "additive" else difference < 1e-10


def form(how: str, inner: Tensor) -> Dense | KroneckerFactored:
    shapes, eye = {"w": (2, 4)}, torch.eye(2).double()
    return Dense(shapes, torch.kron(eye, inner)) if how == "dense" else KroneckerFactored(shapes, eye, inner)


def test_diagonal_factors_are_ewc_of_rank_one() -> None:
    k = KroneckerFactored({"w": (2, 4)}, draw(2, seed=0).square().diag(), draw(4, seed=1).square().diag())
    ewc = Diagonal(k.shapes, torch.outer(k.outer.diagonal(), k.inner.diagonal()).flatten())
    v = draw(8, seed=2)
    torch.testing.assert_close(k.mv(v), ewc.mv(v))
    torch.testing.assert_close(k.proximal(v, 0 * v, 3.0), ewc.proximal(v, 0 * v, 3.0))


# --- penalties


def test_l2_is_ewc_with_importance_one() -> None:
    for solver in ("grad", "proximal"):
        method, stream = born(factory("l2", strength=2.0, solver=solver), image_stream())
        twin, _ = born(factory("ewc", strength=2.0, solver=solver), image_stream())
        twin.curvature = lambda task, ctx, twin=twin: Diagonal.of(  # type: ignore[method-assign]
            {n: torch.full_like(p, float(not task.index)) for n, p in twin.backbone.named_parameters()}
        )
        for learner in (method, twin):
            live(learner, stream)
        torch.testing.assert_close(backbone(method), backbone(twin), rtol=1e-5, atol=1e-6)


def test_l2_pulls_to_the_task_before() -> None:
    method, stream = born(factory("l2", strength=2.0), image_stream("til"))
    live(method, stream, until=1)
    ctx = context(stream, 1)
    method.begin_task(stream.tasks[1], ctx)
    method.eval()
    batch = next(stream.tasks[1].train.batches(4))
    near = method.loss(batch, ctx)
    method.strength = 0.0
    assert near == method.loss(batch, ctx), "nothing moved yet"
    with torch.no_grad():
        method.backbone.linear.bias += 0.5
    far = method.loss(batch, ctx)
    method.strength = 2.0
    torch.testing.assert_close(method.loss(batch, ctx), far + 12 * 0.25)
    live(method, stream, learned=2)
    assert torch.equal(method.penalty.anchor, backbone(method))
    assert method.penalty.curvature.strength == 1


@pytest.mark.parametrize("name", PENALTIES)
def test_proximal_freezes_where_the_gradient_form_diverges(name: str) -> None:
    options = {} if name == "l2" else {"labels": "exact"}
    prior = {"prior": 1.0} if name == "kfac_ewc" else {}
    method, stream = born(factory(name, strength=1e12, solver="proximal", **options, **prior), image_stream())
    live(method, stream, until=1)
    anchor = backbone(method)
    held = flatten(method.penalty.curvature.params(method.penalty.importance)) > 1e-9
    names = list(method.penalty.shapes)
    before = method.penalty.anchor.clone()
    live(method, stream, learned=1, until=2)
    after = method.penalty.anchor
    assert len(names) == len(list(method.backbone.parameters()))
    assert held.float().mean() > 0.5
    if name != "kfac_ewc":  # with factors the directions are held, not the weights
        torch.testing.assert_close(after[held], before[held], rtol=1e-3, atol=1e-3)
    else:
        assert (after - before).norm() < 1e-3 * before.norm()
    assert not torch.equal(anchor, backbone(method)) or name == "l2"
    exploded, stream = born(factory(name, strength=1e12, solver="grad", **options), image_stream())
    with pytest.raises(ArithmeticError):
        live(exploded, stream)


@pytest.mark.parametrize("name", [*PENALTIES, "ncl"])
def test_first_task_is_finetuning_and_the_second_moves_less_where_it_matters(name: str) -> None:
    strong = STRONG[name]
    first, plain = ended(name, until=1, **strong), ended("finetune", until=1)
    torch.testing.assert_close(backbone(first), backbone(plain), rtol=1e-4, atol=1e-5)
    curvature = (first.prior if name == "ncl" else first.penalty).curvature
    drift = []
    for learner in (ended(name, until=2, **strong), ended("finetune", until=2)):
        change = backbone(learner) - backbone(plain)
        named = unflatten(change, shapes_of(dict(plain.backbone.named_parameters())))
        drift.append(float(curvature.quad(curvature.vector(named))))
    assert drift[0] < 0.3 * drift[1]


@pytest.mark.parametrize("name", [*PENALTIES, "ncl"])
def test_proximal_and_ncl_refuse_other_optimizers(name: str) -> None:
    options = {} if name == "ncl" else {"solver": "proximal"}
    method, _ = born(factory(name, **options), image_stream())
    with pytest.raises(
        ConfigError, match=r"method.*: needs budget.optimizer=torch.optim.SGD, not Adam; use budget=sgd"
    ):
        method.check_budget(Budget(partial(torch.optim.Adam, lr=1e-3), epochs=1))
    method.check_budget(sgd())
    if name == "ncl":
        with pytest.raises(ConfigError, match=r"budget.optimizer.weight_decay=0.1: method=ncl needs 0"):
            method.check_budget(sgd(weight_decay=0.1))


def test_kfac_ewc_refuses_a_list_of_products_with_proximal_steps() -> None:
    with pytest.raises(ConfigError, match=r"method.add=list: .*add=kl or solver=grad"):
        born(factory("kfac_ewc", add="list", solver="proximal"), image_stream())


@pytest.mark.parametrize("add", ["kl", "additive", "rank1", "list"])
def test_kfac_ewc_adds_tasks_as_told(add: str) -> None:
    options = {"add": add, "solver": "grad", "strength": 0.0}
    first, both = (ended("kfac_ewc", decay=0.5, until=n, **options).penalty.curvature for n in (1, 2))
    alone = ended("kfac_ewc", decay=0.0, until=2, **options | {"add": "kl"}).penalty.curvature
    torch.testing.assert_close(both.diag(), first.scale(0.5).add(alone, add).diag())
    if add == "list":
        torch.testing.assert_close(both.diag(), 0.5 * first.diag() + alone.diag())


def test_kfac_ewc_prior_joins_after_the_first_task() -> None:
    plain, prior = (ended("kfac_ewc", until=1, labels="exact", prior=p) for p in (0.0, 2.0))
    assert torch.equal(backbone(plain), backbone(prior))
    a, b = plain.penalty.curvature, prior.penalty.curvature
    expected = isotropic(a, 2.0).add(a)
    torch.testing.assert_close(b.diag(), expected.diag())


# --- NCL


def ncl(**options: Any) -> tuple[Any, Any]:
    """An NCL learner in the middle of its first task, with gradients, and what they were."""
    method, stream = born(factory("ncl", **options), image_stream())
    method.begin_task(stream.tasks[0], context(stream))
    torch.manual_seed(1)
    for p in method.parameters():
        p.grad = torch.randn_like(p)
    return method, {name: p.grad.clone() for name, p in method.named_parameters()}


@pytest.mark.parametrize("precision", [1e-3, 4.0])
def test_ncl_with_an_isotropic_prior_is_sgd_with_a_pull(precision: float) -> None:
    method, before = ncl(strength=0.7, prior_rows=50.0, damping=0.0)
    method.prior.replace(method.backbone, isotropic(method.prior.curvature, precision))
    method.prior.anchor = method.prior.anchor + 0.1
    method.covariance = method.prior.curvature.inverse(0.0, "factored")
    method.adjust_gradients(None)
    for name, p in method.named_parameters():
        own = before[name]
        if name.startswith("backbone"):
            own = own / (precision * 50) + 0.7 * -0.1 / 50
        torch.testing.assert_close(p.grad, own, rtol=1e-4, atol=1e-5)


def test_ncl_first_task_is_sgd_with_weight_decay_and_a_weak_prior_leaves_sgd() -> None:
    for rows, mean in ((20.0, "zero"), (20.0, "initial"), (1e12, "zero")):
        method, before = ncl(prior_rows=rows, prior_mean=mean, damping=0.0)
        method.adjust_gradients(None)
        for name, p in method.named_parameters():
            decay = p.detach() / rows if name.startswith("backbone") and mean == "zero" else 0.0
            torch.testing.assert_close(p.grad, before[name] + decay, rtol=1e-5, atol=1e-5)


def test_ncl_moves_by_the_inverse_of_the_precision() -> None:
    method, before = ncl(strength=0.0, damping=0.0, prior_rows=1.0)
    k = KroneckerFactored({"linear.weight": (12, 54)}, torch.eye(12), torch.diag(torch.logspace(-2, 2, 54)))
    method.covariance = k.inverse(0.0, "factored")
    method.adjust_gradients(None)
    ratio = method.backbone.linear.weight.grad / before["backbone.linear.weight"]
    torch.testing.assert_close(ratio, (1 / torch.logspace(-2, 2, 54)).expand(12, 54), rtol=1e-4, atol=0)


def test_ncl_of_a_linear_gaussian_model_converges_to_the_map() -> None:
    method, stream = born(factory("ncl", prior_rows=10.0, damping=0.0), image_stream())
    method.backbone = Weights(2, 4)
    w, (x, y) = method.backbone.w, (draw(6, 4, seed=0), draw(6, 2, seed=1))
    solution = {}
    for name, inner in (("plain", torch.eye(4)), ("skewed", torch.diag(torch.tensor([0.3, 1, 1, 30])))):
        with torch.no_grad():
            w.zero_()
        method.prior.replace(method.backbone, KroneckerFactored({"w": (2, 4)}, torch.eye(2).double(), inner.double()))
        method.prior.anchor = method.prior.anchor + 0.3
        method.covariance = method.prior.curvature.inverse(0.0, "factored")
        pull = inner.double() @ torch.full((4, 2), 0.3, dtype=torch.float64)
        solution[name] = torch.linalg.solve(x.T @ x / 6 + inner, x.T @ y / 6 + pull).T
        for _ in range(2000):
            (w.grad,) = torch.autograd.grad(0.5 * (y - x @ w.T).square().sum(1).mean(), w)
            method.adjust_gradients(None)
            with torch.no_grad():
                w -= 0.2 * w.grad
        torch.testing.assert_close(w.detach(), solution[name], rtol=0, atol=1e-9)


# --- memory and networks


def test_state_is_what_the_cards_say() -> None:
    linear, conv, norm = (12, 55), (6, 10), 12
    size = sum(a * b for a, b in (linear, conv)) + norm
    factors = sum(side * side for side in (*linear, *conv)) + norm
    expected = {"l2": size, "ewc": 2 * size, "kfac_ewc": size + factors, "ncl": size + factors}
    for name, numbers in expected.items():
        method, stream = born(factory(name), image_stream())
        found: list[int] = []
        key = "prior" if name == "ncl" else "penalty"
        live(method, stream, after=lambda task, m, life, k=key, f=found: f.append(state_bytes(m)[k]))
        assert found == [4 * numbers] * 3
    method = ended("kfac_ewc", add="list", solver="grad")
    assert state_bytes(method)["penalty"] == 4 * (size + 3 * (factors - norm) + norm)


@pytest.mark.parametrize("name", [*PENALTIES, "ncl"])
@pytest.mark.parametrize("setting", ["cil", "til"])
def test_lives_on_a_transformer(name: str, setting: Any) -> None:
    stream = image_stream(setting)
    method = factory(name)(tiny_vit(depth=1), stream.num_classes)
    journal = live(method, stream, budget=sgd(lr=0.01))
    assert len(journal.recorded) == 12
    assert all(p.isfinite().all() for p in method.parameters())


@pytest.mark.parametrize("name", [*PENALTIES, "ncl"])
def test_a_frozen_backbone_is_left_alone(name: str) -> None:
    ends = []
    for learner in ("finetune", name):
        method, stream = born(factory(learner), image_stream())
        for p in method.backbone.parameters():
            p.requires_grad_(False)
        live(method, stream)
        ends.append(torch.cat([method.head.weight.flatten(), backbone(method)]).detach())
    assert torch.equal(*ends)
