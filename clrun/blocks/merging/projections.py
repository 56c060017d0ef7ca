"""Continual merging by projections of task vectors, layer by layer: OPCM and DOP. Both depend on the order of models.

Shapes: a linear layer has a weight [O, I]; K = min(O, I).
"""

from typing import Literal

import torch
from torch import Tensor

from clrun.blocks.merging.base import Evidence, Merge
from clrun.blocks.merging.vectors import Share, TaskVectors
from clrun.blocks.params import unflatten
from clrun.system.errors import ConfigError, Fraction


class Opcm(TaskVectors):
    """Fold in only that part of a task vector that the merged one does not use yet (OPCM; code FusionBench, MIT).

    The first model: T = tau_1. Model t, for the weight of each linear layer: tau~ is the part of tau_t that
    `orthogonal_part` leaves; for every other parameter, tau~ = tau_t. Then T <- (lambda T + tau~) / lambda', where the
    new lambda' makes the norm of T the mean norm of the task vectors so far. theta* = theta_0 + T.

    Deviation: a layer that has not moved yet (T = 0) takes the whole task vector, where the code deletes the diagonal
    of a vector without meaning. State beside theta_0: T and three numbers.

    Args:
        alpha: share of the singular values of T whose directions are closed to new vectors, from 0 to below 1.

    Raises:
        ConfigError: alpha is 1, at which the rule of the code closes no direction.
    """

    commutes = False

    def __init__(self, *, alpha: Fraction) -> None:
        super().__init__(scale=1.0)
        if alpha == 1:
            raise ConfigError("method.opcm.alpha: must be below 1; 0.5 is the published value")
        self.alpha = alpha
        self.factor, self.norms = 1.0, 0.0  # lambda, and the sum of the norms of the task vectors

    def _begin(self, size: int) -> None:
        self.total = torch.zeros(size, dtype=self.kind)

    def add_vector(self, vector: Tensor, key: int) -> None:
        """Add the part of the vector that is orthogonal to T, and rescale T."""
        before = self.total.double()
        self.norms += float(torch.linalg.vector_norm(vector))
        if not self.models:
            self.total = vector.to(self.total.dtype)
            return
        new, old = unflatten(vector.clone(), self.shapes), unflatten(before, self.shapes)
        for name in self.linear:
            new[name].copy_(orthogonal_part(new[name], old[name], self.alpha))
        moved = self.factor * before + torch.cat([part.reshape(-1) for part in new.values()])
        norm, mean = float(torch.linalg.vector_norm(moved)), self.norms / (self.models + 1)
        if norm and mean:
            self.factor = norm / mean
            moved = moved / self.factor
        self.total = moved.to(self.total.dtype)

    def merged(self) -> Tensor:
        """Return T [P]."""
        return self.total


def orthogonal_part(vector: Tensor, merged: Tensor, alpha: float) -> Tensor:
    """Return `vector` without the part that lies along `merged`, both [O, I].

    With merged = U diag(s) V', s descending, and P = U' vector V, the diagonal of P is removed and the leading r x r
    block, where r is the number of singular values whose cumulative share of their sum is at most alpha. The thin
    decomposition suffices, because only directions with k <= K are removed. The result is orthogonal to `merged`.
    """
    if not bool(merged.any()):
        return vector
    left, values, right = torch.linalg.svd(merged, full_matrices=False)
    closed = int((values.cumsum(0) / values.sum() <= alpha).sum())
    inside = left.T @ vector @ right.T
    removed = torch.diag(inside.diagonal())
    removed[:closed, :closed] = inside[:closed, :closed]
    rest: Tensor = vector - left @ removed @ right
    return rest


class Dop(Merge):
    """Stay near both models in the directions that their task vectors use (DOP, NeurIPS 2025; code FusionBench, MIT).

    theta*_1 = theta_1. Model t, for the weight of each linear layer with W_0 initial, W_1 merged so far and W_2 new:
    W minimises alpha L_1(W) + (1 - alpha) L_2(W), where L_i(W) = |S_i U_i' (W - W_i)|^2 + |(W - W_i) V_i S_i|^2 and
    U_i S_i V_i' = W_i - W_0. Every other parameter is the running mean of the models.

    Deviations: the code averages those parameters pairwise, which halves the weight of old models at every step, and it
    drops the singular direction that crosses the share `energy`, so that a vector of rank one keeps none.

    State beside theta_0: theta*.

    Args:
        alpha: weight of the models merged so far.
        solver: "sylvester" solves for W exactly, with the solution nearest to the mean of the two models where it is
            not unique; "adam" takes the 200 steps of the code from that mean, each of which changes an entry by at
            most about 1e-4, so that large task vectors end near the mean.
        mgda: for "adam", smooth the weights of the two losses towards those of the gradient of smallest norm (MGDA).
        energy: share of the sum of the singular values of a task vector that its directions keep.
    """

    reads_initial, commutes = True, False

    def __init__(
        self,
        *,
        alpha: Fraction,
        solver: Literal["sylvester", "adam"],
        mgda: bool,
        energy: Share,
    ) -> None:
        super().__init__()
        self.alpha, self.solver, self.mgda, self.energy = alpha, solver, mgda, energy
        self.merged = torch.zeros(0)

    def _add(self, model: Tensor, evidence: Evidence, key: int, weight: float) -> None:
        merged = model.double()
        if self.models:
            before, initial = self.merged.double(), unflatten(self.initial.double(), self.shapes)
            merged = torch.lerp(before, merged, 1 / (self.models + 1))
            parts, old, new = (unflatten(v, self.shapes) for v in (merged, before, model.double()))
            for name in self.linear:
                parts[name].copy_(self._layer(initial[name], old[name], new[name]))
        self.merged = merged.to(self.kind)

    def _layer(self, initial: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """Return the merged weight [O, I] of a linear layer."""
        used, used_new = (truncated(w - initial, self.energy) for w in (old, new))
        if self.solver == "sylvester":
            return nearest_to_both(old, new, used, used_new, self.alpha)
        return descended(old, new, used, used_new, self.alpha, mgda=self.mgda)

    def _value(self, newest: Tensor | None) -> Tensor:
        return self.merged


def truncated(vector: Tensor, energy: float) -> Tensor:
    """Return the best approximation of a matrix [O, I] whose singular values have the share `energy` of their sum."""
    left, values, right = torch.linalg.svd(vector, full_matrices=False)
    before = values.cumsum(0) - values
    values = torch.where(before < energy * values.sum(), values, torch.zeros_like(values))
    kept: Tensor = left @ (values[:, None] * right)
    return kept


def nearest_to_both(old: Tensor, new: Tensor, used: Tensor, used_new: Tensor, alpha: float) -> Tensor:
    """Return the minimiser W [O, I] of alpha L_1 + (1 - alpha) L_2, see `Dop`; of several the nearest to the mean.

    With A = sum_i a_i t_i t_i', B = sum_i a_i t_i' t_i for the vectors t_i it solves A W + W B = sum_i a_i (t_i t_i'
    W_i + W_i t_i' t_i), a Sylvester equation with symmetric A and B.
    """
    mean = (old + new) / 2
    pairs = ((alpha, old, used), (1 - alpha, new, used_new))
    a = torch.stack([w * t @ t.T for w, _, t in pairs]).sum(dim=0)
    b = torch.stack([w * t.T @ t for w, _, t in pairs]).sum(dim=0)
    off = torch.stack([w * (t @ t.T @ (one - mean) + (one - mean) @ t.T @ t) for w, one, t in pairs]).sum(dim=0)
    (rows, left), (columns, right) = torch.linalg.eigh(a), torch.linalg.eigh(b)
    total = rows.clamp(min=0)[:, None] + columns.clamp(min=0)[None, :]
    inside = left.T @ off @ right
    small = total <= 1e-13 * total.max()
    nearest: Tensor = mean + left @ torch.where(small, torch.zeros_like(inside), inside / total) @ right.T
    return nearest


def descended(
    old: Tensor, new: Tensor, used: Tensor, used_new: Tensor, alpha: float, *, mgda: bool, steps: int = 200
) -> Tensor:
    """Return the weight [O, I] after Adam with learning rate 1e-4 on alpha L_1 + (1 - alpha) L_2, see `Dop`.

    With `mgda` the weights of the losses are, in each step, 0.999 times the ones before plus 0.001 times those of the
    point of smallest norm between the two gradients, each divided by its loss.
    """
    models, vectors = (old, new), (used, used_new)
    weights = [alpha, 1 - alpha]
    merged = (old + new) / 2
    first, second = torch.zeros_like(merged), torch.zeros_like(merged)
    for step in range(1, steps + 1):
        gaps = [merged - model for model in models]
        parts = [(t.T @ gap, gap @ t.T) for t, gap in zip(vectors, gaps, strict=True)]
        grads = [2 * (t @ p + q @ t) for t, (p, q) in zip(vectors, parts, strict=True)]
        if mgda:
            losses = [float(p.square().sum() + q.square().sum()) for p, q in parts]
            share = _smallest_norm(*(g / loss if loss else g for g, loss in zip(grads, losses, strict=True)))
            weights = [0.999 * w + 0.001 * s for w, s in zip(weights, (share, 1 - share), strict=True)]
        grad = weights[0] * grads[0] + weights[1] * grads[1]
        first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad.square()
        root = (second / (1 - 0.999**step)).sqrt() + 1e-8
        merged = merged - 1e-4 * (first / (1 - 0.9**step)) / root
    return merged


def _smallest_norm(a: Tensor, b: Tensor) -> float:
    """Return the share s in [0, 1] of a in the point s a + (1 - s) b of smallest norm."""
    gap = a - b
    length = float(gap.square().sum())
    return min(1.0, max(0.0, float((gap * -b).sum()) / length)) if length else 0.5


__all__ = ["Dop", "Opcm", "nearest_to_both", "orthogonal_part", "truncated"]
