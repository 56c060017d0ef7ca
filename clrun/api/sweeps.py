"""Many runs: start them, or read the folder that holds them."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clrun.api.overrides import Overrides, as_arguments
from clrun.api.runs import Run, load, settings_of, start
from clrun.reporting.sweep import SweepResult, read_runs, sweep_table
from clrun.system import libraries
from clrun.system.errors import ConfigError
from clrun.system.files import json_text

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Sweep:
    """The results of all runs at or below one folder, read from their files.

    Attributes:
        folder: the folder.
        failed: one line for each run without a result: what was run, and why it ended.
        text: the table that the command line prints after a sweep.
    """

    folder: Path
    failed: tuple[str, ...]
    text: str = field(repr=False)
    _result: SweepResult = field(repr=False)

    def __len__(self) -> int:
        """Return the number of runs that left a folder."""
        return len(self._result.runs)

    def __iter__(self) -> Iterator[Run]:
        """Yield the runs, sorted by folder."""
        return iter(self.runs)

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The runs, sorted by folder, failed ones included."""
        return tuple(load(run.folder) for run in self._result.runs)

    @property
    def order_robustness(self) -> tuple[Mapping[str, Any], ...]:
        """The content of order_robustness.json: one entry per experiment and setting.

        Among others: `mean`, `sd` and `ci95` over orders, `opd` of each task, `aopd`, `mopd`, and `caveats`.
        """
        return tuple(json.loads(json_text(self._result.robustness)))

    @property
    def comparisons(self) -> tuple[Mapping[str, Any], ...]:
        """The content of method_comparison.json: tests and effect sizes for methods over the same orders."""
        return tuple(json.loads(json_text(self._result.comparisons)))

    def frame(self) -> "pd.DataFrame":
        """Return sweep.csv as a frame, one row per run.

        Columns are folder, status, method, backbone, dataset, seed, order, the metrics by setting (`cil_forgetting`),
        cost, error, and every key of the configuration in which the runs differ.
        """
        header, lines = sweep_table(self._result.runs)
        frame: pd.DataFrame = libraries.load("pandas").DataFrame(lines, columns=header)
        return frame

    def order_robustness_frame(self) -> "pd.DataFrame":
        """Return the numbers of `order_robustness`, one row per experiment and setting; accuracies are fractions."""
        rows = [
            {key: value for key, value in entry.items() if not isinstance(value, dict | list) or key == "ci95"}
            for entry in self.order_robustness
        ]
        frame: pd.DataFrame = libraries.load("pandas").DataFrame(rows)
        return frame


def sweep(
    overrides: Overrides = (),
    *,
    folder: str | Path | None = None,
    progress: bool | None = None,
    config_dir: str | Path | None = None,
    config_name: str | None = None,
    **options: Any,
) -> Sweep:
    """Run every combination of the given values, or continue what is in the folder, and return the results.

    Args:
        overrides: as on the command line with -m: ["method=er,ewc", "seed=range(3)"], one text, or a mapping
            {"method": ["er", "ewc"], "seed": range(3)}, in which a list is the values to run; an option that is itself
            a list is a list in a list.
        folder: where the folders of the runs go; None chooses a new one below outputs/sweeps/.
        progress: print tables and the accuracies of each run; None is as configured.
        config_dir: a folder of your own YAML files, as --config-dir.
        config_name: another main configuration file, as --config-name.
        options: further keys and values, as sweep(method=["er", "ewc"], seed=range(3)).

    Returns:
        The sweep; runs that failed are named in `Sweep.failed`, and the others have gone on.

    Raises:
        ConfigError: a mistake in the configuration of any run; none was started.
    """
    arguments = as_arguments(overrides, options, sweep=True)
    arguments += settings_of(arguments, {"hydra.sweep.dir": folder, "job.progress": progress})
    where, failed = start(arguments, sweep=True, config_dir=config_dir, config_name=config_name, progress=progress)
    return _sweep(where, failed)


def load_sweep(folder: str | Path) -> Sweep:
    """Return the results of all runs at or below a folder; nothing is written.

    Raises:
        ConfigError: there is no such folder, or no run in it.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ConfigError(f"load_sweep: no such folder: {path}")
    found = _sweep(path, None)
    if not len(found) and not found.failed:
        raise ConfigError(f"load_sweep: no run (run.json) in {path}")
    return found


def _sweep(folder: Path, failed: tuple[str, ...] | None) -> Sweep:
    """Return the sweep in a folder; without `failed` its files say which runs have no result."""
    result = read_runs([folder])
    if failed is None:
        ended = [run for run in result.runs if run.status in ("failed", "interrupted")]
        failed = tuple(f"{run.label}: {run.error or run.status}" for run in ended)
        failed += tuple(f"{label}: {reason}" for label, reason in result.skipped)
    return Sweep(folder, failed, result.text, result)
