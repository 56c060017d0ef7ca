"""LAE: an ensemble of an online module and its slow average (Gao et al., ICCV 2023, arXiv 2303.10070; code gqk/LAE).

Memory between tasks: two copies of the modules, and the head. In each of the chosen blocks an adapter has
2 D r + r + D + 1 floats, LoRA has 4 D r + 2, and a prefix has 2 L D + 2. Task id: not needed.

Verified: the offline module equals the closed form of the average, LoRA folded into the weights gives the same logits,
and initial logits are those of the plain model (test_methods_prompts).
"""

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from clrun.blocks.inject import Adapter, Plan, Prefix, require_depth
from clrun.blocks.lora import QkvLoRA
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
    """The online module is trained on each task; from the second task on an offline copy averages it after every step.

    offline <- a offline + (1 - a) online. The probability of a class is the larger one of the probabilities with the
    two modules; `forward` returns its logarithm. Also in the task-incremental setting these are probabilities over all
    classes with initialised rows in the head: the classes seen so far, or all classes with `compete=all`.

    In the first fraction `head_only` of the steps of every task but the first only the head is trained, and the online
    module does not change. The published decay of 0.9999 is per step of 24 images, and moves the offline module by
    about 10 % per task; for other batch sizes the decay is raised to the power batch size / `decay_batch`, so that it
    is the same per image.

    Args:
        backbone: a timm vision transformer, frozen.
        num_classes: C.
        module: "adapter" (parallel to the attention), "lora" (keys and values), "prefix" (compensated keys and values).
        rank: r, the width of adapters and of low-rank updates.
        length: L, the number of tokens of a prefix.
        blocks: numbers of the blocks with a module.
        decay: a, the decay of the offline average.
        decay_batch: batch size to which `decay` refers; None uses `decay` for every batch size.
        head_only: fraction of the steps of each task but the first in which only the head is trained.
        compensate: divide the contribution of a prefix by its share of the attention; see `Prefix`.
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
        self.online = nn.ModuleDict({str(block): new_module(module, self.width, size) for block in blocks})
        self.offline = nn.ModuleDict()  # empty until the second task
        self.step_decay = decay  # the decay per step for the batch size of the run

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        self.step_decay = self.decay
        if self.decay_batch:
            self.step_decay **= ctx.budget.batch_size / self.decay_batch
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
                parameter.grad = None  # averaging over processes replaces missing gradients by zeros

    def after_step(self, ctx: Context) -> None:
        super().after_step(ctx)
        with torch.no_grad():
            for slow, fast in zip(self.offline.parameters(), self.online.parameters(), strict=False):
                slow.lerp_(fast, 1 - self.step_decay)

    def _head_only(self, ctx: Context) -> bool:
        """Return whether the present step trains the head only."""
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
        """Return the logits [B, C] of the head on the backbone's features of x with these modules."""
        logits: Tensor = self.head(self.features(x, self.plan(modules)))
        return logits

    def plan(self, modules: nn.ModuleDict) -> Plan:
        """Return the plan that injects these modules."""
        if self.module == "prefix":
            found: dict[int, KeysValues] = {int(block): m for block, m in modules.items()}  # type: ignore[misc]
            return Plan(prefix={block: m.prefix(compensated=self.compensate) for block, m in found.items()})
        path = "attn" if self.module == "adapter" else "attn.qkv"
        return Plan(parallel={f"blocks.{block}.{path}": module for block, module in modules.items()})


class KeysValues(nn.Module):
    """Trained keys and values of a prefix, with a trained factor for each of the two.

    Args:
        width: D.
        length: L.
    """

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.pair = nn.Parameter(torch.rand(2, length, width) * 0.01)
        self.scale = nn.Parameter(torch.ones(2))

    def prefix(self, *, compensated: bool) -> Prefix:
        """Return the prefix for a plan."""
        keys, values = self.scale[:, None, None] * self.pair
        return Prefix(keys, values, compensated)


def new_module(kind: Kind, width: int, size: int) -> nn.Module:
    """Return a new module for one block.

    Args:
        kind: see `Lae`.
        width: D.
        size: r, or L for a prefix.
    """
    if kind == "adapter":
        return Adapter(width, size, activation="gelu", dropout=0.0, scale=1.0, learn_scale=True)
    return QkvLoRA(width, size, "kv", learn_scale=True) if kind == "lora" else KeysValues(width, size)
