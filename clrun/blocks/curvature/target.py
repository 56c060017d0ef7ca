"""The function that an estimate of curvature differentiates: the logits of a method on rows of a task.

Every estimate is made of products J_n' s, where J_n is the Jacobian of the logits of row n and s [C] is one of the K
columns of that row; see `estimate`.

Shapes: `N` rows, `B` rows of a batch, `C` classes, `K` columns per row.
"""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clrun.blocks.params import Params, eval_mode, select
from clrun.data.split import Batch, Split
from clrun.learning.context import Context
from clrun.learning.method import Method

Labels = Literal["exact", "sampled", "empirical", "predicted", "batched"]
# "output": the gradient 2 z of |z|^2 of logits z, which needs no labels. For a squared error, whose Hessian in the
# logits is the identity whatever the labels: "unit", the unit vectors of all competing classes, or "normal", one draw
# from N(0, I) on these classes, which has the same expectation.
Columns = Labels | Literal["output", "unit", "normal"]


@dataclass(frozen=True)
class Target:
    """The logits of a method on some rows, as functions of some of its parameters.

    Attributes:
        method: the method.
        ctx: context of the current task; its generator "fisher" draws rows and labels.
        split: the rows.
        params: the parameters that the estimate covers, by their name in the method.
        names: the name of each of these parameters in the submodule of the estimate, by its name in the method.
        columns: how the columns of a row are chosen, see `labels` of `estimate`.
        top_k: largest number of columns per row.
        position: position of the task, for a method whose `forward` needs it; None for other methods.
    """

    method: Method
    ctx: Context
    split: Split
    params: dict[str, nn.Parameter]
    names: dict[str, str]
    columns: Columns
    top_k: int
    position: int | None

    @classmethod
    def of(
        cls,
        method: Method,
        split: Split,
        ctx: Context,
        of: nn.Module,
        *,
        columns: Columns,
        samples: int | None,
        top_k: int | None,
    ) -> "Target":
        """Return the target for these options of `estimate`: rows are drawn and parameters are collected."""
        if samples is not None and samples < len(split):
            rows = torch.randperm(len(split), generator=ctx.generator("fisher"))[:samples]
            split = split.select(rows.to(split.y.device))
        own = {id(p): name for name, p in select(of).items()}
        params = {name: p for name, p in select(method).items() if id(p) in own}
        names = {name: own[id(p)] for name, p in params.items()}
        tasks = torch.arange(ctx.task.index + 1, device=ctx.hardware.device)
        competing = int(method.competing(tasks, ctx).sum(dim=1).max())
        position = ctx.task.index if method.needs_task_id else None
        return cls(method, ctx, split, params, names, columns, min(top_k or competing, competing), position)

    @property
    def count(self) -> int:
        """The number K of columns per row."""
        return self.top_k if self.columns in ("exact", "unit") else 1

    def batches(self, size: int) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        """Yield batches of prepared rows, the mask [B, C] of competing classes and noise [B, C] to draw labels."""
        generator = self.ctx.generator("fisher")
        for batch in self.split.batches(size):
            mask = self.method.competing(batch.t, self.ctx)
            yield batch, mask, torch.empty(mask.shape).exponential_(generator=generator).to(mask.device)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put the method in eval mode, and run compiled modules eagerly: functorch cannot transform compiled code."""
        eager: AbstractContextManager[object] = nullcontext()
        if self.ctx.hardware.compile:
            eager = torch.compiler.set_stance("force_eager")
        with ExitStack() as stack:
            stack.enter_context(eval_mode(self.method))
            stack.enter_context(eager)
            stack.enter_context(warnings.catch_warnings())
            # functorch has no batching rule for attention and loops over its rows, which costs little here.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            yield

    def logits(self, params: Params, x: Tensor) -> Tensor:
        """Return the logits [B, C] of prepared rows x under `params`; other parameters have their present values."""
        arguments = (x,) if self.position is None else (x, self.position)
        logits: Tensor = functional_call(self.method, params, arguments)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def directions(self, logits: Tensor, y: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
        """Return the columns [..., K, C] of rows.

        Args:
            logits: [..., C].
            y: [...] long, labels.
            mask: [..., C] bool, True for classes that compete.
            noise: [..., C], exponentially distributed, to draw labels.
        """
        if self.columns == "output":
            return 2 * logits.masked_fill(~mask, 0)[..., None, :]
        if self.columns == "normal":  # the exponential noise e gives uniform numbers 1 - exp(-e), and these normal ones
            normal: Tensor = torch.special.ndtri(-torch.expm1(-noise.double())).to(logits)
            return normal.masked_fill(~mask, 0)[..., None, :]
        if self.columns == "unit":
            own = mask.to(logits.dtype).topk(self.top_k)
            return torch.eye(mask.shape[-1]).to(logits)[own.indices] * own.values[..., None]
        p = logits.masked_fill(~mask, float("-inf")).softmax(dim=-1)
        if self.columns == "exact":
            choice = p.topk(self.top_k).indices  # top_k is the number of competing classes unless it is limited
        elif self.columns == "empirical":
            choice = y[..., None]
        elif self.columns == "predicted":
            choice = p.argmax(dim=-1, keepdim=True)
        else:  # argmax p / noise is a draw from p; it needs no cumulative sum and never draws a class of probability 0
            choice = (p / noise).argmax(dim=-1, keepdim=True)
        columns = torch.eye(p.shape[-1], device=p.device, dtype=p.dtype)[choice] - p[..., None, :]
        return columns * p.gather(-1, choice)[..., None].sqrt() if self.columns == "exact" else columns


__all__ = ["Columns", "Labels", "Target"]
