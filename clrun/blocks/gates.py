"""Gates on the units of a network (hidden units, channels, attention heads), which choose the units that a task uses.

A unit is an output of one layer, its producer, and an input of exactly one other layer, its consumer, with only
unit-wise layers between the two. The gate of a unit multiplies the input of the consumer. If a normalisation between
the two mixes units (group or layer normalisation), the gate also multiplies the output of the producer, so that a unit
with gate 0 is a constant for all other units. Layers that write to a residual stream have no gates, because many layers
read the stream.

Symbols: `U` units of all layers together, `u` units of one layer.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from clrun.blocks.inject import COMPILED
from clrun.blocks.params import Carrier, Params, select
from clrun.system.errors import ConfigError, one_line

UNIT_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
MIXING_NORMS = (nn.GroupNorm, nn.LayerNorm)
UNITWISE: tuple[type[nn.Module], ...] = (
    nn.Identity,
    nn.Flatten,
    nn.Dropout,
    nn.Dropout2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
)
UNITWISE += (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.ELU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Hardswish)
FUNCTIONS: tuple[Any, ...] = (
    F.relu,
    F.gelu,
    F.silu,
    F.leaky_relu,
    F.max_pool2d,
    F.avg_pool2d,
    F.adaptive_avg_pool2d,
    F.dropout,
)
FUNCTIONS += (torch.relu, torch.tanh, torch.sigmoid, torch.flatten)
METHODS = ("relu", "tanh", "sigmoid", "flatten")


@dataclass(frozen=True)
class Gated:
    """The units of one layer. Output or input number i of a layer belongs to unit (i // repeats) % units.

    Attributes:
        units: the number u of units.
        producer: path of the layer whose outputs are the units.
        rows: `repeats` of the outputs of the producer.
        consumer: path of the layer whose inputs are the units; None for the head.
        columns: `repeats` of the inputs of the consumer.
        norms: paths of the normalisations between the two, which have one entry per unit.
        mixed: whether one of these mixes units.
    """

    units: int
    producer: str
    rows: int
    consumer: str | None
    columns: int
    norms: tuple[str, ...] = ()
    mixed: bool = False


def spread(values: Tensor, repeats: int, size: int) -> Tensor:
    """Return the values [u] of units for all outputs of a producer or inputs of a consumer, [size].

    Args:
        values: one value per unit.
        repeats: number of adjacent outputs or inputs that belong to the same unit, see `Gated`.
        size: number of outputs or inputs.
    """
    if repeats > 1:
        values = values.repeat_interleave(repeats)
    return values if len(values) == size else values.repeat(size // len(values))


class UnitGates(Carrier):
    """The gated units of a backbone, and how much earlier tasks use each of them (U numbers of 4 bytes).

    Args:
        backbone: a timm `VisionTransformer`, whose attention heads and hidden units of MLPs have gates; or any other
            network that torch.fx can trace, where the units between a producer and its only consumer have gates.

    Raises:
        ConfigError: no unit can have a gate.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.layers = gated_layers(backbone)
        self.used = torch.zeros(sum(layer.units for layer in self.layers))  # [U], from 0 (unused) to 1 (fully used)

    def use(self, gates: Tensor) -> None:
        """Record the gates [U] of a finished task: used <- max(used, gates)."""
        self.used = torch.maximum(self.used, gates.detach())

    def spent(self, gates: Tensor) -> Tensor:
        """Return the fraction [] of the unused capacity that `gates` [U] use: sum gates (1 - used) / sum (1 - used)."""
        unused = 1 - self.used
        return (gates * unused).sum() / unused.sum().clamp(min=torch.finfo(unused.dtype).tiny)

    def features(self, backbone: nn.Module, x: Tensor, gates: Tensor) -> Tensor:
        """Return the features [B, D] of prepared rows x with the units multiplied by `gates` [U].

        Raises:
            ConfigError: the backbone is compiled or recomputes activations, and would ignore the gates.
        """
        if getattr(backbone, "_compiled_call_impl", None) is not None:
            raise ConfigError(COMPILED)
        if getattr(backbone, "grad_checkpointing", False):
            raise ConfigError("backbone: gradient checkpointing runs without the gates; switch it off")
        with self._hooked(backbone, gates):
            features: Tensor = backbone(x)
        last = next((i for i, layer in enumerate(self.layers) if layer.consumer is None), None)
        if last is None:
            return features
        return features * spread(self._parts(gates)[last], self.layers[last].columns, features.shape[-1])

    def plasticity(self, backbone: nn.Module) -> Params:
        """Return by parameter name the factor of the gradient of each entry: 1 - the use of the entry.

        The use of a weight from unit j to unit i is the smaller use of the two units; the use of a bias and of an entry
        of a normalisation is that of its unit. Inputs and outputs without gates (image, residual stream) count as fully
        used.
        """
        parts = self._parts(self.used)
        rows: dict[str, Callable[[int], Tensor]] = {}
        columns: dict[str, Callable[[int], Tensor]] = {}
        for layer, used in zip(self.layers, parts, strict=True):
            rows[layer.producer] = _Spread(used, layer.rows)
            rows |= {norm: _Spread(used, 1) for norm in layer.norms}
            if layer.consumer is not None:
                columns[layer.consumer] = _Spread(used, layer.columns)
        masks = {}
        for name, parameter in select(backbone).items():
            path = name.rpartition(".")[0]
            used = torch.ones_like(parameter, requires_grad=False)
            trailing = (1,) * (parameter.dim() - 1)
            if path in rows:
                used = used * rows[path](len(parameter)).view(-1, *trailing)
            if path in columns and parameter.dim() > 1:
                used = torch.minimum(used, columns[path](parameter.shape[1]).view(1, -1, *trailing[1:]))
            masks[name] = 1 - used
        return masks

    def _parts(self, values: Tensor) -> list[Tensor]:
        """Return the values [u] of each layer, from the values [U] of all layers."""
        return list(torch.split(values, [layer.units for layer in self.layers]))

    @contextmanager
    def _hooked(self, backbone: nn.Module, gates: Tensor) -> Iterator[None]:
        """Multiply the units by `gates` [U] in all forward passes within the `with` block."""
        handles = []
        try:
            for layer, own in zip(self.layers, self._parts(gates), strict=True):
                if layer.consumer is not None:
                    consumer = backbone.get_submodule(layer.consumer)
                    handles.append(consumer.register_forward_pre_hook(_Gate(own, layer.columns, consumer).before))
                if layer.mixed:
                    producer = backbone.get_submodule(layer.producer)
                    handles.append(producer.register_forward_hook(_Gate(own, layer.rows, producer).after))
            yield
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True)
class _Spread:
    """The function `spread` with all arguments but the size."""

    values: Tensor
    repeats: int

    def __call__(self, size: int) -> Tensor:
        return spread(self.values, self.repeats, size)


@dataclass(frozen=True)
class _Gate:
    """The hooks that multiply the inputs or outputs of one layer by gates in one pass."""

    gates: Tensor
    repeats: int
    module: nn.Module

    def before(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self._gated(inputs[0]), *inputs[1:])

    def after(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return self._gated(output)

    def _gated(self, x: Tensor) -> Tensor:
        """Return x multiplied by the gates; the units are dimension 1 for a convolution, and the last one otherwise."""
        if isinstance(self.module, nn.Conv2d):
            return x * spread(self.gates, self.repeats, x.shape[1])[:, None, None].to(x.dtype)
        return x * spread(self.gates, self.repeats, x.shape[-1]).to(x.dtype)


# --- finding the units


def gated_layers(backbone: nn.Module) -> list[Gated]:
    """Return the units of `backbone` that can have gates, by layer; see `UnitGates`.

    Raises:
        ConfigError: there is none.
    """
    timm: Any = sys.modules.get("timm.models.vision_transformer")
    if timm is not None and isinstance(backbone, timm.VisionTransformer):
        layers = [layer for i, block in enumerate(backbone.blocks) for layer in _of_block(f"blocks.{i}", block)]
    else:
        layers = _of_graph(backbone)
    if not layers:
        raise ConfigError(f"backbone: no unit of {type(backbone).__name__} can have a gate; use cnn, mlp or a ViT")
    return layers


def _of_block(path: str, block: Any) -> Iterator[Gated]:
    """Yield the attention heads and the hidden units of a transformer block, unless other modules read or mix them."""
    attn, mlp = block.attn, block.mlp
    plain = isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity) and getattr(attn, "gate", None) is None
    if plain and all(hasattr(attn, name) for name in ("qkv", "proj", "num_heads")):
        width = attn.proj.in_features // attn.num_heads
        yield Gated(attn.num_heads, f"{path}.attn.qkv", width, f"{path}.attn.proj", width)
    plain = isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity)
    if plain and all(hasattr(mlp, name) for name in ("fc1", "fc2")) and mlp.fc1.out_features == mlp.fc2.in_features:
        yield Gated(mlp.fc1.out_features, f"{path}.mlp.fc1", 1, f"{path}.mlp.fc2", 1)


class _Tracer(fx.Tracer):
    """Traces a network down to the modules without children."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or not list(m.children())


def _of_graph(backbone: nn.Module) -> list[Gated]:
    """Return the units whose consumer is the only reader of their producer.

    Raises:
        ConfigError: torch.fx cannot trace the network.
    """
    try:
        graph = _Tracer().trace(backbone)
    except Exception as error:
        raise ConfigError(
            f"backbone: torch.fx cannot trace the layers of {type(backbone).__name__} ({one_line(error)}); "
            "use cnn, mlp or a ViT"
        ) from None
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    nodes = [n for n in graph.nodes if n.op == "call_module" and calls.count(str(n.target)) == 1]
    found = (_from(backbone, node, set(calls)) for node in nodes if _is_layer(backbone.get_submodule(str(node.target))))
    return [layer for layer in found if layer is not None]


def _is_layer(module: nn.Module) -> bool:
    """Return whether a module can be a producer or consumer: a linear layer, or a convolution with one group."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def _from(backbone: nn.Module, start: fx.Node, calls: set[str]) -> Gated | None:
    """Return the units whose producer is the layer at `start`, or None if they cannot have gates."""
    producer: Any = backbone.get_submodule(str(start.target))
    units = producer.out_channels if isinstance(producer, nn.Conv2d) else producer.out_features
    norms: list[str] = []
    node = start
    while len(node.users) == 1:
        node = next(iter(node.users))
        path = str(node.target)
        module: Any = backbone.get_submodule(path) if node.op == "call_module" else None
        if node.op == "output" or (module is not None and _is_layer(module)):
            width = _width(backbone, module)
            if width % units:
                return None
            mixed = any(isinstance(backbone.get_submodule(n), MIXING_NORMS) for n in norms)
            return Gated(
                units, str(start.target), 1, None if module is None else path, width // units, tuple(norms), mixed
            )
        if isinstance(module, UNIT_NORMS + MIXING_NORMS) and _entries(module) == units:
            norms.append(path)
        elif not (isinstance(module, UNITWISE) or _is_unitwise(node)):
            return None
    return None


def _width(backbone: nn.Module, consumer: Any) -> int:
    """Return the number of inputs of a consumer; None stands for the head."""
    if consumer is None:
        return int(backbone.num_features)  # type: ignore[arg-type]
    return int(consumer.in_channels if isinstance(consumer, nn.Conv2d) else consumer.in_features)


def _entries(norm: Any) -> int:
    """Return the number of entries of a normalisation's parameters; -1 if they have several dimensions."""
    if isinstance(norm, nn.LayerNorm):
        return norm.normalized_shape[0] if len(norm.normalized_shape) == 1 else -1
    return int(norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features)


def _is_unitwise(node: fx.Node) -> bool:
    """Return whether a node calls a function or tensor method that treats each unit separately."""
    return (node.op == "call_function" and node.target in FUNCTIONS) or (
        node.op == "call_method" and node.target in METHODS
    )


__all__ = ["Gated", "UnitGates", "gated_layers", "spread"]
