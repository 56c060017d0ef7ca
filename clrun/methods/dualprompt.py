"""DualPrompt: prefixes for all tasks and prefixes for each task (Wang et al., ECCV 2022, arXiv 2204.04799).

Memory between tasks: 2 L_g D floats per block with G-prompts; per task 2 L_e D floats per block with E-prompts, and a
key of D floats; and the head. Task id: not needed.

Verified: each image gets the prompts of its task, keys converge to the mean direction of the queries, and the prompts
of earlier tasks stay the same bit for bit (test_methods_prompts).
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from clrun.blocks.inject import Plan, Prefix, require_depth
from clrun.blocks.selection import Selection, cosines
from clrun.data.split import Batch
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.losses import Compete
from clrun.methods.prompted import Init, Keyed, drawn
from clrun.system.errors import Count, NonNegative, Positive


class Dualprompt(Keyed):
    """Prefix keys and values: G-prompts of all tasks in early blocks, E-prompts of the task in later ones.

    A test image gets the E-prompts of the task whose key is closest to its query q, the image's feature under the plain
    backbone.

    loss = CE + pull * (1 - mean over the batch of cos(q, k_t)), so that the key k_t of a task converges to the mean
    direction of its queries. E-prompts and keys of earlier tasks are frozen; G-prompts and the head are trained in
    every task.

    Args:
        backbone: a timm vision transformer, frozen.
        num_classes: C.
        g_blocks: indices of the blocks with G-prompts.
        e_blocks: indices of the blocks with E-prompts; a block in both lists gets both.
        g_length: L_g, number of keys, and of values, of the G-prompt of a block. Code that counts keys and values
            together calls this 2 L_g.
        e_length: L_e, the same number for E-prompts.
        pull: lambda, weight of the loss of the key.
        keys: "learned", or "mean": the mean of the normalised queries of the task's un-augmented images, to which the
            learned key converges. With "mean", training needs no queries.
        copy_prompts: whether the E-prompts of a task start as those of the previous task.
        init: distribution of initial prompts and keys; see `prompted.drawn`.
        selection: "instance", or "batch" (see `blocks.selection.choose`), which makes predictions depend on the batch.
        task_id: "inferred" from the keys, or "given" at test time (task-incremental reading only).
        lr_scale: factor of the budget's learning rate.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        g_blocks: list[Count],
        e_blocks: list[Count],
        g_length: Count,
        e_length: Count,
        pull: NonNegative,
        keys: Literal["learned", "mean"],
        copy_prompts: bool,
        init: Init,
        selection: Selection,
        task_id: Literal["inferred", "given"],
        lr_scale: Positive,
        compete: Compete,
    ) -> None:
        super().__init__(
            backbone, num_classes, selection=selection, task_id=task_id, lr_scale=lr_scale, compete=compete
        )
        require_depth(backbone, g_blocks, "method.g_blocks")
        require_depth(backbone, e_blocks, "method.e_blocks")
        self.g_blocks, self.e_blocks, self.e_length = list(g_blocks), list(e_blocks), e_length
        self.pull, self.learn_keys, self.copy_prompts, self.init = pull, keys == "learned", copy_prompts, init
        self.general = nn.Parameter(drawn(len(g_blocks), 2, g_length, self.width, init=init))
        self.expert = nn.ParameterList()  # by task: [|E|, 2, L_e, D]
        self.keys = nn.ParameterList()  # by task: [D]

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        for old in (*self.expert, *self.keys):
            old.requires_grad_(False)
        shape = (len(self.e_blocks), 2, self.e_length, self.width)
        copied = self.copy_prompts and len(self.expert)
        prompt = self.expert[-1].detach().clone() if copied else drawn(*shape, init=self.init)
        self.expert.append(nn.Parameter(prompt))
        key = drawn(self.width, init=self.init) if self.learn_keys else self.mean_query(task)
        self.keys.append(nn.Parameter(key, requires_grad=self.learn_keys and self.pull > 0))

    def uses_training_queries(self) -> bool:
        return self.learn_keys and self.pull > 0

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        key = self.keys[-1]
        query = self.training_query(batch) if key.requires_grad else None  # before the pass that has a backward pass
        loss = self.classification_loss(self._logits(batch.x, self.expert[-1]), batch, ctx)
        return loss if query is None else loss + self.pull * (1 - cosines(query, key[None]).mean())

    def with_tasks(self, x: Tensor, chosen: Tensor) -> Tensor:
        return self._logits(x, torch.stack([*self.expert])[chosen])

    def _logits(self, x: Tensor, expert: Tensor) -> Tensor:
        """Return logits [B, C] with E-prompts [|E|, 2, L_e, D], or [B, |E|, 2, L_e, D]."""
        parts: dict[int, list[Any]] = {}
        for place, block in enumerate(self.g_blocks):
            parts.setdefault(block, []).append(self.general[place].expand(len(x), -1, -1, -1))
        for place, block in enumerate(self.e_blocks):
            parts.setdefault(block, []).append(expert[..., place, :, :, :].expand(len(x), -1, -1, -1))
        prefix = {block: torch.cat(found, dim=2) for block, found in parts.items()}
        plan = Plan(prefix={block: Prefix(pair[:, 0], pair[:, 1]) for block, pair in prefix.items()})
        logits: Tensor = self.head(self.features(x, plan))
        return logits
