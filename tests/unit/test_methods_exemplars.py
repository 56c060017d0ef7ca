"""iCaRL and finetuning with full or partial memory: exemplars, means, targets and how batches are shared."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Identity, born, context, factory, image_stream, live, row_stream, sgd, trace
from torch import Tensor

from clrun.blocks.buffers import Exemplars, herd
from clrun.data.split import Batch
from clrun.data.stream import Stream
from clrun.learning.losses import masked_binary_cross_entropy, masked_cross_entropy, task_mean_cross_entropy
from clrun.learning.method import Method
from clrun.running.accounting import state_bytes
from clrun.system.errors import ConfigError
from clrun.system.seeding import seed_all


def unit(seed: int, n: int = 40, d: int = 6) -> Tensor:
    """Return n rows of length 1."""
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("seed", range(5))
def test_herding_is_the_greedy_choice_of_the_definition(seed: int) -> None:
    f = unit(seed).double()
    mean, chosen, total = f.mean(dim=0), [], torch.zeros(6).double()
    for k in range(1, 11):
        distance = ((mean - (f + total) / k).square().sum(dim=1)).tolist()
        best = min((j for j in range(40) if j not in chosen), key=lambda j: distance[j])
        chosen.append(best)
        total = total + f[best]
    assert herd(f, 10).tolist() == chosen


def test_herding_begins_alike_for_every_count_and_takes_each_row_once() -> None:
    f = unit(0)
    whole = herd(f, 100).tolist()
    assert sorted(whole) == list(range(40))
    assert all(herd(f, m).tolist() == whole[:m] for m in range(0, 41, 5))
    assert whole[0] == int((f - f.mean(dim=0)).norm(dim=1).argmin())


def test_herding_meets_the_mean_better_than_chance() -> None:
    better = 0
    for seed in range(40):
        f = unit(seed)
        drawn = torch.randperm(40, generator=torch.Generator().manual_seed(seed))[:8]
        errors = [(f[rows].mean(dim=0) - f.mean(dim=0)).norm() for rows in (herd(f, 8), drawn)]
        better += bool(errors[0] < errors[1])
    assert better >= 38


def rows(y: list[int], t: list[int], start: int = 0) -> Batch:
    n = torch.arange(start, start + len(y))
    return Batch(n.view(-1, 1, 1, 1).to(torch.uint8), torch.tensor(y), torch.tensor(t), n)


@pytest.mark.parametrize("by", ["y", "t"])
def test_exemplars_are_cut_to_the_beginning_of_each_set(by: Any) -> None:
    memory = Exemplars(by)
    memory.truncate(3)
    memory.append(rows([0, 1, 0, 1, 0], [0, 0, 0, 0, 0]))
    memory.append(rows([2, 2, 2, 0], [1, 1, 1, 1], start=10))
    memory.truncate(2)
    assert memory.x.flatten().tolist() == {"y": [0, 1, 2, 3, 10, 11], "t": [0, 1, 10, 11]}[by]
    memory.truncate(1)
    assert memory.x.flatten().tolist() == {"y": [0, 1, 10], "t": [0, 10]}[by]
    assert memory.x.nbytes + memory.y.nbytes + memory.t.nbytes == len(memory) * 9
    memory.truncate(0)
    assert len(memory) == 0


def test_losses_by_hand() -> None:
    z, y, t = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0]), torch.tensor([0, 0, 1, 1, 0])
    mask = torch.ones(5, 4, dtype=torch.bool)
    ce = F.cross_entropy(z, y, reduction="none")
    torch.testing.assert_close(task_mean_cross_entropy(z, y, t, mask), (ce[t == 0].mean() + ce[t == 1].mean()) / 2)
    mask[:, 3] = False
    target = torch.rand(5, 4)
    terms = -(target * F.logsigmoid(z) + (1 - target) * F.logsigmoid(-z))[:, :3]
    for reduction, expected in (("sum", terms.sum(dim=1).mean()), ("mean", terms.mean())):
        torch.testing.assert_close(masked_binary_cross_entropy(z, target, mask, reduction=reduction), expected)


def plain(name: str, setting: Any = "cil", **options: Any) -> tuple[Method, Stream]:
    """Return a linear learner and a stream of three tasks of rows; the second task is half as long."""
    source = torch.Generator().manual_seed(0)
    tasks = []
    for k, n in enumerate((12, 6, 12)):
        tasks.append((torch.randn(n, 5, generator=source) + 2 * k, torch.arange(n) % 2 + 2 * k))
    seed_all(0, "init")
    return factory(name, **options)(Identity(5), 6), row_stream(tasks, 6, setting)


# --- iCaRL


def test_icarl_shares_its_memory_among_the_classes_seen() -> None:
    method, stream = born(factory("icarl", capacity=20), image_stream(order=(2, 0, 1)))
    seen = trace(lambda m: (len(m.memory), m.memory.y.bincount(minlength=6).tolist()), method, stream)
    assert [n for n, _ in seen] == [20, 20, 18]
    assert [sorted(set(counts)) for _, counts in seen] == [[0, 10], [0, 5], [3]]
    assert state_bytes(method)["memory"] == 18 * (64 + 8)
    assert state_bytes(method)["means"] == 6 * 12 * 4
    method, stream = born(factory("icarl", capacity=4, per_class=True), image_stream())
    live(method, stream)
    assert method.memory.y.bincount().tolist() == [4] * 6


def test_icarl_keeps_the_first_chosen() -> None:
    method, stream = born(factory("icarl", capacity=20), image_stream())
    seen = trace(lambda m: m.memory.x[m.memory.set(0)].clone(), method, stream)
    assert torch.equal(seen[0][:5], seen[1])
    assert torch.equal(seen[1][:3], seen[2])


def test_icarl_classifies_by_the_nearest_mean_of_exemplars() -> None:
    method, stream = plain("icarl", capacity=6)
    live(method, stream)
    f = F.normalize(method.memory.x, dim=1)
    means = torch.stack([F.normalize(f[method.memory.y == c].mean(dim=0), dim=0) for c in range(6)])
    x = torch.randn(50, 5)
    nearest = (F.normalize(x, dim=1)[:, None] - means).norm(dim=2).argmin(dim=1)
    scores = method.eval()(x)
    assert torch.equal(scores.argmax(dim=1), nearest)
    torch.testing.assert_close(means.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(method.means.prototypes, means)
    assert torch.equal(method.train()(x), method.head(x))


@pytest.mark.parametrize("options", [{"capacity": 0}, {"classifier": "head"}], ids=str)
def test_icarl_falls_back_to_its_head(options: dict[str, Any]) -> None:
    method, stream = plain("icarl", **options)
    live(method, stream)
    x = torch.randn(5, 5)
    assert torch.equal(method.eval()(x), method.head(x))


@pytest.mark.parametrize("setting", ["cil", "til"])
def test_icarl_targets_by_hand(setting: str) -> None:
    method, stream = plain("icarl", setting)
    live(method, stream, until=1)
    ctx = context(stream, 1)
    seed_all(1)
    method.begin_task(stream.tasks[1], ctx)
    old, new = (next(iter(stream.tasks[k].train.batches(4))) for k in (0, 1))
    batch = Batch.cat(new, old)
    with torch.no_grad():
        then = method.head(batch.x)
        method.head.weight.add_(0.1 * torch.randn(6, 5))
    z = method.head(batch.x)
    loss = 0.0
    for row in range(8):
        for c in range(4):  # old classes by the teacher, new ones by the label
            if c >= 2 and row >= 4 and setting == "til":
                continue  # rows of the old task are not judged among the new one's classes
            wanted = then[row, c].sigmoid() if c < 2 else float(batch.y[row] == c)
            loss -= wanted * F.logsigmoid(z[row, c]) + (1 - wanted) * F.logsigmoid(-z[row, c])
    torch.testing.assert_close(method.loss(batch, ctx), loss / 8)


def test_icarl_trains_on_rows_and_exemplars_together() -> None:
    method, stream = born(factory("icarl", capacity=20), image_stream())
    assert live(method, stream, budget=sgd(epochs=1, batch_size=8)).steps == 32 // 8 + 2 * math.ceil(52 / 8)


def test_icarl_refuses_less_than_one_exemplar_a_class() -> None:
    method, stream = plain("icarl", capacity=5)
    with pytest.raises(ConfigError, match=r"method.capacity=5: less than one exemplar for each of 6 classes"):
        method.check(stream)


# --- full and partial memory


def test_full_memory_is_divided_and_partial_memory_grows() -> None:
    counts = {}
    for memory in ("full", "partial"):
        method, stream = born(factory("replay_finetune", memory=memory, per_task=6), image_stream())
        counts[memory] = trace(lambda m: m.memory.t.bincount().tolist(), method, stream)
        assert state_bytes(method)["memory"] == 18 * (64 + 8)
    assert counts == {"full": [[18], [9, 9], [6, 6, 6]], "partial": [[6], [6, 6], [6, 6, 6]]}


@pytest.mark.parametrize(("memory", "expected"), [("full", [0, 4, 4]), ("partial", [0, 2, 3])])
def test_batches_are_shared_as_the_rows_are(memory: str, expected: list[int]) -> None:
    method, stream = born(factory("replay_finetune", memory=memory, per_task=6), image_stream())
    seen = trace(lambda m: m.replayed, method, stream, budget=sgd(epochs=1, batch_size=10))
    held = {"full": [18, 18], "partial": [6, 12]}[memory]
    assert seen == expected == [0, *(math.ceil(10 * n / (32 + n)) for n in held)]


def test_exemplars_of_a_step_are_spread_over_the_tasks() -> None:
    method, stream = plain("replay_finetune", per_task=4)
    live(method, stream, until=2)
    ctx = context(stream, 2)
    seed_all(0, "task", 2)
    method.begin_task(stream.tasks[2], ctx)
    lucky = set()
    for replayed in (4, 5):
        method.replayed = replayed
        for _ in range(20):
            batch = method.mix(next(iter(stream.tasks[2].train.batches(6))), ctx)
            counts = batch.t[6:].bincount(minlength=2).tolist()
            assert sorted(counts) == [2, replayed - 2]
            lucky.add(tuple(counts))
    assert lucky == {(2, 2), (3, 2), (2, 3)}


@pytest.mark.parametrize("setting", ["cil", "til"])
def test_loss_weighs_old_tasks_together_like_the_new_one(setting: str) -> None:
    method, stream = plain("replay_finetune", setting, per_task=4)
    live(method, stream, until=2)
    ctx = context(stream, 2)
    seed_all(0, "task", 2)
    method.begin_task(stream.tasks[2], ctx)
    method.replayed = 5
    batch = method.mix(next(iter(stream.tasks[2].train.batches(6))), ctx)
    means = [
        masked_cross_entropy(method(batch.x[batch.t == k]), batch.y[batch.t == k], ctx.mask(batch.t[batch.t == k]))
        for k in range(3)
    ]
    torch.testing.assert_close(method.loss(batch, ctx), means[2] + (means[0] + means[1]) / 2)


def test_a_memory_of_everything_is_nearly_joint() -> None:
    finals = {}
    for name, options in (("finetune", {}), ("joint", {"restart": False}), ("replay_finetune", {"per_task": 32})):
        method, stream = born(factory(name, **options), image_stream())
        journal = live(method, stream, budget=sgd(epochs=12, lr=0.01))
        finals[name] = sum(r["correct"] for r in journal.recorded if r["position"] == 3 and r["setting"] == "cil")
    assert finals["replay_finetune"] > finals["finetune"] + 6
    assert finals["replay_finetune"] >= finals["joint"] - 6
