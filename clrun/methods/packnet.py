"""PackNet: each task trains the free weights, keeps the largest and frees the others (Mallya and Lazebnik, CVPR 2018).

Source: arXiv 1711.05769. Memory between tasks: the owner of each weight, P bytes for the P weights of linear and
convolutional layers; with rest=per_task also a copy of all other parameters and running statistics per task. Task id:
needed.

Verified: logits of earlier tasks stay bitwise the same, a task changes its own weights only, and without pruning a
single task equals finetuning (test_methods_masks).
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clrun.blocks.masks import MOST_TASKS, OwnershipMask, Snapshot
from clrun.blocks.params import Params
from clrun.data.stream import Stream, Task
from clrun.learning.budget import Budget
from clrun.learning.context import Context
from clrun.learning.knobs import Knob
from clrun.learning.training import fit
from clrun.methods.masked import Masked
from clrun.system.errors import ConfigError, Fraction


class Packnet(Masked):
    """Train all free weights, free the smallest of each layer, train the remaining ones again, and freeze them.

    Predictions for task k use the weights that tasks 1 ... k own, and are exactly those at the end of task k. Weights
    are those of linear and convolutional layers except the patch embedding of a transformer. All other parameters
    (patch embedding, biases, norms, class token, position embeddings) are the rest.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        prune: rho, the fraction of a task's weights that is freed in each layer: floor(rho n) of n weights. With 0
            there are no free weights for the second task, and the second phase is left out.
        retrain: budget of the second phase; published: a tenth of the learning rate and half of the epochs.
        rest: treatment of the rest. "freeze_after_first": trained by the first task only, as published. "per_task":
            trained by every task, each of which stores a copy.
    """

    knobs = (Knob("prune"),)

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        prune: Fraction,
        retrain: Budget,
        rest: Literal["freeze_after_first", "per_task"],
    ) -> None:
        super().__init__(backbone, num_classes)
        self.prune, self.retrain, self.rest = prune, retrain, rest
        self.mask = OwnershipMask(prunable(backbone))
        if not self.mask.shapes:
            raise ConfigError(
                f"backbone: packnet needs linear or convolutional layers, {type(backbone).__name__} has none"
            )
        self.others = [n for n, p in backbone.named_parameters() if p.requires_grad and n not in self.mask.shapes]
        self.copies = nn.ModuleList()  # copies of the rest, one per task

    def check(self, stream: Stream) -> None:
        if len(stream.tasks) > MOST_TASKS:
            raise ConfigError(f"scenario: method=packnet supports at most {MOST_TASKS} tasks, not {len(stream.tasks)}")

    def learn(self, task: Task, ctx: Context) -> None:
        ctx.log({"phase": "capacity", "free_weights": self.mask.free()})
        self.mask.claim(task.index)
        self._protect(task)
        fit(self, task.train, ctx)
        if self.prune:
            self.mask.prune(self._weights(), task.index, self.prune)
            self._protect(task)
            fit(self, task.train, ctx, budget=self.retrain, name="retrain")

    def end_task(self, task: Task, ctx: Context) -> None:
        super().end_task(task, ctx)
        if self.rest == "per_task":
            self.copies.append(Snapshot(self._rest()))

    def holds_statistics(self) -> bool:
        return self.rest == "freeze_after_first" and super().holds_statistics()

    def features(self, x: Tensor, task: int) -> Tensor:
        weights = self.mask.view(self._weights(), task)
        rest: Params = self.copies[task].read() if task < len(self.copies) else {}  # type: ignore[operator]
        features: Tensor = functional_call(self.backbone, {**weights, **rest}, (x,))
        return features

    def _protect(self, task: Task) -> None:
        """Restrict the next fit to the weights of `task`, and to the rest unless that is frozen."""
        masks = self.mask.owned(task.index)
        if self.holds_statistics():
            masks |= {name: torch.zeros_like(self.backbone.get_parameter(name)) for name in self.others}
        self.protect(masks, task)

    def _weights(self) -> dict[str, nn.Parameter]:
        """Return the weights that tasks can own, by name in the backbone."""
        return {name: self.backbone.get_parameter(name) for name in self.mask.shapes}

    def _rest(self) -> Params:
        """Return the rest and the running statistics, by name in the backbone."""
        rest: Params = {name: self.backbone.get_parameter(name) for name in self.others}
        return rest | {name: b for name, b in self.backbone.named_buffers() if b.is_floating_point()}


def prunable(backbone: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable weights of linear and convolutional layers except a patch embedding, by name."""
    layers = (
        (n, m) for n, m in backbone.named_modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    )
    return {
        f"{name}.weight": layer.get_parameter("weight")
        for name, layer in layers
        if layer.weight.requires_grad and "patch_embed" not in name.split(".")
    }
