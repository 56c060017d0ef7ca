"""Starts one run, or the jobs of a sweep through any launcher; all configurations are checked before a run starts."""

import json
import math
import os
import re
import shutil
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, env_override, run_job
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from clrun.config.check import check
from clrun.config.compose import Composer, folder_of, plain_config, recorded_config, typed_overrides, without_hydra
from clrun.config.environment import masked, secrets
from clrun.config.job import JobInfo
from clrun.config.plugins import hidden_from_new_processes, use_working_folder
from clrun.system.errors import ConfigError, one_line
from clrun.system.files import missing_folders, refuse_links, remove_empty, replace_text, writing
from clrun.system.locks import folder_locked
from clrun.system.processes import core_count, torchrun_rank

# Environment variable with the number of jobs that a parallel launcher starts together; the jobs read it.
JOBS_STARTED = "CLRUN_JOBS_STARTED"
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


def task(cfg: DictConfig) -> float:
    """Run one composed configuration; the function that Hydra's launchers call, in their processes.

    Returns:
        The final average accuracy, so that optimising sweepers have something to maximise.
    """
    from clrun.running.run import run_config

    use_working_folder()  # a process that a launcher has started does not have it
    hydra = HydraConfig.get()
    config, choices, written = plain_config(cfg), _choices(hydra), recorded_config(cfg)
    sweep = hydra.mode == RunMode.MULTIRUN
    typed = typed_overrides(OmegaConf.create({"hydra": hydra}))
    texts = {"config": cfg, "hydra": OmegaConf.create({"hydra": hydra}), "overrides": OmegaConf.create(typed)}
    info = JobInfo(
        number=hydra.job.num if sweep else None,
        parallel=_jobs_at_once(hydra.launcher) if sweep else 1,
        choices=choices,
        sweep=sweep,
        overrides=typed,
        hydra={f"{name}.yaml": masked(OmegaConf.to_yaml(node)) for name, node in texts.items()},
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


def _choices(hydra: Any) -> dict[str, str]:
    return {str(group): str(member) for group, member in hydra.runtime.choices.items() if member is not None}


def _jobs_at_once(launcher: Any) -> int:
    """Return how many jobs of a sweep share this machine."""
    target, batch = str(launcher.get("_target_", "")), int(os.environ.get(JOBS_STARTED, 1))
    if target.endswith("JoblibLauncher"):
        jobs = int(launcher.n_jobs or 1)  # a negative number counts down from the cores: -1 is all of them
        return min(batch, jobs if jobs > 0 else max(1, core_count() + 1 + jobs))
    return batch if target.endswith("submitit_launcher.LocalLauncher") else 1


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
    _check([cfg])
    return Outcome(_single(composer, cfg, main=not rank))


def _check(cfgs: Sequence[DictConfig | ConfigError]) -> None:
    """Raise one ConfigError for all problems of all configurations, without repetition."""
    counts: dict[str, int] = {}
    seen: dict[str, list[str]] = {}
    for cfg in cfgs:
        for line in _problems(cfg, seen):
            counts[line] = counts.get(line, 0) + 1
    note = f" of {len(cfgs)} runs]" if len(cfgs) > 1 else ""
    if counts:
        raise ConfigError("\n".join(f"{line} [{n}{note}" if note else line for line, n in counts.items()))


def _problems(cfg: DictConfig | ConfigError, seen: dict[str, list[str]]) -> list[str]:
    """Return the problems of one configuration; `seen` stores those of data and machine for further runs."""
    if isinstance(cfg, ConfigError):
        return str(cfg).splitlines()
    try:
        config = plain_config(cfg)
        check(config, _choices(cfg.hydra))
    except ConfigError as error:
        return masked(str(error)).splitlines()
    if _slurm(cfg):
        return []  # the run will have another machine
    groups = ("dataset", "scenario", "task_order", "backbone", "hardware", "job")
    key = json.dumps([config[group] for group in groups])
    if key not in seen:
        from clrun.running.run import preflight

        try:
            preflight(config)
            seen[key] = []
        except ConfigError as error:
            seen[key] = masked(str(error)).splitlines()
    return seen[key]


def _slurm(cfg: DictConfig) -> bool:
    """Whether the jobs of a sweep run on other machines."""
    return str(cfg.hydra.launcher.get("_target_", "")).endswith("SlurmLauncher")


def _single(composer: Composer, cfg: DictConfig, *, main: bool) -> Path:
    """Run one configuration and return its folder; folders made for it that stay empty are removed."""
    out = folder_of(cfg, "hydra.run.dir").absolute()
    if not main:  # of torchrun's processes one makes the folder
        with read_write(cfg.hydra.runtime), open_dict(cfg.hydra.runtime):
            cfg.hydra.runtime.output_dir = str(out)
        HydraConfig.instance().set_config(cfg)
        task(without_hydra(cfg))
        return out
    refuse_links(*(out / name for name in WRITTEN))
    missing = missing_folders(out)
    callbacks = Callbacks(cfg)
    context = HydraContext(config_loader=composer.hydra.config_loader, callbacks=callbacks)
    callbacks.on_run_start(config=cfg, config_name=composer.name)
    try:
        with writing(out):  # errors of the run itself come in `done`
            done = run_job(task, cfg, "hydra.run.dir", None, context)
    finally:
        remove_empty(missing)
    callbacks.on_run_end(config=cfg, config_name=composer.name, job_return=done)
    if done.status is JobStatus.FAILED:
        raise done._return_value
    return out


class _Composed:
    """Hydra's loader of configurations. It returns each configuration that was composed for the check once.

    Composing a configuration again would take longer than everything else around a short run.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.found: dict[tuple[str, ...], DictConfig] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """Return the configuration of a job of the sweep."""
        found = self.found.pop(tuple(sweep_overrides), None)
        if found is None:
            loaded: DictConfig = self.loader.load_sweep_config(master_config, sweep_overrides)
            return loaded
        OmegaConf.set_readonly(found.hydra, None)  # as it was before it was looked at
        return found


class _FailureCollector(Launcher):
    """Launches through another launcher and collects the failed jobs, so that no sweeper stops at one."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher
        self.failed: list[JobReturn] = []

    def setup(self, **arguments: Any) -> None:
        """Do nothing: the launcher that does the work is set up already."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Launch the jobs; a failed one counts as completed with the value NaN."""
        elsewhere = nullcontext() if isinstance(self.launcher, BasicLauncher) else hidden_from_new_processes()
        with env_override({JOBS_STARTED: str(len(job_overrides))}), elsewhere:
            returns = self.launcher.launch(job_overrides, initial_job_idx)
        for job in returns:
            if job.status is JobStatus.FAILED:
                self.failed.append(JobReturn(job.overrides, hydra_cfg=job.hydra_cfg, _return_value=job._return_value))
                job.status, job.return_value = JobStatus.COMPLETED, math.nan
        return returns


def _sweep(composer: Composer, cfg: DictConfig, show: Callable[[str], None]) -> Outcome:
    """Run every job of a sweep and rebuild the sweep's tables, whatever happens."""
    folder = folder_of(cfg, "hydra.sweep.dir")
    with folder_locked(folder, LOCK):
        return _held_sweep(composer, cfg, show, folder)


def _held_sweep(composer: Composer, cfg: DictConfig, show: Callable[[str], None], folder: Path) -> Outcome:
    """Do the work of `_sweep` while no other process runs a sweep in the folder."""
    arguments, callbacks = typed_overrides(cfg), Callbacks(cfg)
    sweeper = _checked_sweeper(composer, cfg, callbacks, show)
    HydraConfig.instance().set_config(cfg)
    collector = sweeper.launcher = _FailureCollector(sweeper.launcher)
    callbacks.on_multirun_start(config=cfg, config_name=composer.name)
    try:
        replace_text(folder / "multirun.yaml", "", flush=False)  # Hydra writes into it, and would follow a link
        with writing(folder):
            sweeper.sweep(arguments=arguments)
    finally:
        _refresh(folder, show)
    callbacks.on_multirun_end(config=cfg, config_name=composer.name)
    return Outcome(folder.absolute(), tuple(map(_failure, collector.failed)))


def _checked_sweeper(composer: Composer, cfg: DictConfig, callbacks: Callbacks, show: Callable[[str], None]) -> Any:
    """Return Hydra's sweeper, after every combination that it will run has been checked.

    Sweepers that choose values during the sweep have no list of combinations; `task` checks each of their jobs.
    """
    if _slurm(cfg) and shutil.which("srun") is None:
        raise ConfigError("hydra/launcher=submitit_slurm: no Slurm here (no srun); use joblib or submitit_local")
    loader = _Composed(composer.hydra.config_loader)
    serial = str(cfg.hydra.launcher.get("_target_", "")).endswith(".BasicLauncher")
    context = HydraContext(config_loader=loader if serial else loader.loader, callbacks=callbacks)  # type: ignore[arg-type]
    try:
        sweeper: Any = Plugins.instance().instantiate_sweeper(config=cfg, hydra_context=context, task_function=task)
        if str(cfg.hydra.sweeper._target_).endswith(".BasicSweeper"):
            parser = OverridesParser.create(config_loader=composer.hydra.config_loader)
            lines = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
            parsed = parser.parse_overrides([*lines, *typed_overrides(cfg)])
            [combinations] = sweeper.split_arguments(parsed, None)
            if not combinations:
                raise ConfigError(_without_runs(typed_overrides(cfg)))
            jobs = _jobs(composer, cfg, combinations)
            _check(jobs)
            pairs = zip(combinations, jobs, strict=True)
            loader.found = {tuple(c): job for c, job in pairs if serial and not isinstance(job, ConfigError)}
            sweeper.validate_batch_is_legal = lambda batch: None  # `_check` has done it, with clearer messages
            show(f"{len(combinations)} runs, results: {cfg.hydra.sweep.dir}")
    except HydraException as error:  # of the sweep's own options: no run has started
        raise ConfigError(one_line(error)) from error
    return sweeper


def _without_runs(overrides: Sequence[str]) -> str:
    """Return the message for a sweep that has no runs because an override has no values."""
    empty = [word for word in overrides if re.search(r"=(range|choice|glob|interval)\(", word)] or list(overrides)
    return f"{' '.join(empty)}: gives no values, so that the sweep has no runs; range(1,4) gives 1, 2 and 3"


def _jobs(composer: Composer, cfg: DictConfig, combinations: Sequence[list[str]]) -> list[DictConfig | ConfigError]:
    """Return the configuration of every combination, or the mistake in it; two jobs in one folder are a mistake."""
    found: list[DictConfig | ConfigError] = []
    folders: dict[Path, str] = {}
    root = folder_of(cfg, "hydra.sweep.dir")
    for number, overrides in enumerate(combinations):
        try:
            job = composer.compose_job(cfg, overrides)
            with open_dict(job.hydra.job):
                job.hydra.job.num, job.hydra.job.id = number, str(number)
            folder, text = folder_of(job, "hydra.sweep.subdir"), " ".join(overrides)
            if folder in folders:
                raise ConfigError(f"'{folders[folder]}' and '{text}' would share the folder {folder}")
            folders[folder] = text
            _refuse_linked(root, folder)
            found.append(job)
        except ConfigError as error:
            found.append(error)
    return found


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


def _failure(job: JobReturn) -> str:
    """Return one line about a failed job; remove its folder if it is empty."""
    error, folder = job._return_value, Path(job.hydra_cfg.hydra.runtime.output_dir)  # type: ignore[union-attr]
    remove_empty([folder])
    mistake = isinstance(error, ConfigError)
    what = masked(one_line(error)) if mistake else f"{type(error).__name__}: {masked(one_line(error))}"
    log = folder / "clrun.log"
    return f"{' '.join(job.overrides or [])}: {what}{f' (see {log})' if log.exists() else ''}"
