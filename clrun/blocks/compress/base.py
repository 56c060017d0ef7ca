"""The base of compressors: which layers of a backbone are compressed, by how much, and on what evidence.

A compressor replaces the weights of linear layers and convolutions by weights of a smaller stored form (`forms`). It is
called when a task has ended, with rows of that task alone: error on earlier tasks is part of what is measured.
"""

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from clrun.blocks.compress.forms import FORMS as FORMS_BY_NAME
from clrun.blocks.compress.forms import Form, Forms
from clrun.blocks.curvature import diagonal_fisher
from clrun.blocks.curvature.target import Labels
from clrun.blocks.low_rank import Layer, layer_curvature, layers_of
from clrun.blocks.moments import Gram, second_moments
from clrun.blocks.params import eval_mode
from clrun.data.split import Batch, Split
from clrun.learning.context import Context
from clrun.learning.losses import masked_cross_entropy
from clrun.learning.method import Method
from clrun.system.errors import ConfigError, Count, PositiveInt, did_you_mean, warn

When = Literal["each_task", "end"]
Scope = Literal["layer", "global"]
FORMS = "compressed"  # attribute of a method that holds the forms of its compressed layers
SHOWN = 6  # layers that a message names


@dataclass(frozen=True)
class Compressed:
    """What a compressor makes of one weight.

    Attributes:
        form: the stored form.
        weight: the new weight, in the shape of the old one.
        facts: numbers for the record, such as the predicted increase of the loss.
    """

    form: Form
    weight: Tensor
    facts: Mapping[str, float] = field(default_factory=dict)


class Evidence:
    """What compressors may ask about the layers of a trained network; each answer is computed once.

    Args:
        method: the method; it is bitwise the same afterwards.
        ctx: context of the task that has ended; its generators "compress" and "fisher" draw rows and labels.
        layers: the layers to compress, by name.
        samples: number of rows of the task that are read, at most.
    """

    def __init__(self, method: Method, ctx: Context, layers: Mapping[str, Layer], samples: int) -> None:
        self.method, self.ctx, self.layers = method, ctx, dict(layers)
        split, generator = ctx.task.train, ctx.generator("compress")
        if samples < len(split):
            rows = torch.randperm(len(split), generator=generator)[:samples]
            split = split.select(rows.to(split.y.device))
        self.split: Split = split

    @property
    def forms(self) -> Forms:
        """The forms that the layers have from earlier tasks."""
        found = getattr(self.method, FORMS, None)
        return found if isinstance(found, Forms) else Forms()

    def weight(self, name: str) -> Tensor:
        """Return the weight of a layer, detached."""
        return self.layers[name].weight.detach()

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        """Return the mean cross-entropy [] of a prepared batch, over the classes that compete in training."""
        return masked_cross_entropy(self.logits(batch.x), batch.y, self.method.competing(batch.t, ctx))

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits [B, C] of prepared rows of the task."""
        found: Tensor = self.method(x, self.ctx.task.index) if self.method.needs_task_id else self.method(x)
        return found

    @cached_property
    def grams(self) -> dict[str, Gram]:
        """The second moments of the inputs of each layer, one matrix per group of a convolution."""
        layout = self.ctx.hardware.layout
        batches = (layout(batch.x) for batch in self.split.batches(self.ctx.budget.batch_size))
        with eval_mode(self.method):
            return second_moments(
                self.method.backbone, self.layers, batches, bias=False, forward=self.logits, groups="separate"
            )

    def hessians(self, name: str) -> Tensor | None:
        """Return H = 2/n X X' of a layer [groups, d, d] for n rows of data; None for a layer that no row passes."""
        gram = self.grams.get(name)
        return None if gram is None else 2 / len(self.split) * gram.matrix

    def warn_of_unread(self, names: Iterable[str], what: str) -> None:
        """Warn of layers that no row passes, so that there are no inputs to fit their weights to; `what` they do."""
        if unread := [name for name in names if self.hessians(name) is None]:
            shown = ", ".join(unread[:SHOWN]) + (", ..." if len(unread) > SHOWN else "")
            warn(f"compress: no row of task {self.ctx.task.id} passes the layers {shown}, which {what}")

    @cached_property
    def curvature(self) -> dict[str, float]:
        """The mean over the entries of each weight of its diagonal Fisher information, as HALRP estimates it."""
        weights = {name: layer.weight for name, layer in self.layers.items()}
        size = self.ctx.budget.batch_size
        with eval_mode(self.method):
            return layer_curvature(self.method, self.split, self.ctx, loss=self.loss, weights=weights, batch_size=size)

    def fisher(self, labels: Labels) -> dict[str, Tensor]:
        """Return the diagonal Fisher information of the entries of each weight, in its shape (mean over rows)."""
        found = diagonal_fisher(self.method, self.split, self.ctx, of=self.method.backbone, labels=labels, samples=None)
        every = found.params(found.values)
        return {name: every[f"{name}.weight"] for name in self.layers}

    @cached_property
    def outputs(self) -> dict[str, float]:
        """The mean square of the derivative of the loss by an output of each layer, the mean over positions.

        It turns a squared error of outputs into an increase of the loss, so that layers can be compared: the mean
        Fisher information of a weight is about the product of this number and of the mean square of an input.
        """
        found = {}
        for name, gram in self.grams.items():
            square = float(gram.mean().diagonal(dim1=-2, dim2=-1).mean())
            positions = max(1, gram.rows // max(1, len(self.split)))
            found[name] = self.curvature[name] / max(positions * square, torch.finfo(torch.float64).tiny)
        return found


@dataclass(frozen=True, kw_only=True)
class Compressor(ABC):
    """Options that all compressors have.

    Attributes:
        when: "each_task": after every task, and the forms hold while later tasks are learned. "end": once, after the
            last task.
        scope: "layer": every layer gets the same target. "global": the target holds for all layers together, and what
            raises the loss least is taken away first.
        layers: shell-style patterns for the names of layers in the backbone; one must match.
        exclude: patterns for the names of layers that stay as they are.
        samples: number of rows of the task that has just been learned on which the compressor is calibrated, at most.
        epochs: epochs of training on this task after the compression, with the budget of the run and the forms held.

    Raises:
        ConfigError: options exclude each other.
    """

    when: When
    scope: Scope
    layers: list[str]
    exclude: list[str]
    samples: PositiveInt
    epochs: Count

    frees: ClassVar[bool] = False  # training leaves the weights free, and they are compressed anew after each task

    @property
    def name(self) -> str:
        """The name of the choice, for records and messages."""
        return "".join(f"_{c.lower()}" if c.isupper() else c for c in type(self).__name__).lstrip("_")

    @property
    @abstractmethod
    def words(self) -> str:
        """What is to be reached, such as "ratio 0.5"."""

    @property
    @abstractmethod
    def neutral(self) -> bool:
        """Whether the target leaves every weight as it is, so that a run is bit for bit that without compression."""

    @property
    def differentiates(self) -> bool:
        """Whether it needs derivatives of the logits, as estimates of the loss of different layers do."""
        return self.scope == "global"

    @abstractmethod
    def compress(self, evidence: Evidence) -> dict[str, Compressed]:
        """Return the compressed form of each layer that changes, by name; the network is not changed."""

    def check_layers(self, layers: Mapping[str, Layer]) -> None:
        """Refuse layers that cannot have this form.

        Raises:
            ConfigError: see above.
        """
        for name, layer in layers.items():
            self.check_layer(name, layer)

    def check_layer(self, name: str, layer: Layer) -> None:  # noqa: B027  # most layers can have most forms
        """Refuse a layer that cannot have this form.

        Raises:
            ConfigError: see above.
        """

    def select(self, backbone: nn.Module) -> dict[str, Layer]:
        """Return the layers of a backbone that are compressed, by name.

        Layers that share their weight with another module, such as a table of embeddings, are never among them.

        Raises:
            ConfigError: a pattern matches no layer, or no layer is left.
        """
        tied = Counter(id(p) for module in backbone.modules() for p in module.parameters(recurse=False))
        every = {
            name: layer
            for name, layer in layers_of(backbone).items()
            if layer.weight.requires_grad and tied[id(layer.weight)] == 1
        }
        for option in ("layers", "exclude"):
            for pattern in getattr(self, option):
                if not any(fnmatchcase(name, pattern) for name in every):
                    shown = ", ".join(list(every)[:SHOWN]) + (", ..." if len(every) > SHOWN else "")
                    raise ConfigError(
                        f"compress.{option}: no trained layer of the backbone matches '{pattern}'"
                        f"{did_you_mean(pattern, every)} (layers: {shown or 'none'})"
                    )
        found = {
            name: layer
            for name, layer in every.items()
            if any(fnmatchcase(name, p) for p in self.layers) and not any(fnmatchcase(name, p) for p in self.exclude)
        }
        if not found:
            raise ConfigError(
                "compress.layers: no layer is left to compress; change compress.layers or compress.exclude"
            )
        return found

    def check(self, method: Method) -> dict[str, Layer]:
        """Return the layers that will be compressed, before anything runs.

        Raises:
            ConfigError: it makes no sense for this method, or a layer cannot have the form.
        """
        refuse(type(method), features=method.uses_frozen_features)
        if not any(layer.weight.requires_grad for layer in layers_of(method.backbone).values()):
            raise ConfigError(
                f"compress: {type(method).__name__} trains no linear layer and no convolution of the backbone; choose "
                "a method that does, such as method=er, or compress=none"
            )
        found = self.select(method.backbone)
        self.check_layers(found)
        return found


def refuse(method: type[Method], *, features: bool) -> None:
    """Refuse a method whose predictions a compressed backbone would not change, or not as the method means it.

    Args:
        method: its class.
        features: whether it reads features of a frozen backbone.

    Raises:
        ConfigError: see above.
    """
    if features:
        raise ConfigError(
            f"compress: {method.__name__} reads features of the frozen backbone, which are computed once; choose a "
            "method that trains the backbone, or compress=none"
        )
    if method.own_weights:
        raise ConfigError(
            f"compress: {method.__name__} {method.own_weights}; choose a method that trains one backbone for all "
            "tasks, such as method=er, or compress=none"
        )


def hold(method: Method) -> None:
    """Put the compressed layers of a method back into their forms; without any, nothing happens."""
    forms = getattr(method, FORMS, None)
    if isinstance(forms, Forms):
        forms.hold_(method.backbone)


def forms_of(method: Method) -> Iterator[tuple[str, Form]]:
    """Yield the compressed layers of a method by name, with their forms."""
    forms = getattr(method, FORMS, None)
    if isinstance(forms, Forms):
        yield from forms.by_layer()


@torch.no_grad()
def install(method: Method, found: Mapping[str, Compressed]) -> None:
    """Give layers their compressed weights, and the method the forms that hold them."""
    if not isinstance(getattr(method, FORMS, None), Forms):
        setattr(method, FORMS, Forms())
    forms = getattr(method, FORMS)
    for name, compressed in found.items():
        weight = method.backbone.get_parameter(f"{name}.weight")
        weight.copy_(compressed.weight)
        forms.put(name, compressed.form.to(weight.device))


def pack_state(method: Method, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a method with compressed layers in their stored forms, and what says so as JSON.

    Args:
        method: the method.
        state: its `state_dict`.
    """
    packed = {key: tensor for key, tensor in state.items() if not key.startswith(f"{FORMS}.")}
    facts = {}
    for layer, form in forms_of(method):
        weight = packed.pop(f"backbone.{layer}.weight")
        parts = form.pack(weight)
        facts[layer] = form.facts()
        packed |= {f"{FORMS}.{layer}.{part}": tensor.contiguous() for part, tensor in parts.items()}
        assert torch.equal(type(form).unpack(parts, form.facts())[1].to(weight.device), weight), layer
    return packed, json.dumps(facts) if facts else ""


def unpack_state(
    packed: Mapping[str, Tensor], facts: str, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Tensor], Forms]:
    """Return the tensors that `pack_state` was given, those of the forms left out, and the forms.

    Args:
        packed: the tensors of a file, by name.
        facts: what the file says about them; it may come from anywhere.
        shapes: of the weights that the method has, by name in the method.

    Raises:
        KeyError: a tensor or a fact is missing.
        ValueError: `facts` is no JSON, or the tensors do not fit it or the method.
    """
    state = {key: tensor for key, tensor in packed.items() if not key.startswith(f"{FORMS}.")}
    forms = Forms()
    for layer, own in json.loads(facts).items():
        start = f"{FORMS}.{layer}."
        if list(shapes[f"backbone.{layer}.weight"]) != own["shape"]:
            raise ValueError(f"layer {layer} has another shape")
        parts = {
            key.removeprefix(start): tensor
            for key, tensor in packed.items()
            if key.startswith(start) and "." not in key.removeprefix(start)
        }
        form, state[f"backbone.{layer}.weight"] = FORMS_BY_NAME[own["form"]].unpack(parts, own)
        forms.put(layer, form)
    return state, forms


def network_bytes(method: Method) -> dict[str, Any]:
    """Return the bytes of the backbone, "dense" as it is computed with and "stored" with its forms."""
    tensors = {id(t): t for t in (*method.backbone.parameters(), *method.backbone.buffers())}
    dense = sum(t.nbytes for t in tensors.values())
    saved = sum(form.dense_bytes - form.stored_bytes for _, form in forms_of(method))
    return {"dense_bytes": dense, "stored_bytes": dense - saved}


__all__ = [
    "FORMS",
    "Compressed",
    "Compressor",
    "Evidence",
    "Layer",
    "Scope",
    "forms_of",
    "hold",
    "install",
    "network_bytes",
    "pack_state",
    "refuse",
    "unpack_state",
]
