"""Runs of one data set configuration that have seen different data: told apart, and how the data differ in words."""

from collections.abc import Mapping, Sequence

from clrun.reporting.collect import Run
from clrun.results.data_record import data_changes
from clrun.results.identity import config_hash
from clrun.results.records import read_run
from clrun.system.errors import ConfigError

SHOWN = 6  # digits of a digest in a table


class DataOfRuns:
    """The data that runs have seen.

    A run that does not record them counts as one on the earliest data that are known of its data set: it began before
    clrun recorded data, or failed before they were read.

    Args:
        runs: all runs of a report.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.known: dict[str, dict[str, list[Run]]] = {}  # runs by data set configuration and digest
        self.unknown: dict[str, list[Run]] = {}
        for run in runs:
            key = _dataset_key(run.config)
            if run.data:
                self.known.setdefault(key, {}).setdefault(run.data, []).append(run)
            else:
                self.unknown.setdefault(key, []).append(run)
        for key, by_digest in self.known.items():
            self.known[key] = dict(sorted(by_digest.items(), key=lambda item: min(map(_ended, item[1]))))

    def of(self, run: Run) -> str:
        """Return the digest of the data that a run counts for; "" when none is known."""
        return run.data or next(iter(self.known.get(_dataset_key(run.config), {})), "")

    def label(self, run: Run) -> str:
        """Return the first digits of the digest where runs of this data set have seen different data; else ""."""
        return self.of(run)[:SHOWN] if len(self.known.get(_dataset_key(run.config), {})) > 1 else ""

    def notes(self) -> list[str]:
        """Return a sentence about each change of data, and about runs that do not record theirs."""
        found = []
        for key, by_digest in self.known.items():
            first = next(iter(by_digest.values()))[0]
            for digest, runs in list(by_digest.items())[1:]:
                found.append(
                    f"dataset={first.dataset}: the data have changed between runs, which are therefore not compared: "
                    f"from data={first.data[:SHOWN]} (such as {first.label}) to data={digest[:SHOWN]} "
                    f"({_count(len(runs))}, such as {runs[0].label}), {_difference(first, runs[0])}."
                )
            if old := [run for run in self.unknown.get(key, []) if run.status == "completed"]:
                found.append(
                    f"dataset={first.dataset}: {_count(len(old))} from before clrun recorded data (such as "
                    f"{old[0].label}) count as if on the data of {first.label}."
                )
        return found


def _ended(run: Run) -> str:
    """Return the time at which a run ended, after all others for one that has not."""
    return run.finished or "~"


def _difference(before: Run, now: Run) -> str:
    """Return how the data of two runs differ."""
    try:
        return data_changes(*(read_run(run.folder)["data"] for run in (before, now))).text
    except (ConfigError, KeyError):  # removed or replaced since it was read
        return "in a way that run.json does not tell"


def _dataset_key(config: Mapping[str, object]) -> str:
    """Return the hash of the configuration of the data set."""
    return config_hash({key: value for key, value in config.items() if key.startswith("dataset.")})


def _count(number: int) -> str:
    return f"{number} run{'' if number == 1 else 's'}"
