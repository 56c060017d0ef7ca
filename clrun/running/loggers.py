"""Where a run is shown while it runs: the console (bars, matrix rows, final table, clrun.log) and TensorBoard."""

import secrets
import sys
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from tqdm import tqdm

from clrun.data.stream import Stream, Task
from clrun.learning.progress import Progress
from clrun.reporting.tables import final_table, matrix_header, matrix_row, points
from clrun.system.errors import ConfigError, printable
from clrun.system.files import append_text, make_folder
from clrun.system.libraries import not_installed

# What is printed on the terminal; "end" is one line at the end, for jobs of a sweep that run at the same time.
Show = Literal["all", "end", "nothing"]


@runtime_checkable
class Logger(Protocol):
    """Shows a run while it runs; a recorder calls every method of it, on the main process only."""

    def start(self, run: dict[str, Any], stream: Stream, folder: Path, *, show: Show) -> None:
        """Begin or continue a run; `run` is the content of run.json."""

    def begin_task(self, task: Task) -> None:
        """Show that `task` begins."""

    def step(self, progress: Progress) -> None:
        """Show an optimizer step."""

    def log(self, record: dict[str, Any]) -> None:
        """Show numbers of training (loss, learning rate, penalties)."""

    def end_task(self, run: dict[str, Any]) -> None:
        """Show that a task is learned and evaluated; `run` is the content of run.json so far."""

    def finish(self, run: dict[str, Any]) -> None:
        """Show the end of the run."""

    def close(self) -> None:
        """Close files; called after success and after failure."""


class Console:
    """Prints a row of the accuracy matrix after each task and a table at the end; the text also goes to clrun.log.

    On a terminal two bars show the progress meanwhile: tasks, and the steps of the running fit.
    """

    def __init__(self) -> None:
        self._bars: list[tqdm[Any]] = []
        self._show: Show = "all"
        self._folder = Path()

    def start(self, run: dict[str, Any], stream: Stream, folder: Path, *, show: Show) -> None:
        """Print the header of the accuracy matrix; open the bars on a terminal."""
        self._show, self._folder = show, folder
        self._print(matrix_header(run))
        if show == "all" and sys.stderr.isatty():
            tasks = tqdm(total=len(stream.tasks), initial=_learned(run), desc="tasks", position=0, leave=False)
            self._bars = [tasks, tqdm(total=0, desc="steps", position=1, leave=False)]

    def begin_task(self, task: Task) -> None:
        """Show the task's name on the bar."""
        if self._bars:
            self._bars[0].set_description(f"task {task.index + 1} {task.name}")

    def step(self, progress: Progress) -> None:
        """Move the bar of the running fit."""
        if not self._bars:
            return
        bar = self._bars[1]
        if progress.step <= 1 or bar.total != progress.total:
            bar.reset(progress.total)
            bar.set_description(progress.phase)
        bar.update(progress.step - bar.n)

    def log(self, record: dict[str, Any]) -> None:
        """Show the loss on the bar."""
        if self._bars and "loss" in record:
            self._bars[1].set_postfix({"epoch": record.get("epoch", 0) + 1, "loss": f"{record['loss']:.3f}"})

    def end_task(self, run: dict[str, Any]) -> None:
        """Print a row of the accuracy matrix."""
        if self._bars:
            self._bars[0].update(1)
        self._print(matrix_row(run))

    def finish(self, run: dict[str, Any]) -> None:
        """Print the final table and the path of the results."""
        self._close_bars()
        self._print(final_table(run))
        self._print(f"results: {self._folder}")
        if self._show == "end":
            metrics = run["metrics"].items()
            accuracy = "  ".join(f"{setting} {points(values['average_accuracy'])}" for setting, values in metrics)
            print(f"{printable(run['name'])}: average accuracy {accuracy}  results: {self._folder}", flush=True)

    def close(self) -> None:
        """Close the bars."""
        self._close_bars()

    def _print(self, text: str) -> None:
        """Write a line into clrun.log and, if everything is shown, above the bars."""
        if self._show == "all":
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        append_text(self._folder / "clrun.log", text + "\n")

    def _close_bars(self) -> None:
        """Remove the bars from the terminal."""
        for bar in self._bars:
            bar.close()
        self._bars = []


class TensorBoard:
    """Writes losses and the accuracy of each task as TensorBoard events into the run's folder.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(f"logger=tensorboard: {not_installed('tensorboard')}") from None
        self._console, self._open = Console(), SummaryWriter
        self._writer: Any = None
        self._steps = 0

    def start(self, run: dict[str, Any], stream: Stream, folder: Path, *, show: Show) -> None:
        """Open the event file and start the console."""
        self._console.start(run, stream, folder, show=show)
        events = folder / "tensorboard"
        make_folder(events, below=folder)
        # The random ending makes the name of the event file one that nobody can have prepared as a link.
        self._writer = self._open(str(events), filename_suffix=f".{secrets.token_hex(8)}")
        self._steps = run["cost"]["tasks"][-1]["steps"] if run["cost"]["tasks"] else 0

    def begin_task(self, task: Task) -> None:
        """Pass on to the console."""
        self._console.begin_task(task)

    def step(self, progress: Progress) -> None:
        """Count the step and pass it on to the console."""
        self._steps += 1
        self._console.step(progress)

    def log(self, record: dict[str, Any]) -> None:
        """Write every number of the record against the steps of the run."""
        self._console.log(record)
        step = self._steps + ("step" in record)  # the loss of a step comes before the step is counted
        for name, value in record.items():
            if name not in ("task", "position", "phase", "epoch", "step") and isinstance(value, int | float):
                self._writer.add_scalar(f"train/{name}", value, step)

    def end_task(self, run: dict[str, Any]) -> None:
        """Write the last row of each accuracy matrix against the number of tasks learned."""
        self._console.end_task(run)
        for setting, matrix in run["accuracy_matrix"].items():
            learned = _learned(run)
            for column, value in enumerate(matrix[learned - 1]):
                if value is not None:
                    self._writer.add_scalar(f"accuracy_{setting}/task {run['task_order'][column]}", value, learned)

    def finish(self, run: dict[str, Any]) -> None:
        """Pass on to the console."""
        self._console.finish(run)

    def close(self) -> None:
        """Close the event file."""
        self._console.close()
        if self._writer is not None:
            self._writer.close()


def _learned(run: dict[str, Any]) -> int:
    """Return the number of tasks that `run` has learned."""
    return len(run["cost"]["tasks"])
