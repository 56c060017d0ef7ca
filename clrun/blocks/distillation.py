"""What a learner keeps of its former self on the data of now: outputs, codes of features, pooled attention maps.

Shapes: `B` rows of a batch, `C` classes, `D` feature width, `H` maps of a block (attention heads),
`n` tokens, `m` columns of a map, `h` units of a code.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pool = Literal["height", "width", "spatial", "gap", "pixel"]


class Teacher:
    """A frozen copy of backbone and head in eval mode: it answers alike whatever the rest of a batch is.

    It is no module: not a weight of the learner, never trained, averaged over processes or exported. Made when a task
    begins, from a learner that is on its device, and dropped when it ends.

    Args:
        backbone: maps prepared images to features [B, D].
        head: maps features to logits [B, C].
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        self.backbone = deepcopy(backbone).eval().requires_grad_(False)
        self.head = deepcopy(head).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return features [B, D] and logits [B, C] of prepared x, the very tensors that the student sees."""
        features = self.backbone(x)
        return features, self.head(features)


def head_groups(members: Tensor, *, per_head: bool) -> list[Tensor]:
    """Return the classes ([k] long) of each group that shares a softmax: one for each head, or all heads together.

    Args:
        members: [tasks, C] bool, the classes of each task that has a head.
        per_head: one group for each head; tasks of the same classes (domain-incremental) share theirs.
    """
    groups = torch.unique(members, dim=0) if per_head else members.any(dim=0, keepdim=True)
    return [group.nonzero()[:, 0] for group in groups]


def distillation_loss(logits: Tensor, target: Tensor, groups: Sequence[Tensor], *, tau: float) -> Tensor:
    """Return the mean over rows of sum_g KL(softmax(target_g / tau) || softmax(logits_g / tau)), [].

    Differs from the cross-entropy of Li & Hoiem (1606.09282), whose p^(1 / tau), renormalised, is this softmax, by the
    entropy of the targets, which has no gradient: it is 0 where both agree. No factor tau^2, as there.

    Args:
        logits: [B, C] of the student.
        target: [B, C] of the teacher, without gradient.
        groups: classes of each softmax.
        tau: temperature.
    """
    total = torch.zeros((), device=logits.device)
    for size in sorted({len(classes) for classes in groups}):  # groups of one size at once: many tasks cost no more
        columns = torch.stack([classes for classes in groups if len(classes) == size])
        now = (logits[:, columns].float() / tau).log_softmax(dim=-1)
        then = (target[:, columns].float() / tau).log_softmax(dim=-1)
        total = total + F.kl_div(now, then, reduction="batchmean", log_target=True)
    return total


def code_loss(now: Tensor, then: Tensor) -> Tensor:
    """Return the mean over rows of the squared distance between two codes [B, h], [] (mean over h: divide by h)."""
    return (now.float() - then.float()).square().sum(dim=1).mean()


class Encoder(nn.Module):
    """code = sigmoid(E f + e), initialised as `nn.Linear` is.

    Args:
        num_features: D.
        code_size: h.
    """

    def __init__(self, num_features: int, code_size: int) -> None:
        super().__init__()
        layer = nn.Linear(num_features, code_size)
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, features: Tensor) -> Tensor:
        """Return codes [B, h] of features [B, D]."""
        return F.linear(features, self.weight, self.bias).sigmoid()


class CodeAutoencoder(nn.Module):
    """An undercomplete autoencoder of features, linear from the code on.

    Args:
        num_features: D.
        code_size: h.
    """

    def __init__(self, num_features: int, code_size: int) -> None:
        super().__init__()
        self.encoder = Encoder(num_features, code_size)
        self.decoder = nn.Linear(code_size, num_features)

    def forward(self, features: Tensor) -> Tensor:
        """Return the reconstruction [B, D] of features [B, D]."""
        reconstruction: Tensor = self.decoder(self.encoder(features))
        return reconstruction


# --- maps


def attention_scores(attention: nn.Module, qkv: Tensor) -> Tensor:
    """Return the scaled scores before the softmax, [B, H, n, n], of a timm `Attention` whose `qkv` gave [B, n, 3 D].

    Computed beside the attention, which may stay fused.
    """
    batch, tokens, _ = qkv.shape
    queries, keys, _ = qkv.reshape(batch, tokens, 3, int(attention.num_heads), -1).permute(2, 0, 3, 1, 4)  # type: ignore[arg-type]
    scores: Tensor = attention.q_norm(queries) * attention.scale @ attention.k_norm(keys).transpose(-2, -1)  # type: ignore[operator]
    return scores


def pooled(maps: Tensor, pool: Pool) -> Tensor:
    """Return a vector of length 1 for each row, [B, -], of maps [B, H, n, m].

    Args:
        maps: one block's maps.
        pool: "height" sums over n, "width" over m, "spatial" has both side by side, "gap" is the mean of each map,
            "pixel" leaves the map as it is.
    """
    maps = maps.float()
    if pool == "height":
        vectors = maps.sum(dim=2)
    elif pool == "width":
        vectors = maps.sum(dim=3)
    elif pool == "spatial":
        vectors = torch.cat([maps.sum(dim=2), maps.sum(dim=3)], dim=-1)
    elif pool == "gap":
        vectors = maps.mean(dim=(2, 3))
    else:
        vectors = maps
    return F.normalize(vectors.flatten(1), dim=1)


def pooled_distance(now: Tensor, then: Tensor, *, pool: Pool, symmetric: bool) -> Tensor:
    """Return the distance [] of one block's maps [B, H, n, m] from the teacher's (Pelosin et al., 2203.13167).

    Symmetric: mean_rows |a - b| of the pooled squares. Asymmetric: mean_rows |relu(a - b)| of the pooled maps, a the
    teacher's: only what was lost counts.
    """
    if symmetric:
        now, then = now.float().square(), then.float().square()
    lost = pooled(then, pool) - pooled(now, pool)
    distance: Tensor = torch.linalg.vector_norm(lost if symmetric else lost.relu(), dim=1).mean()
    return distance
