"""SEMA: adapters are added where the data look new (Wang et al., CVPR 2025, arXiv 2403.18886; code SEMA-CL).

Memory between tasks, for n blocks of width w: n (2 w r + r + w) floats of the first adapters; per further module
2 w r + r + w floats of its adapter, per module of an expandable block 2 w k + k + w floats of its descriptor with k =
code, w + 1 of its row of the router, and 24 bytes of its statistics; the head. Task id: not needed.

Verified: with one module the mixture is its adapter, old modules stand still bit for bit, the score of a descriptor
equals values computed by hand, thresholds of 0 and infinity expand everything and nothing, the same data again do not
expand, and the decision does not depend on the order of rows (test_methods_sema).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clrun.blocks.inject import Adapter, Plan, require_depth
from clrun.blocks.params import Carrier, eval_mode
from clrun.data.split import Batch
from clrun.data.stream import Task
from clrun.learning.budget import Budget
from clrun.learning.context import Context
from clrun.learning.losses import Compete
from clrun.learning.method import freeze
from clrun.learning.training import fit
from clrun.methods.prompted import Prompted, scaled
from clrun.system.errors import Count, Fraction, NonNegative, Positive, PositiveInt

Detect = Literal["task", "batch"]


class Sema(Prompted):
    """Adapters beside the MLPs; in some blocks a mixture of them, to which modules are added as they are needed.

    With u the stream after the attention and v its mean over all tokens of an image, a block of `blocks` adds
    sum_k pi_k a_k(u), pi = softmax_k(w_k . v + b_k); every other block adds a_0(u), which the first task trains. Each
    module k of the mixture has a descriptor, a linear auto-encoder of v with the loss e_k = mean of (reconstruction -
    v)^2. Its score of an image is z_k = |e_k - m_k| / s_k, with mean and standard deviation of the losses recorded
    while the descriptor was trained; it is 0 with fewer than 3 records. Images that are reconstructed better than
    usual count as new, too.

    The first task trains all adapters and the head with the budget of the run, then the descriptors with `rd`. In a
    later task a block expands if min_k (mean of z_k over images) > threshold, at most once: a new adapter, its row of
    the router and the head are trained on the task, then its descriptor; all of them are frozen after that. Without
    expansion the head is trained alone. detect=task looks at all rows of the task without augmentation, from the
    lowest block up. detect=batch is the public code: batches of detect_batch shuffled and augmented rows are read; the
    first block that a batch triggers expands, and the data are read again until no batch triggers. Any single batch
    decides there, so that more rows mean more expansions.

    Deviations from the public code: losses are recorded while a descriptor is trained, not while its adapter is; their
    mean and standard deviation are stored instead of the records; equal losses give a deviation of 1e-12 at least; the
    row of the first module of a router, which has no gradient, is not trained.

    Args:
        backbone: a vision transformer of timm with `blocks`, frozen.
        num_classes: C.
        bottleneck: r, width of the adapters.
        adapter_scale: factor of an adapter's output; it is not trained.
        dropout: fraction of an adapter's activations that is dropped in training.
        blocks: numbers of the blocks that can expand.
        code: k, width of the code of a descriptor.
        threshold: theta, the score above which a block expands.
        records: number of the last losses from which the statistics of a descriptor are computed.
        detect: "task" or "batch", see above.
        detect_batch: rows of a batch for detect=batch.
        rd: budget of the training of descriptors.
        lr_scale: factor of the budget's learning rate for adapters, router and head.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        bottleneck: PositiveInt,
        adapter_scale: float,
        dropout: Fraction,
        blocks: list[Count],
        code: PositiveInt,
        threshold: NonNegative,
        records: PositiveInt,
        detect: Detect,
        detect_batch: PositiveInt,
        rd: Budget,
        lr_scale: Positive,
        compete: Compete,
    ) -> None:
        super().__init__(backbone, num_classes, lr_scale=lr_scale, compete=compete, tokens=False)
        require_depth(backbone, blocks, "method.blocks")
        self.bottleneck, self.adapter_scale, self.dropout = bottleneck, adapter_scale, dropout
        self.blocks, self.code, self.threshold, self.records = sorted(blocks), code, threshold, records
        self.detect, self.detect_batch, self.rd = detect, detect_batch, rd
        self.simple, self.mixtures = nn.ModuleDict(), nn.ModuleDict()  # by block
        for block in range(len(backbone.blocks)):  # type: ignore[arg-type]
            if block in self.blocks:
                self.mixtures[str(block)] = MixtureOfAdapters()
            else:
                self.simple[str(block)] = self._adapter()

    def _adapter(self) -> Adapter:
        return Adapter(
            self.width,
            self.bottleneck,
            activation="relu",
            dropout=self.dropout,
            scale=self.adapter_scale,
            learn_scale=False,
        )

    def mixture(self, block: int) -> "MixtureOfAdapters":
        """Return the mixture of a block."""
        found = self.mixtures[str(block)]
        assert isinstance(found, MixtureOfAdapters)
        return found

    # --- training

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        if task.index == 0:
            for block in self.blocks:
                self._add(block, ctx)

    def _add(self, block: int, ctx: Context) -> None:
        """Add a module to a block."""
        self.mixture(block).add(self._adapter(), Descriptor(self.width, self.code))
        ctx.hardware.place(self.mixtures[str(block)])

    def learn(self, task: Task, ctx: Context) -> None:
        if task.index == 0:
            self._train(self.blocks, task, ctx)
        elif not (self._expand_by_task(task, ctx) if self.detect == "task" else self._expand_by_batch(task, ctx)):
            super().learn(task, ctx)
        ctx.log({"phase": "modules", **self.expansion()})

    def _train(self, blocks: Sequence[int], task: Task, ctx: Context, suffix: str = "") -> None:
        """Train the newest modules of some blocks and the head, then the descriptors of these modules; freeze them."""
        fit(self, task.train, ctx, budget=scaled(ctx.budget, self.lr_scale), name=f"func{suffix}" if suffix else "fit")
        newest = {block: self.mixture(block).descriptor(-1) for block in blocks}
        views = None if ctx.stream.transform.augments else self.views(task.train.batches(256), blocks)

        def loss(batch: Batch, ctx: Context) -> Tensor:
            with eval_mode(self), torch.no_grad():
                seen = self.seen(batch.x, blocks) if views is None else {b: v[batch.i] for b, v in views.items()}
            with torch.autocast(batch.x.device.type, enabled=False):
                return torch.stack([newest[block].record(seen[block]).mean() for block in blocks]).sum()

        for descriptor in newest.values():
            descriptor.begin(-(-self.records // ctx.hardware.world))
        params = [p for descriptor in newest.values() for p in descriptor.parameters()]
        fit(self, task.train, ctx, loss=loss, params=params, budget=self.rd, name=f"rd{suffix}")
        for descriptor in newest.values():
            descriptor.end(ctx)
        freeze(self.simple)
        freeze(self.mixtures)

    def trainable(self) -> Iterator[nn.Parameter]:
        owners: list[nn.Module] = [self.simple, *(self.mixture(block).trained for block in self.blocks), self.head]
        return (p for owner in owners for p in owner.parameters() if p.requires_grad)

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        return self.classification_loss(self(batch.x), batch, ctx)

    # --- where the data look new

    def _expand_by_task(self, task: Task, ctx: Context) -> bool:
        """Expand the blocks in which the task looks new, the lowest first; return whether there was any."""
        expanded = False
        for block in self.blocks:
            seen = self.views(task.train.batches(256), [block])[block]
            if self.mixture(block).novelty(seen) > self.threshold:
                self._expand(block, task, ctx)
                expanded = True
        return expanded

    def _expand_by_batch(self, task: Task, ctx: Context) -> bool:
        """Expand the blocks that any batch triggers, as the public code does; return whether there was any."""
        order, done = ctx.generator("detect"), set[int]()
        while True:
            before = len(done)
            for batch in task.train.batches(self.detect_batch, view="train", shuffle=order):
                left = [block for block in self.blocks if block not in done]
                seen = self.views([batch], left) if left else {}
                new = [block for block in left if self.mixture(block).novelty(seen[block]) > self.threshold]
                if new:
                    self._expand(new[0], task, ctx)
                    done.add(new[0])
            if len(done) == before:
                return bool(done)

    def _expand(self, block: int, task: Task, ctx: Context) -> None:
        """Add a module to a block and train it."""
        self._add(block, ctx)
        self._train([block], task, ctx, f"-{block}")

    def views(self, batches: Any, blocks: Sequence[int]) -> dict[int, Tensor]:
        """Return by block the mean tokens [N, w] of all rows of some batches, as the descriptors see them."""
        parts: dict[int, list[Tensor]] = {block: [] for block in blocks}
        with torch.no_grad(), eval_mode(self):
            for batch in batches:
                for block, seen in self.seen(batch.x, blocks).items():
                    parts[block].append(seen)
        return {block: torch.cat(found) for block, found in parts.items()}

    def seen(self, x: Tensor, blocks: Sequence[int]) -> dict[int, Tensor]:
        """Return by block the mean [B, w] float32 over the tokens of images x of what enters the mixture."""
        watched = {block: Watched(self.mixture(block)) for block in blocks}
        self.features(x, self.plan(watched))
        return {block: module.mean for block, module in watched.items()}

    # --- prediction

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        logits: Tensor = self.head(self.features(x, self.plan()))
        return logits

    def plan(self, others: Mapping[int, nn.Module] | None = None) -> Plan:
        """Return the plan that adds all adapters; `others` take the places of the mixtures of their blocks."""
        modules = {int(block): m for own in (self.simple, self.mixtures) for block, m in own.items()}
        return Plan(beside_mlp=modules | dict(others or {}))

    def expansion(self) -> dict[str, int]:
        return {f"block {block}": len(self.mixture(block).adapters) for block in self.blocks}


class MixtureOfAdapters(nn.Module):
    """Adapters that a router mixes by image, each with a descriptor of the data that it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters, self.rows = nn.ModuleList(), nn.ModuleList()
        self.descriptors = nn.ModuleList()

    @property
    def trained(self) -> nn.ModuleList:
        """What is trained with the head: adapters and rows of the router."""
        return nn.ModuleList([self.adapters, self.rows])

    def add(self, adapter: Adapter, descriptor: "Descriptor") -> None:
        """Add a module; the row of the first one is not trained, because it has no gradient."""
        row = nn.Linear(adapter.down.in_features, 1)
        row.requires_grad_(len(self.adapters) > 0)
        self.adapters.append(adapter)
        self.rows.append(row)
        self.descriptors.append(descriptor)

    def descriptor(self, place: int) -> "Descriptor":
        """Return the descriptor of the module at this place."""
        found = self.descriptors[place]
        assert isinstance(found, Descriptor)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Return the change [B, N, w] for the stream x [B, N, w]."""
        if len(self.adapters) == 1:
            change: Tensor = self.adapters[0](x)
            return change
        mean = x.mean(dim=1)
        weights = torch.cat([row(mean) for row in self.rows], dim=1).softmax(dim=1)
        each = torch.stack([adapter(x) for adapter in self.adapters], dim=1)  # [B, K, N, w]
        return torch.einsum("bk,bknw->bnw", weights.to(each.dtype), each)

    def novelty(self, seen: Tensor) -> float:
        """Return the smallest over the modules of the mean score of rows [N, w]."""
        places = range(len(self.descriptors))
        return min(float(self.descriptor(place).scores(seen).mean()) for place in places)


class Descriptor(Carrier):
    """A linear auto-encoder, and mean and standard deviation of the losses that it had in training.

    Args:
        width: w.
        code: width of the code.

    Attributes:
        statistics: [3] float64: mean and standard deviation (n - 1) of the records, and their number n.
    """

    def __init__(self, width: int, code: int) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(width, code), nn.Linear(code, width)
        self.statistics = torch.zeros(3, dtype=torch.float64)
        self.recent, self.limit = torch.zeros(0), 0  # the last losses while it is trained, and how many are kept

    def losses(self, seen: Tensor) -> Tensor:
        """Return the mean squared error [N] of the reconstruction of rows [N, w]."""
        error: Tensor = self.decoder(self.encoder(seen)) - seen
        return error.square().mean(dim=1)

    def scores(self, seen: Tensor) -> Tensor:
        """Return z [N] of rows [N, w]: the distance of a loss from the mean in standard deviations."""
        with torch.no_grad():
            return self.z(self.losses(seen))

    def z(self, losses: Tensor) -> Tensor:
        """Return the score [N] of losses [N]; 0 with fewer than 3 records."""
        mean, deviation, count = self.statistics.tolist()
        if count < 3:
            return torch.zeros_like(losses)
        away: Tensor = (losses - mean).abs() / max(deviation, 1e-12)
        return away

    def begin(self, limit: int) -> None:
        """Begin to record, and keep the last `limit` losses."""
        self.recent, self.limit = torch.zeros(0, device=self.encoder.weight.device), limit

    def record(self, seen: Tensor) -> Tensor:
        """Return the losses [N] of rows [N, w], and record them."""
        losses = self.losses(seen)
        self.recent = torch.cat([self.recent, losses.detach()])[-self.limit :]
        return losses

    def end(self, ctx: Context) -> None:
        """Compute the statistics of the records of all processes, and drop the records."""
        values = self.recent.double()
        count = ctx.hardware.sum(torch.tensor([len(values)], dtype=torch.float64, device=values.device))
        mean = ctx.hardware.sum(values.sum()[None]) / count.clamp(min=1)
        spread = ctx.hardware.sum((values - mean).square().sum()[None])
        deviation = (spread / (count - 1).clamp(min=1)).sqrt()
        self.statistics = torch.cat([mean, deviation, count])
        self.recent = self.recent.new_zeros(0)


class Watched(nn.Module):
    """A module that keeps the mean over the tokens of its last input.

    Args:
        module: it.

    Attributes:
        mean: [B, w] float32.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.mean = torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the module."""
        self.mean = x.mean(dim=1).float()
        output: Tensor = self.module(x)
        return output
