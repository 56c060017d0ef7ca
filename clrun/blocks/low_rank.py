"""A frozen base, rescaled, plus a low-rank matrix: layers, closed forms, the choice of all ranks at once, pruning.

Source: HALRP (Li et al., TKDE 2024, arXiv 2311.15161). Symbols: W0 [m, n, ...] is the weight of a linear or convolution
layer of the base (n inputs of a group), the dots are its window of `cells` places, none for a linear layer. A task has
R [m], S [n], U [m, r] and V [r, n]; its weight is W[o, i] = R_o W0[o, i] S_i + (U V)[o, i], the last term the same in
the whole window, or, unfolded, with V [r, n * cells] and its own value at each place.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from clrun.blocks.params import eval_mode
from clrun.data.split import Batch, Split
from clrun.learning.context import Context

Layer = nn.Linear | nn.Conv2d
TINY = 1e-20  # of a squared norm that is divided by


# --- which tensors of a network are whose


def layers_of(network: nn.Module) -> dict[str, Layer]:
    """Return the linear and convolution layers of `network` by name: those whose weights a task perturbs."""
    return {
        name: module
        for name, module in network.named_modules()
        # The output layer of torch's own attention is read by its weight, never called.
        if isinstance(module, nn.Linear | nn.Conv2d) and not isinstance(module, NonDynamicallyQuantizableLinear)
    }


def copy_for_task(base: nn.Module) -> nn.Module:
    """Return a copy of `base` whose weights, biases, norms and running statistics are its own and can be trained.

    Its own are the weights of `layers_of`, every parameter with at most one dimension (biases, scales and shifts of
    norms, layer scales) and the running statistics. All the rest (tokens, positions, index tables) is shared with the
    base, and frozen: the same objects.
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
    """Return the bytes of all parameters and buffers of `modules`, shared ones once, those of `without` not at all."""
    known = set() if without is None else {id(t) for t in (*without.parameters(), *without.buffers())}
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return sum(t.nbytes for key, t in tensors.items() if key not in known)


# --- layers


class Factor(nn.Module):
    """A matrix that can be stored without its zeros: its other entries, and one bit an entry that says where they are.

    Args:
        value: [a, b], the matrix; trainable until `compress` is called.
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
        kept = (self.bits[:, None] >> places & 1).bool().flatten()[: math.prod(self.shape)]
        dense = torch.zeros(kept.shape, dtype=self.value.dtype, device=self.value.device)
        dense[kept] = self.value
        return dense.view(self.shape)

    def compress(self) -> None:
        """Drop the zeros where that saves memory; the matrix stays the same and is not trained any more."""
        dense = self.value.detach()
        kept = dense.flatten() != 0
        if 4 * int(kept.sum()) + bits_bytes(dense.numel()) >= dense.nbytes:
            self.value.requires_grad_(False)
            return
        places = 2 ** torch.arange(8, device=dense.device)
        padded = F.pad(kept, (0, -len(kept) % 8)).view(-1, 8)
        self.bits = (padded * places).sum(dim=1).to(torch.uint8)
        self.value = nn.Parameter(dense.flatten()[kept], requires_grad=False)


def bits_bytes(entries: int) -> int:
    """Return the bytes that say which of `entries` entries of a matrix are stored."""
    return -(-entries // 8)


class LowRank(nn.Module):
    """A layer of a task: the base's weight, rescaled, plus a low-rank matrix; the bias is the task's own.

    Code that reads `weight` and `bias` instead of calling the layer finds those of the task.

    Args:
        layer: the task's own layer, whose weight is the frozen parameter of the base, shared with it.
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
        """The number r of columns of U."""
        return int(self.left.shape[1])

    @property
    def weight(self) -> Tensor:
        """W [m, n, ...]."""
        base = self.layer.weight
        around = (1,) * (base.dim() - 2)
        product = self.left() @ self.right()
        shape = base.shape if product.shape[1] == base[0].numel() else (*product.shape, *around)
        scaled: Tensor = self.rows.view(-1, 1, *around) * base * self.columns.view(1, -1, *around)
        moved: Tensor = scaled + product.view(shape)
        return moved

    @property
    def bias(self) -> Tensor | None:
        """[m], the task's own."""
        bias: Tensor | None = self.layer.bias
        return bias

    def stretches(self) -> tuple[Tensor, Tensor]:
        """Return [m] and [n], at least 1: squared norms of what R and S multiply in the weight."""
        base = self.layer.weight.detach()
        around = (1,) * (base.dim() - 2)
        by_rows = (base * self.columns.detach().view(1, -1, *around)).flatten(1).square().sum(dim=1)
        by_columns = (base * self.rows.detach().view(-1, 1, *around)).transpose(0, 1).flatten(1).square().sum(dim=1)
        return by_rows.clamp_min(1), by_columns.clamp_min(1)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer with weight W returns.

        A linear layer in training never forms W: R (W0 (S x)) + U (V x) needs neither W nor its gradient.
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
    """Replace the layers of a task's `network` by `LowRank` layers on the weights of `base`.

    Args:
        network: from `copy_for_task`; its biases, norms and statistics stay.
        base: frozen.
        parts: rows, columns, left and right of each layer of `layers_of`, by its name.
    """
    layers, frozen = layers_of(network), layers_of(base)
    for name, values in parts.items():
        layers[name].weight = frozen[name].weight
        values = {key: value.to(frozen[name].weight) for key, value in values.items()}
        network.set_submodule(name, LowRank(layers[name], **values))


def low_rank_layers(network: nn.Module) -> dict[str, LowRank]:
    """Return the `LowRank` layers of `network` by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, LowRank)}


# --- closed forms


def rescaling(base: Tensor, target: Tensor, *, sweeps: int) -> tuple[Tensor, Tensor]:
    """Return R [m] and S [n], float64, of alternating least squares on |target - D(R) base D(S)|^2, from S = 1.

    Args:
        base: W0 [m, n, ...].
        target: the weight to explain, of the same shape.
        sweeps: how often R and then S are solved for; more never fit worse. The paper's is 1.
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
    """What rescaling leaves of a weight, and its singular values.

    The vectors come from the eigenvectors of E E^T or E^T E, whichever is smaller, in float64: several times faster
    than a singular value decomposition, and exact to single precision for values down to 1e-8 of the largest.

    Attributes:
        rows: R [m].
        columns: S [n].
        matrix: E [m, n], the mean over the window; unfolded [m, n * cells].
        energy: [q] squared singular values of E, descending.
        vectors: [q, q], their left (m <= columns of E) or right singular vectors as columns.
        cells: how often the window repeats each entry of E.
    """

    rows: Tensor
    columns: Tensor
    matrix: Tensor
    energy: Tensor
    vectors: Tensor
    cells: int

    def parts(self, rank: int) -> dict[str, Tensor]:
        """Return rows, columns, left = P s^1/2 and right = s^1/2 Q^T of the `rank` largest singular values s."""
        roots = self.energy[:rank].clamp_min(TINY).sqrt().sqrt()
        vectors = self.vectors[:, :rank]
        if len(self.matrix) <= self.matrix.shape[1]:
            left, right = vectors * roots, (vectors / roots).T @ self.matrix
        else:
            left, right = self.matrix @ (vectors / roots), (vectors * roots).T
        return {"rows": self.rows, "columns": self.columns, "left": left, "right": right}


def decompose(base: Tensor, target: Tensor, *, sweeps: int, unfold: bool) -> Residual:
    """Return what rescaling `base` leaves of `target` (both [m, n, ...]); `unfold` keeps each place of the window."""
    base, target = _window(base), _window(target)  # converted once: a large layer is mostly memory traffic
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
    """Return h of each weight: the mean over its entries of a diagonal of the Fisher from gradients of batches.

    h = 1 / N_b sum_b B_b mean((d L_b / d W)^2), with L_b the mean loss of batch b of B_b rows, N_b batches, in eval
    mode. B_b (mean gradient)^2 is close to the mean of squared per-sample gradients if these are independent with
    mean 0.

    Args:
        network: what is put in eval mode: the network of the task.
        split: rows.
        ctx: of the task.
        loss: mean over the rows of a batch, [].
        weights: {name: weight}, of `network`.
        batch_size: rows of a batch.
    """
    sums = dict.fromkeys(weights, 0.0)
    batches = 0
    with eval_mode(network):
        for batch in split.batches(batch_size):
            batches += 1
            seen = Batch(ctx.hardware.layout(batch.x), batch.y, batch.t, batch.i)
            with ctx.hardware.autocast():
                value = loss(seen, ctx)
            for name, grad in zip(weights, torch.autograd.grad(value, list(weights.values())), strict=True):
                sums[name] += len(batch) * float(grad.float().square().mean())
    return {name: total / batches for name, total in sums.items()}


def select_ranks(
    scores: Mapping[str, Tensor],
    *,
    share: float,
    lowest: int,
    highest: int,
    costs: Mapping[str, float] | None = None,
    room: float = math.inf,
) -> dict[str, int]:
    """Return the rank of each layer: the best-scored singular values of all layers that make up `share` of all scores.

    Before the ranks are clipped, the scores left out sum to at most (1 - share) of all.

    Args:
        scores: [q] of each layer, descending: what leaving a singular value out is estimated to cost.
        share: alpha, 0 to 1; at 1 everything is kept.
        lowest: each rank is raised to this, where the layer has as many.
        highest: each rank is cut to this.
        costs: price of one rank of each layer; None for free ranks.
        room: the prices of all ranks together, ranks above `highest` free; the first value that does not fit ends
            the selection.
    """
    pooled = torch.cat([s.double() for s in scores.values()])
    owner = torch.cat([torch.full((len(s),), i) for i, s in enumerate(scores.values())])
    number = torch.cat([torch.arange(len(s)) for s in scores.values()])
    order = torch.sort(pooled.cpu(), descending=True, stable=True).indices
    best, owner, number = pooled.cpu()[order], owner[order], number[order]
    before = best.cumsum(0) - best
    keep = before < share * best.sum() if share < 1 else torch.ones_like(before, dtype=torch.bool)
    if costs is not None:
        price = torch.tensor(list(costs.values()), dtype=torch.float64)[owner] * (number < highest)
        keep &= price.cumsum(0) <= room
    found = torch.bincount(owner[keep], minlength=len(scores)).tolist()
    ranks = zip(scores.items(), found, strict=True)
    return {name: min(max(min(rank, highest), lowest), len(values)) for (name, values), rank in ranks}


# --- pruning


def prune(factors: Iterable[Factor], *, keep: int) -> None:
    """Set all entries of dense `factors` to 0 but the `keep` of largest absolute value, all factors pooled."""
    values = [factor.value.detach() for factor in factors]
    pooled = torch.cat([value.abs().flatten() for value in values])
    if keep >= len(pooled):
        return
    kept = torch.zeros_like(pooled, dtype=torch.bool)
    kept[pooled.topk(keep, sorted=False).indices] = True
    for value, part in zip(values, torch.split(kept, [v.numel() for v in values]), strict=True):
        value *= part.view(value.shape)
