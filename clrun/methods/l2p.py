"""L2P: a pool of prompts, from which each image chooses by its query (Wang et al., CVPR 2022, arXiv 2112.08654).

Memory between tasks: M prompts of L tokens and their M keys, M L D + M D floats, and the head. Task id: not needed.

Verified: the head reads the outputs of the prompts, keys have a gradient from the pull only, and if all prompts are
chosen the logits do not depend on the keys (test_methods_prompts).
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
    """logits = W h + b, where h is the mean output of the N L tokens of the N prompts whose keys are closest to q(x).

    The query q(x) is the feature vector of the plain backbone, and k_m is the key of prompt m.

        loss = CE - pull * (mean over the batch of the sum over the chosen prompts m of cos(q(x), k_m))

    The choice itself has no gradient: keys are trained by the pull only, prompts by the cross-entropy only. All tasks
    share the pool, which is trained in every task.

    Deviation: with `use_prompt_mask` test images choose among the prompts of the tasks learned so far; in the published
    code they can also choose prompts that have not been trained yet.

    Args:
        backbone: a timm vision transformer, frozen unless `train_backbone`.
        num_classes: C.
        pool_size: M, the number of prompts.
        length: L, the number of tokens per prompt.
        top: N, the number of prompts per image.
        pull: lambda, the weight of the pull.
        init: distribution of initial prompts and keys; see `prompted.drawn`.
        keys: initial keys: "random", or "queries": the queries of M training images of the first task, which prevents
            the choice from collapsing onto few prompts.
        selection: "instance", or "batch", with which predictions depend on the batch; see `blocks.selection.choose`.
        use_prompt_mask: task t (counted from 0) trains only the prompts t N to (t + 1) N - 1.
        copy_prompts: only with `use_prompt_mask`: the prompts of a task start as those of the previous task.
        diversity: in training, divide the cosine of a prompt by its frequency among the choices so far, relative to the
            mean frequency (section 4.2 of the paper; not in the published code).
        train_backbone: train the backbone too, as in the published configuration for CORe50; queries are then computed
            by a frozen copy.
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
            raise ConfigError(f"method.top={top}: must be at most method.pool_size={pool_size}")
        if copy_prompts and not use_prompt_mask:
            raise ConfigError("method.copy_prompts: needs method.use_prompt_mask=true, i.e. separate prompts per task")
        self.top, self.pull, self.initial_keys, self.selection = top, pull, keys, selection
        self.use_prompt_mask, self.copy_prompts, self.diversity = use_prompt_mask, copy_prompts, diversity
        self.depends_on_batch = selection == "batch"
        self.prompts = nn.Parameter(drawn(pool_size, length, self.width, init=init))
        self.keys = nn.Parameter(drawn(pool_size, self.width, init=init))
        self.register_buffer("counts", torch.zeros(pool_size, dtype=torch.long))
        self.trained = slice(0, pool_size)  # the prompts that the current task trains
        self.available = pool_size
        self.original = nn.ModuleList()  # a frozen copy of the backbone for queries, if the backbone is trained
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
        before, self.trained = self.trained, slice(task.index * self.top, (task.index + 1) * self.top)
        self.available = self.trained.stop
        if self.copy_prompts and task.index:
            with torch.no_grad():
                self.prompts[self.trained] = self.prompts[before]

    def _start_keys(self, task: Task, ctx: Context) -> None:
        """Set the keys to the queries of M rows of the task; rows are repeated if there are fewer than M."""
        order = torch.randperm(len(task.train), generator=ctx.generator("keys"))
        rows = order.repeat(-(-len(self.keys) // len(order)))[: len(self.keys)]
        batches = task.train.select(rows.to(task.train.y.device)).batches(256)
        with torch.no_grad():
            self.keys.copy_(torch.cat([self.query(batch.x) for batch in batches]))

    def uses_training_queries(self) -> bool:
        return True

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        scores = cosines(self.training_query(batch), self.keys)
        ranked = scores.detach().clone()
        if self.diversity:
            frequency = (self.counts + 1) / (self.counts + 1).sum() * len(self.counts)
            ranked = torch.where(ranked > 0, ranked / frequency, ranked * frequency)
        if self.use_prompt_mask:
            outside = torch.ones(len(self.keys), dtype=torch.bool, device=ranked.device)
            outside[self.trained] = False
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
        """Return the indices [B, N] long of the prompts for images with these queries [B, D]."""
        return choose(cosines(query, self.keys[: self.available]), self.top, self.selection)

    def _logits(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Return the logits [B, C] of images x with the `chosen` prompts [B, N]."""
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
