"""Data sets as loaders return them, what kind of data they hold, tasks, and the stream of tasks with its masks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from clrun.data.captions import Captions, captions
from clrun.data.schema import Metric, Schema
from clrun.data.split import Plain, Split, Transform

Setting = Literal["til", "cil", "dil", "open"]  # "open" only for evaluations
Order = Callable[[int], list[int]]
Shift = Callable[[Tensor], Tensor]  # stored rows [B, ...] -> stored rows of a domain
ShiftKind = Literal["permuted", "rotated"]


@dataclass(frozen=True)
class Dataset:
    """What a loader returns: splits in data-set order and the facts that scenarios and transforms need.

    Attributes:
        name: short name, as in `dataset=NAME`.
        train: training rows, without the validation rows.
        test: test rows.
        val: validation rows cut from the training rows; None without.
        num_classes: C.
        class_names: C names.
        shape: (channels, height, width) of the stored images, (D,) of feature rows.
        mean: mean of each channel, in [0, 1] units; () scales pixels to [0, 1] and no further.
        std: standard deviation of each channel, likewise.
        augment: names of the training augmentations, in order (see `clrun.data.transforms`).
        groups: named partitions of the classes (superclasses, alphabets), for `scenario=fixed_groups`.
        group_names: by name of a partition, the names of its groups, which tasks are then called; groups of others are
            called by their classes.
        sort: how the loader sorted names of classes that the user has chosen, "text" or "natural"; None for a data set
            that numbers its classes itself.
        seed: `dataset.seed`; drives validation split, permutations, rotations and generated images only.
        parts: the data sets that this one consists of, for `scenario=dataset_sequence`: domains of the same classes, or
            data sets with classes of their own. Their labels, `num_classes` and `class_names` are those of the whole,
            they usually share its stored images, and each has its own `name`; () for a data set without parts.
        reading: what a user should know about how the images were read, such as the range of 16-bit files; "" for none.
        captions: names and templates of the classes as text; None for the names alone, in `clrun.data.captions.PLAIN`.
        modality: what kind of data the rows are; None for what `clrun.data.modality.modality_of` finds by `shape`.
        schema: how a task on texts is put into words; None for texts and names of classes as they are.
    """

    name: str
    train: Split
    test: Split
    num_classes: int
    class_names: tuple[str, ...]
    shape: tuple[int, ...]
    val: Split | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    augment: tuple[Any, ...] = ()
    groups: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    group_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sort: Literal["text", "natural"] | None = None
    seed: int = 0
    parts: tuple["Dataset", ...] = ()
    reading: str = ""
    captions: Captions | None = None
    modality: "Modality | None" = None
    schema: Schema | None = None

    @property
    def texts(self) -> Captions:
        """The captions of the classes."""
        return self.captions or captions(self.name, self.class_names)


class Fitted(NamedTuple):
    """A data set as a backbone reads it.

    Attributes:
        dataset: the data set whose rows `transform` takes; the one that was loaded where nothing is stored otherwise.
        transform: how stored rows become network input.
        line: one line that describes this.
        row: what one row is called where its cost is stated, such as "image".
    """

    dataset: Dataset
    transform: Transform
    line: str
    row: str


@dataclass(frozen=True)
class ShownText:
    """A text as `job=preview` shows it.

    Attributes:
        text: as stored.
        tokens: the tokens that the network sees.
        missing: how many further tokens are cut off.
    """

    text: str
    tokens: tuple[str, ...]
    missing: int


@dataclass(frozen=True)
class Samples:
    """Some rows of a task as `job=preview` shows them.

    Attributes:
        labels: [k] long, class ids.
        images: [k, C, H, W] as the network sees them, values 0..255; None for texts.
        training: likewise as augmented for training; None when training does not augment.
        texts: k texts; () for images.
    """

    labels: Tensor
    images: Tensor | None = None
    training: Tensor | None = None
    texts: tuple[ShownText, ...] = ()


class Modality(Protocol):
    """What kind of data the rows of a data set are: the only place that knows.

    `clrun.data.modality` has those of clrun. Tasks, splits, memories, caches, training and evaluation treat rows of any
    kind alike.

    Attributes:
        unit: what one row is called in messages and reports, such as "image".
    """

    unit: ClassVar[str]

    def fit(self, dataset: Dataset, backbone: nn.Module) -> Fitted:
        """Return the data set as the backbone reads it.

        Raises:
            ConfigError: the rows, or the options of the data set, do not suit the backbone.
        """

    def blank(self, dataset: Dataset, backbone: nn.Module) -> Tensor:
        """Return one legal row [1, ...] as the backbone takes it, to try a user's backbone on."""

    def problem(self, split: Split, dataset: Dataset) -> str | None:
        """Return what is wrong with the rows that a user's loader has given; None when nothing is."""

    def shifts(
        self, dataset: Dataset, n_tasks: int, kind: ShiftKind, *, identity_first: bool, max_angle: float
    ) -> list[tuple[str, Shift | None]]:
        """Return the name and the shift of each task of `scenario=domain_shift`; see there.

        Raises:
            ConfigError: rows of this kind have no such shifts.
        """

    def samples(self, split: Split, rows: Tensor, transform: Transform, generator: torch.Generator) -> Samples | None:
        """Return what `job=preview` shows of some rows; None for rows that cannot be shown.

        Args:
            split: training rows of a task.
            rows: [k] long, rows of the split.
            transform: how they become network input.
            generator: draws the augmentations.
        """


@dataclass(frozen=True)
class Task:
    """One task of a stream.

    Attributes:
        index: position in the stream, from 0.
        id: identity, the same in every order.
        name: short text for tables and pictures.
        classes: [k] class ids present in the task (all classes in the domain-incremental setting).
        train: training rows.
        test: test rows.
        val: validation rows; None without.
    """

    index: int
    id: int
    name: str
    classes: Tensor
    train: Split
    test: Split
    val: Split | None = None


@dataclass(frozen=True)
class Stream:
    """Tasks in the order in which they are learned.

    Attributes:
        tasks: T tasks by position.
        num_classes: C, of the whole data set.
        setting: "til", "cil" or "dil": which classes compete in the training loss.
        class_names: C names.
        class_order: class ids in the order in which the scenario dealt them to tasks.
        transform: how stored images become network input, shared by all splits.
        captions: names and templates of the classes as text, by class id; None for a stream made without a data set.
        metric: what counts as a correct answer of a method that writes texts (`clrun.data.schema`).
    """

    tasks: tuple[Task, ...]
    num_classes: int
    setting: Setting
    class_names: tuple[str, ...] = ()
    class_order: tuple[int, ...] = ()
    transform: Transform = field(default_factory=Plain)
    captions: Captions | None = None
    metric: Metric = "accuracy"

    @property
    def order(self) -> tuple[int, ...]:
        """Task ids by position."""
        return tuple(task.id for task in self.tasks)

    def candidates(self, learned: int, setting: Setting | None = None) -> Tensor:
        """Return [T, C] bool: the classes that compete for a sample of each task after `learned` tasks.

        In the class- and domain-incremental settings each row has every class seen so far. In the task-incremental
        setting row t has only those of them that belong to task t. With "open" every class competes, learned or not.
        """
        if setting == "open":
            return self.members.any(dim=0).repeat(len(self.tasks), 1)
        seen = self.members[:learned].any(dim=0)
        return self.members & seen if (setting or self.setting) == "til" else seen.repeat(len(self.tasks), 1)

    @cached_property
    def members(self) -> Tensor:
        """[T, C] bool: the classes of each task."""
        members = torch.zeros(len(self.tasks), self.num_classes, dtype=torch.bool)
        for task in self.tasks:
            members[task.index, task.classes.cpu()] = True
        return members
