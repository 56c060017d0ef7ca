"""Checkpoints: the pickled method and the results so far, written atomically and read without running code of the file.

The file has a header and checksums (`clrun.running.checkpoint_file`), which are verified before anything is unpickled.
A checkpoint may come from anywhere, so the method is opened with torch's restricted unpickler, under an explicit list
of classes and functions: those that occur in the method as the current configuration builds it, batches and splits of
data, and the classes of clrun's blocks and of the method's own module. Nothing in the run's folder can add to the list.
A method whose state holds anything else is refused when its first checkpoint is written.
"""

import io
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clrun.learning.method import Method
from clrun.running import checkpoint_file
from clrun.running.checkpoint_file import Damaged, Header
from clrun.running.evaluation import Row
from clrun.system.digests import tensor_digest
from clrun.system.errors import ConfigError, first_line
from clrun.system.hardware import Hardware

UNPICKLABLE = (pickle.PicklingError, AttributeError, TypeError)  # what Python raises for a lambda, an open file, ...
KEEP = "keep tensors, numbers, lists, dicts, batches and classes of the method's own module, or set job.resume=false"


class Unstorable(ConfigError):
    """The method holds something that cannot be pickled, so that no checkpoint can be written."""


@dataclass
class RunState:
    """The progress of a run. Together with the method it is all that resuming needs.

    Attributes:
        learned: tasks finished.
        steps: optimizer steps so far.
        rows: lines of accuracy.csv.
        costs: one entry per finished task, for run.json.
        data: identity of the data that the run learns from: `record` and `rows` of `clrun.data.identity.Identity`; None
            for a run from before data had one.
        start: the run from which this one went on (`job.start_from`), for run.json; None for a run from its beginning.
        predictions: number of bytes and CRC-32 of predictions.csv (`clrun.running.predictions`); None when unknown.
        extra: [correct, total] on each data set of `job.eval_extra` by name, before the first and after each task.
    """

    learned: int = 0
    steps: int = 0
    rows: list[Row] = field(default_factory=list)
    costs: list[dict[str, Any]] = field(default_factory=list)
    data: dict[str, Any] | None = None
    start: dict[str, Any] | None = None
    predictions: tuple[int, int] | None = None
    extra: list[dict[str, list[int]]] = field(default_factory=list)


def fingerprints(module: nn.Module) -> dict[str, str]:
    """Return the digest of each parameter and buffer of a network, or of the networks that a method has loaded."""
    return {name: tensor_digest(tensor) for name, tensor in tensors_of(module).items()}


def save(
    path: Path,
    method: Method,
    state: RunState,
    *,
    config_hash: str,
    backbone: dict[str, str],
    hardware: Hardware,
    flush: bool = True,
    allowed: list[Any] | None = None,
) -> None:
    """Write the checkpoint through a temporary file and a rename; the one before it is kept.

    Args:
        path: the file. The main process writes it; the others send it their methods.
        method: tensors of its networks that still are as loaded are stored by their digest only.
        state: the progress of the run.
        config_hash: hash of the configuration.
        backbone: digests of the networks as loaded (`fingerprints`).
        hardware: the processes; each of them has its own method.
        flush: wait until the file is on the disk; only then does it survive a loss of power.
        allowed: the `parts` of the method as it was built. The checkpoint is read back under this list before it is
            written. None skips this check.

    Raises:
        Unstorable: the method cannot be pickled.
        ConfigError: the disk is full or the folder unwritable; or the method could not be read back. The last
            checkpoint is left.
    """
    buffer = io.BytesIO()
    with by_reference(method, backbone) as referenced:
        dump(method, buffer)
    if allowed is not None:
        try:
            unpickled(buffer.getvalue(), allowed)
        except Exception as error:
            raise ConfigError(f"method: cannot be read back from a checkpoint ({reason_of(error)}); {KEEP}") from None
    alone = hardware.world == 1
    methods = [buffer.getbuffer()] if alone else [memoryview(data) for data in hardware.gather(buffer.getvalue())]
    if not hardware.main:
        return
    header = {"config_hash": config_hash, "learned": state.learned, "steps": state.steps}
    header |= {"rows": state.rows, "costs": state.costs, "referenced": referenced}
    header |= {"data": state.data, "start": state.start, "predictions": state.predictions, "extra": state.extra}
    checkpoint_file.write(path, header, methods, flush=flush)


def dump(value: Any, buffer: io.BytesIO) -> None:
    """Write the pickle of a method, or of a state that contains one, into memory.

    Raises:
        Unstorable: it cannot be pickled.
    """
    try:
        torch.save(value, buffer)
    except UNPICKLABLE as error:
        raise Unstorable(f"method: cannot be stored in a checkpoint ({first_line(error)}); {KEEP}") from None


def resume(
    path: Path, fresh: Method, *, config_hash: str, hardware: Hardware, tasks: int
) -> tuple[Method, RunState, str | None]:
    """Return the method and the progress of the last checkpoint that is intact, and why the one at `path` is not.

    Args:
        path: the checkpoint; it or the generation before it exists. A damaged one is left for the caller to remove.
        fresh: the method as the current configuration builds it, before the first task.
        config_hash: hash of the current configuration.
        hardware: the processes; their number must be that of the run so far.
        tasks: number of tasks of the stream.

    Raises:
        ConfigError: both generations are damaged; or see `load`; or the run had another number of processes.
    """
    damage = None
    found = checkpoint_file.generations(path)
    for file in found:
        try:
            header, data = checkpoint_file.read(file, rank=hardware.rank, tasks=tasks)
        except Damaged as error:
            if file is found[-1]:
                raise ConfigError("\n".join(filter(None, (damage and f"{path}: {damage}", str(error))))) from None
            damage = error.reason
            continue
        refuse_other_configuration(file, header.config_hash, config_hash)
        refuse_other_world(file, header.world, hardware)
        return *_restored(file, header, data, fresh, hardware), damage
    raise FileNotFoundError(path)


def refuse_other_world(path: Path, world: int, hardware: Hardware) -> None:
    """Raise unless the run has as many processes as before: `world`, as the file says.

    Memories, statistics and random numbers are divided among the processes, so that another number cannot go on.

    Raises:
        ConfigError: see above.
    """
    if world == hardware.world:
        return
    before, now = (f"{n} process{'' if n == 1 else 'es'}" for n in (world, hardware.world))
    verb = "is" if hardware.world == 1 else "are"
    advice = f"start it with torchrun and {before} in all"
    if world == hardware.processes:
        advice = "start it without torchrun"
    raise ConfigError(
        f"{path}: the state of the run is divided among {before}, and now there {verb} {now}; "
        f"{advice} to go on, or choose another hydra.run.dir to begin anew"
    )


def refuse_other_configuration(path: Path, stored: str, config_hash: str) -> None:
    """Raise unless the checkpoint, whose configuration has the hash `stored`, belongs to the one with this hash.

    Raises:
        ConfigError: see above.
    """
    if stored != config_hash:
        raise ConfigError(f"{path}: checkpoint of another configuration; use another hydra.run.dir or job.resume=false")


def load(path: Path, fresh: Method, *, config_hash: str, hardware: Hardware) -> tuple[Method, RunState]:
    """Return the method and the progress stored at `path`, in whatever number of processes.

    Args:
        path: the checkpoint.
        fresh: the method as the current configuration builds it, before the first task.
        config_hash: hash of the current configuration.
        hardware: the processes; this one takes the method that it has stored.

    Raises:
        Damaged: a checksum is wrong, or the file is no checkpoint.
        ConfigError: a field of the header is wrong; or the file belongs to another configuration or backbone, or names
            anything that the current method is not made of; in no case has any code of the file run.
    """
    header, data = checkpoint_file.read(path, rank=hardware.rank)
    refuse_other_configuration(path, header.config_hash, config_hash)
    return _restored(path, header, data, fresh, hardware)


def _restored(path: Path, header: Header, data: bytes, fresh: Method, hardware: Hardware) -> tuple[Method, RunState]:
    """Return the method that was pickled as `data`, and the progress.

    Raises:
        ConfigError: see `load`.
    """
    method = _read(path, data, parts(fresh))
    if type(method) is not type(fresh):
        raise ConfigError(
            f"{path}: holds a {type(method).__name__}, not a {type(fresh).__name__}; {checkpoint_file.remedy(path)}"
        )
    loaded, built = tensors_of(method), tensors_of(fresh)
    for name, digest in header.referenced.items():
        if name not in loaded or name not in built or tensor_digest(built[name]) != digest:
            raise ConfigError(
                f"{path}: was made with other backbone weights ({name}); name the weights that the run began with"
            )
        loaded[name].data = built[name].data
    hardware.place(method)
    names = ("learned", "steps", "rows", "costs", "data", "start", "extra")
    predictions = None if header.predictions is None else (header.predictions[0], header.predictions[1])
    return method, RunState(**{name: getattr(header, name) for name in names}, predictions=predictions)


def _read(path: Path, data: bytes, allowed: list[Any]) -> Any:
    """Return what `unpickled` returns.

    Raises:
        ConfigError: it refused the file at `path`.
    """
    try:
        return unpickled(data, allowed)
    except Exception as error:
        raise ConfigError(
            f"{path}: refused, nothing in it was run ({reason_of(error)}); {checkpoint_file.remedy(path)}"
        ) from None


def unpickled(data: bytes, allowed: list[Any]) -> Any:
    """Unpickle `data` with torch's restricted unpickler, extended by exactly the classes and functions `allowed`."""
    with torch.serialization.safe_globals(allowed), warnings.catch_warnings(action="ignore"):
        return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")


def reason_of(error: Exception) -> str:
    """Return the line of torch's message that says what was refused, without its advice on how to allow it."""
    lines = [line.strip() for line in str(error).splitlines()]
    named = next((line for line in lines if "global" in line.lower()), first_line(error))
    return named.partition("WeightsUnpickler error: ")[2].partition(" was not an allowed")[0] or named


# A method may add layers of any kind while it learns. Unpickling one sets its attributes and calls nothing.
LAYERS = [part for part in vars(nn).values() if isinstance(part, type) and issubclass(part, nn.Module)]


class _Collector(pickle.Pickler):
    """Collects every class and function that the pickle of an object names."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), protocol=2)
        self.found: dict[int, Any] = {}

    def reducer_override(self, value: Any) -> Any:
        """Collect `value` if it is a class or function, else its class; pickle it as usual, without tensor data."""
        if isinstance(value, torch.UntypedStorage | torch.TypedStorage):
            return int, ()
        part = value if callable(value) and hasattr(value, "__qualname__") else type(value)
        self.found[id(part)] = part
        return NotImplemented


def parts(method: Method) -> list[Any]:
    """Return the classes and functions that a checkpoint of `method` may name: its own, torch's layers, ours.

    Raises:
        Unstorable: it cannot be pickled.
    """
    collector = _Collector()
    try:
        collector.dump(method)
    except UNPICKLABLE as error:
        raise Unstorable(f"method: cannot be stored in a checkpoint ({first_line(error)}); {KEEP}") from None
    found = [*collector.found.values(), *LAYERS]
    homes = {cls.__module__ for cls in type(method).__mro__ if issubclass(cls, Method)} | {"clrun.data.split"}
    ours = ("clrun.blocks.", "clrun.learning.")
    for module in [m for name, m in list(sys.modules.items()) if name in homes or name.startswith(ours)]:
        found += [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
    forbidden = {getattr, setattr, eval, exec, __import__}
    return [part for part in found if getattr(part, "__module__", None) and part not in forbidden]


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers of a network, or of the networks that a method has loaded.

    The backbone's have the names that they have in it; those of other networks begin with the network's name.
    """
    networks = module.loaded_networks() if isinstance(module, Method) else {"": module}
    found: dict[str, Tensor] = {}
    for name, network in networks.items():
        tensors = (*network.named_parameters(), *network.named_buffers())
        found |= {f"{name}:{path}" if name else path: tensor for path, tensor in tensors}
    return found


@contextmanager
def by_reference(
    method: Method, backbone: Mapping[str, str], among: Callable[[Tensor], bool] = lambda tensor: True
) -> Iterator[dict[str, str]]:
    """Empty tensors of the method that equal the loaded backbone's while the block runs; yield their digests.

    Args:
        method: the method.
        backbone: digests of the networks as loaded.
        among: which tensors come into question; the others are not even compared.
    """
    possible = {name: t for name, t in tensors_of(method).items() if name in backbone and among(t)}
    equal = {name: t for name, t in possible.items() if tensor_digest(t) == backbone[name]}
    contents = {name: tensor.data for name, tensor in equal.items()}
    try:
        for tensor in equal.values():
            tensor.data = tensor.data.new_empty(0)
        yield {name: backbone[name] for name in equal}
    finally:
        for name, tensor in equal.items():
            tensor.data = contents[name]
