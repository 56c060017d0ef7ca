"""Losses on logits over all C classes, restricted to the classes that compete."""

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
