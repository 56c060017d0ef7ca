"""The trained method of a run, read back from its folder: from checkpoint.pt, else from model.safetensors.

checkpoint.pt holds the whole method. model.safetensors holds tensors alone: a method is built anew, grows its parts by
`begin_task` of every task, and is given the tensors. What else a method keeps in attributes is not in that file, so the
file also holds the logits of a few test rows, and a method that does not give them again is refused.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clrun.blocks.compress.base import FORMS, pack_state, unpack_state
from clrun.blocks.params import Params, clone, select, shapes_of
from clrun.data.features import FeatureBackbone
from clrun.data.identity import identify
from clrun.data.split import Split, Transform
from clrun.data.stream import Stream, Task
from clrun.learning.context import Context
from clrun.learning.method import Method
from clrun.learning.names import has_names
from clrun.running import checkpoint
from clrun.running.build import Prepared, new_method, prepare
from clrun.running.checkpoint_file import Damaged, generations
from clrun.running.data_checks import check_restored
from clrun.running.networks import load_networks
from clrun.running.parts import Parts, options_of
from clrun.system.checksums import BLANK, SEAL, broken_seal, seal
from clrun.system.errors import ConfigError, first_line, one_line
from clrun.system.files import replacing
from clrun.system.hardware import Hardware
from clrun.system.seeding import seed_all

CHECKPOINT, WEIGHTS = "checkpoint.pt", "model.safetensors"
PACKED = "clrun.compressed"  # key of the file's metadata that describes compressed layers
ROWS = 2  # test rows of each task whose logits are compared
AGAIN = "run it again in another folder with job.keep_checkpoint=true"
TOLERANCE = 1e-3  # of these logits, relative to the largest: another machine may have restored them


@dataclass(frozen=True)
class Restored:
    """A trained method and what it needs to predict.

    Attributes:
        method: in eval mode, on the device.
        stream: its tasks; rows that the method reads as features pass through the frozen backbone when they are read.
        learned: tasks that it has learned.
        input: one line that says how images are fitted to the backbone.
        hardware: what it computes on.
        transform: how stored rows become the backbone's input.
        stored: the tasks with their rows as the data set stores them, by task id.
        initial: the trainable parameters of the backbone before the first task, by name.
    """

    method: Method
    stream: Stream
    learned: int
    input: str
    hardware: Hardware
    transform: Transform
    stored: Mapping[int, Task]
    initial: Params = field(default_factory=dict)


class ThroughBackbone:
    """The transform of images whose features a method reads.

    Args:
        transform: prepares the images.
        backbone: the frozen backbone, on the device, in eval mode.
        hardware: precision and memory order of its passes.
    """

    augments = False

    def __init__(self, transform: Transform, backbone: nn.Module, hardware: Hardware) -> None:
        self.transform, self.backbone, self.hardware = transform, backbone, hardware

    def eval(self, x: Tensor) -> Tensor:
        """Return the features [B, D] of stored images."""
        with torch.no_grad(), self.hardware.autocast():
            features: Tensor = self.backbone(self.hardware.layout(self.transform.eval(x))).float()
        return features

    def train(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the features [B, D] of stored images: frozen features are those of the eval view."""
        return self.eval(x)


def restore(
    folder: Path, parts: Parts, *, digest: str, data: Mapping[str, Any] | None, with_initial: bool = False
) -> Restored:
    """Return the trained method of the run in `folder`; warn when rows of its data have changed since.

    Args:
        folder: of the run.
        parts: of its configuration; the hardware is set up and has one process.
        digest: hash of the run's configuration.
        data: identity of the data that the run has seen, from run.json; None for a run that has not recorded it.
        with_initial: also return the initial parameters.

    Raises:
        ConfigError: the folder holds no trained method, it cannot be restored here, or the classes of the data are no
            longer those of the run; no code of its files was run.
    """
    stored, weights = generations(folder / CHECKPOINT), folder / WEIGHTS
    if not stored and not weights.exists():
        raise ConfigError(f"{folder}: holds no trained method (neither {CHECKPOINT} nor {WEIGHTS}); {AGAIN}")
    prepared = prepare(parts, place=True, pretrained=True)
    fresh, stream = _untrained(parts, prepared)
    check_restored(data, identify(prepared.dataset, prepared.whole), folder)
    text, transform = prepared.input, prepared.stream.transform
    tasks = {task.id: task for task in prepared.whole.tasks}
    initial = clone(select(fresh.backbone)) if with_initial else {}
    if stored:
        try:
            method, life = checkpoint.load(stored[0], fresh, config_hash=digest, hardware=parts.hardware)
        except Damaged as error:
            advice = f"delete it to restore the method from {WEIGHTS}" if weights.exists() else AGAIN
            raise ConfigError(f"{stored[0]}: refused, nothing in it was run ({error.reason}); {advice}") from None
        return Restored(method.eval(), stream, life.learned, text, parts.hardware, transform, tasks, initial)
    method = _from_weights(weights, fresh, stream, parts)
    return Restored(method, stream, len(stream.tasks), text, parts.hardware, transform, tasks, initial)


def save_weights(path: Path, method: Method, stream: Stream, hardware: Hardware) -> None:
    """Write the tensors of a trained method, and the logits of a few test rows, as safetensors.

    Compressed layers are written in their stored forms (`clrun.blocks.compress.forms`).

    Args:
        path: the file.
        method: the method after its last task.
        stream: what it has learned from.
        hardware: what it computes on.
    """
    from safetensors.torch import save

    plain_order = copy.deepcopy(method).to(memory_format=torch.contiguous_format)  # the format knows no other
    probes = json.dumps([[round_logit(x) for x in row.tolist()] for row in _probes(method, stream, hardware)])
    state, compressed = pack_state(plain_order, plain_order.state_dict())
    tensors, metadata = _unshared(state)
    metadata |= {PACKED: compressed} if compressed else {}
    data = seal(save(tensors, metadata={**metadata, SEAL: BLANK + probes}))
    with replacing(path) as file:
        file.write(data)


def _unshared(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors without those that lie within the storage of another one, and the name of the other one.

    The format stores no shared memory. `load_model` of safetensors finds the same pairs again.
    """
    whole: dict[tuple[torch.device, int], str] = {}
    for name, tensor in sorted(state.items()):
        storage = tensor.untyped_storage()
        if tensor.numel() and tensor.nbytes == storage.nbytes():
            whole.setdefault((tensor.device, storage.data_ptr()), name)
    tensors, shared = {}, {}
    for name, tensor in state.items():
        owner = whole.get((tensor.device, tensor.untyped_storage().data_ptr()))
        if owner in (None, name):
            tensors[name] = tensor.contiguous() if owner else tensor.clone()
        else:
            shared[name] = str(owner)
    return tensors, shared


def round_logit(value: float) -> float:
    """Return the value with seven digits, as many as a float32 has."""
    return float(f"{value:.7g}")


def _untrained(parts: Parts, prepared: Prepared) -> tuple[Method, Stream]:
    """Return the method before its first task, and the stream it reads."""
    backbone, images = prepared.backbone, prepared.stream
    stream, seen = images, backbone
    if parts.reads_features:
        backbone.eval()
        seen = FeatureBackbone(int(backbone.num_features), getattr(backbone, "joint", None))  # type: ignore[arg-type]
        stream = _through(images, backbone, parts.hardware)
    further = parts.method_class.further_networks(options_of(parts.method_factory))
    networks = load_networks(parts, prepared.dataset, images.transform) if further else {}
    method = new_method(parts, seen, images.num_classes, networks)
    if images.captions is not None and (method.needs_text or has_names(backbone)):
        method.read_names(images.captions)
    return method, stream


def _through(images: Stream, backbone: nn.Module, hardware: Hardware) -> Stream:
    """Return the stream whose rows pass through the frozen backbone when they are read."""
    transform = ThroughBackbone(images.transform, backbone, hardware)

    def read(split: Split) -> Split:
        return replace(split, transform=transform)

    tasks = [replace(t, train=read(t.train), test=read(t.test), val=t.val and read(t.val)) for t in images.tasks]
    return replace(images, tasks=tuple(tasks), transform=transform)


def _from_weights(path: Path, method: Method, stream: Stream, parts: Parts) -> Method:
    """Return `method`, grown as in the run and given the tensors of the file at `path`.

    Raises:
        ConfigError: the file is damaged, the tensors do not fit, or they are not all that the predictions need.
    """
    from safetensors import safe_open
    from safetensors.torch import load_model

    try:
        damage = broken_seal(path, required=True)
        if damage is not None:
            raise ConfigError(f"{path}: refused ({damage}); copy it anew from where it was written, or {AGAIN}")
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            probes = metadata[SEAL].removeprefix("crc32:").partition(" ")[2]
    except ConfigError:
        raise
    except Exception as error:  # safetensors' own exception, or the operating system's
        raise ConfigError(f"{path}: cannot be read ({first_line(error)})") from error
    advice = "the run needs job.keep_checkpoint=true to be restored; run it again so in another folder"
    try:
        _grow(method, stream, parts)
        if PACKED in metadata:
            _load_packed(method, path, metadata)
        else:
            load_model(method, str(path), device=parts.hardware.device)
        parts.hardware.place(method)
        found = _probes(method.eval(), stream, parts.hardware)
    except Exception as error:  # what a method raises that has not learned what it was told it had
        what = f"{type(method).__name__} cannot be rebuilt from tensors alone ({one_line(error)[:150]})"
        raise ConfigError(f"{path}: {what}; {advice}") from error
    if not _alike(found, json.loads(probes)):
        what = f"{type(method).__name__} with these tensors predicts otherwise than the run's, for it keeps more"
        raise ConfigError(f"{path}: {what}; {advice}")
    return method


def _load_packed(method: Method, path: Path, metadata: Mapping[str, str]) -> None:
    """Give a method the tensors of a file with compressed layers, whose weights are bit for bit those of the run.

    Raises:
        RuntimeError: the tensors do not fit.
        KeyError: one of them is missing.
        ValueError: the description of the compressed layers is damaged.
    """
    from safetensors.torch import load_file

    state, forms = unpack_state(load_file(str(path)), metadata[PACKED], shapes_of(method.state_dict()))
    missing, unexpected = method.load_state_dict(state, strict=False)
    if unexpected or set(missing) - set(metadata):  # the metadata have the names of tensors that share memory
        raise RuntimeError(f"tensors {', '.join([*unexpected, *missing])} do not fit")
    setattr(method, FORMS, forms)


def _grow(method: Method, stream: Stream, parts: Parts) -> None:
    """Let `method` grow its parts for every task of the stream, without learning any."""
    hardware = parts.hardware
    hardware.place(method)
    for task in stream.tasks:
        seed_all(parts.seed, "task", task.id)
        method.begin_task(task, Context(stream, task, parts.budget, hardware, parts.seed))
        hardware.place(method)


def _probes(method: Method, stream: Stream, hardware: Hardware) -> list[Tensor]:
    """Return the logits of the first test rows of every task for the task's classes, one tensor [ROWS * k] each."""
    training = method.training
    method.eval()
    with torch.inference_mode():
        found = [_probe(method, task, hardware) for task in stream.tasks]
    method.train(training)
    return found


def _probe(method: Method, task: Task, hardware: Hardware) -> Tensor:
    batch = next(task.test.batches(ROWS), None)
    if batch is None:
        return torch.empty(0)
    position = (task.index,) if method.needs_task_id else ()
    with hardware.autocast():
        logits: Tensor = method(hardware.layout(batch.x), *position)
    own = torch.as_tensor(task.classes, device=logits.device)
    return logits[:ROWS, own].float().flatten().cpu()


def _alike(found: Sequence[Tensor], stored: Sequence[Sequence[float]]) -> bool:
    """Whether logits agree as far as the arithmetic of two machines does."""
    if [len(x) for x in found] != [len(x) for x in stored]:
        return False
    a, b = torch.cat(list(found)).double(), torch.tensor([x for row in stored for x in row]).double()
    largest = b[b.isfinite()].abs().max() if b.isfinite().any() else torch.tensor(0.0)
    return torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * float(largest), equal_nan=True)
