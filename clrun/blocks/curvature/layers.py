"""Kronecker factors of linear and convolutional layers from their inputs and the gradients at their outputs.

A layer that is applied to R positions of a row (tokens, patches) shares its weight among them. There are two
factorisations for such a layer (Eschenhagen et al., NeurIPS 2023, arXiv 2311.00636): "expand" treats positions as
independent, "reduce" aggregates the positions of a row before the outer products.

Texts of different length are padded. A backbone that reads them has a method `positions(x)`, which says for prepared
rows x [B, L] which positions are real, [B, L] bool; the others enter no factor, so that no factor depends on the
longest text of a batch. They need not be left out of the gradients, which are 0 there.

Shapes: `B` rows of a batch, `R` positions, `I` inputs (including the constant 1 if the bias is trained), `O` outputs,
`L` positions of a padded text, `V` entries of a table.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from clrun.learning.heads import GrowingHead

Sharing = Literal["expand", "reduce"]
Groups = Literal["skip", "average"]
Layer = nn.Linear | nn.Conv2d | GrowingHead
SHOWN = 6  # layers that a message names


def layers_of(
    module: nn.Module, *, modules: Sequence[str] = ("*",), largest: int | None = None, groups: Groups = "skip"
) -> dict[str, Layer]:
    """Return the linear layers (including growing heads) and convolutions with a trainable weight, by name.

    Args:
        module: the module whose submodules are searched, at any depth.
        modules: shell-style patterns; a layer's name must match at least one.
        largest: largest number of inputs and of outputs of a layer; None for no limit.
        groups: "skip" leaves out convolutions with several groups, "average" treats the groups as positions.
    """
    found: dict[str, Layer] = {}
    for name, layer in module.named_modules():
        # The type is compared exactly because a subclass may compute something else.
        if type(layer) in (nn.Linear, nn.Conv2d, GrowingHead) and any(fnmatchcase(name, p) for p in modules):
            assert isinstance(layer, Layer)
            grouped = isinstance(layer, nn.Conv2d) and layer.groups > 1 and groups == "skip"
            if layer.weight.requires_grad and not grouped and (largest is None or max(sides(layer)) <= largest):
                found[name] = layer
    return found


def named_too_large(
    module: nn.Module, largest: int, option: str, *, modules: Sequence[str] = ("*",), groups: Groups = "skip"
) -> str:
    """Return a line that names the layers which get no Kronecker factors because of `largest` alone; "" without any.

    Args:
        module: the module whose submodules are searched.
        largest: value of the option.
        option: its name, for the line.
        modules: see `layers_of`.
        groups: see `layers_of`.
    """
    every = {name: sides(layer) for name, layer in layers_of(module, modules=modules, groups=groups).items()}
    found = {name: size for name, size in every.items() if max(size) > largest}
    if not found:
        return ""
    shown = ", ".join(f"{name} ({' x '.join(map(str, size))})" for name, size in list(found.items())[:SHOWN])
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return (
        f"{option}={largest}: {len(found)} of {len(every)} layers are larger and get a diagonal instead of Kronecker "
        f"factors: {shown}{more}; {option}={max(map(max, found.values()))} gives factors to all"
    )


def tables_of(
    module: nn.Module, *, modules: Sequence[str] = ("*",), largest: int | None = None
) -> dict[str, nn.Embedding]:
    """Return the tables of embeddings with a trainable weight, by name.

    Tables that change in a forward pass (`max_norm`) or divide their gradient by counts are left out.

    Args:
        module: the module whose submodules are searched, at any depth.
        modules: see `layers_of`.
        largest: largest width of a table; its number of entries has no limit, because their factor is a vector.
    """
    found: dict[str, nn.Embedding] = {}
    for name, table in module.named_modules():
        if type(table) is nn.Embedding and any(fnmatchcase(name, p) for p in modules):
            plain = table.max_norm is None and not table.scale_grad_by_freq
            if table.weight.requires_grad and plain and (largest is None or table.embedding_dim <= largest):
                found[name] = table
    return found


def has_bias(layer: Layer) -> bool:
    """Return whether the layer has a trainable bias."""
    return layer.bias is not None and layer.bias.requires_grad


def sides(layer: Layer) -> tuple[int, int]:
    """Return the numbers O of outputs and I of inputs."""
    return len(layer.weight), prod(layer.weight.shape[1:]) + has_bias(layer)


def inputs(layer: Layer, x: Tensor, rows: int, *, constant: bool | None = None) -> Tensor:
    """Return the inputs [B, R, I] of a layer called with x: the vectors that [W, b] multiplies at each position.

    Args:
        layer: the layer; the groups of a convolution are further positions.
        x: the argument of the call.
        rows: B.
        constant: whether the last input is a constant 1; None for a layer whose bias is trained.
    """
    x = x.to(layer.weight.dtype)
    if isinstance(layer, nn.Conv2d):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        patches = F.unfold(x, layer.kernel_size, layer.dilation, stride=layer.stride)
        x = patches.transpose(1, 2).reshape(rows, -1, patches.shape[1] // layer.groups)
    x = x.reshape(rows, -1, x.shape[-1])
    return F.pad(x, (0, 1), value=1.0) if (has_bias(layer) if constant is None else constant) else x


def outputs(layer: Layer | nn.Embedding, grad: Tensor, rows: int) -> Tensor:
    """Return the gradients [B, R, O] at each position, from the gradient at the output of the layer.

    Args:
        layer: the layer.
        grad: in the shape of the output.
        rows: B.
    """
    grad = grad.to(layer.weight.dtype)
    grad = grad.flatten(2).transpose(1, 2) if isinstance(layer, nn.Conv2d) else grad
    return grad.reshape(rows, -1, grad.shape[-1])


def inner_sum(x: Tensor, sharing: Sharing, real: Tensor | None = None) -> Tensor:
    """Return the sum [I, I] over rows n of A_n, from inputs a [B, R, I].

    "expand": A_n is the mean over positions of a a'. "reduce": A_n is the outer product of the mean of a.

    Args:
        x: a.
        sharing: see above.
        real: [B, R] bool, the positions that count; None for all of them.
    """
    if real is not None and not bool(real.all()):
        shares = _shares(real).to(x.dtype)
        if sharing == "reduce":
            x = (x * shares[..., None]).sum(dim=1)
            return x.T @ x
        flat = x[real] * shares[real].sqrt()[:, None]
        return flat.T @ flat
    if sharing == "reduce":
        x = x.mean(dim=1)
        return x.T @ x
    flat = x.flatten(0, 1)
    return flat.T @ flat / x.shape[1]


def count_sum(tokens: Tensor, table: nn.Embedding, real: Tensor | None = None) -> Tensor:
    """Return the sum [V] over rows n of the frequencies of the entries of a table among the positions of row n.

    With one-hot vectors a as inputs this is the diagonal of `inner_sum` for "expand", which is 0 elsewhere.

    Args:
        tokens: [B, R] long, entries.
        table: the table. Its `padding_idx` has a frequency of 0, because that entry is not trained.
        real: [B, R] bool, the positions that count; None for all of them.
    """
    real = torch.ones_like(tokens, dtype=torch.bool) if real is None else real
    found = torch.zeros(table.num_embeddings, dtype=table.weight.dtype, device=tokens.device)
    found.index_add_(0, tokens[real], _shares(real).to(found.dtype)[real])
    if table.padding_idx is not None:
        found[table.padding_idx] = 0
    return found


def _shares(real: Tensor) -> Tensor:
    """Return the share [B, R] of each position in the mean over the real positions [B, R] of its row, fp64."""
    return real.double() / real.sum(dim=1, keepdim=True).clamp(min=1)


def outer_sum(grad: Tensor, sharing: Sharing) -> Tensor:
    """Return the sum [O, O] over rows n of G_n, from gradients d [B, R, O].

    "expand": G_n is the sum over positions of d d'. "reduce": G_n is the outer product of the sum of d.
    """
    flat = grad.sum(dim=1) if sharing == "reduce" else grad.flatten(0, 1)
    return flat.T @ flat


def positions_in(module: nn.Module) -> nn.Module | None:
    """Return the first module at any depth that says which positions of its rows are real; None without one."""
    return next((part for part in module.modules() if callable(getattr(part, "positions", None))), None)


class Call(NamedTuple):
    """A call of a layer.

    Attributes:
        x: its input.
        edge: the place of its output in the autograd graph.
        real: [B, L] bool, the real positions of the rows that the network reads meanwhile; None if all are.
    """

    x: Tensor
    edge: GradientEdge
    real: Tensor | None


@dataclass
class Tape:
    """A recording of the layer calls in the last forward pass of a network.

    Attributes:
        layers: the recorded layers by name.
        network: the network that has them; it is asked for the real positions of its rows.
        tables: the recorded tables of embeddings by name.
        training: only calls of layers in this mode (training or evaluation) are recorded.
        calls: by name, the calls. Layers and tables that were not called, or whose output depends on no trainable
            parameter, are missing.
        on: whether calls are recorded at present.
    """

    layers: Mapping[str, Layer]
    network: nn.Module | None = None
    tables: Mapping[str, nn.Embedding] = field(default_factory=dict)
    training: bool = False
    calls: dict[str, list[Call]] = field(default_factory=dict)
    on: bool = True
    _real: Tensor | None = None

    @contextmanager
    def recording(self) -> Iterator["Tape"]:
        """Record the calls of the layers within the `with` block; the record is dropped at its end."""
        recorded: dict[str, nn.Module] = {**self.layers, **self.tables}
        handles = [layer.register_forward_hook(self._hook(name)) for name, layer in recorded.items()]
        reader: Any = None if self.network is None else positions_in(self.network)

        def enter(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._real = reader.positions(args[0]) if self.on else None

        def leave(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self._real = None

        if reader is not None:
            handles += [reader.register_forward_pre_hook(enter), reader.register_forward_hook(leave)]
        try:
            yield self
        finally:
            self.calls.clear()
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        """Return the forward hook that records the calls of the layer with this name."""

        def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if self.on and module.training == self.training and output.requires_grad:
                # Not the output itself: an in-place activation would make it refer to a later place in the graph.
                call = Call(args[0].detach(), get_gradient_edge(output), self._real)
                self.calls.setdefault(name, []).append(call)

        return record

    def inner(self, sharing: Sharing, rows: int) -> dict[str, Tensor]:
        """Return the sum of A_n over rows n by layer name; several calls of one layer count as further positions.

        Of a table of embeddings this is the diagonal [V], see `count_sum`. A table whose entries do not come row by row
        (such as positions that are the same for all rows) is left out.

        Args:
            sharing: see `inner_sum`.
            rows: B.
        """
        found = {}
        for name, calls in self._by_rows(rows).items():
            table = self.tables.get(name)
            parts = [call.x.reshape(rows, -1) if table else inputs(self.layers[name], call.x, rows) for call in calls]
            masks = [real_of(part, call.real) for part, call in zip(parts, calls, strict=True)]
            x = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
            real = _joined(masks, parts)
            found[name] = count_sum(x, table, real) if table else inner_sum(x, sharing, real)
        return found

    def outer(self, values: Tensor, directions: Tensor, sharing: Sharing, *, keep: bool) -> dict[str, Tensor]:
        """Return the sum of G_n over rows n by layer name, for the gradient of sum(values * directions).

        Args:
            values: [B, C], the output of the network.
            directions: [B, C].
            sharing: see `outer_sum`; the gradients of a table of embeddings are always those of "expand".
            keep: whether to keep the autograd graph for another call.
        """
        by_rows = self._by_rows(len(values))
        edges = [call.edge for calls in by_rows.values() for call in calls]
        grads = iter(torch.autograd.grad(values, edges, directions, retain_graph=keep, allow_unused=True))
        found = {}
        for name, calls in by_rows.items():
            parts = [g for g in (next(grads) for _ in calls) if g is not None]
            parts = [outputs(self.tables.get(name) or self.layers[name], g, len(values)) for g in parts]
            if parts:
                how: Sharing = "expand" if name in self.tables else sharing
                found[name] = outer_sum(torch.cat(parts, dim=1) if len(parts) > 1 else parts[0], how)
        return found

    def _by_rows(self, rows: int) -> dict[str, list[Call]]:
        """Return the calls without those of tables whose entries do not come row by row."""

        def fits(name: str, calls: list[Call]) -> bool:
            return name not in self.tables or all(call.x.dim() > 1 and len(call.x) == rows for call in calls)

        return {name: calls for name, calls in self.calls.items() if fits(name, calls)}


def real_of(part: Tensor, real: Tensor | None) -> Tensor | None:
    """Return which of the R positions of a layer are real, [B, R] bool; None if all are.

    A backbone may cut columns that are padding in every row, so that a layer has fewer positions than the rows; a layer
    on pooled features has one.

    Args:
        part: inputs [B, R, ...] of the layer.
        real: [B, L] bool; None if all positions are real.
    """
    rows, count = part.shape[:2]
    if real is None or count == 1 or count > real.shape[1] or len(real) != rows or bool(real[:, count:].any()):
        return None
    return real[:, :count]


def _joined(masks: Sequence[Tensor | None], parts: Sequence[Tensor]) -> Tensor | None:
    """Return the masks of several calls, one after the other, [B, R] bool; None if all positions are real."""
    if all(mask is None for mask in masks):
        return None
    full = [part.new_ones(part.shape[:2], dtype=torch.bool) for part in parts]
    return torch.cat([own if mask is None else mask for mask, own in zip(masks, full, strict=True)], dim=1)
