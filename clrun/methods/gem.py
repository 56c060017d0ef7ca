"""GEM: steps that do not increase the loss on any earlier task (Lopez-Paz and Ranzato, NeurIPS 2017, 1706.08840).

Memory between tasks: M (s + 8) bytes, M = capacity, s bytes a stored input; one gradient an earlier task during a step,
hence time and transient memory of a step grow with the tasks. Task id: not needed.

Verified: a projected step hurts no earlier task and is the nearest such, one constraint is a_gem
(test_methods_gradients, test_blocks_gradients).
"""

import torch
from torch import Tensor, nn

from clrun.blocks.buffers import per_process
from clrun.blocks.gradients import project_cone
from clrun.blocks.params import Params, eval_mode, gradients, select
from clrun.data.split import Batch
from clrun.learning.context import Context
from clrun.learning.knobs import Knob
from clrun.learning.losses import Compete, masked_cross_entropy
from clrun.methods.episodic import Episodic, Rule
from clrun.system.errors import Count, NonNegative, PositiveInt


class Gem(Episodic):
    """g <- the nearest vector with <g, g_k> >= 0 for the gradient g_k on the memory of each earlier task k.

    A row of the memory is judged among the classes that compete for its own task. g_k is taken in eval mode, the mode
    the loss is measured in, on un-augmented rows. budget.clip_norm is applied before the projection (a second time
    after it, which keeps the direction). The step obeys the constraints with plain SGD (`budget=online`); momentum,
    adaptive rates and weight decay come after the projection and break them.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        capacity: M, rows in memory over all processes; 0 is finetuning. Published: 256 for each task.
        memory: "ring": the last M / T rows of each of T tasks. "reservoir": a uniform sample of all rows.
            "class_balanced": as many rows of each class as of any other.
        memory_batch_size: rows of a task that its gradient is taken on, over all processes; null for all it has.
        margin: gamma, a lower bound of the weight of every g_k in a step that violates any constraint; favours backward
            transfer.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    knobs = (Knob("margin"),)

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        capacity: Count,
        memory: Rule,
        memory_batch_size: PositiveInt | None,
        margin: NonNegative,
        compete: Compete,
    ) -> None:
        super().__init__(backbone, num_classes, capacity=capacity, memory=memory, compete=compete)
        self.memory_batch_size, self.margin = memory_batch_size, margin

    def adjust_gradients(self, ctx: Context) -> None:
        if not self.capacity or ctx.task.index == 0:
            return
        params = select(self)
        if ctx.budget.clip_norm is not None:
            nn.utils.clip_grad_norm_(list(params.values()), ctx.budget.clip_norm)
        current = gradients(params)
        references = [self._reference(params, k, ctx) for k in range(ctx.task.index)]
        for name, gradient in project_cone(current, references, margin=self.margin).items():
            params[name].grad = gradient

    def _reference(self, params: dict[str, nn.Parameter], position: int, ctx: Context) -> Params:
        """Return the gradient on the memory of the task at `position`, averaged over the processes."""
        for parameter in params.values():
            parameter.grad = None
        old = self.memory.read(self._slots(position, ctx))
        if len(old):
            self._mean_loss(old, ctx).backward()  # type: ignore[no-untyped-call]
        ctx.hardware.average_gradients(list(params.values()))
        return gradients(params)

    def _slots(self, position: int, ctx: Context) -> Tensor:
        """Return the slots of the rows of a task that its gradient is taken on."""
        slots = (self.memory.t[: len(self.memory)] == position).nonzero()[:, 0]
        if self.memory_batch_size is None:
            return slots
        rank, world = ctx.hardware.rank, ctx.hardware.world
        drawn = torch.randperm(len(slots), generator=ctx.generator("replay", rank))
        return slots[drawn[: per_process(self.memory_batch_size, rank=rank, world=world)].to(slots.device)]

    def _mean_loss(self, old: Batch, ctx: Context) -> Tensor:
        """Return the mean loss [] on rows of the memory."""
        with eval_mode(self), ctx.hardware.autocast():
            x = ctx.hardware.layout(ctx.stream.transform.eval(old.x))
            return masked_cross_entropy(self(x), old.y, self.competing(old.t, ctx))
