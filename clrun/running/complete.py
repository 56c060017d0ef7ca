"""Which jobs of a sweep are complete already, by their files alone; only data that can change need torch."""

import json
from pathlib import Path
from typing import Any

from clrun.config.environment import digests
from clrun.config.sweep_jobs import PlainJob
from clrun.results.records import RunFolder
from clrun.system.errors import ConfigError
from clrun.system.files import json_value

PLACES = ("root", "file")  # options of data sets that are read from files of the user


class CompleteJobs:
    """Remembers which jobs of a sweep are complete, and whose data have changed since.

    Attributes:
        found: overrides of the complete jobs.
        changed: number of them by what has changed in their data.
    """

    def __init__(self) -> None:
        self.found: set[tuple[str, ...]] = set()
        self.changed: dict[str, int] = {}
        self._data: dict[str, str] = {}

    def add(self, overrides: list[str], folder: Path, job: PlainJob) -> bool:
        """Return whether the run of a job is complete in its folder, with exactly this configuration.

        Such a configuration was checked when it ran. A folder that cannot be read is left to the run, which says why.
        """
        if job.config["job"].get("resume") is not True or job.config["job"].get("mode") != "run":
            return False
        try:
            stored = RunFolder(folder).read_run()
        except ConfigError:
            return False
        if stored is None or stored["status"] != "completed" or stored["config"] != json_value(job.written):
            return False
        if (stored.get("environment") or {}) != digests(job.written, job.config):
            return False
        self.found.add(tuple(overrides))
        if text := self._changed(stored, job):
            self.changed[text] = self.changed.get(text, 0) + 1
        return True

    def _changed(self, stored: dict[str, Any], job: PlainJob) -> str:
        """Return how the data differ from those of a complete run; runs of the same data are compared once."""
        dataset, scenario = job.config["dataset"], job.config["scenario"]
        if not any(dataset.get(place) for place in PLACES):
            return ""
        key = json.dumps([dataset, scenario, stored.get("data")], default=repr)
        if key not in self._data:
            from clrun.running.data_checks import changed_since
            from clrun.running.parts import Parts

            self._data[key] = changed_since(stored, Parts(job.config))
        return self._data[key]

    def lines(self, total: int) -> list[str]:
        """Return what to print about them, given the number of all jobs."""
        complete = f"{len(self.found)} of {total} runs were complete already; they are not run again"
        notes = [f"note: {text} [{count} of {total} runs]" for text, count in self.changed.items()]
        return [complete, *notes] if self.found else []
