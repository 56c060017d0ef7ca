"""Overrides given as texts, as a mapping or as keywords, turned into the overrides of the command line."""

import numbers
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clrun.config.groups import GROUPS
from clrun.system.errors import ConfigError

Overrides = str | Iterable[str] | Mapping[str, Any]
PLAIN = re.compile(r"[A-Za-z_][\w./-]*")  # texts that Hydra reads as themselves, if they are no word of its own
WORDS = ("null", "true", "false", "nan", "inf")
ADVICE = {
    "-m": "call sweep(...) instead of run(...)",
    "--multirun": "call sweep(...) instead of run(...)",
    "--config-dir": "pass config_dir=FOLDER",
    "-cd": "pass config_dir=FOLDER",
    "--config-name": "pass config_name=NAME",
    "-cn": "pass config_name=NAME",
}


def as_arguments(overrides: Overrides, options: Mapping[str, Any], *, sweep: bool = False) -> list[str]:
    """Return the overrides of the command line that say the same.

    Args:
        overrides: texts "KEY=VALUE"; or one text, read as a shell reads it; or a mapping of keys to values, in which a
            mapping gives the keys below its own: {"budget": {"epochs": 2}} is budget.epochs=2.
        options: further keys and values.
        sweep: a list, tuple or range is the values of a sweep; an option that is itself a list is a list in a list.

    Raises:
        ConfigError: a key is no text, or a value cannot be written as an override.
    """
    if isinstance(overrides, Mapping):
        found = _of_mapping(overrides, sweep=sweep)
    else:
        found = shlex.split(overrides) if isinstance(overrides, str) else list(overrides)
    for text in found:
        _check(text)
    return [*found, *_of_mapping(options, sweep=sweep)]


def _check(text: Any) -> None:
    """Refuse what is no text, and the flags of the command line.

    Raises:
        ConfigError: see above.
    """
    if not isinstance(text, str):
        raise ConfigError(f"overrides: expected texts 'KEY=VALUE', got {text!r}; a mapping takes other values")
    if text.startswith("-"):
        raise ConfigError(
            f"overrides: '{text}' belongs to the command line; {ADVICE.get(text.split('=')[0], 'omit it')}"
        )


def _of_mapping(values: Mapping[str, Any], prefix: str = "", *, sweep: bool) -> list[str]:
    """Return one override for each leaf of nested mappings."""
    found: list[str] = []
    for key, value in values.items():
        if not isinstance(key, str):
            raise ConfigError(f"overrides: expected a text as key, got {key!r}")
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found += _of_mapping(value, f"{name}.", sweep=sweep)
        elif sweep and isinstance(value, list | tuple | range):
            if not value:
                raise ConfigError(f"{name}: a sweep needs at least one value")
            found.append(f"{name}={','.join(text_of(item, name) for item in value)}")
        elif name in GROUPS and isinstance(value, list | tuple):
            raise ConfigError(f"{name}: expected one choice, got {value!r}; clrun.sweep runs several")
        else:
            found.append(f"{name}={text_of(value, name)}")
    return found


def text_of(value: Any, key: str) -> str:
    """Return a value in the grammar of Hydra's overrides; its type survives, "1" stays a text.

    Raises:
        ConfigError: it is of another type; the message names `key`.
    """
    from hydra.core.override_parser.types import Quote, QuotedString

    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, numbers.Integral):
        return str(int(value))
    if isinstance(value, numbers.Real):
        return repr(float(value))
    if isinstance(value, Path | str):
        text = str(value)
        if PLAIN.fullmatch(text) and text.lower() not in WORDS:
            return text
        return QuotedString(text=text, quote=Quote.single).with_quotes()
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{text_of(str(k), key)}:{text_of(v, key)}" for k, v in value.items()) + "}"
    if isinstance(value, Sequence | range):
        return "[" + ",".join(text_of(item, key) for item in value) + "]"
    kinds = "None, bool, int, float, str, a path, or lists and mappings of these"
    raise ConfigError(f"{key}: a {type(value).__name__} cannot be an option; expected {kinds}")
