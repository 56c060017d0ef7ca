"""PAD: LwF for transformers with a distillation of attention maps (Pelosin et al., CVPR-W 2022, arXiv 2203.13167).

Memory between tasks: none; with regularise=weight importance and anchor, 2 P floats for P backbone parameters. During a
task a frozen copy of the network. Task id: not needed.

Verified: without maps it equals lwf, distances equal values computed by hand, and attention stays fused
(test_methods_distillation).
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
    """loss = loss of LwF + map_strength * mean over blocks of the distance between maps of teacher and student.

    Args:
        backbone: a timm vision transformer.
        num_classes: C.
        strength: see `Lwf`; with 0 only the maps are distilled.
        tau: see `Lwf`.
        per_head: see `Lwf`.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
        warmup: see `Lwf`.
        regularise: the maps. "attention": scaled attention scores before the softmax, [B, H, n, n], which are computed
            again from queries and keys, so that the attention itself stays fused. "functional": the output of the
            attention, [B, 1, n, D]. "weight": no maps, but the penalty of EWC, 1/2 sum_i F_i (theta_i - theta*_i)^2, on
            the backbone.
        map_strength: mu; 0 is LwF.
        symmetric: the distance, see `clrun.blocks.distillation.pooled_distance`; false, as proposed in the paper,
            counts lost attention only and leaves the network free to attend to more.
        pool: how maps are pooled before they are compared; see `clrun.blocks.distillation.pooled`.
        labels: only for regularise=weight: labels of the Fisher information, see `estimate`.
        samples: only for regularise=weight: number of rows of the task for its estimate; null for all.
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
        self.injectors = Injector(), Injector()  # for the student and for the teacher
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
            self._maps(self.backbone, self.injectors[0]) as student,
            self._maps(self.teacher.backbone, self.injectors[1]) as teacher,
        ):
            loss = super().loss(batch, ctx)
        distances = [
            pooled_distance(a, b, pool=self.pool, symmetric=self.symmetric)
            for a, b in zip(student, teacher, strict=True)
        ]
        return loss + self.map_strength * torch.stack(distances).mean()

    def end_task(self, task: Task, ctx: Context) -> None:
        super().end_task(task, ctx)
        if self.regularise == "weight" and self.map_strength:
            fisher = diagonal_fisher(self, task.train, ctx, of=self.backbone, labels=self.labels, samples=self.samples)
            self.penalty.update(self.backbone, fisher)

    @contextmanager
    def _maps(self, vit: Any, injector: Injector) -> Iterator[list[Tensor]]:
        """Yield a list to which a forward pass within the `with` block appends the map [B, H, n, ...] of each block."""
        found: list[Tensor] = []
        scores = self.regularise == "attention"
        path = "attn.qkv" if scores else "attn"
        stores = {f"blocks.{i}.{path}": _StoreMap(found, b.attn if scores else None) for i, b in enumerate(vit.blocks)}
        with injector.use(vit, Plan(scaled=stores)):
            yield found


class _StoreMap(nn.Module):
    """The identity, which appends the map of its argument to a list.

    Args:
        found: the list.
        attention: the attention whose scores are the map; None if the argument itself is the map.
    """

    def __init__(self, found: list[Tensor], attention: nn.Module | None) -> None:
        super().__init__()
        self.found, self.attention = found, attention

    def forward(self, x: Tensor) -> Tensor:
        """Return x [B, n, ...]."""
        self.found.append(x[:, None] if self.attention is None else attention_scores(self.attention, x))
        return x
