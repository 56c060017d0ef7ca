"""Composes configurations with Hydra and reports every mistake in one line. Nothing here imports torch."""

import copy
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf._utils import get_omega_conf_dumper
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from clrun.config.environment import masked, recorded, recorded_key, register
from clrun.config.groups import GROUPS, OPTIONAL, RESERVED
from clrun.config.plugins import hide_working_folder, mention_hidden
from clrun.config.slurm import suit_slurm
from clrun.results.identity import inside_hash
from clrun.system.errors import ConfigError, did_you_mean, first_line, one_line
from clrun.system.libraries import pip_install
from clrun.system.yaml_files import conf_dir

COMMANDS = ("list", "report", "status", "features", "merge")
DATASET_LISTS = ("job.eval_extra", "method.reference")  # options that list data sets by name or as nodes
Composed = TypeVar("Composed")
SLUG_LENGTH = 100  # characters of the readable part; file systems allow 255 bytes in a name


def slug(overrides: Sequence[str]) -> str:
    """Return the folder name of a job in a sweep: its overrides, shortened, and a hash of them.

    The order of the overrides does not matter, and overrides that cannot change a result are left out: a sweep that is
    started again with other options for display and storage finds its folders. The root of the data is included,
    because a sweep over data sets of the user's own varies it.
    """
    keys = {o: re.split("[=@]", o.lstrip("+~"))[0].replace("/", ".") for o in overrides}
    identifying = sorted(o for o, key in keys.items() if inside_hash(key) or key in ("dataset.root", "dataset.file"))
    text = re.sub(r"[^\w.-]+", "-", "_".join(identifying)).strip(".-_")[:SLUG_LENGTH]
    return f"{text or 'default'}-{hashlib.sha256(repr(identifying).encode()).hexdigest()[:8]}"


def typed_overrides(cfg: DictConfig) -> list[str]:
    """Return the overrides of a composed configuration as they were typed: no interpolation in them is resolved."""
    return [str(override) for override in OmegaConf.to_container(cfg.hydra.overrides.task, resolve=False)]  # type: ignore[union-attr]


def _slug_of_job(*, _root_: DictConfig) -> str:
    return slug(typed_overrides(_root_))


def _name_of_folder(*, _root_: DictConfig) -> str:
    """Return the name of the run for its folder; a name from the environment is not shown."""
    written = str(recorded_key(_root_, "name"))
    return re.sub(r"[^\w.-]+", "-", written).strip("-") if "${" in written else written


HYDRA_BASE = "1.3"
version.setbase(HYDRA_BASE)
hide_working_folder()
register()
# Registered on import: workers of parallel launchers import this module with the task function before they use it.
OmegaConf.register_new_resolver("clrun.unique", lambda: secrets.token_hex(3), use_cache=True, replace=True)
OmegaConf.register_new_resolver("clrun.slug", _slug_of_job, replace=True)
OmegaConf.register_new_resolver("clrun.name", _name_of_folder, replace=True)


@dataclass(frozen=True)
class Composer:
    """Composes configurations from the YAML files of clrun and of the user.

    Attributes:
        hydra: Hydra with its search path.
        name: name of the primary configuration file.
    """

    hydra: Hydra
    name: str = "config"

    @classmethod
    @contextmanager
    def of(cls, *, config_path: str | None, config_name: str | None, config_dir: str | None) -> Iterator["Composer"]:
        """Yield a composer for Hydra's options of these names; Hydra's global state is restored after the block.

        Raises:
            ConfigError: the folder of --config-dir does not exist.
        """
        search_path = create_config_search_path(os.path.abspath(config_path) if config_path else str(conf_dir()))
        if config_dir is not None:
            if not os.path.isdir(config_dir):
                raise ConfigError(f"--config-dir: no such folder: {config_dir}")
            anchor = SearchPathQuery(provider="schema")
            search_path.prepend("command-line", f"file://{os.path.abspath(config_dir)}", anchor)
        mention_hidden()
        initialized, composed = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
        GlobalHydra.instance().clear()
        suit_slurm()
        try:
            yield cls(Hydra.create_main_hydra2("clrun", search_path), config_name or "config")
        finally:
            GlobalHydra.instance().hydra, HydraConfig.instance().cfg = initialized, composed

    def compose(self, overrides: Sequence[str], *, sweep: bool = False) -> DictConfig:
        """Compose a configuration with its `hydra` node, in which `hydra.mode` says whether it is a sweep.

        Args:
            overrides: overrides of the command line; several values for a key are allowed in sweeps only.
            sweep: compose the configuration of a sweep; a configuration can also set hydra.mode=MULTIRUN itself.

        Raises:
            ConfigError: one line about the mistake in the overrides or in a YAML file.
        """
        loader: Any = self.hydra.config_loader
        try:
            if not sweep:
                cfg: DictConfig = loader.load_configuration(
                    self.name, list(overrides), RunMode.RUN, validate_sweep_overrides=False
                )
                if cfg.hydra.mode != RunMode.MULTIRUN:
                    parsed = OverridesParser.create().parse_overrides(list(overrides))
                    loader.validate_sweep_overrides_legal(parsed, RunMode.RUN, from_shell=True)
                    cfg.hydra.mode = RunMode.RUN
                    return cfg
            later = _applied_by_the_jobs(overrides)
            given = [later.get(text, text) for text in overrides]
            cfg = loader.load_configuration(self.name, [*given, "hydra.mode=MULTIRUN"], RunMode.MULTIRUN)
            back = {text: original for original, text in later.items()}
            cfg.hydra.overrides.task = [back.get(text, text) for text in typed_overrides(cfg)]
            return cfg
        except Exception as error:  # composing only reads overrides and files, so that every error is about them
            raise ConfigError(self._problem(error, overrides)) from error

    def explained(self, overrides: Sequence[str], compose: Callable[[], Composed]) -> Composed:
        """Return what `compose` makes of the overrides of a job.

        Raises:
            ConfigError: one line about the mistake in the overrides.
        """
        try:
            return compose()
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(self._problem(error, overrides)) from error

    def _problem(self, error: Exception, overrides: Sequence[str]) -> str:
        """Return the message for a mistake: where it is, what is wrong, what to do."""
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key:
            return self._unknown_key(cause, overrides)
        if isinstance(error, MissingConfigException) and error.missing_cfg_file:
            return self._unknown_member(error)
        if isinstance(error, OverrideParseException):
            return _unreadable_override(error)
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            return f"{error.problem_mark.name}, line {error.problem_mark.line + 1}: not valid YAML: {error.problem}"
        if isinstance(error, ConfigCompositionException) and cause is error:
            lines = [line for line in str(error).splitlines() if line]
            several = "Ambiguous value" in lines[0]
            return f"{lines[0]}; add -m to run all of them, or write a list as [a,b]" if several else "; ".join(lines)
        if file := self._unreadable_file():
            return f"{file}: not a readable configuration file: {_omegaconf_line(cause)}"
        return f"{' '.join(overrides)}: {_omegaconf_line(cause)}"

    def _unknown_key(self, error: Any, overrides: Sequence[str]) -> str:
        """Return the message for a key that does not exist in the composed configuration."""
        key = str(error.full_key)
        group, _, inner = key.partition(".")
        choices = self.hydra.config_loader.compute_defaults_list(
            self.name, list(overrides), RunMode.MULTIRUN
        ).overrides.known_choices
        owner = f" of {group}={choices[group]}" if inner and group in choices else ""
        siblings = error.parent_node.keys() if isinstance(error.parent_node, DictConfig) else ()
        known = [str(name) for name in siblings if str(name) not in RESERVED]
        return f"{key}: unknown option{owner}{did_you_mean(key.rpartition('.')[2], known)}"

    def _unknown_member(self, error: MissingConfigException) -> str:
        """Return the message for a file that does not exist."""
        group, _, member = str(error.missing_cfg_file).rpartition("/")
        if not group:
            return f"there is no configuration file '{member}' (--config-name)"
        known = self.hydra.config_loader.get_group_options(group)
        available = ", ".join(known) or "none"
        if group == "hydra/launcher":
            joblib, slurm = (pip_install(f"hydra_plugins.hydra_{name}_launcher") for name in ("joblib", "submitit"))
            available += f"; joblib: {joblib}; submitit_slurm and submitit_local: {slurm}"
        where = re.match("In '(.*?)'", str(error))
        file = "" if where is None or where[1] in (self.name, "hydra/config") else f"{where[1]}: "
        found = any(source.provider == "command-line" for source in self.hydra.config_loader.get_sources())
        own = "" if found or group not in GROUPS else "; your own choices need --config-dir FOLDER"
        return f"{file}no {group} named '{member}'{did_you_mean(member, known)} (available: {available}{own})"

    def _unreadable_file(self) -> str | None:
        """Return the first YAML file on the search path that cannot be read; None when all can."""
        for source in self.hydra.config_loader.get_sources():
            if source.scheme() == "file":
                for file in sorted(Path(source.path).rglob("*.yaml")):
                    try:
                        OmegaConf.load(file)
                    except Exception:
                        return str(file)
        return None


def _unreadable_override(error: OverrideParseException) -> str:
    """Return the message for an override that Hydra's grammar does not accept."""
    if "=" not in str(error.override):
        if str(error.override) in COMMANDS:
            return f"'{error.override}': a command is the first word, as in: clrun {error.override} ..."
        commands = did_you_mean(str(error.override), COMMANDS)
        return f"'{error.override}': neither a command nor KEY=VALUE{commands or '; see clrun --help'}"
    key, _, value = str(error.override).partition("=")
    if "LexerNoViableAlt" in str(error):  # its text is a caret below the first character that cannot stand unquoted
        return f"'{error.override}': cannot be read; quote the value: '{key}=\"{value}\"'"
    lines = [x for x in str(error).splitlines() if not x.startswith(("Error parsing override", "See https"))]
    reason = " ".join(lines).partition(" expecting {")[0]
    return f"'{error.override}': cannot be read: {reason}; quote values with special characters: 'KEY=\"VALUE\"'"


def _omegaconf_line(error: BaseException) -> str:
    """Return the first line of an exception of OmegaConf, after the key that it is about; of others the message."""
    if not isinstance(error, OmegaConfBaseException):
        return one_line(error)
    text = first_line(error)
    if (missing := text.partition("Missing mandatory value: ")[2]) and error.full_key:
        return f"{missing}: needs a value; set {missing}=..."  # the interpolation of another key needs it
    return f"{error.full_key}: {text}" if error.full_key else text


def _applied_by_the_jobs(overrides: Sequence[str]) -> dict[str, str]:
    """Return the options of groups with several choices, each with a form that only the jobs of the sweep apply.

    The configuration of the sweep itself has the default choice of such a group, which may lack the option.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    swept = {o.key_or_group for o in parsed if o.is_sweep_override()} & {*GROUPS, "experiment"}
    found = {}
    for override in parsed:
        group, _, inner = override.key_or_group.partition(".")
        key, _, value = (override.input_line or "").partition("=")
        below = inner and (group in swept or ("experiment" in swept and group in GROUPS))
        if below and value and not (override.is_delete() or override.is_sweep_override()):
            found[f"{key}={value}"] = f"{key}=choice({value})"
    return found


def yaml_text(cfg: DictConfig) -> str:
    """Return a configuration as YAML with its expressions, as OmegaConf.to_yaml does, but by the C library.

    That takes a fifth of the time, and breaks long texts at other places.
    """
    plain = OmegaConf.to_container(cfg, resolve=False, enum_to_str=True)
    return str(yaml.dump(plain, Dumper=_dumper(), default_flow_style=False, allow_unicode=True, sort_keys=False))


@cache
def _dumper() -> Any:
    """Return OmegaConf's dumper on the C library, where PyYAML has that."""
    own: Any = get_omega_conf_dumper()
    fast: Any = type("Dumper", (getattr(yaml, "CDumper", yaml.Dumper),), {})
    fast.add_representer(str, own.str_representer)
    return fast


def folder_of(cfg: DictConfig, key: str) -> Path:
    """Return the folder that a key of the `hydra` node names.

    Raises:
        ConfigError: an interpolation cannot be resolved.
    """
    HydraConfig.instance().set_config(cfg)
    try:
        return Path(str(OmegaConf.select(cfg, key, throw_on_missing=True)))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key}: {first_line(error)}") from error


def without_hydra(cfg: DictConfig) -> DictConfig:
    """Return a composed configuration without its `hydra` node."""
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])


def plain_config(cfg: DictConfig) -> dict[str, Any]:
    """Return the configuration of a run as plain containers: interpolations resolved, no `hydra` node.

    Raises:
        ConfigError: an interpolation cannot be resolved.
    """
    return _plain(cfg, lambda own: OmegaConf.to_container(own, resolve=True))


def recorded_config(cfg: DictConfig) -> dict[str, Any]:
    """Return the same as `plain_config`, with the expression in the place of each value from the environment.

    Raises:
        ConfigError: an interpolation cannot be resolved.
    """
    return _plain(cfg, recorded)


def _loader(entry: Any, key: str) -> DictConfig:
    """Return the node of a data set that a list has by its name or as a node; instantiated, it is a loader.

    Raises:
        ConfigError: there is no data set of this name, or the entry is something else.
    """
    node = entry
    if isinstance(entry, str):
        compose: Any = GlobalHydra.instance().config_loader().load_configuration
        try:
            node = compose("config", [f"dataset={entry}"], RunMode.RUN).dataset
        except MissingConfigException as error:
            known = GlobalHydra.instance().config_loader().get_group_options("dataset")
            raise ConfigError(f"{key}: no dataset named '{entry}'{did_you_mean(entry, known)}") from error
    if not isinstance(node, DictConfig) or "_target_" not in node:
        raise ConfigError(f"{key}: expected names of data sets or nodes with a _target_, got {entry!r}")
    node = copy.deepcopy(node)
    with open_dict(node):
        node._partial_ = True
    return node


def _plain(cfg: DictConfig, convert: Callable[[DictConfig], Any]) -> dict[str, Any]:
    """Return what `convert` makes of a configuration without its `hydra` node, with nodes for names of data sets."""
    if "hydra" in cfg:
        HydraConfig.instance().set_config(cfg)
        cfg = without_hydra(cfg)
    try:
        for key in DATASET_LISTS:
            node = cfg.get(key.partition(".")[0])
            if isinstance(node, DictConfig) and (entries := OmegaConf.select(cfg, key)):  # `check` refuses other nodes
                cfg = copy.deepcopy(cfg)
                with open_dict(cfg):
                    OmegaConf.update(cfg, key, [_loader(entry, key) for entry in entries], merge=False)
        # The choice `none` of an optional group leaves no trace: the configuration is that of a run without the group.
        return {str(key): value for key, value in convert(cfg).items() if value or key not in OPTIONAL}
    except OmegaConfBaseException as error:
        raise ConfigError(masked(_omegaconf_line(error))) from error
