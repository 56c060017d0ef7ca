"""HiDe-Prompt: which task, which class within it, which class of all (Wang et al., NeurIPS 2023, arXiv 2310.07234).

Memory between tasks, for T tasks, C classes and D features: 2 L D floats per task and block of `blocks`; the network of
the task identity, 2 h D^2 + (h + 4) D floats for h = tii.hidden and its head of C (D + 1); two sets of centroids, 32 m
D bytes per class for m centroids each (covariance=full: twice 8 C D + 4 C D^2 bytes); the head. Task id: not needed.

Verified: the task identity rests on plain features alone, prompts of earlier tasks stay the same bit for bit, without
mixing, contrast and alignment training is that of DualPrompt without general prompts, a right guess gives the result of
the given task, and the reshape of the public code makes images of a batch depend on each other (test_methods_hide).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clrun.blocks.contrast import Space, contrast
from clrun.blocks.inject import Plan, Prefix, require_depth
from clrun.blocks.params import eval_mode, rate_groups
from clrun.blocks.task_gaussians import TaskAlignment
from clrun.data.split import Batch
from clrun.data.stream import Stream, Task
from clrun.learning.budget import Budget
from clrun.learning.context import Context
from clrun.learning.heads import GrowingHead
from clrun.learning.losses import Compete, masked_cross_entropy
from clrun.learning.training import fit
from clrun.methods.prompted import Init, Prompted, drawn
from clrun.system.errors import Count, Fraction, NonNegative, Positive, PositiveInt


@dataclass(frozen=True)
class Tii:
    """Options of the task-identity inference.

    Attributes:
        hidden: width of its hidden layer, in units of D.
        budget: of its training on the images of a task.
        alignment: of its network to Gaussians of the plain features of all classes.
    """

    hidden: PositiveInt
    budget: Budget
    alignment: TaskAlignment


class HidePrompt(Prompted):
    """Prompts of each task, the task of an image from plain features, and a head that replayed features align.

    Task-identity inference: z = head(LN(q + W_2 gelu(W_1 q))) of the features q under the plain backbone, trained by
    the cross-entropy over the classes of the task, then on Gaussians of q of all classes so far. An image belongs to
    the task of the class with the largest z; in domain-incremental streams the classes are the domains.

    Within-task prediction: prefixes of keys and values in `blocks` begin as those of the task before. Used is
    p = (1 - beta) p_t + beta mean(p_0 ... p_{t-1}), the mean without gradient; loss = CE + contrast R, see
    `clrun.blocks.contrast.contrast`. When the task ends p is stored as p_t and never changes again.

    Task-adaptive prediction: the Gaussians of the task's classes are measured with p_t, and the head is aligned to
    those of all classes so far.

    Deviations from the public code: both networks are trained in one run; rows of classes that have not come do not
    compete; all features drawn for an alignment are used, there a part of them (with 10 centroids less than a tenth);
    k-means is deterministic, and centroids of a single row are drawn from, too. The code reshapes the prompts of a
    batch [2, B, L, D] into [B, 2, L, D] where they had to be permuted: with the prompts of one task, half of the batch
    has keys in both places and the other half values; in tests, image b has prompts that were chosen for the images 2 b
    and 2 b + 1 (modulo B). `selection=reshaped` does so, in training and tests.

    Args:
        backbone: a timm vision transformer, frozen.
        num_classes: C.
        blocks: numbers of the blocks with prefixes.
        length: L, number of keys, and of values, in each of them.
        init: distribution of the first task's prompts, see `clrun.methods.prompted.drawn`; the public code has "wide".
        beta: weight of the mean of earlier prompts; not used in the first task.
        contrast: weight of R.
        contrast_space: "raw" features, as published, or "cosine".
        head_lr_scale: learning rate of the head, relative to that of the prompts.
        tii: options of the task-identity inference.
        alignment: options of the alignment of the head, see `clrun.blocks.task_gaussians.TaskAlignment`.
        selection: "instance", or "reshaped", see above, which makes predictions depend on the batch.
        task_id: "inferred", or "given" at test time.
        lr_scale: factor of the budget's learning rate.
        compete: classes that compete in the loss of the within-task prediction, see `clrun.learning.losses`.
    """

    owner: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        blocks: list[Count],
        length: Count,
        init: Init,
        beta: Fraction,
        contrast: NonNegative,
        contrast_space: Space,
        head_lr_scale: NonNegative,
        tii: Tii,
        alignment: TaskAlignment,
        selection: Literal["instance", "reshaped"],
        task_id: Literal["inferred", "given"],
        lr_scale: Positive,
        compete: Compete,
    ) -> None:
        super().__init__(backbone, num_classes, lr_scale=lr_scale, compete=compete)
        require_depth(backbone, blocks, "method.blocks")
        self.blocks, self.length, self.init, self.beta = list(blocks), length, init, beta
        self.contrast, self.contrast_space, self.head_lr_scale = contrast, contrast_space, head_lr_scale
        self.tii, self.alignment, self.selection = tii, alignment, selection
        self.depends_on_batch, self.needs_task_id = selection == "reshaped", task_id == "given"
        self.features_width = int(backbone.num_features)  # type: ignore[arg-type]
        self.prompts = nn.ParameterList()  # by task: [|blocks|, 2, L, D]
        self.gaussians = alignment.gaussians(self.features_width, num_classes)
        self.earlier = torch.zeros(0, self.features_width)  # means in the contrast of the current task
        self._identify(num_classes)

    def _identify(self, count: int) -> None:
        """Make the network that infers the task, over `count` classes, or domains."""
        self.identity = TaskIdentity(self.features_width, count, hidden=self.tii.hidden)
        self.plain = self.tii.alignment.gaussians(self.features_width, count)
        self.register_buffer("owner", torch.full((count,), -1))  # position of the task of each class, or domain

    # --- training

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        if task.index == 0 and ctx.stream.setting == "dil":
            self._identify(len(ctx.stream.tasks))
        self.identity.head.grow(self._identities(task, ctx.stream).cpu())
        for old in self.prompts:
            old.requires_grad_(False)
        shape = (len(self.blocks), 2, self.length, self.width)
        first = not len(self.prompts)
        self.prompts.append(nn.Parameter(drawn(*shape, init=self.init) if first else self.prompts[-1].detach().clone()))
        self.earlier = self.gaussians.means()

    def _identities(self, task: Task, stream: Stream) -> Tensor:
        """Return the rows [k] of the identity's head that belong to a task: its classes, or its domain."""
        return torch.tensor([task.index]) if stream.setting == "dil" else task.classes

    def learn(self, task: Task, ctx: Context) -> None:
        if not ctx.stream.transform.augments:
            self.stored_queries = torch.cat([self.query(batch.x) for batch in task.train.batches(256)])
        self._learn_identity(task, ctx)
        self.stored_queries = None
        super().learn(task, ctx)

    def _learn_identity(self, task: Task, ctx: Context) -> None:
        """Train the network of the task identity on the task, and align it to all classes so far."""
        domains, rows = ctx.stream.setting == "dil", self._identities(task, ctx.stream)
        own = torch.zeros_like(self.owner, dtype=torch.bool)
        own[rows.to(own.device)] = True
        self.owner[own] = task.index

        def target(batch: Batch) -> Tensor:
            return batch.t if domains else batch.y

        def loss(batch: Batch, ctx: Context) -> Tensor:
            return masked_cross_entropy(self.identity(self.training_query(batch)), target(batch), own)

        params = list(self.identity.parameters())
        fit(self, task.train, ctx, loss=loss, params=params, budget=self.tii.budget, name="tii")
        with torch.no_grad():
            self.plain.measure(self.query, task, target=target)
        if task.index > 0:
            self.tii.alignment.align(self, self.identity, ctx, self.plain, name="tii_align")

    def trainable(self) -> list[dict[str, Any]]:
        return rate_groups(([self.prompts[-1]], 1.0), (self.head.parameters(), self.head_lr_scale))

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        features = self._features(batch.x, self.mixed())
        loss = self.classification_loss(self.head(features), batch, ctx)
        if not self.contrast:
            return loss
        return loss + self.contrast * contrast(features, self.earlier, space=self.contrast_space)

    def mixed(self) -> Tensor:
        """Return the prompts [|blocks|, 2, L, D] that the current task trains, mixed with those of earlier tasks."""
        newest: Tensor = self.prompts[-1]
        if len(self.prompts) == 1 or not self.beta:
            return newest
        mean = torch.stack([prompt.detach() for prompt in list(self.prompts)[:-1]]).mean(dim=0)
        return (1 - self.beta) * newest + self.beta * mean

    def end_task(self, task: Task, ctx: Context) -> None:
        newest = self.prompts[-1]
        newest.requires_grad_(False)
        newest.copy_(self.mixed().detach())
        self.earlier = self.earlier.new_zeros(0, self.features_width)
        with torch.no_grad(), eval_mode(self):
            self.gaussians.measure(lambda x: self._features(x, newest), task)
        if task.index > 0:
            self.alignment.align(self, self.head, ctx, self.gaussians)

    # --- prediction

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        if self.needs_task_id and task is not None:
            return self.with_tasks(x, torch.full((len(x),), task, device=x.device))
        return self.forward_with(self.query(x), x)

    def constant(self, x: Tensor) -> Tensor | None:
        return None if self.needs_task_id else self.query(x)

    def forward_with(self, constant: Tensor, x: Tensor, task: int | None = None) -> Tensor:
        return self.with_tasks(x, self.inferred(constant))

    def choices(self, x: Tensor) -> Tensor | None:
        return None if self.needs_task_id else F.one_hot(self.inferred(self.query(x)), len(self.prompts))

    def inferred(self, query: Tensor) -> Tensor:
        """Return the position [B] long of the task of images with these queries [B, D]."""
        with torch.autocast(query.device.type, enabled=False):
            logits = self.identity(query.float())
        return self.owner[logits.masked_fill(self.owner < 0, float("-inf")).argmax(dim=1)]

    def with_tasks(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Return the logits [B, C] of images x, each with the prompts of the task at the position `chosen` [B] long."""
        logits: Tensor = self.head(self._features(x, torch.stack([*self.prompts])[chosen]))
        return logits

    def _features(self, x: Tensor, prompts: Tensor) -> Tensor:
        """Return the features [B, D] of images x with prompts [|blocks|, 2, L, D], or [B, |blocks|, 2, L, D]."""
        if self.selection == "reshaped":
            prompts = prompts.expand(len(x), *prompts.shape[-4:]).permute(1, 2, 0, 3, 4)  # [|blocks|, 2, B, L, D]
            prompts = prompts.reshape(len(self.blocks), len(x), 2, *prompts.shape[3:]).transpose(0, 1)
        plan = Plan(
            prefix={
                block: Prefix(prompts[..., place, 0, :, :], prompts[..., place, 1, :, :])
                for place, block in enumerate(self.blocks)
            }
        )
        return self.features(x, plan)


class TaskIdentity(nn.Module):
    """head(LN(q + W_2 gelu(W_1 q))) with a growing linear head.

    Args:
        width: D.
        count: number of rows of the head.
        hidden: width of the hidden layer, in units of D.
    """

    def __init__(self, width: int, count: int, *, hidden: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, hidden * width), nn.Linear(hidden * width, width)
        self.norm = nn.LayerNorm(width)
        self.head = GrowingHead(width, count)

    def forward(self, query: Tensor) -> Tensor:
        """Return the logits [B, count] of plain features [B, D]."""
        logits: Tensor = self.head(self.norm(query + self.outer(F.gelu(self.inner(query)))))
        return logits
