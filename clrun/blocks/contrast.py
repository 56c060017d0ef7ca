"""A contrast between the features of a batch and the means of earlier classes, which MOS and HiDe-Prompt use."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Space = Literal["raw", "cosine"]
TEMPERATURE = 0.8


def contrast(features: Tensor, means: Tensor, *, space: Space, temperature: float = TEMPERATURE) -> Tensor:
    """Return the mean cross-entropy [] of the rows of M M' / temperature with themselves, M = [means; features].

    Every row is pushed away from all other rows, those of its own class included. With space="raw", as in the public
    codes, rows are not normalised: from a feature norm of about 10 on, the loss and its gradient are 0 in float32,
    because the product of a row with itself exceeds all others by far.

    Args:
        features: [B, D] of a batch.
        means: [M, D] of earlier classes, or of their centroids; may be empty.
        space: "raw", or "cosine" for rows of length 1.
        temperature: divisor of the products.
    """
    with torch.autocast(features.device.type, enabled=False):
        rows = torch.cat([means.to(features.device, torch.float32), features.float()])
        if space == "cosine":
            rows = F.normalize(rows, dim=1)
        products = F.linear(rows, rows) / temperature
        own = torch.arange(len(rows), device=rows.device)
        return -products.log_softmax(dim=1)[own, own].mean()


__all__ = ["Space", "contrast"]
