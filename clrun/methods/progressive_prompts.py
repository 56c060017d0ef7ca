"""Progressive Prompts (Razdaibiedina et al., ICLR 2023, arXiv 2301.12314): one soft prompt per task before the text.

A frozen encoder-decoder writes the strings of the classes, as in `text_to_text`; only the prompt of the current task is
trained, with those of earlier tasks, which stay as they are, behind it. The residual network through which a prompt may
pass while it is trained has the form and the width (800) of `ResMLP`, "MLP1" with layer normalisation, in
`T5_codebase/t5_continual.py` of the authors' repository arazd/ProgressivePrompts (a71dc9a), where it is off by default.

Deviation: no early stopping on validation rows. Unverified: which form of the network the tables of the paper have.

Memory between tasks: one prompt per task, 4 n D bytes, and the strings of all classes. Task id: needed.

Verified: the encoder-decoder and old prompts are the same bit for bit after a stream, so that forgetting is exactly 0;
prompts are read newest first; a prompt that is the embeddings of a text acts as that text; and a prompt acts after its
task as it did behind the residual network (test_text_to_text).
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from clrun.data.stream import Setting, Task
from clrun.learning.context import Context
from clrun.learning.method import freeze
from clrun.methods.text_to_text import TextToText
from clrun.system.errors import PositiveInt


class ProgressivePrompts(TextToText):
    """Train log p(s_y | [P_t, P_{t-1}, ..., P_1, x]) over P_t alone, the prompt of task t; see `TextToText`.

    A row of task t is predicted with the prompts up to P_t. A new prompt begins as the embeddings of tokens that are
    drawn at random. With a network it is P + LN(W_2 relu(W_1 P + b_1) + b_2) while its task is learned; then the result
    is kept, and the network is not.

    Args:
        backbone: an encoder-decoder that writes texts; it is frozen.
        num_classes: C.
        length: n, the embeddings of a prompt.
        bottleneck: width of the residual network, the rows of W_1; None for no network.
        normalise: see `TextToText`.
        chunk: see `TextToText`.
        exact_match: see `TextToText`.
    """

    needs_task_id = True
    settings: ClassVar[frozenset[Setting]] = frozenset({"til"})

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        length: PositiveInt,
        bottleneck: PositiveInt | None,
        normalise: Literal["mean", "sum"],
        chunk: PositiveInt,
        exact_match: bool,
    ) -> None:
        super().__init__(backbone, num_classes, normalise=normalise, chunk=chunk, exact_match=exact_match)
        freeze(backbone)
        self.length, self.bottleneck = length, bottleneck
        self.prompts = nn.ParameterList()
        self.residual: nn.Module | None = None

    def begin_task(self, task: Task, ctx: Context) -> None:
        """Add a prompt and its network, and freeze the earlier prompts."""
        super().begin_task(task, ctx)
        for prompt in self.prompts:
            prompt.requires_grad_(False)
        table: Tensor = self.backbone.shared.weight  # type: ignore[union-attr, assignment]
        drawn = torch.randint(len(table), (self.length,), generator=ctx.generator("prompt"))
        self.prompts.append(nn.Parameter(table.detach()[drawn.to(table.device)].clone()))
        if self.bottleneck is not None:
            first, second = nn.Linear(table.shape[1], self.bottleneck), nn.Linear(self.bottleneck, table.shape[1])
            self.residual = nn.Sequential(first, nn.ReLU(), second, nn.LayerNorm(table.shape[1]))

    def end_task(self, task: Task, ctx: Context) -> None:
        """Keep what the network makes of the prompt, and forget the network."""
        with torch.no_grad():
            self.prompts[-1].copy_(self.prompt(len(self.prompts) - 1))
        self.residual = None
        super().end_task(task, ctx)

    def prompt(self, task: int) -> Tensor:
        """Return the prompt [n, D] of the task at a position; the last one passes through its network."""
        own: Tensor = self.prompts[task]
        if self.residual is None or task < len(self.prompts) - 1:
            return own
        passed: Tensor = own + self.residual(own)
        return passed

    def encode(self, x: Tensor, task: int | None = None) -> tuple[Tensor, Tensor]:
        """Return states and mask of the encoder behind the prompts up to that of a task, at most the last one."""
        count = len(self.prompts) if task is None else min(task + 1, len(self.prompts))
        prompts = torch.cat([self.prompt(k) for k in reversed(range(count))])
        found: tuple[Tensor, Tensor] = self.backbone.encode(x, prompts)  # type: ignore[operator]
        return found
