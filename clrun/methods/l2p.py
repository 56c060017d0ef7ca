"""L2P: a pool of prompts, the best of which each image finds by its query (Wang et al., CVPR 2022, arXiv 2112.08654).

Memory between tasks: M L D + M D floats, and the head. Task id: not needed.

Verified: outputs are those of the prompts, keys learn from the pull alone, all prompts chosen do not depend on keys
(test_methods_prompts).
"""

import copy
from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clrun.blocks.inject import Plan
from clrun.blocks.selection import Selection, choose, cosines
from clrun.data.split import Batch
from clrun.data.stream import Stream, Task
from clrun.learning.context import Context
from clrun.learning.losses import Compete
from clrun.methods.prompted import Init, Prompted, drawn, plain_features
from clrun.system.errors import ConfigError, NonNegative, Positive, PositiveInt


class L2p(Prompted):
    """h = mean over the N L outputs of the prompts whose keys are closest to q(x); logits = W h + b.

    loss = CE - pull * mean over the batch of the sum over the chosen m of cos(q, k_m). Choosing has no gradient: keys
    learn from the pull alone, prompts from the cross-entropy alone. Everything is shared by all tasks and goes on being
    trained. With `use_prompt_mask` test images choose among the prompts of the tasks learned so far (the published code
    lets them choose untrained ones too).

    Args:
        backbone: a timm vision transformer, frozen unless `train_backbone`.
        num_classes: C.
        pool_size: M.
        length: L, tokens of a prompt.
        top: N, prompts of an image.
        pull: weight of the pull, lambda.
        init: distribution of initial prompts and keys; see `prompted.drawn`.
        keys: initial keys: "random", or "queries": those of M training images of the first task, which keeps the
            selection from collapsing onto few prompts.
        selection: "instance", or "batch" (see `blocks.selection.choose`), which makes predictions depend on the batch.
        use_prompt_mask: task t trains the prompts t N to (t + 1) N - 1 only.
        copy_prompts: with `use_prompt_mask`: prompts of a task begin as those of the task before.
        diversity: divide cosines in training by the share of the choices that a prompt had so far, relative to an even
            share (in the paper only, section 4.2).
        train_backbone: train the backbone too, as the published configuration for CORe50 does; queries then come from a
            frozen copy.
        lr_scale: factor of the budget's learning rate.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    counts: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        pool_size: PositiveInt,
        length: PositiveInt,
        top: PositiveInt,
        pull: NonNegative,
        init: Init,
        keys: Literal["random", "queries"],
        selection: Selection,
        use_prompt_mask: bool,
        copy_prompts: bool,
        diversity: bool,
        train_backbone: bool,
        lr_scale: Positive,
        compete: Compete,
    ) -> None:
        super().__init__(backbone, num_classes, lr_scale=lr_scale, compete=compete)
        if top > pool_size:
            raise ConfigError(f"method.top: cannot choose {top} of {pool_size} prompts (method.pool_size)")
        if copy_prompts and not use_prompt_mask:
            raise ConfigError("method.copy_prompts: tasks have prompts of their own with method.use_prompt_mask only")
        self.top, self.pull, self.initial_keys, self.selection = top, pull, keys, selection
        self.use_prompt_mask, self.copy_prompts, self.diversity = use_prompt_mask, copy_prompts, diversity
        self.depends_on_batch = selection == "batch"
        self.prompts = nn.Parameter(drawn(pool_size, length, self.width, init=init))
        self.keys = nn.Parameter(drawn(pool_size, self.width, init=init))
        self.register_buffer("counts", torch.zeros(pool_size, dtype=torch.long))
        self.own = slice(0, pool_size)  # the prompts of the current task
        self.available = pool_size
        self.original = nn.ModuleList()  # where queries come from when the backbone moves
        if train_backbone:
            self.original.append(copy.deepcopy(backbone))
            backbone.requires_grad_(True)

    def query(self, x: Tensor) -> Tensor:
        return plain_features(self.original[0], x) if self.original else super().query(x)

    def check(self, stream: Stream) -> None:
        super().check(stream)
        needed = len(stream.tasks) * self.top
        if self.use_prompt_mask and needed > len(self.keys):
            raise ConfigError(
                f"method.use_prompt_mask: {len(stream.tasks)} tasks of {self.top} prompts need "
                f"method.pool_size={needed}, not {len(self.keys)}"
            )

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        if self.initial_keys == "queries" and task.index == 0:
            self._start_keys(task, ctx)
        if not self.use_prompt_mask:
            return
        before, self.own = self.own, slice(task.index * self.top, (task.index + 1) * self.top)
        self.available = self.own.stop
        if self.copy_prompts and task.index:
            with torch.no_grad():
                self.prompts[self.own] = self.prompts[before]

    def _start_keys(self, task: Task, ctx: Context) -> None:
        """Take the queries of M rows of the task, again and again if it has fewer."""
        order = torch.randperm(len(task.train), generator=ctx.generator("keys"))
        rows = order.repeat(-(-len(self.keys) // len(order)))[: len(self.keys)]
        batches = task.train.select(rows.to(task.train.y.device)).batches(256)
        with torch.no_grad():
            self.keys.copy_(torch.cat([self.query(batch.x) for batch in batches]))

    def asks_while_training(self) -> bool:
        return True

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        scores = cosines(self.training_query(batch), self.keys)
        ranked = scores.detach().clone()
        if self.diversity:
            share = (self.counts + 1) / (self.counts + 1).sum() * len(self.counts)
            ranked = torch.where(ranked > 0, ranked / share, ranked * share)
        if self.use_prompt_mask:
            outside = torch.ones(len(self.keys), dtype=torch.bool, device=ranked.device)
            outside[self.own] = False
            ranked[:, outside] = -torch.inf
        chosen = choose(ranked, self.top, self.selection)
        self.counts += torch.bincount(chosen.flatten(), minlength=len(self.counts))
        loss = self.classification_loss(self._logits(batch.x, chosen), batch, ctx)
        return loss - self.pull * scores.gather(1, chosen).sum(dim=1).mean()

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        return self.forward_with(self.query(x), x)

    def constant(self, x: Tensor) -> Tensor | None:
        return self.query(x)

    def forward_with(self, constant: Tensor, x: Tensor, task: int | None = None) -> Tensor:
        return self._logits(x, self.chosen(constant))

    def choices(self, x: Tensor) -> Tensor | None:
        chosen = self.chosen(self.query(x))
        return F.one_hot(chosen, len(self.keys)).sum(dim=1)

    def chosen(self, query: Tensor) -> Tensor:
        """Return [B, N] long, the prompts that images with these queries [B, D] get."""
        return choose(cosines(query, self.keys[: self.available]), self.top, self.selection)

    def _logits(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Return logits [B, C] with the `chosen` prompts [B, N]."""
        vit: Any = self.backbone
        tokens = self.prompts[chosen].flatten(1, 2)
        with self.injector.use(vit, Plan(tokens={0: tokens}, keep_tokens=True)):
            outputs = vit.forward_features(x)
        first = vit.num_prefix_tokens
        pooled = vit.fc_norm(outputs[:, first : first + tokens.shape[1]].mean(dim=1))
        logits: Tensor = self.head(pooled)
        return logits

    def trainable(self) -> Iterable[nn.Parameter]:
        return (p for name, p in self.named_parameters() if p.requires_grad and not (name == "keys" and not self.pull))
