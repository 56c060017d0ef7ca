"""CODA-Prompt: prefixes composed of components with learned attention (Smith et al., CVPR 2023, arXiv 2211.13218).

Memory between tasks: per prompted block and task, m components of (L + 2) D floats (prefix, key and attention), and the
head. Task id: not needed.

Verified: prompts are the weighted sum of the paper, and new components start orthonormal to trained ones, which stay
the same bit for bit (test_methods_prompts).
"""

import torch
from torch import Tensor, nn

from clrun.blocks.inject import Plan, Prefix, require_depth
from clrun.blocks.orthogonality import deviation, orthonormal
from clrun.data.split import Batch
from clrun.data.stream import Stream, Task
from clrun.learning.context import Context
from clrun.learning.losses import Compete
from clrun.methods.prompted import Prompted
from clrun.system.errors import ConfigError, Count, NonNegative, Positive, PositiveInt


class CodaPrompt(Prompted):
    """In each prompted block the prefix is a sum over components P_j, weighted by cos(q * A_j, K_j).

    q is the query, the image's feature under the plain backbone; one half of the prefix are keys, the other half
    values. Each task adds m components with keys K and attention A, which start orthonormal and orthogonal to those of
    earlier tasks, and freezes the earlier ones. Weights may be negative. The number of tasks need not be known in
    advance. Deviation: the published code uses Gram-Schmidt against rows that are no longer orthogonal, which leaves
    cosines of about 0.1; here new rows are orthogonal to a basis of the earlier ones.

    loss = CE + orthogonality * sum over blocks and over Z in (P, K, A) of the mean square of Z Z' - I.

    Args:
        backbone: a timm vision transformer, frozen.
        num_classes: C.
        components: m, number of components that each task adds in each block (published: 100 / tasks).
        length: L, length of a component; even. One half are keys, the other half values.
        blocks: indices of the blocks with prefixes.
        orthogonality: weight of the penalty, mu.
        lr_scale: factor of the budget's learning rate.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        components: PositiveInt,
        length: Count,
        blocks: list[Count],
        orthogonality: NonNegative,
        lr_scale: Positive,
        compete: Compete,
    ) -> None:
        super().__init__(backbone, num_classes, lr_scale=lr_scale, compete=compete)
        require_depth(backbone, blocks, "method.blocks")
        if length % 2:
            raise ConfigError(f"method.length: must be even (half of it are keys, half values), got {length}")
        self.components, self.length, self.blocks = components, length, list(blocks)
        self.orthogonality = orthogonality
        self.prompts = nn.ParameterList()  # by task: [|blocks|, m, L D]
        self.keys = nn.ParameterList()  # by task: [|blocks|, m, D]
        self.attention = nn.ParameterList()  # by task: [|blocks|, m, D]

    def check(self, stream: Stream) -> None:
        super().check(stream)
        number = len(stream.tasks)
        if number > self.width:
            raise ConfigError(
                f"method.components: {number} tasks need as many orthogonal directions, the features have "
                f"{self.width}; use fewer tasks or a wider backbone"
            )
        if number * self.components > self.width:
            raise ConfigError(
                f"method.components: {number} tasks of {self.components} components need {number * self.components} "
                f"orthogonal directions, the features have {self.width}; take at most {self.width // number}"
            )

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        for pool, width in ((self.prompts, self.length * self.width), (self.keys, self.width)):
            self._extend(pool, width)
        self._extend(self.attention, self.width)

    def _extend(self, pool: nn.ParameterList, width: int) -> None:
        """Freeze what is there and add m rows of this width in each block."""
        for old in pool:
            old.requires_grad_(False)
        new = torch.zeros(len(self.blocks), self.components, width)
        for place in range(len(self.blocks) if width else 0):
            before = torch.cat([old[place].detach().cpu() for old in pool]) if len(pool) else torch.zeros(0, width)
            new[place] = orthonormal(before, self.components)
        pool.append(nn.Parameter(new))

    def uses_training_queries(self) -> bool:
        return True

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        logits = self.forward_with(self.training_query(batch), batch.x)
        loss = self.classification_loss(logits, batch, ctx)
        if self.orthogonality:
            pools = (self.prompts, self.keys, self.attention) if self.length else (self.keys, self.attention)
            loss = loss + self.orthogonality * torch.stack([deviation(torch.cat([*p], dim=1)) for p in pools]).sum()
        return loss

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        return self.forward_with(self.query(x), x)

    def constant(self, x: Tensor) -> Tensor | None:
        return self.query(x)

    def forward_with(self, constant: Tensor, x: Tensor, task: int | None = None) -> Tensor:
        weights = self.weights(constant)
        prompts = torch.cat([*self.prompts], dim=1)
        composed = torch.einsum("bpm,pmw->bpw", weights, prompts)
        composed = composed.reshape(len(x), len(self.blocks), 2, self.length // 2, self.width)
        plan = Plan(prefix={b: Prefix(composed[:, k, 0], composed[:, k, 1]) for k, b in enumerate(self.blocks)})
        logits: Tensor = self.head(self.features(x, plan if self.length else Plan()))
        return logits

    def weights(self, query: Tensor) -> Tensor:
        """Return [B, |blocks|, components so far], the cosines of q * A_j with K_j for queries q [B, D].

        Both the product and the length are matrix products: no tensor of B x components x D is formed.
        """
        attention, keys = torch.cat([*self.attention], dim=1), torch.cat([*self.keys], dim=1)
        with torch.autocast(query.device.type, enabled=False):
            products = torch.einsum("bd,pmd->bpm", query, attention * keys)
            squares = torch.einsum("bd,pmd->bpm", query.square(), attention.square())
            cosines: Tensor = products / (squares.sqrt() * keys.norm(dim=2)).clamp_min(1e-12)
        return cosines
