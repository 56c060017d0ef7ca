"""VPT: visual prompt tuning, the sequential baseline of all prompt methods (Jia et al., ECCV 2022, arXiv 2203.12119).

Memory between tasks: the head and the prompts, L D floats, or n L D for depth=deep and n blocks; with reinit=true
prompts for each task. Task id: needed with reinit=true only.

Verified: without prompts it equals the plain model, and initial prompts are within the bound of the paper
(test_methods_prompts).
"""

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from clrun.blocks.inject import Plan
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.losses import Compete
from clrun.learning.method import freeze
from clrun.methods.prompted import Prompted, vpt_prompt
from clrun.system.errors import Count, Fraction, Positive, PositiveInt


class Vpt(Prompted):
    """Trained tokens after the class token, at the input ("shallow") or separate ones at every block ("deep").

    All tasks train the same prompts, which therefore forget.

    Args:
        backbone: a timm vision transformer, frozen.
        num_classes: C.
        depth: "shallow": the tokens enter the first block and pass through all others. "deep": each block has its own.
        length: L, the number of tokens; 0 is linear probing.
        dropout: probability with which an entry of the prompts is dropped in training.
        prompt_width: width of the prompts before a trained linear map to D; None for prompts of width D without map.
        reinit: new prompts for each task, which are frozen afterwards: an upper bound that needs the task id.
        lr_scale: factor of the budget's learning rate.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    given_by: ClassVar[str] = "reinit"

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        depth: Literal["shallow", "deep"],
        length: Count,
        dropout: Fraction,
        prompt_width: PositiveInt | None,
        reinit: bool,
        lr_scale: Positive,
        compete: Compete,
    ) -> None:
        super().__init__(backbone, num_classes, lr_scale=lr_scale, compete=compete)
        self.blocks = 1 if depth == "shallow" else len(backbone.blocks)  # type: ignore[arg-type]
        self.length, self.dropout, self.reinit = length, dropout, reinit
        self.needs_task_id = reinit
        self.stored = prompt_width or self.width
        self.projection = nn.Identity() if prompt_width is None else nn.Linear(prompt_width, self.width)
        self.prompts = nn.ParameterList()

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        if self.reinit or not len(self.prompts):
            for old in self.prompts:
                old.requires_grad_(False)
            prompt = vpt_prompt(self.backbone, self.blocks, self.length, self.stored)
            self.prompts.append(nn.Parameter(prompt))

    def end_task(self, task: Task, ctx: Context) -> None:
        if self.reinit:
            freeze(self.projection)  # a change would also change the prompts of earlier tasks

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        prompt = self.prompts[-1 if task is None or not self.reinit else task]
        prompt = F.dropout(self.projection(prompt), self.dropout, self.training)
        logits: Tensor = self.head(self.features(x, Plan(tokens=dict(enumerate(prompt)))))
        return logits
