"""What the configuration in the folder of a run may name: it may come from anywhere, and what it names is called."""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf.errors import OmegaConfBaseException

from clrun.config.environment import needs_environment, resolved
from clrun.config.signature import locate
from clrun.system.errors import ConfigError, first_line
from clrun.system.yaml_files import conf_dir


def with_environment(
    folder: Path, config: Mapping[str, Any], trust: tuple[str, ...] | None, how: str
) -> Mapping[str, Any]:
    """Return the configuration with the values that its expressions (`${oc.env:ROOT}`) have in this process.

    Args:
        folder: of the run.
        config: its configuration.
        trust: what is trusted, of which "oc.env" is the environment; None for everything.
        how: how the user can trust it, with {} for the list.

    Raises:
        ConfigError: there are expressions in a folder that is not trusted with them; or a variable is not set.
    """
    keys = needs_environment(config)
    if keys and trust is not None and "oc.env" not in trust:
        raise ConfigError(
            f"{folder / 'run.json'}: {', '.join(keys)} is read from the environment; if you trust this folder with it, "
            f"{how.format(['oc.env'])}"
        )
    try:
        return resolved(config) if keys else config
    except OmegaConfBaseException as error:
        raise ConfigError(f"{folder / 'run.json'}: {first_line(error)}") from error


def refuse_strangers(folder: Path, config: Mapping[str, Any], trust: tuple[str, ...], how: str) -> None:
    """Raise where the configuration names a class or function that is neither clrun's choice nor trusted.

    A run.json may come from anywhere, and what it names would be called.

    Args:
        folder: of the run.
        config: its configuration.
        trust: modules outside of clrun that it may name.
        how: how the user can trust a module, with {} for the list.

    Raises:
        ConfigError: see above.
    """
    strangers = []
    for target in dict.fromkeys(_targets(config)):
        if target in _own_targets() or any(target == name or target.startswith(f"{name}.") for name in trust):
            continue
        if target.startswith("torch.optim."):
            from torch.optim import Optimizer

            found = locate(target)
            if isinstance(found, type) and issubclass(found, Optimizer):
                continue
        strangers.append(target)
    if strangers:
        verb = "is" if len(strangers) == 1 else "are"
        modules = list(dict.fromkeys([*trust, *(target.rpartition(".")[0] for target in strangers)]))
        raise ConfigError(
            f"{folder / 'run.json'}: names {', '.join(strangers)}, which {verb} not clrun's; if you trust this folder "
            f"and that code, {how.format(modules)}"
        )


def _targets(value: Any) -> Iterator[str]:
    """Yield every `_target_` of a configuration."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            yield str(value["_target_"])
        for item in value.values():
            yield from _targets(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _targets(item)


@cache
def _own_targets() -> frozenset[str]:
    """Return every class and function that clrun's YAML files name."""
    texts = (file.read_text(encoding="utf-8") for file in conf_dir().rglob("*.yaml"))
    return frozenset(name for text in texts for name in re.findall(r"_target_:\s*([\w.]+)", text))
