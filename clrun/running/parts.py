"""The parts that a configuration names, typed; each node of the configuration is instantiated once per process."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch import nn

from clrun.blocks.compress.base import Compressor
from clrun.config.groups import RESERVED
from clrun.config.job import Job
from clrun.config.signature import locate
from clrun.data.modality import modality_of
from clrun.data.stream import Dataset
from clrun.learning.budget import Budget
from clrun.learning.method import Method
from clrun.running.loggers import Logger
from clrun.system.errors import ConfigError
from clrun.system.hardware import Hardware

Config = Mapping[str, Any]
RARE = frozenset({"_args_", "_recursive_", "_convert_"})  # keys of a node that Hydra alone reads


class Parts:
    """Typed access to a configuration: `parts.job`, `parts.hardware`, `parts.budget` and so on.

    Every part is instantiated when it is first asked for and kept, so that all of a run sees the same object. Pickling
    stores the plain configuration alone: each process of a run instantiates its own parts.

    Args:
        config: resolved and checked configuration of plain types.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def __reduce__(self) -> tuple[type["Parts"], tuple[Config]]:
        """Return how to make these parts again in another process."""
        return Parts, (self.config,)

    def target(self, group: str) -> str:
        """Return the dotted name of the class or function that the node `group` of the configuration names."""
        return str(self.config[group]["_target_"])

    # --- what the parts are; each may raise the ConfigError of `make`

    @cached_property
    def name(self) -> str:
        """The label of the run."""
        return str(self.config["name"])

    @cached_property
    def seed(self) -> int:
        """The seed of initialisation, shuffling and augmentation."""
        return int(self.config["seed"])

    @cached_property
    def job(self) -> Job:
        """Limits, evaluation cadence and files of the run."""
        job: Job = make(self.config["job"], Job)
        return job

    @cached_property
    def hardware(self) -> Hardware:
        """What this process computes on; `Hardware.setup` must be called before it is used."""
        hardware: Hardware = make(self.config["hardware"], Hardware)
        return hardware

    @cached_property
    def logger(self) -> Logger:
        """Where the run is shown."""
        logger: Logger = make(self.config["logger"], Logger)
        return logger

    @cached_property
    def budget(self) -> Budget:
        """What a fit may spend by default."""
        budget: Budget = make(self.config["budget"], Budget)
        return budget

    @cached_property
    def compress(self) -> Compressor | None:
        """What makes the network smaller after its tasks; None for compress=none."""
        node = self.config.get("compress")
        if not node:
            return None
        compressor: Compressor = make(node, Compressor)
        return compressor

    @cached_property
    def scenario(self) -> Callable[..., Any]:
        """Cuts a data set into tasks: called with data set, task order and transform, it returns a Stream."""
        return self._factory("scenario")

    @cached_property
    def task_order(self) -> Callable[..., Any]:
        """The order of tasks: called with the number of tasks, returns task ids by position."""
        return self._factory("task_order")

    @cached_property
    def backbone_factory(self) -> Callable[..., nn.Module]:
        """Makes the backbone: called with the shape (C, H, W) of the stored images."""
        return self._factory("backbone")

    @cached_property
    def method_factory(self) -> Callable[[nn.Module, int], Method]:
        """Makes the learner: called with the backbone and the number of classes."""
        return self._factory("method")

    @cached_property
    def method_class(self) -> type[Method]:
        """The class of the learner.

        Raises:
            ConfigError: the configuration names something else.
        """
        found = locate(name := self.target("method"))
        if not (isinstance(found, type) and issubclass(found, Method)):
            raise ConfigError(f"method: {name} is no subclass of clrun.learning.method.Method")
        return found

    @property
    def reads_features(self) -> bool:
        """Whether the learner reads features of the frozen backbone instead of images."""
        return self.method_class.reads_features(self.config["method"])

    def load_dataset(self) -> Dataset:
        """Load the data set; it is not kept, because the stream that is made from it holds its rows.

        The rows of a loader that is not clrun's own are checked.

        Raises:
            ConfigError: the loader returns something else, or rows that cannot be used.
        """
        name = self.target("dataset")
        try:
            dataset = make(self.config["dataset"])
        except TypeError as error:
            if "image_shape" in str(error):
                raise ConfigError(f"dataset: {name}: rename image_shape, which is now `shape` of a Dataset") from error
            raise
        if not isinstance(dataset, Dataset):
            found = f"{name} returns a {type(dataset).__name__}"
            raise ConfigError(
                f"dataset: {found}, not a clrun.data.stream.Dataset, which clrun.data.reading.assemble makes"
            )
        if not name.startswith("clrun."):
            for part, split in (("train", dataset.train), ("test", dataset.test)):
                if problem := modality_of(dataset).problem(split, dataset):
                    raise ConfigError(f"dataset: {name} gives {part} rows with {problem}")
        return dataset

    def _factory(self, group: str) -> Callable[..., Any]:
        factory: Callable[..., Any] = make(self.config[group])
        return factory

    # --- parts that clrun did not write

    @contextmanager
    def naming_foreign(self) -> Iterator[None]:
        """Add to an exception of the block a note that names the parts of the run that are not clrun's own.

        The traceback alone may not show their files: the wrong loss of a method fails after the method returned it.
        """
        try:
            yield
        except Exception as error:
            if found := self._foreign():
                error.add_note(f"In a run with {found}")
            raise

    def _foreign(self) -> str:
        """Return the parts of the run that are not clrun's own, with their files."""
        found = []
        for group, node in self.config.items():
            name = node.get("_target_", "") if isinstance(node, Mapping) else ""
            if name and name.partition(".")[0] not in ("clrun", "torch"):
                part = locate(name)
                found.append(f"{group}={name} ({getattr(sys.modules.get(part.__module__), '__file__', 'no file')})")
        return ", ".join(found)


def function_of(part: Any) -> Any:
    """Return the function or class of a factory, without the options that the configuration has bound to it."""
    return getattr(part, "func", part)


def options_of(part: Any) -> dict[str, Any]:
    """Return the options that the configuration has bound to a factory."""
    return dict(getattr(part, "keywords", {}))


def make(node: Config, kind: type = object) -> Any:
    """Instantiate a `_target_` node with plain containers.

    Raises:
        ConfigError: the node's class or function refused its options, or returned something that is no `kind`.
    """
    if _is_ordinary(node):
        return of_kind(_made(node), kind, node["_target_"])
    try:
        made = instantiate(dict(node), _convert_="all")
    except InstantiationException as error:
        raise error.__cause__ or error from None
    return of_kind(made, kind, node["_target_"])


def _is_ordinary(value: Any) -> bool:
    """Return whether all nodes inside a value name clrun's classes and use none of Hydra's rarer keys.

    Hydra makes the same of them in fifty times the time: it copies each node into a tree of its own first.
    """
    if isinstance(value, Mapping):
        own = str(value.get("_target_", "clrun.")).startswith(("clrun.", "torch.optim."))
        return own and not RARE & value.keys() and all(map(_is_ordinary, value.values()))
    return all(map(_is_ordinary, value)) if isinstance(value, list | tuple) else True


def _made(value: Any) -> Any:
    """Return a value with what its nodes stand for, in containers of its own."""
    if isinstance(value, Mapping):
        options = {key: _made(item) for key, item in value.items() if key not in RESERVED}
        if "_target_" not in value:
            return options
        target = locate(str(value["_target_"]))
        return partial(target, **options) if value.get("_partial_", False) else target(**options)
    return [_made(item) for item in value] if isinstance(value, list | tuple) else value


def of_kind(made: Any, kind: type, name: str) -> Any:
    """Return `made`, which the target `name` returned.

    Raises:
        ConfigError: it is not of the `kind`.
    """
    if not isinstance(made, kind):
        raise ConfigError(f"{name} gives {type(made).__name__}, expected {kind.__module__}.{kind.__name__}")
    return made
