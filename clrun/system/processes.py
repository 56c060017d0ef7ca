"""Which process of a run this is, and how many threads it can use; nothing here imports torch."""

import os

TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def under_torchrun() -> bool:
    """Return whether torchrun, or another launcher that sets the same environment variables, started this process."""
    return all(name in os.environ for name in TORCHRUN)


def torchrun_rank() -> int | None:
    """Return the rank of this process among those that torchrun started; None when torchrun did not start it."""
    return int(os.environ["RANK"]) if under_torchrun() else None


def core_count() -> int:
    """Return the number of CPU cores that this process may use: those it is bound to, where the system can tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
