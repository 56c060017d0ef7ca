"""The cost of a run: parameters, bytes of state, FLOPs, peak memory; and the versions it ran with."""

import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clrun.learning.method import Method
from clrun.system.hardware import Hardware


def parameter_counts(*modules: nn.Module, frozen: nn.Module | None = None) -> dict[str, int]:
    """Return the numbers of parameters of `modules` together: "total" and "trainable".

    Args:
        modules: a parameter that several of them have in common counts once.
        frozen: a module whose parameters count as not trainable, whatever their `requires_grad`.
    """
    unique = {id(p): p for module in modules for p in module.parameters()}
    fixed = set() if frozen is None else {id(p) for p in frozen.parameters()}
    return {
        "total": sum(p.numel() for p in unique.values()),
        "trainable": sum(p.numel() for key, p in unique.items() if p.requires_grad and key not in fixed),
    }


def learner_parameters(method: Method, backbone: nn.Module) -> dict[str, int]:
    """Return the parameter counts of a learner, its backbone included.

    Args:
        method: the learner. One that reads features of the frozen backbone may not hold that backbone; its parameters
            are counted all the same, as not trainable.
        backbone: the backbone as loaded.
    """
    if method.uses_frozen_features:
        return parameter_counts(backbone, method, frozen=backbone)
    return parameter_counts(method)


def token_count(backbone: nn.Module) -> int | None:
    """Return the number of tokens per image of a vision transformer, with class token and registers; else None."""
    patches = getattr(getattr(backbone, "patch_embed", None), "num_patches", None)
    prefix = getattr(backbone, "num_prefix_tokens", None)
    return None if patches is None or prefix is None else int(patches) + int(prefix)


def state_bytes(method: nn.Module) -> dict[str, int]:
    """Return the bytes of all tensors in the state of the method, by its top-level attributes, and their total.

    A storage that several attributes share counts once, for the first of them.
    """
    counted: set[int] = set()
    sizes = {}
    attributes = {**vars(method), **method._parameters, **method._buffers, **method._modules}
    for name, value in attributes.items():
        if name in ("_parameters", "_buffers", "_modules"):
            continue
        size = sum(_bytes(t, counted) for t in _tensors(value, set()))
        if size:
            sizes[name] = size
    return {**sizes, "total": sum(sizes.values())}


def _bytes(tensor: Tensor, counted: set[int]) -> int:
    """Return the bytes of the tensor's storage; 0 when it was counted before."""
    storage = tensor.untyped_storage()
    if storage.data_ptr() in counted:
        return 0
    counted.add(storage.data_ptr())
    return storage.nbytes()


def _tensors(value: Any, visited: set[int]) -> Iterable[Tensor]:
    """Yield the tensors reachable from `value` through modules, containers and objects of clrun or of the user.

    Attributes whose names are in an object's `not_state` are left out.
    """
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in visited:
        return
    visited.add(id(value))
    if isinstance(value, Mapping):
        children: Iterable[Any] = value.values()
    elif isinstance(value, list | tuple | set):
        children = value
    elif isinstance(value, type) or not hasattr(value, "__dict__"):
        children = [getattr(value, n) for n in getattr(type(value), "__slots__", ()) if hasattr(value, n)]
    else:
        children = [own for name, own in vars(value).items() if name not in getattr(value, "not_state", ())]
    for child in children:
        yield from _tensors(child, visited)


def forward_flops(module: nn.Module, x: Tensor, *arguments: Any) -> int | None:
    """Return the FLOPs (2 per multiply-add) of one forward pass of `x` [1, ...], or None when they cannot be counted.

    Counts what torch.utils.flop_counter knows: matrix products, convolutions, attention.
    """
    from torch.utils.flop_counter import FlopCounterMode

    training = module.training
    module.eval()
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter:
            module(x, *arguments)
    except NotImplementedError:
        return None
    finally:
        module.train(training)
    return int(counter.get_total_flops())


class PeakMemory:
    """The largest memory in use since the last `reset`: of the GPU where there is one, else resident memory.

    Attributes:
        hardware: the device whose memory is measured.
    """

    def __init__(self, hardware: Hardware) -> None:
        self.hardware = hardware

    def reset(self) -> None:
        """Begin a new measurement. On systems other than Linux the maximum of resident memory cannot be reset."""
        if self.hardware.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return

    def read(self) -> int:
        """Return the peak in bytes."""
        if self.hardware.device.startswith("cuda"):
            return int(torch.cuda.max_memory_allocated())
        try:
            status = Path("/proc/self/status").read_text()
        except OSError:
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak if sys.platform == "darwin" else peak * 1024
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


HOME = Path(__file__).resolve().parents[2]  # the checkout of clrun, where there is one
# Entries of `versions` with which the last bits of a number change while its configuration stays the same.
CIRCUMSTANCES = ("torch", "threads", "processes", "device", "cpu_capability")


def changed_circumstances(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return which of `CIRCUMSTANCES` differ between two results of `versions`, as text; "" if none does."""
    names = [name for name in CIRCUMSTANCES if name in before and before[name] != now[name]]
    return ", ".join(f"{name} was {before[name]} and is {now[name]}" for name in names)


def versions(hardware: Hardware) -> dict[str, Any]:
    """Return everything besides the configuration that results may depend on: code, libraries, threads and device."""
    names = ("torch", "torchvision", "timm", "numpy", "hydra-core")
    cuda = hardware.device.startswith("cuda")
    return {
        "clrun": _version("clrun"),
        "git_commit": _commit_of_clrun() if (HOME / ".git").exists() else _commit(Path.cwd()),
        "python": platform.python_version(),
        **{name: _version(name) for name in names},
        "threads": hardware.threads,
        "processes": hardware.world,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "platform": platform.platform(),
    }


@cache
def _version(name: str) -> str | None:
    """Return the installed version of a distribution without importing it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@cache
def _commit_of_clrun() -> str | None:
    """Return the commit of clrun's checkout, as it was at the first run of this process, whose code it is."""
    return _commit(HOME)


def _commit(where: Path) -> str | None:
    """Return the commit of the checkout around a folder, with "+" for uncommitted changes."""
    try:
        git = ["git", "-C", str(where), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
        done = subprocess.run(git, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
