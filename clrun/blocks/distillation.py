"""Distillation from a frozen copy of the method: losses on logits, on codes of features and on pooled attention maps.

Shapes: `B` rows of a batch, `C` classes, `D` feature width, `H` maps of a block (one per attention head), `n` tokens
(rows of a map), `m` columns of a map, `h` units of a code.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pool = Literal["height", "width", "spatial", "gap", "pixel"]


class Teacher:
    """A frozen copy of a backbone and a head in eval mode, so that its output for a row is independent of the batch.

    It is not a module: its weights are no weights of the method, and they are never trained, averaged over processes or
    exported. It is made when a task begins, from modules that are on their device, and dropped when the task ends.

    Args:
        backbone: maps prepared images to features [B, D].
        head: maps features to logits [B, C].
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        self.backbone = deepcopy(backbone).eval().requires_grad_(False)
        self.head = deepcopy(head).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features [B, D] and logits [B, C] of prepared rows x, the same tensor as for the student."""
        features = self.backbone(x)
        return features, self.head(features)


def head_groups(members: Tensor, *, per_head: bool) -> list[Tensor]:
    """Return the classes ([k] long) of each softmax: one softmax per head, or one over the classes of all heads.

    Args:
        members: [tasks, C] bool, the classes of each task that has a head.
        per_head: one softmax per head; tasks with the same classes (domain-incremental) have one head.
    """
    groups = torch.unique(members, dim=0) if per_head else members.any(dim=0, keepdim=True)
    return [group.nonzero()[:, 0] for group in groups]


def distillation_loss(logits: Tensor, target: Tensor, groups: Sequence[Tensor], *, tau: float) -> Tensor:
    """Return the mean over rows of sum_g KL(softmax(target_g / tau) || softmax(logits_g / tau)), [].

    Li and Hoiem (arXiv 1606.09282) use the cross-entropy of the probabilities p^(1 / tau), renormalised, which equal
    this softmax. The divergence differs from that cross-entropy by the entropy of the targets, which has no gradient,
    and is 0 where student and teacher agree. As in their paper there is no factor tau^2.

    Args:
        logits: logits of the student [B, C].
        target: logits of the teacher [B, C], without gradient.
        groups: classes of each softmax, see `head_groups`.
        tau: temperature.
    """
    total = torch.zeros((), device=logits.device)
    for size in sorted(
        {len(classes) for classes in groups}
    ):  # one call per size: its cost does not grow with the tasks
        columns = torch.stack([classes for classes in groups if len(classes) == size])
        student = (logits[:, columns].float() / tau).log_softmax(dim=-1)
        teacher = (target[:, columns].float() / tau).log_softmax(dim=-1)
        total = total + F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return total


def code_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean [] over rows of the squared distance between two codes [B, h], summed over the h units."""
    return (student.float() - teacher.float()).square().sum(dim=1).mean()


class Encoder(nn.Module):
    """The code sigmoid(E f + e) of features f, with E and e initialised as in `nn.Linear`.

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
    """An autoencoder of features with a code narrower than the features and a linear decoder.

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
    """Return the scaled attention scores before the softmax [B, H, n, n] of a timm `Attention`.

    They are computed in addition to the attention itself, which may be fused.

    Args:
        attention: the module.
        qkv: output of its projection `qkv` [B, n, 3 D].
    """
    batch, tokens, _ = qkv.shape
    queries, keys, _ = qkv.reshape(batch, tokens, 3, int(attention.num_heads), -1).permute(2, 0, 3, 1, 4)  # type: ignore[arg-type]
    scores: Tensor = attention.q_norm(queries) * attention.scale @ attention.k_norm(keys).transpose(-2, -1)  # type: ignore[operator]
    return scores


def pooled(maps: Tensor, pool: Pool) -> Tensor:
    """Return the pooled maps of each row as a vector of Euclidean length 1, [B, ...].

    Args:
        maps: maps of one block [B, H, n, m].
        pool: "height" sums over n, "width" sums over m, "spatial" concatenates both, "gap" takes the mean of each map,
            "pixel" takes all entries.
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


def pooled_distance(student: Tensor, teacher: Tensor, *, pool: Pool, symmetric: bool) -> Tensor:
    """Return the mean distance [] between the pooled maps of student and teacher (Pelosin et al., arXiv 2203.13167).

    Args:
        student: maps of one block of the student [B, H, n, m].
        teacher: maps of the same block of the teacher.
        pool: see `pooled`.
        symmetric: take the length of a - b, where a and b are the pooled squares of the teacher's and the student's
            maps. Otherwise take the length of relu(a - b) for the pooled maps themselves, so that only attention that
            the student has lost counts.
    """
    if symmetric:
        student, teacher = student.float().square(), teacher.float().square()
    lost = pooled(teacher, pool) - pooled(student, pool)
    distance: Tensor = torch.linalg.vector_norm(lost if symmetric else lost.relu(), dim=1).mean()
    return distance
