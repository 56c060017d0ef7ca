"""Heads whose rows are class names, on a backbone that encodes texts and names itself."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import configured, context, factory, live, row_stream, sgd
from torch import Tensor

from clrun.data.captions import Captions
from clrun.learning.method import Method
from clrun.learning.names import NamesHead
from clrun.system.errors import ConfigError

NAMES = ("red stone", "blue sky", "green leaf", "old tree", "warm sun", "dark night")
CAPTIONS = Captions(NAMES, (("{}",),) * 6)


def encoder(head: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return configured("backbone", "bert_tiny", head=head, max_tokens=16, **options)((16,))


def stream(order: tuple[int, ...] = (0, 1, 2)) -> Any:
    """Three tasks of two classes; a text of a class is its name with another ending."""
    ids = encoder("linear")
    tasks = []
    for task in order:
        labels = torch.tensor([2 * task, 2 * task + 1]).repeat(4)
        texts = [NAMES[label] + "sy"[k % 2] for k, label in enumerate(labels.tolist())]
        rows = [F.pad(ids.tokenize([text])[0], (0, 16))[:16] for text in texts]
        tasks.append((torch.stack(rows), labels))
    return row_stream(tasks, 6)


def learner(head: str, name: str = "finetune", **options: Any) -> Method:
    method = factory(name, **options)(encoder(head), 6)
    method.read_names(CAPTIONS)
    return method


def texts_of(method: Method) -> Tensor:
    return F.normalize(method.backbone.encode_names(NAMES), dim=1)


@pytest.mark.parametrize("head", ["fixed", "init"])
def test_rows_are_the_names_by_the_backbone_before_its_training(head: str) -> None:
    before = texts_of(learner(head))
    method = learner(head)
    found: list[Tensor] = []
    live(method, stream(), after=lambda *_: found.append(method.head.weight.detach().clone()))
    moved = texts_of(method)
    assert (moved - before).abs().max() > 1e-3, "the backbone was trained"
    torch.testing.assert_close(method.head.start, before, rtol=1e-5, atol=1e-6)
    for task, rows in enumerate(found):
        assert not rows[2 * task + 2 :].any()
    if head == "fixed":
        torch.testing.assert_close(found[-1], before, rtol=1e-5, atol=1e-6)
        assert torch.equal(found[0][:2], found[-1][:2])


def test_the_order_of_tasks_changes_no_row() -> None:
    rows = []
    for order in ((0, 1, 2), (2, 0, 1)):
        method = learner("fixed")
        live(method, stream(order))
        rows.append(method.head.weight)
    assert torch.equal(*rows)


def test_without_steps_it_is_the_zero_shot_classifier_in_every_order() -> None:
    scores = []
    for order in ((0, 1, 2), (2, 0, 1)):
        for name in ("finetune", "zero_shot"):
            method = learner("fixed", name)
            live(method, stream(order), budget=sgd(epochs=0))
            scores.append(torch.cat([method(task.train.images) for task in stream().tasks]))
    assert all(torch.equal(scores[0], other) for other in scores[1:])


def test_permuting_names_permutes_columns_and_a_new_class_changes_no_other() -> None:
    x = stream().tasks[0].train.images
    method, other = learner("fixed"), factory("finetune")(encoder("fixed"), 6)
    turned = torch.tensor([3, 0, 5, 1, 4, 2])
    other.read_names(Captions(tuple(NAMES[k] for k in turned), CAPTIONS.templates))
    for one in (method, other):
        one.eval()
        one.head.grow(torch.arange(5))
    before = method(x)
    method.head.grow(torch.tensor([5]))
    assert torch.equal(before[:, :5], method(x)[:, :5]) and not before[:, 5].any()
    other.head.grow(torch.tensor([5]))
    torch.testing.assert_close(other(x), method(x)[:, turned])


def test_rows_that_follow_the_backbone_are_encoded_with_gradients() -> None:
    method, tasks = learner("live"), stream()
    assert method.head.start is None
    live(method, tasks)
    method.eval()
    torch.testing.assert_close(method.head.rows(), texts_of(method), rtol=1e-4, atol=1e-5)
    ctx = context(tasks, 2)
    method.train()
    batch = next(tasks.tasks[2].train.batches(8))
    method.loss(batch, ctx).backward()
    assert method.backbone.word.weight.grad is not None


def test_sampled_names_are_those_of_the_batch_and_some_others() -> None:
    method, tasks = learner("live_1"), stream()
    assert isinstance(method.head, NamesHead) and (method.head.names, method.head.negatives) == ("live", 1)
    live(method, tasks)
    torch.testing.assert_close(method.eval().head.rows(), texts_of(method), rtol=1e-4, atol=1e-5)
    ctx, batch = context(tasks, 2), next(tasks.tasks[2].train.batches(1))
    encoded: list[int] = []
    encode = method.backbone.encode_text
    method.backbone.encode_text = lambda ids: encoded.append(len(ids)) or encode(ids)
    found = set()
    for seed in range(16):
        torch.manual_seed(seed)
        loss = method.train().loss(batch, ctx)
        torch.manual_seed(seed)
        chosen = method.head.sample(batch.y, method.competing(batch.t, ctx)).nonzero()[:, 0].tolist()
        found |= {k for k in chosen if k != int(batch.y)}
        logits = method.backbone.kappa * F.normalize(method.backbone(batch.x), dim=1) @ texts_of(method)[chosen].T
        label = torch.tensor([chosen.index(int(batch.y))])
        torch.testing.assert_close(loss, F.cross_entropy(logits, label), rtol=1e-3, atol=1e-4)
    assert found == {k for k in range(6) if k != int(batch.y)}, "every class that competes is drawn at times"
    assert encoded[0] == 2, "two names are encoded in a step"


def test_a_sample_of_all_names_is_the_head_that_encodes_all() -> None:
    whole, sampled = learner("live"), learner("live_9")
    ctx = context(stream(), 2)
    for method in (whole, sampled):
        for task in stream().tasks:
            method.begin_task(task, context(stream(), task.index))
        method.train()
    batch = next(stream().tasks[2].train.batches(8))
    assert torch.equal(whole.loss(batch, ctx), sampled.loss(batch, ctx))
    with pytest.raises(ConfigError, match="^backbone.head: this method has a loss of its own, which samples no names"):
        sampled(batch.x)
    for wrong in ("live_0", "live_x", "fixed_2", "lives"):
        with pytest.raises(
            ConfigError, match=f"^backbone.head: '{wrong}' is none of linear, fixed, init, live, live_1"
        ):
            encoder(wrong)


def test_a_restored_learner_has_its_rows() -> None:
    method = learner("fixed")
    live(method, stream(), until=2)
    for twin in (copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        twin.head.grow(torch.tensor([4, 5]))
        method.head.grow(torch.tensor([4, 5]))
        assert isinstance(twin.head, NamesHead) and torch.equal(twin.head.weight, method.head.weight)
    fresh = learner("fixed")
    torch.nn.init.normal_(fresh.head.start)
    fresh.load_state_dict(method.state_dict())
    assert torch.equal(fresh.head.start, method.head.start)
