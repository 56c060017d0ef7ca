"""What a configuration names, built: data set, stream, backbone, method and budget, fitted to each other."""

import copy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch import nn

from clrun.blocks.inject import COMPILED
from clrun.config.job import Job
from clrun.config.signature import locate
from clrun.data.edge import edge
from clrun.data.feature_cache import FeatureCache
from clrun.data.features import frozen_features, module_digest, open_cache
from clrun.data.orders import canonical
from clrun.data.split import Plain, Split, TensorSplit, Transform
from clrun.data.stream import Dataset, Stream, Task
from clrun.data.transforms import fit_transform
from clrun.learning.budget import Budget
from clrun.learning.method import Method
from clrun.running.backbone_reuse import fact, reuse
from clrun.running.similarity import task_similarities
from clrun.system.errors import ConfigError
from clrun.system.hardware import Hardware
from clrun.system.seeding import seed_all

Config = Mapping[str, Any]


@dataclass
class Built:
    """What a configuration names, built.

    Attributes:
        images: the stream of images.
        stream: what the method learns from: `images`, or the features of the frozen backbone.
        backbone: the backbone as loaded.
        method: the learner before its first task.
        budget: what a fit may spend.
        input: what was done to fit the images to the backbone, one line.
        cache: where the features of the frozen backbone came from; None for none.
    """

    images: Stream
    stream: Stream
    backbone: nn.Module
    method: Method
    budget: Budget
    input: str
    cache: FeatureCache | None = None

    @property
    def apart(self) -> tuple[nn.Module, ...]:
        """The backbone where the method was given its features instead: the method does not hold it then."""
        return () if self.stream is self.images else (self.backbone,)


def make(node: Config, kind: type = object) -> Any:
    """Instantiate a `_target_` node with plain containers.

    Raises:
        ConfigError: a user's mistake found on the way; what the target gives is not of the `kind`.
    """
    try:
        made = instantiate(dict(node), _convert_="all")
    except InstantiationException as error:
        raise error.__cause__ or error from None
    return of_kind(made, kind, node["_target_"])


def of_kind(made: Any, kind: type, name: str) -> Any:
    """Return what the target `name` has given.

    Raises:
        ConfigError: it is not of the `kind`.
    """
    if not isinstance(made, kind):
        raise ConfigError(f"{name} gives {type(made).__name__}, expected {kind.__module__}.{kind.__name__}")
    return made


def build(config: Config, hardware: Hardware, *, features: bool = True) -> Built:
    """Build data set, stream, backbone, method and budget on the device.

    Args:
        config: resolved and checked.
        hardware: the device.
        features: compute or look up the features of a frozen backbone for a learner that reads them; else it is given
            backbone and images, which is the same to it but for the time.

    Raises:
        ConfigError: the parts do not fit together, or data or weights are missing.
    """
    backbone, images, text = build_images(config, hardware)
    stream, seen = images, backbone
    learner = _learner(config)
    cache: FeatureCache | None = None
    if learner.reads_features(config["method"]) and features:
        job: Job = make(config["job"], Job)
        cache = open_cache(job.feature_cache, hardware, _names(config, text))
        digest = fact(backbone, "digest", lambda: module_digest(backbone))
        stream, seen = frozen_features(images, backbone, hardware, cache, digest=digest, show=job.progress)
    seed_all(config["seed"], "init", "method")
    method: Method = make(config["method"])(seen, stream.num_classes)
    method.check(images)
    budget: Budget = make(config["budget"], Budget)
    hooks = method.hooks_backbone or hasattr(getattr(budget.optimizer, "func", budget.optimizer), "watch")
    if hardware.compile and hooks:
        raise ConfigError(COMPILED)
    method.check_budget(budget)
    if (tuning := make(config["job"], Job).tuning) is not None:
        tuning.check(budget)
    return Built(images, stream, backbone, method, budget, text, cache)


def _learner(config: Config) -> type[Method]:
    """Return the class of the method.

    Raises:
        ConfigError: it is none.
    """
    learner = locate(name := config["method"]["_target_"])
    if not (isinstance(learner, type) and issubclass(learner, Method)):
        raise ConfigError(f"method: {name} is no subclass of clrun.learning.method.Method")
    return learner


def _dataset(config: Config) -> Dataset:
    """Return the data set; the rows of one that is not clrun's own are looked at.

    Raises:
        ConfigError: the loader gives something else, or rows that cannot be used.
    """
    dataset, name = make(config["dataset"]), config["dataset"]["_target_"]
    if not isinstance(dataset, Dataset):
        what = f"{name} returns a {type(dataset).__name__}"
        raise ConfigError(f"dataset: {what}, not a clrun.data.stream.Dataset, which clrun.data.reading.assemble makes")
    if not name.startswith("clrun."):
        for part, split in (("train", dataset.train), ("test", dataset.test)):
            if problem := _rows_problem(split, dataset):
                raise ConfigError(f"dataset: {name} gives {part} rows with {problem}")
    return dataset


def _rows_problem(split: Split, dataset: Dataset) -> str | None:
    """Return what is wrong with the rows of a split; None for nothing."""
    images, labels = split.images, split.labels
    if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64 or labels.dim() != 1:
        return f"labels of {_kind(labels)}, expected a tensor [N] of torch.int64"
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < dataset.num_classes:
        found = f"labels from {int(labels.min())} to {int(labels.max())}"
        return f"{found}, expected 0 to {dataset.num_classes - 1} (num_classes is {dataset.num_classes})"
    if not all(spread > 0 for spread in dataset.std):
        return f"the standard deviations {dataset.std}, expected numbers above 0"
    if not isinstance(split, TensorSplit) or len(dataset.image_shape) == 1:
        return None
    wrong = not isinstance(images, torch.Tensor) or images.dtype != torch.uint8 or images.dim() != 4
    if wrong or images.shape[1] > 4 >= images.shape[3]:  # channels last
        return f"images of {_kind(images)}, expected a tensor [N, C, H, W] of torch.uint8, 0 to 255"
    return None


def _kind(value: Any) -> str:
    return f"{list(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__


@contextmanager
def naming_foreign(config: Config) -> Iterator[None]:
    """Add to the traceback of an exception the parts of the run that are not clrun's own: it may not show their files.

    A method's wrong loss, say, fails after the method has returned it.
    """
    try:
        yield
    except Exception as error:
        if found := _foreign(config):
            error.add_note(f"In a run with {found}")
        raise


def _foreign(config: Config) -> str:
    """Return the parts of the run that are not clrun's own, with their files."""
    found = []
    for group, node in config.items():
        name = node.get("_target_", "") if isinstance(node, Mapping) else ""
        if name and name.partition(".")[0] not in ("clrun", "torch"):
            part = locate(name)
            found.append(f"{group}={name} ({getattr(sys.modules.get(part.__module__), '__file__', 'no file')})")
    return ", ".join(found)


def _names(config: Config, text: str) -> dict[str, str]:
    """Return the names under which features are listed."""
    short = {group: config[group]["_target_"].rpartition(".")[2] for group in ("dataset", "backbone")}
    return {**short, "backbone": config["backbone"].get("name") or short["backbone"], "input": text}


def build_images(config: Config, hardware: Hardware | None) -> tuple[nn.Module, Stream, str]:
    """Build the backbone, the stream of images fitted to it, and the line that says how; on the device, if any."""
    dataset = _dataset(config)

    def new() -> nn.Module:
        seed_all(config["seed"], "init", "backbone")
        backbone: nn.Module = make(config["backbone"])(dataset.image_shape)
        _check_features(backbone, config["backbone"]["_target_"], dataset.image_shape)
        if hardware is not None:
            hardware.place(backbone)
        return backbone

    key = repr([config["backbone"], dataset.image_shape, config["seed"], hardware])
    learner = _learner(config)
    backbone = reuse(key, new) if learner.reads_features(config["method"]) else new()
    transform, text = fit_transform(dataset, backbone)
    stream = _stream(config, dataset, _order(config, dataset, transform, backbone), transform)
    return backbone, _limited(stream, make(config["job"], Job), hardware), text


def _stream(config: Config, dataset: Dataset, order: Any, transform: Transform) -> Stream:
    """Return the stream of tasks."""
    found: Stream = of_kind(make(config["scenario"])(dataset, order, transform), Stream, config["scenario"]["_target_"])
    return found


def _check_features(backbone: nn.Module, name: str, image_shape: tuple[int, ...]) -> None:
    """Refuse a backbone without `num_features`; one that is not clrun's own is tried on one black image, in a copy.

    Raises:
        ConfigError: see above, or its features are not [B, num_features].
    """
    width = getattr(backbone, "num_features", None)
    if not isinstance(width, int):
        raise ConfigError(f"backbone: {name} has no num_features; set self.num_features to the width of its features")
    if name.startswith("clrun."):
        return
    with torch.no_grad():
        image = torch.zeros(1, *(getattr(backbone, "input_size", None) or image_shape))
        features = copy.deepcopy(backbone).eval()(image)
    if features.shape != (1, width):
        shape = f"[B, {', '.join(map(str, features.shape[1:]))}]"
        raise ConfigError(f"backbone: {name} returns features {shape}, expected [B, num_features] = [B, {width}]")


def _order(config: Config, dataset: Dataset, transform: Transform, backbone: nn.Module) -> Any:
    """Return the order of tasks; one by how alike tasks are is told how alike they are."""
    order = make(config["task_order"])
    if getattr(order, "func", order) is not edge:
        return order
    stream = _stream(config, dataset, canonical, transform)
    found = task_similarities(stream, backbone, config["task_order"]["similarity"])
    return partial(order, similarities=found)


def preflight(config: Config) -> None:
    """Find mistakes that need the data (too many tasks, an order that is no permutation) or the machine.

    The backbone is not built; a factory that can tell cheaply what would go wrong has an attribute `preflight`, which
    is called with its options.

    Raises:
        ConfigError: one was found; nothing was written.
    """
    hardware: Hardware = make(config["hardware"], Hardware)
    hardware.setup()
    stream = _stream(config, _dataset(config), make(config["task_order"]), Plain())
    job: Job = make(config["job"], Job)
    _limited(stream, job, None)
    backbone = make(config["backbone"])
    ready = getattr(getattr(backbone, "func", backbone), "preflight", None)
    if ready is not None and job.mode != "preview":
        ready(**getattr(backbone, "keywords", {}))


def _limited(stream: Stream, job: Job, hardware: Hardware | None) -> Stream:
    """Return the first `job.max_tasks` tasks, with their rows on the device."""
    tasks = stream.tasks[: job.max_tasks]
    if job.eval_split == "val" and any(task.val is None for task in tasks):
        raise ConfigError("job.eval_split=val: there are no validation rows; set dataset.val_fraction above 0")
    if job.tuning is not None and any(not task.val for task in tasks):
        raise ConfigError("job.tuning: needs validation rows of every task; set dataset.val_fraction above 0, e.g. 0.1")
    if hardware is not None:
        tasks = _Placed(hardware.device, hardware.workers or 0).tasks(tasks)
    return Stream(tasks, stream.num_classes, stream.setting, stream.class_names, stream.class_order, stream.transform)


class _Placed:
    """Moves splits to the device; images that several splits share are moved once."""

    def __init__(self, device: str, workers: int) -> None:
        self.device, self.workers = device, workers
        self.moved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def tasks(self, tasks: tuple[Task, ...]) -> tuple[Task, ...]:
        """Return the tasks with every in-memory split on the device."""
        return tuple(
            Task(t.index, t.id, t.name, t.classes, self.split(t.train), self.split(t.test), t.val and self.split(t.val))
            for t in tasks
        )

    def split(self, split: Split) -> Split:
        """Return the split on the device; one that reads files is told how many workers decode them."""
        if not isinstance(split, TensorSplit):
            return split.to(self.device, workers=self.workers)
        images = self.moved.setdefault(id(split.images), (split.images, split.images.to(self.device)))[1]
        return TensorSplit(images, split.labels, split.rows, split.positions, split.transform, split.shift).to(
            self.device
        )
