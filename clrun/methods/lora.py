"""LoRA as a learner of a stream: one low-rank update for all tasks, or one per task (Hu et al., ICLR 2022, 2106.09685).

The code of the update is that of microsoft/LoRA (MIT); the two ways of learning a stream are the baselines SeqLoRA and
IncLoRA of O-LoRA (Wang et al., Findings of EMNLP 2023, arXiv 2310.14152).

Memory between tasks, of T tasks: 4 r (m + n) bytes for every layer with m outputs and n inputs; in a fused `qkv` 8 D r
for each of the chosen parts. With growth=per_task T times as much. Task id: not needed.

Verified: a new update is the plain model bit for bit and its first step moves B alone, backbone, older updates and rows
of older classes stand still bit for bit, both kinds of growth and O-LoRA agree bit for bit on one task, the penalty and
its gradient equal values computed by hand, and folded weights give the same logits (test_methods_lora,
test_blocks_lora).
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from clrun.blocks.lora import LinearLoRA, QkvLoRA, Summed
from clrun.blocks.orthogonality import Penalty, overlap
from clrun.data.split import Batch
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.knobs import Knob
from clrun.learning.losses import Compete
from clrun.learning.method import freeze
from clrun.methods.updated import Updated
from clrun.system.errors import ConfigError, Count, Fraction, NonNegative, PositiveInt


class Lora(Updated):
    """h = W x + b + scale sum_i B_i A_i x in the chosen layers; W and b are frozen, A_i [r, n] and B_i [m, r] are not.

    A begins as the weight of `nn.Linear`, uniform within 1/sqrt(n), and B at 0, so that the first step moves B alone.
    growth=shared has one pair A, B, which all tasks train in turn (SeqLoRA). growth=per_task has a new pair for each
    task; older ones are frozen and stay in the sum (IncLoRA). One head is trained on the features; the rows of classes
    that do not compete stand still. Predictions take one pass of the backbone and no task id.

    With growth=per_task and orthogonality > 0 the loss has the penalty of O-LoRA, see there.

    Args:
        backbone: a transformer with numbered blocks, frozen.
        num_classes: C.
        growth: "shared", one update for all tasks; "per_task", one per task.
        parts: of queries, keys and values, those with updates, each with an A and a B of its own: letters of "qkv" in
            this order, or "" for none. In a text encoder these are its layers `query`, `key` and `value`.
        layers: patterns of the paths of further linear layers with updates, such as "*.mlp.fc1".
        blocks: numbers of the blocks with updates; null for all.
        rank: r.
        scale: constant factor of an update (alpha / r in the notation of the paper).
        dropout: probability with which an entry of x is dropped before A in training, the same for all updates.
        orthogonality: weight of the penalty on the inputs that new and old updates share.
        penalty: "sum" of absolute values, "squares", or "cosine", see `OLora`.
        lr_scale: learning rate of the updates, relative to that of the budget, which is the head's.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        growth: Literal["shared", "per_task"],
        parts: str,
        layers: list[str],
        blocks: list[Count] | None,
        rank: PositiveInt,
        scale: float,
        dropout: Fraction,
        orthogonality: NonNegative,
        penalty: Penalty,
        lr_scale: NonNegative,
        compete: Compete,
    ) -> None:
        super().__init__(
            backbone,
            num_classes,
            parts=parts,
            layers=layers,
            blocks=blocks,
            dropout=dropout,
            lr_scale=lr_scale,
            compete=compete,
        )
        if growth == "shared" and orthogonality:
            raise ConfigError(
                "method.orthogonality: compares updates of different tasks; take method.growth=per_task, or set it to 0"
            )
        self.knobs = (Knob("orthogonality"),) if growth == "per_task" else ()
        self.growth, self.rank, self.scale = growth, rank, scale
        self.orthogonality = float(orthogonality)
        self.penalty: Penalty = penalty

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        if task.index == 0 or self.growth == "per_task":
            self.grow_updates(self.rank, scale=self.scale)

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        loss = super().loss(batch, ctx)
        weight = self.strength(ctx)
        return loss + weight * self.overlap() if weight and ctx.task.index else loss

    def strength(self, ctx: Context) -> float:
        """Return the weight of the penalty in this task."""
        return self.orthogonality

    def overlap(self) -> Tensor:
        """Return the penalty [] on the inputs that the newest updates share with older ones."""
        found = [overlap(downs, self.penalty) for total in self.by_path().values() for downs in _downs(total)]
        total = torch.stack(found)
        return total.mean() if self.penalty == "cosine" else total.sum()

    def end_task(self, task: Task, ctx: Context) -> None:
        super().end_task(task, ctx)
        if self.growth == "per_task":
            freeze(self.sums)


def _downs(total: Summed) -> Iterator[list[Tensor]]:
    """Yield the maps down [r, n] of all updates of a layer, the newest last, once for each of its parts."""
    updates: list[LinearLoRA | QkvLoRA] = list(total)
    for part in range(len(updates[0].factors()[0])):
        yield [update.factors()[0][part] for update in updates]
