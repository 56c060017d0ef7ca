"""A-GEM: steps that do not increase the mean loss on a memory (Chaudhry et al., ICLR 2019, arXiv 1812.00420).

Memory between tasks: M (s + 8) bytes for M stored rows, each with an input of s bytes, its class and its task (8
bytes). A step also holds one more gradient. Task id: not needed.

Verified: steps are projected only where they would increase the loss on the memory, missing gradients count as zero,
and the pass over the memory leaves running statistics and random numbers unchanged (test_methods_replay).
"""

from torch import nn

from clrun.blocks.buffers import per_process
from clrun.blocks.gradients import project_halfspace
from clrun.blocks.params import eval_mode, gradients, select
from clrun.learning.context import Context
from clrun.learning.losses import Compete, masked_cross_entropy
from clrun.methods.episodic import Episodic, Rule
from clrun.system.errors import Count, PositiveInt


class AGem(Episodic):
    """g <- g - min(<g, r>, 0) / |r|^2 r, with r the gradient on a batch of the memory of earlier tasks.

    The loss of a memory row is taken over the classes that compete for the row's own task. r is computed in eval mode,
    so that this pass changes no running statistics and draws no dropout. With plain SGD the step satisfies the
    constraint. Momentum, adaptive learning rates and weight decay are applied after the projection and may violate it.
    budget.clip_norm is also applied after it; it shortens the step and keeps its direction.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        capacity: M, rows in memory over all processes; 0 is finetuning.
        memory: "ring": the last M / T rows of each of T tasks. "reservoir": a uniform sample of all rows.
            "class_balanced": equally many rows of every class.
        memory_batch_size: number of memory rows that r is computed on, over all processes.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        capacity: Count,
        memory: Rule,
        memory_batch_size: PositiveInt,
        compete: Compete,
    ) -> None:
        super().__init__(backbone, num_classes, capacity=capacity, memory=memory, compete=compete)
        self.memory_batch_size = memory_batch_size

    def adjust_gradients(self, ctx: Context) -> None:
        if not self.capacity or ctx.task.index == 0:
            return
        params = select(self)
        current = gradients(params)
        self._reference(params, ctx)
        for name, gradient in project_halfspace(current, gradients(params)).items():
            params[name].grad = gradient

    def _reference(self, params: dict[str, nn.Parameter], ctx: Context) -> None:
        """Put r into `.grad`, averaged over the processes."""
        rank, world = ctx.hardware.rank, ctx.hardware.world
        old = self.memory.sample(
            per_process(self.memory_batch_size, rank=rank, world=world), ctx.generator("replay", rank)
        )
        for parameter in params.values():
            parameter.grad = None
        if len(old):
            with eval_mode(self), ctx.hardware.autocast():
                loss = masked_cross_entropy(self(ctx.augment(old.x)), old.y, self.competing(old.t, ctx))
            loss.backward()  # type: ignore[no-untyped-call]
        ctx.hardware.average_gradients(list(params.values()))
