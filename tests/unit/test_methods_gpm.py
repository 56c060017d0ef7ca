"""GPM and TRGP: projected gradients, what stands still, old outputs, trusted tasks and their scaled weights."""

import copy
from typing import Any

import pytest
import torch
from helpers import Linear, Net, assert_same, born, context, factory, image_stream, live, row_stream, sgd, state
from torch import Tensor, nn

from clrun.data.stream import Stream
from clrun.learning.context import Context
from clrun.learning.method import Method
from clrun.system.errors import ConfigError
from clrun.system.seeding import seed_all


def begun(name: str, learned: int, **options: Any) -> tuple[Any, Context]:
    """Return a method that has learned some tasks and begun the next one."""
    setting: Any = "til" if name == "trgp" else "cil"
    method, stream = born(factory(name, **options), image_stream(setting, augment=()))
    live(method, stream, until=learned) if learned else None
    seed_all(0, "task", learned)
    ctx = context(stream, learned)
    method.begin_task(stream.tasks[learned], ctx)
    return method, ctx


def lines(rank: int) -> Stream:
    """Return two tasks of rows in four dimensions; those of the first one are in `rank` of them."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(20, 4, generator=generator) * (torch.arange(4) < rank)
    second = torch.randn(20, 4, generator=generator)
    labels = torch.arange(20) % 2
    return row_stream([(first, labels), (second, labels + 2)], 4, "til")


def predictions(method: Method, x: Tensor, task: int) -> Tensor:
    method.eval()
    with torch.inference_mode():
        return method(x, task) if method.needs_task_id else method(x)


@pytest.mark.parametrize("name", ["gpm", "trgp"])
def test_what_is_protected_completely_is_not_forgotten(name: str) -> None:
    for method in (factory(name, eps=1.0, first="reach", samples=None)(Linear(), 4), factory("finetune")(Linear(), 4)):
        seed_all(0)
        stream = lines(2)
        live(method, stream, until=1)
        x = stream.tasks[0].train.images
        before = predictions(method, x, 0)[:, :2]
        weight = method.backbone.layer.weight.clone()
        live(method, stream, learned=1)
        after = predictions(method, x, 0)[:, :2]
        assert not torch.allclose(method.backbone.layer.weight, weight, atol=1e-3), "the second task is learned"
        assert torch.allclose(before, after, rtol=1e-5, atol=1e-5) == (type(method).__name__.lower() == name)


def test_changes_of_weights_are_orthogonal_to_the_protected_directions() -> None:
    method, ctx = begun("gpm", 1, eps=0.9)
    before = {name: layer.weight.detach().clone() for name, layer, _ in method.protected()}
    method.learn(ctx.task, ctx)
    for name, layer, space in method.protected():
        change = (layer.weight.detach() - before[name]).flatten(1).double()
        if name == "head":
            change = change[:2]
        assert 0 < space.dimension < space.width
        assert (change @ space.basis).abs().max() < 1e-6
        assert change.any() == (name != "head")


def test_biases_norms_and_statistics_stand_still_after_the_first_task() -> None:
    method, ctx = begun("gpm", 1)
    rest = {n: t.clone() for n, t in method.state_dict().items() if not n.endswith(("conv.weight", "linear.weight"))}
    rest = {n: t for n, t in rest.items() if not n.startswith("head.")}
    assert len(rest) >= 7
    method.learn(ctx.task, ctx)
    assert_same(rest, {n: t for n, t in method.state_dict().items() if n in rest})


def test_one_task_is_finetuning() -> None:
    ends = []
    for name in ("finetune", "gpm"):
        method, stream = born(factory(name), image_stream())
        live(method, stream, until=1)
        ends.append(method.state_dict())
    assert_same(dict(ends[0]), {name: ends[1][name] for name in ends[0]})


def test_old_rows_of_a_head_that_compete_are_projected() -> None:
    method, ctx = begun("gpm", 1, compete="seen", eps=0.9)
    space = method.spaces[method.names.index("head")]
    weight, bias = method.head.weight.detach().clone(), method.head.bias.detach().clone()
    method.learn(ctx.task, ctx)
    change = (method.head.weight.detach() - weight).double()
    assert change[:2].any() and (change[:2] @ space.basis).abs().max() < 1e-6
    assert (change[2:4] @ space.basis).abs().max() > 1e-3, "rows of new classes are free"
    assert torch.equal(method.head.bias[:2], bias[:2])


def test_protected_directions_only_grow_and_are_logged() -> None:
    method, stream = born(factory("gpm", eps=0.9, eps_step=0.03), image_stream())
    journal = live(method, stream)
    logged = [record for record in journal.logged if record.get("phase") == "input_space"]
    assert [record["share"] for record in logged] == pytest.approx([0.9, 0.93, 0.96])
    for name, _, space in method.protected():
        sizes = [record[f"protected.{name}"] for record in logged]
        assert sizes == sorted(sizes) and sizes[-1] == space.dimension
    assert method.share(100) == 1.0


def test_the_smaller_basis_is_the_same_method() -> None:
    ends = []
    for basis in ("keep", "dual"):
        method, stream = born(factory("gpm", basis=basis, eps=0.99), image_stream())
        live(method, stream, until=2)
        ends.append(method)
    assert any(space.complement for space in ends[1].spaces)
    for (name, layer, _), (_, other, _) in zip(*(method.protected() for method in ends), strict=True):
        torch.testing.assert_close(layer.weight, other.weight, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", ["gpm", "trgp"])
def test_steps_that_leave_the_gradient_are_refused(name: str) -> None:
    method = factory(name)(Net(), 6)
    with pytest.raises(ConfigError, match=rf"^budget.optimizer.weight_decay=0.1: method={name} needs 0"):
        method.check_budget(sgd(weight_decay=0.1))
    with pytest.raises(ConfigError, match=rf"^backbone: {name.title()} needs linear or .* layers, Plain has none"):
        factory(name)(Plain(), 6)


class Plain(nn.Identity):
    """A network without layers."""

    num_features = 4


# --- trgp


def test_without_trusted_tasks_trgp_is_gpm() -> None:
    ends = []
    for name, options in (("gpm", {}), ("trgp", {"most": 0}), ("trgp", {"threshold": 1.0})):
        method, stream = born(factory(name, **options), image_stream("til"))
        live(method, stream)
        ends.append(method.state_dict())
    for other in ends[1:]:
        assert_same(dict(ends[0]), {name: other[name] for name in ends[0]})


def test_the_most_similar_tasks_are_trusted() -> None:
    method, ctx = begun("trgp", 2, threshold=0.0, most=1, probe=32)
    batch = next(ctx.task.train.batches(100))
    twin = copy.deepcopy(method)
    twin.trust[2] = nn.ModuleList(type(twin.trust[2][0])([], []) for _ in twin.trust[2])
    twin.eval()
    twin.zero_grad()
    twin.loss(batch, ctx).backward()
    for (name, layer), trust in zip(twin._layers().items(), method.trust[2], strict=True):
        flat = layer.weight.grad.flatten(1)
        ratios = [float((flat @ b @ b.t()).norm() / flat.norm()) for b in (d.of(name) for d in twin.directions)]
        assert trust.tasks == [max(range(2), key=lambda j, ratios=ratios: ratios[j])]
        assert torch.equal(trust.scales[0], torch.eye(len(trust.scales[0])))
    strict, _ = begun("trgp", 2, threshold=1.0)
    assert not any(trust.tasks for trust in strict.trust[2])


def test_identity_matrices_leave_the_weights_and_others_scale_within_the_directions() -> None:
    method, _ = begun("trgp", 1, threshold=0.0)
    name, layer = "backbone.linear", method.backbone.linear
    found = method.weights(1)["linear.weight"]
    torch.testing.assert_close(found, layer.weight)
    basis = method.directions[0].of(name)
    torch.testing.assert_close(basis.t() @ basis, torch.eye(basis.shape[1]), rtol=1e-5, atol=1e-5)
    trust = method.trust[1][1]
    with torch.no_grad():
        trust.scales[0].mul_(3)
    changed = method.weights(1)["linear.weight"]
    torch.testing.assert_close(changed @ basis, 3 * layer.weight @ basis, rtol=1e-4, atol=1e-5)
    rest = torch.eye(54) - basis @ basis.t()
    torch.testing.assert_close(changed @ rest, layer.weight @ rest, rtol=1e-4, atol=1e-5)


def test_a_task_trains_its_own_matrices_and_old_ones_stand_still() -> None:
    method, ctx = begun("trgp", 2, threshold=0.0)
    old = {n: p.detach().clone() for n, p in method.trust[1].named_parameters()}
    assert old and any(trust.tasks for trust in method.trust[2])
    method.learn(ctx.task, ctx)
    assert_same(old, {n: p.detach() for n, p in method.trust[1].named_parameters()})
    moved = [not torch.equal(p, torch.eye(len(p))) for p in method.trust[2].parameters()]
    assert all(moved)
    before = state(method)
    x = next(ctx.task.test.batches(8)).x
    assert torch.equal(predictions(method, x, 1), predictions(method, x, 1))
    assert_same(before, state(method))


def test_old_tasks_keep_their_logits_when_all_their_inputs_are_protected() -> None:
    method = factory("trgp", eps=1.0, first="reach", samples=None, threshold=0.0, most=1)(Linear(), 4)
    stream = lines(2)
    live(method, stream)
    assert method.trust[1][0].tasks == [0], "the second task scales the weights of the first"
    basis = method.directions[0].of("backbone.layer")
    assert basis.shape == (4, 2) and basis[2:].abs().max() < 1e-6
