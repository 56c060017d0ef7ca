"""Which prompts an image gets: cosines between its query and learned keys, and the best of them.

Shapes: `B` images, `M` keys, `D` width.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Selection = Literal["instance", "batch"]


def cosines(query: Tensor, keys: Tensor) -> Tensor:
    """Return [B, M], the cosines of queries [B, D] with keys [M, D], in fp32 whatever the precision of the run."""
    with torch.autocast(query.device.type, enabled=False):
        return F.linear(F.normalize(query.float(), dim=1), F.normalize(keys.float(), dim=1))


def choose(scores: Tensor, count: int, selection: Selection) -> Tensor:
    """Return [B, count] long, the columns with the highest scores [B, M].

    Args:
        scores: higher is better.
        count: columns to choose.
        selection: "instance" chooses for each image. "batch" gives all images the columns that most of them would
            choose (the smallest index among equals), as published code of L2P, DualPrompt and DAP does: what an image
            gets then depends on the others.
    """
    best = scores.topk(count, dim=1).indices
    if selection == "batch":
        votes = torch.bincount(best.flatten(), minlength=scores.shape[1])
        best = votes.argsort(descending=True, stable=True)[:count].expand(len(scores), -1)
    return best


__all__ = ["Selection", "choose", "cosines"]
