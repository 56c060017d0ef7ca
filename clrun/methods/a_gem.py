"""A-GEM: steps that do not increase the mean loss on a memory (Chaudhry et al., ICLR 2019, arXiv 1812.00420).

Memory between tasks: M (s + 8) bytes, M = capacity, s bytes a stored input; one more gradient during a step. Task id:
not needed.

Verified: steps are projected only where they would hurt the memory, missing gradients count as zero, the memory pass
leaves statistics and random numbers alone (test_methods_replay).
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

    A row of the memory is judged among the classes that compete for its own task. r is taken in eval mode, the mode
    the loss is measured in: running statistics and dropout know nothing of the memory pass. The step obeys the
    constraint with plain SGD; momentum, adaptive rates and weight decay come after the projection. So does
    budget.clip_norm, which shortens the step but keeps its direction.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        capacity: M, rows in memory over all processes; 0 is finetuning.
        memory: "ring": the last M / T rows of each of T tasks. "reservoir": a uniform sample of all rows.
            "class_balanced": as many rows of each class as of any other.
        memory_batch_size: rows that r is taken on, over all processes.
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
