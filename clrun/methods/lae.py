"""LAE: one module learns, a slow copy accumulates, both answer (Gao et al., ICCV 2023, arXiv 2303.10070; gqk/LAE).

Memory between tasks: twice the module (for r = 5: |blocks| (2 D r + r + D + 1), |blocks| (4 D r + 2) or, for prefixes,
|blocks| (2 L D + 2) floats), and the head. Task id: not needed.

Verified: the slow copy is the closed-form average, merged LoRA answers as unmerged, it begins as the plain model
(test_methods_prompts).
"""

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from clrun.blocks.inject import Adapter, KeyValueLoRA, Plan, Prefix, require_depth
from clrun.data.split import Batch
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.heads import GrowingHead
from clrun.learning.losses import Compete
from clrun.learning.method import freeze
from clrun.methods.prompted import Prompted
from clrun.system.errors import Count, Fraction, Positive, PositiveInt

Kind = Literal["adapter", "lora", "prefix"]


class Lae(Prompted):
    """The online module learns each task; from the second task on an offline copy follows it after every step.

    offline <- a offline + (1 - a) online. The probability of a class is the larger one of the two; forward returns its
    logarithm.

    In the first share `head_only` of each later fit only the head learns, against the module as it was. The decay is
    per step of `decay_batch` images: the published 0.9999 at 24 images moves the copy by about 10 % a task, at other
    batch sizes the exponent is scaled to the same horizon in images. In task-incremental reading, too, probabilities
    are those among all classes that the head has rows for: the classes seen so far, with `compete=all` every class.

    Args:
        backbone: a timm vision transformer, frozen.
        num_classes: C.
        module: "adapter" (parallel to the attention), "lora" (keys and values), "prefix" (compensated keys and values).
        rank: r, width of adapters and of low-rank updates.
        length: L of prefixes.
        blocks: blocks with a module.
        decay: a, of the offline copy.
        decay_batch: images a step that `decay` is meant for; None takes it as it is.
        head_only: share of the steps of each task but the first in which only the head learns.
        compensate: divide the weight of prefixes by their share of the attention.
        lr_scale: factor of the budget's learning rate.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        module: Kind,
        rank: PositiveInt,
        length: PositiveInt,
        blocks: list[Count],
        decay: Fraction,
        decay_batch: PositiveInt | None,
        head_only: Fraction,
        compensate: bool,
        lr_scale: Positive,
        compete: Compete,
    ) -> None:
        super().__init__(backbone, num_classes, lr_scale=lr_scale, compete=compete)
        require_depth(backbone, blocks, "method.blocks")
        self.module, self.blocks, self.compensate = module, list(blocks), compensate
        self.decay, self.decay_batch, self.head_only = decay, decay_batch, head_only
        size = length if module == "prefix" else rank
        self.online = nn.ModuleDict({str(block): inserted(module, self.width, size) for block in blocks})
        self.offline = nn.ModuleDict()  # empty until the second task
        self.kept = decay  # the decay of this run's batch size

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        self.kept = self.decay ** (ctx.budget.batch_size / self.decay_batch) if self.decay_batch else self.decay
        if task.index == 1:
            self.offline = copy.deepcopy(self.online)
            freeze(self.offline)

    def learn(self, task: Task, ctx: Context) -> None:
        super().learn(task, ctx)
        self.online.requires_grad_(True)

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        self.online.requires_grad_(not self._head_only(ctx))
        return self.classification_loss(self.logits(batch.x, self.online), batch, ctx)

    def adjust_gradients(self, ctx: Context) -> None:
        if self._head_only(ctx):
            for parameter in self.online.parameters():
                parameter.grad = None  # averaging over processes makes zeros of missing gradients

    def after_step(self, ctx: Context) -> None:
        super().after_step(ctx)
        with torch.no_grad():
            for slow, fast in zip(self.offline.parameters(), self.online.parameters(), strict=False):
                slow.lerp_(fast, 1 - self.kept)

    def _head_only(self, ctx: Context) -> bool:
        """Return whether the step being taken leaves the module alone."""
        return ctx.task.index > 0 and ctx.progress.step < self.head_only * ctx.progress.total

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        if self.training or not self.offline:
            return self.logits(x, self.online)
        assert isinstance(self.head, GrowingHead)
        outputs = (self.logits(x, module).float() for module in (self.online, self.offline))
        unseen = ~self.head.initialised
        online, offline = (z.masked_fill(unseen, -torch.inf).log_softmax(dim=1) for z in outputs)
        return torch.maximum(online, offline).masked_fill(unseen, 0.0)

    def logits(self, x: Tensor, modules: nn.ModuleDict) -> Tensor:
        """Return logits [B, C] of the head on the features with these modules."""
        logits: Tensor = self.head(self.features(x, self.plan(modules)))
        return logits

    def plan(self, modules: nn.ModuleDict) -> Plan:
        """Return where the modules go."""
        if self.module == "prefix":
            found: dict[int, KeysValues] = {int(block): m for block, m in modules.items()}  # type: ignore[misc]
            return Plan(prefix={block: m.prefix(compensated=self.compensate) for block, m in found.items()})
        path = "attn" if self.module == "adapter" else "attn.qkv"
        return Plan(parallel={f"blocks.{block}.{path}": module for block, module in modules.items()})


class KeysValues(nn.Module):
    """A prefix with learned factors of keys and values.

    Args:
        width: D.
        length: L.
    """

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.pair = nn.Parameter(torch.rand(2, length, width) * 0.01)
        self.scale = nn.Parameter(torch.ones(2))

    def prefix(self, *, compensated: bool) -> Prefix:
        """Return the prefix of a plan."""
        keys, values = self.scale[:, None, None] * self.pair
        return Prefix(keys, values, compensated)


def inserted(kind: Kind, width: int, size: int) -> nn.Module:
    """Return a new module of one block."""
    if kind == "adapter":
        return Adapter(width, size, activation="gelu", dropout=0.0, scale=1.0, learn_scale=True)
    return KeyValueLoRA(width, size) if kind == "lora" else KeysValues(width, size)
