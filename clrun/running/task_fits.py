"""Keeps the fits of the task that is learned, so that a run that was stopped in its middle goes on there.

The fits of a task come in the same order whenever it is learned from the same state, so that their numbers name them.
On resuming, `learn` runs again from the state before the task: a fit whose result is kept hands it back, the
interrupted one goes on at its step, and the code between them, which is deterministic, runs again. A fit of which
nothing was kept runs again, too; short ones do, up to a twentieth of the interval between two checkpoints in all.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from clrun.learning.progress import Keeper, Running
from clrun.running import checkpoint, checkpoint_file, task_file
from clrun.running.checkpoint import UNPICKLABLE, Unstorable
from clrun.running.evaluation import Row
from clrun.running.fit_state import FitState
from clrun.running.object_graph import Changed
from clrun.running.task_file import AGAIN, StoredFit, TaskFile
from clrun.system import signals
from clrun.system.errors import first_line, warn
from clrun.system.files import writing
from clrun.system.hardware import Hardware

WRITE, STOP = 1, 1024  # what a process asks the others for; sums over up to 1023 processes stay apart


class TaskFits(Keeper):
    """The keeper of a run.

    Args:
        path: the file, see `clrun.running.task_file`.
        hardware: the processes.
        interval: seconds between two checkpoints inside a task.
        config_hash: hash of the configuration.
        backbone: digests of the networks as loaded.
        allowed: the classes and functions that a state may name (`clrun.running.checkpoint.parts`).

    Attributes:
        replay: called with what is kept of a fit when it is handed back, to report its steps, rows and records again.
        clock: returns the seconds of training so far.
        source: the generation of the file that was read or written last.
        damaged: whether a newer one was refused; it must not take the place of the generation before it.
        where: the position that was written last within the running fit, in words; "" for none.
        broken: why nothing is kept any more; "" as long as something is.
    """

    replay: Callable[[StoredFit], None]
    clock: Callable[[], float]

    def __init__(
        self,
        path: Path,
        hardware: Hardware,
        *,
        interval: float,
        config_hash: str,
        backbone: Mapping[str, str],
        allowed: list[Any],
    ) -> None:
        self.path, self.hardware, self.interval = path, hardware, interval
        self.config_hash, self.backbone, self.allowed = config_hash, backbone, allowed
        self.replay, self.clock = _forget, time.perf_counter
        self.source, self.damaged = path, False
        self.where, self.broken = "", ""
        self.learned = 0
        self.data: dict[str, Any] | None = None
        self.stored: dict[int, StoredFit] = {}  # results of finished fits, and the position that was read
        self.number, self.slack = -1, 0.0
        self.current: StoredFit | None = None
        self.state: FitState | None = None
        self.written, self.unwritten = time.monotonic(), False
        self.checked: set[str] = set()  # names of fits whose state was read back
        self.own: list[Any] = []  # classes and functions of the learner when the fit began

    # --- tasks

    def open(self, learned: int, tasks: int, unchanged: Callable[[dict[str, Any] | None], bool]) -> str:
        """Take what the file has of the next task, and return a note on it; "" where there is nothing to say.

        Args:
            learned: tasks finished.
            tasks: number of tasks of the stream.
            unchanged: whether the data are those of a stored identity.

        Raises:
            ConfigError: the file belongs to another configuration or number of processes, or its header is wrong.
        """
        self.learned = learned
        content, damage = task_file.latest(self.path, rank=self.hardware.rank, main=self.hardware.main, tasks=tasks)
        note = f"{self.path.name} was refused ({damage})" if damage else ""
        if content is None:
            return f"the task at position {learned} began anew, because {note}" if note else ""
        self.source, self.damaged = checkpoint_file.generations(self.path)[-1 if damage else 0], bool(damage)
        checkpoint.refuse_other_configuration(self.path, content.config_hash, self.config_hash)
        checkpoint.refuse_other_world(self.path, content.world, self.hardware)
        if content.learned != learned:
            return ""  # of a task that has its own checkpoint by now, or comes after one that is lost
        if not unchanged(content.data):
            return f"the task at position {learned} began anew, because the data have changed since its checkpoint"
        self.stored = {fit.number: fit for fit in content.fits}
        last = content.fits[-1]
        where = f"{'after' if last.finished else 'in'} its fit '{last.name}'"
        older = f" of {checkpoint_file.previous(self.path).name}, because {note}" if note else ""
        return f"resumed in the task at position {learned}, {where}{older}"

    @contextmanager
    def attached(self, replay: Callable[[StoredFit], None], clock: Callable[[], float]) -> Iterator[None]:
        """Use `replay` and `clock` inside the context.

        They refer to the engine, which refers to this object: the data of a run would stay in memory after it.
        """
        self.replay, self.clock = replay, clock
        try:
            yield
        finally:
            self.replay, self.clock = _forget, time.perf_counter

    def begin_task(self, learned: int, data: dict[str, Any] | None) -> None:
        """Begin the task at position `learned`, with this identity of the data."""
        self.learned, self.data = learned, data
        self.number, self.slack, self.written = -1, 0.0, time.monotonic()

    def end_task(self) -> None:
        """Forget the fits of a task whose own checkpoint is written."""
        self.stored = {}
        if self.hardware.main:
            checkpoint_file.remove(self.path)

    def stop(self) -> str:
        """Write the results that are not written yet, because a signal ends the work; return where it ends, in words.

        Raises:
            ConfigError: the file cannot be written.
        """
        if self.unwritten:
            self.write(None)
        return f" in the task at position {self.learned}{self.where and f', {self.where}'}"

    # --- what the engine reports while a fit runs

    def rows(self, rows: list[Row]) -> None:
        """Note lines of accuracy.csv."""
        if self.current is not None:
            self.current.rows += rows

    def record(self, record: dict[str, Any]) -> None:
        """Note a line of metrics.jsonl."""
        if self.current is not None:
            self.current.records.append(record)

    # --- a fit

    def begin(self, running: Running) -> bool:
        """Take over what was kept of this fit; return whether the fit is finished by that.

        Raises:
            ConfigError: what was kept does not fit.
        """
        if self.hardware.world == 1:  # several processes agree on it after their next step
            signals.raise_requested()
        self.number += 1
        self.begun, self.carried = self.clock(), 0.0
        self.current, self.state = StoredFit(self.number, running.progress.phase), None
        if self.broken:
            return False
        found = self.stored.get(self.number)
        try:
            self.state = FitState(running, self.hardware)
            if found is not None or self.current.name not in self.checked:
                self.own = checkpoint.parts(running.method)  # what it is made of before its first step
        except (*UNPICKLABLE, Unstorable) as error:
            self._give_up(f"method: its state cannot be stored within a task ({first_line(error)})")
            return False
        if found is None:
            return False
        self._restore(found)
        self.current, self.carried = None, found.seconds
        self.replay(found)
        if not found.finished:
            self.current = self.stored.pop(self.number)
        return found.finished

    def _restore(self, found: StoredFit) -> None:
        """Give the running fit the state that was kept of it.

        Raises:
            ConfigError: it names something that the method is not made of, or belongs to another fit.
        """
        assert self.state is not None and self.current is not None
        try:
            content = checkpoint.unpickled(found.parts[self.hardware.rank], self.allowed + self.own)
        except Exception as error:
            reason = checkpoint.reason_of(error)
            raise Changed(f"{self.source}: refused, nothing in it was run ({reason}); {AGAIN}") from None
        try:
            if found.name != self.current.name:
                raise Changed(f"it is named '{self.current.name}' and was named '{found.name}'")
            self.state.unpack(content)
        except (Changed, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            what = f"does not belong to fit {found.number} ('{found.name}') of task {self.learned}"
            raise Changed(f"{self.source}: {what} ({first_line(error)}); {AGAIN}") from None

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Let signals wait, within the block, for the end of a step."""
        with signals.deferred():
            yield

    @contextmanager
    def drawing(self, running: Running, *, again: bool) -> Iterator[None]:
        """Hold the generators as they were when the current pass began; see the base class."""
        state = self.state
        if state is None:
            yield
        elif again:
            now = state.draws()
            state.set_draws(state.pass_draws)
            yield
            state.set_draws(now)
        else:
            state.pass_draws = state.draws()
            yield

    def after_step(self, running: Running) -> None:
        """Write the position where that is due, or a signal has asked to stop.

        Raises:
            Stopped: a signal has asked to stop.
        """
        hardware = self.hardware
        asked = hardware.asked_for if hardware.world > 1 else self.wish()
        if asked:
            if self._keep(running, finished=False):
                self.write(self.current)
                self.where = f"at step {running.progress.step} of {running.progress.total} of its fit '{self._name()}'"
            self.written = time.monotonic()
        if asked >= STOP:
            raise signals.Stopped(signals.requested() or signals.SIGNALS[0])
        hardware.asking = self.wish()  # after writing, so that nobody asks for the same again

    def wish(self) -> int:
        """Return what this process asks for after a step: 0, `WRITE` or `STOP`."""
        if signals.requested() is not None:
            return STOP
        return WRITE if time.monotonic() - self.written >= self.interval and not self.broken else 0

    def end(self, running: Running) -> None:
        """Keep the result of the fit unless it was short, and write it some time after the last checkpoint."""
        self.where, seconds = "", self.clock() - self.begun
        long = self.slack + seconds > self.interval / 20
        late = time.monotonic() - self.written >= self.interval / 4
        if self.hardware.world > 1:  # the clocks of the processes differ
            long, late = (bool(x) for x in self.hardware.sum(self._numbers(long, late)))
        if not long:
            self.slack += seconds
        elif self._keep(running, finished=True):
            assert self.current is not None
            self.stored[self.number] = self.current
            self.unwritten = True
            if late:
                self.write(None)
        self.current = self.state = None

    def _keep(self, running: Running, *, finished: bool) -> bool:
        """Pack the state of the fit; return whether that was possible."""
        state, current = self.state, self.current
        if state is None or current is None or self.broken:
            return False
        packed, problem = b"", ""
        try:
            packed = state.pack(self.backbone, finished=finished)
            if current.name not in self.checked:
                checkpoint.unpickled(packed, self.allowed + self.own)
                self.checked.add(current.name)
        except Unstorable as error:
            problem = str(error)
        except Exception as error:
            problem = f"method: its state cannot be read back ({checkpoint.reason_of(error)})"
        several = self.hardware.world > 1
        failed = bool(self.hardware.sum(self._numbers(bool(problem)))) if several else bool(problem)
        if failed:
            self._give_up(problem or "method: its state cannot be stored in another process")
            return False
        current.finished, current.steps = finished, running.progress.step
        current.seconds = self.carried + self.clock() - self.begun
        current.parts = self.hardware.gather(packed)
        return True

    def _name(self) -> str:
        """Return the name of the running fit."""
        return "" if self.current is None else self.current.name

    def _numbers(self, *values: bool) -> torch.Tensor:
        return torch.tensor([float(value) for value in values], device=self.hardware.device)

    def _give_up(self, problem: str) -> None:
        """Keep nothing from now on, and say so."""
        self.broken = f"{problem}: no checkpoint inside a task is written; set job.checkpoint_minutes=null to hide this"
        self.stored = {}
        if self.hardware.main:
            warn(self.broken)

    def write(self, position: StoredFit | None) -> None:
        """Write the results so far, and the position of the running fit if there is one; the main process does it.

        Raises:
            ConfigError: the file cannot be written.
        """
        fits = [self.stored[number] for number in sorted(self.stored)]
        if position is not None and self.number > max(self.stored, default=-1):  # else later ones are kept already
            fits.append(position)
        if self.hardware.main and fits:
            if self.damaged:
                with writing(self.path):
                    self.path.unlink(missing_ok=True)
                self.damaged = False
            content = TaskFile(self.config_hash, self.learned, self.data, fits, self.hardware.world)
            task_file.write(self.path, content, flush=True)
        self.source, self.unwritten = self.path, False
        self.written = time.monotonic()


def resumed_fits(
    path: Path,
    hardware: Hardware,
    learned: int,
    tasks: int,
    unchanged: Callable[[dict[str, Any] | None], bool],
    **options: Any,
) -> tuple[TaskFits, list[str]]:
    """Return the keeper of a run, with what the file at `path` has of the next task, and notes on that.

    Args:
        path: of the file.
        hardware: the processes.
        learned: see `TaskFits.open`.
        tasks: see there.
        unchanged: see there.
        options: of `TaskFits`.

    Raises:
        ConfigError: see there.
    """
    fits = TaskFits(path, hardware, **options)
    note = fits.open(learned, tasks, unchanged) if learned < tasks else ""
    return fits, [note] if note else []


def _forget(fit: StoredFit) -> None:
    """Report nothing of a fit that is handed back."""
