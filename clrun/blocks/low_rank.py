"""Weights of a task as a rescaled frozen base plus a low-rank matrix: layers, closed forms, choice of ranks, pruning.

Source: HALRP (Li et al., TKDE 2024, arXiv 2311.15161). Symbols: W0 [m, n, ...] is the weight of a linear layer or
convolution of the frozen base network, with m outputs and n inputs per group; the dots stand for the window of a
convolution, which has `cells` places (1 for a linear layer). A task has factors R [m] and S [n] and a low-rank matrix
U V with U [m, r] and V [r, n]. Its weight is W[o, i] = R_o W0[o, i] S_i + (U V)[o, i], where the last term has the same
value at all places of the window. Unfolded, V is [r, n * cells] and U V has a value for each place.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from clrun.blocks.params import eval_mode
from clrun.data.split import Batch, Split
from clrun.learning.context import Context

Layer = nn.Linear | nn.Conv2d
TINY = 1e-20  # lower bound of squared norms that are divided by


# --- which tensors a task has for itself and which it shares with the base


def layers_of(network: nn.Module) -> dict[str, Layer]:
    """Return the linear layers and convolutions of `network` by name: the layers whose weights are decomposed."""
    return {
        name: module
        for name, module in network.named_modules()
        # torch's own attention reads the weight of its output layer, but never calls the layer.
        if isinstance(module, nn.Linear | nn.Conv2d) and not isinstance(module, NonDynamicallyQuantizableLinear)
    }


def copy_for_task(base: nn.Module) -> nn.Module:
    """Return a copy of `base` for a task, in which some tensors are trainable copies and all others are shared.

    Copied are the weights of `layers_of`, all parameters with at most one dimension (biases, scales and shifts of
    norms, layer scales) and the running statistics of norms. All other tensors (tokens, position embeddings, index
    tables) are the same objects as in the base, and frozen.
    """
    weights = {id(layer.weight) for layer in layers_of(base).values()}
    own = {id(p) for p in base.parameters() if p.dim() <= 1} | weights
    own |= {id(b) for module in base.modules() if isinstance(module, _NormBase) for b in module.buffers()}
    shared = {id(t): t for t in (*base.parameters(), *base.buffers()) if id(t) not in own}
    network = copy.deepcopy(base, dict(shared))
    for parameter in network.parameters():
        parameter.requires_grad_(id(parameter) not in shared)
    return network


def stored_bytes(modules: Iterable[nn.Module], *, without: nn.Module | None = None) -> int:
    """Return the bytes of all different parameters and buffers of `modules`, except those that `without` has too."""
    excluded = set() if without is None else {id(t) for t in (*without.parameters(), *without.buffers())}
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return sum(t.nbytes for key, t in tensors.items() if key not in excluded)


# --- layers


class Factor(nn.Module):
    """A matrix [a, b] that can be compressed to its non-zero entries and one bit per entry that marks them.

    Args:
        value: the matrix [a, b]; it is trainable until `compress` is called.
    """

    bits: Tensor | None

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value)
        self.shape = tuple(value.shape)
        self.register_buffer("bits", None)

    def forward(self) -> Tensor:
        """Return the matrix [a, b]."""
        if self.bits is None:
            return self.value
        places = torch.arange(8, device=self.bits.device)
        nonzero = (self.bits[:, None] >> places & 1).bool().flatten()[: math.prod(self.shape)]
        dense = torch.zeros(nonzero.shape, dtype=self.value.dtype, device=self.value.device)
        dense[nonzero] = self.value
        return dense.view(self.shape)

    def compress(self) -> None:
        """Store the matrix without its zeros if that takes fewer bytes; it is no longer trainable afterwards."""
        dense = self.value.detach()
        nonzero = dense.flatten() != 0
        if 4 * int(nonzero.sum()) + bits_bytes(dense.numel()) >= dense.nbytes:
            self.value.requires_grad_(False)
            return
        self.bits = torch.from_numpy(np.packbits(nonzero.cpu().numpy(), bitorder="little")).to(dense.device)
        self.value = nn.Parameter(dense.flatten()[nonzero], requires_grad=False)


def bits_bytes(entries: int) -> int:
    """Return the number of bytes that hold one bit for each of `entries` entries."""
    return -(-entries // 8)


class LowRank(nn.Module):
    """A layer of a task whose weight is the rescaled weight of the base plus a low-rank matrix.

    The attributes `weight` and `bias` are those of the task, for code that reads them instead of calling the layer.

    Args:
        layer: the task's layer with its own bias; its weight is W0, the same tensor as in the base.
        rows: R [m].
        columns: S [n].
        left: U [m, r].
        right: V [r, n], or [r, n * cells].
    """

    def __init__(self, layer: Layer, *, rows: Tensor, columns: Tensor, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.rows, self.columns = nn.Parameter(rows), nn.Parameter(columns)
        self.left, self.right = Factor(left), Factor(right)

    @property
    def rank(self) -> int:
        """The rank r of U V."""
        return int(self.left.shape[1])

    @property
    def weight(self) -> Tensor:
        """The weight W [m, n, ...] of the task."""
        base = self.layer.weight
        around = (1,) * (base.dim() - 2)
        product = self.left() @ self.right()
        shape = base.shape if product.shape[1] == base[0].numel() else (*product.shape, *around)
        scaled: Tensor = self.rows.view(-1, 1, *around) * base * self.columns.view(1, -1, *around)
        moved: Tensor = scaled + product.view(shape)
        return moved

    @property
    def bias(self) -> Tensor | None:
        """The bias [m] of the task, or None."""
        bias: Tensor | None = self.layer.bias
        return bias

    def stretches(self) -> tuple[Tensor, Tensor]:
        """Return the squared norms [m] of the rows of W0 D(S) and [n] of the columns of D(R) W0, each at least 1."""
        base = self.layer.weight.detach()
        around = (1,) * (base.dim() - 2)
        by_rows = (base * self.columns.detach().view(1, -1, *around)).flatten(1).square().sum(dim=1)
        by_columns = (base * self.rows.detach().view(-1, 1, *around)).transpose(0, 1).flatten(1).square().sum(dim=1)
        return by_rows.clamp_min(1), by_columns.clamp_min(1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the layer for its input x, with W as weight.

        In training a linear layer computes R (W0 (S x)) + U (V x), which needs neither W nor the gradient of W.
        """
        if isinstance(self.layer, nn.Conv2d):
            convolved: Tensor = self.layer._conv_forward(x, self.weight, self.bias)
            return convolved
        if not self.training:
            return F.linear(x, self.weight, self.bias)
        scaled = self.rows * F.linear(x * self.columns, self.layer.weight)
        out = scaled + F.linear(F.linear(x, self.right()), self.left())
        return out if self.bias is None else out + self.bias


def install(network: nn.Module, base: nn.Module, parts: Mapping[str, dict[str, Tensor]]) -> None:
    """Replace the layers of a task's network by `LowRank` layers on the weights of the base.

    Args:
        network: from `copy_for_task`; its biases, norms and running statistics are not changed.
        base: the frozen base network.
        parts: by name of each layer of `layers_of`, its tensors "rows", "columns", "left" and "right".
    """
    layers, frozen = layers_of(network), layers_of(base)
    for name, values in parts.items():
        layers[name].weight = frozen[name].weight
        values = {key: value.to(frozen[name].weight) for key, value in values.items()}
        network.set_submodule(name, LowRank(layers[name], **values))


def low_rank_layers(network: nn.Module) -> dict[str, LowRank]:
    """Return all `LowRank` layers of `network` by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, LowRank)}


# --- closed forms


def rescaling(base: Tensor, target: Tensor, *, sweeps: int) -> tuple[Tensor, Tensor]:
    """Return R [m] and S [n], float64, by alternating least squares on |target - D(R) W0 D(S)|^2 from S = 1.

    D(v) is the diagonal matrix of a vector v.

    Args:
        base: W0 [m, n, ...].
        target: the weight to approximate, in the shape of W0.
        sweeps: number of times that R and then S are solved for; a further sweep never increases the error. The paper
            uses 1.
    """
    base, target = _window(base), _window(target)
    columns = base.new_ones(base.shape[1])
    for _ in range(sweeps):
        scaled = base * columns[:, None]
        rows = (target * scaled).sum(dim=(1, 2)) / scaled.square().sum(dim=(1, 2)).clamp_min(TINY)
        scaled = base * rows[:, None, None]
        columns = (target * scaled).sum(dim=(0, 2)) / scaled.square().sum(dim=(0, 2)).clamp_min(TINY)
    return rows, columns


@dataclass(frozen=True)
class Residual:
    """The residual E of a weight after rescaling, target - D(R) W0 D(S), with its singular values and vectors.

    Singular vectors are the eigenvectors of E E^T or E^T E, whichever is smaller, in float64. This is several times
    faster than a singular value decomposition, and exact to single precision for singular values down to 1e-8 of the
    largest.

    Attributes:
        rows: R [m].
        columns: S [n].
        matrix: E [m, n], the mean over the window; unfolded [m, n * cells].
        energy: squared singular values of E [q], descending, where q is the smaller side of E.
        vectors: [q, q], with the left (if E has no more rows than columns) or right singular vectors as columns.
        cells: number of places of the window at which each entry of E is used.
    """

    rows: Tensor
    columns: Tensor
    matrix: Tensor
    energy: Tensor
    vectors: Tensor
    cells: int

    def parts(self, rank: int) -> dict[str, Tensor]:
        """Return "rows", "columns", "left" P s^1/2 and "right" s^1/2 Q^T for the `rank` largest singular values s.

        P and Q have the left and right singular vectors of E as columns.
        """
        roots = self.energy[:rank].clamp_min(TINY).sqrt().sqrt()
        vectors = self.vectors[:, :rank]
        if len(self.matrix) <= self.matrix.shape[1]:
            left, right = vectors * roots, (vectors / roots).T @ self.matrix
        else:
            left, right = self.matrix @ (vectors / roots), (vectors * roots).T
        return {"rows": self.rows, "columns": self.columns, "left": left, "right": right}


def decompose(base: Tensor, target: Tensor, *, sweeps: int, unfold: bool) -> Residual:
    """Return the residual of `target` after rescaling `base`.

    Args:
        base: W0 [m, n, ...].
        target: the weight to approximate, in the shape of W0.
        sweeps: see `rescaling`.
        unfold: whether the residual has a value per place of the window, or the mean over the window.
    """
    base, target = _window(base), _window(target)  # converted once, because memory traffic dominates for large layers
    rows, columns = rescaling(base, target, sweeps=sweeps)
    error = target - rows[:, None, None] * base * columns[:, None]  # [m, n, cells]
    matrix = error.flatten(1) if unfold else error.mean(dim=2)
    gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
    energy, vectors = torch.linalg.eigh(gram)
    cells = 1 if unfold else error.shape[2]
    return Residual(rows, columns, matrix, energy.flip(0).clamp_min(0), vectors.flip(1), cells)


def _window(weight: Tensor) -> Tensor:
    """Return the weight as [m, n, cells] in float64."""
    return weight.detach().double().reshape(*weight.shape[:2], -1)


# --- ranks


def layer_curvature(
    network: nn.Module,
    split: Split,
    ctx: Context,
    *,
    loss: Callable[[Batch, Context], Tensor],
    weights: Mapping[str, Tensor],
    batch_size: int,
) -> dict[str, float]:
    """Return h by weight name: the mean over a weight's entries of its diagonal Fisher, from gradients of batches.

    h = 1 / N_b sum_b B_b mean((d L_b / d W)^2), where L_b is the mean loss of batch b, B_b is its number of rows and
    N_b is the number of batches; the network is in eval mode. B_b (mean gradient)^2 approximates the mean of squared
    per-row gradients if these are independent with mean 0.

    Args:
        network: the network of the task, which is in eval mode meanwhile.
        split: rows.
        ctx: context of the task.
        loss: function of a batch and a context that returns the mean loss [] over the rows.
        weights: weights of `network` by name.
        batch_size: rows per batch.
    """
    sums = dict.fromkeys(weights, 0.0)
    batches = 0
    with eval_mode(network):
        for batch in split.batches(batch_size):
            batches += 1
            laid_out = Batch(ctx.hardware.layout(batch.x), batch.y, batch.t, batch.i)
            with ctx.hardware.autocast():
                value = loss(laid_out, ctx)
            gradients = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
            for name, grad in zip(weights, gradients, strict=True):
                sums[name] += 0.0 if grad is None else len(batch) * float(grad.float().square().mean())
    return {name: total / batches for name, total in sums.items()}


def select_ranks(
    scores: Mapping[str, Tensor],
    *,
    alpha: float,
    lowest: int,
    highest: int,
    costs: Mapping[str, float] | None = None,
    budget: float = math.inf,
) -> dict[str, int]:
    """Return the rank of each layer by choosing the singular values with the highest scores of all layers together.

    Singular values are added in descending order of their scores, until those added make up the fraction alpha of the
    sum of all scores. Then the ranks are clipped.

    Args:
        scores: by layer, the scores of its singular values [q], descending: the estimated increase of the loss if the
            singular value is left out.
        alpha: from 0 to 1; at 1 all singular values are chosen.
        lowest: lower bound of each rank, as far as the layer has so many singular values.
        highest: upper bound of each rank.
        costs: by layer, the cost of increasing its rank by 1; None if ranks cost nothing.
        budget: largest sum of the costs of all ranks, where ranks above `highest` cost nothing; the choice ends at the
            first singular value that would exceed it.
    """
    pooled = torch.cat([s.double() for s in scores.values()])
    owner = torch.cat([torch.full((len(s),), i) for i, s in enumerate(scores.values())])
    number = torch.cat([torch.arange(len(s)) for s in scores.values()])
    order = torch.sort(pooled.cpu(), descending=True, stable=True).indices
    best, owner, number = pooled.cpu()[order], owner[order], number[order]
    before = best.cumsum(0) - best
    chosen = before < alpha * best.sum() if alpha < 1 else torch.ones_like(before, dtype=torch.bool)
    if costs is not None:
        price = torch.tensor(list(costs.values()), dtype=torch.float64)[owner] * (number < highest)
        chosen &= price.cumsum(0) <= budget
    found = torch.bincount(owner[chosen], minlength=len(scores)).tolist()
    ranks = zip(scores.items(), found, strict=True)
    return {name: min(max(min(rank, highest), lowest), len(values)) for (name, values), rank in ranks}


# --- pruning


def prune(factors: Iterable[Factor], *, entries: int) -> None:
    """Keep the `entries` entries of largest absolute value of all factors together, and set all others to 0.

    The factors must not be compressed.
    """
    values = [factor.value.detach() for factor in factors]
    pooled = torch.cat([value.abs().flatten() for value in values])
    if entries >= len(pooled):
        return
    largest = torch.zeros_like(pooled, dtype=torch.bool)
    largest[pooled.topk(entries, sorted=False).indices] = True
    for value, part in zip(values, torch.split(largest, [v.numel() for v in values]), strict=True):
        value *= part.view(value.shape)
