"""The directions that a layer's inputs take in old tasks: what gradients and updates of later tasks must not use.

A change dW of a weight leaves the outputs for old inputs x as they are if dW x = 0. GPM (Saha et al., ICLR 2021, arXiv
2103.09762) keeps an orthonormal basis M of most of the old inputs and projects dW onto the rest, dW (I - M M').

Shapes: `d` inputs of a layer, `k` protected directions, C [d, d] second moments of inputs (`clrun.blocks.moments`).
"""

from typing import Literal

import torch
from torch import Tensor

from clrun.blocks.params import Carrier

Energy = Literal["plain", "squared"]
First = Literal["below", "reach"]
RELATIVE = 1e-6  # of the largest singular value: directions with smaller ones are rounding


class InputSpace(Carrier):
    """An orthonormal basis of the protected directions of a layer's inputs, in float64.

    With P the projection onto them, R the inputs as columns and m their number, C = R R' / m. The share of an input's
    energy is that of the squared singular values of R for energy="plain", which are m times the eigenvalues of C (GPM);
    and of their fourth powers for energy="squared": InfLoRA gives C to the routine that GPM gives R to, and thereby
    squares again. This protects far fewer directions for the same share.

    Memory: 8 d k bytes, and with `dual` 8 d min(k, d - k).

    Args:
        width: d.
        energy: "plain" or "squared".
        dual: as soon as k > d / 2, store a basis of the rest instead, which is smaller (DualGPM, Liang and Li, CVPR
            2023). The projection is the same.
        at_least: smallest number of directions that the first update protects; 1 in InfLoRA, 0 in GPM.
        first: number of directions of the first update, see `update`.

    Attributes:
        basis: [d, k], or [d, d - k] if `complement`.
        complement: whether the basis is that of the rest.
        started: whether there was an update.
    """

    def __init__(self, width: int, *, energy: Energy, dual: bool, at_least: int, first: First = "below") -> None:
        super().__init__()
        self.width, self.energy, self.dual, self.at_least = width, energy, dual, at_least
        self.first: First = first
        self.basis = torch.zeros(width, 0, dtype=torch.float64)
        self.complement, self.started = False, False

    @property
    def dimension(self) -> int:
        """The number k of protected directions."""
        stored = self.basis.shape[1]
        return self.width - stored if self.complement else stored

    def outside(self, rows: Tensor) -> Tensor:
        """Return the part of rows [..., d] that is orthogonal to the protected directions, in the type of `rows`."""
        basis = self.basis.to(rows)
        inside = rows @ basis @ basis.t()
        return inside if self.complement else rows - inside

    def remainder(self, moments: Tensor) -> Tensor:
        """Return (I - P) C [d, d] float64 for the second moments C."""
        moments = moments.to(self.basis)
        inside = self.basis @ (self.basis.t() @ moments)
        return inside if self.complement else moments - inside

    def leading(self, moments: Tensor, rank: int) -> Tensor:
        """Return the first left singular vectors of (I - P) C as rows [rank, d] float64, orthogonal to all protected.

        Rows whose singular value is only rounding are 0: such vectors are arbitrary, and may be protected ones.

        Args:
            moments: C.
            rank: number of rows.
        """
        rest = self.remainder(moments)
        vectors, values, _ = torch.linalg.svd(rest)
        floor = max(RELATIVE * float(values[0]), 1e-12 * float(moments.to(rest).norm()))
        useful = min(rank, int((values > floor).sum()), self.width - self.dimension)
        rows = rest.new_zeros(rank, self.width)
        rows[:useful] = self.outside(vectors[:, :useful].t())
        return rows

    def covered(self, moments: Tensor) -> float:
        """Return the share of the energy of C that is in the protected directions."""
        _, energies, total = self._spectrum(moments.to(self.basis))
        return 1 - float(energies.sum()) / total if total else 1.0

    def update(self, moments: Tensor, share: float) -> int:
        """Protect further directions, and return their number.

        Directions are added until the energy in all protected ones reaches `share`. In the first update with
        first="below" these are the leading directions as long as the energy they have together is below `share`, as in
        the codes of GPM and InfLoRA: one less than reaches it.

        Args:
            moments: C.
            share: epsilon.
        """
        moments = moments.to(self.basis)
        vectors, energies, total = self._spectrum(moments)
        sums = energies.cumsum(0) / (total or 1.0)
        useful = int((energies > RELATIVE**2 * float(energies.max())).sum()) if total else 0
        if not self.started and self.first == "below":
            count = int((sums < share).sum())
        else:
            start = 1 - float(sums[-1])
            count = 0 if start >= share else int((start + sums < share).sum()) + 1
        if not self.started:
            count = max(count, self.at_least)
        count = min(count, useful, self.width - self.dimension)
        self.started = True
        if count:
            self._protect(vectors[:, :count])
        if self.dual and not self.complement and self.dimension > self.width / 2:
            full = torch.linalg.svd(self.basis, full_matrices=True).U
            self.basis, self.complement = full[:, self.basis.shape[1] :].contiguous(), True
        return count

    def _spectrum(self, moments: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return the directions [d, d] of what is not protected, their energies [d], descending, and that of all C."""
        rest = self.remainder(moments)
        if self.energy == "squared":
            vectors, values, _ = torch.linalg.svd(rest)
            return vectors, values.square(), float(moments.square().sum())
        values, vectors = torch.linalg.eigh(self.outside(rest))  # (I - P) C (I - P)
        return vectors.flip(1), values.flip(0).clamp(min=0), float(moments.trace())

    def _protect(self, vectors: Tensor) -> None:
        """Add directions [d, r], which are orthogonal to the protected ones up to rounding."""
        if self.complement:
            left = self.basis.shape[1] - vectors.shape[1]
            rest = self.basis - vectors @ (vectors.t() @ self.basis)
            self.basis = torch.linalg.svd(rest, full_matrices=False).U[:, :left].contiguous()
            return
        new = torch.linalg.qr(vectors - self.basis @ (self.basis.t() @ vectors)).Q
        self.basis = torch.cat([self.basis, new], dim=1)


__all__ = ["Energy", "First", "InputSpace"]
