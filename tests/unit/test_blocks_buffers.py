"""Replay memories: which rows they keep."""

import copy
import pickle
import random

import pytest
import torch
from torch import Tensor

from clrun.blocks.buffers import Buffer, ClassBalancedBuffer, ReservoirBuffer, RingBuffer, per_process
from clrun.data.split import Batch

LIMIT = 43.8  # 0.999 quantile of chi-square with 19 degrees of freedom


def batch(y: Tensor, t: int | Tensor = 0) -> Batch:
    """Return raw rows whose pixels are their labels."""
    x = y[:, None, None].expand(-1, 2, 2).to(torch.uint8).contiguous()
    return Batch(x, y, torch.as_tensor(t).expand(len(y)), torch.arange(len(y)))


def chi_square(counts: Tensor, trials: int, kept: int) -> float:
    """Return the statistic of inclusion counts [N] under equal probability kept / N (N - 1 degrees of freedom)."""
    n, share = len(counts), kept / len(counts)
    square = (counts - trials * share).square().sum() / (trials * share * (1 - share))
    return float(square * (n - 1) / n)


def inclusions(buffer: type[Buffer], trials: int = 3000, rows: int = 20, capacity: int = 5) -> Tensor:
    """Return how often each of `rows` rows ended in the memory."""
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(rows)
    for _ in range(trials):
        memory = buffer(capacity)
        memory.add(batch(torch.arange(rows)), generator=generator)
        counts[memory.y.long()] += 1
    assert counts.sum() == trials * capacity
    return counts


def test_reservoir_is_uniform() -> None:
    assert chi_square(inclusions(ReservoirBuffer), 3000, 5) < LIMIT


@pytest.mark.parametrize("extra", [-1, 1])
def test_the_statistic_rejects_a_draw_off_by_one(extra: int) -> None:
    draw, counts = random.Random(0), torch.zeros(20)
    for _ in range(3000):
        kept = list(range(5))
        for n in range(6, 21):
            slot = draw.randrange(n + extra)
            if slot < 5:
                kept[slot] = n - 1
        counts[kept] += 1
    assert chi_square(counts, 3000, 5) > 2 * LIMIT


@pytest.mark.parametrize("cut", [1, 3, 7, 50])
def test_reservoir_does_not_depend_on_the_cut_into_batches(cut: int) -> None:
    whole, parts = ReservoirBuffer(6), ReservoirBuffer(6)
    y = torch.arange(50)
    whole.add(batch(y), generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    for start in range(0, 50, cut):
        parts.add(batch(y[start : start + cut]), generator=generator)
    assert torch.equal(whole.read(torch.arange(6)).y, parts.read(torch.arange(6)).y)
    assert torch.equal(whole.read(torch.arange(6)).x, parts.read(torch.arange(6)).x)


@pytest.mark.parametrize("kind", [ReservoirBuffer, RingBuffer, ClassBalancedBuffer])
@pytest.mark.parametrize("capacity", [0, 1, 4])
def test_never_more_than_capacity(kind: type[Buffer], capacity: int) -> None:
    memory, generator = kind(capacity), torch.Generator()
    for n in range(1, 8):
        memory.add(batch(torch.tensor([n % 3])), generator=generator)
        assert len(memory) == min(n, capacity)
    assert len(memory.sample(10, generator)) == capacity


def test_ring_keeps_the_last_rows_of_each_task() -> None:
    memory, generator = RingBuffer(9), torch.Generator()
    memory.tasks = 3
    memory.add(batch(torch.arange(7), 0), generator=generator)
    memory.add(batch(torch.arange(10, 12), 1), generator=generator)
    for start in (20, 22, 24, 26):
        memory.add(batch(torch.arange(start, start + 2), 2), generator=generator)
    stored = memory.read(torch.arange(len(memory)))
    assert sorted(stored.y.tolist()) == [4, 5, 6, 10, 11, 25, 26, 27]
    assert torch.equal(stored.t, stored.y // 10)


def test_class_balance_whatever_the_stream() -> None:
    memory, generator = ClassBalancedBuffer(12), torch.Generator().manual_seed(0)
    for label, count in ((0, 500), (1, 4), (2, 300), (3, 2)):
        memory.add(batch(torch.full((count,), label)), generator=generator)
    counts = memory.read(torch.arange(12)).y.bincount(minlength=4).tolist()
    assert counts[3] == 2
    assert counts[1] >= 3
    assert max(counts) - min(counts[:3]) <= 1


def test_class_balanced_memory_is_uniform_within_a_class() -> None:
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(20)
    for _ in range(3000):
        memory = ClassBalancedBuffer(10)
        y = torch.arange(40) % 2
        tagged = Batch(torch.arange(40)[:, None], y, torch.zeros(40, dtype=torch.long), torch.arange(40))
        memory.add(tagged, generator=generator)
        kept = memory.read(torch.arange(10))
        first = kept.x[kept.y == 0][:, 0] // 2
        assert len(first) == 5
        counts[first] += 1
    assert chi_square(counts, 3000, 5) < LIMIT


def test_rows_come_back_as_stored() -> None:
    memory, generator = ReservoirBuffer(8), torch.Generator().manual_seed(0)
    logits = torch.randn(8, 3)
    memory.add(batch(torch.arange(8), 5), generator=generator, logits=logits.bfloat16())
    stored = memory.read(torch.tensor([6, 2]))
    assert stored.x.dtype == torch.uint8
    assert stored.x[:, 0, 0].tolist() == stored.y.tolist() == [6, 2]
    assert stored.t.tolist() == [5, 5]
    assert stored.i.tolist() == [-1, -1]
    assert memory.logits is not None
    assert torch.equal(memory.logits[:8], logits.bfloat16().float())


def test_samples_are_different_rows_and_uniform() -> None:
    memory, generator = ReservoirBuffer(20), torch.Generator().manual_seed(0)
    memory.add(batch(torch.arange(20)), generator=generator)
    counts = torch.zeros(20)
    for _ in range(3000):
        y = memory.sample(5, generator).y
        assert len(y.unique()) == 5
        counts[y] += 1
    assert chi_square(counts, 3000, 5) < LIMIT


def test_memory_takes_eight_bytes_beside_a_row() -> None:
    memory = ReservoirBuffer(100)
    for start in range(0, 300, 30):
        memory.add(batch(torch.arange(start, start + 30)), generator=torch.Generator())
    assert memory.x.nbytes + memory.y.nbytes + memory.t.nbytes == 100 * (4 + 8)


def test_copies_go_on_alike() -> None:
    memory, generator = ReservoirBuffer(5), torch.Generator().manual_seed(0)
    memory.add(batch(torch.arange(9)), generator=generator)
    twins = [memory, copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))]
    for twin in twins:
        twin.add(batch(torch.arange(20, 60)), generator=torch.Generator().manual_seed(3))
    for twin in twins[1:]:
        assert torch.equal(twins[0].y, twin.y)


def test_shares_add_up() -> None:
    assert [per_process(10, rank=r, world=4) for r in range(4)] == [3, 3, 2, 2]
    assert per_process(10, rank=0, world=1) == 10
