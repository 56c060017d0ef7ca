"""GEM: steps that do not increase the loss on any earlier task (Lopez-Paz and Ranzato, NeurIPS 2017, 1706.08840).

Memory between tasks: M (s + 8) bytes for M stored rows, each with an input of s bytes, its class and its task (8
bytes). A step computes one gradient per earlier task, so that its time and its transient memory grow with the number of
tasks. Task id: not needed.

Verified: a projected step increases the loss of no earlier task and is the nearest such step, and with one constraint
it is a_gem (test_methods_gradients, test_blocks_gradients).
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

    The loss of a memory row is taken over the classes that compete for the row's own task. g_k is computed in eval mode
    on un-augmented rows. budget.clip_norm is applied before the projection and again after it, where it keeps the
    direction. With plain SGD (`budget=online`) the step satisfies the constraints. Momentum, adaptive learning rates
    and weight decay are applied after the projection and may violate them.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        capacity: M, rows in memory over all processes; 0 is finetuning. Published: 256 per task.
        memory: "ring": the last M / T rows of each of T tasks. "reservoir": a uniform sample of all rows.
            "class_balanced": equally many rows of every class.
        memory_batch_size: number of memory rows that the gradient of a task is computed on, over all processes; null
            for all.
        margin: gamma, lower bound of the weight of every g_k in a step that violates a constraint; larger values favour
            backward transfer.
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
