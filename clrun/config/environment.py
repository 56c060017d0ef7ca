"""Values from the environment (`${oc.env:NAME}`): runs use the value, files and messages have the expression.

A token in a configuration must not end up in run.json, in a report that is passed on, or on a terminal. Whatever was
read through `${oc.env:...}` by this process is remembered, so that the expression can stand in its place.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.resolvers import oc

from clrun.results.identity import flatten, inside_hash

SHORTEST = 5  # characters of a value that is replaced inside a text; shorter ones stand in words by chance
_values: dict[str, str] = {}  # expression by value
_reads = [0]


def _read(key: str, *default: Any) -> str | None:
    """Resolve `${oc.env:KEY}` or `${oc.env:KEY,DEFAULT}` as OmegaConf does, and remember the value."""
    value = oc.env(key, *default)
    _reads[0] += 1
    if value is not None:
        _values[value] = f"${{oc.env:{key}}}"
    return value


def register() -> None:
    """Make OmegaConf remember the values that it reads from the environment."""
    OmegaConf.register_new_resolver("oc.env", _read, replace=True)


def recorded(cfg: Container) -> Any:
    """Return a configuration as plain containers: interpolations resolved, except those that need the environment."""
    keys: Any = cfg if isinstance(cfg, DictConfig) else range(len(cfg))  # type: ignore[arg-type]
    found = {key: recorded_key(cfg, key) for key in keys}
    return {str(key): value for key, value in found.items()} if isinstance(cfg, DictConfig) else list(found.values())


def recorded_key(cfg: Any, key: Any) -> Any:
    """Return the value of one key as `recorded` has it."""
    if OmegaConf.is_missing(cfg, key):
        return "???"
    before, value = _reads[0], cfg[key]
    if not OmegaConf.is_interpolation(cfg, key):
        return recorded(value) if isinstance(value, Container) else value
    plain = OmegaConf.to_container(value, resolve=True) if isinstance(value, Container) else value
    return plain if _reads[0] == before else cfg._get_node(key)._value()


def digests(written: Mapping[str, Any], used: Mapping[str, Any]) -> dict[str, str]:
    """Return 8 hex digits for each key that can change a result and whose value is from the environment.

    Runs with other values are thereby told apart, although their files have the same expression.

    Args:
        written: the configuration with expressions.
        used: the same with values.
    """
    values, found = flatten(used), {}
    for key, expression in flatten(written).items():
        if inside_hash(key) and key in values and values[key] != expression:
            text = f"{key}={json.dumps(values[key], default=repr)}"
            found[key] = hashlib.sha256(text.encode()).hexdigest()[:8]
    return found


def secrets() -> dict[str, str]:
    """Return the expression of each value that this process has read from the environment."""
    return dict(_values)


def masked(text: str, further: Mapping[str, str] | None = None) -> str:
    """Return a text with expressions in the place of values from the environment; `further` is of another process."""
    known = {**(further or {}), **_values}
    if text in known:
        return known[text]
    for value in sorted(known, key=len, reverse=True):
        if len(value) >= SHORTEST:
            text = text.replace(value, known[value])
    return text


def needs_environment(config: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys of a recorded configuration whose value has to be read from the environment."""
    return [key for key, value in flatten(config).items() if "${" in json.dumps(value, default=repr)]


def resolved(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recorded configuration with values from the environment of this process.

    Raises:
        OmegaConfBaseException: an expression cannot be resolved.
    """
    plain: Any = OmegaConf.to_container(OmegaConf.create(dict(config)), resolve=True)
    return {str(key): value for key, value in plain.items()}
