import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from clrun.data import orders
from clrun.data.scenarios import class_split, dataset_sequence, domain_shift, fixed_groups, task_name
from clrun.data.shifts import Rotation, Standardised, pixel_permutation
from clrun.data.sources.digits import digits
from clrun.data.sources.synthetic import synthetic
from clrun.data.split import Batch, Plain, TensorSplit
from clrun.data.stream import Dataset, Stream, Task
from clrun.data.transforms import ImageTransform
from clrun.system.errors import ConfigError

DIGITS = digits(val_fraction=0.1, seed=0, augment=[])
SPLIT = dict(n_tasks=5, first=None, sizes=None, class_seed=None, class_order=None, setting="cil")
SHIFT = dict(n_tasks=3, kind="rotated", identity_first=True, max_angle=180.0, setting="dil")


def many_classes(num_classes: int) -> Dataset:
    return synthetic(
        num_classes=num_classes,
        image_shape=[1, 4, 4],
        train_rows=2,
        test_rows=1,
        difficulty=1.0,
        similarity=0.0,
        period=2,
        val_fraction=0.0,
        seed=0,
        augment=[],
    )


def split_of(dataset: Dataset = DIGITS, order: Callable[[int], list[int]] = orders.canonical, **changes) -> Stream:
    return class_split(dataset, order, Plain(), **(SPLIT | changes))


def shift_of(dataset: Dataset = DIGITS, order: Callable[[int], list[int]] = orders.canonical, **changes) -> Stream:
    return domain_shift(dataset, order, Plain(), **(SHIFT | changes))


def sizes(stream: Stream) -> list[int]:
    return [len(task.classes) for task in stream.tasks]


def images(split) -> torch.Tensor:
    return Batch.cat(*split.batches(512, view="raw")).x


def same_task(a: Task, b: Task) -> bool:
    """Whether two tasks are the same but for their position."""
    fixed = a.id == b.id and a.name == b.name and torch.equal(a.classes, b.classes)
    return fixed and all(
        torch.equal(images(x), images(y)) and torch.equal(x.y, y.y)
        for x, y in ((a.train, b.train), (a.test, b.test), (a.val, b.val))
    )


# --- class_split


@pytest.mark.parametrize(
    ("num_classes", "n_tasks", "expected"),
    [(31, 6, [6, 5, 5, 5, 5, 5]), (10, 5, [2] * 5), (10, 4, [3, 3, 2, 2]), (10, 10, [1] * 10), (10, 1, [10])],
)
def test_sizes_differ_by_at_most_one_larger_first(num_classes: int, n_tasks: int, expected: list[int]) -> None:
    assert sizes(split_of(many_classes(num_classes), n_tasks=n_tasks)) == expected


def test_larger_first_task() -> None:
    assert sizes(split_of(first=4, n_tasks=4)) == [4, 2, 2, 2]
    assert sizes(split_of(first=5, n_tasks=3)) == [5, 3, 2]
    assert sizes(split_of(first=10, n_tasks=1)) == [10]


def test_listed_sizes() -> None:
    assert sizes(split_of(sizes=[1, 6, 3], n_tasks=None)) == [1, 6, 3]
    assert sizes(split_of(sizes=[1, 6, 3], n_tasks=3)) == [1, 6, 3]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_tasks": 11}, "scenario.n_tasks: 10 classes make 1 to 10 tasks, got 11"),
        (
            {"n_tasks": 8, "first": 4},
            "scenario.n_tasks: 10 classes with 4 of them in task 0 .* make 2 to 7 tasks, got 8",
        ),
        (
            {"n_tasks": 1, "first": 4},
            "scenario.n_tasks: 10 classes with 4 of them in task 0 .* make 2 to 7 tasks, got 1",
        ),
        ({"first": 11}, "scenario.first: must be at most 10"),
        ({"first": 4, "sizes": [4, 6], "n_tasks": 2}, "scenario.first: .*scenario.sizes"),
        ({"sizes": [4, 5], "n_tasks": 2}, "scenario.sizes: .* sum to the 10 classes .* got .4, 5. with sum 9"),
        ({"sizes": [0, 10], "n_tasks": 2}, "scenario.sizes: must be positive"),
        ({"sizes": [4, 6]}, "scenario.n_tasks: 5 does not match the 2 tasks of scenario.sizes"),
        ({"n_tasks": None}, "scenario.n_tasks: must be given"),
        ({"setting": "dil"}, r"scenario.setting: scenario=class_split cannot be 'dil'; set it to til or cil"),
    ],
)
def test_impossible_splits_are_refused(changes: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}"):
        split_of(**changes)


def test_every_row_belongs_to_exactly_one_task() -> None:
    stream = split_of(n_tasks=4, class_seed=3)
    for part in ("train", "test", "val"):
        split = getattr(DIGITS, part)
        stored = torch.arange(len(split.labels)) if split.rows is None else split.rows
        rows = [getattr(task, part).rows for task in stream.tasks]
        assert torch.equal(torch.cat(rows).sort().values, stored.sort().values)
    for task in stream.tasks:
        assert set(task.train.y.tolist()) == set(task.classes.tolist()) == set(task.test.y.tolist())


def test_an_order_permutes_tasks_and_changes_nothing_else() -> None:
    order = partial(orders.listed, tasks=[3, 0, 4, 2, 1])
    canonical, permuted = split_of(class_seed=7), split_of(order=order, class_seed=7)
    assert permuted.order == (3, 0, 4, 2, 1)
    assert permuted.class_order == canonical.class_order
    for index, task in enumerate(permuted.tasks):
        assert task.index == index
        assert all(set(whole.t.tolist()) == {index} for whole in task.train.batches(64, view="raw"))
        assert same_task(task, canonical.tasks[task.id])


def test_class_seed_deals_classes() -> None:
    natural, drawn, again, other = (split_of(class_seed=seed) for seed in (None, 1, 1, 2))
    assert natural.class_order == tuple(range(10))
    assert drawn.class_order == again.class_order != other.class_order
    assert sorted(drawn.class_order) == list(range(10))
    flat = [label for task in drawn.tasks for label in task.classes.tolist()]
    assert tuple(flat) == drawn.class_order  # canonical order: task k is the k-th block


def test_class_seed_is_stable() -> None:
    assert split_of(class_seed=0).class_order == (1, 7, 3, 5, 2, 6, 4, 8, 0, 9)


def test_class_orders_of_the_literature() -> None:
    assert split_of(class_order={"numpy_seed": 1993}).class_order == (4, 2, 7, 6, 0, 3, 5, 8, 9, 1)
    first = split_of(class_order={"numpy_seed": 1993}).tasks[0]
    assert first.classes.tolist() == [4, 2] and set(first.train.y.tolist()) == {2, 4}
    assert split_of(class_order={"python_seed": 1}).class_order == (6, 8, 9, 7, 5, 3, 0, 4, 1, 2)
    assert split_of(class_order=list(range(9, -1, -1))).tasks[0].classes.tolist() == [9, 8]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"class_order": [0, 1]}, "scenario.class_order: must name each of the classes 0 to 9 exactly once"),
        (
            {"class_order": {"numpy": 3}},
            "scenario.class_order: must be a list of class ids, or one of numpy_seed, python_seed",
        ),
        ({"class_order": {}}, "scenario.class_order: must be a list of class ids, or one of numpy_seed, python_seed"),
        ({"class_order": {"numpy_seed": -1}}, "scenario.class_order.numpy_seed: must be between 0 and 4294967295"),
        ({"class_order": {"numpy_seed": 1}, "class_seed": 0}, "scenario.class_seed: .* scenario.class_order"),
    ],
)
def test_class_orders_that_are_none_are_refused(changes: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}"):
        split_of(**changes)


def test_candidates_of_a_split() -> None:
    stream = split_of(order=orders.reverse)
    assert stream.candidates(2)[0].nonzero()[:, 0].tolist() == [6, 7, 8, 9]
    til = stream.candidates(2, "til")
    assert [row.nonzero()[:, 0].tolist() for row in til] == [[8, 9], [6, 7], [], [], []], "nothing of unseen tasks"


def test_an_order_that_is_no_permutation_is_refused() -> None:
    with pytest.raises(ConfigError, match="^task_order: must return a list of the 5 task ids, each once"):
        split_of(order=lambda n_tasks: [0] * n_tasks)


def test_tasks_carry_the_transform() -> None:
    transform = Plain()
    stream = class_split(DIGITS, orders.canonical, transform, **SPLIT)
    assert stream.transform is transform
    assert all(task.train.transform is task.test.transform is transform for task in stream.tasks)


# --- fixed_groups


def test_groups_by_name_and_by_list() -> None:
    named = fixed_groups(DIGITS, orders.canonical, Plain(), groups="parity", setting="til")
    listed = fixed_groups(DIGITS, orders.reverse, Plain(), groups=[[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]], setting="til")
    assert [task.classes.tolist() for task in named.tasks] == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]
    assert all(same_task(task, named.tasks[task.id]) for task in listed.tasks)
    assert listed.setting == "til" and listed.order == (1, 0)
    assert named.class_order == (0, 2, 4, 6, 8, 1, 3, 5, 7, 9)


def test_groups_may_leave_classes_out() -> None:
    stream = fixed_groups(DIGITS, orders.canonical, Plain(), groups=[[7], [3, 1]], setting="cil")
    assert stream.num_classes == 10 and stream.class_order == (7, 3, 1)
    assert set(stream.tasks[1].train.y.tolist()) == {1, 3}


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ("pairty", "digits has no groups named 'pairty'; did you mean 'parity'?"),
        ([[0, 1], [1, 2]], "class 1 appears twice, the second time in group 1"),
        ([[0, 1], [10]], "class 10 in group 1 does not exist"),
        ([[-1]], "class -1 in group 0 does not exist"),
        ([[0], []], "no group may be empty"),
        ([], "at least one group"),
    ],
)
def test_groups_that_are_no_partition_are_refused(groups: str | list[list[int]], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        fixed_groups(DIGITS, orders.canonical, Plain(), groups=groups, setting="cil")
    assert str(error.value).startswith("scenario.groups: ") and said in str(error.value)


def test_groups_of_a_data_set_without_any() -> None:
    with pytest.raises(ConfigError, match="available: none; list the class ids instead"):
        fixed_groups(many_classes(4), orders.canonical, Plain(), groups="parity", setting="cil")


# --- domain_shift


@pytest.mark.parametrize("kind", ["permuted", "rotated"])
def test_domains_have_all_rows_and_all_classes(kind: str) -> None:
    stream = shift_of(kind=kind)
    assert stream.setting == "dil" and stream.class_order == tuple(range(10))
    for task in stream.tasks:
        assert torch.equal(task.train.y, DIGITS.train.y) and torch.equal(task.classes, torch.arange(10))
        assert images(task.train).dtype == torch.uint8 and images(task.train).shape[1:] == (1, 8, 8)
        assert task.train.images is DIGITS.train.images  # nothing is copied
    assert stream.candidates(1).all()


@pytest.mark.parametrize("kind", ["permuted", "rotated"])
def test_a_domain_depends_on_its_id_and_the_data_seed_only(kind: str) -> None:
    canonical, reverse = shift_of(kind=kind, n_tasks=5), shift_of(kind=kind, n_tasks=5, order=orders.reverse)
    assert all(same_task(task, canonical.tasks[task.id]) for task in reverse.tasks)
    assert all(same_task(a, b) for a, b in zip(shift_of(kind=kind).tasks, canonical.tasks, strict=False))
    other = shift_of(replace(DIGITS, seed=1), kind=kind)
    assert torch.equal(images(other.tasks[0].test), images(DIGITS.test))
    assert not torch.equal(images(other.tasks[1].test), images(canonical.tasks[1].test))


@pytest.mark.parametrize("kind", ["permuted", "rotated"])
def test_identity_first(kind: str) -> None:
    with_identity, without = shift_of(kind=kind), shift_of(kind=kind, identity_first=False)
    assert torch.equal(images(with_identity.tasks[0].train), images(DIGITS.train))
    assert not torch.equal(images(without.tasks[0].train), images(DIGITS.train))
    assert same_task(with_identity.tasks[1], without.tasks[1])


def test_a_permutation_moves_whole_pixels() -> None:
    image = torch.stack([torch.arange(12), torch.arange(12) + 100]).to(torch.uint8).view(1, 2, 3, 4)
    moved = pixel_permutation((2, 3, 4), 0, 1)(image)
    assert torch.equal(moved[0, 0].flatten().sort().values, torch.arange(12).to(torch.uint8))
    assert torch.equal(moved[0, 1], moved[0, 0] + 100)
    assert not torch.equal(moved, image)


def test_permutations_are_stable() -> None:
    assert pixel_permutation((1, 3, 3), 0, 1).source.value.tolist() == [2, 1, 6, 3, 7, 8, 4, 0, 5]


@pytest.mark.parametrize("shape", [(8, 8), (7, 7)])
def test_quarter_turns_are_exact(shape: tuple[int, int]) -> None:
    image = torch.randint(256, (3, 2, *shape), dtype=torch.uint8)
    for quarters in range(-1, 5):
        assert torch.equal(Rotation(90.0 * quarters)(image), torch.rot90(image, quarters, dims=(2, 3)))


def test_rotation_keeps_the_shape_of_wide_images() -> None:
    image = torch.zeros(1, 1, 21, 41, dtype=torch.uint8)
    image[0, 0, 10, 25] = 255  # five pixels to the right of the centre
    turned = Rotation(90.0)(image)
    assert turned[0, 0].nonzero().tolist() == [[5, 20]]  # five pixels above it


def test_rotation_interpolates_between_the_four_neighbours() -> None:
    image = torch.zeros(1, 1, 3, 3, dtype=torch.uint8)
    image[0, 0, 1, 2] = 200
    turned = Rotation(45.0)(image)[0, 0]
    # The centre of the upper right pixel comes from (x, y) = (0, -sqrt 2) turned back: (sqrt 2, 0) is 0.41 beyond.
    assert turned[0, 2].item() == round(200 * (2 - 2**0.5))
    assert turned[1, 1].item() == 0


def test_angles() -> None:
    stream = shift_of(n_tasks=200, max_angle=90.0, identity_first=False)
    angles = torch.tensor([task.train.shift.degrees for task in stream.tasks])
    assert angles.min() >= 0 and angles.max() < 90 and len(angles.unique()) == 200
    assert abs(angles.mean() - 45) < 3 * 90 / 12**0.5 / 200**0.5
    assert all(task.train.shift is None for task in shift_of(max_angle=0.0).tasks)


def test_shifts_are_small_and_picklable() -> None:
    stream = shift_of(kind="permuted")
    images(stream.tasks[1].train)  # a copy for the device now exists
    shift = pickle.dumps(stream.tasks[1].train.shift)
    assert len(shift) < 64 * 8 + 1000
    assert torch.equal(pickle.loads(shift)(DIGITS.test.images), images(stream.tasks[1].test))


def test_impossible_shifts_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^scenario.setting: scenario=domain_shift cannot be 'cil'; set it to dil or til"
    ):
        shift_of(setting="cil")
    features = replace(DIGITS, train=TensorSplit(torch.zeros(4, 9), torch.arange(4)), shape=(9,))
    with pytest.raises(ConfigError, match="^scenario=domain_shift: needs images"):
        shift_of(features)


def test_task_incremental_domains_have_classes_of_their_own() -> None:
    shared, own = shift_of(kind="permuted"), shift_of(kind="permuted", setting="til", order=orders.reverse)
    assert own.num_classes == 30 and len(own.class_names) == 30 and own.class_names[13] == "3"
    for task in own.tasks:
        twin = shared.tasks[task.id]
        assert task.classes.tolist() == [10 * task.id + k for k in range(10)]
        assert torch.equal(task.train.y, twin.train.y + 10 * task.id) and torch.equal(
            images(task.val), images(twin.val)
        )
    assert own.candidates(2)[0].nonzero()[:, 0].tolist() == list(range(20, 30))
    assert own.class_order == tuple(range(30))


# --- dataset_sequence


def part(name: str, rows: list[int], mean: float = 0.0, std: float = 1.0, offset: int = 0) -> Dataset:
    """Some rows of the digits as a part of a larger data set, its labels moved by `offset`."""
    splits = {
        which: replace(split := getattr(DIGITS, which), labels=split.labels + offset).select(torch.tensor(rows))
        for which in ("train", "test", "val")
    }
    return replace(DIGITS, name=name, mean=(mean,), std=(std,), num_classes=10 + offset, **splits)


def whole_of(*parts: Dataset) -> Dataset:
    size = max(p.num_classes for p in parts)
    facts = {"mean": (0.5,), "std": (0.25,), "class_names": tuple(map(str, range(size)))}
    return replace(DIGITS, name="whole", num_classes=size, parts=parts, **facts)


DOMAINS = whole_of(part("day", list(range(40))), part("night", list(range(40, 90))))
SETS = whole_of(part("digits", list(range(60)), 0.3, 0.4), part("more", list(range(60)), 0.1, 0.2, offset=10))


def test_a_sequence_of_domains() -> None:
    stream = dataset_sequence(DOMAINS, orders.reverse, Plain(), setting="dil")
    assert [(task.id, task.name, len(task.train)) for task in stream.tasks] == [(1, "night", 50), (0, "day", 40)]
    assert stream.num_classes == 10 and all(task.classes.tolist() == list(range(10)) for task in stream.tasks)
    assert torch.equal(images(stream.tasks[1].train), images(DIGITS.train)[:40])
    assert stream.tasks[0].train.images is DIGITS.train.images
    assert all(set(whole.t.tolist()) == {0} for whole in stream.tasks[0].val.batches(64, view="raw"))
    own = dataset_sequence(DOMAINS, orders.canonical, Plain(), setting="til")
    assert own.num_classes == 20 and own.tasks[1].classes.tolist() == list(range(10, 20))
    assert torch.equal(own.tasks[1].test.y, DOMAINS.parts[1].test.y + 10)


@pytest.mark.parametrize("setting", ["til", "cil"])
def test_a_sequence_of_data_sets(setting: str) -> None:
    stream = dataset_sequence(SETS, orders.canonical, Plain(), setting=setting)
    assert [task.classes.tolist() for task in stream.tasks] == [list(range(10)), list(range(10, 20))]
    assert stream.num_classes == 20 and stream.class_order == tuple(range(20))
    assert set(stream.tasks[1].train.y.tolist()) == set(range(10, 20))


@pytest.mark.parametrize(
    ("dataset", "setting", "said"),
    [
        (DIGITS, "cil", "scenario=dataset_sequence: digits does not consist of several data sets or domains"),
        (DOMAINS, "cil", r"scenario.setting: whole consists of domains .* cannot be 'cil'; set it to til or dil"),
        (SETS, "dil", r"scenario.setting: whole consists of data sets .* cannot be 'dil'; set it to til or cil"),
    ],
)
def test_sequences_of_the_other_kind_are_refused(dataset: Dataset, setting: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}"):
        dataset_sequence(dataset, orders.canonical, Plain(), setting=setting)


def test_each_data_set_is_normalised_by_its_own_constants() -> None:
    def eval_of(by_dataset: bool, k: int) -> torch.Tensor:
        transform = ImageTransform(
            (1, 8, 8), (1, 8, 8), mean=(0.5,), std=(0.25,), augmentations=(), by_dataset=by_dataset
        )
        stream = dataset_sequence(SETS, orders.canonical, transform, setting="cil")
        return next(stream.tasks[k].test.batches(60)).x

    pixels = images(SETS.parts[0].test).double() / 255
    for k, (mean, std) in enumerate(((0.3, 0.4), (0.1, 0.2))):
        expected = ((pixels - mean) / std).float()
        torch.testing.assert_close(eval_of(True, k), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(eval_of(False, 1), ((pixels - 0.5) / 0.25).float(), atol=1e-5, rtol=0)


def test_standardised_images_pickle_and_stay_unchanged_when_nothing_differs() -> None:
    image = torch.randint(256, (2, 1, 4, 4), dtype=torch.uint8)
    same = Standardised.of((0.3,), (0.2,), (0.3,), (0.2,))
    torch.testing.assert_close(pickle.loads(pickle.dumps(same))(image), image.float())


# --- names


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["0", "1"], "0/1"),
        (["a"], "a"),
        (["a", "b", "c", "d"], "a..d"),
        (["beaver", "dolphin", "otter", "seal", "whale"], "beaver..whale"),
        (["aquarium_fish", "flatfish"], "aquariu/flatfis"),
        (["a_very_long_class_name"], "a_very_long_clas"),
    ],
)
def test_task_names(names: list[str], expected: str) -> None:
    assert task_name(names) == expected


def test_names_of_streams() -> None:
    assert [task.name for task in split_of(n_tasks=2, sizes=[7, 3]).tasks] == ["0..6", "7/8/9"]
    assert [task.name for task in shift_of(kind="permuted").tasks] == ["perm 0", "perm 1", "perm 2"]
    rotated = shift_of().tasks
    assert rotated[0].name == "rot 0" and rotated[1].name == f"rot {rotated[1].train.shift.degrees:.0f}"
