"""Keeps the files of one run: what the engine reports goes to run.json, the tables, the checkpoint and the logger."""

import math
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clrun.config.environment import digests, masked
from clrun.config.job import JobInfo
from clrun.data.identity import remember_rows
from clrun.data.stream import Stream, Task
from clrun.learning.method import Method
from clrun.learning.progress import Progress
from clrun.results.identity import config_hash
from clrun.results.metrics import AccuracyMatrix, summary
from clrun.results.records import SCHEMA, RunFolder
from clrun.running import checkpoint, checkpoint_file
from clrun.running.accounting import (
    changed_circumstances,
    learner_parameters,
    state_bytes,
    versions,
)
from clrun.running.build import Built
from clrun.running.checkpoint import RunState, Unstorable
from clrun.running.data_checks import (
    OTHER_RULE,
    START,
    UNKNOWN,
    check_resumed,
    check_task,
    is_unchanged,
    stored_identity,
)
from clrun.running.evaluation import Evaluation, Row
from clrun.running.loggers import Logger, Show
from clrun.running.parts import Parts
from clrun.running.predictions import Predictions
from clrun.running.prompt_selection import selection_counts
from clrun.running.restoring import WEIGHTS, save_weights
from clrun.running.run_entries import entries_of, flops_per_image
from clrun.running.start_from import copy_log, refuse_other_start, start_from
from clrun.running.start_from import note as note_on_start
from clrun.running.task_fits import TaskFits, resumed_fits
from clrun.system.errors import ConfigError, printable, warn
from clrun.system.files import append_text, json_value, replace_text
from clrun.system.signals import Stopped

KEPT_NOTES = (
    "resumed ",
    "stopped by ",
    "data changed ",
    UNKNOWN,
    OTHER_RULE,
)  # beginnings of notes that stay when a run is resumed again
UNSAFE = 5.0  # seconds of work that a loss of power (not of the process) may cost


class Recorder:
    """What one process of a run reports to. Files are written and text is printed by the main process alone.

    Args:
        parts: of the configuration; its hardware is set up.
        folder: the folder of the run.
        job: how the run was started.
    """

    def __init__(self, parts: Parts, folder: RunFolder, job: JobInfo) -> None:
        self.parts, self.folder, self.job = parts, folder, job
        self.options, self.hardware = parts.job, parts.hardware
        self.hash, self.written = config_hash(parts.config), job.recorded or parts.config
        self.logger: Logger | None = parts.logger if self.hardware.main else None
        self.evaluation = Evaluation(
            self.hardware, self.options.eval_split, self.options.eval_batch_size, self.options.max_eval_rows
        )
        self.predictions = Predictions(
            folder.path, self.evaluation, self.options.save_predictions, self.options.save_logits
        )
        self.backbone_digests: dict[str, str] = {}
        self.storable: list[Any] | None = None  # the classes and functions that a checkpoint may name
        self.checkpoint = folder.path / "checkpoint.pt"
        self.task_checkpoint = folder.path / "checkpoint.task.pt"  # within a task
        self.fits: TaskFits | None = None  # writes it
        self.damaged = False  # whether the file of this name was refused, and the generation before it used
        self.flushed = time.monotonic()
        self.checked = False  # whether this process compares the data with those of the beginning after every task
        self.stream: Stream
        self.run: dict[str, Any] = {
            "schema": SCHEMA,
            "status": "running",
            "error": None,
            "name": self.written["name"],
            "choices": job.choices,
            "overrides": job.overrides,
            "seed": parts.seed,
            "config_hash": self.hash,
            "task_order": None,
            "class_order": None,
            "data": None,
            "notes": [],
            "accuracy_matrix": {},
            "metrics": {},
            "cost": {"tasks": []},
            "versions": versions(self.hardware),
            "started": _now(),
            "finished": None,
            "config": json_value(self.written),
        }
        if kept := digests(self.written, parts.config):
            self.run["environment"] = kept

    # --- around the run

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Hold the run's folder while the block builds and runs, and note in run.json how a run that fails ended.

        A run that fails before its first file was written leaves the run.json of an earlier run as it is; when the
        reason is a mistake of the user, it leaves no file at all.

        Raises:
            ConfigError: another process holds the folder, or it cannot be written.
        """
        try:
            with self.folder.locked() if self.hardware.main else nullcontext():
                try:
                    yield
                except ConfigError as mistake:
                    self._ended("failed", str(mistake), mistake=True)
                    raise
                except Stopped as stop:
                    self._ended("interrupted", self._note_on_stopping(stop), mistake=True)
                    raise
                except KeyboardInterrupt:
                    self._ended("interrupted", "interrupted by the user", mistake=True)
                    raise
                except Exception as error:
                    self._ended("failed", f"{type(error).__name__}: {error}", mistake=False)
                    raise
        finally:
            if self.logger is not None:
                self.logger.close()

    def _note_on_stopping(self, stop: Stopped) -> str:
        """Keep what the fits of the task have given, and return a note on where a signal has stopped the run."""
        text = str(stop) + ("" if self.fits is None else self.fits.stop())
        self.run["notes"].append(text)
        return text

    def _ended(self, status: str, error: str, *, mistake: bool) -> None:
        """Write how the run ended, as far as `recording` says so."""
        begun = self.run["task_order"] is not None
        if not self.hardware.main or (mistake and not begun):
            return
        self.run |= {"status": status, "error": masked(error, self.job.secrets), "finished": _now()}
        try:
            if begun or self._is_free():
                self.folder.write_run(self.run)
            if status == "failed":
                append_text(self.folder.path / "clrun.log", masked(traceback.format_exc(), self.job.secrets))
        except (ConfigError, OSError):
            return  # the disk that ended the run cannot store this either

    def _is_free(self) -> bool:
        """Return whether no run.json is there, or only that of this configuration's earlier failure to begin."""
        try:
            stored = self.folder.read_run()
        except ConfigError:
            return False
        return stored is None or (stored["task_order"] is None and stored.get("config_hash") == self.hash)

    # --- begin and end

    def resumed(self, built: Built) -> tuple[Method, RunState]:
        """Return the method and the progress of the folder's checkpoint; without one, the new method and no progress.

        Raises:
            ConfigError: the checkpoint cannot be used, the data are not those that it was learned from, or no
                checkpoint of the method can be written.
        """
        method, state = self._resumed(built)
        self._resume_task(built, state)
        state.data = stored_identity(built.data)
        return method, state

    def _resume_task(self, built: Built, state: RunState) -> None:
        """Go on within the next task where its checkpoint is there, and keep the fits of the tasks from now on."""
        options, folder = self.options, self.folder.path
        if options.resume and options.checkpoint_minutes is not None:
            self.fits, notes = resumed_fits(
                self.task_checkpoint,
                self.hardware,
                state.learned,
                len(built.stream.tasks),
                lambda data: is_unchanged(data, built, folder),
                interval=60 * options.checkpoint_minutes,
                config_hash=self.hash,
                backbone=self.backbone_digests,
                allowed=self.storable or [],
            )
            if notes and not checkpoint_file.generations(self.checkpoint):
                notes = [*self._notes_on_resuming(state.learned, None), *notes]
            self.run["notes"] += notes
        elif options.resume and checkpoint_file.generations(self.task_checkpoint):
            because = f"job.checkpoint_minutes is null, so that {self.task_checkpoint.name} was not used"
            self.run["notes"].append(f"the task at position {state.learned} began anew, because {because}")

    def _resumed(self, built: Built) -> tuple[Method, RunState]:
        """Do what `resumed` says, but leave the identity of the data as it was stored."""
        method = built.method
        self.backbone_digests = checkpoint.fingerprints(method)
        if self.options.resume:
            self.storable = checkpoint.parts(method)
        if not self.options.resume or not checkpoint_file.generations(self.checkpoint):
            return self._started(built)
        method, state, damage = checkpoint.resume(
            self.checkpoint, method, config_hash=self.hash, hardware=self.hardware, tasks=len(built.stream.tasks)
        )
        changed = check_resumed(built, state, self.folder.path, self.parts)
        self.damaged = damage is not None
        self.run["notes"] += [*self._notes_on_resuming(state.learned, damage), *changed]
        return method, state

    def _started(self, built: Built) -> tuple[Method, RunState]:
        """Return the new method and no progress, or those of the run that `job.start_from` names."""
        if self.options.start_from is None:
            return built.method, RunState()
        folder = Path(self.options.start_from).expanduser()
        method, state = start_from(folder, built, self.parts)
        if self.options.resume and checkpoint_file.generations(self.task_checkpoint):
            refuse_other_start((self.folder.read_run() or {}).get("started_from"), state.start, self.folder.path)
        state.predictions = None  # those are in the other folder
        self.run["notes"] += check_resumed(built, state, folder, self.parts, advice=START)
        if self.hardware.main:
            copy_log(folder, self.folder.path)
        return method, state

    def _notes_on_resuming(self, learned: int, damage: str | None) -> list[str]:
        """Return a note that the run goes on, after those of earlier times, and one if it goes on in another place."""
        before = self.folder.read_run() or {}
        notes = [note for note in before.get("notes") or [] if note.startswith(KEPT_NOTES)]
        note = f"resumed after {learned} tasks"
        if damage is not None:
            older = checkpoint_file.previous(self.checkpoint).name
            note += f" from {older}, because {self.checkpoint.name} was refused ({damage})"
            if self.hardware.main:
                warn(f"{self.checkpoint}: refused ({damage}); the run goes on from {older}")
        notes.append(note)
        if changed := changed_circumstances(before.get("versions") or {}, self.run["versions"]):
            notes.append(f"resumed on other hardware or software ({changed}): an uninterrupted run may differ slightly")
        return notes

    def begin(self, built: Built, state: RunState) -> None:
        """Write the files that a run begins with; rows of an unfinished task are dropped."""
        stream = built.stream
        entries, notes = entries_of(built)
        self.run |= entries
        self.run["notes"] += notes
        if state.start is not None:
            self.run["started_from"] = state.start
            self.run["notes"].append(note_on_start(state.start))
        if built.method.depends_on_batch:
            self.run["notes"].append("predictions depend on the composition of the test batch; not comparable")
        tasks = len(stream.tasks)
        empty = {s: [[None] * tasks] * tasks for s in self.evaluation.settings(built.method, stream)}
        self.run["accuracy_matrix"] = empty
        self._measure(state)
        self.stream = stream
        if self.logger is None:
            return
        self.checked = built.extractor is None  # features are what was computed from the data once
        if self.checked:
            remember_rows(stream.tasks)
        self._remove_stale()
        self.run["notes"] += self.predictions.resume(state.learned, state.predictions)
        self.run["notes"] = [masked(note, self.job.secrets) for note in self.run["notes"]]
        self.folder.write_config(json_value(self.written))
        for name, text in self.job.hydra.items():
            self._write(f".hydra/{name}", text)
        self.folder.write_rows(state.rows)
        self.folder.truncate_log(state.learned)
        self.folder.write_run(self.run)
        show: Show = "all" if self.job.parallel == 1 else "end"
        if self.job.number is not None and show == "all" and self.options.progress:
            words = " ".join(masked(word, self.job.secrets) for word in self.job.overrides)
            print(f"\nrun {self.job.number + 1}: {printable(words)}", flush=True)
        self.logger.start(self.run, stream, self.folder.path, show=show if self.options.progress else "nothing")

    def _remove_stale(self) -> None:
        """Remove checkpoints of an earlier run, which would pass for those of this one."""
        if not self.options.resume:
            checkpoint_file.remove(self.checkpoint)
        if self.fits is None:
            checkpoint_file.remove(self.task_checkpoint)

    def finish(self, built: Built, method: Method) -> None:
        """Write the files that a run ends with; run.json says completed last, and the checkpoint goes after it."""
        if self.logger is None:
            return
        self.run["cost"] |= {
            "parameters": learner_parameters(method, built.backbone),
            "state_bytes": state_bytes(method),
            "flops_per_image": flops_per_image(built, method),
        }
        for setting, value in self.evaluation.at_five.items():
            self.run["metrics"][setting]["accuracy_at_5"] = value
        self.run |= selection_counts(method, built.stream, self.evaluation)
        self.predictions.save(method, built.stream, len(built.stream.tasks))  # unless `end_task` has done so
        if self.options.save_model:
            save_weights(self.folder.path / WEIGHTS, method, built.stream, self.hardware)
        self.run |= {"status": "completed", "error": None, "finished": _now()}
        if self.options.picture:
            self._draw()
        self.folder.write_run(self.run)
        if not self.options.keep_checkpoint:
            checkpoint_file.remove(self.checkpoint)
        checkpoint_file.previous(self.checkpoint).unlink(missing_ok=True)
        checkpoint_file.remove(self.task_checkpoint)
        self.logger.finish(self.run)

    def _draw(self) -> None:
        """Draw accuracy_matrix.png, and selection.png for a method that chooses prompts or components."""
        from clrun.reporting.figures import draw_accuracy_matrix

        draw_accuracy_matrix(self.run, self.folder.path / "accuracy_matrix.png")
        if "selection" in self.run:
            from clrun.reporting.selection import draw_selection

            draw_selection(self.run, self.folder.path / "selection.png")

    def _measure(self, state: RunState) -> None:
        """Compute matrices, metrics and total cost from the rows and costs of the run so far."""
        groups: dict[str, list[Row]] = {}
        for row in state.rows:
            groups.setdefault(row["setting"], []).append(row)
        for setting, rows in sorted(groups.items()):
            matrix = AccuracyMatrix.from_rows(rows, order=self.run["task_order"])
            self.run["accuracy_matrix"][setting] = json_value(matrix.by_position()[1:])
            self.run["metrics"][setting] = json_value(summary(matrix))
        if state.extra:
            self.run["held_out"] = list(state.extra)
        self.run["cost"]["tasks"] = list(state.costs)  # which the engine goes on to extend
        for name in ("train_seconds", "eval_seconds"):
            self.run["cost"][name] = sum(cost[name] for cost in state.costs)

    def _write(self, name: str, text: str) -> None:
        """Write a file of the run's folder atomically."""
        replace_text(self.folder.path / name, text, flush=False, below=self.folder.path)

    # --- what the engine reports

    def begin_task(self, task: Task) -> None:
        """Report that `task` begins."""
        if self.logger is not None:
            self.logger.begin_task(task)

    def step(self, progress: Progress) -> None:
        """Report an optimizer step."""
        if self.logger is not None:
            self.logger.step(progress)

    def log(self, record: dict[str, Any]) -> None:
        """Record numbers of training (loss, learning rate, penalties) in metrics.jsonl."""
        if self.logger is not None:
            self.folder.append_log(record)
            self.logger.log(record)

    def rows(self, rows: list[Row]) -> None:
        """Append lines to accuracy.csv."""
        if self.logger is not None:
            self.folder.append_rows(rows)

    def end_task(self, task: Task, method: Method, state: RunState) -> None:
        """Record that a task is learned and evaluated: update run.json, save predictions and the checkpoint, print.

        Raises:
            ConfigError: a file cannot be written, the method cannot be stored in the checkpoint that the job needs, or
                a file of the data has changed while the task was learned.
        """
        if self.checked:
            try:
                check_task(self.stream, task, self.folder.path)
            except ConfigError:
                checkpoint_file.remove(self.task_checkpoint)  # its fits have learned from what has changed
                raise
        self._measure(state)
        if self.logger is not None:
            self.folder.write_run(self.run)
            self.predictions.save(method, self.stream, state.learned)
            state.predictions = self.predictions.written
        self._save_checkpoint(method, state)
        if self.logger is not None:
            self.logger.end_task(self.run)

    def _save_checkpoint(self, method: Method, state: RunState) -> None:
        """Write checkpoint.pt, which nobody needs where the job neither resumes nor keeps it: then it may fail."""
        if self.damaged and self.hardware.main:
            self.checkpoint.unlink(missing_ok=True)  # the generation before it, which is intact, is to stay
        self.damaged = False
        flush = time.monotonic() - self.flushed > UNSAFE
        try:
            checkpoint.save(
                self.checkpoint,
                method,
                state,
                config_hash=self.hash,
                backbone=self.backbone_digests,
                hardware=self.hardware,
                flush=flush,
                allowed=self.storable if state.learned == 1 else None,
            )
        except Unstorable as error:
            if self.options.resume or self.options.keep_checkpoint:
                raise
            if self.hardware.main:
                self.run["notes"] = [note for note in self.run["notes"] if note != str(error)] + [str(error)]
                checkpoint_file.remove(self.checkpoint)  # an earlier run's would pass for this one's
        self.flushed = time.monotonic() if flush else self.flushed


def average_accuracy(run: dict[str, Any]) -> float:
    """Return the final average accuracy (a fraction) in the stream's setting, from run.json; NaN when not measured."""
    value = run["metrics"].get(run["setting"], {}).get("average_accuracy")
    return math.nan if value is None else float(value)


def _now() -> str:
    """Return the time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
