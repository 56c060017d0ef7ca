import pickle

import pytest
import torch
from torch import Tensor

from clrun.data.shifts import PixelPermutation, Rotation
from clrun.data.split import Batch, TensorSplit, concatenate
from clrun.data.transforms import PerDevice

pytestmark = pytest.mark.exact  # whole numbers, bytes and texts alone


class Double:
    """A transform whose train view draws from the generator, so that views can be told apart."""

    augments = True

    def eval(self, x: Tensor) -> Tensor:
        return x.float() * 2

    def train(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return x.float() * 2 + torch.randint(1, 99, (1,), generator=generator)


def make(rows: int = 23, **options) -> TensorSplit:
    images = torch.arange(rows * 4, dtype=torch.uint8).view(rows, 1, 2, 2)
    return TensorSplit(images, torch.arange(rows) % 5, **options)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def whole(split: TensorSplit, **options) -> Batch:
    return Batch.cat(*split.batches(7, view="raw", **options))


def test_batches_follow_the_order_of_the_split_and_the_last_is_smaller() -> None:
    batches = list(make().batches(8, view="raw"))
    assert [len(batch) for batch in batches] == [8, 8, 7]
    assert torch.equal(Batch.cat(*batches).i, torch.arange(23))
    assert torch.equal(Batch.cat(*batches).x, make().images)


def test_shuffle_is_a_permutation_drawn_from_the_generator() -> None:
    first, again, other = (whole(make(), shuffle=seeded(s)) for s in (0, 0, 1))
    assert torch.equal(first.i, again.i) and not torch.equal(first.i, other.i)
    assert torch.equal(first.i.sort().values, torch.arange(23))
    assert torch.equal(first.x, make().images[first.i]) and torch.equal(first.y, make().labels[first.i])


@pytest.mark.parametrize("shards", [1, 2, 3, 5])
@pytest.mark.parametrize("shuffled", [False, True])
def test_shards_partition_every_batch(shards: int, shuffled: bool) -> None:
    def read(shard: tuple[int, int]) -> list[Batch]:
        return list(make().batches(6, view="raw", shuffle=seeded() if shuffled else None, shard=shard))

    global_batches = read((0, 1))
    parts = [read((k, shards)) for k in range(shards)]
    for index, batch in enumerate(global_batches):
        shared = [part[index].i for part in parts]
        assert torch.equal(torch.cat(shared).sort().values, batch.i.sort().values)
        assert max(map(len, shared)) - min(map(len, shared)) <= 1


def test_views() -> None:
    split = make(transform=Double())
    raw, prepared = next(split.batches(4, view="raw")), next(split.batches(4))
    assert raw.x.dtype == torch.uint8
    assert torch.equal(prepared.x, raw.x.float() * 2)
    augmented = next(split.batches(23, view="train", shuffle=seeded(3)))
    noise = augmented.x - split.images[augmented.i].float() * 2
    assert torch.all(noise == noise[0, 0, 0, 0]) and noise[0, 0, 0, 0] > 0


def test_select_composes_and_shares_storage() -> None:
    split = make(positions=torch.arange(23))
    first = split.select(torch.tensor([20, 3, 5, 7]))
    second = first.select(torch.tensor([2, 0, 0]))
    batch = whole(second)
    assert second.images is split.images
    assert torch.equal(batch.y, torch.tensor([0, 0, 0])) and torch.equal(second.y, batch.y)
    assert torch.equal(batch.x, split.images[[5, 20, 20]])
    assert torch.equal(batch.t, torch.tensor([5, 20, 20]))
    assert torch.equal(batch.i, torch.arange(3))
    assert len(second) == 3 and len(split.select(torch.tensor([], dtype=torch.long))) == 0


def test_shift_is_applied_to_stored_rows_before_the_transform() -> None:
    turn = PixelPermutation(PerDevice(torch.tensor([3, 2, 1, 0])))
    split = make(shift=turn, transform=Double())
    assert torch.equal(next(split.batches(23, view="raw")).x, make().images.flip(-1, -2))
    assert torch.equal(next(split.batches(23)).x, make().images.flip(-1, -2).float() * 2)


@pytest.mark.parametrize("shared", [True, False])
def test_concatenate_reads_one_after_the_other(shared: bool) -> None:
    split = make(transform=Double())
    other = split if shared else make(rows=9, transform=Double(), shift=Rotation(180.0))
    parts = [
        TensorSplit(split.images, split.labels, torch.tensor([4, 2]), 3, split.transform, split.shift),
        TensorSplit(
            other.images, other.labels, torch.tensor([8, 0, 1]), torch.tensor([5, 6, 7]), other.transform, other.shift
        ),
        TensorSplit(split.images, split.labels, None, 1, split.transform, split.shift),
    ]
    joined = concatenate(parts)
    batch, expected = whole(joined), Batch.cat(*(whole(part) for part in parts))
    for column in ("x", "y", "t"):
        assert torch.equal(getattr(batch, column), getattr(expected, column)), column
    assert torch.equal(batch.i, torch.arange(2 + 3 + 23))
    assert torch.equal(next(joined.batches(2)).x, next(parts[0].batches(2)).x)
    assert (joined.images is split.images) == shared


def test_a_split_survives_pickling_and_moving() -> None:
    split = make(shift=Rotation(90.0)).select(torch.tensor([4, 9]))
    for copy in (pickle.loads(pickle.dumps(split)), split.to("cpu")):
        assert torch.equal(whole(copy).x, whole(split).x)
