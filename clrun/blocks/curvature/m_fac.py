"""The inverse of an empirical Fisher matrix of few gradients, without forming the matrix.

Source: M-FAC (Frantar et al., NeurIPS 2021, arXiv 2107.03356), in its dynamic form for optimizers. By Woodbury's
identity every product with the inverse needs one Cholesky factor of a matrix [m, m] for m gradients; the published
recursions give the same numbers and are worse conditioned.
"""

import torch
from torch import Tensor


class GradientWindow:
    """The last m gradients g_i [P], and products with the inverse of F = damping I + 1/m sum_i g_i g_i'.

    Before m gradients have been inserted, the missing ones count as zeros and the sum is still divided by m, as in the
    published code: the first steps are therefore closer to gradient descent. Inserting a gradient costs O(m P) for a
    row of the Gram matrix of the gradients, and a product costs O(m^3) for its Cholesky factor.

    Args:
        length: the number m of gradients.
        size: the number P of parameters.
        damping: positive.
        like: a tensor with the dtype and device of the gradients.
    """

    def __init__(self, length: int, size: int, damping: float, like: Tensor) -> None:
        self.gradients = like.new_zeros(length, size)
        self.gram = torch.zeros(length, length, dtype=torch.float64, device=like.device)
        self.damping, self.length, self.next = damping, length, 0

    def insert(self, gradient: Tensor) -> None:
        """Replace the oldest gradient by `gradient` [P]."""
        self.gradients[self.next] = gradient
        products = (self.gradients @ gradient).double()
        self.gram[self.next] = self.gram[:, self.next] = products
        self.next = (self.next + 1) % self.length

    def solve(self, vector: Tensor) -> Tensor:
        """Return F^-1 v [P] for a vector v [P]."""
        identity = torch.eye(self.length, dtype=self.gram.dtype, device=self.gram.device)
        factor = torch.linalg.cholesky(self.gram + self.length * self.damping * identity)
        coefficients = torch.cholesky_solve((self.gradients @ vector).double()[:, None], factor)[:, 0]
        return (vector - self.gradients.T @ coefficients.to(vector.dtype)) / self.damping


class BlockInverse:
    """The inverse of F = damping I + 1/m sum_i g_i g_i' for consecutive blocks of parameters, each with its own F.

    One Cholesky factor [m, m] per block gives every entry: with K = m damping I + G G' = L L' and V = L^-1 G, the
    inverse is (I - V' V) / damping. All is in float64, because damping is small.

    Args:
        gradients: G of each block [blocks, m, size].
        damping: positive.

    Raises:
        torch.linalg.LinAlgError: the gradients depend on each other, and the damping is too small for an inverse.
    """

    def __init__(self, gradients: Tensor, damping: float) -> None:
        self.damping = damping
        rows = gradients.double()
        gram = rows @ rows.mT
        gram.diagonal(dim1=1, dim2=2).add_(gradients.shape[1] * damping)
        self.half = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), rows, upper=False)

    def diagonal(self) -> Tensor:
        """Return the diagonal of each inverse [blocks, size]."""
        found: Tensor = (1 - self.half.square().sum(dim=1)) / self.damping
        return found

    def block(self, number: int) -> Tensor:
        """Return the inverse of one block [size, size]."""
        half = self.half[number]
        identity = torch.eye(half.shape[1], dtype=half.dtype, device=half.device)
        found: Tensor = (identity - half.T @ half) / self.damping
        return found


__all__ = ["BlockInverse", "GradientWindow"]
