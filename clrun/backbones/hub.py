"""The place of the published weights of a timm model: in the cache of the Hugging Face hub, or still to be downloaded.

The hub's own client asks the network even about cached files, and without a network it retries for most of a minute.
Here cached files are used without a request, and a missing network is noticed within seconds.
"""

import ssl
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from clrun.system import libraries
from clrun.system.errors import ConfigError

SECONDS = 5.0  # to wait for the first answer
FILES = ("model.safetensors", "pytorch_model.bin")


def locate(name: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the overlay of the configuration with which timm loads a model's weights.

    Args:
        name: a timm model with the tag of its weights, or a source ("hf-hub:OWNER/NAME", "local-dir:...").

    Raises:
        ConfigError: the weights are not in the cache and the hub does not answer; or a source's folder is missing.
    """
    if name.startswith("local-dir:"):
        if not Path(name.partition(":")[2]).is_dir():
            raise ConfigError(f"backbone.name: {name} cannot be opened (no such folder)")
        return name, {}
    if name.startswith("hf-hub:"):
        repository = name.partition(":")[2]
        config = _cached(repository, ("config.json",))
        if config is not None and _cached(repository, FILES):
            return f"local-dir:{config.parent}", {}
        _require_hub(name)
        return name, {}
    found = None if ":" in name else libraries.load("timm").models.get_pretrained_cfg(name)
    if found is None or not found.hf_hub_id:
        return name, {}
    given = found.hf_hub_filename or FILES[1]
    file = _cached(found.hf_hub_id, (given.replace(FILES[1], FILES[0]), given, *FILES))  # as in timm: safetensors first
    if file is not None:
        return name, {"file": str(file), "custom_load": False}
    _require_hub(name)
    return name, {}


def missing(name: str, reason: str) -> str:
    """Return the message for weights that are neither cached nor can be downloaded."""
    return (
        f"weights of {name} are not on this machine and downloading failed; "
        f"set backbone.weights=FILE or backbone.pretrained=false ({reason})"
    )


def _cached(repository: str, files: tuple[str, ...]) -> Path | None:
    """Return the first of these files that is in the cache, of a repository ("OWNER/NAME" or "OWNER/NAME@REVISION")."""
    hub = libraries.load("huggingface_hub")
    owner, _, revision = repository.partition("@")
    for file in files:
        found = hub.try_to_load_from_cache(owner, file, revision=revision or None)
        if isinstance(found, str):
            return Path(found)
    return None


def _require_hub(name: str) -> None:
    """Refuse to download the weights of `name` if the hub does not answer, or HF_HUB_OFFLINE forbids requests."""
    constants = libraries.load("huggingface_hub.constants")
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _silence(constants.ENDPOINT)
    if reason is not None:
        raise ConfigError(missing(name, reason))


def _silence(url: str) -> str | None:
    """Return the reason why there is no answer from `url`; None if there is any answer."""
    reasons: list[str | None] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=SECONDS).close()
        except urllib.error.HTTPError:
            pass
        except OSError as error:
            reason = getattr(error, "reason", error)
            if not isinstance(reason, ssl.SSLError):  # the client of the hub may trust other certificates
                return reasons.append(str(reason))
        reasons.append(None)

    probe = threading.Thread(target=ask, daemon=True)  # resolving a name cannot be given a time limit
    probe.start()
    probe.join(SECONDS)
    return reasons[0] if reasons else f"no answer within {SECONDS:g} s"
