"""Orthogonal rows: random ones, and penalties on rows that are not orthogonal.

CODA-Prompt draws its prompts and keys so, and O-LoRA keeps the inputs of its updates apart.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Penalty = Literal["sum", "squares", "cosine"]


def orthonormal(before: Tensor, count: int) -> Tensor:
    """Return `count` random orthonormal rows orthogonal to the rows `before` [k, W]; k + count must not exceed W."""
    basis = torch.linalg.qr(before.double().t()).Q
    rows = torch.randn(before.shape[1], count, dtype=torch.float64)
    for _ in range(2):  # once more for what rounding left
        rows = torch.linalg.qr(rows - basis @ (basis.t() @ rows)).Q
    return rows.t().float()


def deviation(rows: Tensor) -> Tensor:
    """Return the sum over blocks of the mean square [] of Z Z' - I, for rows Z [blocks, M, W]."""
    gram = rows @ rows.transpose(1, 2)
    identity = torch.eye(gram.shape[1], device=gram.device)
    total: Tensor = (gram - identity).square().mean(dim=(1, 2)).sum()
    return total


def overlap(downs: list[Tensor], penalty: Penalty) -> Tensor:
    """Return the penalty [] of the products A_i A_t' [r_i, r_t] of older maps with the newest one.

    "sum": the sum of their absolute values (public code of O-LoRA). "squares": the sum of their squares (paper).
    "cosine": the mean of the absolute cosines of their rows. It is 0 without older maps.

    Args:
        downs: A_i [r_i, n] of one layer; the newest is last.
        penalty: see above.
    """
    *older, newest = downs
    if not older:
        return newest.new_zeros(())
    before = torch.cat(older).detach()
    if penalty == "cosine":
        return (F.normalize(before, dim=1) @ F.normalize(newest, dim=1).t()).abs().mean()
    product = before @ newest.t()
    return product.square().sum() if penalty == "squares" else product.abs().sum()


__all__ = ["Penalty", "deviation", "orthonormal", "overlap"]
