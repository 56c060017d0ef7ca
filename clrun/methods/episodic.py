"""Base of methods that keep rows of every task in a memory, which is filled when the task ends."""

from typing import Literal

from torch import nn

from clrun.blocks.buffers import Buffer, ClassBalancedBuffer, ReservoirBuffer, RingBuffer, per_process
from clrun.data.stream import Stream, Task
from clrun.learning.context import Context
from clrun.learning.losses import Compete
from clrun.learning.method import Method
from clrun.system.errors import ConfigError

Rule = Literal["ring", "reservoir", "class_balanced"]
RULES = {"reservoir": ReservoirBuffer, "ring": RingBuffer, "class_balanced": ClassBalancedBuffer}


class Episodic(Method):
    """A method with a memory that is filled after each task, in one pass over the task's rows in random order.

    While a task is learned, the memory therefore holds rows of earlier tasks only. With several processes, each process
    holds its share of the rows.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        capacity: M, rows in memory over all processes.
        memory: "ring": the last M / T rows of each of T tasks. "reservoir": a uniform sample of all rows.
            "class_balanced": equally many rows of every class.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, *, capacity: int, memory: Rule, compete: Compete) -> None:
        super().__init__(backbone, num_classes, compete=compete)
        self.capacity = capacity
        self.memory: Buffer = RULES[memory](capacity)
        self.depends_on_task_count = memory == "ring"

    def check(self, stream: Stream) -> None:
        self._check_ring(self.capacity, len(stream.tasks), 1)

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        self.memory.capacity = per_process(self.capacity, rank=ctx.hardware.rank, world=ctx.hardware.world)
        self.memory.tasks = len(ctx.stream.tasks)
        self._check_ring(self.memory.capacity, self.memory.tasks, ctx.hardware.world)

    def _check_ring(self, rows: int, tasks: int, world: int) -> None:
        """Refuse a ring buffer that has less than one row per task and process."""
        if isinstance(self.memory, RingBuffer) and 0 < rows < tasks:
            raise ConfigError(
                f"method.capacity={self.capacity}: a ring needs a row for each of {tasks} tasks in each of {world} "
                "processes; use more or method.memory=reservoir"
            )

    def end_task(self, task: Task, ctx: Context) -> None:
        shard = (ctx.hardware.rank, ctx.hardware.world)
        for batch in task.train.batches(256, view="raw", shuffle=ctx.generator("memory"), shard=shard):
            self.memory.add(batch, generator=ctx.generator("reservoir", ctx.hardware.rank))
