"""Whether the data of a run are still what they were: when it is resumed, after every task, and when it is complete."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clrun.data.identity import IN_MEMORY, Identity, changed_rows, unpacked
from clrun.data.stream import Stream, Task
from clrun.results.data_record import Changes, NamedRows, data_changes, is_comparable
from clrun.results.schema import data
from clrun.running.build import Built, identity
from clrun.running.checkpoint import RunState
from clrun.running.parts import Parts
from clrun.system.errors import ConfigError, collecting_warnings, one_line, warn

UNKNOWN = "this run began before clrun recorded the data of runs: whether they are still the same was not checked"
OTHER_RULE = (
    "this run began with a version of clrun that digested data in another way: whether they are still the same was not "
    "checked"
)
RESUME = "put them back and start the same command again, or choose another hydra.run.dir"
START = "put them back, or leave out job.start_from"
SHOWN = 3  # names of files in a message


def stored_identity(data: Identity) -> dict[str, Any]:
    """Return an identity as a checkpoint stores it."""
    return {"record": data.record, "rows": data.rows}


def check_resumed(built: Built, state: RunState, folder: Path, parts: Parts, *, advice: str = RESUME) -> list[str]:
    """Return notes on data that have changed where nothing learned so far has used them.

    That is allowed for contents (a damaged file was replaced) and for files that `dataset.images.unreadable=skip`
    leaves out.

    Args:
        built: what the run is about to go on with.
        state: of the checkpoint.
        folder: of the run.
        parts: of the configuration.
        advice: what to do when the data have changed, the end of the message.

    Raises:
        ConfigError: the data have changed in any other way.
    """
    if state.data is None:
        return [UNKNOWN]
    changes = _changes(state.data, stored_identity(built.data), folder)
    if not changes:
        return [] if is_comparable(state.data["record"]) else [OTHER_RULE]
    before, now = state.data["record"]["per_task"], built.data.record["per_task"]
    order = [task.id for task in built.stream.tasks]
    used = order[: state.learned + parts.job.eval_initial]
    unused = all(before.get(str(task)) == now[str(task)] for task in used)
    if unused and order[: state.learned] == [cost["task"] for cost in state.costs] and _is_repair(changes, parts):
        return [f"data changed before this run learned from them: {changes.text}"]
    raise ConfigError(
        f"{folder}: the data are no longer those that this run has learned from: {changes.text}; {advice} "
        "to begin a run with the data as they are"
    )


def is_unchanged(stored: dict[str, Any] | None, built: Built, folder: Path) -> bool:
    """Return whether the data are those of a stored identity, as far as that can be compared.

    Raises:
        ConfigError: the stored identity has another form than it must have.
    """
    now = stored_identity(built.data)
    return stored is not None and not _changes(stored, now, folder) and is_comparable(stored["record"])


def _is_repair(changes: Changes, parts: Parts) -> bool:
    """Whether only contents have changed, and files are left out only because they cannot be decoded."""
    if changes.classes or changes.added or changes.order:
        return False
    if not changes.gone:
        return True
    node = parts.config["dataset"]
    skips = node.get("images", {}).get("unreadable") == "skip"
    home = node.get("root") or os.path.dirname(str(node.get("file", "")))  # of a list: the folder that it is in
    root = os.path.expanduser(str(home))
    return skips and bool(changes.gone_rows) and all(_is_there(root, name) for name in changes.gone_rows)


def _is_there(root: str, name: str) -> bool:
    """Whether a file, or a link to one, is below `root`, or below the only folder in it that holds the data set."""
    try:
        homes = [root, *(entry.path for entry in os.scandir(root) if entry.is_dir())]
    except OSError:
        return False
    return any(os.path.lexists(os.path.join(home, name)) for home in homes)


def check_task(stream: Stream, task: Task, folder: Path) -> None:
    """Compare the data that a task has used with those at the beginning of the run; see `changed_rows`.

    Raises:
        ConfigError: a file or a row in memory has changed since, or is gone; the checkpoint is that of the task before.
    """
    changed = changed_rows(stream.tasks, task.index)
    if not changed:
        return
    names = ", ".join(changed[:SHOWN]) + (f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else "")
    again = f"start the same command with hydra.run.dir={folder}: the run goes on after {task.index} tasks"
    if changed[0].endswith(IN_MEMORY):
        what, advice = "rows have", f"let the code of this run work on copies, and {again}"
    else:
        what, advice = "1 file has" if len(changed) == 1 else f"{len(changed)} files have", f"put them back and {again}"
    raise ConfigError(
        f"dataset: {what} changed while this run was learning ({names}), so that task {task.id} ({task.name}) is not "
        f"recorded; {advice}"
    )


def changed_since(stored: Mapping[str, Any], parts: Parts) -> str:
    """Return one sentence on how the data differ from those of a completed run; "" when they are the same.

    Args:
        stored: run.json of the run.
        parts: of its configuration.
    """
    if not stored.get("data"):
        return ""
    try:
        with collecting_warnings([]):  # the check of the configuration has shown them
            now = identity(parts).record
    except ConfigError as error:
        return f"the data of this run cannot be read any more ({one_line(error)})"
    changes = data_changes(stored["data"], now)
    return f"the data have changed since this run: {changes.text}" if changes else ""


def check_restored(before: Mapping[str, Any] | None, now: Identity, folder: Path) -> None:
    """Compare the present data with those that a trained method has learned from; warn when rows have changed.

    Args:
        before: the record in run.json; None when there is none.
        now: the present identity.
        folder: of the run.

    Raises:
        ConfigError: the classes have other names or another order, so that the class ids that the method predicts
            would be read as other classes.
    """
    if before is None:
        return
    changes = data_changes(before, now.record)
    if before["classes"]["names"] != now.record["classes"]["names"]:
        what = "; ".join(changes.classes or changes.order)
        raise ConfigError(
            f"{folder}: the classes of the data are no longer those that this method has learned ({what}), so that its "
            "predictions would be read as other classes; put the folders or the list of the data back as they were"
        )
    if changes:
        warn(
            f"{folder}: the data have changed since this run: {changes.text}; predictions for other images do not "
            "depend on that, and test_images returns the images of now"
        )


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> Changes:
    """Return what has changed between the identity in the checkpoint of `folder` and the present one.

    Raises:
        ConfigError: the stored one is malformed.
    """
    problem = data(before.get("record"), "record")
    try:
        if problem is None:
            return data_changes(before["record"], now["record"], _rows(before), _rows(now))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        problem = f"rows: {one_line(error)}"
    raise ConfigError(
        f"{folder}: the identity of the data in its checkpoint is malformed ({problem}); choose another hydra.run.dir"
    )


def _rows(stored: Mapping[str, Any]) -> dict[str, NamedRows]:
    """Return the rows of a stored identity by part."""
    return {part: NamedRows(*unpacked(rows)) for part, rows in stored["rows"].items()}
