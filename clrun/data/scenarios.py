"""Scenarios cut a data set into tasks: each task has an id that no order changes, and its own classes, domain or part.

A scenario is called as `scenario(dataset, order, transform)`; `order` permutes the task ids, and nothing else about a
task depends on its position. Randomness is keyed by `class_seed` or (`dataset.seed`, task id).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Annotated, Literal

import torch

from clrun.data.modality import modality_of
from clrun.data.orders import numpy_permutation, python_permutation
from clrun.data.reading.class_names import Sort, in_order
from clrun.data.shifts import Standardised
from clrun.data.split import Split, Transform
from clrun.data.stream import Dataset, Order, Setting, Shift, Stream, Task
from clrun.system.errors import ConfigError, PositiveInt, Range, did_you_mean, warn
from clrun.system.seeding import derive

NAME_LENGTH = 16
SORTS: dict[Sort, Sort] = {"text": "natural", "natural": "text"}
CLASS_ORDERS: dict[str, Callable[[int, int], list[int]]] = {
    "numpy_seed": numpy_permutation,
    "python_seed": python_permutation,
}


def class_split(
    dataset: Dataset,
    order: Order,
    transform: Transform,
    *,
    n_tasks: PositiveInt | None,
    first: PositiveInt | None,
    sizes: list[int] | None,
    class_seed: int | None,
    class_order: list[int] | Mapping[str, int] | None,
    setting: Literal["til", "cil"],
) -> Stream:
    """Return a stream of tasks with classes of their own; task id k is the k-th block of the class order.

    Args:
        dataset: the data set.
        order: permutes the task ids.
        transform: how stored images become network input.
        n_tasks: T. If T does not divide the number of classes, the sizes differ by one and larger tasks have smaller
            ids. None only with `sizes`.
        first: number of classes of task 0; the other classes are divided evenly among the other tasks. None to divide
            all classes evenly.
        sizes: classes of each task by id, summing to C; None to compute them.
        class_seed: draws the order in which classes are dealt to tasks; None deals them by ascending id.
        class_order: the order itself, a list of all class ids; or {"numpy_seed": s}, the permutation that PyCIL, PILOT
            and their relatives draw from NumPy's old generator; or {"python_seed": s}, Python's, as in CODA-Prompt.
            The ids of the classes stay those of the data set; only their order of appearance changes.
        setting: "til" or "cil".

    Raises:
        ConfigError: the sizes are impossible, the class order is not a permutation, or the setting is another one.
    """
    _check_setting("class_split", setting, ("til", "cil"))
    if class_order is not None:
        _warn_of_numbers(dataset, "scenario.class_order")
    blocks = _sizes(dataset.num_classes, n_tasks, first, sizes)
    classes = _class_order(dataset.num_classes, class_seed, class_order)
    stops = list(accumulate(blocks))
    groups = [classes[stop - size : stop] for size, stop in zip(blocks, stops, strict=True)]
    return _class_stream(dataset, order, transform, groups, setting)


def _sizes(num_classes: int, n_tasks: int | None, first: int | None, sizes: Sequence[int] | None) -> list[int]:
    """Return the number of classes of each task by id."""
    if sizes is not None:
        return _listed_sizes(num_classes, n_tasks, first, sizes)
    if n_tasks is None:
        raise ConfigError("scenario.n_tasks: must be given unless scenario.sizes lists the classes of each task")
    if first is not None and first > num_classes:
        raise ConfigError(f"scenario.first: must be at most {num_classes} (the classes of the data set), got {first}")
    head = [] if first is None else [first]
    left = num_classes - sum(head)
    fewest, most = len(head) + (left > 0), len(head) + left
    if not fewest <= n_tasks <= most:
        what = f"{num_classes} classes" + (f" with {first} of them in task 0 (scenario.first)" if head else "")
        raise ConfigError(f"scenario.n_tasks: {what} make {fewest} to {most} tasks, got {n_tasks}")
    others = n_tasks - len(head)
    return head + [left // others + (k < left % others) for k in range(others)]


def _class_order(num_classes: int, seed: int | None, order: Sequence[int] | Mapping[str, int] | None) -> list[int]:
    """Return the class ids in the order in which they are dealt to tasks."""
    if order is None:
        classes = list(range(num_classes))
        return classes if seed is None else sorted(classes, key=lambda c: derive(seed, "class_order", c))
    if seed is not None:
        raise ConfigError(
            "scenario.class_seed: conflicts with scenario.class_order (both fix the class order); set one of them to "
            "null"
        )
    if isinstance(order, Mapping):
        if len(order) != 1 or not order.keys() <= CLASS_ORDERS.keys():
            raise ConfigError(
                f"scenario.class_order: must be a list of class ids, or one of {', '.join(CLASS_ORDERS)} with a seed, "
                f"got {dict(order)}"
            )
        [(kind, value)] = order.items()
        if not 0 <= value < 2**32:
            raise ConfigError(f"scenario.class_order.{kind}: must be between 0 and {2**32 - 1}, got {value}")
        return CLASS_ORDERS[kind](num_classes, value)
    if sorted(order) != list(range(num_classes)):
        raise ConfigError(f"scenario.class_order: must name each of the classes 0 to {num_classes - 1} exactly once")
    return list(order)


def _warn_of_numbers(dataset: Dataset, option: str) -> None:
    """Warn that an option names classes by ids whose meaning depends on how numbers in their names are sorted.

    A published order was made for one of both readings, and the other one gives other tasks without any error.
    """
    if dataset.sort is None:
        return
    here, there = dataset.sort, SORTS[dataset.sort]
    others = in_order(dataset.class_names, there)
    label = next((k for k, pair in enumerate(zip(dataset.class_names, others, strict=True)) if len({*pair}) > 1), None)
    if label is None:
        return
    words = {"text": "as text, as torchvision's ImageFolder does", "natural": "as numbers"}
    warn(
        f"{option}: names of the classes have numbers in them. With dataset.sort={here} they are sorted {words[here]}, "
        f"and class id {label} is '{dataset.class_names[label]}'; sorted {words[there]}, it would be '{others[label]}'."
        f" If the ids were published for that, set dataset.sort={there}"
    )


def _listed_sizes(num_classes: int, n_tasks: int | None, first: int | None, sizes: Sequence[int]) -> list[int]:
    """Return the listed sizes after checking them against the other options and the number of classes."""
    if first is not None:
        raise ConfigError(
            "scenario.first: conflicts with scenario.sizes (both fix the size of task 0); set one of them to null"
        )
    if n_tasks is not None and n_tasks != len(sizes):
        raise ConfigError(
            f"scenario.n_tasks: {n_tasks} does not match the {len(sizes)} tasks of scenario.sizes; "
            "set scenario.n_tasks=null"
        )
    if any(size < 1 for size in sizes) or sum(sizes) != num_classes:
        raise ConfigError(
            f"scenario.sizes: must be positive and sum to the {num_classes} classes of the data set, "
            f"got {list(sizes)} with sum {sum(sizes)}"
        )
    return list(sizes)


def fixed_groups(
    dataset: Dataset,
    order: Order,
    transform: Transform,
    *,
    groups: str | list[list[int]],
    setting: Literal["til", "cil"],
) -> Stream:
    """Return a stream whose task id k is the k-th of the given groups of classes.

    Args:
        dataset: the data set; its own groups can be named. Classes in no group are left out.
        order: permutes the task ids.
        transform: how stored images become network input.
        groups: lists of class ids, or the name of one of the data set's groups.
        setting: "til" or "cil".

    Raises:
        ConfigError: no such name; an empty group; a class id out of range or in two groups; another setting.
    """
    _check_setting("fixed_groups", setting, ("til", "cil"))
    if not isinstance(groups, str):
        _warn_of_numbers(dataset, "scenario.groups")
    found = _named_groups(dataset, groups) if isinstance(groups, str) else [list(group) for group in groups]
    _check_groups(found, dataset.num_classes)
    names = dataset.group_names.get(groups, ()) if isinstance(groups, str) else ()
    return _class_stream(dataset, order, transform, found, setting, names)


def _named_groups(dataset: Dataset, name: str) -> list[list[int]]:
    """Return the groups that the data set calls `name`."""
    if name not in dataset.groups:
        known = ", ".join(dataset.groups) or "none; list the class ids instead"
        hint = did_you_mean(name, dataset.groups)
        raise ConfigError(f"scenario.groups: {dataset.name} has no groups named '{name}'{hint} (available: {known})")
    return [list(group) for group in dataset.groups[name]]


def _check_groups(groups: list[list[int]], num_classes: int) -> None:
    """Refuse groups that are empty, overlap, or name classes that do not exist."""
    if not groups or not all(groups):
        raise ConfigError("scenario.groups: there must be at least one group and no group may be empty")
    seen: set[int] = set()
    for k, group in enumerate(groups):
        for label in group:
            if not 0 <= label < num_classes:
                raise ConfigError(
                    f"scenario.groups: class {label} in group {k} does not exist (0 to {num_classes - 1})"
                )
            if label in seen:
                raise ConfigError(f"scenario.groups: class {label} appears twice, the second time in group {k}")
            seen.add(label)


def domain_shift(
    dataset: Dataset,
    order: Order,
    transform: Transform,
    *,
    n_tasks: PositiveInt,
    kind: Literal["permuted", "rotated"],
    identity_first: bool,
    max_angle: Annotated[float, Range(minimum=0, maximum=360)],
    setting: Literal["dil", "til"],
) -> Stream:
    """Return a stream of tasks with all classes and all rows, where each task shifts the images in its own way.

    Args:
        dataset: a data set of images.
        order: permutes the task ids.
        transform: how stored (and shifted) images become network input.
        n_tasks: T.
        kind: "permuted" moves pixels by a fixed random permutation (the channels of a pixel stay together);
            "rotated" turns images about their centre by a fixed angle, uniform in [0, max_angle) degrees.
        identity_first: whether task id 0 has the images as stored.
        max_angle: upper end of the angles, in degrees.
        setting: "dil"; or "til", where each task has its own classes (class c of task id k is k * C + c), as for
            learners with one head per task.

    Permutation and angle of a task depend on (dataset.seed, task id) only.

    Raises:
        ConfigError: the data set has no images, or another setting.
    """
    _check_setting("domain_shift", setting, ("dil", "til"))
    shifts = modality_of(dataset).shifts(dataset, n_tasks, kind, identity_first=identity_first, max_angle=max_angle)
    blocks = [_Block(name, list(range(dataset.num_classes)), shift) for name, shift in shifts]
    return _domain_stream(dataset, order, transform, blocks, setting)


def dataset_sequence(
    dataset: Dataset, order: Order, transform: Transform, *, setting: Literal["til", "cil", "dil"]
) -> Stream:
    """Return a stream whose task id k is the k-th part of a data set that consists of several.

    If the parts have different normalisation constants and the backbone has none, the images of each part are
    standardised by those of the part. They are then float32, so that a replay buffer stores four bytes per value.

    Args:
        dataset: consists of domains of the same classes, or of data sets with classes of their own.
        order: permutes the task ids.
        transform: how stored images become network input.
        setting: "dil" for domains; "cil" for parts with classes of their own; "til" for both, where domains get their
            own classes as in `domain_shift`.

    Raises:
        ConfigError: the data set has no parts, or parts of the other kind.
    """
    if not dataset.parts:
        unit = modality_of(dataset).unit
        source = "a table with a column of domains (dataset=text_table)" if unit == "text" else "dataset=folder_domains"
        raise ConfigError(
            f"scenario=dataset_sequence: {dataset.name} does not consist of several data sets or domains; "
            f"use another scenario, or {source} for domains of your own"
        )
    classes = [sorted(set(part.train.y.tolist())) for part in dataset.parts]
    disjoint = sum(map(len, classes)) == len({label for own in classes for label in own})
    if len(classes) > 1 and setting != "til" and disjoint != (setting == "cil"):
        kind = "data sets with classes of their own" if disjoint else "domains of the same classes"
        raise ConfigError(
            f"scenario.setting: {dataset.name} consists of {kind}, which cannot be '{setting}'; "
            f"set it to {'til or cil' if disjoint else 'til or dil'}"
        )
    own = len({(part.mean, part.std) for part in dataset.parts}) > 1 and getattr(transform, "by_dataset", False)
    blocks = []
    for part, labels in zip(dataset.parts, classes, strict=True):
        shift = Standardised.of(part.mean, part.std, dataset.mean, dataset.std) if own else None
        blocks.append(_Block(part.name[:NAME_LENGTH], labels, shift, part))
    if setting == "til" and not disjoint or setting == "dil":
        return _domain_stream(dataset, order, transform, blocks, setting)
    return _stream(dataset, order, transform, blocks, setting, [label for own in classes for label in own])


@dataclass(frozen=True)
class _Block:
    """The classes, rows and shift of a task id.

    Attributes:
        name: name of the task.
        classes: ids of its classes.
        shift: change of the stored images; None for none.
        part: the data set that has its rows; None for the rows of its classes in the whole data set.
        offset: number that is added to its labels.
    """

    name: str
    classes: list[int]
    shift: Shift | None = None
    part: Dataset | None = None
    offset: int = 0


def _domain_stream(
    dataset: Dataset, order: Order, transform: Transform, blocks: list[_Block], setting: Setting
) -> Stream:
    """Return the stream of domains: all with the classes of the data set, or, task-incremental, each with its own."""
    size, names = dataset.num_classes, dataset.class_names
    everything = list(range(size))
    if setting != "til":
        blocks = [replace(block, classes=everything) for block in blocks]
        return _stream(dataset, order, transform, blocks, setting, everything)
    blocks = [
        replace(block, classes=[label + k * size for label in block.classes], offset=k * size)
        for k, block in enumerate(blocks)
    ]
    texts = dataset.texts.repeated(len(blocks))
    whole = replace(dataset, num_classes=size * len(blocks), class_names=names * len(blocks), captions=texts)
    return _stream(whole, order, transform, blocks, setting, [label for block in blocks for label in block.classes])


def _class_stream(
    dataset: Dataset,
    order: Order,
    transform: Transform,
    groups: list[list[int]],
    setting: Setting,
    names: Sequence[str] = (),
) -> Stream:
    """Return the stream whose task id k has the classes `groups[k]`, called by `names` or by its classes."""
    names = names or [task_name([dataset.class_names[label] for label in group]) for group in groups]
    blocks = [_Block(name[:NAME_LENGTH], group) for name, group in zip(names, groups, strict=True)]
    return _stream(dataset, order, transform, blocks, setting, [label for group in groups for label in group])


def _stream(
    dataset: Dataset,
    order: Order,
    transform: Transform,
    blocks: list[_Block],
    setting: Setting,
    class_order: list[int],
) -> Stream:
    """Return the stream whose task id k is `blocks[k]`."""
    tasks = []
    for index, k in enumerate(task_ids(order, len(blocks))):
        block = blocks[k]
        rows = block.part or dataset
        train, test = (_placed(split, block, index, transform) for split in (rows.train, rows.test))
        if not train or not test:
            which = "test" if train else "training"
            raise ConfigError(
                f"dataset: there are no {which} rows of task {k} ({block.name}); add {modality_of(dataset).unit}s of "
                "its classes, or cut the tasks differently (scenario)"
            )
        val = None if rows.val is None else _placed(rows.val, block, index, transform)
        tasks.append(Task(index, k, block.name, torch.tensor(block.classes), train, test, val))
    names, texts = dataset.class_names, dataset.texts
    metric = "accuracy" if dataset.schema is None else dataset.schema.metric
    return Stream(tuple(tasks), dataset.num_classes, setting, names, tuple(class_order), transform, texts, metric)


def task_ids(order: Order, n_tasks: int) -> Sequence[int]:
    """Return the task ids by position.

    Raises:
        ConfigError: the order returns something else than each id once.
    """
    ids = order(n_tasks)
    if not isinstance(ids, Sequence) or sorted(ids) != list(range(n_tasks)):
        raise ConfigError(f"task_order: must return a list of the {n_tasks} task ids, each once, got {ids!r}")
    return ids


def _placed(split: Split, block: _Block, index: int, transform: Transform) -> Split:
    """Return the rows of the task at the position `index`, in the order of the data set."""
    if block.offset:
        split = replace(split, labels=split.labels + block.offset)
    rows = torch.isin(split.y, torch.tensor(block.classes)).nonzero()[:, 0]
    if len(rows) < len(split):
        split = split.select(rows)
    return replace(split, positions=index, transform=transform, shift=block.shift)


def task_name(names: Sequence[str]) -> str:
    """Return a name of at most 16 characters for a task with these classes: "0/1", or "first..last" above three."""
    joint, shown = ("/", names) if len(names) <= 3 else ("..", [names[0], names[-1]])
    room = (NAME_LENGTH - len(joint) * (len(shown) - 1)) // len(shown)
    full = joint.join(shown)
    return full if len(full) <= NAME_LENGTH else joint.join(name[:room] for name in shown)


def _check_setting(scenario: str, setting: str, allowed: tuple[Setting, ...]) -> None:
    """Refuse a setting that the scenario does not have."""
    if setting not in allowed:
        raise ConfigError(
            f"scenario.setting: scenario={scenario} cannot be '{setting}'; set it to {' or '.join(allowed)}"
        )
