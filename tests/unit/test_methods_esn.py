"""ESN: golden values, the limits of its routing, isolated stages and the class-attention block."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Identity, born, context, factory, image_stream, live, row_stream, sgd, tiny_vit
from running import run, run_interrupted
from torch import Tensor

from clrun.blocks.stages import ClassAttention, confidences, routes
from clrun.data.split import Batch
from clrun.data.stream import Stream
from clrun.methods.esn import Esn
from clrun.system.errors import ConfigError

FIRST, SECOND = torch.tensor([[2.0, 1.0]]), torch.tensor([[1.5, 1.5, 0.0]])


def esn(width: int, classes: int, **options: Any) -> Esn:
    method = factory("esn", **options)(Identity(width), classes)
    assert isinstance(method, Esn)
    return method


def unequal(classes: tuple[tuple[int, ...], ...] = ((3, 0), (1, 4, 2))) -> Stream:
    """Return tasks of unequal size with rows around a corner of their own for each class."""
    draw = torch.Generator().manual_seed(0)
    tasks = []
    for labels in classes:
        y = torch.tensor(labels).repeat_interleave(12)
        tasks.append((4 * torch.eye(6)[y] + torch.randn(len(y), 6, generator=draw), y))
    return row_stream(tasks, 5)


def with_logits(method: Esn, stream: Stream, *logits: Tensor) -> Tensor:
    """Return the method's logits of rows for which the stages give these ones."""
    for task in stream.tasks[: len(logits)]:
        method.begin_task(task, context(stream, task.index))
    method.head.own = lambda inputs: list(logits)  # type: ignore[assignment]
    return method.eval()(torch.zeros(len(logits[0]), 6))


def test_golden_confidences() -> None:
    found = torch.stack([confidences(h.double(), [1.0, 0.1, 0.001])[0] for h in (FIRST, SECOND)], dim=1)
    expected = [[2.3132617, 2.2989162], [2.0000045, 1.5693147], [2.0, 1.5006931]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("sign", "expected"), [("paper", 6.2218562760), ("repo", 0.3132617 + 0.1 * 10.6867383**2)])
def test_golden_loss(sign: str, expected: float) -> None:
    stream = row_stream([(torch.zeros(2, 6), torch.tensor([0, 1]))], 2)
    method = esn(6, 2, energy_sign=sign)
    ctx = context(stream)
    method.begin_task(stream.tasks[0], ctx)
    with torch.no_grad():
        method.head.stages[0].linear.weight.zero_()
        method.head.stages[0].linear.bias.copy_(FIRST[0])
    zero = torch.zeros(1, dtype=torch.long)
    loss = method.loss(Batch(torch.zeros(1, 6), zero, zero, zero), ctx)
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-5)


def test_limits_of_the_confidence() -> None:
    logits = 5 * torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    top = logits.amax(dim=1)
    found = confidences(logits, [1e-4, 0.1, 1.0, 3.0])
    assert (found >= top[:, None]).all() and (found.diff(dim=1) >= 0).all()
    torch.testing.assert_close(found[:, 0], top, rtol=0, atol=1e-3)
    torch.testing.assert_close(found[:, 2], logits.logsumexp(dim=1))
    torch.testing.assert_close(confidences(logits + 7, [0.3]), confidences(logits, [0.3]) + 7)


def test_routing_by_one_temperature_of_1_is_by_the_largest_log_sum_exp() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = [torch.randn(40, k, generator=draw) for k in (2, 5, 3)]
    energies = torch.stack([h.logsumexp(dim=1) for h in logits], dim=1)
    assert torch.equal(routes(logits, [1.0])[:, 0], energies.argmax(dim=1))
    largest = torch.stack([h.amax(dim=1) for h in logits], dim=1)
    assert torch.equal(routes(logits, [1e-6])[:, 0], largest.argmax(dim=1))
    order = [2, 0, 1]
    assert torch.equal(torch.tensor(order)[routes([logits[k] for k in order], [0.1, 1.0])], routes(logits, [0.1, 1.0]))


def test_the_prediction_is_the_best_class_of_the_chosen_stage() -> None:
    draw, stream = torch.Generator().manual_seed(0), unequal()
    logits = torch.randn(60, 2, generator=draw), torch.randn(60, 3, generator=draw)
    method = esn(6, 5, temperatures=[1.0], vote="single")
    found = with_logits(method, stream, *logits)
    chosen = routes(logits, [1.0])[:, 0]
    classes = [task.classes for task in stream.tasks]
    expected = [int(classes[s][logits[s][row].argmax()]) for row, s in enumerate(chosen.tolist())]
    assert found.argmax(dim=1).tolist() == expected
    for own, h in zip(classes, logits, strict=True):
        # Stages are moved as a whole: this is what the task-incremental setting compares.
        torch.testing.assert_close(found[:, own].softmax(dim=1), h.softmax(dim=1))


def test_temperatures_vote_once_each_and_the_oldest_stage_wins_a_tie() -> None:
    stream = unequal()
    near, far = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.2, -9.0, -9.0]])
    assert routes([near, far], [0.1, 1.0]).tolist() == [[1, 0]]  # a small temperature sees the largest logit alone
    method = esn(6, 5, temperatures=[0.1, 0.2, 1.0])
    method.head.voting[2] = True
    assert int(with_logits(method, stream, near, far).argmax()) in (0, 3)
    method.head.voting[1] = True
    assert int(method(torch.zeros(1, 6)).argmax()) == 1  # stage 1: two of three


def test_the_temperature_that_serves_the_new_stage_joins_the_pool() -> None:
    stream = unequal()
    method = esn(6, 5, temperatures=[0.1, 1.0])
    with_logits(method, stream, torch.zeros(1, 2), torch.zeros(1, 3))
    ctx = context(stream, 1)
    rows = len(stream.tasks[1].train)
    for own, best in (((1.0, 1.0), 0.1), ((1.0, -9.0), 1.0)):
        old, new = (torch.tensor([own]), torch.tensor([[1.2, -9.0, -9.0]]))
        if best == 1.0:
            old, new = torch.tensor([[1.2, -9.0]]), torch.tensor([[1.0, 1.0, -9.0]])
        method.head.own = lambda x, old=old, new=new: [old.expand(rows, -1), new.expand(rows, -1)]  # type: ignore
        assert method.temperatures[method.best_temperature(stream.tasks[1], ctx)] == best
    method.head.own = lambda x: [torch.zeros(rows, 2), torch.ones(rows, 3)]  # type: ignore[assignment]
    assert method.best_temperature(stream.tasks[1], ctx) == 0, "of equals the smallest"


def test_one_stage_is_a_plain_classifier() -> None:
    stream = unequal(((0, 1, 2, 3, 4),))
    method = esn(6, 5)
    live(method, stream)
    x = stream.tasks[0].train.images
    torch.testing.assert_close(method.eval()(x), method.head.stages[0](x))


@pytest.mark.parametrize("kind", ["linear", "mlp", "cab"])
def test_stages_are_isolated(kind: str) -> None:
    method, stream = born(factory("esn", head=kind), image_stream()) if kind != "cab" else vit_esn(head=kind)
    seen: list[dict[str, Tensor]] = []

    def look(task: Any, method: Any, state: Any) -> None:
        seen.append({name: t.clone() for name, t in method.head.stages[0].state_dict().items()})

    live(method, stream, after=look)
    assert len(method.head.stages) == 3  # type: ignore[union-attr]
    for other in seen[1:]:
        assert all(torch.equal(seen[0][name], t) for name, t in other.items())


def vit_esn(**options: Any) -> tuple[Esn, Stream]:
    torch.manual_seed(0)
    method = factory("esn", **options)(tiny_vit(), 6)
    assert isinstance(method, Esn)
    return method, image_stream()


@pytest.mark.parametrize(("freeze", "moved"), [(True, [True, False, False]), (False, [True, True, True])])
def test_prompts_learn_in_the_first_task_or_in_all(freeze: bool, moved: list[bool]) -> None:
    method, stream = vit_esn(head="cab", prompt_tokens=3, freeze_prompt=freeze)
    prompts = [method.prompt.detach().clone()]
    live(method, stream, after=lambda task, m, s: prompts.append(m.prompt.detach().clone()))  # type: ignore[attr-defined]
    assert [not torch.equal(a, b) for a, b in zip(prompts, prompts[1:], strict=False)] == moved
    assert all(not torch.equal(a, b) for a, b in [(prompts[0], prompts[1])])
    assert all(p.grad is None for p in method.backbone.parameters())


def test_a_class_attention_block_reads_all_tokens_before_the_last_norm_as_a_set() -> None:
    method, stream = vit_esn(head="cab", prompt_tokens=3)
    vit: Any = method.backbone
    x = next(stream.tasks[0].train.batches(4)).x
    tokens = method.inputs(x)
    assert tokens.shape == (4, 1 + 3 + 16, 32)
    method.kind = "linear"
    torch.testing.assert_close(method.inputs(x), vit.norm(tokens)[:, 0])  # features of the prompted transformer
    method.kind = "cab"
    method.begin_task(stream.tasks[0], context(stream))
    block = method.head.stages[0].body
    assert torch.equal(block.token, vit.cls_token[0, 0])
    mixed = tokens[:, torch.randperm(tokens.shape[1], generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(block(tokens), block(mixed), rtol=1e-4, atol=1e-5)


def test_size_of_a_class_attention_block() -> None:
    block = ClassAttention(torch.zeros(768), 12)
    assert sum(p.numel() for name, p in block.named_parameters() if name != "token") == 2_956_416


def test_the_anchor_has_no_gradient_where_it_is_met_and_pulls_elsewhere() -> None:
    stream = unequal()
    method = esn(6, 5, anchor=-2.0, anchor_weight=10.0)
    live(method, stream, budget=sgd(lr=0.005, epochs=200))
    energies = [-h.logsumexp(dim=1).mean() for h in method.head.own(stream.tasks[0].train.images)[:1]]
    assert float(energies[0]) == pytest.approx(-2.0, abs=0.3)
    with torch.no_grad():
        linear = method.head.stages[-1].linear
        linear.weight.zero_()
        linear.bias.copy_(torch.tensor([2 - math.log(3)] * 3))  # energy -2, all classes equal
    batch = next(stream.tasks[1].train.batches(36))
    gradients = []
    for weight in (0.0, 10.0):
        twin = copy.deepcopy(method)
        twin.anchor_weight = weight
        twin.loss(batch, context(stream, 1)).backward()
        gradients.append(twin.head.stages[-1].linear.bias.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperatures", [[], [1.0, 0.1], [0.1, 0.1]])
def test_temperatures_ascend(temperatures: list[float]) -> None:
    with pytest.raises(ConfigError, match="^method.temperatures: expected at least one, ascending, got"):
        esn(6, 5, temperatures=temperatures)


def test_class_attention_needs_a_transformer() -> None:
    with pytest.raises(ConfigError, match="^backbone: esn with method.head=cab or prompts needs a vision transformer"):
        esn(6, 5, head="cab")


@pytest.mark.parametrize("options", [("head=mlp", ""), ("head=cab", "prompt_tokens=2")])
def test_a_checkpoint_with_stages_can_be_read_back(options: tuple[str, str], tmp_path: Path) -> None:
    words = ["method=esn", "dataset=synthetic", "job.max_tasks=2", "job.max_steps=1", "job.max_eval_rows=4"]
    words += [f"method.{option}" for option in options if option]
    words += ["backbone=glyph_vit" if "cab" in options[0] else "backbone=mlp"]
    value = run(tmp_path / "whole", *words)
    run_interrupted(tmp_path / "cut", *words)
    assert run(tmp_path / "cut", *words) == value


def test_a_given_task_chooses_its_stage_where_tasks_share_classes() -> None:
    draw, y = torch.Generator().manual_seed(0), torch.tensor([0, 1]).repeat(12)
    tasks = [(torch.randn(24, 6, generator=draw) + 3 * k, y) for k in range(2)]
    method = esn(6, 2)
    method.check(row_stream(tasks, 2))
    assert not method.needs_task_id, "the stream is class-incremental"
    method.check(unequal())
    assert not method.needs_task_id
    stream = row_stream(tasks, 2, "til")
    method.check(stream)
    journal = live(method, stream)
    assert {row["setting"] for row in journal.recorded} == {"til"}
    x = tasks[0][0]
    for number in (0, 1):
        torch.testing.assert_close(method.eval()(x, number), method.head.stages[number](x))
