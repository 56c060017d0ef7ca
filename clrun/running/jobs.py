"""Starts one run, or the jobs of a sweep through any launcher; all configurations are checked before a run starts."""

import json
import re
import shutil
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from hydra._internal.callbacks import Callbacks
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus, run_job
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from tqdm import tqdm

from clrun.config.check import check
from clrun.config.compose import (
    Composer,
    folder_of,
    plain_config,
    recorded_config,
    typed_overrides,
    without_hydra,
    yaml_text,
)
from clrun.config.environment import masked, secrets
from clrun.config.job import JobInfo
from clrun.config.plugins import use_working_folder
from clrun.config.sweep_jobs import JobComposer, PlainJob, choices_of, named_by_overrides
from clrun.reporting.status import JOBS
from clrun.running.complete import CompleteJobs
from clrun.running.launching import Collector, Failure, jobs_at_once
from clrun.system.errors import ConfigError, one_line
from clrun.system.files import missing_folders, refuse_links, remove_empty, replace_text, writing
from clrun.system.locks import folder_locked
from clrun.system.processes import torchrun_rank
from clrun.system.signals import Stopped

LOCK = "sweep.lock"  # in the folder of a sweep while its command runs
# What Hydra itself writes into the folder of a run on request (hydra.job_logging, hydra.output_subdir).
WRITTEN = ("clrun.log", ".hydra", *(f".hydra/{name}.yaml" for name in ("config", "hydra", "overrides")))


@dataclass(frozen=True)
class Outcome:
    """What was started, and which jobs of a sweep failed.

    Attributes:
        folder: the folder of the run or of the sweep.
        failed: one line for each failed job of a sweep.
    """

    folder: Path
    failed: tuple[str, ...] = ()


def task(cfg: DictConfig, known: PlainJob | None = None) -> float:
    """Run one composed configuration; the function that Hydra's launchers call, in their processes.

    Args:
        cfg: the configuration without its `hydra` node.
        known: the same in plain containers, where this process has them already.

    Returns:
        The final average accuracy, so that optimising sweepers have something to maximise.
    """
    from clrun.running.run import run_config

    use_working_folder()  # a process that a launcher has started does not have it
    hydra, whole = HydraConfig.get(), cast(DictConfig, HydraConfig.instance().cfg)
    choices = choices_of(hydra)
    config = plain_config(cfg) if known is None else known.config
    written = recorded_config(cfg) if known is None else known.written
    sweep = hydra.mode == RunMode.MULTIRUN
    typed = typed_overrides(whole)
    texts: dict[str, Any] = {"config": cfg, "hydra": whole, "overrides": OmegaConf.create(typed)}
    info = JobInfo(
        number=hydra.job.num if sweep else None,
        parallel=jobs_at_once(hydra.launcher) if sweep else 1,
        choices=choices,
        sweep=sweep,
        overrides=typed,
        hydra={f"{name}.yaml": masked(yaml_text(node)) for name, node in texts.items()},
        recorded=None if written == config else written,
        secrets=secrets(),
    )
    try:
        if sweep:
            _refuse_linked(Path(hydra.sweep.dir), Path(hydra.sweep.subdir))
        check(config, choices)  # again: values that a sweeper chooses during the sweep could not be checked before it
        return run_config(config, Path(hydra.runtime.output_dir), job=info)
    except Exception as error:
        if sweep and not isinstance(error, ConfigError):
            traceback.print_exc()  # in the process of the job; the sweep itself shows one line
        raise


def run(composer: Composer, overrides: Sequence[str], *, sweep: bool, show: Callable[[str], None] = print) -> Outcome:
    """Start the run or the sweep that the overrides ask for.

    Args:
        composer: where configurations come from.
        overrides: of the command line.
        sweep: every combination of comma-separated values and ranges; a configuration can ask for it, too.
        show: prints the number of runs before a sweep and its tables after it.

    Raises:
        ConfigError: a mistake of the user; nothing was started.
    """
    cfg = composer.compose(overrides, sweep=sweep)
    sweep = cfg.hydra.mode == RunMode.MULTIRUN
    rank = torchrun_rank()
    if rank is not None and (sweep or not any(o.startswith("hydra.run.dir=") for o in overrides)):
        raise ConfigError("torchrun starts one run in one folder: add hydra.run.dir=FOLDER, leave out -m")
    if sweep:
        return _sweep(composer, cfg, show)
    job = PlainJob(plain_config(cfg), recorded_config(cfg), choices_of(cfg.hydra), Path())
    problems = _Problems()
    problems.look_at(job)
    problems.raise_any()
    return Outcome(_single(composer, cfg, job, main=not rank))


class _Problems:
    """The problems of the configurations of a command, without repetition.

    Args:
        elsewhere: the runs will have another machine, so that data and hardware of this one say nothing about them.
    """

    def __init__(self, *, elsewhere: bool = False) -> None:
        self.elsewhere = elsewhere
        self.counts: dict[str, int] = {}
        self.looked_at = 0
        self._known: dict[str, list[str]] = {}  # problems of data and machine
        self._tasks: dict[str, int] = {}  # numbers of tasks of streams in which order alone can be wrong

    def look_at(self, job: PlainJob | ConfigError) -> None:
        """Add the problems of one configuration."""
        self.looked_at += 1
        for line in masked(str(job)).splitlines() if isinstance(job, ConfigError) else self._of(job):
            self.counts[line] = self.counts.get(line, 0) + 1

    def raise_any(self) -> None:
        """Raise one ConfigError for all problems.

        Raises:
            ConfigError: there are some.
        """
        if self.counts:
            of = f" of {self.looked_at} runs]" if self.looked_at > 1 else ""
            raise ConfigError("\n".join(f"{line} [{n}{of}" if of else line for line, n in self.counts.items()))

    def _of(self, job: PlainJob) -> list[str]:
        """Return the problems of a configuration."""
        try:
            check(job.config, job.choices)
        except ConfigError as error:
            return masked(str(error)).splitlines()
        if self.elsewhere:
            return []
        stream = json.dumps([job.config[g] for g in ("dataset", "scenario", "backbone", "hardware", "job")])
        method = json.dumps([job.config["method"], job.config.get("compress"), stream])
        key = f"{stream} {json.dumps(job.config['task_order'])}"
        return self._once(method, lambda: _look_at_method(job.config)) or self._once(
            key, lambda: self._look_at_data(job.config, stream)
        )

    def _once(self, key: str, look: Callable[[], None]) -> list[str]:
        """Return the problems that `look` finds; it is called once for each key."""
        if key not in self._known:
            try:
                look()
                self._known[key] = []
            except ConfigError as error:
                self._known[key] = masked(str(error)).splitlines()
        return self._known[key]

    def _look_at_data(self, config: dict[str, Any], stream: str) -> None:
        """Find problems of data and machine; tasks that were cut before are not cut again for another order."""
        if stream in self._tasks:
            from clrun.running.run import check_order

            check_order(config, self._tasks[stream])
            return
        from clrun.running.run import preflight

        if (tasks := preflight(config)) is not None:
            self._tasks[stream] = tasks


def _look_at_method(config: dict[str, Any]) -> None:
    """Find problems of the method.

    Raises:
        ConfigError: there are some.
    """
    from clrun.running.run import check_method

    check_method(config)


def _slurm(cfg: DictConfig) -> bool:
    """Whether the jobs of a sweep run on other machines."""
    return str(cfg.hydra.launcher.get("_target_", "")).endswith("SlurmLauncher")


def _single(composer: Composer, cfg: DictConfig, job: PlainJob, *, main: bool) -> Path:
    """Run one configuration and return its folder; folders made for it that stay empty are removed."""
    out = folder_of(cfg, "hydra.run.dir").absolute()
    if not main:  # of torchrun's processes one makes the folder
        with read_write(cfg.hydra.runtime), open_dict(cfg.hydra.runtime):
            cfg.hydra.runtime.output_dir = str(out)
        HydraConfig.instance().set_config(cfg)
        task(without_hydra(cfg), job)
        return out
    refuse_links(*(out / name for name in WRITTEN))
    missing = missing_folders(out)
    callbacks = Callbacks(cfg)
    context = HydraContext(config_loader=composer.hydra.config_loader, callbacks=callbacks)
    callbacks.on_run_start(config=cfg, config_name=composer.name)
    try:
        with writing(out):  # errors of the run itself come in `done`
            done = run_job(partial(task, known=job), cfg, "hydra.run.dir", None, context)
    finally:
        remove_empty(missing)
    callbacks.on_run_end(config=cfg, config_name=composer.name, job_return=done)
    if done.status is JobStatus.FAILED:
        raise done._return_value
    return out


def _sweep(composer: Composer, cfg: DictConfig, show: Callable[[str], None]) -> Outcome:
    """Run every job of a sweep and rebuild the sweep's tables, whatever happens."""
    folder = folder_of(cfg, "hydra.sweep.dir")
    with folder_locked(folder, LOCK):
        return _held_sweep(composer, cfg, show, folder)


def _held_sweep(composer: Composer, cfg: DictConfig, show: Callable[[str], None], folder: Path) -> Outcome:
    """Do the work of `_sweep` while no other process runs a sweep in the folder."""
    arguments, callbacks = typed_overrides(cfg), Callbacks(cfg)
    sweeper, collector = _checked_sweeper(composer, cfg, callbacks, show)
    HydraConfig.instance().set_config(cfg)
    sweeper.launcher = collector
    callbacks.on_multirun_start(config=cfg, config_name=composer.name)
    try:
        replace_text(folder / "multirun.yaml", "", flush=False)  # Hydra writes into it, and would follow a link
        with writing(folder):
            sweeper.sweep(arguments=arguments)
    except Stopped:
        raise  # at once: the tables of a large sweep take longer than the system may wait
    except BaseException:
        _refresh(folder, show)
        raise
    _refresh(folder, show)
    callbacks.on_multirun_end(config=cfg, config_name=composer.name)
    return Outcome(folder.absolute(), tuple(map(_failure, collector.failed)))


def _checked_sweeper(
    composer: Composer, cfg: DictConfig, callbacks: Callbacks, show: Callable[[str], None]
) -> tuple[Any, Collector]:
    """Return Hydra's sweeper and what launches for it, after every combination that it will run has been checked.

    Sweepers that choose values during the sweep have no list of combinations; `task` checks each of their jobs.
    """
    if _slurm(cfg) and shutil.which("srun") is None:
        raise ConfigError("hydra/launcher=submitit_slurm: no Slurm here (no srun); use joblib or submitit_local")
    jobs = JobComposer(composer.hydra.config_loader)  # type: ignore[arg-type]
    context = HydraContext(config_loader=jobs, callbacks=callbacks)  # type: ignore[arg-type]
    try:
        sweeper: Any = Plugins.instance().instantiate_sweeper(config=cfg, hydra_context=context, task_function=task)
        if not str(cfg.hydra.sweeper._target_).endswith(".BasicSweeper"):
            return sweeper, Collector(sweeper.launcher)
        parser = OverridesParser.create(config_loader=composer.hydra.config_loader)
        lines = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
        parsed = parser.parse_overrides([*lines, *typed_overrides(cfg)])
        [combinations] = sweeper.split_arguments(parsed, None)
    except HydraException as error:  # of the sweep's own options: no run has started
        raise ConfigError(one_line(error)) from error
    if not combinations:
        raise ConfigError(_without_runs(typed_overrides(cfg)))
    jobs.fixed = frozenset(combinations[0]) & frozenset(combinations[-1])
    complete = _check_jobs(composer, cfg, jobs, combinations)
    sweeper.validate_batch_is_legal = lambda batch: None  # `_check_jobs` has done it, with clearer messages
    show("\n".join([f"{len(combinations)} runs, results: {cfg.hydra.sweep.dir}", *complete.lines(len(combinations))]))
    known = partial(jobs.plain, cfg)
    return sweeper, Collector(sweeper.launcher, complete.found, known)


def _without_runs(overrides: Sequence[str]) -> str:
    """Return the message for a sweep that has no runs because an override has no values."""
    empty = [word for word in overrides if re.search(r"=(range|choice|glob|interval)\(", word)] or list(overrides)
    return f"{' '.join(empty)}: gives no values, so that the sweep has no runs; range(1,4) gives 1, 2 and 3"


def _check_jobs(
    composer: Composer, cfg: DictConfig, jobs: JobComposer, combinations: Sequence[list[str]]
) -> CompleteJobs:
    """Check the configuration of every combination that is not complete, and return those that are.

    Raises:
        ConfigError: one line for each mistake; two jobs in one folder are one.
    """
    problems, complete, folders = _Problems(elsewhere=_slurm(cfg)), CompleteJobs(), dict[Path, str]()
    root, steady = folder_of(cfg, "hydra.sweep.dir"), named_by_overrides(cfg)
    bar = tqdm(combinations, "checking", unit=" runs", disable=None, delay=1, leave=False)  # on a terminal alone
    for number, overrides in enumerate(bar):
        try:
            job = composer.explained(overrides, partial(jobs.plain, cfg, overrides, number))
            text = " ".join(overrides)
            if job.folder in folders:
                raise ConfigError(f"'{folders[job.folder]}' and '{text}' would share the folder {job.folder}")
            folders[job.folder] = text
            _refuse_linked(root, job.folder)
            if not (steady and complete.add(overrides, root / job.folder, job)):
                problems.look_at(job)
        except ConfigError as error:
            problems.look_at(error)
    problems.raise_any()
    replace_text(root / JOBS, "".join(f"{folder}\n" for folder in folders), flush=False)  # what `clrun status` counts
    return complete


def _refuse_linked(root: Path, inner: Path) -> None:
    """Refuse the folder of a job if its path below the folder of the sweep has a symbolic link, or Hydra finds one."""
    if not inner.is_absolute():
        refuse_links(*(root / part for part in (*inner.parents[-2::-1], inner)))
    refuse_links(*(root / inner / name for name in WRITTEN))


def _refresh(folder: Path, show: Callable[[str], None]) -> None:
    """Rewrite the tables of a sweep and show the comparison."""
    from clrun.reporting.sweep import refresh

    if text := refresh(folder).text:
        show(f"\n{text}\n\nresults: {folder}")


def _failure(job: Failure) -> str:
    """Return one line about a failed job; remove its folder if it is empty."""
    remove_empty([job.folder])
    reason = masked(one_line(job.error))
    what = reason if isinstance(job.error, ConfigError) else f"{type(job.error).__name__}: {reason}"
    log = job.folder / "clrun.log"
    return f"{' '.join(job.overrides)}: {what}{f' (see {log})' if log.exists() else ''}"
