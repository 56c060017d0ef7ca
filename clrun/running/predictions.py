"""Predictions of single rows on request: predictions.csv and the files of the folder logits/.

predictions.csv has one line per evaluated row of each learned task: `position` (tasks learned so far), `task` (id of
the row's task), `row` (number of the row among the evaluated rows of its task), `label`, and one column per setting
(`cil`, `til` or `dil`) with the predicted class. Labels and predictions are class ids of the data set.

logits/after_N.npz holds the logits after N tasks, to be read with `numpy.load`: `logits` [n, k] float32, `classes` [k]
the class id of each column, and `task`, `row` and `label` [n] as in predictions.csv, in the same order. The columns
are the classes that compete in any setting after N tasks. Where the classes of other tasks do not compete, as in
task-incremental evaluation, the reader masks them.
"""

import copy
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from clrun.config.job import When
from clrun.data.stream import Stream
from clrun.learning.method import Method
from clrun.results.records import PREDICTIONS_LIMIT
from clrun.running.evaluation import Evaluation
from clrun.system.errors import ConfigError
from clrun.system.files import append_text, csv_text, refuse_links, replace_text, replacing, writing
from clrun.system.reading import read_lines

CSV = "predictions.csv"
AWAY = "move it away to go on without it"


@dataclass
class Predictions:
    """Writes the predictions and logits of one run.

    Attributes:
        folder: the folder of the run.
        evaluation: how rows are chosen and read; this process reads all of them, also when the run has several.
        csv: when predictions.csv gets lines.
        logits: when a file of logits is written.
        written: number of bytes of predictions.csv and their CRC-32, which the checkpoint keeps.
    """

    folder: Path
    evaluation: Evaluation
    csv: When
    logits: When
    written: tuple[int, int] = field(default=(0, 0), init=False)
    _in_csv: set[int] = field(default_factory=set, init=False)  # numbers of learned tasks whose predictions are written
    _in_logits: set[int] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        """Make this process read every row."""
        if self.evaluation.hardware.world > 1:
            alone = copy.copy(self.evaluation.hardware)
            alone.rank, alone.world = 0, 1
            shared = self.evaluation
            self.evaluation = Evaluation(alone, shared.split, shared.batch_size, shared.max_rows)

    def resume(self, learned: int, written: Sequence[int] | None = None) -> list[str]:
        """Remove what is there of tasks that are learned again; return notes on what cannot be made up for.

        Args:
            learned: tasks that the run has learned; 0 for a run that begins.
            written: `written` of this class when the checkpoint was saved; None when it has none.

        Raises:
            ConfigError: predictions.csv is no longer what the run has written; or there is a link or a folder at its
                name.
        """
        refuse_links(self.folder / "logits")
        path = self.folder / CSV
        if learned and os.path.lexists(path):
            kept, numbers = self._kept(path, learned, written)
            self._in_csv, self.written = set(numbers), (len(kept), zlib.crc32(kept))
        if self._in_csv:
            replace_text(path, kept.decode(), flush=False)
        else:
            with writing(path):
                path.unlink(missing_ok=True)
        for stored in (self.folder / "logits").glob("after_*.npz"):
            position = re.fullmatch(r"after_([0-9]{1,9})", stored.stem)
            if position is None or stored.is_dir():
                continue
            if int(position[1]) > learned:
                stored.unlink()
            else:
                self._in_logits.add(int(position[1]))
        notes = []
        for option, when, there in (("predictions", self.csv, self._in_csv), ("logits", self.logits, self._in_logits)):
            missing = [str(position) for position in range(1, learned + 1) if position not in there]
            if when == "each_task" and missing:
                notes.append(
                    f"job.save_{option}=each_task: those after {', '.join(missing)} tasks are missing, because the run "
                    "was resumed later with this option"
                )
        return notes

    def _kept(self, path: Path, learned: int, written: Sequence[int] | None) -> tuple[bytes, list[int]]:
        """Return the lines of predictions.csv of the first `learned` tasks, and the number of learned tasks of each.

        Raises:
            ConfigError: see `resume`.
        """
        lines = read_lines(path, PREDICTIONS_LIMIT)
        if written is not None:
            whole = b"".join(lines)[: written[0]]
            if (len(whole), zlib.crc32(whole)) != tuple(written):
                raise ConfigError(f"{path}: is no longer what the run has written; {AWAY}")
            lines = whole.splitlines(keepends=True)
        try:
            numbered = [(int(line.partition(b",")[0]), line) for line in lines[1:] if line.endswith(b"\n")]
            kept = b"".join([*lines[:1], *(line for n, line in numbered if n <= learned)])
            kept.decode()
        except ValueError as error:
            raise ConfigError(f"{path}: has lines that are not clrun's; {AWAY}") from error
        return kept, [n for n, _ in numbered if n <= learned]

    def save(self, method: Method, stream: Stream, learned: int) -> None:
        """Write the predictions of `method` after `learned` tasks, as far as the options ask for them."""
        final = learned == len(stream.tasks)
        csv, logits = (when == "each_task" or (when == "final" and final) for when in (self.csv, self.logits))
        csv, logits = csv and learned not in self._in_csv, logits and learned not in self._in_logits
        if not (csv or logits):
            return
        rows, outputs = self.evaluation.predictions(method, stream, learned)
        if csv:
            path = self.folder / CSV
            header = [] if path.exists() else [list(rows[0])]
            text = csv_text([*header, *(row.values() for row in rows)])
            append_text(path, text)
            size, crc = self.written
            self.written = size + len(text.encode()), zlib.crc32(text.encode(), crc)
            self._in_csv.add(learned)
        if logits:
            self._save_logits(stream, learned, rows, outputs)
            self._in_logits.add(learned)

    def _save_logits(self, stream: Stream, learned: int, rows: list[dict[str, int]], outputs: torch.Tensor) -> None:
        """Write logits/after_N.npz; see the head of this module."""
        classes = stream.candidates(learned, stream.setting).any(dim=0).nonzero()[:, 0]
        path = self.folder / "logits" / f"after_{learned}.npz"
        task, row, label = (np.array([found[name] for found in rows]) for name in ("task", "row", "label"))
        with replacing(path, flush=False, below=self.folder) as file:
            logits = outputs[:, classes].numpy()
            np.savez_compressed(file, logits=logits, classes=classes.numpy(), task=task, row=row, label=label)
