"""Launches the jobs of a sweep through any launcher of Hydra, and collects those that fail."""

import math
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn, JobStatus, env_override
from hydra.plugins.launcher import Launcher

from clrun.config.plugins import hidden_from_new_processes
from clrun.config.sweep_jobs import PlainJob
from clrun.running.slurm import patient
from clrun.system.processes import core_count

# Environment variable with the number of jobs that a parallel launcher starts together; the jobs read it.
JOBS_STARTED = "CLRUN_JOBS_STARTED"
Known = Callable[[Sequence[str], int], PlainJob]


def jobs_at_once(launcher: Any) -> int:
    """Return how many jobs of a sweep share this machine, given the node of the launcher."""
    target, batch = str(launcher.get("_target_", "")), int(os.environ.get(JOBS_STARTED, 1))
    if target.endswith("JoblibLauncher"):
        jobs = int(launcher.n_jobs or 1)  # a negative number counts down from the cores: -1 is all of them
        return min(batch, jobs if jobs > 0 else max(1, core_count() + 1 + jobs))
    return batch if target.endswith("submitit_launcher.LocalLauncher") else 1


@dataclass(frozen=True)
class Failure:
    """A job that failed.

    Attributes:
        overrides: of the job.
        folder: of its run.
        error: that ended it.
    """

    overrides: Sequence[str]
    folder: Path
    error: Any


class Collector(Launcher):
    """Launches through another launcher and collects the failed jobs, so that no sweeper stops at one.

    Args:
        launcher: does the work.
        complete: overrides of jobs that are not launched.
        known: returns a job in plain containers; None where jobs are composed in other ways.
    """

    def __init__(
        self, launcher: Launcher, complete: Collection[tuple[str, ...]] = (), known: Known | None = None
    ) -> None:
        self.launcher, self.complete, self.known = patient(launcher), complete, known
        self.failed: list[Failure] = []

    def setup(self, **arguments: Any) -> None:
        """Do nothing: the launcher that does the work is set up already."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Launch the jobs that are not complete; a failed one counts as completed with the value NaN."""
        numbered = list(enumerate(job_overrides, initial_job_idx))
        left = [(number, words) for number, words in numbered if tuple(words) not in self.complete]
        skipped = [
            JobReturn(words, status=JobStatus.COMPLETED) for _, words in numbered if tuple(words) in self.complete
        ]
        with env_override({JOBS_STARTED: str(len(job_overrides))}):
            if isinstance(self.launcher, BasicLauncher):
                return [*skipped, *(self._alone(self.launcher, number, words) for number, words in left)]
            with hidden_from_new_processes():
                returns = self.launcher.launch([words for _, words in left], initial_job_idx) if left else []
        return [*skipped, *map(self._collected, returns)]

    def _alone(self, launcher: BasicLauncher, number: int, words: Sequence[str]) -> JobReturn:
        """Launch one job in this process; of its configuration nothing stays in memory."""
        task = launcher.task_function
        try:
            if self.known is not None and task is not None:
                launcher.task_function = partial(task, known=self.known(words, number))  # type: ignore[call-arg]
            [job] = launcher.launch([words], number)
        finally:
            launcher.task_function = task
        return self._collected(job)

    def _collected(self, job: JobReturn) -> JobReturn:
        """Return a job that does not count as failed, without its configuration."""
        if job.status is JobStatus.FAILED:
            folder = Path(job.hydra_cfg.hydra.runtime.output_dir)  # type: ignore[union-attr]
            self.failed.append(Failure(job.overrides or [], folder, job._return_value))
            job.status, job.return_value = JobStatus.COMPLETED, math.nan
        job.cfg = job.hydra_cfg = None
        return job
