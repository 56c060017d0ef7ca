"""The identity of a configuration: a hash of every key that can change a result."""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

# Keys that cannot change a result: they name a run, or decide what it shows, stores and caches and how fast it is.
# Files that `dataset.images.unreadable=skip` leaves out change the data of a run, not its configuration.
OUTSIDE_HASH = (
    "name",
    "logger",
    "dataset.root",
    "dataset.file",
    "dataset.download",
    "dataset.archive",
    "dataset.archive_limit_gb",
    "dataset.images.max_pixels",
    "dataset.images.unreadable",
    "dataset.images.verify",
    "dataset.images.memory",
    "dataset.images.cache",
    "hardware.workers",
    "job.resume",
    "job.checkpoint_minutes",
    "job.start_from",  # run.json says what a run has gone on from, and reports keep it apart where that changes it
    "job.keep_checkpoint",
    "job.progress",
    "job.picture",
    "job.save_model",
    "job.save_predictions",
    "job.save_logits",
    "job.feature_cache",
    "job.feature_cache_gb",
)
CANONICAL = json.JSONEncoder(sort_keys=True, default=repr)


@cache
def inside_hash(key: str) -> bool:
    """Return whether the dotted `key` can change a result."""
    return not any(key == outside or key.startswith(f"{outside}.") for outside in OUTSIDE_HASH)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by dotted key; lists and empty mappings count as leaves."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def with_digests(config: Mapping[str, Any], digests: Mapping[str, str]) -> dict[str, Any]:
    """Return a flattened configuration with one key more for each value that is from the environment.

    Its files have the expression, as `${oc.env:LR}`; the digest tells apart runs with other values.
    """
    return flatten(config) | {f"{key} (value)": digest for key, digest in digests.items()}


def config_hash(config: Mapping[str, Any]) -> str:
    """Return 16 hex digits that depend on the value of every key that can change a result; 1 and 1.0 are equal."""
    lines = [f"{key}={text}" for key, text in sorted(_texts(config).items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def differing_keys(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Return the keys that can change a result and have other values in `b` than in `a`, or are absent in one."""
    texts_a, texts_b = _texts(a), _texts(b)
    return [key for key in sorted(texts_a.keys() | texts_b.keys()) if texts_a.get(key) != texts_b.get(key)]


def _texts(config: Mapping[str, Any]) -> dict[str, str]:
    """Return a canonical text for the value of each key that can change a result."""

    def canonical(x: Any) -> Any:
        if isinstance(x, list | tuple):
            return [canonical(item) for item in x]
        if isinstance(x, Mapping):
            return {str(key): canonical(item) for key, item in x.items()}
        return int(x) if isinstance(x, float) and x.is_integer() else x

    leaves = flatten(config).items()
    return {key: CANONICAL.encode(canonical(leaf)) for key, leaf in leaves if inside_hash(key)}
