"""Low-rank factorisations of weights: SVD, FWSVD and TFWSVD.

Sources: FWSVD, Hsu et al., ICLR 2022, arXiv 2207.00112; TFWSVD, Hua et al., EMNLP 2022, arXiv 2211.09718. Neither has
public code. Symbols: a weight W [n, m], I [n, m] the diagonal Fisher information of its entries (at least 0), and
factors A [n, r] and B [r, m]. All is computed in double precision.

Deviations: the published optimizer of TFWSVD is one of three choices (`solver`), and not the default.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clrun.blocks.compress.base import Compressed, Compressor, Evidence, Layer
from clrun.blocks.compress.forms import LowRank
from clrun.blocks.curvature.target import Labels
from clrun.blocks.low_rank import select_ranks
from clrun.system.errors import ConfigError, Positive, PositiveInt

Pair = tuple[Tensor, Tensor]
Side = Literal["in", "out"]
Solver = Literal["als", "em", "adam_sgd"]
GUARD = 1e-8  # lower bound of a weight of a row, relative to the largest
RIDGE = 1e-10  # added to the systems of alternating least squares, relative to the mean of their diagonals
ENOUGH = 1e-4  # relative decrease of the error below which iterations end
BETAS, SWITCH = (0.9, 0.999), 1e-9  # of Adam, and of the switch to SGD (Keskar and Socher, 2017)


def truncated(matrix: Tensor, rank: int) -> Pair:
    """Return A = U S and B = V' of the `rank` largest singular values: the best approximation of that rank."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank], v[:rank]


def enough(n: int, m: int) -> int:
    """Return the least rank of which factors of a matrix [n, m] save no byte; it is at most the smaller side."""
    return -(-n * m // (n + m))


def row_weights(fisher: Tensor) -> Tensor:
    """Return d [n] with d_i^2 the sum of I over row i, at least 1e-8 of the largest; 1 where I is 0 everywhere."""
    d: Tensor = fisher.sum(dim=1).clamp_min(0).sqrt()
    largest = float(d.max())
    return d.clamp_min(GUARD * largest) if largest else torch.ones_like(d)


def row_weighted(matrix: Tensor, fisher: Tensor, rank: int, side: Side) -> Pair:
    """Return the factors of FWSVD: those that minimise sum_i d_i^2 |W_i - (A B)_i|^2 over rows i.

    Args:
        matrix: W.
        fisher: I.
        rank: r.
        side: "out" weighs the rows of W, which are outputs. "in" weighs its columns, which are the rows of the paper,
            where a layer is y = x W.
    """
    if side == "in":
        left, right = row_weighted(matrix.T, fisher.T, rank, "out")
        return right.T, left.T
    d = row_weights(fisher)
    left, right = truncated(d[:, None] * matrix, rank)
    return left / d[:, None], right


def weighted_error(matrix: Tensor, fisher: Tensor, factors: Pair) -> float:
    """Return E = sum_ij I_ij (W_ij - (A B)_ij)^2."""
    return float((fisher * (matrix - factors[0] @ factors[1]).square()).sum())


def least_squares(matrix: Tensor, fisher: Tensor, right: Tensor) -> Tensor:
    """Return the A that minimises E for a given B: one system [r, r] for each row."""
    systems = torch.einsum("ij,kj,lj->ikl", fisher, right, right)
    targets = (fisher * matrix) @ right.T
    size = systems.diagonal(dim1=1, dim2=2).mean().clamp_min(torch.finfo(systems.dtype).tiny)
    systems.diagonal(dim1=1, dim2=2).add_(RIDGE * size)
    found: Tensor = torch.linalg.solve(systems, targets)
    return found


def alternating(matrix: Tensor, fisher: Tensor, start: Pair) -> Iterator[Pair]:
    """Yield factors after each sweep of alternating least squares over A and B; E never increases (to rounding)."""
    left, right = start
    while True:
        left = least_squares(matrix, fisher, right)
        right = least_squares(matrix.T, fisher.T, left.T).T
        yield left, right


def expectation(matrix: Tensor, fisher: Tensor, start: Pair) -> Iterator[Pair]:
    """Yield factors after each step X <- SVD_r(P W + (1 - P) X) with P = I / max I; E never increases."""
    share = fisher / fisher.max()
    left, right = start
    while True:
        left, right = truncated(share * matrix + (1 - share) * (left @ right), left.shape[1])
        yield left, right


def adam_then_sgd(matrix: Tensor, fisher: Tensor, start: Pair) -> Iterator[Pair]:
    """Yield factors after each step of Adam on E, then of SGD from a switching point that Adam's steps determine.

    The rule is that of Keskar and Socher (2017, arXiv 1712.07628), because the text of TFWSVD that says its own was not
    available: with a step p of Adam for the gradient g, gamma = p'p / (-p'g) is the rate of an SGD step of the same
    projection. When gamma and its bias-corrected average agree, SGD goes on with this average as its rate.
    """
    point = torch.cat([factor.flatten() for factor in start])
    shapes = [factor.shape for factor in start]
    sizes = [factor.numel() for factor in start]
    scale = point.abs().mean() * 1e-2
    first, second, average, sgd_rate = torch.zeros_like(point), torch.zeros_like(point), 0.0, 0.0
    step = 0
    while True:
        step += 1
        left, right = (x.view(shape) for x, shape in zip(torch.split(point, sizes), shapes, strict=True))
        error = 2 * fisher * (left @ right - matrix)
        gradient = torch.cat([(error @ right.T).flatten(), (left.T @ error).flatten()])
        if sgd_rate:
            move = -sgd_rate * gradient
        else:
            first = BETAS[0] * first + (1 - BETAS[0]) * gradient
            second = BETAS[1] * second + (1 - BETAS[1]) * gradient.square()
            root = (second / (1 - BETAS[1] ** step)).sqrt().clamp_min(torch.finfo(point.dtype).tiny)
            move = -scale / math.sqrt(step) * first / (1 - BETAS[0] ** step) / root
            along = float(-move @ gradient)
            if along > 0:
                gamma = float(move @ move) / along
                average = BETAS[1] * average + (1 - BETAS[1]) * gamma
                corrected = average / (1 - BETAS[1] ** step)
                sgd_rate = corrected if step > 1 and abs(corrected - gamma) < SWITCH else 0.0
        point = point + move
        parts = torch.split(point, sizes)
        yield parts[0].view(shapes[0]), parts[1].view(shapes[1])


SOLVERS: dict[Solver, Callable[[Tensor, Tensor, Pair], Iterator[Pair]]] = {
    "als": alternating,
    "em": expectation,
    "adam_sgd": adam_then_sgd,
}


def entry_weighted(matrix: Tensor, fisher: Tensor, start: Pair, solver: Solver, sweeps: int) -> Pair:
    """Return factors with a small E; never worse than `start`.

    Args:
        matrix: W.
        fisher: I; where it is 0 everywhere, E is 0 for all factors and `start` is returned.
        start: factors to begin with.
        solver: see `SOLVERS`.
        sweeps: most sweeps or steps; alternating least squares and EM end when E decreases by less than 1e-4 of it.
    """
    best, least = start, weighted_error(matrix, fisher, start)
    if not float(fisher.max()) or not least:
        return start
    before = least
    for _, factors in zip(range(sweeps), SOLVERS[solver](matrix, fisher, start), strict=False):
        error = weighted_error(matrix, fisher, factors)
        if math.isfinite(error) and error < least:
            best, least = factors, error
        if solver != "adam_sgd" and before - error < ENOUGH * before:
            break
        before = error
    return best


def spread(fisher: Tensor) -> float:
    """Return the variance of I over the entries, relative to its squared mean.

    TFWSVD predicts from the variance of the Fisher information where plain SVD fails: the error of entries that matter
    is not seen by it. The relative form compares layers; 0 means that SVD is optimal.
    """
    mean = float(fisher.mean())
    return float(fisher.var(unbiased=False)) / mean**2 if mean else 0.0


@dataclass(frozen=True, kw_only=True)
class Factorised(Compressor):
    """The base of factorisations.

    Attributes:
        target: what `amount` is: "ratio", the fraction of the bytes that is kept; or "rank".
        amount: a ratio from 0 to 1, where 1 leaves everything as it is; or a rank of at least 1. Layers stay as they
            are where factors of the rank would save no byte (`enough`). With scope=global, a rank is the mean over
            layers of what each would have for the same total of bytes.
    """

    target: Literal["ratio", "rank"]
    amount: Positive

    def __post_init__(self) -> None:
        """Check the amount."""
        if self.target == "ratio" and self.amount > 1:
            raise ConfigError(f"compress.amount={self.amount:g}: a ratio is the fraction that is kept, at most 1")
        if self.target == "rank" and self.amount != int(self.amount):
            raise ConfigError(f"compress.amount={self.amount:g}: a rank is a whole number of at least 1")

    @property
    def words(self) -> str:
        """What is to be reached."""
        return f"{self.target} {self.amount:g} {'per layer' if self.scope == 'layer' else 'over all layers'}"

    @property
    def neutral(self) -> bool:
        """Whether every layer keeps its bytes; a rank depends on the layers."""
        return self.target == "ratio" and self.amount == 1

    def rank_of(self, n: int, m: int) -> int:
        """Return the rank of a layer [n, m] when every layer gets the same target, at most `enough`.

        It is 0 if not even rank 1 fits into the ratio.
        """
        if self.neutral:
            return enough(n, m)
        rank = int(self.amount) if self.target == "rank" else int(self.amount * n * m / (n + m) + 1e-9)
        return min(rank, enough(n, m))

    def check_layers(self, layers: Mapping[str, Layer]) -> None:
        """Refuse a ratio that has no room for rank 1 in each layer, or for scope=global in all together.

        Raises:
            ConfigError: see above.
        """
        if self.scope == "layer" or self.target == "rank":
            super().check_layers(layers)
            return
        sides = [tuple(layer.weight.flatten(1).shape) for layer in layers.values()]
        least = sum(min(n + m, n * m) for n, m in sides) / sum(n * m for n, m in sides)
        if self.amount < least:
            raise ConfigError(
                f"compress.amount={self.amount:g}: rank 1 in every layer takes a ratio of {least:.3g}; use more, or "
                "add small layers to compress.exclude"
            )

    def check_layer(self, name: str, layer: Layer) -> None:
        """Refuse a ratio that has no room for rank 1.

        Raises:
            ConfigError: see above.
        """
        n, m = layer.weight.flatten(1).shape
        if not self.rank_of(n, m):
            least = (n + m) / (n * m)
            advice = f"needs a ratio of at least {least:.3g} for rank 1; use more, or add it to compress.exclude"
            if least >= 1:
                advice = f"is as small as factors of rank 1; add it, as in compress.exclude=[{name}]"
            raise ConfigError(f"compress.amount={self.amount:g}: layer {name} [{n}, {m}] {advice}")

    def compress(self, evidence: Evidence) -> dict[str, Compressed]:
        """Return the factorised layers; a layer in which factors would save no byte stays as it is."""
        matrices = {name: evidence.weight(name).flatten(1).double() for name in evidence.layers}
        if self.scope == "layer" and all(self._is_reached(name, x, evidence) for name, x in matrices.items()):
            return {}
        fisher = self.importance(evidence)
        ranks = self.ranks(matrices, fisher, evidence)
        found = {}
        for name, matrix in matrices.items():
            old = evidence.forms.of(name)
            kept = isinstance(old, LowRank) and old.rank <= ranks[name]
            if ranks[name] < enough(*matrix.shape) and not kept:
                factors, facts = self.factors(matrix, fisher.get(name), ranks[name])
                left, right = (x.float().contiguous() for x in factors)
                form = LowRank(tuple(evidence.weight(name).shape), left, right)
                found[name] = Compressed(form, form.weight, facts)
        return found

    def _is_reached(self, name: str, matrix: Tensor, evidence: Evidence) -> bool:
        """Return whether a layer has the rank of a target for each layer, or stays as it is under it."""
        rank, old = self.rank_of(*matrix.shape), evidence.forms.of(name)
        return rank >= enough(*matrix.shape) or (isinstance(old, LowRank) and old.rank <= rank)

    def ranks(self, matrices: Mapping[str, Tensor], fisher: Mapping[str, Tensor], evidence: Evidence) -> dict[str, int]:
        """Return the rank of each layer.

        With scope=global these are the ranks that HALRP's chooser selects: singular values of all layers in descending
        order of the loss increase per stored number, until the bytes are spent. Every layer keeps at least rank 1, and
        none is given a rank at which its factors save no byte: from there on it stays as it is.
        """
        uniform = {name: self.rank_of(*matrix.shape) for name, matrix in matrices.items()}
        if self.scope == "layer" or all(uniform[name] >= enough(*x.shape) for name, x in matrices.items()):
            return uniform
        costs = {name: float(sum(matrix.shape)) for name, matrix in matrices.items()}
        scores = {name: self.losses(matrices[name], fisher.get(name), name, evidence) / costs[name] for name in costs}
        if self.target == "ratio":
            room = self.amount * sum(matrix.numel() for matrix in matrices.values())
        else:
            room = sum(min(uniform[name] * cost, matrices[name].numel()) for name, cost in costs.items())
        budget = room - sum(min(cost, matrices[name].numel()) for name, cost in costs.items())
        # The first rank of each layer is not chosen but given, because a layer of rank 0 would pass nothing on.
        further = {name: score[1 : enough(*matrices[name].shape)] for name, score in scores.items()}
        most = max(len(score) for score in scores.values())
        more = select_ranks(further, alpha=1, lowest=0, highest=most, costs=costs, budget=budget)
        return {name: 1 + more[name] for name in costs}

    def importance(self, evidence: Evidence) -> dict[str, Tensor]:
        """Return I of each layer as [n, m], float64; {} for a factorisation without weights."""
        return {}

    def losses(self, matrix: Tensor, fisher: Tensor | None, name: str, evidence: Evidence) -> Tensor:
        """Return the estimated increase of the loss when a singular value is left out, descending [min(n, m)]."""
        losses: Tensor = 0.5 * evidence.curvature[name] * torch.linalg.svdvals(matrix).square()
        return losses

    def factors(self, matrix: Tensor, fisher: Tensor | None, rank: int) -> tuple[Pair, dict[str, float]]:
        """Return the factors of a layer, and numbers for the record."""
        return truncated(matrix, rank), {}


@dataclass(frozen=True, kw_only=True)
class Svd(Factorised):
    """The truncated singular value decomposition of each weight."""


@dataclass(frozen=True, kw_only=True)
class Fwsvd(Factorised):
    """SVD of the weight with its rows weighted by their Fisher information.

    Attributes:
        side: "in" weighs inputs, as published; "out" weighs outputs.
        labels: of the Fisher information; see `clrun.blocks.curvature.estimate`. "empirical" is published, and 0 where
            the network fits the labels.
    """

    side: Side
    labels: Labels

    @property
    def differentiates(self) -> bool:
        """Always: for the Fisher information."""
        return True

    def importance(self, evidence: Evidence) -> dict[str, Tensor]:
        """Return I of each layer."""
        return {name: value.flatten(1).double() for name, value in evidence.fisher(self.labels).items()}

    def losses(self, matrix: Tensor, fisher: Tensor | None, name: str, evidence: Evidence) -> Tensor:
        """Return half the squared singular values of the weighted matrix, the mean over the other side.

        They are 0 where I is 0 everywhere, while the factors then are those of plain SVD.
        """
        assert fisher is not None
        if self.side == "in":
            matrix, fisher = matrix.T, fisher.T
        d = row_weights(fisher) / math.sqrt(fisher.shape[1])
        losses: Tensor = 0.5 * torch.linalg.svdvals(d[:, None] * matrix).square()
        return losses * bool(fisher.any())

    def factors(self, matrix: Tensor, fisher: Tensor | None, rank: int) -> tuple[Pair, dict[str, float]]:
        """Return the factors of FWSVD."""
        assert fisher is not None
        factors = row_weighted(matrix, fisher, rank, self.side)
        return factors, _facts(matrix, fisher, rank, factors)


@dataclass(frozen=True, kw_only=True)
class Tfwsvd(Fwsvd):
    """Factors that weigh the error of every entry by its Fisher information; they have no closed form.

    Attributes:
        solver: "als": alternating least squares, which is ours. "em": one SVD per step (Srebro and Jaakkola, 2003).
            "adam_sgd": Adam, then SGD, as the paper names its optimizer; see `adam_then_sgd`.
        sweeps: most sweeps of als, or steps of the others.
    """

    solver: Solver
    sweeps: PositiveInt

    def factors(self, matrix: Tensor, fisher: Tensor | None, rank: int) -> tuple[Pair, dict[str, float]]:
        """Return factors with a small weighted error, beginning with those of FWSVD or SVD, whichever is better."""
        assert fisher is not None
        starts = [row_weighted(matrix, fisher, rank, self.side), truncated(matrix, rank)]
        start = min(starts, key=lambda factors: weighted_error(matrix, fisher, factors))
        factors = entry_weighted(matrix, fisher, start, self.solver, self.sweeps)
        return factors, _facts(matrix, fisher, rank, factors)


def _facts(matrix: Tensor, fisher: Tensor, rank: int, factors: Pair) -> dict[str, float]:
    """Return the predicted increase of the loss, that of plain SVD, and the predictor of failure of plain SVD."""
    return {
        "loss_increase": 0.5 * weighted_error(matrix, fisher, factors),
        "loss_increase_svd": 0.5 * weighted_error(matrix, fisher, truncated(matrix, rank)),
        "fisher_spread": spread(fisher),
    }


__all__ = ["Factorised", "Fwsvd", "Svd", "Tfwsvd", "entry_weighted", "row_weighted", "truncated", "weighted_error"]
