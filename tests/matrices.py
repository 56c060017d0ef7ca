"""References for tests: curvatures as matrices, and transformers with injected updates folded into their weights."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clrun.blocks.curvature import Curvature
from clrun.blocks.inject import Plan, ScaleShift
from clrun.blocks.lora import QkvLoRA


@dataclass(frozen=True, eq=False)
class Dense(Curvature):
    """K as a matrix [P, P]: the form that all others are compared with."""

    matrix: Tensor

    def mv(self, vector: Tensor) -> Tensor:
        return self.matrix @ vector

    def inverse(self, damping: float, mode: str = "exact") -> "Dense":
        return Dense(self.shapes, torch.linalg.inv(self.matrix + damping * torch.eye(self.size).to(self.matrix)))

    def diag(self) -> Tensor:
        return self.matrix.diagonal()

    def scale(self, factor: float) -> "Dense":
        return Dense(self.shapes, factor * self.matrix)

    def add(self, other: Curvature, how: str = "kl") -> "Dense":
        assert isinstance(other, Dense)
        return Dense(self.shapes, self.matrix + other.matrix)


def as_dense(k: Curvature) -> Tensor:
    """The matrix [P, P] of a curvature, from its products with unit vectors."""
    columns = torch.eye(k.size, dtype=k.diag().dtype)
    return torch.stack([k.mv(column) for column in columns], dim=1)


def stored_bytes(k: Curvature) -> int:
    """Bytes of all tensors of a curvature."""
    found: list[int] = []
    k.apply(lambda tensor: found.append(tensor.nbytes) or tensor)
    return sum(found)


def lora_matrix(update: QkvLoRA) -> Tensor:
    """The change [3 D, D] to the weight of `qkv` that has the effect of a LoRA of keys and values."""
    assert update.parts == "kv" and update.scale is not None
    key, value = update.scale[:, None, None] * (update.up @ update.down)
    return torch.cat([torch.zeros_like(key), key, value])


def folded(vit: nn.Module, plan: Plan) -> nn.Module:
    """A copy of `vit` whose weights contain the LoRA and SSF of a plan."""
    assert not (plan.tokens or plan.prefix or plan.sequential or plan.beside_mlp)
    merged = copy.deepcopy(vit)
    with torch.no_grad():
        for path, update in plan.parallel.items():
            assert isinstance(update, QkvLoRA)
            merged.get_submodule(path).weight += lora_matrix(update)
        for path, scale in plan.scaled.items():
            assert isinstance(scale, ScaleShift)
            module: Any = merged.get_submodule(path)
            if path == "patch_embed":
                module = module.proj if isinstance(module.norm, nn.Identity) else module.norm
            bias = torch.zeros_like(scale.shift) if module.bias is None else module.bias
            module.weight.mul_(scale.scale.view(-1, *[1] * (module.weight.dim() - 1)))
            module.bias = nn.Parameter(scale.scale * bias + scale.shift)
    return merged
