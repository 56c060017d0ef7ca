"""Loading of networks: the check of a backbone, and the networks that a method has besides it, such as teachers.

The latter are made as the backbone is: by a factory that the configuration names, which is called with the shape of
the stored images after the generators were seeded; then checked, and placed on the device.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from clrun.data.modality import modality_of
from clrun.data.split import Transform
from clrun.data.stream import Dataset
from clrun.data.transforms import second_transform
from clrun.learning.networks import FrozenNetwork
from clrun.running.accounting import parameter_counts
from clrun.running.parts import Parts, function_of, options_of
from clrun.system.errors import ConfigError
from clrun.system.seeding import seed_all


def check_features(backbone: Any, name: str, dataset: Dataset, *, where: str = "backbone") -> None:
    """Refuse a backbone without `num_features`; one that is not clrun's own is tried on one blank row, in a copy.

    Args:
        backbone: the network.
        name: dotted name of what has made it.
        dataset: the data set whose rows it will read.
        where: option that names it, for messages.

    Raises:
        ConfigError: see above, or its features are not [B, num_features].
    """
    if not isinstance(backbone, nn.Module):
        raise ConfigError(f"{where}: {name} is no torch.nn.Module")
    width, size = (getattr(backbone, key, None) for key in ("num_features", "input_size"))
    if not isinstance(width, int):
        raise ConfigError(f"{where}: {name} has no num_features; set self.num_features to the width of its features")
    if name.startswith("clrun."):
        return
    if size is not None and not (isinstance(size, tuple | list | torch.Size) and len(size) == len(dataset.shape)):
        raise ConfigError(f"{where}: {name} has input_size={size!r}, expected (channels, height, width)")
    with torch.no_grad():
        features = copy.deepcopy(backbone).eval()(modality_of(dataset).blank(dataset, backbone))
    if features.shape != (1, width):
        shape = f"[B, {', '.join(map(str, features.shape[1:]))}]"
        raise ConfigError(f"{where}: {name} returns features {shape}, expected [B, num_features] = [B, {width}]")


def load_networks(parts: Parts, dataset: Dataset, transform: Transform) -> dict[str, FrozenNetwork]:
    """Return the networks that the method of a configuration has besides its backbone, by the path of their option.

    Args:
        parts: of the configuration; its hardware is set up.
        dataset: the data set.
        transform: prepares images for the backbone.

    Raises:
        ConfigError: an option names no network, or one that cannot be loaded or used here; the message begins with the
            path of the option.
    """
    found = {}
    for path, factory in parts.method_class.further_networks(options_of(parts.method_factory)).items():
        function = function_of(factory)
        name = f"{function.__module__}.{function.__qualname__}"
        with _naming(path):
            seed_all(parts.seed, "init", path)
            network = factory(dataset.shape)
            check_features(network, name, dataset, where=path)
            parts.hardware.place(network)
            fitted, text = second_transform(dataset, transform, network)
        about = {
            "target": name,
            "features": int(network.num_features),  # type: ignore[arg-type]
            "parameters": parameter_counts(network)["total"],
            "input": text,
            "weights": getattr(network, "weights_read", None),
        }
        short = str(options_of(factory).get("name") or function.__qualname__)
        found[path] = FrozenNetwork(f"{short} ({path})", network, fitted, about)
    return found


def check_networks(parts: Parts) -> None:
    """Find mistakes in the options of these networks without building them, as for the backbone.

    Raises:
        ConfigError: one was found.
    """
    for path, factory in parts.method_class.further_networks(options_of(parts.method_factory)).items():
        check = getattr(function_of(factory), "preflight", None)
        if check is not None:
            with _naming(path):
                check(**options_of(factory))


def network_record(networks: Mapping[str, FrozenNetwork]) -> dict[str, Any]:
    """Return the entry `networks` of run.json, which describes each of them by the path of its option; {} for none."""
    return {"networks": {path: network.about for path, network in networks.items()}} if networks else {}


def network_notes(networks: Mapping[str, FrozenNetwork]) -> list[str]:
    """Return the notes of run.json on how the weights of the networks were read."""
    read = [(network.name, (network.about or {}).get("weights") or {}) for network in networks.values()]
    return [f"{name}: {note}" for name, weights in read for note in weights.get("notes", [])]


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Let a `ConfigError` of the block, which knows the backbone's options only, name those at `path`."""
    try:
        yield
    except ConfigError as error:
        text = str(error).replace("backbone.", f"{path}.")
        raise ConfigError(text if text.startswith(path) else f"{path}: {text.removeprefix('backbone: ')}") from error
