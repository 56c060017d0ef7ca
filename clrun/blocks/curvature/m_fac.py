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


__all__ = ["GradientWindow"]
