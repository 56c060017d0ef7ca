"""The trained method of a run, which predicts classes of images or texts.

Shapes: `N` images or texts, `C` classes of the whole data set.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clrun.api.images import Reader, decoding_node
from clrun.api.process import borrowed
from clrun.api.texts import TextReader
from clrun.config.check import check
from clrun.data.decode import Decoding
from clrun.data.images import FileImages, JoinedImages
from clrun.data.split import TensorSplit
from clrun.data.stream import Setting, Stream, Task
from clrun.data.texts import TextTransform, to_texts
from clrun.learning.method import Method
from clrun.results.identity import config_hash
from clrun.results.records import read_run
from clrun.running.evaluation import NONE, Evaluation
from clrun.running.parts import Parts, make
from clrun.running.restoring import Restored, restore
from clrun.running.trusted import refuse_strangers, with_environment
from clrun.system.errors import ConfigError, did_you_mean

HOW = "call learner(trust={})"  # that a module is trusted


class Prediction(NamedTuple):
    """The prediction for N images or texts.

    Attributes:
        labels: [N] int64, class ids of the data set; -1 where a method that writes texts wrote the string of no class.
        probabilities: [N, C] float32, softmax of the logits of the competing classes; 0 for the other classes.
    """

    labels: NDArray[np.int64]
    probabilities: NDArray[np.float32]


@dataclass(frozen=True, repr=False)
class Learner:
    """A trained method with the data set's own preprocessing.

    Attributes:
        batch_size: images per forward pass; that of the run's evaluations, so that predictions are the same.
    """

    batch_size: int
    _restored: Restored
    _reader: Reader | TextReader

    def __repr__(self) -> str:
        return f"Learner({type(self.method).__name__}, tasks={list(self.tasks)}, input={self.input!r})"

    @property
    def method(self) -> Method:
        """The trained method, in eval mode."""
        return self._restored.method

    @property
    def stream(self) -> Stream:
        """The tasks of the run with their rows; rows of a method on frozen features are read as features."""
        return self._restored.stream

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the C classes."""
        return self._restored.stream.class_names

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks learned, in the order learned."""
        return tuple(task.name for task in self.stream.tasks[: self._restored.learned])

    @property
    def input(self) -> str:
        """How images or texts are fitted to the backbone, one line."""
        return self._restored.input

    def predict(self, images: Any, *, task: int | str | None = None) -> Prediction:
        """Return labels and probabilities of images or texts.

        Args:
            images: for a run on texts a list of texts (str), or one text. Else an array or tensor of uint8, [N, C, H,
                W], [N, H, W, C] or [N, H, W] (grey), or one image; a Pillow image or the path of an image file; or a
                list of any of these. Other sizes are resized to that of the data set. A data set of feature rows takes
                float rows [N, D].
            task: id or name of the task that the images belong to. The classes of that task compete then (all
                classes seen in a domain-incremental run), and the change of the images that makes the task, a
                permutation or rotation, is applied. None: all classes seen compete and images are taken as they are.

        Raises:
            ConfigError: images or texts that cannot be read or do not fit, an unknown task, or a method that needs
                `task`.
        """
        found = [_prediction(logits, allowed) for logits, allowed in self._evaluated(images, task)]
        if not found:
            classes = self.stream.num_classes
            return Prediction(np.zeros(0, dtype=np.int64), np.zeros((0, classes), dtype=np.float32))
        return Prediction(*(np.concatenate(parts) for parts in zip(*found, strict=True)))

    def logits(self, images: Any, *, task: int | str | None = None) -> NDArray[np.float32]:
        """Return the logits [N, C] of images, those of classes that do not compete included; see `predict`."""
        found = [logits.cpu().numpy() for logits, _ in self._evaluated(images, task)]
        return np.concatenate(found) if found else np.zeros((0, self.stream.num_classes), dtype=np.float32)

    def test_images(self, task: int | str) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Return the test images of a task as stored, before any permutation or rotation, and their labels [N].

        Images are uint8 [N, C, H, W], rows of features float [N, D]; see `test_texts` for texts.

        Raises:
            ConfigError: an unknown task, a file that cannot be read, or a run on texts.
        """
        if isinstance(self._reader, TextReader):
            raise ConfigError("test_images: this run has learned texts; use test_texts")
        split = replace(self._task(task).test, shift=None)
        parts = [(b.x.cpu().numpy(), b.y.cpu().numpy()) for b in split.batches(self.batch_size, view="raw")]
        images, labels = zip(*parts, strict=True)
        return np.concatenate(images), np.concatenate(labels)

    def test_texts(self, task: int | str) -> tuple[list[str], NDArray[np.int64]]:
        """Return the test texts of a task and their labels [N].

        Raises:
            ConfigError: an unknown task, or a run on images.
        """
        if not isinstance(self._reader, TextReader):
            raise ConfigError("test_texts: this run has learned images; use test_images")
        split = self._restored.stored[self._task(task).id].test
        rows = [batch.x for batch in split.batches(self.batch_size, view="raw")]
        return [text for part in rows for text in to_texts(part)], split.y.cpu().numpy()

    def _evaluated(self, images: Any, task: int | str | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (logits [n, C], which classes compete [C]) of each batch, computed as the run's evaluations do."""
        owner = self._owner(task)
        setting: Setting = "dil" if self.stream.setting == "dil" else "cil" if task is None else "til"
        hardware = self._restored.hardware
        with borrowed():
            hardware.setup()
            allowed = self.stream.candidates(self._restored.learned, setting)[owner.index].to(hardware.device)
            shift = owner.test.shift if task is not None else None
            for x in self._read(images, None if task is None else owner):
                labels = torch.zeros(len(x), dtype=torch.long)
                split = TensorSplit(x, labels, None, owner.index, owner.test.transform, shift).to(hardware.device)
                alone = Task(owner.index, owner.id, owner.name, owner.classes, split, split)
                evaluation = Evaluation(hardware, "test", self.batch_size, None)
                with torch.inference_mode():
                    for logits, _ in evaluation.logits(self.method.eval(), alone):
                        yield logits, allowed

    def _read(self, images: Any, task: Task | None) -> Iterator[Tensor]:
        """Return batches of images or texts as the run stores them; `task` is that of the texts, as far as known.

        Raises:
            ConfigError: the prefix of texts depends on their part of the data set, and it is not known.
        """
        if not isinstance(self._reader, TextReader):
            return self._reader.batches(images, self.batch_size)
        parts = self._reader.parts
        if parts and (task is None or task.id >= len(parts) or not parts[task.id].startswith(task.name)):
            raise ConfigError(
                f"texts: their prefix depends on their part of the data set ({', '.join(parts)}); name the task with "
                "task=... in a run whose tasks are these parts"
            )
        return self._reader.batches(images, self.batch_size, parts[task.id] if parts and task is not None else "")

    def _owner(self, task: int | str | None) -> Task:
        """Return the task that says how images are prepared and which classes compete.

        Raises:
            ConfigError: the method or the data set needs to be told, or there is no such task.
        """
        if task is not None:
            return self._task(task)
        tasks = self.stream.tasks
        names = ", ".join(repr(name) for name in self.tasks)
        if self.method.needs_task_id:
            raise ConfigError(f"{type(self.method).__name__} needs the task id: predict(images, task=...), of {names}")
        if any(type(t.test.shift).__name__ == "Standardised" for t in tasks):
            raise ConfigError(f"every data set of this run has its own normalisation: add task=..., of {names}")
        return tasks[0]

    def _task(self, task: int | str) -> Task:
        """Return a learned task by id or name.

        Raises:
            ConfigError: there is none.
        """
        learned = self.stream.tasks[: self._restored.learned]
        found = [t for t in learned if (t.name if isinstance(task, str) else t.id) == task]
        if len(found) == 1:
            return found[0]
        if found:
            raise ConfigError(f"task: {len(found)} tasks are called '{task}'; give the id, of {[t.id for t in found]}")
        known = ", ".join(f"{t.id} ({t.name})" for t in learned)
        close = did_you_mean(task, self.tasks) if isinstance(task, str) else ""
        raise ConfigError(f"task: no task {task!r} was learned{close} (learned: {known})")


def learner_of(
    folder: Path, config: Mapping[str, Any], *, device: str | None, trust: tuple[str, ...] | None
) -> Learner:
    """Return the trained method of a run.

    Args:
        folder: of the run.
        config: its configuration.
        device: to compute on; None is the run's.
        trust: modules outside of clrun that the configuration may name; None for any.

    Raises:
        ConfigError: see `Run.learner`.
    """
    if trust is not None:
        refuse_strangers(folder, config, trust, HOW)
    with borrowed():
        config = with_environment(folder, config, trust, HOW)
        check(config, {})
        hardware = {**config["hardware"], "processes": 1} | ({} if device is None else {"device": device})
        parts = Parts({**config, "hardware": hardware})
        parts.hardware.setup()
        restored = restore(folder, parts, digest=config_hash(config), data=read_run(folder).get("data"))
        reading = decoding_node(config["dataset"])
        decoding = None if reading is None else make(reading)
        if decoding is not None:
            decoding = replace(decoding, range=_range(restored.stream, decoding))
    size, transform = int(config["job"]["eval_batch_size"]), restored.transform
    if isinstance(transform, TextTransform):
        return Learner(size, restored, TextReader(transform))
    shape = tuple(restored.stream.tasks[0].test.images.shape[1:])
    return Learner(size, restored, Reader(shape, decoding))


def _range(stream: Stream, decoding: Decoding) -> Any:
    """Return the range of images with more than 8 bits that the data set of a run was read with."""
    images = stream.tasks[0].test.images
    while isinstance(images, JoinedImages):
        images = images.splits[0].images
    return images.options.range if isinstance(images, FileImages) else decoding.range


def _prediction(logits: Tensor, allowed: Tensor) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return labels [n] and probabilities [n, C] of one batch; -1 and 0 for a row without an answer."""
    competing = logits.masked_fill(~allowed, float("-inf"))
    highest, labels = competing.max(dim=1)
    silent = highest == float("-inf")
    probabilities = competing.softmax(dim=1).masked_fill(silent[:, None], 0.0)
    return labels.masked_fill(silent, NONE).cpu().numpy(), probabilities.cpu().numpy()
