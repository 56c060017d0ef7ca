from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import as_texts, assert_same, born, context, cpu, factory, image_stream, live, sgd, tiny_writer
from torch import Tensor, nn

from clrun.data.captions import Captions
from clrun.data.schema import Metric
from clrun.data.split import Batch, TensorSplit
from clrun.data.stream import Stream
from clrun.methods.progressive_prompts import ProgressivePrompts
from clrun.methods.text_to_text import TextToText
from clrun.running.evaluation import Evaluation
from clrun.system.errors import ConfigError

NAMES = ("cat", "dog", "cat owl", "fish", "ox", "bee")


def named(names: tuple[str, ...] = NAMES, **options: Any) -> Stream:
    captions = Captions(names, (("{}",),) * 6, exact=True)
    return replace(image_stream(), class_names=names, captions=captions, **options)


def begun(
    name: str = "text_to_text",
    *,
    tasks: int = 2,
    names: tuple[str, ...] = NAMES,
    metric: Metric = "accuracy",
    **options: Any,
) -> Any:
    """Return a method that has begun some tasks without learning them, in eval mode, and the stream of texts."""
    method, stream = born(factory(name, **options), named(names, metric=metric))
    for task in stream.tasks[:tasks]:
        method.begin_task(task, context(stream, task.index))
    return method.eval(), stream


def some_rows(stream: Stream) -> Tensor:
    return next(stream.tasks[0].test.batches(5)).x


def test_scores_of_strings_of_one_token_are_its_log_softmax() -> None:
    names = tuple("abcdef")
    method, stream = begun(names=names, tasks=3)
    method.strings = method.strings[:, :1]  # without the end mark
    x = some_rows(stream)
    states, mask = method.backbone.encode(x)
    expected = method.backbone.decode(states, mask, x[:, :1])[:, 0].log_softmax(dim=1)[:, [ord(c) + 3 for c in names]]
    torch.testing.assert_close(method(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("normalise", "divisor"), [("mean", 4), ("sum", 1)])
def test_a_score_is_the_likelihood_of_its_tokens(normalise: str, divisor: int) -> None:
    method, stream = begun(normalise=normalise)
    x, ids = some_rows(stream), torch.tensor([[ord(c) + 3 for c in "dog"] + [1]] * 5)
    of_tokens = method.backbone.decode(*method.backbone.encode(x), ids).log_softmax(dim=2)
    expected = sum(of_tokens[:, t, int(ids[0, t])] for t in range(4)) / divisor
    torch.testing.assert_close(method(x)[:, 1], expected, rtol=1e-5, atol=1e-5)


def test_scores_depend_on_no_other_string_and_no_chunk() -> None:
    first, stream = begun(tasks=1)
    x = some_rows(stream)
    more, _ = begun(tasks=3)
    more.chunk = 4
    scores = more(x)
    torch.testing.assert_close(first(x)[:, :2], scores[:, :2], rtol=1e-5, atol=1e-5)
    assert not first(x)[:, 2:].any() and (scores < 0).all()
    twin, _ = begun(tasks=3, names=(*NAMES[:2], "xyz", "uvwxyz", "k", "l"))  # other strings, longer than the longest
    torch.testing.assert_close(twin(x)[:, :2], scores[:, :2], rtol=1e-5, atol=1e-5)


def test_the_loss_is_that_of_transformers() -> None:
    method, stream = begun()
    x, y = some_rows(stream), torch.tensor([0, 1, 2, 3, 2])
    own = method.loss(Batch(x, y, y, y), context(stream))
    states, mask = method.backbone.encode(x)
    logits = method.backbone.decode(states, mask, method.strings[y])
    labels = method.strings[y].masked_fill(method.strings[y] == 0, -100)
    rows = [nn.functional.cross_entropy(a, b) for a, b in zip(logits, labels, strict=True)]
    torch.testing.assert_close(own, torch.stack(rows).mean())


def test_equal_rows_of_two_tasks_have_equal_predictions() -> None:
    method, stream = begun(tasks=3)
    x = some_rows(stream)
    twice = torch.cat([x, x])
    torch.testing.assert_close(method(twice)[:5], method(twice)[5:], rtol=1e-6, atol=1e-6)


def test_a_string_is_learned_and_written() -> None:
    torch.manual_seed(0)
    method, stream = begun(tasks=1)
    batch = next(stream.tasks[0].train.batches(6))
    batch = replace(batch, x=torch.where(batch.y[:, None] == 0, torch.tensor([70, 1]), torch.tensor([90, 1])))
    assert not method.matches(batch.x).isfinite().any(), "an untrained network writes no name"
    optimizer = torch.optim.Adam(method.parameters(), lr=0.01)
    for _ in range(80):
        optimizer.zero_grad()
        method.loss(batch, context(stream)).backward()
        optimizer.step()
    assert method.write(batch.x) == [NAMES[k] for k in batch.y.tolist()]
    assert method(batch.x)[:, :2].argmax(dim=1).equal(batch.y)
    assert method.matches(batch.x).isfinite().equal(nn.functional.one_hot(batch.y, 6).bool())


def test_exact_matches_of_validation_rows_are_logged() -> None:
    stream = as_texts(named())
    task = replace(stream.tasks[0], val=stream.tasks[0].test)
    method = factory("text_to_text", exact_match=True)(tiny_writer(), 6)
    found: list[Any] = []
    ctx = replace(context(stream), log=found.append)
    method.begin_task(task, ctx)
    method.end_task(task, ctx)
    assert found == [{"exact_match": 0.0}]
    names = [NAMES[y] for y in task.test.y.tolist()]
    method.write = lambda x, task=None: names[: len(x)]
    method.end_task(task, ctx)
    assert found[-1] == {"exact_match": 1.0}


def test_exact_match_counts_what_is_written() -> None:
    method, stream = begun(metric="exact_match")
    x = some_rows(stream)
    method.write = lambda x, task=None: ["dog", "owl", "cat owl", "ox", "dog "][: len(x)]
    expected = torch.full((5, 6), -torch.inf)
    expected[0, 1] = expected[2, 2] = 0.0  # "ox" is of a task to come, and "owl" and "dog " are no names
    assert torch.equal(method(x), expected)
    task = replace(stream.tasks[0], test=TensorSplit(x, torch.tensor([1, 0, 0, 1, 1])))
    short = replace(stream, tasks=(task, *stream.tasks[1:]))
    found = Evaluation(cpu(), "test", 64, None)(method, short, 2, tasks=1)
    assert [(row["setting"], row["correct"], row["task_correct"]) for row in found] == [("cil", 1, 1), ("til", 1, 1)]


def test_tasks_may_share_strings_where_the_task_is_known() -> None:
    shared = ("good", "bad") * 3
    method = factory("text_to_text")(tiny_writer(), 6)
    method.check(named(shared, setting="til"))
    with pytest.raises(ConfigError, match="'good' and 'good' have the same tokens, so that the classes 0 and 2 cannot"):
        method.check(named(shared))
    with pytest.raises(ConfigError, match="'good' and 'good' have the same tokens, so that the classes 0 and 1 cannot"):
        method.check(named(("good", "good", *NAMES[2:]), setting="til"))


def test_til_and_cil_differ_in_the_admissible_strings_alone() -> None:
    method, stream = born(factory("text_to_text"), named())
    recorded = live(method, stream).recorded
    x, y = some_rows(stream), next(stream.tasks[0].test.batches(5)).y
    scores = method.eval()(x)
    rows = {(r["task_position"], r["setting"]) for r in recorded if r["position"] == 3}
    assert rows == {(t, s) for t in range(3) for s in ("cil", "til")} and len(y) == 5
    assert scores[:, :2].argmax(dim=1).max() < 2


def test_prompts_of_earlier_tasks_and_the_network_stay_bit_for_bit() -> None:
    method, stream = born(factory("progressive_prompts", length=3), named(setting="til"))
    before = {name: p.clone() for name, p in method.backbone.state_dict().items()}
    kept: list[Tensor] = []

    def look(task: Any, method: Any, state: Any) -> None:
        kept.append(method.prompts[-1].detach().clone())
        assert all(torch.equal(a, b) for a, b in zip(kept, method.prompts, strict=True))

    recorded = live(method, stream, after=look).recorded
    assert_same(before, method.backbone.state_dict())
    of_first = {r["correct"] for r in recorded if r["task_position"] == 0}
    assert len(of_first) == 1 and len(kept) == 3, "nothing is forgotten"


def test_a_prompt_acts_after_its_task_as_behind_its_network() -> None:
    method, stream = born(factory("progressive_prompts", length=3, bottleneck=5), named(setting="til"))
    x, task = some_rows(stream), stream.tasks[0]
    ctx = context(stream, 0, budget=sgd(epochs=1, lr=0.1))
    method.begin_task(task, ctx)
    start = [p.detach().clone() for p in method.trainable()]
    assert [tuple(p.shape) for p in start] == [(3, 16), (5, 16), (5,), (16, 5), (16,), (16,), (16,)]
    method.learn(task, ctx)
    assert not any(torch.equal(a, b) for a, b in zip(start, method.trainable(), strict=True)), "all of them are trained"
    own, network = method.prompts[0].detach().clone(), method.residual
    inner = nn.functional.linear(
        nn.functional.linear(own, network[0].weight, network[0].bias).relu(), network[2].weight
    )
    expected = own + nn.functional.layer_norm(inner + network[2].bias, (16,), network[3].weight, network[3].bias)
    before = method.eval()(x, 0)
    method.end_task(task, ctx)
    torch.testing.assert_close(method.prompts[0].detach(), expected)
    assert method.residual is None and torch.equal(method(x, 0), before)
    method.begin_task(stream.tasks[1], context(stream, 1))
    assert torch.equal(method.eval()(x, 0)[:, :2], before[:, :2]), "a new network does not touch it"


def test_prompts_stand_before_the_text_newest_first() -> None:
    method, stream = begun("progressive_prompts", length=2)
    x, table = some_rows(stream), method.backbone.shared.weight
    with torch.no_grad():
        method.prompts[0].copy_(table[[80, 81]])
        method.prompts[1].copy_(table[[90, 91]])
    for task, front in ((0, [80, 81]), (1, [90, 91, 80, 81])):
        states, mask = method.backbone.encode(torch.cat([torch.tensor([front]).expand(5, -1), x], dim=1))
        torch.testing.assert_close(method.encode(x, task)[0], states)
    assert isinstance(method, ProgressivePrompts) and [p.requires_grad for p in method.prompts] == [False, True]


def test_what_cannot_be_written_is_refused() -> None:
    with pytest.raises(ConfigError, match="TextToText needs an encoder-decoder that writes texts, not Linear; use the"):
        factory("text_to_text")(nn.Linear(2, 2), 6)
    method = factory("text_to_text")(tiny_writer(), 6)
    with pytest.raises(
        ConfigError, match="dataset.schema.verbaliser: 'cat' and 'cat' have the same tokens, .* 0 and 1 cannot"
    ):
        method.check(named(("cat", " cat", *NAMES[2:])))
    assert isinstance(method, TextToText)
    with pytest.raises(ConfigError, match="ranks the strings of 501 classes, more than 500; choose another method"):
        method.check(replace(named(), num_classes=501))
