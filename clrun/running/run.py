"""One run: build what the configuration names, live through the stream, leave the files of the run."""

import copy
import math
import time
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clrun.config.job import Job, JobInfo
from clrun.config.signature import locate
from clrun.data.order_search import adversarial
from clrun.data.stream import Task
from clrun.learning.context import Progress
from clrun.learning.method import Method
from clrun.results.identity import config_hash, differing_keys
from clrun.results.metrics import AccuracyMatrix, summary
from clrun.results.records import SCHEMA, RunFolder
from clrun.running import checkpoint
from clrun.running.accounting import (
    changed_circumstances,
    forward_flops,
    parameter_counts,
    state_bytes,
    token_count,
    versions,
)
from clrun.running.backbone_reuse import fact
from clrun.running.build import Built, Config, build, make, naming_foreign, preflight
from clrun.running.checkpoint import Life
from clrun.running.engine import Engine
from clrun.running.evaluation import Evaluation, Row
from clrun.running.feature_records import cache_report, feature_notes, transferability
from clrun.running.loggers import Logger, Show
from clrun.running.prompt_selection import selection_counts
from clrun.system.errors import ConfigError, noting
from clrun.system.files import csv_text, plain, replacing
from clrun.system.hardware import Hardware, launch

__all__ = ["Recorder", "preflight", "run_config"]
UNSAFE = 5.0  # seconds of work that a loss of power (not of the process) may cost


def run_config(config: Config, out: Path, *, job: JobInfo) -> float:
    """Run one configuration in the folder `out`, or continue what is there.

    Args:
        config: resolved and checked, plain types.
        out: the folder of the run; made when the run has been built, so that a mistake leaves nothing behind.
        job: how the run was started.

    Returns:
        The final average accuracy (a fraction) in the stream's setting, NaN when it was not measured.

    Raises:
        ConfigError: a mistake of the user; the folder holds another configuration or is in use.
    """
    settings: Job = make(config["job"], Job)
    if settings.mode == "dry_run":
        from clrun.running.dry_run import dry_run

        return dry_run(config, job)
    if settings.mode == "preview":
        from clrun.running.preview import preview

        return preview(config, out, job)
    if locate(config["task_order"]["_target_"]) is adversarial:
        from clrun.running.worst_order import search_worst_order

        return search_worst_order(config, out, job, run=_run)
    return _run(config, out, job)


def _run(config: Config, out: Path, job: JobInfo) -> float:
    """Run one configuration, or continue what is there; see `run_config`."""
    settings: Job = make(config["job"], Job)
    stored = RunFolder(out).read_run() if settings.resume else None
    if stored is not None:
        _refuse_other(stored, config, out)
        if stored["status"] == "completed":
            _show(stored, config, out)
            return _result(stored)
    hardware = config["hardware"]
    return launch(_work, (config, out, job), processes=hardware["processes"], device=hardware["device"])


def _refuse_other(stored: Config, config: Config, out: Path) -> None:
    """Raise unless the stored run has this configuration."""
    if stored["config_hash"] != config_hash(config):
        keys = ", ".join(differing_keys(stored["config"], config)) or "the configuration"
        raise ConfigError(f"{out}: holds a run of another configuration ({keys} differ); choose another hydra.run.dir")


def _show(stored: Config, config: Config, out: Path) -> None:
    """Print the table of a run that is complete."""
    if config["job"]["progress"]:
        from clrun.reporting.tables import final_table

        print(final_table(dict(stored)))
        print(f"results: {out} (complete already, nothing was run)")


def _result(run: Config) -> float:
    """Return the final average accuracy in the stream's setting."""
    value = run["metrics"].get(run["setting"], {}).get("average_accuracy")
    return math.nan if value is None else float(value)


def _work(config: Config, out: Path, job: JobInfo, rank: int, world: int) -> float:
    """Be one process of the run."""
    hardware: Hardware = make(config["hardware"], Hardware)
    hardware.setup(rank=rank, world=world, job=job.number or 0, parallel=job.parallel)
    recorder = Recorder(config, RunFolder(out), job, hardware)
    with recorder.watched(), naming_foreign(config):
        with noting(recorder.run["notes"]):  # the command line has shown them
            built = build(config, hardware)
        with recorder.owned():
            return recorder.live(built)


class Recorder:
    """Lives through one run and keeps its files; on processes other than the main one it writes nothing.

    Args:
        config: resolved configuration.
        folder: where.
        job: how the run was started.
        hardware: this process.
    """

    def __init__(self, config: Config, folder: RunFolder, job: JobInfo, hardware: Hardware) -> None:
        self.config, self.folder, self.job, self.hardware = config, folder, job, hardware
        self.settings: Job = make(config["job"], Job)
        self.hash = config_hash(config)
        self.logger: Logger | None = make(config["logger"], Logger) if hardware.main else None
        self.fingerprints: dict[str, str] = {}
        self.known: list[Any] | None = None  # what a checkpoint may name
        self.flushed = time.monotonic()
        self.run: dict[str, Any] = {
            "schema": SCHEMA,
            "status": "running",
            "error": None,
            "name": config["name"],
            "choices": job.choices,
            "overrides": job.overrides,
            "seed": config["seed"],
            "config_hash": self.hash,
            "task_order": None,
            "class_order": None,
            "notes": [],
            "accuracy_matrix": {},
            "metrics": {},
            "cost": {"tasks": []},
            "versions": versions(hardware),
            "started": _now(),
            "finished": None,
            "config": plain(config),
        }

    # --- around the run

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note in run.json how the run ended when it did not end well; a mistake before it began leaves no trace."""
        try:
            yield
        except ConfigError as mistake:
            self._ended("failed", str(mistake), begun=True)
            raise
        except KeyboardInterrupt:
            self._ended("interrupted", "interrupted by the user", begun=True)
            raise
        except Exception as error:
            self._ended("failed", f"{type(error).__name__}: {error}", begun=False)
            raise
        finally:
            if self.logger is not None:
                self.logger.close()

    def _ended(self, status: str, error: str, *, begun: bool) -> None:
        """Write the end of the run, if this process may and, for `begun`, only once its folder was taken."""
        if not self.hardware.main or (begun and self.run["task_order"] is None):
            return
        self.run |= {"status": status, "error": error, "finished": _now()}
        try:
            self.folder.create()
            self.folder.write_run(self.run)
            if status == "failed":
                with (self.folder.path / "clrun.log").open("a", encoding="utf-8") as log:
                    log.write(traceback.format_exc())
        except (ConfigError, OSError):
            return  # the disk that ended the run takes no note of it either

    def owned(self) -> AbstractContextManager[None]:
        """Make the folder and hold it while the block runs."""
        if not self.hardware.main:
            return nullcontext()
        self.folder.create()
        return self.folder.locked()

    # --- the run

    def live(self, built: Built) -> float:
        """Begin or resume, learn every task, finish."""
        method, life = built.method, Life()
        self.fingerprints = checkpoint.fingerprints(method.backbone)
        self.known = checkpoint.parts(method) if self.settings.resume else None
        stored = self.folder.path / "checkpoint.pt"
        if self.settings.resume and stored.exists():
            method, life = checkpoint.load(stored, method, config_hash=self.hash, hardware=self.hardware)
            self.run["notes"] += self._notes_on_resuming(life.learned)
        self._begin(built, life)
        evaluation = self._evaluation(self.hardware)
        engine = Engine(
            built.stream,
            built.budget,
            self.hardware,
            self.config["seed"],
            evaluation,
            self,
            eval_initial=self.settings.eval_initial,
            eval_every=self.settings.eval_every,
            max_steps=self.settings.max_steps,
            tuning=self.settings.tuning,
            life=life,
        )
        method = engine.run(method)
        if self.hardware.main:
            self._finish(built, method)
        return _result(self.run)

    def _notes_on_resuming(self, learned: int) -> list[str]:
        """Return a note that the run goes on, after those of earlier times, and one if it goes on in another place."""
        before = self.folder.read_run() or {}
        notes = [note for note in before.get("notes") or [] if note.startswith("resumed ")]
        notes.append(f"resumed after {learned} tasks")
        if changed := changed_circumstances(before.get("versions") or {}, self.run["versions"]):
            notes.append(f"resumed on other hardware or software ({changed}): an uninterrupted run may differ slightly")
        return notes

    def _evaluation(self, hardware: Hardware) -> Evaluation:
        return Evaluation(
            hardware, self.settings.eval_split, self.settings.eval_batch_size, self.settings.max_eval_rows
        )

    def _begin(self, built: Built, life: Life) -> None:
        """Write the files that a run begins with; rows of an unfinished task are dropped."""
        stream = built.stream
        self.run |= {
            "task_order": list(stream.order),
            "class_order": list(stream.class_order),
            "task_names": [task.name for task in stream.tasks],
            "task_classes": [task.classes.tolist() for task in stream.tasks],
            "setting": stream.setting,
            "input": built.input,
            "backbone": {
                "features": int(built.backbone.num_features),  # type: ignore[arg-type]
                "tokens": token_count(built.backbone),
                **parameter_counts(built.backbone),
            },
        }
        if built.method.uses_frozen_features:
            self.run |= {"features": cache_report(built.cache), "logme": transferability(stream)}
            self.run["notes"] += feature_notes(built.cache, built.images)
        if built.method.depends_on_batch:
            self.run["notes"].append("predictions depend on the composition of the test batch; not comparable")
        tasks = len(stream.tasks)
        empty = {s: [[None] * tasks] * tasks for s in self._evaluation(self.hardware).settings(built.method, stream)}
        self.run["accuracy_matrix"] = empty
        self._measure(life)
        if self.logger is None:
            return
        self.folder.write_config(plain(self.config))
        for name, text in self.job.hydra.items():
            self._write(f".hydra/{name}", text)
        self.folder.write_rows(life.rows)
        self.folder.truncate_log(life.learned)
        self.folder.write_run(self.run)
        show: Show = "all" if self.job.parallel == 1 else "end"
        self.logger.start(self.run, stream, self.folder.path, show=show if self.settings.progress else "nothing")

    def _measure(self, life: Life) -> None:
        """Compute matrices and metrics from the rows."""
        groups: dict[str, list[Row]] = {}
        for row in life.rows:
            groups.setdefault(row["setting"], []).append(row)
        for setting, rows in sorted(groups.items()):
            matrix = AccuracyMatrix.from_rows(rows, order=self.run["task_order"])
            self.run["accuracy_matrix"][setting] = plain(matrix.by_position()[1:])
            self.run["metrics"][setting] = plain(summary(matrix))
        self.run["cost"]["tasks"] = life.costs
        for name in ("train_seconds", "eval_seconds"):
            self.run["cost"][name] = sum(cost[name] for cost in life.costs)

    def _finish(self, built: Built, method: Method) -> None:
        """Write what belongs to the end of a run; run.json says completed last, and the checkpoint goes after it."""
        self.run["cost"] |= {
            "parameters": parameter_counts(*built.apart, method),
            "state_bytes": state_bytes(method),
            "flops_per_image": _flops(built, method),
        }
        self.run |= selection_counts(method, built.stream, self._evaluation(self.hardware))
        if self.settings.save_model:
            from safetensors.torch import save_model
            from torch import contiguous_format

            plain_order = copy.deepcopy(method).to(memory_format=contiguous_format)  # the format knows no other
            save_model(plain_order, str(self.folder.path / "model.safetensors"))
        if self.settings.save_predictions:
            self._save_predictions(built, method)
        self.run |= {"status": "completed", "error": None, "finished": _now()}
        if self.settings.picture:
            from clrun.reporting.figures import draw_accuracy_matrix

            draw_accuracy_matrix(self.run, self.folder.path / "accuracy_matrix.png")
            if "selection" in self.run:
                from clrun.reporting.selection import draw_selection

                draw_selection(self.run, self.folder.path / "selection.png")
        self.folder.write_run(self.run)
        if not self.settings.keep_checkpoint:
            (self.folder.path / "checkpoint.pt").unlink(missing_ok=True)
        assert self.logger is not None
        self.logger.finish(self.run)

    def _save_predictions(self, built: Built, method: Method) -> None:
        """Write predictions.csv: one line a test row of every task, with the class predicted in each setting."""
        alone = copy.copy(self.hardware)
        alone.rank, alone.world = 0, 1
        rows = list(self._evaluation(alone).predictions(method, built.stream))
        self._write("predictions.csv", csv_text([list(rows[0]), *(row.values() for row in rows)]))

    def _write(self, name: str, text: str) -> None:
        """Write a file of the run's folder atomically."""
        path = self.folder.path / name
        path.parent.mkdir(exist_ok=True)
        with replacing(path, flush=False) as file:
            file.write(text.encode())

    # --- the engine's journal

    def begin_task(self, task: Task) -> None:
        """Note that `task` begins."""
        if self.logger is not None:
            self.logger.begin_task(task)

    def step(self, progress: Progress) -> None:
        """Note an optimizer step."""
        if self.logger is not None:
            self.logger.step(progress)

    def log(self, record: dict[str, Any]) -> None:
        """Record numbers of training in metrics.jsonl."""
        if self.logger is not None:
            self.folder.append_log(record)
            self.logger.log(record)

    def rows(self, rows: list[Row]) -> None:
        """Append lines to accuracy.csv."""
        if self.logger is not None:
            self.folder.append_rows(rows)

    def end_task(self, task: Task, method: Method, life: Life) -> None:
        """Update run.json, write the checkpoint, and print."""
        self._measure(life)
        if self.logger is not None:
            self.folder.write_run(self.run)
        flush = time.monotonic() - self.flushed > UNSAFE
        checkpoint.save(
            self.folder.path / "checkpoint.pt",
            method,
            life,
            config_hash=self.hash,
            backbone=self.fingerprints,
            hardware=self.hardware,
            flush=flush,
            known=self.known if life.learned == 1 else None,
        )
        self.flushed = time.monotonic() if flush else self.flushed
        if self.logger is not None:
            self.logger.end_task(self.run)


def _flops(built: Built, method: Method) -> int | None:
    """Return the forward FLOPs of one image: backbone and head, however the method reads its backbone."""
    task = (0,) if method.needs_task_id else ()
    total = forward_flops(method, next(built.stream.tasks[0].test.batches(1)).x, *task)
    if method.uses_frozen_features and total is not None:
        image = next(built.images.tasks[0].test.batches(1)).x
        below = fact(built.backbone, f"flops of {tuple(image.shape)}", lambda: forward_flops(built.backbone, image))
        return None if below is None else total + below
    return total


def _now() -> str:
    """Return the time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
