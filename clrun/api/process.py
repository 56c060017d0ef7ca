"""What a run changes in its process, and how it is restored: a notebook keeps its own settings and random numbers."""

import os
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def borrowed() -> Iterator[None]:
    """Restore Hydra's version, Python's path, torch's switches and the generators of random numbers after the block.

    The working directory is on Python's path meanwhile, as for the command line: an option may name a class of its
    modules.
    """
    with ExitStack() as stack:
        stack.enter_context(_hydra_version())
        stack.enter_context(_working_directory())
        stack.enter_context(_switches())
        stack.enter_context(_generators())
        yield


@contextmanager
def _hydra_version() -> Iterator[None]:
    from hydra import version

    base = version.getbase()
    try:
        from clrun.config import compose

        version.setbase(compose.HYDRA_BASE)
        yield
    finally:
        version.VersionBase.instance().version_base = base


@contextmanager
def _working_directory() -> Iterator[None]:
    folder = os.getcwd()
    added = folder not in sys.path and "" not in sys.path
    if added:
        sys.path.append(folder)  # last, so that a stray torch.py shadows nothing
    try:
        yield
    finally:
        if added and folder in sys.path:
            sys.path.remove(folder)


@contextmanager
def _switches() -> Iterator[None]:
    """Restore what `Hardware.setup` sets for the whole process."""
    import torch

    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    matmul, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    benchmark = torch.backends.cudnn.benchmark
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    device = torch.cuda.current_device() if _cuda_in_use() else None
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = tf32, benchmark
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        if device is not None:
            torch.cuda.set_device(device)


@contextmanager
def _generators() -> Iterator[None]:
    """Restore the global generators, which a run seeds."""
    import numpy as np
    import torch

    state, numbers, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if _cuda_in_use() else []
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numbers)
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)


def _cuda_in_use() -> bool:
    """Whether this process has used a GPU; asking for its state would start one."""
    import torch

    return torch.cuda.is_available() and bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
