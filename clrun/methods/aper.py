"""APER (ADAM): adapt on the first task, then prototypes of both models (Zhou et al., IJCV 2024, arXiv 2303.07338).

Memory between tasks: what adapts (L D, n L D, 22 D n + 4 D or n (2 D r + r + D) floats; "finetune" a second backbone),
C (16 D + 8) bytes of sums (twice that once a class comes in a second domain), 8 C D of prototypes. Task id: not needed.
"""

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from clrun.blocks.heads import CosineHead, PrototypeHead
from clrun.blocks.inject import Plan, ScaleShift, mlp_adapters, scale_shift_sites
from clrun.blocks.losses import masked_cross_entropy
from clrun.blocks.params import eval_mode
from clrun.blocks.statistics import ClassStats
from clrun.data.split import Batch
from clrun.data.stream import Task
from clrun.errors import Count, Fraction, NonNegative, Positive, PositiveInt
from clrun.method import freeze
from clrun.methods.prompted import Prompted, scaled
from clrun.training import Context, fit

Adaptation = Literal["finetune", "vpt_shallow", "vpt_deep", "ssf", "adapter"]


class Aper(Prompted):
    """Prototypes in the features of the plain model and of one adapted to the first task.

    The first task trains the adaptation and a cosine head that is thrown away; then everything is frozen. The
    classifier row of a class is the mean of [plain feature; adapted feature], un-normalised, over its training images
    in the eval view; the score is the cosine. A class that comes in several domains has the mean over all of them.

    What the first task holds decides what is adapted: results depend on the task order through it, and only through it.

    Args:
        backbone: a timm vision transformer (without prompts: any of timm's with `blocks`), frozen; "finetune" trains a
            copy.
        num_classes: C.
        adaptation: what the first task trains.
        length: L, prompts of VPT, which begin at 0.
        bottleneck: r of adapters.
        adapter_scale: factor of an adapter's output, not trained.
        dropout: share of an adapter's activations dropped in training.
        ssf_std: of the initial scales about 1 and shifts about 0.
        cosine_scale: initial value of the trained factor of the cosine head; the published 1 gives tiny gradients.
        lr_scale: factor of the budget's learning rate.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        adaptation: Adaptation,
        length: Count,
        bottleneck: PositiveInt,
        adapter_scale: float,
        dropout: Fraction,
        ssf_std: NonNegative,
        cosine_scale: Positive,
        lr_scale: Positive,
    ) -> None:
        tokens = adaptation in ("vpt_shallow", "vpt_deep")
        super().__init__(backbone, num_classes, lr_scale=lr_scale, mask_loss="current", tokens=tokens)
        depth = len(backbone.blocks)  # type: ignore[arg-type]
        self.adaptation, self.cosine_scale = adaptation, float(cosine_scale)
        self.adapters, self.scales, self.prompts = nn.ModuleDict(), nn.ModuleDict(), nn.ParameterList()
        self.sites: list[str] = []
        self.copied = nn.ModuleList()
        if adaptation == "finetune":
            self.copied.append(copy.deepcopy(backbone).requires_grad_(True))
        elif adaptation == "adapter":
            self.adapters = mlp_adapters(depth, self.width, bottleneck, scale=adapter_scale, dropout=dropout)
        elif adaptation == "ssf":
            widths = scale_shift_sites(backbone)
            self.sites = list(widths)
            self.scales = nn.ModuleDict({p.replace(".", "_"): ScaleShift(w, std=ssf_std) for p, w in widths.items()})
        else:
            blocks = depth if adaptation == "vpt_deep" else 1
            self.prompts.extend(nn.Parameter(torch.zeros(length, self.width)) for _ in range(blocks))
        self.head = CosineHead(self.width, num_classes, scale=self.cosine_scale)
        self.prototypes = PrototypeHead(2 * self.width, num_classes, metric="cosine")
        self.stats = ClassStats(2 * self.width, num_classes)

    def begin_task(self, task: Task, ctx: Context) -> None:
        if task.index == 0:
            super().begin_task(task, ctx)

    def learn(self, task: Task, ctx: Context) -> None:
        if task.index == 0:
            fit(self, task.train, ctx, budget=scaled(ctx.budget, self.lr_scale))
            for module in self.children():
                freeze(module)
        with torch.no_grad(), eval_mode(self):
            own = self.stats.empty()
            for batch in task.train.batches(256):
                own.update(self.both(batch.x), batch.y)
        self.stats.merge(own)
        self.prototypes.prototypes.copy_(self.stats.means())

    def end_task(self, task: Task, ctx: Context) -> None:
        if task.index == 0:  # its rows are of no further use
            self.head = CosineHead(self.width, self.num_classes, scale=self.cosine_scale).to(ctx.hardware.device)
            freeze(self.head)

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        return masked_cross_entropy(self.head(self.adapted(batch.x)), batch.y, ctx.mask(batch.t, "til"))

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        features = self.both(x)
        with torch.autocast(x.device.type, enabled=False):
            scores: Tensor = self.prototypes(features)
        return scores

    def both(self, x: Tensor) -> Tensor:
        """Return [B, 2 D], the features of the plain and of the adapted model, fp32."""
        return torch.cat([self.query(x), self.adapted(x).float()], dim=1)

    def adapted(self, x: Tensor) -> Tensor:
        """Return the features [B, D] of the adapted model."""
        if self.copied:
            features: Tensor = self.copied[0](x)
            return features
        return self.features(x, self.plan())

    def plan(self) -> Plan:
        """Return what is injected."""
        return Plan(
            tokens=dict(enumerate(self.prompts)),
            beside_mlp={int(block): module for block, module in self.adapters.items()},
            scaled=dict(zip(self.sites, self.scales.values(), strict=True)),
        )
