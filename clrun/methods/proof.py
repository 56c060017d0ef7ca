"""PROOF: projections beside a frozen CLIP, and attention among images, texts and prototypes (TPAMI 2025, 2305.19270).

    z = sum_m P_m(g_i(x)),  w_k = n(sum_m T_m(g_t(t_k))),  q_k = n(sum_m P_m(p_k)),  p_k = mean of n(g_i(x)) of class k
    S = [n(z); w_1 .. w_K; q_1 .. q_K; c_1 .. c_3b]               b tasks, three learned context tokens per task
    S~ = LayerNorm(fc(softmax(S Q (S K)' / sqrt(d)) S V) + S)
    score_k = kappa n(z) . w_k  +  z~ . w~_k  +  z~ . q~_k         projected, textual and visual matching
    L = the sum of the cross-entropies of the three matchings on rows of the task and exemplars

Training has the first template t_{k,1}; predictions have w_k = n(mean_m n(sum_p T_p(g_t(t_{k,m})))): each template is
projected before their mean is taken.

Memory between tasks, for C classes in d dimensions after b tasks: M exemplars with the s bytes of a stored row of
features and 8 bytes for its label and task; 8 (d^2 + d) b bytes of projections, 12 d b of contexts and 16 d^2 + 12 d of
the fusion; 12 C d + 9 C bytes of sums, counts and prototypes; and one text row per class, 4 C d bytes. Task id: not
needed.

Deviations from the public code, which is followed where `compat` says so: the fused rows of texts and prototypes are
those of each image instead of their mean over the batch; old projections of texts are frozen; an image is normalised in
predictions as in training; the projected matching has the scale kappa of CLIP, which stays fixed, and is trained by its
cross-entropy. In a step all images share the dropout mask of the attention among texts, prototypes and contexts, which
is computed once: the masks of one image are distributed as published. There is no augmentation, as published.

Verified: the fused rows equal those of attention over the whole sequence, identity projections give zero-shot and
prototype scores, towers and old parts stay bit for bit, predictions depend on the image alone, and the number of
parameters is the published one (test_methods_names).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clrun.blocks.buffers import Exemplars, herd
from clrun.blocks.params import eval_mode
from clrun.blocks.statistics import ClassStats
from clrun.data.captions import Captions
from clrun.data.split import Batch, Split, concatenate
from clrun.data.stream import Stream, Task
from clrun.learning.context import Context
from clrun.learning.losses import Compete, masked_cross_entropy, paired_cross_entropy
from clrun.learning.method import Method, freeze
from clrun.learning.names import NamesHead, caption_features, class_text
from clrun.learning.training import fit
from clrun.system.errors import ConfigError, Count, Fraction

CONTEXT = 3  # learned tokens per task
IMAGES = 64  # images of a prediction at once; each has the fused rows of all classes
Init = Literal["random", "identity"]


@dataclass(frozen=True)
class Compat:
    """What to do as the public code does it.

    Attributes:
        batch_mean: the fused rows of texts and prototypes are the mean over the batch, so that a prediction depends on
            the other images of its batch.
        train_old_text: the projections of texts of earlier tasks go on being trained.
        raw_test_image: in predictions images are not normalised before the fusion and in the projected matching.
        contrastive: the loss of the projected matching is CLIP's symmetric one within the batch.
    """

    batch_mean: bool
    train_old_text: bool
    raw_test_image: bool
    contrastive: bool


class Projections(nn.Module):
    """The sum of one linear layer [d, d] per task.

    Args:
        width: d.
        init: "random", as `nn.Linear`; "identity": the first layer is the identity and later ones are 0, so that a new
            task begins with the sum as it is.
    """

    def __init__(self, width: int, *, init: Init) -> None:
        super().__init__()
        self.width, self.init = width, init
        self.layers = nn.ModuleList()

    def add(self, *, train_old: bool) -> None:
        """Add the layer of a new task; the earlier ones are frozen unless `train_old`."""
        if not train_old:
            freeze(self)
        layer = nn.Linear(self.width, self.width)
        if self.init == "identity":
            nn.init.zeros_(layer.bias)
            (nn.init.zeros_ if len(self.layers) else nn.init.eye_)(layer.weight)
        self.layers.append(layer)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum over the tasks [N, d] of x [N, d]."""
        weight = torch.stack([layer.weight for layer in self.layers]).sum(dim=0)  # type: ignore[misc]
        bias = torch.stack([layer.bias for layer in self.layers]).sum(dim=0)  # type: ignore[misc]
        return F.linear(x, weight, bias)


class Fusion(nn.Module):
    """Self-attention with one head over the sequence of an image and tokens that all images share.

    Only the image differs between the sequences of a batch. In the attention of a shared token the image has the weight
    sigmoid(s - log sum_j exp(s_j)), where s is its score and s_j are those of the shared tokens, whose part is computed
    once for all images. This is the same as attention over each sequence, at a cost linear in its length.

    Args:
        width: d.
        dropout: probability with which weights of the attention and entries of its output are dropped in training.
    """

    def __init__(self, width: int, *, dropout: float) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.factor = 1 / math.sqrt(width)
        for layer in (self.query, self.key, self.value):
            nn.init.normal_(layer.weight, std=math.sqrt(1 / width))
        nn.init.xavier_normal_(self.out.weight)

    def forward(self, image: Tensor, read: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the fused images [B, d] and, for each of them, the fused rows [B, R, d] of `read`.

        Args:
            image: [B, d].
            read: [R, d], rows that attend to image and tokens; those that are among the tokens see themselves.
            tokens: [L, d], what all images and rows of `read` attend to, beside the image.
        """
        keys, values = self.key(tokens), self.value(tokens)
        own_key, own_value = self.key(image), self.value(image)
        scores = self.factor * self.query(read) @ keys.t()
        from_image = self.factor * own_key @ self.query(read).t()
        share = torch.sigmoid(from_image - scores.logsumexp(dim=1))[:, :, None]
        shared = F.linear(self.dropout(scores.softmax(dim=1)) @ values, self.out.weight)
        changing = F.linear(own_value, self.out.weight)[:, None]
        attended = (1 - share) * shared + self.dropout(share) * changing + self.out.bias
        rows = self.norm(self.dropout(attended) + read)
        queries = self.query(image)
        own = torch.cat([(queries * own_key).sum(dim=1, keepdim=True), queries @ keys.t()], dim=1)
        weights = self.dropout((self.factor * own).softmax(dim=1))
        seen = self.out(weights[:, :1] * own_value + weights[:, 1:] @ values)
        return self.norm(self.dropout(seen) + image), rows


class ProjectedHead(NamesHead):
    """Projected texts, and the projected matching kappa n(z) . w_k.

    Args:
        backbone: has a `joint` space.
        num_classes: C.
        init: of the projections.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, *, init: Init) -> None:
        super().__init__(backbone, num_classes, names="live")
        self.image, self.text = Projections(self.joint.dim, init=init), Projections(self.joint.dim, init=init)

    def grow(self, classes: Tensor, generator: torch.Generator | None = None) -> None:
        """Add classes [k] whose names are known from now on; their rows are encoded when they are next read."""
        self.initialised[classes.to(self.initialised.device)] = True
        self._made_from = ()

    def embed(self, features: Tensor) -> Tensor:
        """Return n(z) [B, d] of features [B, D]."""
        return F.normalize(self.image(self.joint.project(features)), dim=1)

    def texts(self, classes: list[int]) -> Tensor:
        """Return w [k, d] of the first template with gradients."""
        assert self.captions is not None, "the method reads the captions before its first task"
        first = [own[0] for own in caption_features(self._of[0], self.captions, classes)]
        return F.normalize(self.text(torch.stack(first)), dim=1)

    def ensemble(self, features: Tensor) -> Tensor:
        """Return w [d] of all templates, whose embeddings [M, d] are projected one by one."""
        return class_text(self.text(features))

    def sources(self) -> Iterable[Tensor]:
        """Return the projections of texts: the towers are frozen."""
        return self.text.parameters()


class Proof(Method):
    """Learn projections and context tokens per task, and one fusion for all tasks, with exemplars.

    A class whose name is known and that has not been learned (`job.eval_unseen`, or `compete=all`) has no prototype,
    and its textual matching counts twice. Its text attends to the sequence and is no part of it, so that the scores of
    learned classes do not depend on it.

    Args:
        backbone: passes on features of a frozen image tower; has a `joint` space with a text tower.
        num_classes: C.
        init: of the projections: "random" as published, which gives up the alignment of CLIP; "identity" keeps it, see
            `Projections`.
        dropout: of the fusion.
        capacity: M, exemplars of all classes together, floor(M / classes) per class, chosen by herding on n(g_i(x)).
        per_class: whether `capacity` is the number of exemplars per class instead.
        compat: what to do as the public code does it.
        compete: classes that compete in the cross-entropies, see `clrun.learning.losses`.
    """

    needs_text: ClassVar[bool] = True
    head: ProjectedHead
    prototypes: Tensor
    learned: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        init: Init,
        dropout: Fraction,
        capacity: Count,
        per_class: bool,
        compat: Compat,
        compete: Compete,
    ) -> None:
        super().__init__(backbone, num_classes, compete=compete)
        freeze(backbone)
        self.depends_on_batch = compat.batch_mean
        self.capacity, self.per_class, self.compat = capacity, per_class, compat
        self.head = ProjectedHead(backbone, num_classes, init=init)
        width = self.head.joint.dim
        self.fusion = Fusion(width, dropout=dropout)
        self.contexts = nn.ParameterList()
        self.stats = ClassStats(width, num_classes)
        self.register_buffer("prototypes", torch.zeros(num_classes, width))
        self.register_buffer("learned", torch.zeros(num_classes, dtype=torch.bool))  # classes with a prototype
        self.memory = Exemplars("y")

    @classmethod
    def reads_features(cls, options: Mapping[str, Any]) -> bool:
        return True

    def check(self, stream: Stream) -> None:
        classes = int(stream.members.any(dim=0).sum())
        if not self.per_class and 0 < self.capacity < classes:
            raise ConfigError(f"method.capacity={self.capacity}: less than one exemplar for each of {classes} classes")

    # --- a task

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        self.head.image.add(train_old=False)
        self.head.text.add(train_old=self.compat.train_old_text)
        self.contexts.requires_grad_(False)
        self.contexts.append(nn.Parameter(torch.randn(CONTEXT, self.head.joint.dim)))

    def learn(self, task: Task, ctx: Context) -> None:
        for unit, batch in self._units(task.train):
            self.stats.update(unit, batch.y)
        self.prototypes.copy_(self.stats.means())
        self.learned.copy_(self.stats.counts() > 0)
        parts: list[Split] = [task.train]
        if len(self.memory):
            parts.append(self.memory.split(task.train.transform))
        fit(self, concatenate(parts), ctx)

    def end_task(self, task: Task, ctx: Context) -> None:
        count = self.capacity if self.per_class else self.capacity // int(self.learned.sum())
        self.memory.truncate(count)
        if not count:
            return
        y, units = task.train.y, torch.cat([unit for unit, _ in self._units(task.train)])
        own = [(y == label).nonzero()[:, 0] for label in task.classes.tolist()]
        chosen = torch.cat([rows[herd(units[rows], count)] for rows in own])
        for batch in task.train.select(chosen).batches(256, view="raw"):
            self.memory.append(batch)

    def _units(self, split: Split) -> Iterable[tuple[Tensor, Batch]]:
        """Yield n(g_i(x)) [B, d] of the rows of a split with their batches."""
        with torch.no_grad(), eval_mode(self):
            for batch in split.batches(256):
                yield F.normalize(self.head.joint.project(self.backbone(batch.x)).float(), dim=1), batch

    # --- matching

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        named = self._named()
        texts = self.head.texts(named.tolist())
        units = self.head.embed(self.backbone(batch.x))
        y = torch.searchsorted(named, batch.y)
        mask = self.competing(batch.t, ctx)[:, named]
        textual, visual = self.fused_matchings(units, texts, named)
        losses = [masked_cross_entropy(logits, y, mask) for logits in (textual, visual)]
        if not self.compat.contrastive:
            return sum(losses, masked_cross_entropy(self.head.match(units, texts), y, mask))
        return sum(losses, paired_cross_entropy(self.head.match(units, texts[y])))

    def fused_matchings(self, image: Tensor, texts: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the textual and the visual matching [B, K] after the fusion.

        Args:
            image: [B, d].
            texts: w [K, d].
            classes: [K] long, the classes of the texts; -1 for one that is no class of the stream.
        """
        learned = (self.learned[classes] & (classes >= 0)).nonzero()[:, 0]
        known = self.learned.nonzero()[:, 0]
        prototypes = F.normalize(self.head.image(self.prototypes[known]), dim=1)
        shown = texts[learned] if len(learned) == len(known) else self.head.rows()[known]
        tokens = torch.cat([shown, prototypes, *self.contexts])
        read = torch.cat([texts, prototypes]) if len(learned) else texts
        fused, rows = self.fusion(image, read, tokens)
        if self.compat.batch_mean:
            rows = rows.mean(dim=0, keepdim=True).expand(len(image), -1, -1)
        matchings = torch.einsum("brd,bd->br", rows, fused)
        textual = matchings[:, : len(texts)]
        return textual, textual.index_copy(1, learned, matchings[:, len(texts) :]) if len(learned) else textual

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        named = self._named()
        texts = self.head.texts(named.tolist()) if self.training else self.head.rows()[named]
        scores = self.scores(x, texts, named)
        return scores.new_zeros(len(x), self.num_classes).index_copy(1, named, scores)

    def score_names(self, x: Tensor, captions: Captions) -> Tensor:
        """Return scores [B, K] of x over K classes of another data set, which have no prototypes."""
        texts = self.head.rows_of(captions)
        return self.scores(x, texts, torch.full((len(texts),), -1, device=texts.device))

    def scores(self, x: Tensor, texts: Tensor, classes: Tensor) -> Tensor:
        """Return the sum of the three matchings [B, K] of x [B, D] with texts [K, d] of these classes [K]."""
        raw = self.compat.raw_test_image and not self.training
        whole = self.training or self.compat.batch_mean
        found = []
        for part in torch.split(x, len(x) if whole else IMAGES):
            features = self.backbone(part)
            image = self.head.image(self.head.joint.project(features)) if raw else self.head.embed(features)
            textual, visual = self.fused_matchings(image, texts, classes)
            projected = image @ texts.t() if raw else self.head.match(image, texts)
            found.append((projected + textual + visual).float())
        return torch.cat(found)

    def _named(self) -> Tensor:
        """Return the ids [K] long of the classes whose names are known, ascending."""
        return self.head.initialised.nonzero()[:, 0]
