"""K-FAC, FOOF and M-FAC as budgets, and anything else that torch or timm has."""

import json
import math
from functools import partial
from typing import Any

import pytest
import torch
from helpers import born, configured, context, factory, image_stream, live, row_stream, sgd, tiny_vit
from running import run
from torch import Tensor, nn

from clrun.blocks.curvature import Composite, estimate
from clrun.blocks.optimizers import Foof, Kfac, MFac, needs_sgd
from clrun.blocks.params import flatten
from clrun.data.split import Batch
from clrun.learning.budget import Budget
from clrun.learning.context import Context
from clrun.learning.method import Method
from clrun.learning.training import fit
from clrun.running.checkpoint_file import read
from clrun.system.errors import ConfigError

KFAC: dict[str, Any] = {
    "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "damping": 1e-3, "average": 0.95, "sharing": "expand",
    "largest": 1024, "statistics_every": 1, "invert_every": 1, "kl_clip": None,
}  # fmt: skip
FOOF: dict[str, Any] = {
    "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "damping": 1e-3, "average": 0.95, "largest": 1024,
    "statistics_every": 1, "invert_every": 1,
}  # fmt: skip
MFAC: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.0, "damping": 1e-3, "gradients": 4}
ALL = [(Kfac, KFAC), (Foof, FOOF), (MFac, MFAC)]


class Linear(nn.Module):
    """A backbone whose features are the logits: one linear layer, and a scale that is not one."""

    def __init__(self, inside: int, classes: int, *, scale: bool) -> None:
        super().__init__()
        self.num_features = classes
        self.layer = nn.Linear(inside, classes)
        self.scale = nn.Parameter(torch.ones(classes)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if self.scale is None else self.scale * self.layer(x)


class Squares(Method):
    """Squared loss to targets that depend on the row."""

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        return 0.5 * (self(batch.x) - targets(batch.x)).square().sum(dim=1).mean()


def targets(x: Tensor) -> Tensor:
    return torch.stack([x.square().sum(dim=1), x[:, 0] - 2, x[:, 1] * x[:, 2]], dim=1)


def linear(cls: type[Method] = Method, *, scale: bool = False, rows: int = 24) -> tuple[Method, Context]:
    """A learner of one layer in float64, and the context of its only task."""
    torch.manual_seed(0)
    x = torch.randn(rows, 4, dtype=torch.float64)
    stream = row_stream([(x, torch.arange(rows) % 3)], 3)
    method = cls(Linear(4, 3, scale=scale), 3).double()
    method.head = nn.Identity()
    return method, context(stream)


def stepped(method: Method, ctx: Context, optimizer: Any, options: dict[str, Any], *, steps: int = 1) -> Method:
    """The learner after full-batch steps."""
    fit(method, ctx.task.train, ctx, budget=Budget(partial(optimizer, **options), steps=steps, batch_size=24))
    return method


def weights(method: nn.Module) -> Tensor:
    return flatten({name: p.detach() for name, p in method.named_parameters()})


# --- FOOF


def test_foof_reaches_least_squares_in_one_step() -> None:
    method, ctx = linear(Squares)
    stepped(method, ctx, Foof, FOOF | {"damping": 1e-12})
    x = next(ctx.task.train.batches(24)).x
    design = torch.cat([x, torch.ones(24, 1)], dim=1)
    solution = torch.linalg.lstsq(design, targets(x)).solution
    found = torch.cat([method.backbone.layer.weight, method.backbone.layer.bias[:, None]], dim=1)
    torch.testing.assert_close(found.detach(), solution.T, rtol=1e-8, atol=1e-8)


def test_foof_without_layers_is_sgd_and_with_white_inputs_too() -> None:
    plain = stepped(*linear(scale=True), torch.optim.SGD, {"lr": 0.5, "momentum": 0.9}, steps=3)
    foof = stepped(*linear(scale=True), Foof, FOOF | {"largest": 1, "damping": 1.0, "momentum": 0.9}, steps=3)
    torch.testing.assert_close(weights(foof), weights(plain))
    rows = torch.linalg.qr(torch.randn(24, 5, dtype=torch.float64))[0] * 24**0.5
    found = []
    for optimizer, options in ((torch.optim.SGD, {"lr": 0.5}), (Foof, FOOF | {"damping": 1.0})):
        method, ctx = linear()
        method.backbone.layer = nn.Linear(5, 3, bias=False).double()
        nn.init.ones_(method.backbone.layer.weight)
        split = row_stream([(rows, torch.arange(24) % 3)], 3).tasks[0].train
        fit(method, split, ctx, budget=Budget(partial(optimizer, **options), steps=1, batch_size=24))
        found.append(weights(method))
    torch.testing.assert_close(*found)


# --- K-FAC


def test_kfac_step_is_the_damped_natural_gradient_of_the_drawn_factors() -> None:
    method, ctx = linear(scale=True)
    batch = next(ctx.task.train.batches(24))
    start = weights(method)
    loss = method.loss(batch, ctx)
    grads = dict(
        zip(dict(method.named_parameters()), torch.autograd.grad(loss, list(method.parameters())), strict=True)
    )
    optimizer = Kfac(list(method.parameters()), **KFAC | {"weight_decay": 0.1})
    method.train()
    with optimizer.watch(method, ctx):
        method.loss(batch, ctx).backward()
        optimizer.step()
    curvature = optimizer.curvature
    assert isinstance(curvature, Composite)
    assert [list(part.shapes) for part in curvature.parts] == [
        ["backbone.layer.weight", "backbone.layer.bias"],
        ["backbone.scale"],
    ]
    named = {name: g + 0.1 * p for (name, g), p in zip(grads.items(), linear(scale=True)[0].parameters(), strict=True)}
    step = curvature.params(curvature.inverse(1e-3, "factored").mv(curvature.vector(named)))
    torch.testing.assert_close(start - weights(method), flatten({name: step[name] for name in grads}).detach())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in method.modules())


def test_kfac_factors_converge_to_the_fisher_of_the_model() -> None:
    method, ctx = linear(scale=True)
    optimizer = Kfac(list(method.parameters()), **KFAC | {"lr": 0.0, "average": 0.995})
    batch = next(ctx.task.train.batches(24))
    method.train()
    with optimizer.watch(method, ctx):
        for _ in range(2000):
            method.loss(batch, ctx)
            for p in method.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
    exact = estimate("kfac_expand", method, ctx.task.train, ctx, of=method, labels="exact", samples=None)
    for ours, theirs in zip(optimizer.curvature.parts, exact.parts, strict=True):
        torch.testing.assert_close(ours.diag(), theirs.diag(), rtol=0.2, atol=0)


def test_kfac_bounds_the_change_and_follows_the_gradient_far_from_it() -> None:
    method, ctx = linear()
    start = weights(method)
    stepped(method, ctx, Kfac, KFAC | {"kl_clip": 1e-4})
    free = weights(stepped(*linear(), Kfac, KFAC)) - start
    bound = weights(method) - start
    ratio = bound / free
    torch.testing.assert_close(ratio, ratio[0].expand_as(ratio))
    assert 0 < ratio[0] < 0.5
    damped = weights(stepped(*linear(), Kfac, KFAC | {"lr": 1e6, "damping": 1e8})) - start
    sgd_step = weights(stepped(*linear(), torch.optim.SGD, {"lr": 1e-2})) - start
    torch.testing.assert_close(damped, sgd_step, rtol=1e-2, atol=1e-6)


def test_kfac_needs_the_prediction_of_the_method() -> None:
    class Bypassing(Method):
        def loss(self, batch: Batch, ctx: Context) -> Tensor:
            return self.backbone(batch.x).square().mean()

    with pytest.raises(ConfigError, match="use budget=foof or budget=m_fac"):
        stepped(*linear(Bypassing), Kfac, KFAC)


# --- M-FAC


def test_m_fac_step_is_the_damped_inverse_of_the_last_gradients() -> None:
    method, ctx = linear()
    seen: list[Tensor] = []
    taken: list[Tensor] = []
    window = torch.zeros(4, 15, dtype=torch.float64)
    optimizer = MFac(list(method.parameters()), **MFAC | {"weight_decay": 0.3})
    for step, batch in enumerate(ctx.task.train.batches(4)):
        optimizer.zero_grad()
        method.loss(batch, ctx).backward()
        before = weights(method)
        g = flatten({n: p.grad for n, p in method.named_parameters()}) + 0.3 * before
        optimizer.step()
        window[step % 4] = g
        expected = torch.linalg.solve(window.T @ window / 4 + 1e-3 * torch.eye(15, dtype=torch.float64), g)
        seen.append(before - weights(method))
        taken.append(1e-2 * expected)
    torch.testing.assert_close(torch.stack(seen), torch.stack(taken))


# --- all of them in fits


@pytest.mark.parametrize(("optimizer", "options"), ALL, ids=["kfac", "foof", "m_fac"])
@pytest.mark.parametrize("vit", [False, True], ids=["cnn", "vit"])
def test_learns_and_leaves_no_trace(optimizer: Any, options: dict[str, Any], vit: bool) -> None:
    slow = options | {"lr": {Kfac: 1e-3, Foof: 3e-2, MFac: 1e-2}[optimizer]}
    budget = Budget(partial(optimizer, **slow), epochs=10, batch_size=10)
    ends = []
    for _ in range(2):
        stream = image_stream("til", augment=())
        torch.manual_seed(0)
        method = factory("finetune")(tiny_vit(depth=1), 6) if vit else born(factory("finetune"), stream)[0]
        before = [p.detach().clone() for p in method.parameters()]
        live(method, stream, budget=budget, until=1)
        assert sum(not torch.equal(a, b) for a, b in zip(before, method.parameters(), strict=True)) > len(before) / 2
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in method.modules())
        assert all(p.grad is None for p in method.parameters())
        method.eval()
        with torch.no_grad():
            loss = method.loss(next(stream.tasks[0].train.batches(100)), context(stream)).item()
        ends.append((loss, weights(method)))
    assert torch.equal(ends[0][1], ends[1][1]), "the same training twice gives the same weights"
    assert ends[0][0] < 0.6  # log 2 is chance


@pytest.mark.parametrize("budget", ["kfac", "foof", "m_fac"])
def test_budgets_learn_a_task(budget: str, tmp_path: Any) -> None:
    """The defaults of the YAML file suit the default data: one task of two classes is learned well above chance."""
    accuracy = run(tmp_path / "run", f"budget={budget}", "method=finetune", "job.max_tasks=1")
    assert accuracy > 0.9
    [cost] = json.loads((tmp_path / "run" / "run.json").read_text())["cost"]["tasks"]
    assert cost["steps"] == 3 * math.ceil(cost["images"] / 32)


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["kfac", "foof", "m_fac"])
def test_two_processes_take_the_same_steps(budget: str, tmp_path: Any) -> None:
    from safetensors.torch import load_file

    options = (f"budget={budget}", "method=finetune", "hardware=cpu", "job.max_tasks=2", "budget.epochs=1")
    options += ("budget.batch_size=50", "job.save_model=true", "job.keep_checkpoint=true")
    if budget == "m_fac":  # with the default damping rounding grows from step to step
        options += ("budget.optimizer.damping=0.01",)
    one, two = (run(tmp_path / str(n), *options, f"hardware.processes={n}") for n in (1, 2))
    a, b = (load_file(tmp_path / str(n) / "model.safetensors") for n in (1, 2))
    if budget == "kfac":  # each process draws its own labels, so that only the processes can be compared
        first, second = (read(tmp_path / "2" / "checkpoint.pt", rank=rank)[1] for rank in (0, 1))
        assert first and first == second, "processes average gradients and factors, hence hold the same weights"
        return
    assert abs(one - two) < 0.01  # processes add up gradients in another order, so single images may change
    for name in a:
        torch.testing.assert_close(b[name].float(), a[name].float(), rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    "target",
    ["torch.optim.Adagrad", "torch.optim.NAdam", "timm.optim.Lamb", "timm.optim.Adan"],
)
def test_any_optimizer_of_torch_or_timm_by_its_target(target: str, tmp_path: Any) -> None:
    options = ("method=finetune", "job.max_tasks=1", "job.max_steps=3", f"budget.optimizer._target_={target}")
    unknown = [f"~budget.optimizer.{key}" for key in ("momentum", "dampening", "nesterov")]
    run(tmp_path / "run", *options, *unknown, "budget.optimizer.lr=0.001", "job.keep_checkpoint=true")
    run(tmp_path / "slow", *options, *unknown, "budget.optimizer.lr=1e-30", "job.keep_checkpoint=true")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 3 and json.loads(lines[-1])["lr"] == 0.001
    moved, still = (read(tmp_path / name / "checkpoint.pt")[1] for name in ("run", "slow"))
    assert moved != still, "its learning rate decides how far weights move"


def test_needs_sgd() -> None:
    needs_sgd(sgd().optimizer, "method=x", momentum=0.9, weight_decay=0)
    needs_sgd(partial(torch.optim.SGD, lr=0.1), "method=x", momentum=0)
    with pytest.raises(ConfigError, match=r"^budget.optimizer.momentum=0.9: method=x needs 0$"):
        needs_sgd(sgd().optimizer, "method=x", momentum=0)
    with pytest.raises(ConfigError, match=r"method=x: needs budget.optimizer=torch.optim.SGD, not MFac"):
        needs_sgd(configured("budget", "m_fac").optimizer, "method=x")
