"""Choice of the prompts of an image by the cosines between its query and learned keys.

Shapes: `B` images, `M` keys, `D` width.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Selection = Literal["instance", "batch"]


def cosines(query: Tensor, keys: Tensor) -> Tensor:
    """Return the cosines [B, M] between queries [B, D] and keys [M, D], in float32 even under autocast."""
    with torch.autocast(query.device.type, enabled=False):
        return F.linear(F.normalize(query.float(), dim=1), F.normalize(keys.float(), dim=1))


def choose(scores: Tensor, count: int, selection: Selection) -> Tensor:
    """Return the indices [B, count] long of the chosen prompts.

    Args:
        scores: scores of all prompts [B, M]; higher is better.
        count: number of prompts per image.
        selection: "instance": the prompts with the highest scores of each image. "batch": all images have the prompts
            that are chosen by most images (the smallest index among equals), as in the published code of L2P,
            DualPrompt and DAP. The choice for an image then depends on the other images of the batch.
    """
    best = scores.topk(count, dim=1).indices
    if selection == "batch":
        votes = torch.bincount(best.flatten(), minlength=scores.shape[1])
        best = votes.argsort(descending=True, stable=True)[:count].expand(len(scores), -1)
    return best


__all__ = ["Selection", "choose", "cosines"]
