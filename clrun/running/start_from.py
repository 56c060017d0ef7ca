"""`job.start_from`: a run that goes on from the kept checkpoint of a complete one, which stays as it is.

The configurations may differ in the length alone: `job.max_tasks`, and what limits the steps of a fit, LENGTHS. With
another `job.max_tasks` the accuracies are those of a run that was never interrupted, byte for byte; a method of which
that is not true, because it divides something among all tasks, is refused. With another length of the budget the tasks
learned so far keep the old one, so that the result is that of no other run; reports keep such runs apart.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clrun.learning.method import Method
from clrun.results.identity import config_hash, differing_keys, flatten
from clrun.results.records import read_run
from clrun.running import checkpoint
from clrun.running.build import Built
from clrun.running.checkpoint import RunState
from clrun.running.parts import Parts
from clrun.system.errors import ConfigError
from clrun.system.files import replacing
from clrun.system.reading import MB, read_regular

LENGTHS = ("budget.epochs", "budget.steps", "job.max_steps")  # of a fit
TASKS = "job.max_tasks"
LOG_LIMIT = 512 * MB  # bytes of metrics.jsonl that are copied


def start_from(folder: Path, built: Built, parts: Parts) -> tuple[Method, RunState]:
    """Return the method and the progress with which the run in `folder` ended.

    Args:
        folder: of the complete run; nothing in it is written.
        built: what the new run is made of.
        parts: of the configuration of the new run.

    Raises:
        ConfigError: there is no complete run with a checkpoint; its configuration differs in more than the length; no
            task is left to learn; or the method or the evaluation depends on the number of all tasks.
    """
    stored = _complete(folder)
    changed = _changed(folder, stored, parts)
    if TASKS in changed:
        _refuse_dependent(folder, built, parts)
    digest = config_hash(stored["config"])
    if (before := _learned(stored)) >= (now := len(built.stream.tasks)):
        left = (
            f"its {before} tasks are learned, and this run has {now}. A learned task is not learned again, whatever "
            "the budget; set a larger job.max_tasks, or null for all"
        )
        raise ConfigError(f"job.start_from: nothing is left to learn after {folder}: {left}")
    method, state, damage = checkpoint.resume(
        folder / "checkpoint.pt", built.method, config_hash=digest, hardware=parts.hardware, tasks=now
    )
    if damage is not None:
        raise ConfigError(f"job.start_from: the checkpoint in {folder} is damaged ({damage}); run it again")
    state.start = {
        "folder": str(folder.absolute()),
        "learned": state.learned,
        "config_hash": digest,
        "changed": changed,
        "identical": not any(key in LENGTHS for key in changed),
    }
    return method, state


def refuse_other_start(before: Mapping[str, Any] | None, now: Mapping[str, Any] | None, folder: Path) -> None:
    """Raise if the run in `folder`, whose next task was begun, went on from another run than it would now.

    Args:
        before: `started_from` in its run.json.
        now: the same as `start_from` gives it.
        folder: of the run that goes on.

    Raises:
        ConfigError: see above; the state within the task has learned from the other run.
    """
    if before and now and any(before.get(key) != now[key] for key in ("learned", "config_hash")):
        raise ConfigError(
            f"job.start_from: the run in {folder} went on from {before.get('folder')}, which was another one, and has "
            "begun a task; name that folder again, or choose another hydra.run.dir"
        )


def note(start: Mapping[str, Any]) -> str:
    """Return the note of run.json on a run that has gone on from another one."""
    changes = ", ".join(f"{key} was {_shown(old)} and is {_shown(new)}" for key, (old, new) in start["changed"].items())
    text = f"went on after {start['learned']} tasks from {start['folder']} ({changes or 'same configuration'})"
    if start["identical"]:
        return text
    return f"{text}: the tasks before were learned with the old length, so that no uninterrupted run has this result"


def _complete(folder: Path) -> dict[str, Any]:
    """Return run.json of a complete run with a checkpoint.

    Raises:
        ConfigError: there is none.
    """
    if not (folder / "run.json").exists():
        raise ConfigError(f"job.start_from: there is no run in {folder} (no run.json); name the folder of a run")
    stored = read_run(folder)
    if stored["status"] != "completed":
        raise ConfigError(
            f"job.start_from: the run in {folder} is not complete ({stored['status']}); start its own command again "
            "with job.keep_checkpoint=true first"
        )
    if not (folder / "checkpoint.pt").exists():
        raise ConfigError(
            f"job.start_from: the run in {folder} has kept no checkpoint; run it again in another folder with "
            "job.keep_checkpoint=true"
        )
    return stored


def _changed(folder: Path, stored: Mapping[str, Any], parts: Parts) -> dict[str, list[Any]]:
    """Return old and new value of each key in which the configurations differ.

    Raises:
        ConfigError: they differ in more than the length.
    """
    keys = differing_keys(stored["config"], parts.config)
    if others := [key for key in keys if key not in (TASKS, *LENGTHS)]:
        raise ConfigError(
            f"job.start_from: the run in {folder} has another configuration ({', '.join(others)} differ); only "
            f"{', '.join((TASKS, *LENGTHS))} may"
        )
    old, new = flatten(stored["config"]), flatten(parts.config)
    return {key: [old.get(key), new.get(key)] for key in keys}


def _refuse_dependent(folder: Path, built: Built, parts: Parts) -> None:
    """Raise where the number of all tasks changes what was learned or measured before.

    Raises:
        ConfigError: see above.
    """
    if built.method.depends_on_task_count:
        raise ConfigError(
            f"job.start_from: {type(built.method).__name__}, as configured, divides something among all tasks, so that "
            f"the run in {folder} cannot go on with another job.max_tasks; run all tasks anew"
        )
    if parts.compress is not None and parts.compress.when == "end":
        raise ConfigError(
            f"job.start_from: with compress.when=end the run in {folder} has compressed its network after its last "
            "task, which is not the last one here; run all tasks anew, or use compress.when=each_task"
        )
    option = "eval_unseen" if parts.job.eval_unseen else "eval_initial"
    if parts.job.eval_unseen or (parts.job.eval_initial and built.stream.setting == "dil"):
        raise ConfigError(
            f"job.start_from: with job.{option}=true the run in {folder} has not evaluated the tasks beyond its "
            "job.max_tasks; run all tasks anew"
        )


def _learned(stored: Mapping[str, Any]) -> int:
    """Return the number of tasks that a complete run has learned."""
    return len(stored["task_order"] or ())


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def copy_log(source: Path, target: Path) -> None:
    """Copy metrics.jsonl of the run that a new one goes on from; without it nothing is copied."""
    path = source / "metrics.jsonl"
    if path.exists() and not (target / "metrics.jsonl").exists():
        with replacing(target / "metrics.jsonl", flush=False) as file:
            file.write(read_regular(path, LOG_LIMIT))
