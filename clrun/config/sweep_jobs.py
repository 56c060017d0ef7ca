"""Composes the jobs of a sweep: each choice of groups once with Hydra, then the values of every job.

Hydra composes the configuration of a job from its files in a tenth of a second, and most jobs of a sweep differ in
values alone. A job is therefore a copy of the configuration that was composed for its choices, with its values set by
Hydra's own rules; a test compares both. What a job is checked and named by needs no copy: plain containers are enough
where no expression depends on a value that the job sets.
"""

import copy
import re
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict

from clrun.config.compose import DATASET_LISTS, folder_of, plain_config, recorded_config, slug
from clrun.system.errors import ConfigError

TEMPLATES = 64  # configurations that are kept
PARSED = 4096  # overrides that are kept after parsing
KEY = re.compile(r"\w+(\.\w+)*")
# Expressions that no value of a job can change, and those that a neighbouring key decides.
STEADY = re.compile(r"\$\{(?:hydra:runtime\.choices\.\w+|oc\.env:[\w,./-]+)\}")
NEIGHBOUR = re.compile(r"\$\{\.(\w+)\}")


@dataclass(frozen=True)
class PlainJob:
    """What a job of a sweep is checked and named by.

    Attributes:
        config: the configuration of the run in plain containers, as `plain_config` returns it; not to be changed.
        written: the same as files have it (`recorded_config`).
        choices: choice in each configuration group.
        folder: of the run, below the folder of the sweep.
    """

    config: dict[str, Any]
    written: dict[str, Any]
    choices: dict[str, str]
    folder: Path


@dataclass
class _Template:
    """The configuration that Hydra composes for some choices of groups.

    Attributes:
        cfg: with its `hydra` node.
        plain: the same as plain containers; None where only `cfg` can tell what a job is.
        watched: dotted keys on which expressions depend.
        expressions: dotted keys of expressions.
    """

    cfg: DictConfig
    plain: PlainJob | None = None
    watched: set[str] = field(default_factory=set)
    expressions: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class _Words:
    """The overrides of a job.

    Attributes:
        base: those that choose members of groups, set options of Hydra or are fixed.
        typed: all but Hydra's.
        values: the others, in their order.
    """

    base: tuple[str, ...]
    typed: list[Override]
    values: list[Override]


_templates: dict[tuple[str, tuple[str, ...]], _Template] = {}


class JobComposer:
    """Stands for Hydra's loader of configurations while a sweep runs, in this process and in those of its launcher.

    Args:
        loader: Hydra's.
        fixed: overrides that most jobs have in common; they are composed with the choices of groups.
    """

    def __init__(self, loader: ConfigLoaderImpl, fixed: Collection[str] = ()) -> None:
        self.loader, self.fixed = loader, frozenset(fixed)
        self.groups: dict[str, bool] = {}
        self.sweep = secrets.token_hex(8)  # templates of an earlier sweep may be of files that have changed since
        _templates.clear()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["loader"], name)

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: Sequence[str]) -> DictConfig:
        """Return the configuration of a job of the sweep, as Hydra's loader of this name does.

        Raises:
            HydraException, OmegaConfBaseException: as Hydra's loader.
        """
        words = self._split(master_config, sweep_overrides)
        if words is None:
            loaded: DictConfig = self.loader.load_sweep_config(master_config, list(sweep_overrides))
            return loaded
        cfg = copy.deepcopy(self._template(master_config, words.base).cfg)
        ConfigLoaderImpl._apply_overrides_to_config(words.values, cfg)
        cfg.hydra.overrides.task = [override.input_line for override in words.typed]
        options = cfg.hydra.job.config.override_dirname
        cfg.hydra.job.override_dirname = get_overrides_dirname(
            words.typed, exclude_keys=options.exclude_keys, item_sep=options.item_sep, kv_sep=options.kv_sep
        )
        return cfg

    def plain(self, master_config: DictConfig, sweep_overrides: Sequence[str], number: int) -> PlainJob:
        """Return the job with this number of the sweep in plain containers.

        Raises:
            ConfigError: an interpolation cannot be resolved.
            HydraException, OmegaConfBaseException: as `load_sweep_config`.
        """
        words = self._split(master_config, sweep_overrides)
        if words is not None:
            template = self._template(master_config, words.base)
            if template.plain is not None and all(_is_simple(value, template) for value in words.values):
                config, written = template.plain.config, template.plain.written
                for override in words.values:
                    path, value = override.key_or_group.split("."), override.value()
                    config, written = _with(config, path, value), _with(written, path, value)
                folder = slug([str(override.input_line) for override in words.typed])
                return PlainJob(config, written, template.plain.choices, Path(folder))
        cfg = self.load_sweep_config(master_config, sweep_overrides)
        with open_dict(cfg.hydra.job):
            cfg.hydra.job.num, cfg.hydra.job.id = number, str(number)
        return _plain(cfg)

    def _split(self, master: DictConfig, overrides: Sequence[str]) -> "_Words | None":
        """Return the overrides of a job by what they do; None where Hydra has to compose."""
        parsed = [_parsed(text) for text in overrides]
        if master.hydra.searchpath or any(override.is_sweep_override() for override in parsed):
            return None
        values = [self._sets_value(override) for override in parsed]
        pairs = list(zip(parsed, values, strict=True))
        later = [override.key_or_group for override, sets in pairs if sets]
        early = {o.key_or_group for o, sets in pairs if not sets and o.input_line in self.fixed}
        if any(_overlap(key, other) for key in early for other in later if not self._is_group(key)):
            return None  # the last of them counts, so that their order must stay
        return _Words(
            tuple(text for text, sets in zip(overrides, values, strict=True) if not sets),
            [override for override in parsed if not override.is_hydra_override()],
            [override for override, sets in pairs if sets],
        )

    def _sets_value(self, override: Override) -> bool:
        """Return whether an override sets a key of this run, and chooses no member of a group.

        Those that merge, add or remove something depend on their place among the others, and count as set by the run.
        """
        if override.is_hydra_override() or override.package is not None:
            return False
        if isinstance(override.value(), dict):
            return True
        plain = not (override.is_add() or override.is_force_add() or override.is_delete())
        return not (self._is_group(override.key_or_group) or (plain and override.input_line in self.fixed))

    def _is_group(self, key: str) -> bool:
        """Return whether a key names a group of configurations; the folders are looked at once."""
        if key not in self.groups:
            self.groups[key] = self.loader.repository.group_exists(key)
        return self.groups[key]

    def _template(self, master: DictConfig, base: tuple[str, ...]) -> _Template:
        """Return the configuration for overrides that set no value."""
        key = (self.sweep, base)
        found = _templates.get(key)
        if found is None:
            cfg = self.loader.load_sweep_config(master, list(base))
            if len(_templates) >= TEMPLATES:
                _templates.pop(next(iter(_templates)))
            found = _templates[key] = _template(cfg)
        return found


@lru_cache(PARSED)
def _parsed(text: str) -> Override:
    return OverridesParser.create().parse_overrides([text])[0]


def choices_of(hydra: Any) -> dict[str, str]:
    """Return the choice in each group, from the `hydra` node of a configuration."""
    return {str(group): str(member) for group, member in hydra.runtime.choices.items() if member is not None}


def named_by_overrides(cfg: DictConfig) -> bool:
    """Return whether jobs have the folders that clrun gives them, which depend on no number of the job."""
    return bool(OmegaConf.to_container(cfg.hydra.sweep, resolve=False)["subdir"] == "${clrun.slug:}")  # type: ignore[index,call-overload]


def _plain(cfg: DictConfig) -> PlainJob:
    """Return the job of a configuration that was composed for it."""
    folder = folder_of(cfg, "hydra.sweep.subdir")
    return PlainJob(plain_config(cfg), recorded_config(cfg), choices_of(cfg.hydra), folder)


def _template(cfg: DictConfig) -> _Template:
    """Return the template of a composed configuration, with plain containers where values can be set in them."""
    if not named_by_overrides(cfg):
        return _Template(cfg)
    raw: Any = OmegaConf.to_container(cfg, resolve=False)
    raw.pop("hydra")
    watched, expressions = set(DATASET_LISTS), set[str]()
    for path, text in _expressions(raw, ""):
        expressions.add(path)
        parent = path.rpartition(".")[0]
        watched |= {f"{parent}.{name}".lstrip(".") for name in NEIGHBOUR.findall(text)}
        if "${" in NEIGHBOUR.sub("", STEADY.sub("", text)):
            return _Template(cfg)
    try:
        return _Template(cfg, _plain(copy.deepcopy(cfg)), watched, expressions)
    except ConfigError:  # the values of the jobs are needed
        return _Template(cfg)


def _expressions(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield the dotted key and the text of every value with an expression."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _expressions(item, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            yield from _expressions(item, f"{path}.item")
    elif isinstance(value, str) and "${" in value:
        yield path, value


def _overlap(key: str, other: str) -> bool:
    """Return whether one of two dotted keys is the other one, or lies within it."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _is_simple(override: Override, template: _Template) -> bool:
    """Return whether an override only replaces a value by another one, on which nothing else depends."""
    assert template.plain is not None
    key, value = override.key_or_group, override.value()
    if override.is_add() or override.is_force_add() or override.is_delete() or not KEY.fullmatch(key):
        return False
    items = value if isinstance(value, list) else [value]
    plain = all(item is None or isinstance(item, bool | int | float | str) for item in items)
    if not plain or any(isinstance(item, str) and ("$" in item or item == "???") for item in items):
        return False
    if any(_overlap(key, watched) for watched in template.watched):
        return False
    if any(key.startswith(f"{path}.") for path in template.expressions):
        return False
    before: Any = template.plain.config
    for name in key.split("."):
        if not isinstance(before, dict) or name not in before:
            return False
        before = before[name]
    return not isinstance(before, dict)


def _with(config: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """Return a configuration with another value at a path; what is not on the path is shared."""
    name, *rest = path
    return {**config, name: _with(config[name], rest, value) if rest else value}
