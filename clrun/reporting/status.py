"""How far a sweep or a run is: `clrun status` reads the files in its folder and changes nothing."""

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import Any

from clrun.reporting.collect import run_folders
from clrun.reporting.tables import listing
from clrun.results.records import read_run
from clrun.system.errors import ConfigError, printable
from clrun.system.files import open_own
from clrun.system.locks import lock_holder
from clrun.system.reading import MB, read_regular

JOBS = "jobs.txt"  # in the folder of a sweep: the folder of each of its jobs, one per line
JOBS_LIMIT = 64 * MB
TAIL = 4096  # bytes at the end of metrics.jsonl in which the last record is looked for
STATES = ("completed", "running", "failed", "interrupted", "unreadable", "missing")


@dataclass(frozen=True)
class State:
    """How far one run is.

    Attributes:
        status: one of STATES; "interrupted" for a running one whose process is gone.
        text: what to show besides: the error of a failed run, task, step and age of a running one.
        seconds: from the beginning to the end of a completed run, or to now of a running one; None when unknown.
    """

    status: str
    text: str = ""
    seconds: float | None = None


@dataclass
class Watched:
    """The folder of a sweep or a run, looked at again and again; files of ended runs are read once.

    Attributes:
        folder: the folder.
    """

    folder: Path
    _ended: dict[Path, tuple[int, State]] = field(default_factory=dict)

    def look(self) -> dict[str, State]:
        """Return how far each run is by its folder; jobs that a sweep has not begun are "missing".

        A job that searches for the worst order has no run in its own folder, but one per order below it.

        Raises:
            ConfigError: there is no run and no sweep in the folder.
        """
        found = {self._label(path): self._state(path) for path in run_folders(self.folder)}
        planned = self._planned()
        if not found and not planned:
            raise ConfigError(f"status: no run (run.json) and no sweep ({JOBS}) in {self.folder}")
        begun = {str(folder) for name in found for folder in (PurePosixPath(name), *PurePosixPath(name).parents)}
        return {name: State("missing") for name in planned if name not in begun} | found

    def is_running(self) -> bool:
        """Return whether a process holds the sweep, or the run, in this folder."""
        return any(lock_holder(self.folder / name) is not None for name in ("sweep.lock", "lock"))

    def _label(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _planned(self) -> list[str]:
        """Return the folders of the jobs that the last command in this folder has planned."""
        try:
            return read_regular(self.folder / JOBS, JOBS_LIMIT).decode().splitlines()
        except (OSError, ConfigError, UnicodeDecodeError):
            return []

    def _advice(self, path: Path) -> str:
        """Return how to go on with the run in a folder."""
        key, folder = ("hydra.sweep.dir", self.folder) if (self.folder / JOBS).exists() else ("hydra.run.dir", path)
        return f"the same command with {key}={folder} goes on with it"

    def _state(self, path: Path) -> State:
        """Return how far the run in a folder is."""
        try:
            changed = os.lstat(path / "run.json").st_mtime_ns
            if path in self._ended and self._ended[path][0] == changed:
                return self._ended[path][1]
            run = read_run(path)
        except (OSError, ConfigError) as error:
            return State("unreadable", str(error))
        status, seconds = run["status"], _seconds(run)
        if status == "running":
            holder = lock_holder(path / "lock")
            if holder is not None:
                return State("running", f"{_progress(path, run)}, for {duration(seconds)}, {holder}", seconds)
            return State("interrupted", f"{_progress(path, run)}; {self._advice(path)}")
        state = State(status, str(run.get("error") or ""), seconds)
        self._ended[path] = changed, state
        return state


def _seconds(run: dict[str, Any]) -> float | None:
    """Return the time from the beginning of a run to its end, or to now; None when its times cannot be read."""
    try:
        began = datetime.fromisoformat(str(run.get("started")))
        ended = datetime.fromisoformat(str(run["finished"])) if run.get("finished") else datetime.now(UTC)
        return max(0.0, (ended - began).total_seconds())
    except (ValueError, TypeError):
        return None


def _progress(path: Path, run: dict[str, Any]) -> str:
    """Return how many tasks a run has learned, and the last step that it has recorded."""
    order = run["task_order"] or []
    learned = len((run.get("cost") or {}).get("tasks") or [])
    text = f"task {min(learned + 1, len(order))} of {len(order)}" if order else "begins"
    step = _last_step(path)
    return text if step is None else f"{text}, step {step}"


def _last_step(path: Path) -> int | None:
    """Return the optimizer step of the last record in metrics.jsonl; None without one."""
    try:
        with open_own(path / "metrics.jsonl", "read") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            line = file.read(TAIL).rstrip(b"\n").rpartition(b"\n")[2]
        return int(json.loads(line)["step"])
    except (OSError, ConfigError, ValueError, KeyError, TypeError):
        return None


def duration(seconds: float | None) -> str:
    """Return a time in words: "40 s", "12 min", "3 h 5 min", "2 d 4 h"."""
    if seconds is None:
        return "an unknown time"
    minutes = round(seconds) // 60
    if minutes < 1:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def left_seconds(states: Sequence[State]) -> float | None:
    """Return the estimated time until all runs are complete, at the pace of those that are.

    Runs that are running are taken to go on side by side, each for the mean time of a completed one. None when no run
    is running, or none is complete.
    """
    done = [state.seconds for state in states if state.status == "completed" and state.seconds is not None]
    running = [state.seconds or 0.0 for state in states if state.status == "running"]
    if not done or not running:
        return None
    mean = math.fsum(done) / len(done)
    waiting = sum(state.status in ("missing", "interrupted") for state in states)
    return (waiting * mean + math.fsum(max(0.0, mean - seconds) for seconds in running)) / len(running)


def page(folder: Path, found: dict[str, State]) -> str:
    """Return the text that `clrun status` prints."""
    groups = {status: [(name, s.text) for name, s in found.items() if s.status == status] for status in STATES}
    counts = ", ".join(f"{len(groups[status])} {status}" for status in STATES if groups[status])
    parts = [f"{printable(str(folder))}: {len(found)} runs: {counts}"]
    left = left_seconds(list(found.values()))
    if left is not None:
        end = datetime.now().astimezone() + timedelta(seconds=left)
        parts[0] += f"\nestimated end: {end:%Y-%m-%d %H:%M}, in {duration(left)}"
    parts += [listing(status, groups[status]) for status in STATES[1:] if groups[status]]
    return "\n\n".join(parts)


def watch(folder: Path, *, seconds: float) -> Iterator[str]:
    """Yield the text now and every so many seconds, until no process works in the folder any more."""
    watched = Watched(folder)
    while True:
        working = watched.is_running()  # before the look, so that the last text is that of the end
        found = watched.look()
        yield page(folder, found)
        if not working and not any(state.status == "running" for state in found.values()):
            return
        time.sleep(seconds)
