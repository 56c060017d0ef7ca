"""FISH mask: each task trains the few weights with the largest Fisher information (Sung et al., 2021, 2111.09839).

Memory between tasks: 8 bytes per weight of each task's mask (4 for the index, 4 for the value); the backbone itself
stays as it was loaded. Task id: needed.

Verified: a ratio of 1 is finetuning, masks of smaller ratios lie in those of larger ones and take the largest Fisher
information, and the backbone stays the same bit for bit (test_methods_masks).
"""

from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clrun.blocks.curvature import Labels
from clrun.blocks.curvature.gradients import diagonal
from clrun.blocks.curvature.target import Target
from clrun.blocks.masks import SparseDelta, largest
from clrun.blocks.params import Params, flatten, frozen, select, shapes_of, unflatten
from clrun.data.stream import Stream, Task
from clrun.learning.budget import Budget
from clrun.learning.context import Context
from clrun.learning.training import fit
from clrun.methods.masked import Masked
from clrun.system.errors import ConfigError, PositiveInt, Range


class Fish(Masked):
    """theta_t = theta_0 + a sparse difference, on the k weights of the backbone with the largest diagonal Fisher.

    k = floor(ratio P) - P_head, where P counts the weights of the backbone and of the task's head rows, and P_head
    those of the head rows, which are always trained. The k weights are chosen over all layers together. The Fisher
    information is estimated at the weights that the task starts with, after some steps of the head alone, because the
    gradients of a random head say little. Every other weight stays the same bit for bit, whatever the optimizer.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        ratio: fraction of the weights that a task may change; 1 with mode=isolated trains all. Published: 0.005 for
            pre-trained networks.
        mode: "isolated": each task starts from theta_0, and nothing passes between tasks. "sequential": it starts from
            the weights of the previous task and chooses among those that no earlier task has chosen.
        score: "fisher": the mean squared gradient of single rows. "absolute": their mean absolute value.
        labels: how the labels of the Fisher information are chosen: exact, sampled, empirical (published), predicted or
            batched; see `clrun.blocks.curvature.estimate`.
        samples: number of rows that the Fisher information is estimated on; null for all.
        warmup: budget of the steps of the head alone; 0 epochs for none.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        ratio: Annotated[float, Range(above=0, maximum=1)],
        mode: Literal["isolated", "sequential"],
        score: Literal["fisher", "absolute"],
        labels: Labels,
        samples: PositiveInt | None,
        warmup: Budget,
    ) -> None:
        super().__init__(backbone, num_classes)
        self.ratio, self.mode, self.score = ratio, mode, score
        self.samples, self.warmup = samples, warmup
        self.labels = labels
        self.names = list(select(backbone))
        self.deltas = nn.ModuleList()  # one SparseDelta per task
        self.base: Tensor | None = None  # theta_0 [P], while a task is learned

    def check(self, stream: Stream) -> None:
        for task in stream.tasks:
            self._count(task)

    def learn(self, task: Task, ctx: Context) -> None:
        self.base = flatten(self._weights()).detach().clone()  # [P]
        if self.mode == "sequential" and task.index:
            self._write(self._assembled(self.base, task.index - 1))
        self.protect({}, task)
        with frozen(self.backbone):
            fit(self, task.train, ctx, params=self.head.parameters(), budget=self.warmup, name="head")
        delta = SparseDelta(self._chosen(task, ctx))
        mask = torch.zeros_like(self.base, dtype=torch.bool)
        mask[delta.entries.long()] = True
        self.protect(self._named(mask), task)
        fit(self, task.train, ctx)
        delta.take(flatten(self._weights()).detach())
        self.deltas.append(delta)
        ctx.log({"phase": "mask", "weights": len(delta.entries), "share": len(delta.entries) / len(self.base)})

    def end_task(self, task: Task, ctx: Context) -> None:
        super().end_task(task, ctx)
        assert self.base is not None
        self._write(self.base)
        self.base = None

    def features(self, x: Tensor, task: int) -> Tensor:
        if self.base is not None and task == self.begun - 1:  # in the middle of the current task
            return self.training_features(x)
        base = flatten(self._weights()).detach() if self.base is None else self.base
        weights = self._named(self._assembled(base, task))
        features: Tensor = functional_call(self.backbone, weights, (x,))
        return features

    def _count(self, task: Task) -> int:
        """Return k.

        Raises:
            ConfigError: the head's rows take all that `ratio` allows.
        """
        size = sum(p.numel() for p in self._weights().values())
        head = len(task.classes) * (int(self.backbone.num_features) + 1)  # type: ignore[arg-type]
        count = int(self.ratio * (size + head) + 1e-9) - head
        if count < 1:
            raise ConfigError(
                f"method.ratio={self.ratio:g}: the head takes {head} of {size + head} weights and leaves none to the "
                f"backbone; use more than {(head + 1) / (size + head):.2g}"
            )
        return count

    def _chosen(self, task: Task, ctx: Context) -> Tensor:
        """Return [k] long, the indices of the weights that `task` may change."""
        scores = self._scores(task, ctx)
        if self.mode == "sequential":
            for delta in self._deltas():
                scores[delta.entries.long()] = -1.0
        return largest(scores, min(self._count(task), int((scores >= 0).sum())))

    def _scores(self, task: Task, ctx: Context) -> Tensor:
        """Return [P], the importance of every weight for `task`."""
        target = Target.of(self, task.train, ctx, self.backbone, columns=self.labels, samples=self.samples, top_k=None)
        power = torch.square if self.score == "fisher" else torch.abs
        found = diagonal(target, batched=self.labels == "batched", magnitude=power)
        importance = found.params(found.values)
        return flatten({name: importance[name] for name in self.names})

    def _assembled(self, base: Tensor, task: int) -> Tensor:
        """Return the backbone's weights [P] for the learned task at position `task`."""
        weights = base.clone()
        for delta in self._deltas()[0 if self.mode == "sequential" else task : task + 1]:
            delta.put(weights)
        return weights

    def _deltas(self) -> list[SparseDelta]:
        """Return the differences of the learned tasks."""
        return [delta for delta in self.deltas if isinstance(delta, SparseDelta)]

    def _weights(self) -> dict[str, nn.Parameter]:
        """Return the weights of the backbone that a task may change."""
        return {name: self.backbone.get_parameter(name) for name in self.names}

    def _named(self, values: Tensor) -> Params:
        """Return `values` [P], one per weight, by the names of the weights."""
        return unflatten(values, shapes_of(self._weights()))

    @torch.no_grad()
    def _write(self, weights: Tensor) -> None:
        """Set the weights of the backbone to `weights` [P]."""
        for name, values in self._named(weights).items():
            self.backbone.get_parameter(name).copy_(values)
