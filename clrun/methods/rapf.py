"""RAPF: a linear map of frozen CLIP features, Gaussian replay, fusion of old and new map (ECCV 2024, 2407.14143).

    logits_k = kappa n(W g_i(x)) . w_k                            W [d, d] learned, texts w_k and both towers frozen
    L = CE(rows of the task and features drawn from N(mu_c, Sigma_c) of old classes c)
        + mean max(0, u . w_b - u . w_a + margin)                 u = n(W f), f ~ N(mu_a, Sigma_a), near pairs (a, b)
    after a task:  W_old = U S V',  P = U' W,  Q = S V',  D = |P - Q|,  G = min(1, D / max D + b_m)
                   W <- U [P G + Q (1 - G)]                       entry by entry

A pair is near if a is an old and b a new class and |w_a - w_b| < `name_distance`.

Memory between tasks, for C classes in d dimensions: W, 4 d^2 bytes; 8 C d bytes of means and 8 C of counts, 4 d^2 bytes
of covariance per class; one text row per class, 4 C d bytes; and 8 C bytes that say which task a class belongs to. Task
id: not needed.

Deviations from the public code: W begins as the identity, which keeps CLIP's alignment (`init=random` begins as
published); at most `max_pairs` pairs, the nearest ones, draw features in a step (`max_pairs=null` as published);
statistics and maps are those of features in single precision. The templates are those of the data set; the public code
has "a good photo of a {}." alone (`dataset.templates`).

Verified: without replay, hinge and fusion it is a linear map trained by cross-entropy; the fused map equals values
computed by hand and does not depend on the signs of singular vectors; pairs, hinge and numbers of drawn rows equal
those computed by hand (test_methods_names).
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clrun.blocks.buffers import per_process
from clrun.blocks.gaussian import GaussianReplay, Sampler
from clrun.data.split import Batch
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.losses import Compete, masked_cross_entropy
from clrun.learning.method import Method, freeze
from clrun.learning.names import NamesHead
from clrun.system.errors import Count, NonNegative, PositiveInt


class MappedHead(NamesHead):
    """Logits kappa n(W g(f)) . w_k with a learned map W and fixed texts w_k.

    Args:
        backbone: has a `joint` space.
        num_classes: C.
        init: "identity", or "random" as `nn.Linear`.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, *, init: Literal["identity", "random"]) -> None:
        super().__init__(backbone, num_classes, names="fixed")
        self.mapping = nn.Linear(self.joint.dim, self.joint.dim, bias=False)
        if init == "identity":
            nn.init.eye_(self.mapping.weight)

    def embed(self, features: Tensor) -> Tensor:
        """Return n(W g(f)) [B, d] of features [B, D]."""
        return self.mapped(self.joint.project(features))

    def mapped(self, embeddings: Tensor) -> Tensor:
        """Return n(W g) [B, d] of image embeddings g [B, d]."""
        return F.normalize(self.mapping(embeddings), dim=1)


class Rapf(Method):
    """Learn a linear map of image features; replay old classes as Gaussians, and push them from near new names.

    Each step adds `draw * draw_factor` drawn features of each of `classes_per_batch` old classes to the cross-entropy.
    The old classes come in a new random order in every epoch, and again from its beginning if an epoch has more steps.
    For every near pair (a, b) it draws `pair_draw * draw_factor` further features of the old class a for the hinge.
    Mean and covariance of a class are measured when its task ends; the towers are frozen, so that they stay exact. The
    first task is neither replayed nor fused.

    With several processes each draws its share of the features.

    Args:
        backbone: passes on features of a frozen image tower; has a `joint` space with a text tower.
        num_classes: C.
        init: the map before the first task: "identity", or "random" as `nn.Linear`.
        draw: features drawn per replayed class, before `draw_factor`; 0 for no replay.
        pair_draw: features drawn per near pair, before `draw_factor`; 0 for no hinge.
        draw_factor: b, multiplies both; published as 1 or 2, depending on the data set.
        classes_per_batch: old classes that are replayed in a step.
        margin: of the hinge.
        name_distance: delta, the distance of unit text features below which a pair is near.
        max_pairs: largest number of pairs, the nearest ones; null for all.
        mix_bias: b_m, the least weight of the new map in the fusion; 1 keeps the new map.
        shrinkage: shrink the covariances with alpha1 = alpha2 = 1, as FeCAM does (`clrun.blocks.statistics.shrunk`).
        jitter: added to the diagonal of the covariances, in units of squared features.
        compete: classes that compete in the cross-entropy, see `clrun.learning.losses`.
    """

    needs_text: ClassVar[bool] = True
    head: MappedHead
    latest: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        init: Literal["identity", "random"],
        draw: Count,
        pair_draw: Count,
        draw_factor: PositiveInt,
        classes_per_batch: PositiveInt,
        margin: NonNegative,
        name_distance: NonNegative,
        max_pairs: Count | None,
        mix_bias: NonNegative,
        shrinkage: bool,
        jitter: NonNegative,
        compete: Compete,
    ) -> None:
        super().__init__(backbone, num_classes, compete=compete)
        freeze(backbone)
        self.head = MappedHead(backbone, num_classes, init=init)
        self.draw, self.pair_draw = draw * draw_factor, pair_draw * draw_factor
        self.classes_per_batch, self.max_pairs = classes_per_batch, max_pairs
        self.margin, self.name_distance, self.mix_bias = margin, name_distance, mix_bias
        self.replay = GaussianReplay(
            self.head.joint.dim,
            num_classes,
            covariance="full",
            jitter=jitter,
            shrinkage=(1.0, 1.0) if shrinkage else None,
        )
        self.register_buffer("latest", torch.full((num_classes,), -1))  # position of the task of each class
        self.before: Tensor | None = None  # W before the task, from the second one on
        self.old = torch.zeros(0, dtype=torch.long)
        self.sampler: Sampler | None = None  # of `old`; samplers and pairs are kept only while a task is learned
        self.pairs = torch.zeros(0, 2, dtype=torch.long)
        self.pair_sampler: Sampler | None = None  # of the old class of each pair
        self.away = torch.zeros(0, 0)  # w_b - w_a of each pair [P, 1, d]
        self.epoch, self.turn, self.cycle = -1, 0, list[int]()  # the old classes in the order of the present epoch

    @classmethod
    def reads_features(cls, options: Mapping[str, Any]) -> bool:
        return True

    # --- a task

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        self.epoch = -1
        self.old = self.replay.classes
        if not len(self.old):
            return
        self.before = self.head.mapping.weight.detach().clone()
        new = task.classes.to(self.old.device)
        new = new[~torch.isin(new, self.old)]
        self.pairs = near_pairs(self.head.weight, self.old, new, self.name_distance)[: self.max_pairs]
        sampler = self.replay.sampler(self.old)
        self.sampler = sampler if self.draw else None
        if self.pair_draw and len(self.pairs):
            self.pair_sampler = sampler.of(torch.searchsorted(self.old, self.pairs[:, 0].contiguous()).tolist())
            self.away = (self.head.weight[self.pairs[:, 1]] - self.head.weight[self.pairs[:, 0]])[:, None]

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        rows = self.head.joint.project(self.backbone(batch.x))
        y, t = batch.y, batch.t
        if self.sampler is not None:
            places = self._next_places(ctx)
            drawn = self._drawn(self.sampler.of(places), self.draw, ctx)
            labels = self.old[places].repeat_interleave(drawn.shape[1])
            rows, y = torch.cat([rows, drawn.flatten(0, 1).to(rows)]), torch.cat([y, labels])
            t = torch.cat([t, self.latest[labels]])
        if self.pair_sampler is not None:
            rows = torch.cat([rows, self._drawn(self.pair_sampler, self.pair_draw, ctx).flatten(0, 1).to(rows)])
        # W is small, and each call of it costs as much as the product, hence one call for all rows.
        units = self.head.mapped(rows)
        logits = self.head.match(units[: len(y)], self.head.rows())
        loss = masked_cross_entropy(logits, y, self.competing(t, ctx))
        return loss if self.pair_sampler is None else loss + self._hinge(units[len(y) :])

    def _hinge(self, units: Tensor) -> Tensor:
        """Return the mean hinge [] of mapped features, as many drawn from the old class of each near pair."""
        each = units.view(len(self.pairs), len(units) // len(self.pairs), units.shape[1])  # with few, maybe none here
        return ((each * self.away).sum(dim=2) + self.margin).clamp(min=0).sum() / max(1, len(units))

    def _next_places(self, ctx: Context) -> list[int]:
        """Return the places in `old` of the classes that are replayed in this step."""
        if ctx.progress.epoch != self.epoch:
            self.epoch, self.turn = ctx.progress.epoch, 0
            self.cycle = torch.randperm(len(self.old), generator=ctx.generator("classes")).tolist()
        count = min(self.classes_per_batch, len(self.cycle))
        places = [self.cycle[(self.turn + k) % len(self.cycle)] for k in range(count)]
        self.turn += count
        return places

    def _drawn(self, sampler: Sampler, rows: int, ctx: Context) -> Tensor:
        """Return this process's share [k, N, d] of `rows` features of each of the k classes of a sampler."""
        rank, world = ctx.hardware.rank, ctx.hardware.world
        return sampler(per_process(rows, rank=rank, world=world), ctx.generator("replay", rank))

    def end_task(self, task: Task, ctx: Context) -> None:
        own = self.replay.empty()
        with torch.no_grad():
            for batch in task.train.batches(256):
                own.update(self.head.joint.project(self.backbone(batch.x)).float(), batch.y)
            self.replay.add(own)
            if self.before is not None:
                weight = self.head.mapping.weight
                weight.copy_(fused(self.before, weight, self.mix_bias))
        self.latest[task.classes.to(self.latest.device)] = task.index
        self.before, self.sampler, self.pair_sampler = None, None, None
        self.pairs, self.away = self.pairs[:0], self.away[:0]


def near_pairs(texts: Tensor, old: Tensor, new: Tensor, distance: float) -> Tensor:
    """Return the pairs [P, 2] long of an old and a new class whose texts are nearer than `distance`, nearest first.

    Args:
        texts: [C, d], unit rows by class id.
        old: [k] long, class ids.
        new: [n] long, class ids.
        distance: delta.
    """
    apart = torch.cdist(texts[old].double(), texts[new].double(), compute_mode="donot_use_mm_for_euclid_dist")
    near = (apart < distance).nonzero()
    order = apart[near[:, 0], near[:, 1]].argsort(stable=True)
    return torch.stack([old[near[:, 0]], new[near[:, 1]]], dim=1)[order]


def fused(old: Tensor, new: Tensor, bias: float) -> Tensor:
    """Return U [P G + Q (1 - G)] [d, d] of the map before and after a task, in the notation of the module.

    Args:
        old: W_old [d, d].
        new: W [d, d].
        bias: b_m.
    """
    left, values, right = torch.linalg.svd(old.double())
    before, after = values[:, None] * right, left.t() @ new.double()
    moved = (after - before).abs()
    if not moved.any():
        return new
    kept = (moved / moved.max() + bias).clamp(max=1)
    result: Tensor = new.double() + left @ ((before - after) * (1 - kept))
    return result.to(new)
