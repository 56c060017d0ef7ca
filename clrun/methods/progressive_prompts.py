"""Progressive Prompts (Razdaibiedina et al., ICLR 2023, arXiv 2301.12314): one soft prompt per task before the text.

A frozen encoder-decoder writes the strings of the classes, as in `text_to_text`; only the prompt of the current task is
trained, with those of earlier tasks, which stay as they are, behind it.

Deviation: the residual network through which the paper passes a prompt while it is trained is left out.

Memory between tasks: one prompt per task, 4 n D bytes, and the strings of all classes. Task id: needed.

Verified: the encoder-decoder and old prompts are the same bit for bit after a stream, so that forgetting is exactly 0;
prompts are read newest first; and a prompt that is the embeddings of a text acts as that text (test_text_to_text).
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
    drawn at random.

    Args:
        backbone: an encoder-decoder that writes texts; it is frozen.
        num_classes: C.
        length: n, the embeddings of a prompt.
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
        normalise: Literal["mean", "sum"],
        chunk: PositiveInt,
        exact_match: bool,
    ) -> None:
        super().__init__(backbone, num_classes, normalise=normalise, chunk=chunk, exact_match=exact_match)
        freeze(backbone)
        self.length = length
        self.prompts = nn.ParameterList()

    def begin_task(self, task: Task, ctx: Context) -> None:
        """Add a prompt, and freeze the earlier ones."""
        super().begin_task(task, ctx)
        for prompt in self.prompts:
            prompt.requires_grad_(False)
        table: Tensor = self.backbone.shared.weight  # type: ignore[union-attr, assignment]
        drawn = torch.randint(len(table), (self.length,), generator=ctx.generator("prompt"))
        self.prompts.append(nn.Parameter(table.detach()[drawn.to(table.device)].clone()))

    def encode(self, x: Tensor, task: int | None = None) -> tuple[Tensor, Tensor]:
        """Return states and mask of the encoder behind the prompts up to that of a task, at most the last one."""
        count = len(self.prompts) if task is None else min(task + 1, len(self.prompts))
        prompts = torch.cat([self.prompts[k] for k in reversed(range(count))])
        found: tuple[Tensor, Tensor] = self.backbone.encode(x, prompts)  # type: ignore[operator]
        return found
