"""Device, precision, threads and processes of a run; starting processes and averaging their gradients.

Data parallelism is one explicit all-reduce of the gradients after backward. There is no wrapper module, so that
parameter names have no prefix and methods may grow heads or call backward several times.
"""

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import spawn

from clrun.system import signals
from clrun.system.errors import ConfigError, NumericalError, PositiveInt, Range
from clrun.system.files import replace_text
from clrun.system.processes import core_count, under_torchrun

GROUP_TIMEOUT = timedelta(minutes=5)
MOST_THREADS = 4096  # no machine has more cores, and torch takes no number of any size


@dataclass
class Hardware:
    """The hardware that one process of a run uses.

    Attributes:
        device: "auto" (a GPU when there is one), "cpu", "cuda", "cuda:1"; after `setup` the device in use.
        processes: number of processes on this machine that share each batch; torchrun's world size replaces it.
        precision: "fp32"; "tf32" (fp32 with TF32 matrix products on the GPU); "bf16" (autocast of forward passes).
        threads: CPU threads of each process; null divides the cores among the processes and jobs that run together.
        workers: threads of each process that decode image files in advance; 0 decodes each image when it is needed;
            null uses one per core of this process, as for `threads`.
        deterministic: raise an error for operations whose result may differ between two runs.
        channels_last: store images and convolution weights in channels-last order, in which convolutions are faster.
        compile: compile the backbone with torch.compile.
        rank: number of this process, from 0.
        world: number of processes of the run.
        asking: what this process asks all of them for; a number, 0 for nothing.
        asked_for: the sum over the processes of `asking` at the last average of gradients, the same in all of them.
    """

    device: str
    processes: PositiveInt
    precision: Literal["fp32", "tf32", "bf16"]
    threads: Annotated[int, Range(minimum=1, maximum=MOST_THREADS)] | None
    workers: Annotated[int, Range(minimum=0, maximum=MOST_THREADS)] | None
    deterministic: bool
    channels_last: bool
    compile: bool
    rank: int = field(default=0, init=False)
    world: int = field(default=1, init=False)
    asking: int = field(default=0, init=False)
    asked_for: int = field(default=0, init=False)

    def setup(self, *, rank: int = 0, world: int = 1, job: int = 0, parallel: int = 1) -> None:
        """Select the device and set all process-wide options of torch, so that no option of an earlier job remains.

        Args:
            rank: number of this process, from 0.
            world: number of processes of the run.
            job: number of the job in a sweep; selects the GPU of a job that runs together with others.
            parallel: number of jobs that run at the same time on this machine.

        Raises:
            ConfigError: the device does not exist, or it does not support the precision.
        """
        self.rank, self.world = rank, world
        self.device = _pick_device(self.device, int(os.environ.get("LOCAL_RANK", rank)), job if parallel > 1 else 0)
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", self.processes)) * parallel  # processes that share the cores
        own_cores = max(1, core_count() // sharing)
        self.threads = self.threads or own_cores
        self.workers = own_cores if self.workers is None else self.workers
        torch.set_num_threads(self.threads)
        cuda = self.device.startswith("cuda")
        if cuda:
            torch.cuda.set_device(self.device)
            if self.precision == "bf16" and not torch.cuda.is_bf16_supported():
                raise ConfigError(f"hardware.precision=bf16: {torch.cuda.get_device_name()} has no bf16; use fp32")
        if self.precision == "tf32" and not cuda:
            raise ConfigError(f"hardware.precision=tf32 needs a GPU, the device is {self.device}; use fp32 or bf16")
        torch.set_float32_matmul_precision("high" if self.precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = self.precision == "tf32"
        torch.backends.cudnn.benchmark = not self.deterministic
        if self.deterministic and cuda:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(self.deterministic)
        # Filling new memory only guards against reading it before it is written; it changes no result and costs time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

    @property
    def main(self) -> bool:
        """Return whether this process writes files and prints."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which forward passes run."""
        if self.precision == "bf16":
            return torch.autocast(self.device.split(":")[0], dtype=torch.bfloat16)
        return nullcontext()

    def place(self, module: nn.Module) -> None:
        """Move `module` to the device, with its convolution weights in the memory format of the images."""
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        module.to(device=self.device, memory_format=memory_format)  # type: ignore[call-overload]

    def layout(self, x: Tensor) -> Tensor:
        """Return images [B, C, H, W] in the memory format chosen by `channels_last`; other tensors unchanged."""
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last and x.dim() == 4 else x

    def synchronize(self) -> None:
        """Wait until the device has finished its work, so that a time measured next includes it."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()

    def sum(self, value: Tensor) -> Tensor:
        """Replace `value` by its sum over the processes and return it."""
        if self.world > 1:
            distributed.all_reduce(value)
        return value

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace each gradient by its mean over the processes.

        A gradient missing on some processes counts as zero there; one missing on all of them stays missing.
        """
        if self.world == 1 or not parameters:
            return
        flags = [*(p.grad is not None for p in parameters), self.asking]
        present = torch.tensor(flags, dtype=torch.float32, device=self.device)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = self.sum(torch.cat([g.reshape(-1).float() for g in grads] + [present]))
        parts = torch.split(flat, [g.numel() for g in grads] + [len(flags)])
        *somewheres, asked = parts[-1].tolist()
        self.asked_for = round(asked)
        for parameter, part, somewhere in zip(parameters, parts[:-1], somewheres, strict=True):
            if somewhere:
                parameter.grad = (part / self.world).view_as(parameter).to(parameter.dtype)

    def average_buffers(self, buffers: Iterable[Tensor]) -> None:
        """Replace floating-point buffers (running statistics) by their mean over the processes."""
        if self.world > 1:
            for buffer in buffers:
                if buffer.is_floating_point():
                    buffer.copy_(self.sum(buffer.clone()) / self.world)

    def gather(self, value: bytes) -> list[bytes]:
        """Return the `value` of every process, by rank, on the main process; an empty list on the others."""
        if self.world == 1:
            return [value]
        slots: list[bytes] | None = [b""] * self.world if self.main else None
        distributed.gather_object(value, slots)
        return slots or []


def _pick_device(wanted: str, local_rank: int, job: int) -> str:
    """Return the device of this process as a string; processes and jobs get different GPUs."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        wanted = "cuda" if gpus else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ConfigError(f"hardware.device: there is no device '{wanted}'; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda":
        raise ConfigError(f"hardware.device: '{wanted}' is not supported; use auto, cpu, cuda or cuda:N")
    if not gpus:
        raise ConfigError(f"hardware.device={wanted}: torch sees no GPU on this machine; use hardware=cpu")
    index = (local_rank + job) % gpus if device.index is None else device.index
    if index >= gpus:
        raise ConfigError(f"hardware.device={wanted}: this machine has {gpus} GPU(s), numbered from 0")
    return f"cuda:{index}"


def launch(work: Callable[..., float], arguments: tuple[Any, ...], *, processes: int, device: str) -> float:
    """Call `work(*arguments, rank, world)` in one process, in `processes` new ones, or as one of torchrun's.

    Args:
        work: a function at module level, because new processes import it; the result of the main process is returned.
        arguments: arguments that can be pickled.
        processes: number of processes; 1 calls `work` in this process.
        device: `hardware.device`; selects the backend gloo or nccl.

    Raises:
        ConfigError: a process found a mistake of the user, or this build of torch has no such backend.
        NumericalError: training diverged in a process.
        RuntimeError: a process failed and the others were stopped; the message has its traceback.
    """
    if not (processes > 1 or under_torchrun()):
        return work(*arguments, 0, 1)
    cuda = torch.cuda.is_available() and device != "cpu"
    backend = "nccl" if cuda else "gloo"
    if not distributed.is_available() or not distributed.is_backend_available(backend):
        raise ConfigError(
            f"hardware.processes={processes}: this build of torch has no {backend} backend; set hardware.processes=1"
        )
    if under_torchrun():
        return _join("env://", work, arguments, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), backend)
    if cuda and processes > torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(
            f"hardware.processes={processes}: this machine has {count} GPU(s), one per process; use at most {count}"
        )
    with tempfile.TemporaryDirectory(prefix="clrun-") as folder:
        return _spawned(Path(folder), work, arguments, processes, backend)


def _spawned(
    folder: Path, work: Callable[..., float], arguments: tuple[Any, ...], processes: int, backend: str
) -> float:
    """Call `work` in new processes, which leave what they have to say in `folder`; see `launch`.

    Raises:
        Stopped: a signal has asked the processes to stop, and they have.
    """
    try:
        workers = spawn(_worker, (folder, work, arguments, processes, backend), nprocs=processes, join=False)  # type: ignore[no-untyped-call]
        with signals.forwarded(workers.pids()):
            while not workers.join():
                continue
    except Exception as error:
        for kind in (ConfigError, NumericalError):
            for message in sorted(folder.glob(f"{kind.__name__}-*")):
                raise kind(message.read_text()) from None
        if signals.requested() is None:
            raise RuntimeError(f"a process of the run failed: {error}") from None
    stopped = [int(file.suffix[1:]) for file in folder.glob("Stopped.*")]
    if number := signals.requested() or max(stopped, default=0):
        raise signals.Stopped(number)
    return float(json.loads((folder / "result").read_text()))


def _worker(
    rank: int, folder: Path, work: Callable[..., float], arguments: tuple[Any, ...], world: int, backend: str
) -> None:
    """Run one spawned process; it writes its result, or its error, into a file in `folder`."""
    threading.Thread(target=_die_with_parent, args=(os.getppid(),), daemon=True).start()
    try:
        result = _join(f"file://{folder}/rendezvous", work, arguments, rank, world, backend)
    except signals.Stopped as stop:
        replace_text(folder / f"Stopped.{stop.number}", "", flush=False)
    except (ConfigError, NumericalError) as error:
        replace_text(folder / f"{type(error).__name__}-{rank}", str(error), flush=False)
        raise
    else:
        if rank == 0:
            replace_text(folder / "result", json.dumps(result), flush=False)


def _join(
    url: str, work: Callable[..., float], arguments: tuple[Any, ...], rank: int, world: int, backend: str
) -> float:
    """Run `work` as a member of a process group."""
    distributed.init_process_group(backend, init_method=url, rank=rank, world_size=world, timeout=GROUP_TIMEOUT)
    try:
        return work(*arguments, rank, world)
    finally:
        distributed.destroy_process_group()


def _die_with_parent(parent: int) -> None:
    """End this process when its parent has ended; it would otherwise wait for the others until the timeout."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
