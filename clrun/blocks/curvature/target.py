"""What an estimate of curvature differentiates: the logits of a learner at rows of a task, along chosen columns.

Shapes: `N` rows, `B` rows of a batch, `C` classes, `K` columns a row, `P` numbers in the parameters.
"""

import warnings
from collections.abc import Iterator, Sequence
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

Labels = Literal["exact", "sampled", "true", True, "predicted", "batched"]  # YAML reads the bare word as a boolean
Columns = Labels | Literal["output"]  # "output": the gradient 2 z of |z|^2, for importances without labels


@dataclass(frozen=True)
class Target:
    """Logits of a learner at some rows, as functions of some of its parameters.

    Attributes:
        method: the learner.
        ctx: context of the current task; its generator "fisher" draws rows and labels.
        split: the rows.
        params: the parameters that count, by their name in the method.
        names: their name in the submodule that the estimate is about, by their name in the method.
        columns: see `estimate`.
        top_k: most columns of a row.
        position: the task's position for a method that needs it; None otherwise.
    """

    method: "Method"
    ctx: "Context"
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
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
    ) -> "Target":
        """Choose rows and parameters; see `estimate`."""
        if samples is not None and samples < len(split):
            rows = torch.randperm(len(split), generator=ctx.generator("fisher"))[:samples]
            split = split.select(rows.to(split.y.device))
        own = {id(p): name for name, p in select(of, include=include, exclude=exclude).items()}
        params = {name: p for name, p in select(method).items() if id(p) in own}
        names = {name: own[id(p)] for name, p in params.items()}
        columns = "true" if columns is True else columns
        competing = int(ctx.stream.candidates(ctx.task.index + 1).sum(dim=1).max())
        position = ctx.task.index if method.needs_task_id else None
        return cls(method, ctx, split, params, names, columns, min(top_k or competing, competing), position)

    @property
    def count(self) -> int:
        """K."""
        return self.top_k if self.columns == "exact" else 1

    def batches(self, size: int) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        """Yield batches of prepared rows, the classes that compete and the noise that draws labels, [B, C] each."""
        generator = self.ctx.generator("fisher")
        for batch in self.split.batches(size):
            mask = self.ctx.mask(batch.t)
            yield batch, mask, torch.empty(mask.shape).exponential_(generator=generator).to(mask.device)

    @contextmanager
    def still(self) -> Iterator[None]:
        """Put the learner in eval mode, and run code that was compiled eagerly, as gradients of gradients need it."""
        eager: AbstractContextManager[object] = nullcontext()
        if self.ctx.hardware.compile:
            eager = torch.compiler.set_stance("force_eager")
        with ExitStack() as stack:
            stack.enter_context(eval_mode(self.method))
            stack.enter_context(eager)
            stack.enter_context(warnings.catch_warnings())
            # Attention has no batching rule in functorch: its rows are taken one by one, which costs little here.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            yield

    def logits(self, params: Params, x: Tensor) -> Tensor:
        """Return the logits [B, C] under `params`."""
        arguments = (x,) if self.position is None else (x, self.position)
        logits: Tensor = functional_call(self.method, params, arguments)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def directions(self, logits: Tensor, y: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
        """Return [..., K, C], the columns of rows with logits [..., C]."""
        if self.columns == "output":
            return 2 * logits.masked_fill(~mask, 0)[..., None, :]
        p = logits.masked_fill(~mask, float("-inf")).softmax(dim=-1)
        if self.columns == "exact":
            choice = p.topk(self.top_k).indices  # without a limit: every class that competes
        elif self.columns == "true":
            choice = y[..., None]
        elif self.columns == "predicted":
            choice = p.argmax(dim=-1, keepdim=True)
        else:  # argmax p / noise is a draw from p, needs no cumulative sum and never meets a class without probability
            choice = (p / noise).argmax(dim=-1, keepdim=True)
        columns = torch.eye(p.shape[-1], device=p.device, dtype=p.dtype)[choice] - p[..., None, :]
        return columns * p.gather(-1, choice)[..., None].sqrt() if self.columns == "exact" else columns
