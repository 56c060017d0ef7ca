"""Slurm jobs of a sweep: submits them, waits for all of them, and names those that were lost.

Hydra's launcher for Slurm raises the first error that it meets, so that one cancelled job ends the command while the
others still run. Here each job ends by itself: with its result, or as failed with what Slurm says about it.
"""

import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import open_dict

from clrun.system import signals
from clrun.system.errors import ConfigError, one_line

PAUSE = 2.0  # seconds between two looks at the files of results
ASK = 10.0  # seconds between two questions to Slurm, which answers for all jobs at once
GRACE = 30.0  # seconds that a result may take through a network file system after Slurm says that its job has ended
# What Slurm says of a job that has ended without a result, in words with advice. Others are told by their names.
ENDS = {
    "CANCELLED": "was cancelled",
    "TIMEOUT": "reached its time limit and was not started again; raise hydra.launcher.timeout_min or max_num_timeout",
    "NODE_FAIL": "ended because its node failed, and was not started again",
    "OUT_OF_MEMORY": "needed more memory than it may use; raise hydra.launcher.mem_gb",
    "PREEMPTED": "was preempted and not started again",
    "": "is unknown to Slurm, and left no result",
}
GOING_ON = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESIZING"}
GOING_ON |= {"SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "SPECIAL_EXIT"}
# Options that submitit has for every kind of executor; others are those of Slurm.
SHARED = {"timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes", "name"}
SHARED |= {"stderr_to_stdout"}


class SlurmError(Exception):
    """A job ended without a result; the message says why and what to do."""


@dataclass(frozen=True)
class Work:
    """What a Slurm job calls: one job of the sweep, as Hydra's launcher runs it.

    Attributes:
        launcher: Hydra's launcher for Slurm.
    """

    launcher: Any

    def __call__(self, *arguments: Any) -> JobReturn:
        """Run the job. Asked to stop, it writes a checkpoint; then it is queued again, unless Slurm itself does that.

        submitit alone would leave the run in the middle of a step, and let a cancelled job go on until it is killed.

        Raises:
            Stopped: Slurm ends the job.
            UncompletedJobError: the job has reached its time limit too often.
        """
        from submitit import JobEnvironment

        queue_again: Any = signal.getsignal(JobEnvironment()._usr_sig())
        try:
            with _default_handlers(), signals.caught():
                done: JobReturn = self.launcher(*arguments)
        except signals.Stopped as stop:
            if stop.number != signal.SIGTERM:  # by which Slurm ends a job, and it knows whether the job goes on
                queue_again(stop.number, None)
            raise
        return done

    def checkpoint(self, *arguments: Any) -> Any:
        """Return what to submit again when Slurm asks the job to stop: the same, which goes on in its folder."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *arguments)


@contextmanager
def _default_handlers() -> Iterator[None]:
    """Take submitit's handlers off the signals that ask to stop, within the block; signals stay ignored that are."""
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    taken = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in taken:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)


class SlurmJobs(Launcher):
    """Launches the jobs of a sweep through Slurm.

    Args:
        launcher: Hydra's launcher for Slurm, which has been set up.
    """

    def __init__(self, launcher: Any) -> None:
        self.launcher = launcher

    def setup(self, **arguments: Any) -> None:
        """Do nothing: the launcher is set up already."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit all jobs as one array, wait for the last of them, and return how each has ended.

        Raises:
            ConfigError: Slurm refuses the jobs.
        """
        numbered = list(enumerate(map(list, job_overrides), initial_job_idx))
        jobs = self._submitted([(words, "hydra.sweep.dir", n, f"job_id_for_{n}") for n, words in numbered])
        pairs = zip(numbered, waited(jobs), strict=True)
        return [self._return(end, words, number) for (number, words), end in pairs]

    def _submitted(self, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Submit one call of the launcher per job."""
        import submitit
        from submitit.core.utils import FailedJobError

        given = dict(self.launcher.params)
        folder, timeouts = given.pop("submitit_folder"), given.pop("max_num_timeout")
        executor = submitit.AutoExecutor(folder=folder, cluster="slurm", slurm_max_num_timeout=timeouts)
        executor.update_parameters(**{key if key in SHARED else f"slurm_{key}": value for key, value in given.items()})
        state = Singleton.get_state()
        try:
            jobs: list[Any] = executor.map_array(
                Work(self.launcher), *zip(*[(*call, state) for call in calls], strict=True)
            )
        except FailedJobError as error:
            raise ConfigError(f"hydra/launcher=submitit_slurm: Slurm refuses the jobs: {one_line(error)}") from error
        return jobs

    def _return(self, end: "End", words: list[str], number: int) -> JobReturn:
        """Return how a job has ended, with the folder of its run."""
        if isinstance(end, JobReturn):
            return end
        cfg = self.launcher.hydra_context.config_loader.load_sweep_config(self.launcher.config, words)
        with open_dict(cfg.hydra):
            cfg.hydra.job.num, cfg.hydra.job.id = number, str(number)
            cfg.hydra.runtime.output_dir = str(Path(str(cfg.hydra.sweep.dir)) / str(cfg.hydra.sweep.subdir))
        return JobReturn(words, hydra_cfg=cfg, status=JobStatus.FAILED, _return_value=end)


End = JobReturn | SlurmError


def patient(launcher: Launcher) -> Launcher:
    """Return what launches through Slurm for Hydra's launcher for Slurm, and any other launcher as it is."""
    return SlurmJobs(launcher) if type(launcher).__name__ == "SlurmLauncher" else launcher


def waited(jobs: Sequence[Any], *, states: Callable[[Iterable[str]], dict[str, str] | None] | None = None) -> list[End]:
    """Wait until every job has ended, and return how.

    Args:
        jobs: of submitit.
        states: asks Slurm (`slurm_states`).
    """
    ask, ends, over = states or slurm_states, dict[str, End](), dict[str, float]()
    asked = time.monotonic()
    while True:
        left = [job for job in jobs if job.job_id not in ends]
        ends |= {job.job_id: read_result(job) for job in left if job.paths.result_pickle.exists()}
        left = [job for job in left if job.job_id not in ends]
        if not left:
            return [ends[job.job_id] for job in jobs]
        time.sleep(PAUSE)
        if time.monotonic() - asked < ASK:
            continue
        asked, found = time.monotonic(), ask(job.job_id for job in left)
        for job in left:
            if found is None:  # Slurm does not answer for a while
                break
            state = found.get(job.job_id, "")
            if state in GOING_ON:
                over.pop(job.job_id, None)
            elif asked - over.setdefault(job.job_id, asked) > GRACE:
                ends[job.job_id] = lost(job, state)


def lost(job: Any, state: str) -> SlurmError:
    """Return the error of a job that has ended in this state and left no result."""
    how = ENDS.get(state, f"ended without a result (Slurm says {state})")
    return SlurmError(
        f"Slurm job {job.job_id} {how}; the same command with hydra.sweep.dir=FOLDER goes on with it "
        f"(its output: {job.paths.stderr})"
    )


def read_result(job: Any) -> End:
    """Return the result that a job has written; a job that could not run at all has written a traceback."""
    from submitit.core.utils import pickle_load

    outcome, result = pickle_load(job.paths.result_pickle)
    if outcome == "success":
        done: JobReturn = result
        return done
    last = str(result).strip().splitlines()[-1]
    if "timed-out too many times" in last:
        return lost(job, "TIMEOUT")
    return SlurmError(f"Slurm job {job.job_id} failed: {last} (its output: {job.paths.stderr})")


def slurm_states(ids: Iterable[str]) -> dict[str, str] | None:
    """Return the states of jobs by their ids; None while Slurm does not answer.

    Jobs that the controller has forgotten are asked of the accounting, where there is one.
    """
    wanted = list(ids)
    arrays = ",".join(sorted({name.partition("_")[0] for name in wanted}))
    queue = _lines("squeue", "--all", "--states=all", "--array", "--noheader", "--format=%i|%T", f"--jobs={arrays}")
    if queue is None:
        return None
    found = _parsed(queue)
    if missing := [name for name in wanted if name not in found]:
        done = _lines("sacct", "-X", "--noheader", "--parsable2", "--format=JobID,State", f"--jobs={','.join(missing)}")
        found |= {name: state for name, state in _parsed(done or []).items() if name in missing}
    return found


def _parsed(lines: Sequence[str]) -> dict[str, str]:
    """Return the states in lines "id|STATE and more"; one id may stand for a job without an array, too."""
    pairs = (line.split("|") for line in lines if "|" in line)
    return {name.strip(): state.split()[0] if state.split() else "" for name, state in pairs}


def _lines(*command: str) -> list[str] | None:
    """Return what a command of Slurm prints; None when it fails.

    Slurm refuses to list jobs of which it knows none: that is an empty list.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode and "Invalid job id" in done.stderr:
        return []
    return None if done.returncode else done.stdout.splitlines()
