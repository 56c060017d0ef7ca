"""Losses on logits over all C classes, restricted to the classes that compete."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_cross_entropy(logits: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Return the mean cross-entropy [] over the classes allowed by `mask`.

    Args:
        logits: [B, C].
        y: [B] long, class ids; each must be allowed for its sample, otherwise the loss is infinite.
        mask: [B, C] or [C] bool, True for classes that compete.
    """
    return F.cross_entropy(logits.masked_fill(~mask, float("-inf")), y)


def task_mean_cross_entropy(logits: Tensor, y: Tensor, t: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over tasks of the mean cross-entropy of their rows, []: every task counts alike.

    Args:
        logits: [B, C].
        y: [B] long, class ids.
        t: [B] long, position of each row's task; those that occur count.
        mask: [B, C] bool, True for classes that compete.
    """
    rows = F.cross_entropy(logits.masked_fill(~mask, float("-inf")), y, reduction="none")
    tasks, own, counts = torch.unique(t, return_inverse=True, return_counts=True)
    mean: Tensor = (rows / counts[own]).sum() / len(tasks)
    return mean


def masked_binary_cross_entropy(
    logits: Tensor, targets: Tensor, mask: Tensor, *, reduction: Literal["sum", "mean"]
) -> Tensor:
    """Return the binary cross-entropy [] of independent sigmoids, over the entries allowed by `mask`.

    Args:
        logits: [B, C].
        targets: [B, C], probabilities.
        mask: [B, C] bool, True for entries that count.
        reduction: over the classes of a row: "sum", then the mean over rows; "mean": over all entries that count.
    """
    terms = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none") * mask
    return terms.sum() / (len(logits) if reduction == "sum" else mask.sum())
