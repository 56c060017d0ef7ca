"""The public face of clrun: start and read runs from Python, and import what an own part needs.

Everything named here is documented (docs/api.md) and stays; any other module of clrun is private by convention and may
change without notice. Importing this module is cheap: torch and pandas are imported when they are first needed.

To run: `run`, `load`, `sweep`, `load_sweep`, which return `Run` and `Sweep`; `Run.learner` returns a `Learner`.
To write a method: `Method`, `Batch`, `Context`, `Task`, `Stream`, `Budget`, `fit`, `masked_cross_entropy`, `freeze`,
`ReservoirBuffer`. To write a data set: `loader`, `Reading`, `assemble`, `Dataset`, `Split`, `TensorSplit`, `Texts`,
`to_bytes`. Errors: `ConfigError`, `NumericalError`, `DataWarning`. Ranges of options: `Range`, `Count`, `PositiveInt`,
`NonNegative`, `Positive`, `Fraction`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clrun.api.learner import Learner, Prediction
    from clrun.api.runs import Cost, Run, TaskInfo, load, run
    from clrun.api.sweeps import Sweep, load_sweep, sweep
    from clrun.blocks.buffers import ReservoirBuffer
    from clrun.data.modality import Texts
    from clrun.data.reading.assemble import assemble
    from clrun.data.reading.options import Reading, loader
    from clrun.data.split import Batch, Split, TensorSplit
    from clrun.data.stream import Dataset, Stream, Task
    from clrun.data.texts import to_bytes
    from clrun.learning.budget import Budget
    from clrun.learning.context import Context
    from clrun.learning.losses import masked_cross_entropy
    from clrun.learning.method import Method, freeze
    from clrun.learning.training import fit
    from clrun.results.metrics import AccuracyMatrix
    from clrun.system.errors import (
        ConfigError,
        Count,
        DataWarning,
        Fraction,
        NonNegative,
        NumericalError,
        Positive,
        PositiveInt,
        Range,
    )

_HOMES = {
    "clrun.api.learner": ("Learner", "Prediction"),
    "clrun.api.runs": ("Cost", "Run", "TaskInfo", "load", "run"),
    "clrun.api.sweeps": ("Sweep", "load_sweep", "sweep"),
    "clrun.blocks.buffers": ("ReservoirBuffer",),
    "clrun.data.modality": ("Texts",),
    "clrun.data.reading.assemble": ("assemble",),
    "clrun.data.reading.options": ("Reading", "loader"),
    "clrun.data.split": ("Batch", "Split", "TensorSplit"),
    "clrun.data.stream": ("Dataset", "Stream", "Task"),
    "clrun.data.texts": ("to_bytes",),
    "clrun.learning.budget": ("Budget",),
    "clrun.learning.context": ("Context",),
    "clrun.learning.losses": ("masked_cross_entropy",),
    "clrun.learning.method": ("Method", "freeze"),
    "clrun.learning.training": ("fit",),
    "clrun.results.metrics": ("AccuracyMatrix",),
    "clrun.system.errors": (
        "ConfigError",
        "Count",
        "DataWarning",
        "Fraction",
        "NonNegative",
        "NumericalError",
        "Positive",
        "PositiveInt",
        "Range",
    ),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AccuracyMatrix",
    "Batch",
    "Budget",
    "ConfigError",
    "Context",
    "Cost",
    "Count",
    "DataWarning",
    "Dataset",
    "Fraction",
    "Learner",
    "Method",
    "NonNegative",
    "NumericalError",
    "Positive",
    "PositiveInt",
    "Prediction",
    "Range",
    "Reading",
    "ReservoirBuffer",
    "Run",
    "Split",
    "Stream",
    "Sweep",
    "Task",
    "TaskInfo",
    "TensorSplit",
    "Texts",
    "assemble",
    "fit",
    "freeze",
    "load",
    "load_sweep",
    "loader",
    "masked_cross_entropy",
    "run",
    "sweep",
    "to_bytes",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for from the module where it is defined."""
    if name not in _HOME:
        raise AttributeError(f"module 'clrun.api' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
