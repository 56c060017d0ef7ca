"""CL-LoRA: frozen orthonormal maps, reassigned gradients, early-exit distillation, prototypes per task."""

import copy
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Net, answers, assert_same, born, context, factory, image_stream, live, rows, sgd, state, trace
from torch import Tensor, nn

from clrun.blocks.lora import QkvLoRA
from clrun.data.stream import Stream
from clrun.methods.cl_lora import Specific, Weighted, distillation, importances, overlap, rescaled
from clrun.running.accounting import parameter_counts
from clrun.system.errors import ConfigError

D, C, T, R = 32, 6, 3, 8


def cl_lora(setting: Any = "cil", order: Any = (0, 1, 2), **options: Any) -> tuple[Any, Stream]:
    return born(factory("cl_lora", **({"cosine_scale": 10.0} | options)), image_stream(setting, order))


def budget(**options: Any) -> Any:
    return sgd(**({"epochs": 1, "weight_decay": 0.01} | options))


@cache
def _lived() -> tuple[Any, Stream, list[Any]]:
    method, stream = cl_lora()
    found = trace(lambda m: state(m), method, stream, budget=budget())
    return method, stream, found


def lived() -> tuple[Any, Stream]:
    method, stream, _ = _lived()
    return copy.deepcopy(method), stream


def test_shared_maps_and_what_belongs_to_old_tasks_stand_still() -> None:
    method, stream = lived()
    found = _lived()[2]
    for place, before in enumerate(found):
        old = [name for name in before if name.startswith(tuple(f"tasks.{k}." for k in range(place + 1)))]
        fixed = [name for name in before if name.endswith("down") and name.startswith("shared")]
        for later in found[place + 1 :]:
            still = [*old, *fixed, *(name for name in before if name.startswith("backbone"))]
            assert_same({name: before[name] for name in still}, {name: later[name] for name in still})
    ups = [name for name in found[0] if name.endswith("up") and name.startswith("shared")]
    assert ups and not any(torch.equal(found[0][name], found[2][name]) for name in ups), "shared in all tasks"
    x, before = rows(stream), state(method)
    assert torch.equal(answers(method, x), answers(method, x))
    assert_same(before, state(method))


@pytest.mark.parametrize(("random", "low", "high"), [("gaussian", 0.0, 0.6), ("uniform", 0.7, 1.0)])
def test_maps_down_are_orthonormal(random: str, low: float, high: float) -> None:
    method, _ = cl_lora(random=random)
    for lora in method.shared.values():
        assert not lora.down.requires_grad and not lora.up.any()
        for part in lora.down:
            torch.testing.assert_close(part @ part.t(), torch.eye(R), rtol=0, atol=1e-6)
    first = next(iter(method.shared.values())).down[0, 0]
    assert low <= float(first.sum().abs()) / D**0.5 <= high, "a uniform matrix has a first row that is nearly constant"


def test_untrained_lora_is_simplecil() -> None:
    method, stream = cl_lora()
    live(method, stream, budget=sgd(epochs=0))
    x = rows(stream)
    with torch.inference_mode():
        assert all(torch.equal(method.inside(place, x), method.query(x)) for place in range(T))
        train = [batch for task in stream.tasks for batch in task.train.batches(100)]
        plain, y = torch.cat([method.query(b.x) for b in train]), torch.cat([b.y for b in train])
        means = torch.stack([plain[y == label].mean(dim=0) for label in range(C)])
        expected = F.cosine_similarity(method.query(x)[:, None], means[None], dim=2)
    torch.testing.assert_close(answers(method, x), expected, rtol=1e-5, atol=1e-5)


def test_golden_importances_distillation_and_overlap() -> None:
    up = torch.tensor([[[3.0, 4.0], [0.0, 5.0], [6.0, 8.0]]])
    assert importances(up)[0, :, 0].tolist() == pytest.approx([0.75, 0.75, 1.5])
    assert importances(torch.zeros(1, 3, 2)).tolist() == [[[1.0]] * 3]
    z, target = torch.tensor([[2.0, 0, 0, 9]]), torch.tensor([[1.0, 1, 0, -9]])
    classes = torch.tensor([[True, True, True, False]])
    assert float(distillation(z, target, classes, 2.0)) == pytest.approx(1.1677930, abs=1e-6)
    assert float(overlap(torch.tensor([1.0, 1, 0]), torch.tensor([[1.0, 0, 1]]))) == pytest.approx(0.5)


def test_a_reassigned_parameter_has_its_value_and_a_scaled_gradient() -> None:
    source = torch.Generator().manual_seed(0)
    up = torch.randn(2, D, R, generator=source).requires_grad_()
    factors = importances(torch.randn(2, D, R, generator=source))
    torch.testing.assert_close(factors.mean(dim=1), torch.ones(2, 1))
    found, pull = rescaled(up, factors), torch.randn(2, D, R, generator=source)
    assert torch.equal(found, up)
    (found * pull).sum().backward()
    torch.testing.assert_close(up.grad, factors * pull)


def test_distillation_changes_the_shared_lora_alone_and_is_least_at_the_teacher() -> None:
    method, stream = lived()
    task, ctx = stream.tasks[2], context(stream, 2)
    batch = next(task.train.batches(8))
    classes = ctx.mask(batch.t, "current")
    method.eval()
    method.head.requires_grad_(True)
    method.tasks.requires_grad_(True)
    with torch.no_grad():
        target = method.head(method._early_exit(method.lower(batch.x, method.shared)))
        entropy = distillation(target, target, classes, 2.0)
    torch.testing.assert_close(method._distillation(batch.x, classes), entropy, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        for lora in method.shared.values():
            lora.up.add_(0.3 * torch.randn(lora.up.shape, generator=torch.Generator().manual_seed(1)))
    found: dict[bool, Tensor] = {}
    for reassign in (True, False):
        method.zero_grad()
        method.reassign = reassign
        loss = method._distillation(batch.x, classes)
        assert loss > entropy
        loss.backward()
        found[reassign] = method.shared["0"].up.grad.clone()
    torch.testing.assert_close(found[True], importances(method.teacher["0"]) * found[False], rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in method.tasks.parameters()) and method.head.weight.grad.any()


def test_the_loss_is_the_sum_of_its_terms() -> None:
    method, stream = lived()
    task, ctx = stream.tasks[2], context(stream, 2)
    batch = next(task.train.batches(8))
    method.eval()
    method.ortho = 0.5
    classes = ctx.mask(batch.t, "current")
    logits = method.head(method.inside(2, batch.x))[:, 4:]
    weights = [method.of(place).weights for place in range(T)]
    cosines = [F.cosine_similarity(weights[2].flatten(), weights[place].flatten(), dim=0).abs() for place in (0, 1)]
    expected = F.cross_entropy(logits, batch.y - 4) + 5.0 * method._distillation(batch.x, classes) + 0.25 * sum(cosines)
    torch.testing.assert_close(method.loss(batch, ctx), expected, rtol=1e-5, atol=1e-6)


def test_block_weights_scale_each_part() -> None:
    lora, x = QkvLoRA(D, R, "qv"), torch.randn(2, D)
    nn.init.normal_(lora.up)
    found = Weighted(lora, torch.tensor([2.0, 7.0, 0.5]))(x)
    plain = lora(x)
    torch.testing.assert_close(found[:, :D], 2 * plain[:, :D])
    torch.testing.assert_close(found[:, 2 * D :], 0.5 * plain[:, 2 * D :])
    assert not found[:, D : 2 * D].any()
    space = Specific(nn.ModuleDict({"2": lora, "3": QkvLoRA(D, R, "qv")}), D, C)
    assert space.weights.shape == (3, 2) and space.weights.min() >= 0.5 and space.weights.max() <= 1.5


def test_trained_parameters_are_those_of_the_formula() -> None:
    method, stream = cl_lora()
    for position, task in enumerate(stream.tasks[:2]):
        ctx = context(stream, position, budget=sgd(epochs=0))
        method.begin_task(task, ctx)
        shared, specific = 2 * 2 * D * R, 2 * 2 * 2 * D * R + 3 * 2
        assert parameter_counts(method)["trainable"] == shared + specific + C * D + 1
        method.end_task(task, ctx)
    lora = sum(p.numel() for block in range(6) for p in QkvLoRA(768, 8, "qv").parameters())
    assert lora == 147_456


def test_scores_are_cosines_in_the_space_of_the_classs_task() -> None:
    method, stream = lived()
    x = rows(stream)
    found = answers(method, x)
    with torch.inference_mode():
        for place, task in enumerate(stream.tasks):
            f, own = method.inside(place, x), method.of(place).head.prototypes[task.classes]
            expected = F.cosine_similarity(f[:, None], own[None], dim=2)
            torch.testing.assert_close(found[:, task.classes], expected, rtol=1e-5, atol=1e-5)
    alone = torch.cat([answers(method, image[None]) for image in x[::6]])
    torch.testing.assert_close(alone, found[::6], rtol=1e-5, atol=1e-5)
    assert torch.equal(method.choices(x).argmax(dim=1), found.argmax(dim=1) // 2)
    method.needs_task_id = True
    with torch.inference_mode():
        given = method(x, 1)
    assert torch.equal(given[:, 2:4], found[:, 2:4]) and not given[:, :2].any() and not given[:, 4:].any()


def test_the_lower_half_is_run_once_for_all_tasks() -> None:
    method, stream = lived()
    passes = [0] * 4
    for number, block in enumerate(method.backbone.blocks):
        block.register_forward_pre_hook(lambda module, args, n=number: passes.__setitem__(n, passes[n] + 1))
    answers(method, rows(stream))
    assert passes == [1, 1, T, T]


def test_the_passes_are_those_of_the_backbone() -> None:
    method, stream = lived()
    x = rows(stream)
    method.eval()
    with torch.inference_mode():
        merged = copy.deepcopy(method.backbone)
        for block, lora in method.shared.items():
            merged.blocks[int(block)].attn.qkv.weight += lora.delta()
        space = method.of(1)
        for place, (block, lora) in enumerate(space.loras.items()):
            merged.blocks[int(block)].attn.qkv.weight += (
                space.weights[:, place].repeat_interleave(D)[:, None] * lora.delta()
            )
        torch.testing.assert_close(method.inside(1, x), merged(x), rtol=1e-4, atol=1e-5)


def test_prototypes_do_not_depend_on_the_order_of_later_tasks_and_domains_have_their_own() -> None:
    found = []
    for order in ((0, 1, 2), (0, 2, 1)):
        method, stream = cl_lora(order=order)
        live(method, stream, until=2, budget=budget())
        found.append(method.of(0).head.prototypes.clone())
    assert torch.equal(*found)
    method, stream = cl_lora("dil")
    live(method, stream, until=2, budget=sgd(epochs=0))
    assert all(method.of(place).own.all() for place in (0, 1))
    x = rows(stream)
    with torch.inference_mode():
        expected = torch.maximum(*(method.of(place).head(method.query(x)) for place in (0, 1)))
    torch.testing.assert_close(answers(method, x), expected, rtol=1e-5, atol=1e-5)


def test_what_does_not_suit_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^method\.specific_blocks: \[1, 2\] must have a block, and all of them above"
    ):
        cl_lora(specific_blocks=[1, 2])
    with pytest.raises(ConfigError, match=r"^method\.shared_blocks: there is no block 4"):
        cl_lora(shared_blocks=[4])
    given, stream = cl_lora(task_id="given")
    with pytest.raises(ConfigError, match=r"^method\.task_id=given: needs the task id"):
        given.check(stream)
    with pytest.raises(ConfigError, match=r"^backbone: ClLora needs a vision transformer"):
        factory("cl_lora")(Net(), C)
