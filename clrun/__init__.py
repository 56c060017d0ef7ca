"""clrun: continual-learning experiments composed from data set, backbone, method, task order and hardware.

`clrun.api` is the public face for Python; `clrun.run`, `clrun.load`, `clrun.sweep` and `clrun.load_sweep` are its
functions. Every other module is private by convention and may change without notice.
"""

import importlib
import os
from typing import Any

__version__ = "0.1.0"

# Threads that wait for each other by spinning take the processor from those they wait for as soon as anything else runs
# on the machine: a run of small networks then takes twenty times as long. Read once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def __getattr__(name: str) -> Any:
    """Return `clrun.api`, or one of its functions; imported when first asked for."""
    if name == "api":
        return importlib.import_module("clrun.api")
    if name in ("run", "load", "sweep", "load_sweep"):
        return getattr(importlib.import_module("clrun.api"), name)
    raise AttributeError(f"module 'clrun' has no attribute '{name}'")
