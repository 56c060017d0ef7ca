"""GPM: steps orthogonal to the inputs of old tasks (Saha, Garg and Roy, ICLR 2021, arXiv 2103.09762).

The public code is sahagobinda/GPM (MIT). Memory between tasks: per linear or convolutional layer of d inputs (of a
patch) the basis of k protected directions, 8 d k bytes, and of its features for the head; with basis=dual 8 d
min(k, d - k). Task id: not needed.

Deviations: second moments of the inputs are summed in float64 instead of keeping the inputs; rows of the head for old
classes are projected too; running statistics of batch normalisation are those of the first task, because a prediction
would change with them. The published learning rate falls by half when the loss on validation rows has not improved for
six epochs; here schedules are those of the budget.

Verified: outputs for inputs in the protected directions keep their values, so that a network whose inputs are all
protected forgets nothing; the basis is orthonormal and only grows; biases, norms and statistics stand still after the
first task, one task is finetuning bit for bit (test_methods_gpm, test_blocks_input_space).
"""

from collections.abc import Iterator
from typing import Literal, Self

import torch
from torch import Tensor, nn

from clrun.blocks.curvature.layers import Layer, layers_of
from clrun.blocks.input_space import First, InputSpace
from clrun.blocks.moments import second_moments
from clrun.blocks.optimizers import needs_sgd
from clrun.blocks.params import eval_mode, hold_statistics
from clrun.data.stream import Task
from clrun.learning.budget import Budget
from clrun.learning.context import Context
from clrun.learning.heads import GrowingHead
from clrun.learning.knobs import Knob
from clrun.learning.losses import Compete
from clrun.learning.method import Method, freeze
from clrun.system.errors import ConfigError, Fraction, NonNegative, PositiveInt

ROWS = 32  # images per pass over the inputs of layers; the patches of a convolution are all in memory at once


class Gpm(Method):
    """Project the gradient of every weight onto the directions that the inputs of old tasks do not use.

        G <- G - G M M'            for the gradient G [m, n] of a layer's weight, from the second task on

    M [n, k] is an orthonormal basis of the layer's inputs in old tasks, for a convolution of its patches. After a task
    the inputs of some of its rows are measured, and directions are added to M until it has a share eps_t of their
    energy (squared singular values), eps_t = eps + eps_step t for the position t. W x then stays as it is for all x in
    the span of M.

    Biases, norms and all other parameters of the backbone are frozen after the first task. The head is one layer more:
    rows of classes that an earlier task had are projected, and their biases are fixed; rows of new classes are free.

    The optimizer must be SGD without weight decay, because other steps leave the directions of the gradient.

    Args:
        backbone: maps prepared images to features [B, D]; its linear layers and convolutions are protected.
        num_classes: C.
        eps: share of the energy that is protected after the first task.
        eps_step: by which the share grows per task; it stays at 1 once it is reached.
        samples: number of rows whose inputs are measured after a task, drawn without replacement; null for all.
        first: directions of the first task: "below", the leading ones as long as their energy together stays below
            eps, as in the public code, which is one less than reaches it; "reach", as in later tasks.
        basis: "keep" stores M (published); "dual" stores the smaller one of M and of a basis of the rest.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    knobs = (Knob("eps"),)

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        eps: Fraction,
        eps_step: NonNegative,
        samples: PositiveInt | None,
        first: First,
        basis: Literal["keep", "dual"],
        compete: Compete,
    ) -> None:
        super().__init__(backbone, num_classes, compete=compete)
        self.eps, self.eps_step, self.samples = eps, eps_step, samples
        self.first: First = first
        layers = layers_of(self)
        if not any(name.startswith("backbone.") for name in layers):
            raise ConfigError(
                f"backbone: {type(self).__name__} needs linear or convolutional layers, {type(backbone).__name__} has "
                "none with a trainable weight"
            )
        self.names = list(layers)
        dual = basis == "dual"
        self.spaces = nn.ModuleList(
            InputSpace(layer.weight[0].numel(), energy="plain", dual=dual, at_least=0, first=first)
            for layer in layers.values()
        )
        self.begun = 0  # number of tasks that have begun
        self.old_rows: Tensor | None = None  # [C] bool, rows of the head that an earlier task has trained

    def check_budget(self, budget: Budget) -> None:
        needs_sgd(budget.optimizer, f"method={type(self).__name__.lower()}", weight_decay=0)

    def protected(self) -> Iterator[tuple[str, Layer, InputSpace]]:
        """Yield the name, the layer and the protected directions of each layer."""
        for name, space in zip(self.names, self.spaces, strict=True):
            yield name, self.get_submodule(name), space  # type: ignore[misc]

    def begin_task(self, task: Task, ctx: Context) -> None:
        if isinstance(self.head, GrowingHead):
            seen = torch.zeros_like(self.head.initialised)
            for earlier in ctx.stream.tasks[: task.index]:
                seen[earlier.classes.to(seen.device)] = True
            self.old_rows = seen
        super().begin_task(task, ctx)
        self.begun = task.index + 1
        if task.index == 1:
            freeze(self.backbone)
            for name, layer, _ in self.protected():
                if name.startswith("backbone."):
                    layer.weight.requires_grad_(True)

    def adjust_gradients(self, ctx: Context) -> None:
        if not ctx.task.index:
            return
        for name, layer, space in self.protected():
            gradient = layer.weight.grad
            if gradient is None:
                continue
            if name == "head":
                self._protect_rows(layer, space)
            else:
                layer.weight.grad = space.outside(gradient.flatten(1)).view_as(gradient)

    def _protect_rows(self, head: Layer, space: InputSpace) -> None:
        """Project the gradients of old rows of the head, and remove those of their biases."""
        assert self.old_rows is not None and head.weight.grad is not None
        rows = self.old_rows
        head.weight.grad[rows] = space.outside(head.weight.grad[rows])
        if head.bias is not None and head.bias.grad is not None:
            head.bias.grad[rows] = 0.0

    def share(self, position: int) -> float:
        """Return eps_t after the task at a position."""
        return min(1.0, self.eps + self.eps_step * position)

    def moments(self, task: Task, ctx: Context) -> dict[str, Tensor]:
        """Return the second moments of the inputs of each layer on rows of the task, by its name."""
        split = task.train
        if self.samples is not None and self.samples < len(split):
            drawn = torch.randperm(len(split), generator=ctx.generator("inputs"))[: self.samples]
            split = split.select(drawn.to(split.y.device))
        layers = {name: layer for name, layer, _ in self.protected()}
        images = (ctx.hardware.layout(batch.x) for batch in split.batches(ROWS))
        with eval_mode(self):
            found = second_moments(self, layers, images, bias=False, forward=lambda x: self.measured(x, task))
        return {name: gram.mean() for name, gram in found.items()}

    def measured(self, x: Tensor, task: Task) -> Tensor:
        """Return the logits [B, C] of a pass over images x of a task, whose layers' inputs are measured."""
        return self(x)  # type: ignore[no-any-return]

    def end_task(self, task: Task, ctx: Context) -> None:
        self.protect(self.moments(task, ctx), task.index)
        kept = {f"protected.{name}": space.dimension for name, _, space in self.protected()}
        ctx.log({"phase": "input_space", "share": self.share(task.index), **kept})
        self.old_rows = None

    def protect(self, moments: dict[str, Tensor], position: int) -> None:
        """Add directions of the inputs of the task at a position, from their second moments by the name of a layer."""
        for name, _, space in self.protected():
            if name in moments:
                space.update(moments[name], self.share(position))

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if mode and self.begun > 1:
            hold_statistics(self)
        return self
