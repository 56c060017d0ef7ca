"""HiDe-Prompt: the task from plain features, mixed prompts, replayed centroids, and the reshape of the public code."""

import copy
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import answers, assert_same, born, context, factory, image_stream, live, rows, sgd, state, trace
from torch import nn

from clrun.blocks.contrast import contrast
from clrun.data.stream import Stream
from clrun.methods.hide_prompt import TaskIdentity
from clrun.running.accounting import parameter_counts
from clrun.system.errors import ConfigError

D, DEPTH, C, T, L = 32, 4, 6, 3, 5
REPLAY: dict[str, Any] = {"rows_per_class": 4, "centroids": 2, "budget": {"epochs": 1, "batch_size": 16}}
NONE: dict[str, Any] = {"budget": {"epochs": 0}}


def hide(setting: Any = "cil", augment: Any = ("crop",), **options: Any) -> tuple[Any, Stream]:
    tii = {"budget": {"epochs": 2}, "alignment": options.pop("tii_alignment", REPLAY)}
    options = {"alignment": REPLAY, "tii": tii, "blocks": [0, 1]} | options
    return born(factory("hide_prompt", **options), image_stream(setting, augment=augment))


def budget(**options: Any) -> Any:
    return sgd(**({"epochs": 1, "weight_decay": 0.01} | options))


@cache
def _lived(setting: str) -> tuple[Any, Stream, list[Any]]:
    method, stream = hide(setting)
    found = trace(lambda m: [p.detach().clone() for p in m.prompts], method, stream, budget=budget())
    return method, stream, found


def lived(setting: str = "cil") -> tuple[Any, Stream]:
    method, stream, _ = _lived(setting)
    return copy.deepcopy(method), stream


def test_prompts_of_earlier_tasks_stand_still_and_evaluation_changes_nothing() -> None:
    method, stream = lived()
    found = _lived("cil")[2]
    for place in range(T):
        assert all(torch.equal(found[place][place], later[place]) for later in found[place + 1 :])
    x, before = rows(stream), state(method)
    assert torch.equal(answers(method, x), answers(method, x))
    assert_same(before, state(method))


def test_the_identity_rests_on_plain_features_alone() -> None:
    method, stream = lived()
    x = rows(stream)
    q = method.query(x)
    before = method.inferred(q)
    with torch.no_grad():
        for prompt in method.prompts:
            prompt.normal_()
    assert torch.equal(method.query(x), q) and torch.equal(method.inferred(method.query(x)), before)
    assert torch.equal(method.constant(x), q)
    inner, outer = method.identity.inner, method.identity.outer
    hidden = F.gelu(F.linear(q, inner.weight, inner.bias))
    h = F.layer_norm(
        q + F.linear(hidden, outer.weight, outer.bias), (D,), method.identity.norm.weight, method.identity.norm.bias
    )
    torch.testing.assert_close(method.identity(q), method.identity.head(h))


def test_numbers_of_parameters() -> None:
    assert (
        sum(p.numel() for n, p in TaskIdentity(768, 100, hidden=2).named_parameters() if "head" not in n) == 2_363_136
    )
    method, stream = hide()
    method.begin_task(stream.tasks[0], context(stream))
    prompts, head = method.trainable()
    assert [p.numel() for p in prompts["params"]] == [2 * 2 * L * D] and 5 * 2 * 5 * 768 == 38_400
    assert sum(p.numel() for p in head["params"]) == C * (D + 1) and head["lr_factor"] == 0.1
    identity = sum(p.numel() for p in method.identity.parameters())
    assert parameter_counts(method)["trainable"] == 2 * 2 * L * D + C * (D + 1) + identity


def test_used_prompts_are_mixed_with_the_mean_of_earlier_ones_and_stored_so() -> None:
    method, stream = hide(beta=0.25)
    live(method, stream, until=2, budget=budget())
    task, ctx = stream.tasks[2], context(stream, 2, budget=budget())
    method.begin_task(task, ctx)
    old = [p.detach().clone() for p in method.prompts][:2]
    assert torch.equal(method.prompts[2], old[1]), "they begin as those of the task before"
    with torch.no_grad():
        method.prompts[2].add_(1.0)
    newest = method.prompts[2].detach().clone()
    expected = 0.75 * newest + 0.25 * (old[0] + old[1]) / 2
    torch.testing.assert_close(method.mixed(), expected)
    method.mixed().sum().backward()
    assert method.prompts[2].grad.unique().tolist() == [0.75] and method.prompts[0].grad is None
    method.prompts[2].grad = None
    method.end_task(task, ctx)
    torch.testing.assert_close(method.prompts[2].detach(), expected)


def test_the_loss_is_cross_entropy_and_contrast_with_earlier_centroids() -> None:
    method, stream = lived()
    task, ctx = stream.tasks[2], context(stream, 2)
    method.earlier, method.contrast_space = method.gaussians.means()[:8], "cosine"
    batch = next(task.train.batches(8))
    method.eval()
    features = method._features(batch.x, method.mixed())
    expected = F.cross_entropy(method.head(features)[:, 4:], batch.y - 4)
    expected = expected + 0.1 * contrast(features, method.earlier, space="cosine")
    torch.testing.assert_close(method.loss(batch, ctx), expected)
    assert len(method.gaussians.means()) == 2 * C, "two centroids of each class"


def test_without_mixing_contrast_and_alignment_it_is_dualprompt_without_general_prompts() -> None:
    """Within-task training is that of DualPrompt: the same prompts and heads after each task."""
    options = {"beta": 0.0, "contrast": 0.0, "head_lr_scale": 1.0, "init": "small"}
    method, stream = hide(alignment=NONE, tii_alignment=NONE, **options)
    dual = {"g_blocks": [], "e_blocks": [0, 1], "e_length": L, "pull": 0.0, "keys": "mean", "copy_prompts": True}
    other, _ = born(factory("dualprompt", **dual), image_stream())
    for position, task in enumerate(stream.tasks[:2]):
        ctx, same = (context(stream, position, budget=budget()) for _ in range(2))
        method.begin_task(task, ctx)
        other.begin_task(task, same)
        with torch.no_grad():
            other.expert[-1].copy_(method.prompts[-1])
            other.head.load_state_dict(method.head.state_dict())
        method.learn(task, ctx)
        other.learn(task, same)
        torch.testing.assert_close(method.prompts[-1], other.expert[-1])
        torch.testing.assert_close(method.head.weight, other.head.weight)
        method.end_task(task, ctx)


def test_a_right_guess_gives_the_result_of_the_given_task() -> None:
    method, stream = lived()
    x = rows(stream)
    found, chosen = answers(method, x), method.choices(x).argmax(dim=1)
    method.needs_task_id = True
    with torch.inference_mode():
        for task in chosen.unique().tolist():
            given = method(x, task)
            torch.testing.assert_close(given[chosen == task], found[chosen == task], rtol=1e-5, atol=1e-5)
    assert method.constant(x) is None and method.choices(x) is None
    method.needs_task_id = False
    y = torch.cat([batch.y for task in stream.tasks for batch in task.test.batches(100)])
    method.inferred = lambda query: y // 2
    with torch.inference_mode():
        torch.testing.assert_close(answers(method, x), method.with_tasks(x, y // 2))


def test_images_of_different_tasks_in_one_batch_have_their_single_results() -> None:
    method, stream = lived()
    x, chosen = rows(stream), torch.arange(48) % T
    with torch.inference_mode():
        method.eval()
        together = method.with_tasks(x, chosen)
        alone = torch.cat([method.with_tasks(x[k : k + 1], chosen[k : k + 1]) for k in range(0, 48, 7)])
    torch.testing.assert_close(alone, together[::7], rtol=1e-5, atol=1e-5)


def test_the_reshape_of_the_public_code_mixes_prompts_within_a_batch() -> None:
    """The test above can fail, and the places are those of the public code: the rows 2 b and 2 b + 1."""
    method, stream = lived()
    x, chosen = rows(stream)[:6], torch.tensor([0, 1, 2, 2, 1, 0])
    method.eval()
    with torch.inference_mode():
        right = method.with_tasks(x, chosen)
        method.selection = "reshaped"
        wrong = method.with_tasks(x, chosen)
        alone = torch.cat([method.with_tasks(x[k : k + 1], chosen[k : k + 1]) for k in range(6)])
    assert not torch.allclose(wrong, right, atol=1e-3)
    torch.testing.assert_close(alone, right, rtol=1e-5, atol=1e-5)  # a batch of one is reshaped rightly
    keys, values = (torch.stack([*method.prompts])[chosen][:, :, k] for k in (0, 1))
    flat = torch.cat([keys, values])  # [2 B, blocks, L, D]
    mixed = torch.stack([flat[0::2], flat[1::2]], dim=2)
    method.selection = "instance"
    with torch.inference_mode():
        torch.testing.assert_close(method.head(method._features(x, mixed)), wrong, rtol=1e-5, atol=1e-5)
    assert hide(selection="reshaped")[0].depends_on_batch and not method.depends_on_batch


def test_alignments_move_their_own_networks_alone() -> None:
    method, stream = hide()
    live(method, stream, until=1, budget=budget())
    task, phases = stream.tasks[1], list[str]()
    ctx = context(stream, 1, budget=budget(), on_step=lambda progress: phases.append(progress.phase))
    method.begin_task(task, ctx)
    head = copy.deepcopy(method.head.state_dict())
    method._learn_identity(task, ctx)
    assert_same(head, method.head.state_dict())
    identity = copy.deepcopy(method.identity.state_dict())
    method.end_task(task, ctx)
    assert_same(identity, method.identity.state_dict())
    assert not torch.equal(head["weight"], method.head.weight)
    steps = -(-4 * 2 * 4 // 16)  # classes, centroids and rows of each
    assert [phases.count(name) for name in ("tii", "tii_align", "align")] == [4, steps, steps]


@pytest.mark.parametrize(("augment", "passes"), [(("crop",), 3), ((), 2)])
def test_queries_of_training_are_computed_once_without_augmentation(augment: Any, passes: int) -> None:
    method, stream = hide(augment=augment)
    task, ctx = stream.tasks[0], context(stream, budget=budget(epochs=0))
    method.begin_task(task, ctx)
    seen: list[int] = []
    method.backbone.patch_embed.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    method.learn(task, ctx)
    assert sum(seen) == passes * len(task.train), "each of two epochs or once, and the statistics"


def test_domains_are_inferred_instead_of_classes() -> None:
    method, stream = lived("dil")
    assert method.identity.head.weight.shape == (T, D) and method.owner.tolist() == [0, 1, 2]
    assert method.plain.labels.tolist() == [0, 0, 1, 1, 2, 2] and len(method.gaussians.labels) == T * C * 2
    assert set(method.choices(rows(stream)).argmax(dim=1).tolist()) <= {0, 1, 2}


def test_what_does_not_suit_is_refused() -> None:
    given, stream = hide(task_id="given")
    with pytest.raises(ConfigError, match=r"^method\.task_id=given: needs the task id"):
        given.check(stream)
    with pytest.raises(ConfigError, match=r"^method\.blocks: there is no block 7"):
        hide(blocks=[7])
    full, stream = hide(alignment={**REPLAY, "covariance": "full"})
    live(full, stream, until=2, budget=budget())
    assert len(full.gaussians.labels) == 4 and isinstance(full.gaussians.parts[0], nn.Module)
