"""DAP: prompts made from the tokens of each block and an embedding of the task (Jung et al., ICCV 2023, p. 11847).

Memory between tasks: n (L N + L + 2 D e + 4 D) floats for n prompted blocks, L prompts, N tokens per image and
embeddings of width e; D + e floats per task for its key and embedding; and the head. Task id: not needed.

Verified: prompts follow the formula of the paper, no label leaks, and a given task gives the predictions of the
inferred one where they agree (test_methods_prompts).
"""

from typing import Literal

import torch
from torch import Tensor, nn

from clrun.blocks.inject import Plan
from clrun.blocks.selection import Selection, cosines
from clrun.data.split import Batch
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.losses import Compete
from clrun.learning.method import freeze
from clrun.methods.prompted import Keyed, vpt_prompt
from clrun.system.errors import NonNegative, Positive, PositiveInt

FAR_BELOW = 1e4  # subtracted by `task_logit_mask` from the logits of classes of other tasks


class Dap(Keyed):
    """At every block prompts are mixed from the image's tokens, then scaled and shifted as the task's embedding says.

    A test image gets the embedding of the task whose key is closest to its query q, the image's feature under the plain
    backbone.

    loss = CE - pull * mean over the batch of cos(q, k_t), with the key k_t of the current task. After the first task
    the mixers are frozen; keys and embeddings of earlier tasks are always frozen. Normalisation layers and FiLM maps
    are trained in every task, so that the prompts of earlier tasks drift, as in the authors' code (naver-ai/dap-cl).

    In that code a whole test batch votes for one task (`selection: batch`), and on ImageNet-R the logits are also
    restricted to the classes of that task (`task_logit_mask`). On batches of one task, both reveal the task.

    Args:
        backbone: a timm vision transformer, frozen.
        num_classes: C.
        length: L, number of prompts of each block.
        embedding: e, width of a task's embedding.
        pull: lambda, weight of the pull of the task's key towards queries.
        skip_last_block: whether the last block has no prompts.
        task_logit_mask: subtract 10,000 from the logits of classes that do not belong to the inferred task, see above.
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
        length: PositiveInt,
        embedding: PositiveInt,
        pull: NonNegative,
        skip_last_block: bool,
        task_logit_mask: bool,
        selection: Selection,
        task_id: Literal["inferred", "given"],
        lr_scale: Positive,
        compete: Compete,
    ) -> None:
        super().__init__(
            backbone, num_classes, selection=selection, task_id=task_id, lr_scale=lr_scale, compete=compete
        )
        tokens = int(backbone.num_prefix_tokens) + int(backbone.patch_embed.num_patches)  # type: ignore[arg-type, union-attr]
        blocks = len(backbone.blocks) - int(skip_last_block)  # type: ignore[arg-type]
        self.generators = nn.ModuleList(PromptGenerator(self.width, tokens, length, embedding) for _ in range(blocks))
        self.embedding, self.pull = embedding, pull
        self.task_logit_mask = task_logit_mask
        self.keys = nn.ParameterList()  # by task: [D]
        self.embeddings = nn.ParameterList()  # by task: [e]
        self.classes: list[list[int]] = []  # by task

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        for old in (*self.keys, *self.embeddings):
            old.requires_grad_(False)
        self.keys.append(nn.Parameter(vpt_prompt(self.backbone, self.width), requires_grad=self.pull > 0))
        self.embeddings.append(nn.Parameter(torch.randn(self.embedding)))
        self.classes.append(task.classes.tolist())

    def end_task(self, task: Task, ctx: Context) -> None:
        for generator in self.generators:
            assert isinstance(generator, PromptGenerator)
            freeze(generator.mixer)

    def uses_training_queries(self) -> bool:
        return self.pull > 0

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        query = self.training_query(batch) if self.pull else None  # before the pass that has a backward pass
        loss = self.classification_loss(self._logits(batch.x, self.embeddings[-1][None]), batch, ctx)
        return loss if query is None else loss - self.pull * cosines(query, self.keys[-1][None]).mean()

    def with_tasks(self, x: Tensor, chosen: Tensor) -> Tensor:
        logits = self._logits(x, torch.stack([*self.embeddings])[chosen])
        if not self.task_logit_mask:
            return logits
        seen = [c for classes in self.classes for c in classes]
        lowered = torch.zeros(len(self.classes), logits.shape[1], device=x.device)
        lowered[:, seen] = -FAR_BELOW
        for row, classes in zip(lowered, self.classes, strict=True):
            row[classes] = 0
        return logits + lowered[chosen]

    def _logits(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Return logits [B, C] with task embeddings [B, e], or [1, e] for all."""
        plan = Plan(tokens={b: _Generated(g, embedding) for b, g in enumerate(self.generators)})  # type: ignore[arg-type]
        logits: Tensor = self.head(self.features(x, plan))
        return logits


class PromptGenerator(nn.Module):
    """Prompts of one block: gamma * (mixed tokens) + beta, with gamma and beta of length 1 from the task's embedding.

    Args:
        width: D.
        tokens: N.
        length: L.
        embedding: e.
    """

    def __init__(self, width: int, tokens: int, length: int, embedding: int) -> None:
        super().__init__()
        self.length = length
        self.norm = nn.LayerNorm(width)
        self.mixer = nn.Linear(tokens, length)
        nn.init.zeros_(self.mixer.weight)
        nn.init.zeros_(self.mixer.bias)
        self.film = nn.Linear(embedding, 2 * width)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Return prompts [B, L, D] for tokens x [B, N, D] and embeddings [B, e] or [1, e]."""
        mixed = self.mixer(self.norm(x).transpose(1, 2)).transpose(1, 2)
        gamma, beta = (p / p.detach().norm(dim=1, keepdim=True) for p in self.film(embedding).chunk(2, dim=1))
        prompts: Tensor = gamma[:, None] * mixed + beta[:, None]
        return prompts


class _Generated:
    """Prompts of one block for one forward pass."""

    def __init__(self, generator: PromptGenerator, embedding: Tensor) -> None:
        self.generator, self.embedding, self.length = generator, embedding, generator.length

    def __call__(self, x: Tensor) -> Tensor:
        prompts: Tensor = self.generator(x, self.embedding)
        return prompts
