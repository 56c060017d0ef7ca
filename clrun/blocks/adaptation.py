"""Adaptation of a frozen transformer to the first task only: the first session of APER and phase 1 of RanPAC.

Shapes: `B` images, `D` width, `C` classes.
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from clrun.blocks.inject import Injector, Plan, ScaleShift, mlp_adapters, require_blocks, require_vit, scale_shift_sites
from clrun.data.split import Batch
from clrun.learning.heads import CosineHead
from clrun.learning.losses import masked_cross_entropy

Kind = Literal["finetune", "vpt_shallow", "vpt_deep", "ssf", "adapter"]


@dataclass(frozen=True)
class Recipe:
    """Kind of adaptation and the initial values of its parameters.

    Attributes:
        kind: what is trained. "vpt_shallow": prompts at the input; "vpt_deep": prompts at the input of every block;
            both start at 0. "ssf": scales and shifts of outputs. "adapter": adapters beside the MLPs. "finetune": a
            copy of the transformer.
        length: number of prompts per block with prompts.
        bottleneck: width of the adapters.
        adapter_scale: constant factor of the output of an adapter.
        dropout: probability with which an activation of an adapter is dropped in training.
        ssf_std: standard deviation of the initial scales around 1 and of the initial shifts around 0.
        cosine_scale: initial value of the trained factor of the cosine head.
    """

    kind: Kind
    length: int
    bottleneck: int
    adapter_scale: float
    dropout: float
    ssf_std: float
    cosine_scale: float


class Adaptation(nn.Module):
    """The parameters that are trained on the first task, with a cosine head that is dropped when the task ends.

    The transformer is not stored here and not changed; `features` has it as an argument.

    Args:
        vit: the transformer; a timm `VisionTransformer` for prompts, and any timm transformer with `blocks` otherwise.
        num_classes: C.
        recipe: the kind of adaptation.
        method: name of the method, for messages.

    Raises:
        ConfigError: the transformer does not support this kind.
    """

    def __init__(self, vit: nn.Module, num_classes: int, recipe: Recipe, *, method: str) -> None:
        super().__init__()
        kind = recipe.kind
        require = require_vit if kind in ("vpt_shallow", "vpt_deep") else require_blocks
        require(vit, method)
        depth, width = len(vit.blocks), int(vit.embed_dim)  # type: ignore[arg-type]
        self.injector = Injector()
        self.adapters, self.scales, self.prompts = nn.ModuleDict(), nn.ModuleDict(), nn.ParameterList()
        self.sites: list[str] = []
        self.copied = nn.ModuleList()
        if kind == "finetune":
            self.copied.append(copy.deepcopy(vit).requires_grad_(True))
        elif kind == "adapter":
            self.adapters = mlp_adapters(
                depth, width, recipe.bottleneck, scale=recipe.adapter_scale, dropout=recipe.dropout
            )
        elif kind == "ssf":
            widths = scale_shift_sites(vit)
            self.sites = list(widths)
            scales = {p.replace(".", "_"): ScaleShift(w, std=recipe.ssf_std) for p, w in widths.items()}
            self.scales = nn.ModuleDict(scales)
        else:
            blocks = depth if kind == "vpt_deep" else 1
            self.prompts.extend(nn.Parameter(torch.zeros(recipe.length, width)) for _ in range(blocks))
        self.head: CosineHead | None = CosineHead(width, num_classes, scale=float(recipe.cosine_scale))

    @property
    def done(self) -> bool:
        """Whether the first task is over, so that the features no longer change."""
        return self.head is None

    def begin(self, classes: Tensor) -> None:
        """Initialise the rows of the cosine head for the `classes` [k] of the first task."""
        assert self.head is not None, "there is only one first task"
        self.head.grow(classes)

    def loss(self, vit: nn.Module, batch: Batch, mask: Tensor) -> Tensor:
        """Return the cross-entropy [] of the cosine head over the classes of `mask` [B, C]."""
        assert self.head is not None, "the first task is over"
        return masked_cross_entropy(self.head(self.features(vit, batch.x)), batch.y, mask)

    def end(self) -> None:
        """Freeze all parameters and drop the cosine head."""
        self.head = None
        self.requires_grad_(False)

    def features(self, vit: nn.Module, x: Tensor) -> Tensor:
        """Return the features [B, D] of the adapted transformer for prepared images x."""
        if self.copied:
            features: Tensor = self.copied[0](x)
            return features
        with self.injector.use(vit, self.plan()):
            features = vit(x)
        return features

    def release(self) -> None:
        """Remove the hooks that a training step under gradient checkpointing has left."""
        self.injector.release()

    def plan(self) -> Plan:
        """Return the plan that injects the parameters into a forward pass."""
        return Plan(
            tokens=dict(enumerate(self.prompts)),
            beside_mlp={int(block): module for block, module in self.adapters.items()},
            scaled=dict(zip(self.sites, self.scales.values(), strict=True)),
        )


__all__ = ["Adaptation", "Kind", "Recipe"]
