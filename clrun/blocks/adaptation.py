"""Adapting a frozen transformer to the first task and leaving it so: the first session of APER, phase 1 of RanPAC.

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
    """What is adapted, and how it begins.

    Attributes:
        kind: prompts at the input ("vpt_shallow") or of every block ("vpt_deep"), which begin at 0; scales and shifts
            ("ssf"); adapters beside the MLPs ("adapter"); a copy of the transformer that is trained ("finetune").
        length: prompts, of each block that has some.
        bottleneck: width of adapters.
        adapter_scale: factor of an adapter's output, not trained.
        dropout: share of an adapter's activations dropped in training.
        ssf_std: of the initial scales about 1 and shifts about 0.
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
    """What is trained on the first task, with a cosine head that is thrown away when it ends.

    The transformer itself is not kept here and not changed: `features` is given it.

    Args:
        vit: the transformer; a timm `VisionTransformer` for prompts, else any of timm's with `blocks`.
        num_classes: C.
        recipe: what is adapted.
        method: who asks, for messages.

    Raises:
        ConfigError: the transformer cannot take it.
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
        """Whether the first task is over: nothing changes any more."""
        return self.head is None

    def begin(self, classes: Tensor) -> None:
        """Make rows of the cosine head for the `classes` [k] of the first task."""
        assert self.head is not None, "a first task begins once"
        self.head.grow(classes)

    def loss(self, vit: nn.Module, batch: Batch, mask: Tensor) -> Tensor:
        """Return the cross-entropy [] of the cosine head over the classes of `mask` [B, C]."""
        assert self.head is not None, "training is over"
        return masked_cross_entropy(self.head(self.features(vit, batch.x)), batch.y, mask)

    def end(self) -> None:
        """Freeze what was trained and drop the cosine head."""
        self.head = None
        self.requires_grad_(False)

    def features(self, vit: nn.Module, x: Tensor) -> Tensor:
        """Return the features [B, D] of the adapted transformer."""
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
        """Return what is injected."""
        return Plan(
            tokens=dict(enumerate(self.prompts)),
            beside_mlp={int(block): module for block, module in self.adapters.items()},
            scaled=dict(zip(self.sites, self.scales.values(), strict=True)),
        )


__all__ = ["Adaptation", "Kind", "Recipe"]
