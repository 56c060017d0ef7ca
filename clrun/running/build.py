"""Builds stream, backbone and learner from the parts of a configuration and fits them to each other."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from clrun.blocks.compress.base import refuse
from clrun.blocks.inject import COMPILED
from clrun.config.job import Job
from clrun.config.signature import locate
from clrun.data.captions import Captions
from clrun.data.edge import edge
from clrun.data.feature_cache import FeatureCache
from clrun.data.features import frozen_features, module_digest, open_cache
from clrun.data.identity import Identity, identify
from clrun.data.modality import modality_of
from clrun.data.orders import canonical
from clrun.data.split import Plain, Split, TensorSplit, Transform
from clrun.data.stream import Dataset, Stream, Task
from clrun.learning.budget import Budget
from clrun.learning.hooks import made_method, warn_of_misspelt_hooks
from clrun.learning.method import Method
from clrun.learning.names import NamesHead, has_names, require_text
from clrun.learning.networks import FrozenNetwork
from clrun.running.backbone_reuse import remembered, reused_backbone
from clrun.running.held_out import HeldOut
from clrun.running.networks import check_features, check_networks, load_networks
from clrun.running.parts import Parts, function_of, of_kind, options_of
from clrun.running.similarity import task_similarities
from clrun.system.errors import ConfigError, WeightsMissing, warn
from clrun.system.hardware import Hardware
from clrun.system.seeding import seed_all

WEIGHT_OPTIONS = {"pretrained": False, "weights": None}  # of a backbone factory, for random weights


@dataclass
class Built:
    """What a configuration names, built and placed on the device.

    Attributes:
        images: the stream of images, or of whatever the data set stores.
        stream: what the learner learns from: `images`, or the features of the extractor.
        backbone: the backbone as loaded.
        method: the learner before its first task.
        budget: what a fit may spend.
        input: how the images were fitted to the backbone, one line.
        data: identity of the data set and of the tasks into which it was cut.
        row: what one row is called where its cost is stated, such as "image".
        cache: where the features of the frozen backbone are stored; None when they are not.
        networks: those that the method loads besides the backbone, by the path of their option.
        held_out: evaluates the learner on the data sets of `job.eval_extra`; None without them.
        extractor: the frozen network whose features are computed once; None where the learner reads images.
    """

    images: Stream
    stream: Stream
    backbone: nn.Module
    method: Method
    budget: Budget
    input: str
    data: Identity
    row: str
    cache: FeatureCache | None = None
    networks: dict[str, FrozenNetwork] = field(default_factory=dict)
    held_out: HeldOut | None = None
    extractor: nn.Module | None = None


def build(parts: Parts, *, features: bool = True, learns: bool = True, pretrained: bool = True) -> Built:
    """Build data set, stream, backbone, method and budget on the device of `parts.hardware`.

    Args:
        parts: of the configuration; its hardware is set up.
        features: compute or look up the features of a frozen backbone for a learner that reads them. False gives such a
            learner the backbone and images instead: its predictions are the same and take longer.
        learns: the method will learn the stream; otherwise its options are not checked against stream and budget.
        pretrained: load the weights of the backbone that the configuration names; else it has random ones.

    Raises:
        ConfigError: the parts do not fit together, or data or weights are missing.
    """
    prepared = prepare(parts, place=True, pretrained=pretrained)
    backbone, images, text, row = prepared.backbone, prepared.stream, prepared.input, prepared.row
    data = identify(prepared.dataset, prepared.whole)
    networks = load_networks(parts, prepared.dataset, images.transform)
    del prepared
    hardware = parts.hardware
    stream, seen_backbone = images, backbone
    if learns:
        _check_options(parts)
    cache: FeatureCache | None = None
    extractor = _extractor(parts, backbone) if features else None
    needs_text = _reads_text(parts, backbone)
    if extractor is not None:
        cache = open_cache(parts.job.feature_cache, parts.job.feature_cache_gb, hardware, _names(parts, text))
        stream, seen_backbone = _on_features(images, backbone, extractor, cache, parts, text=needs_text)
    method = new_method(parts, seen_backbone, stream.num_classes, networks)
    _check_head(method, backbone)
    _check_metric(parts, method, images)
    if images.captions is not None and needs_text:
        method.read_names(images.captions)
        _warn_of_cut(images.captions, backbone)
    budget = parts.budget
    if not learns:
        return Built(images, stream, backbone, method, budget, text, data, row, cache, extractor=extractor)
    method.check(images)
    if hardware.compile and (method.hooks_backbone or hasattr(function_of(budget.optimizer), "watch")):
        raise ConfigError(COMPILED)
    if parts.job.max_tasks is None:  # else the stream may lack tasks that the budget names
        budget.check_tasks([task.name for task in images.tasks])
    method.check_budget(budget)
    _check_layers(parts, method)
    tuning: Any = parts.job.tuning
    if tuning is not None:
        tuning.check(budget)
    held_out = None
    if parts.job.eval_unseen or parts.job.eval_extra:
        _require_names(parts, method, stream)
        held_out = HeldOut.of(parts, backbone, method, cache) if parts.job.eval_extra else None
    return Built(images, stream, backbone, method, budget, text, data, row, cache, networks, held_out, extractor)


def _check_layers(parts: Parts, method: Method) -> None:
    """Let the parts that read layers of the learner look at them.

    Raises:
        ConfigError: one of them cannot use the layers.
    """
    if parts.compress is not None:
        parts.compress.check(method)
    optimizer = parts.budget.optimizer
    look_at = getattr(function_of(optimizer), "look_at", None)  # of an optimizer that reads layers
    if look_at is not None:
        look_at(method, **options_of(optimizer))


def new_method(parts: Parts, backbone: nn.Module, num_classes: int, networks: dict[str, FrozenNetwork]) -> Method:
    """Return the learner before its first task, given the networks that it loads besides the backbone."""
    seed_all(parts.seed, "init", "method")
    method = made_method(parts.method_factory, backbone, num_classes)
    method.receive(networks)
    return method


@dataclass
class Prepared:
    """Backbone and data, fitted to each other.

    Attributes:
        backbone: as loaded.
        stream: the tasks of the run, as the backbone reads them.
        input: how stored rows were fitted to the backbone, one line.
        row: what one row is called where its cost is stated, such as "image".
        dataset: the data set as loaded, on the CPU.
        whole: all tasks of it in some order, with the rows as stored, on the CPU.
    """

    backbone: nn.Module
    stream: Stream
    input: str
    row: str
    dataset: Dataset
    whole: Stream


def build_images(parts: Parts, *, place: bool = True, pretrained: bool = True) -> tuple[nn.Module, Stream, str]:
    """Build the backbone, the stream of images fitted to it, and the line that says how they were fitted.

    Args:
        parts: of the configuration.
        place: put both on the device of `parts.hardware`, which is set up; else they stay on the CPU.
        pretrained: load the weights that the configuration names; else the backbone has random ones.

    Raises:
        ConfigError: the parts do not fit together, or data or weights are missing.
    """
    prepared = prepare(parts, place=place, pretrained=pretrained)
    return prepared.backbone, prepared.stream, prepared.input


def identity(parts: Parts) -> Identity:
    """Return the identity of the data of a configuration as they are now; nothing else is built.

    Raises:
        ConfigError: the data cannot be read, or the scenario cannot cut them.
    """
    dataset = parts.load_dataset()
    return identify(dataset, build_stream(parts, dataset, canonical, Plain()))


def prepare(parts: Parts, *, place: bool, pretrained: bool) -> Prepared:
    """Build the backbone and the stream, fitted to each other; see `build_images`.

    Raises:
        ConfigError: as `build_images`.
    """
    dataset = parts.load_dataset()
    hardware = parts.hardware if place else None

    def new() -> nn.Module:
        seed_all(parts.seed, "init", "backbone")
        factory = parts.backbone_factory if pretrained else _untrained(parts)
        backbone = factory(dataset.shape)
        check_features(backbone, parts.target("backbone"), dataset)
        if hardware is not None:
            hardware.place(backbone)
        return backbone

    # The factory itself is part of the key: an interactive session may define another one under the same name.
    made_from = [parts.config["backbone"], pretrained, dataset.shape, parts.seed, hardware]
    key = locate(parts.target("backbone")), repr(made_from)
    backbone = reused_backbone(key, new) if parts.reads_features else new()
    fitted, transform, text, row = modality_of(dataset).fit(dataset, backbone)
    stream = build_stream(parts, fitted, _order(parts, fitted, transform, backbone), transform)
    whole = stream if fitted is dataset else build_stream(parts, dataset, canonical, Plain())
    return Prepared(backbone, _limited(stream, parts.job, hardware), text, row, dataset, whole)


def build_stream(parts: Parts, dataset: Dataset, order: Any, transform: Transform) -> Stream:
    """Return the stream into which the scenario cuts the data set, its tasks in `order`.

    Raises:
        ConfigError: the scenario cannot cut this data set, or returns something else.
    """
    stream: Stream = of_kind(parts.scenario(dataset, order, transform), Stream, parts.target("scenario"))
    return stream


def order_reads_backbone(parts: Parts) -> bool:
    """Return whether the task order depends on features of the backbone, hence on its weights."""
    order = parts.task_order
    options = options_of(order)
    return function_of(order) is edge and options["similarity"] == "features" and options["kind"] != "random"


def check_without_building(parts: Parts) -> int | None:
    """Find mistakes that need the data (too many tasks, an order that is no permutation) or the machine.

    Returns:
        The number of tasks, when what was found holds for every order of them; else None.

    The backbone is not built; a factory that can tell cheaply what would go wrong has an attribute `preflight`, which
    is called with its options.

    Raises:
        ConfigError: one was found; nothing was written.
    """
    check_method(parts)
    parts.hardware.setup()
    stream = build_stream(parts, parts.load_dataset(), parts.task_order, Plain())
    _limited(stream, parts.job, None)
    missing = None if parts.job.mode == "preview" else missing_weights(parts)
    if missing is not None and parts.job.mode != "dry_run":
        raise missing
    return len(stream.tasks) if parts.job.max_tasks is None else None


def _reads_text(parts: Parts, backbone: nn.Module) -> bool:
    """Return whether the learner needs the texts of the classes.

    Raises:
        ConfigError: it does, and the backbone has no text tower.
    """
    if parts.method_class.needs_text:
        require_text(backbone, parts.method_class.__name__, towers=parts.method_class.needs_towers)
        return True
    return has_names(backbone)


def _require_names(parts: Parts, method: Method, stream: Stream) -> None:
    """Refuse evaluations on classes that were not learned for a learner that does not know them by their names.

    Raises:
        ConfigError: see above.
    """
    names = method.needs_text or isinstance(method.head, NamesHead)
    if names or (stream.setting == "dil" and not parts.job.eval_extra):
        return
    option = "eval_extra" if parts.job.eval_extra else "eval_unseen"
    raise ConfigError(
        f"job.{option}: {type(method).__name__} knows no class that it has not learned; choose a method that compares "
        "images with names (such as zero_shot or clip_finetune), or set backbone.head=fixed on a backbone with a text "
        "tower"
    )


def _warn_of_cut(captions: Captions, backbone: nn.Module) -> None:
    """Warn if captions have more tokens than the text tower takes."""
    joint: Any = backbone.joint
    texts = [text for label in range(len(captions.classes)) for text in captions.of(label)]
    if cut := joint.too_long(texts):
        room = joint.context_length - 2
        warn(
            f"dataset.templates: {len(cut)} of {len(texts)} captions have more than {room} tokens and are cut there, "
            f"such as '{cut[0][:60]}'"
        )


def _check_head(method: Method, backbone: nn.Module) -> None:
    """Refuse rows of class names for a learner that has a classifier of its own, or samples no names.

    Raises:
        ConfigError: see above.
    """
    if has_names(backbone) and not isinstance(method.head, NamesHead) and not method.needs_text:
        raise ConfigError(
            f"backbone.head: {type(method).__name__} has a classifier of its own; set it to linear, or choose a method "
            "that trains a head, such as method=finetune"
        )
    if isinstance(method.head, NamesHead) and method.head.negatives is not None and not method.samples_names:
        raise ConfigError(
            f"backbone.head: {type(method).__name__} has a loss of its own, which samples no names "
            f"(live_{method.head.negatives}); set it to live"
        )


def _check_metric(parts: Parts, method: Method, stream: Stream) -> None:
    """Refuse to count exactly written strings for a learner that writes none, and to differentiate them.

    Raises:
        ConfigError: see above.
    """
    if stream.metric != "exact_match":
        return
    if parts.compress is not None and parts.compress.differentiates:
        raise ConfigError(
            f"dataset.schema.metric: exact_match has no derivatives, which compress={parts.compress.name} with "
            f"scope={parts.compress.scope} needs; set it to accuracy, or choose compress=svd"
        )
    if not method.needs_decoder:
        raise ConfigError(
            f"dataset.schema.metric: exact_match needs a method that writes texts, such as text_to_text, and "
            f"{type(method).__name__} does not; set it to accuracy"
        )


def check_method(parts: Parts) -> None:
    """Find mistakes in the options of the method and of its further networks.

    Raises:
        ConfigError: one was found.
    """
    _check_options(parts)
    if parts.job.mode != "preview":
        check_networks(parts)


def _check_options(parts: Parts) -> None:
    """Look at the class of the method and its options.

    Raises:
        ConfigError: options do not suit each other.
    """
    parts.method_class.check_options(parts.config["method"])
    if parts.compress is not None:
        refuse(parts.method_class, features=parts.reads_features)
    warn_of_misspelt_hooks(parts.method_class)


def missing_weights(parts: Parts) -> WeightsMissing | None:
    """Return which file of weights the backbone wants and does not find; its factory is asked, nothing is built.

    Raises:
        ConfigError: something else is wrong with the options of the backbone.
    """
    check = getattr(function_of(parts.backbone_factory), "preflight", None)
    try:
        if check is not None:
            check(**options_of(parts.backbone_factory))
    except WeightsMissing as error:
        return error
    return None


def _extractor(parts: Parts, backbone: nn.Module) -> nn.Module | None:
    """Return the network whose features are computed once for the learner; None for a learner that reads images.

    That is the backbone of a learner that reads features of the frozen backbone. Other learners train the backbone, but
    it may name a `frozen_part`, which comes first in it and whose output it takes instead of images.
    """
    found: nn.Module | None = backbone if parts.reads_features else getattr(backbone, "frozen_part", None)
    return found


def _on_features(
    images: Stream, backbone: nn.Module, extractor: nn.Module, cache: FeatureCache | None, parts: Parts, *, text: bool
) -> tuple[Stream, nn.Module]:
    """Return the stream of the extractor's features, and the backbone that reads it.

    Args:
        images: the stream of images.
        backbone: the backbone as loaded.
        extractor: the backbone or its `frozen_part`.
        cache: stores the features; None keeps them in memory.
        parts: of the configuration.
        text: whether the captions of the classes are encoded as well.
    """
    digest = remembered(extractor, "digest", lambda: module_digest(extractor))
    stream, identity_backbone = frozen_features(
        images, extractor, parts.hardware, cache, digest=digest, text=text, show=parts.job.progress
    )
    if extractor is backbone:
        return stream, identity_backbone
    backbone.captions = identity_backbone.captions  # type: ignore[assignment]
    return stream, backbone


def _names(parts: Parts, text: str) -> dict[str, str]:
    """Return the names under which `clrun features` lists features."""
    dataset, backbone = (parts.target(group).rpartition(".")[2] for group in ("dataset", "backbone"))
    return {
        "dataset": dataset,
        "backbone": options_of(parts.backbone_factory).get("name") or backbone,
        "input": text,
    }


def _untrained(parts: Parts) -> Any:
    """Return the backbone's factory without the options that load weights."""
    factory = parts.backbone_factory
    without = getattr(function_of(factory), "weight_options", WEIGHT_OPTIONS)
    return partial(factory, **{key: value for key, value in without.items() if key in options_of(factory)})


def _order(parts: Parts, dataset: Dataset, transform: Transform, backbone: nn.Module) -> Any:
    """Return the order of tasks; `edge` is given the similarities of the tasks."""
    order = parts.task_order
    if function_of(order) is not edge:
        return order
    stream = build_stream(parts, dataset, canonical, transform)
    return partial(order, similarities=task_similarities(stream, backbone, options_of(order)["similarity"]))


def _limited(stream: Stream, job: Job, hardware: Hardware | None) -> Stream:
    """Return the first `job.max_tasks` tasks, with their rows on the device.

    Raises:
        ConfigError: a task has no validation rows, and the job needs them.
    """
    tasks = stream.tasks[: job.max_tasks]
    if job.eval_split == "val":
        _refuse_without_validation(tasks)
    if job.tuning is not None and any(not task.val for task in tasks):
        raise ConfigError(
            "job.tuning: needs validation rows of every task; set dataset.val_fraction above 0, e.g. 0.1; a task whose "
            "classes have one training row each has none and cannot be tuned"
        )
    if hardware is not None:
        tasks = _Placed(hardware.device, hardware.workers or 0).tasks(tasks)
    return replace(stream, tasks=tasks)


def _refuse_without_validation(tasks: tuple[Task, ...]) -> None:
    """Raise unless every task has validation rows.

    Raises:
        ConfigError: see above.
    """
    if all(task.val is None for task in tasks):
        raise ConfigError("job.eval_split=val: there are no validation rows; set dataset.val_fraction above 0")
    for task in tasks:
        if not task.val:
            raise ConfigError(
                f"job.eval_split=val: task {task.id} ({task.name}) has no validation rows: its classes have one "
                "training row each, or a fraction of 0; set job.eval_split=test, add rows, or put these classes "
                "into a task with others"
            )


class _Placed:
    """Moves splits to the device; images that several splits have in common are moved once."""

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
        """Return the split on the device; a split that reads files gets the number of its decoding threads."""
        if not isinstance(split, TensorSplit):
            return split.to(self.device, workers=self.workers)
        images = self.moved.setdefault(id(split.images), (split.images, split.images.to(self.device)))[1]
        return TensorSplit(images, split.labels, split.rows, split.positions, split.transform, split.shift).to(
            self.device
        )
