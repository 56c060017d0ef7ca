"""Runs one configuration in its folder: builds its parts, lets the engine learn every task, returns the accuracy."""

from functools import partial
from pathlib import Path
from typing import Any

from clrun.config.job import JobInfo
from clrun.data.order_search import adversarial
from clrun.data.scenarios import task_ids
from clrun.results.identity import config_hash, differing_keys
from clrun.results.records import RunFolder
from clrun.running.build import Built, build, check_without_building
from clrun.running.build import check_method as check_method_of
from clrun.running.compression import Stage
from clrun.running.data_checks import changed_since
from clrun.running.engine import Engine
from clrun.running.parts import Config, Parts, function_of
from clrun.running.recorder import Recorder, average_accuracy
from clrun.system.errors import ConfigError, collecting_warnings
from clrun.system.hardware import launch
from clrun.system.signals import caught


def preflight(config: Config) -> int | None:
    """Find mistakes in a configuration that need the data or the machine, before any run starts; build no backbone.

    Returns:
        The number of tasks, when configurations that differ in the task order alone need `check_order` alone.

    Raises:
        ConfigError: one was found; nothing was written.
    """
    return check_without_building(Parts(config))


def check_method(config: Config) -> None:
    """Check the options of the method of a configuration.

    Raises:
        ConfigError: they do not suit each other.
    """
    check_method_of(Parts(config))


def check_order(config: Config, tasks: int) -> None:
    """Check the task order of a configuration with so many tasks.

    Raises:
        ConfigError: it is no order of them.
    """
    task_ids(Parts(config).task_order, tasks)


def run_config(config: Config, out: Path, *, job: JobInfo) -> float:
    """Run one configuration in the folder `out`, or continue the run that is there.

    Args:
        config: resolved and checked, plain types.
        out: the folder of the run. It is held from the beginning, and removed again when a mistake of the user ends
            the run before it has written a file.
        job: how the run was started.

    Returns:
        The final average accuracy (a fraction) in the stream's setting, NaN when it was not measured.

    Raises:
        ConfigError: a mistake of the user; the folder holds another configuration or is in use.
    """
    parts = Parts(config)
    if parts.job.mode == "dry_run":
        from clrun.running.dry_run import dry_run

        return dry_run(parts, job)
    if parts.job.mode == "preview":
        from clrun.running.preview import preview

        return preview(parts, out, job)
    if function_of(parts.task_order) is adversarial:
        from clrun.running.worst_order import search_worst_order

        return search_worst_order(parts, out, job, run=_run)
    return _run(parts, out, job)


def _run(parts: Parts, out: Path, job: JobInfo) -> float:
    """Run one configuration in one order, or continue the run that is there; see `run_config`."""
    stored = RunFolder(out).read_run() if parts.job.resume else None
    if stored is not None:
        _refuse_other(stored, parts.config, job.recorded or parts.config, out)
        if stored["status"] == "completed":
            if parts.job.progress:
                _show(stored, out)
                if changed := changed_since(stored, parts):
                    print(f"note: {changed}")
            return average_accuracy(stored)
    with caught():
        return launch(_work, (parts, out, job), processes=parts.hardware.processes, device=parts.hardware.device)


def _refuse_other(stored: dict[str, Any], config: Config, written: Config, out: Path) -> None:
    """Raise unless the stored run has this configuration."""
    if stored["config_hash"] != config_hash(config):
        keys = ", ".join(differing_keys(stored["config"], written)) or "the configuration"
        raise ConfigError(f"{out}: holds a run of another configuration ({keys} differ); choose another hydra.run.dir")


def _show(stored: dict[str, Any], out: Path) -> None:
    """Print the table of a completed run."""
    from clrun.reporting.tables import final_table

    print(final_table(dict(stored)))
    print(f"results: {out} (this run was complete already; nothing was run)")


def _work(parts: Parts, out: Path, job: JobInfo, rank: int, world: int) -> float:
    """Do the work of one process of the run."""
    parts.hardware.setup(rank=rank, world=world, job=job.number or 0, parallel=job.parallel)
    recorder = Recorder(parts, RunFolder(out), job)
    with caught(), recorder.recording(), parts.naming_foreign():
        with collecting_warnings(recorder.run["notes"]):  # the command line has shown them
            built = build(parts)
        return _learn(parts, built, recorder)


def _learn(parts: Parts, built: Built, recorder: Recorder) -> float:
    """Begin or resume, learn every task, finish."""
    method, state = recorder.resumed(built)
    recorder.begin(built, state)
    engine = Engine(
        built.stream,
        built.budget,
        parts.hardware,
        parts.seed,
        recorder.evaluation,
        recorder,
        eval_initial=parts.job.eval_initial,
        eval_unseen=parts.job.eval_unseen,
        held_out=None if built.held_out is None else partial(built.held_out, evaluation=recorder.evaluation),
        eval_every=parts.job.eval_every,
        max_steps=parts.job.max_steps,
        tuning=parts.job.tuning,
        compression=None if parts.compress is None else Stage(parts.compress),
        fits=recorder.fits,
        backbone=built.backbone,
        state=state,
    )
    method = engine.run(method)
    recorder.finish(built, method)
    return average_accuracy(recorder.run)
