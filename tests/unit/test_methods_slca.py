"""SLCA and SLCA++: slow rates, heads that stand still and come back, the alignment, LoRA and the scaled features."""

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Net, assert_same, born, context, factory, image_stream, live, sgd, tiny_vit, trace
from torch import Tensor, nn

from clrun.learning.context import Context
from clrun.learning.losses import masked_symmetric_cross_entropy
from clrun.learning.method import Method
from clrun.methods.slca import renew_final_norm
from clrun.system.errors import ConfigError
from clrun.system.seeding import seed_all

BOTH = ("slca", "slca_pp")
DECAYING = partial(sgd, momentum=0.9, weight_decay=0.01)


def small(name: str, *, epochs: int = 5, rows: int = 8, **options: Any) -> Any:
    """Return `method=name` with some options, of the alignment (jitter, temperature, covariance) and others."""
    alignment = {key: options.pop(key) for key in ("jitter", "temperature", "covariance") if key in options}
    alignment |= {"rows_per_class": rows, "budget": {"batch_size": 8, "epochs": epochs}}
    return factory(name, alignment=alignment, **options)


def begun(name: str, learned: int, **options: Any) -> tuple[Any, Context]:
    """Return a method that has learned some tasks and begun the next one."""
    method, stream = born(small(name, **options), image_stream())
    live(method, stream, until=learned, budget=DECAYING()) if learned else None
    ctx = context(stream, learned, budget=DECAYING())
    seed_all(0, "task", learned)
    method.begin_task(stream.tasks[learned], ctx)
    return method, ctx


def head(method: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in method.head.state_dict().items()}


# --- stage 1


@pytest.mark.parametrize("name", BOTH)
def test_rows_of_old_classes_stand_still_in_training_and_come_back_after_an_alignment(name: str) -> None:
    method, stream = born(small(name), image_stream())
    live(method, stream, until=2, budget=DECAYING())
    aligned, kept = head(method), copy.deepcopy(method.unaligned.state_dict())
    assert not torch.equal(aligned["weight"], kept["weight"])
    ctx = context(stream, 2, budget=DECAYING())
    method.begin_task(stream.tasks[2], ctx)
    assert torch.equal(method.head.weight[:4], kept["weight"][:4]) and torch.equal(
        method.head.bias[:4], kept["bias"][:4]
    )
    assert method.head.weight[4:].any()
    method.learn(stream.tasks[2], ctx)
    assert torch.equal(method.head.weight[:4], kept["weight"][:4]) and torch.equal(
        method.head.bias[:4], kept["bias"][:4]
    )


def test_the_backbone_learns_slower_than_the_head() -> None:
    method, _ = begun("slca", 0)
    backbone, head = method.trainable()
    assert (backbone["lr_factor"], head["lr_factor"]) == (0.01, 1.0)
    assert backbone["params"] == list(method.backbone.parameters())
    assert head["params"] == list(method.head.parameters())


def test_a_frozen_backbone_measures_the_same_statistics_again() -> None:
    make = small("slca", backbone_lr_scale=0.0)
    seed_all(0, "init")
    method = make(tiny_vit(), 6)
    stream = image_stream(augment=())
    live(method, stream)
    found = copy.deepcopy(method.replay)
    again = copy.deepcopy(method.replay)
    again.rows.zero_()
    again.means.zero_()
    for task in stream.tasks:
        method.replay = again
        method.measure(task)
    torch.testing.assert_close(again.means, found.means)
    torch.testing.assert_close(again.covariances, found.covariances)


# --- stage 2


@pytest.mark.parametrize("name", BOTH)
def test_the_first_task_has_no_alignment_and_later_ones_have_a_step_per_class_and_epoch(name: str) -> None:
    method, stream = born(small(name), image_stream())
    found: list[tuple[int, int]] = []
    for position, task in enumerate(stream.tasks):
        seen: list[str] = []
        ctx = context(stream, position, on_step=lambda progress, seen=seen: seen.append(progress.phase))
        method.begin_task(task, ctx)
        method.learn(task, ctx)
        method.end_task(task, ctx)
        found.append((seen.count("fit"), seen.count("align")))
    assert found == [(8, 0), (8, 5 * 4), (8, 5 * 6)]


@pytest.mark.parametrize("name", BOTH)
def test_an_alignment_moves_the_head_alone(name: str) -> None:
    method, stream = born(small(name), image_stream())
    live(method, stream, until=1)
    method.begin_task(stream.tasks[1], context(stream, 1))
    before = copy.deepcopy(method.backbone.state_dict())
    method.end_task(stream.tasks[1], context(stream, 1))
    assert_same(before, method.backbone.state_dict())
    assert not torch.equal(method.head.weight, method.unaligned.weight)


def test_means_of_old_classes_are_shrunk_and_those_of_the_newest_task_are_not() -> None:
    stream = image_stream()
    fourth = replace(context(stream, 2), task=replace(stream.tasks[2], index=3))
    method, _ = born(small("slca", covariance="diagonal", jitter=0.0), stream)
    method.latest = torch.tensor([0, 1, 2, 3, -1, -1])
    method.replay.means = torch.eye(6, 12, dtype=torch.float64)
    method.replay.rows = torch.tensor([1, 1, 1, 1, 0, 0])
    method.replay.covariances = torch.zeros(4, 12)
    method.replay.slots = {k: k for k in range(4)}
    drawn = method.replayed(torch.arange(4), fourth)()
    torch.testing.assert_close(drawn[:, 0].diagonal(), torch.tensor([0.925, 0.95, 0.975, 1.0]))


def test_zero_covariance_repeats_the_means_in_an_alignment() -> None:
    method, stream = born(small("slca", jitter=0.0, mean_shrink=0.0, covariance="diagonal"), image_stream())
    live(method, stream, until=2)
    method.replay.covariances.zero_()
    classes = method.replay.classes
    drawn = method.replayed(classes, context(stream, 1))()
    assert torch.equal(drawn, method.replay.means[classes, None].float().expand_as(drawn))


@pytest.mark.parametrize("name", BOTH)
def test_an_alignment_reads_the_classes_so_far_and_compares_them_alone(name: str) -> None:
    method, stream = born(small(name, temperature=None, epochs=1), image_stream())
    live(method, stream, until=1)
    ctx = context(stream, 1)
    method.begin_task(stream.tasks[1], ctx)
    seen: list[Tensor] = []
    method.head.register_forward_hook(lambda module, args, logits: seen.append(logits))
    method.end_task(stream.tasks[1], ctx)
    steps = [logits for logits in seen if logits.requires_grad]
    assert sum(map(len, steps)) == 4 * 8 and all(logits.shape[1] == 6 for logits in steps)
    assert not method.head.weight[4:].any()


def test_the_loss_without_temperature_is_the_cross_entropy_of_the_plain_logits() -> None:
    z, y, groups = torch.randn(5, 6), torch.tensor([0, 1, 2, 3, 0]), torch.tensor([0, 0, 1, 1, -1, -1])
    plain, normal = (small("slca", temperature=t)(tiny_vit(), 6).alignment for t in (None, 0.1))
    torch.testing.assert_close(plain.loss(z, y, groups), F.cross_entropy(z[:, :4], y))
    torch.testing.assert_close(normal.loss(3 * z, y, groups), normal.loss(z, y, groups))
    assert not torch.allclose(normal.loss(z, y, groups), plain.loss(z, y, groups))


def test_classes_of_all_domains_have_one_gaussian_of_all_their_rows() -> None:
    method, stream = born(small("slca"), image_stream("dil"))
    live(method, stream)
    assert method.replay.rows.tolist() == [15] * 6 and method.latest.tolist() == [2] * 6


def test_a_new_last_normalisation_is_that_of_the_public_code() -> None:
    vit = tiny_vit()
    with torch.no_grad():
        vit.norm.weight.fill_(3.0)
    small("slca", reset_final_norm=True)(vit, 6)
    assert vit.norm.weight.tolist() == [1.0] * 32 and not vit.norm.bias.any() and vit.norm.eps == 1e-5
    with pytest.raises(ConfigError, match=r"^method.reset_final_norm: Linear has no last layer normalisation"):
        renew_final_norm(nn.Linear(2, 2))


# --- SLCA++


def test_trained_parameters_are_lora_norms_biases_and_the_class_token() -> None:
    vit = tiny_vit()
    method = small("slca_pp")(vit, 6)
    names = {name for name, p in vit.named_parameters() if p.requires_grad}
    assert names == {n for n, _ in vit.named_parameters() if "norm" in n or "bias" in n or n == "cls_token"}
    lora = sum(p.numel() for p in method.updates.parameters())
    assert lora == 4 * 4 * (32 + 96)
    paper = small("slca_pp", targets=["qkv", "fc1", "fc2"])(tiny_vit(), 6)
    assert sum(p.numel() for p in paper.updates.parameters()) == lora + 4 * 4 * 2 * (32 + 128)


def test_the_published_number_of_trained_parameters() -> None:
    from timm.models.vision_transformer import VisionTransformer

    with torch.device("meta"):
        method = small("slca_pp")(VisionTransformer(num_classes=0), 100)
    trained = [p for part in (method.backbone, method.updates) for p in part.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 270_336


def test_before_the_first_step_the_model_is_the_plain_one_and_a_is_orthonormal() -> None:
    method, ctx = begun("slca_pp", 0)
    x = next(ctx.task.test.batches(8)).x
    assert torch.equal(method.features(x), method.backbone(x))
    for path, update in zip(method.paths, method.updates, strict=True):
        torch.testing.assert_close(update.down @ update.down.t(), torch.eye(4), rtol=1e-4, atol=1e-5)
        values = torch.linalg.svdvals(method.backbone.get_submodule(path).weight)
        torch.testing.assert_close(
            (update.down @ method.backbone.get_submodule(path).weight.t()).norm(dim=1), values[:4]
        )


def test_matrices_never_move_and_everything_trained_does() -> None:
    method, stream = born(small("slca_pp", targets=["qkv", "fc2"], backbone_lr_scale=1.0), image_stream())
    before = copy.deepcopy(method.backbone.state_dict())
    live(method, stream, budget=DECAYING())
    for name, tensor in method.backbone.state_dict().items():
        trained = any(word in name for word in ("norm", "bias", "cls_token"))
        assert torch.equal(tensor, before[name]) != trained, name
    assert all(update.up.any() for update in method.updates)
    assert all(p.grad is None for p in method.parameters())


def test_rates_of_the_groups() -> None:
    for learned, lora in ((0, 0.5), (1, 0.1)):
        method, _ = begun("slca_pp", learned)
        assert [group["lr_factor"] for group in method.trainable()] == [0.1, lora, 1.0]
    without, _ = begun("slca_pp", 0, rank=0)
    assert [group["lr_factor"] for group in without.trainable()] == [0.1, 1.0]


def test_golden_symmetric_cross_entropy() -> None:
    z, y, mask = torch.tensor([[2.0, 1, 0, -1, 5]]), torch.tensor([0]), torch.tensor([True] * 4 + [False])
    found = [
        masked_symmetric_cross_entropy(z, y, mask, weight=a, reverse_weight=b) for a, b in ((1, 0), (0, 1), (1, 0.1))
    ]
    assert [float(value) for value in found] == pytest.approx([0.4401897, 3.2796709, 0.7681568], abs=1e-6)
    worst = masked_symmetric_cross_entropy(torch.tensor([[-90.0, 90, 0, 0, 0]]), y, mask, weight=0, reverse_weight=1)
    assert 9.2103 < float(worst) < 9.2104


def test_features_of_old_classes_shrink_in_the_alignment_and_grow_in_tests() -> None:
    method, stream = born(small("slca_pp", rows=500, jitter=0.0), image_stream())
    scales = trace(lambda m: (m.head.scale.tolist(), m.unaligned.scale.tolist()), method, stream)
    assert all(unaligned == [1.0] * 6 for _, unaligned in scales)
    assert scales[0][0] == [1.0] * 6
    assert scales[2][0] == pytest.approx([1.04, 1.04, 1.02, 1.02, 1.0, 1.0])
    x = eval_features(method, stream)
    plain = F.linear(x, method.head.weight)
    scaled = method.head(x) - method.head.bias
    torch.testing.assert_close(scaled[:, :2], 1.04 * plain[:, :2])
    torch.testing.assert_close(scaled[:, 4:], plain[:, 4:])
    method.replay.covariances.zero_()
    classes, means = method.replay.classes, method.replay.means.float()
    drawn = method.replayed(classes, context(stream, 2))()
    factors = (drawn / means[:, None]).mean(dim=2)
    rho = (1 / factors[:2] - 1) / 2
    assert 0.01 <= float(rho.min()) < 0.012 and 0.028 < float(rho.max()) <= 0.0301
    torch.testing.assert_close(factors[4:], torch.ones(2, 500))
    method.begin_task(stream.tasks[2], context(stream, 2))
    assert method.head.scale.tolist() == [1.0] * 6


def test_golden_factors_of_a_class_of_three_tasks_ago() -> None:
    method, stream = born(small("slca_pp", epochs=0, feature_scale_spread=0.0, covariance="diagonal"), image_stream())
    fourth = replace(context(stream, 2), task=replace(stream.tasks[2], index=3))
    method.latest[:2] = torch.tensor([0, 3])
    method.replay.rows[:2], method.replay.jitter = 1, 0.0
    method.replay.means += 1
    method.replay.covariances, method.replay.slots = torch.zeros(2, 32), {0: 0, 1: 1}
    assert method.replayed(torch.arange(2), fourth)()[:, 0, 0].tolist() == pytest.approx([0.9433962, 1.0])
    method.align_head(fourth.task, fourth)
    assert method.head.scale.tolist() == pytest.approx([1.06, 1, 1, 1, 1, 1])


def eval_features(method: Any, stream: Any) -> Tensor:
    with torch.inference_mode():
        features: Tensor = method.features(next(stream.tasks[0].test.batches(8)).x)
    return features.clone()


def test_without_scale_features_are_those_of_the_gaussians() -> None:
    method, stream = born(small("slca_pp", feature_scale=0.0), image_stream())
    live(method, stream)
    assert method.head.scale.tolist() == [1.0] * 6
    classes = method.replay.classes
    method.replay.covariances.zero_()
    method.replay.jitter = 0.0
    drawn = method.replayed(classes, context(stream, 2))()
    assert torch.equal(drawn, method.replay.means[classes, None].float().expand_as(drawn))


def test_without_lora_and_rates_in_the_backbone_it_is_a_linear_probe() -> None:
    options = {"rank": 0, "backbone_lr_scale": 0.0, "ce_weight": 1.0, "rce_weight": 0.0}
    method, stream = born(small("slca_pp", epochs=0, compete="seen", **options), image_stream())
    probe = Method(copy.deepcopy(method.backbone).requires_grad_(False), 6, compete="seen")
    before = copy.deepcopy(method.backbone.state_dict())
    for learner in (method, probe):
        live(learner, stream, budget=DECAYING())
    assert_same(before, method.backbone.state_dict())
    torch.testing.assert_close(method.head.weight, probe.head.weight, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^method.tuned: no parameter of the backbone has a name with 'lora'"):
        small("slca_pp", tuned=["norm", "lora"])(tiny_vit(), 6)
    with pytest.raises(ConfigError, match=r"^method.targets: a layer is listed twice in \['qkv', 'qkv'\]"):
        small("slca_pp", targets=["qkv", "qkv"])(tiny_vit(), 6)
    with pytest.raises(ConfigError, match=r"^backbone: SlcaPp needs a transformer with blocks"):
        small("slca_pp")(Net(), 6)
