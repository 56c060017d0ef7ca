"""Evaluation of a learner: integer counts for every setting from one forward pass."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from clrun.data.split import Split
from clrun.data.stream import Setting, Stream, Task
from clrun.learning.method import Method
from clrun.system.hardware import Hardware

Row = dict[str, Any]  # one line of accuracy.csv
Constants = WeakKeyDictionary[nn.Module, dict[int, list[Tensor | None]]]  # by backbone, task id and batch
PREPARED = 2**23  # bytes of prepared rows that are stored from one evaluation to the next
COUNTED_AT_ONCE = 2**20  # logits that are collected before they are counted: fewer counts are faster
FLOOR = math.log(1e-12)  # lower bound of the log-likelihood of one sample
AT = 5  # of the accuracy at 5
NONE = -1  # stands for the class of a row without an answer


@dataclass(frozen=True)
class Evaluation:
    """How learners are evaluated.

    Attributes:
        hardware: the device; each process of a run evaluates its part of the rows.
        split: "test" or "val".
        batch_size: rows per forward pass.
        max_rows: evaluate at most this many rows per task, evenly spaced; None evaluates all.
        at_five: by setting, after the last task: the mean over tasks of the fraction of rows whose class is among the
            five candidates with the highest logits. Settings in which some task has no more than five are missing.
    """

    hardware: Hardware
    split: str
    batch_size: int
    max_rows: int | None
    at_five: dict[Setting, float] = field(default_factory=dict, init=False)
    _prepared: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict, init=False, repr=False)
    _constants: Constants = field(default_factory=WeakKeyDictionary, init=False, repr=False)

    def rows(self, task: Task) -> Split:
        """Return the evaluated rows of `task`."""
        split = task.val if self.split == "val" else task.test
        assert split is not None, "the runner checks that validation rows exist"
        if self.max_rows is None or len(split) <= self.max_rows:
            return split
        return split.select(torch.linspace(0, len(split) - 1, self.max_rows, device=split.y.device).long())

    def settings(self, method: Method, stream: Stream) -> tuple[Setting, ...]:
        """Return the settings in which `method` can be evaluated on this stream."""
        if stream.setting == "dil":
            return ("dil",)
        return ("til",) if method.needs_task_id else ("cil", "til")

    def logits(self, method: Method, task: Task) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (logits [n, C] float32, labels [n]) of the rows of the task that this process evaluates."""
        position = task.index if method.needs_task_id else None
        constants = self._constants.setdefault(method.backbone, {}).setdefault(task.id, [])
        collected: list[tuple[Tensor, Tensor]] = []
        for number, (x, y) in enumerate(self._batches(task)):
            with self.hardware.autocast():
                if number == len(constants):
                    constants.append(method.constant(x))
                constant = constants[number]
                if constant is not None:
                    logits = method.forward_with(constant, x, position)
                else:
                    logits = method(x) if position is None else method(x, position)
            collected.append((logits.float(), y))
            if len(collected) * logits.numel() > COUNTED_AT_ONCE:
                yield _joined(collected)
                collected = []
        if collected:
            yield _joined(collected)

    def _batches(self, task: Task) -> Iterable[tuple[Tensor, Tensor]]:
        """Return the batches (x, labels) that this process evaluates; those of small tasks are prepared once."""
        if task.id in self._prepared:
            return self._prepared[task.id]
        shard = (self.hardware.rank, self.hardware.world)
        read = self.rows(task).batches(self.batch_size, shard=shard)
        batches = ((self.hardware.layout(batch.x), batch.y) for batch in read if len(batch))
        first = next(batches, None)
        if first is None:
            return ()
        room = PREPARED - sum(x.nbytes for batches_of_task in self._prepared.values() for x, _ in batches_of_task)
        if first[0][0].nbytes * len(self.rows(task)) > room:
            return chain([first], batches)
        self._prepared[task.id] = [first, *batches]
        return self._prepared[task.id]

    def __call__(
        self,
        method: Method,
        stream: Stream,
        learned: int,
        *,
        candidates: int | None = None,
        tasks: int | None = None,
        unseen: bool = False,
    ) -> list[Row]:
        """Evaluate every learned task in every setting.

        Args:
            method: put into eval mode; its mode is restored.
            stream: the stream.
            learned: tasks learned so far; the `position` of the rows.
            candidates: tasks whose classes compete; default `learned`.
            tasks: how many tasks to evaluate, by position; default `candidates`.
            unseen: evaluate all tasks. For those beyond `candidates`, their own classes compete in the setting "til",
                and all classes elsewhere; a setting "open" has all classes for every task.

        Returns:
            Rows of accuracy.csv without `step` and `phase`, sorted by task position and setting.
        """
        candidates = learned if candidates is None else candidates
        training = method.training
        if training:
            method.eval()
        rows = []
        after = stream.tasks[learned - 1].id if learned else -1
        settings = self.settings(method, stream)
        if unseen and "cil" in settings:
            settings = ("cil", "open", "til")
        masks = self._masks(stream, settings, candidates)
        if unseen:
            tasks = len(stream.tasks)
            for own, setting in zip(masks, settings, strict=True):
                known = stream.members if setting == "til" else stream.candidates(0, "open")
                own[candidates:] = known[candidates:].to(own.device)
        members = stream.members.to(self.hardware.device)
        last = learned == candidates == len(stream.tasks)
        ranked: list[list[float]] = []
        with torch.inference_mode():
            for task in stream.tasks[: candidates if tasks is None else tasks]:
                counts = self._count(method, task, masks[:, task.index], members[task.index], ranks=last)
                total = len(self.rows(task))
                ranked.append((counts[:, 3] / max(1, total)).tolist())
                for setting, (correct, task_correct, nll, _) in zip(settings, counts.tolist(), strict=True):
                    row: Row = {"position": learned, "after": after, "task": task.id, "task_position": task.index}
                    row |= {"split": self.split, "setting": setting, "correct": int(correct), "total": total}
                    rows.append(row | {"task_correct": int(task_correct), "nll": nll / max(1, total)})
        if training:
            method.train()
        if last:
            enough = (masks.sum(dim=2) > AT).all(dim=1).tolist()
            columns = zip(settings, zip(*ranked, strict=True), enough, strict=True)
            self.at_five.update({setting: sum(own) / len(own) for setting, own, several in columns if several})
        return rows

    def accuracy(self, method: Method, stream: Stream, task: Task) -> float:
        """Return the accuracy (a fraction) on `task`, the last one learned, in the setting of the stream."""
        training = method.training
        method.eval()
        own = stream.members[task.index].to(self.hardware.device)
        masks = self._masks(stream, (stream.setting,), task.index + 1)
        with torch.inference_mode():
            counts = self._count(method, task, masks[:, task.index], own)
        method.train(training)
        return counts[0, 0].item() / len(self.rows(task))

    def _count(self, method: Method, task: Task, masks: Tensor, own: Tensor, *, ranks: bool = False) -> Tensor:
        """Return [S, 4] sums over the task's rows.

        They are: correct, argmax in the true task, negative log-likelihood, label among the first five. A row in which
        every competing class has the score minus infinity has no answer: it is wrong in all of them.

        Args:
            method: the learner in eval mode.
            task: the task.
            masks: [S, C], one row per setting.
            own: [C], the classes of the task.
            ranks: count the last column, which is 0 otherwise.
        """
        counts = torch.zeros(len(masks), 4, dtype=torch.float64, device=masks.device)
        for logits, y in self.logits(method, task):
            # [S, C, n]: reductions over classes run several times faster when samples lie side by side.
            allowed = logits.t().contiguous().masked_fill(~masks[:, :, None], float("-inf"))
            highest, choice = allowed.max(dim=1)
            silent = highest == float("-inf")
            nll = -allowed.log_softmax(dim=1).gather(1, y.expand(len(masks), 1, -1))[:, 0].clamp_min_(FLOOR)
            nll = nll.masked_fill(silent, -FLOOR)
            first = _among_first(allowed, y) if ranks else torch.zeros_like(nll)
            found = [(choice == y) & ~silent, own[choice] & ~silent, nll, first]
            counts += torch.stack(found, dim=2).sum(dim=1, dtype=torch.float64)
        return self.hardware.sum(counts)

    def _masks(self, stream: Stream, settings: Sequence[Setting], candidates: int) -> Tensor:
        """Return [S, T, C] bool: the classes that compete for a sample of each task in each setting."""
        return torch.stack([stream.candidates(candidates, s) for s in settings]).to(self.hardware.device)

    def predictions(self, method: Method, stream: Stream, learned: int) -> tuple[list[Row], Tensor]:
        """Return the predictions of this process's rows of the learned tasks, and their logits [n, C] float32 (CPU).

        Args:
            method: put into eval mode; its mode is restored.
            stream: the stream.
            learned: tasks learned so far; their classes compete and their rows are read.

        Returns:
            One mapping per row with `position` (= `learned`), `task` (id), `row` (number within the task), `label`, and
            the predicted class in each setting, -1 for none (see `_count`); and the logits in the same order.
        """
        training = method.training
        method.eval()
        settings = self.settings(method, stream)
        masks = self._masks(stream, settings, learned)
        rows: list[Row] = []
        outputs = []
        with torch.inference_mode():
            for task in stream.tasks[:learned]:
                first = len(rows)
                for logits, y in self.logits(method, task):
                    outputs.append(logits.cpu())
                    highest, choices = logits.masked_fill(~masks[:, task.index, None], float("-inf")).max(dim=2)
                    choices = choices.masked_fill(highest == float("-inf"), NONE)
                    for label, *chosen in zip(y.tolist(), *choices.tolist(), strict=True):
                        row: Row = {"position": learned, "task": task.id, "row": len(rows) - first, "label": label}
                        rows.append(row | dict(zip(settings, chosen, strict=True)))
        method.train(training)
        return rows, torch.cat(outputs) if outputs else torch.empty(0, stream.num_classes)


def _among_first(logits: Tensor, y: Tensor) -> Tensor:
    """Return [S, n] bool: whether fewer than five classes come before the label; of equal logits the lower id does.

    A label with the score minus infinity is not among them.

    Args:
        logits: [S, C, n].
        y: [n] long, labels.
    """
    true = logits.gather(1, y.expand(len(logits), 1, -1))
    lower = torch.arange(logits.shape[1], device=y.device)[:, None] < y
    before = ((logits > true) | ((logits == true) & lower)).sum(dim=1)
    return (before < AT) & (true[:, 0] > float("-inf"))


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Concatenate pairs of (logits, labels)."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
