"""TRGP: GPM whose tasks reuse the weights of similar old tasks, scaled (Lin et al., ICLR 2022, arXiv 2202.02931).

The public code is LYang-666/TRGP (MIT). Memory between tasks: that of `gpm`; and per layer of d inputs the directions
of each old task, 4 d k_j bytes for the k_j of task j, and the scaling matrices that each task has learned, 4 k_j^2
bytes for each of the old tasks it trusts. Task id: needed.

Deviations: those of `gpm`; the first gradient is that of one batch without augmentation. The directions of a task are
the leading ones of its inputs within all protected directions, by the rule of the first task of GPM, so that weights in
these directions do not change later.

Verified: with identity matrices it is GPM bit for bit, the trusted tasks are those with the largest projections by
hand, old tasks keep their logits, and only chosen matrices are trained (test_methods_gpm).
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clrun.blocks.curvature.layers import Layer
from clrun.blocks.input_space import First, InputSpace
from clrun.blocks.params import Carrier, eval_mode
from clrun.data.split import Batch
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.losses import Compete, masked_cross_entropy
from clrun.learning.method import freeze
from clrun.methods.gpm import Gpm
from clrun.system.errors import Count, Fraction, NonNegative, PositiveInt


class Directions(Carrier):
    """The directions S [d, k] of one task's inputs of each layer, float32, by the name of the layer.

    Args:
        found: S by the name of the layer.
    """

    def __init__(self, found: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = list(found)
        for place, basis in enumerate(found.values()):
            setattr(self, f"basis_{place}", basis)

    def of(self, name: str) -> Tensor:
        """Return S [d, k] of a layer."""
        found: Tensor = getattr(self, f"basis_{self.names.index(name)}")
        return found


class Trust(nn.Module):
    """What a task reuses in one layer: the positions of old tasks, and a matrix Q_j [k_j, k_j] for each.

    Args:
        tasks: positions of the old tasks.
        sizes: k_j.
    """

    def __init__(self, tasks: list[int], sizes: list[int]) -> None:
        super().__init__()
        self.tasks = tasks
        self.scales = nn.ParameterList(nn.Parameter(torch.eye(size)) for size in sizes)


class Trgp(Gpm):
    """GPM, and for each task a scaling of the weights within the input directions of the old tasks it trusts.

        W_t = W + sum_j W S_j (Q_j - I) S_j'

    S_j [n, k_j] are the directions of the inputs that task j has in this layer. Before a task begins, G is the gradient
    of its loss on one batch. It trusts task j in a layer if |G S_j S_j'|_F > threshold |G|_F, and of these the `most`
    with the largest ratio. Q_j [k_j, k_j] begins at the identity and is trained together with W, whose gradient is
    projected as in GPM. Each task keeps its own Q_j, and predictions for it use them; W S_j does not change later.

    Args:
        backbone: maps prepared images to features [B, D]; its linear layers and convolutions are protected.
        num_classes: C.
        eps: share of the energy that is protected after the first task.
        eps_step: by which the share grows per task.
        samples: number of rows whose inputs are measured after a task; null for all.
        first: "below" or "reach", for the directions of each task too; see `Gpm`.
        basis: "keep" or "dual"; see `Gpm`.
        threshold: smallest ratio of a trusted task; published 0.5.
        most: largest number of trusted tasks per layer; published 2.
        probe: number of rows of the task whose gradient chooses them.
    """

    needs_task_id = True
    settings = frozenset({"til"})

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
        threshold: Fraction,
        most: Count,
        probe: PositiveInt,
    ) -> None:
        compete: Compete = "current"
        super().__init__(
            backbone,
            num_classes,
            eps=eps,
            eps_step=eps_step,
            samples=samples,
            first=first,
            basis=basis,
            compete=compete,
        )
        self.threshold, self.most, self.probe = threshold, most, probe
        self.directions = nn.ModuleList()  # of each finished task
        self.trust = nn.ModuleList()  # by position of the task, what it reuses in each layer, in the order of `names`

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        self.trust.append(nn.ModuleList(Trust([], []) for _ in self._layers()))
        if task.index and self.most:
            self.trust[task.index] = self._chosen(task, ctx)

    def _layers(self) -> dict[str, Layer]:
        """Return the layers of the backbone, by their names in the method."""
        return {name: layer for name, layer, _ in self.protected() if name.startswith("backbone.")}

    def _chosen(self, task: Task, ctx: Context) -> nn.ModuleList:
        """Return what a new task reuses in each layer."""
        drawn = torch.randperm(len(task.train), generator=ctx.generator("probe"))[: self.probe]
        batch = next(task.train.select(drawn.to(task.train.y.device)).batches(self.probe))
        layers = self._layers()
        with eval_mode(self):
            loss = self.loss(batch, ctx)
        gradients = torch.autograd.grad(loss, [layer.weight for layer in layers.values()], allow_unused=True)
        found, trusted = nn.ModuleList(), 0
        for name, gradient in zip(layers, gradients, strict=True):
            bases = [earlier.of(name) for earlier in self.directions]  # type: ignore[operator]
            ratios = torch.zeros(len(bases))
            if gradient is not None and gradient.any():
                flat = gradient.flatten(1)
                ratios = torch.stack([(flat @ basis).norm() for basis in bases]).cpu() / flat.norm().cpu()
            best = ratios.argsort(descending=True, stable=True)[: self.most].tolist()
            best = [j for j in best if float(ratios[j]) > self.threshold]
            found.append(Trust(best, [bases[j].shape[1] for j in best]))
            trusted += len(best)
        ctx.log({"phase": "trust", "regions": trusted, "layers": len(layers)})
        return found

    def weights(self, position: int) -> dict[str, Tensor]:
        """Return the weights of the task at a position where they differ from W, by name in the backbone."""
        found: dict[str, Tensor] = {}
        reused: Any = self.trust[position]
        for (name, layer), trust in zip(self._layers().items(), reused, strict=True):
            if not trust.tasks:
                continue
            flat = layer.weight.flatten(1)
            total = flat
            for j, scale in zip(trust.tasks, trust.scales, strict=True):
                basis = self.directions[j].of(name)
                total = total + (flat @ basis @ (scale - torch.eye(len(scale)).to(scale))) @ basis.t()
            found[f"{name.removeprefix('backbone.')}.weight"] = total.view_as(layer.weight)
        return found

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        assert task is not None, "every task has weights of its own"
        changed = self.weights(task) if task < len(self.trust) else {}
        features: Tensor = functional_call(self.backbone, changed, (x,)) if changed else self.backbone(x)
        logits: Tensor = self.head(features)
        return logits

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        return masked_cross_entropy(self(batch.x, ctx.task.index), batch.y, self.competing(batch.t, ctx))

    def measured(self, x: Tensor, task: Task) -> Tensor:
        logits: Tensor = self(x, task.index)
        return logits

    def end_task(self, task: Task, ctx: Context) -> None:
        super().end_task(task, ctx)
        freeze(self.trust)

    def protect(self, moments: dict[str, Tensor], position: int) -> None:
        super().protect(moments, position)
        own: dict[str, Tensor] = {}
        for name, _, space in self.protected():
            if name == "head":
                continue
            within = moments[name] - space.remainder(moments[name])
            within = within - space.outside(within)  # P C P, with the projection P onto the protected directions
            kept = InputSpace(space.width, energy="plain", dual=False, at_least=1, first=self.first)
            kept.to(within.device)
            kept.update(within, self.share(position))
            own[name] = kept.basis.float()
        self.directions.append(Directions(own))
