"""The base of methods that train low-rank updates beside the linear layers of a frozen transformer, and a head."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clrun.blocks.inject import Injector, Plan
from clrun.blocks.lora import LinearLoRA, QkvLoRA, Summed, new_update, sites
from clrun.blocks.params import rate_groups
from clrun.data.split import Batch
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.heads import GrowingHead
from clrun.learning.losses import Compete, masked_cross_entropy
from clrun.learning.method import Method, freeze


class Updated(Method):
    """A frozen transformer whose chosen layers add a sum of low-rank updates to their outputs, and a head.

    The backbone is in eval mode also in training. Rows of the head for classes that do not compete stand still: neither
    momentum nor weight decay moves them.

    Args:
        backbone: a transformer with numbered blocks: timm's, or a text encoder; it is frozen.
        num_classes: C.
        parts: of queries, keys and values, those with updates.
        layers: patterns of the paths of further linear layers with updates; see `clrun.blocks.lora.sites`.
        blocks: numbers of the blocks with updates; None for all.
        dropout: probability with which an entry of a layer's input is dropped before all its updates in training.
        lr_scale: learning rate of the updates, relative to that of the budget, which is the head's.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.

    Attributes:
        sites: by path of a layer, the parts of its fused `qkv` with updates, or None for the whole layer.
        sums: the sum of the updates of each of these layers, in the same order.
    """

    needs_vit: ClassVar[bool] = True
    hooks_backbone = True

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        parts: str,
        layers: Sequence[str] = (),
        blocks: Sequence[int] | None = None,
        dropout: float = 0.0,
        lr_scale: float = 1.0,
        compete: Compete,
    ) -> None:
        super().__init__(backbone, num_classes, compete=compete)
        freeze(backbone)
        self.sites = sites(backbone, type(self).__name__, parts=parts, layers=layers, blocks=blocks)
        self.sums = nn.ModuleList(Summed(dropout=dropout) for _ in self.sites)
        self.lr_scale = lr_scale
        self.injector = Injector()
        self.fixed: tuple[Tensor, dict[str, Tensor]] | None = None  # rows of the head that stand still; in a task only

    def grow_updates(self, rank: int, *, scale: float = 1.0, share_down: bool = False) -> None:
        """Append a new update of this rank to the sum of each layer.

        Args:
            rank: r.
            scale: constant factor.
            share_down: one A for all parts of a fused layer.
        """
        for (path, parts), total in zip(self.sites.items(), self.by_path().values(), strict=True):
            total.updates.append(new_update(self.backbone, path, parts, rank, scale=scale, share_down=share_down))

    def by_path(self) -> dict[str, Summed]:
        """Return the sum of the updates of each layer, by its path."""
        return dict(zip(self.sites, self.sums, strict=True))  # type: ignore[arg-type]

    def newest(self) -> dict[str, LinearLoRA | QkvLoRA]:
        """Return the newest update of each layer, by its path."""
        return {path: total.updates[-1] for path, total in self.by_path().items()}  # type: ignore[misc]

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        self.fixed = None
        if isinstance(self.head, GrowingHead):
            competing = self.competing(torch.tensor([task.index], device=ctx.hardware.device), ctx)[0]
            rows = (self.head.initialised & ~competing.to(self.head.initialised.device)).nonzero()[:, 0]
            if len(rows):
                self.fixed = rows, {name: p.detach()[rows] for name, p in self.head.named_parameters() if p.dim()}

    def plan(self) -> Plan:
        """Return the changes to a pass of the backbone."""
        return Plan(parallel={path: total for path, total in self.by_path().items() if len(total.updates)})

    def features(self, x: Tensor) -> Tensor:
        """Return the features [B, D] of prepared x with the updates."""
        with self.injector.use(self.backbone, self.plan()):
            features: Tensor = self.backbone(x)
        return features

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        return self.classification_loss(batch, ctx)

    def classification_loss(self, batch: Batch, ctx: Context) -> Tensor:
        """Return the cross-entropy [] of a prepared batch over the classes that compete."""
        return masked_cross_entropy(self(batch.x), batch.y, self.competing(batch.t, ctx))

    def trainable(self) -> list[dict[str, Any]]:
        return rate_groups((self.sums.parameters(), self.lr_scale), (self.head.parameters(), 1.0))

    def after_step(self, ctx: Context) -> None:
        self.injector.release()
        if self.fixed is not None:
            rows, before = self.fixed
            with torch.no_grad():
                for name, parameter in self.head.named_parameters():
                    if name in before:
                        parameter[rows] = before[name].to(parameter)

    def end_task(self, task: Task, ctx: Context) -> None:
        self.fixed = None
