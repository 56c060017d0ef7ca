"""PAD: LwF on transformers that also holds the attention (Pelosin et al., CVPR-W 2022, arXiv 2203.13167).

Memory between tasks: none; a frozen copy of the network during a task. regularise=weight: 2 P floats, P = backbone
parameters. Task id: not needed.

Verified: without maps it is lwf, distances by hand, fused attention stays on (test_methods_distillation).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clrun.blocks.curvature import Labels, QuadraticPenalty, diagonal_fisher
from clrun.blocks.distillation import Pool, attention_scores, pooled_distance
from clrun.blocks.inject import Injector, Plan, require_vit
from clrun.data.split import Batch
from clrun.data.stream import Task
from clrun.learning.budget import Budget
from clrun.learning.context import Context
from clrun.learning.knobs import Knob
from clrun.learning.losses import Compete
from clrun.methods.lwf import Lwf
from clrun.system.errors import NonNegative, Positive, PositiveInt


class VitPad(Lwf):
    """loss = LwF's + map_strength * mean over the blocks of the distance between the teacher's maps and now's.

    Args:
        backbone: a timm vision transformer.
        num_classes: C.
        strength: see `Lwf`; 0 leaves the maps alone to hold the network.
        tau: see `Lwf`.
        per_head: see `Lwf`.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
        warmup: see `Lwf`.
        regularise: "attention": scaled scores before the softmax, [B, H, n, n], recomputed from queries and keys, so
            that the attention itself stays fused. "functional": what the attention adds to its block, [B, 1, n, D].
            "weight": no maps, the penalty of EWC (1/2 sum_i F_i (theta_i - theta*_i)^2) on the backbone.
        map_strength: mu; 0 is LwF.
        symmetric: how maps differ, see `clrun.blocks.distillation.pooled_distance`; false counts only what was lost,
            which leaves room to learn (the paper's proposal).
        pool: what of the maps is compared; see `clrun.blocks.distillation.pooled`.
        labels: regularise=weight: labels of the Fisher information.
        samples: regularise=weight: rows it is estimated on; null for all.
    """

    knobs = (Knob("strength"), Knob("map_strength"))
    needs_vit = True

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        strength: NonNegative,
        tau: Positive,
        per_head: bool,
        compete: Compete,
        warmup: Budget,
        regularise: Literal["attention", "functional", "weight"],
        map_strength: NonNegative,
        symmetric: bool,
        pool: Pool,
        labels: Labels,
        samples: PositiveInt | None,
    ) -> None:
        require_vit(backbone, "vit_pad")
        super().__init__(
            backbone, num_classes, strength=strength, tau=tau, per_head=per_head, compete=compete, warmup=warmup
        )
        self.regularise, self.map_strength, self.symmetric, self.pool = regularise, map_strength, symmetric, pool
        self.labels = labels
        self.samples = samples
        self.hooks_backbone = map_strength > 0 and regularise != "weight"
        self.injectors = Injector(), Injector()  # of the student and of the teacher
        self.penalty = QuadraticPenalty(decay=1.0)

    def wants_teacher(self) -> bool:
        return super().wants_teacher() or (self.map_strength > 0 and self.regularise != "weight")

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        if not self.map_strength or not ctx.task.index:
            return super().loss(batch, ctx)
        if self.regularise == "weight":
            penalty: Tensor = self.penalty(self.backbone)
            return super().loss(batch, ctx) + self.map_strength * penalty
        assert self.teacher is not None
        with (
            self._maps(self.backbone, self.injectors[0]) as now,
            self._maps(self.teacher.backbone, self.injectors[1]) as then,
        ):
            loss = super().loss(batch, ctx)
        distances = [
            pooled_distance(a, b, pool=self.pool, symmetric=self.symmetric) for a, b in zip(now, then, strict=True)
        ]
        return loss + self.map_strength * torch.stack(distances).mean()

    def end_task(self, task: Task, ctx: Context) -> None:
        super().end_task(task, ctx)
        if self.regularise == "weight" and self.map_strength:
            fisher = diagonal_fisher(self, task.train, ctx, of=self.backbone, labels=self.labels, samples=self.samples)
            self.penalty.update(self.backbone, fisher)

    @contextmanager
    def _maps(self, vit: Any, injector: Injector) -> Iterator[list[Tensor]]:
        """Yield the list that receives the map of each block, [B, H, n, -], in a pass within the block."""
        found: list[Tensor] = []
        scores = self.regularise == "attention"
        path = "attn.qkv" if scores else "attn"
        watches = {f"blocks.{i}.{path}": _Watch(found, b.attn if scores else None) for i, b in enumerate(vit.blocks)}
        with injector.use(vit, Plan(scaled=watches)):
            yield found


class _Watch(nn.Module):
    """Hands on what it is given, and notes its map.

    Args:
        found: where maps are noted.
        attention: whose scores to compute from its queries and keys; None notes what passes.
    """

    def __init__(self, found: list[Tensor], attention: nn.Module | None) -> None:
        super().__init__()
        self.found, self.attention = found, attention

    def forward(self, x: Tensor) -> Tensor:
        """Return x [B, n, -]."""
        self.found.append(x[:, None] if self.attention is None else attention_scores(self.attention, x))
        return x
