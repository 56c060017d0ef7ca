"""PromptFusion: a CLIP with prompts and a ViT with prompts, mixed (Chen et al., ECCV 2024, arXiv 2303.07223).

    Stabilizer: z_c = kappa n(f) . w_k, f the mean output of learned image prompts, w_k text k with learned words
    Booster:    z_v = head(mean output of learned prompts of a frozen ViT)
    z = (1 - lambda) z_c + lambda z_v,   lambda = sigmoid(fusion)
    L = -mean_i W_{y_i} log softmax(z_i)_{y_i},  W_k = sigmoid(alpha_k) for new, (t / 2) / sigmoid(beta_k) for old k

with t tasks before the current one; the first task has W = 1. Training rows are those of the task and exemplars.

Memory between tasks: 4 M w bytes of text prompts per class (w: width of the text tower), prompts of both image sides,
the Booster's head, one text row per class, the second backbone, and `capacity` (s + 8) bytes of exemplars with inputs
of s bytes. Task id: not needed.

Deviations from the published code: alpha and beta belong to classes (there to places in the batch); the texts that are
evaluated are those of the trained prompts (there one step older); a text has no leftover placeholder words; each of
the two networks has pixels normalised for itself (there both as for CLIP).

Verified: with lambda 0 and 1 predictions are those of one branch; without prompts the Stabilizer is zero_shot and the
Booster a linear head on the class token; without weights and with W = 1 the loss is the cross-entropy; frozen networks
and text prompts of earlier tasks stay bit for bit (test_methods_promptfusion).
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clrun.blocks.buffers import Exemplars, herd
from clrun.blocks.inject import Injector, Plan, require_vit
from clrun.blocks.params import eval_mode
from clrun.data.captions import Captions
from clrun.data.split import Batch, Split, concatenate
from clrun.data.stream import Stream, Task
from clrun.data.transforms import ImageTransform
from clrun.learning.context import Context
from clrun.learning.heads import GrowingHead
from clrun.learning.losses import Compete, masked_cross_entropy
from clrun.learning.method import Method, freeze
from clrun.learning.names import NamesHead
from clrun.learning.networks import Factory, FrozenNetwork
from clrun.learning.training import fit
from clrun.methods.coop import ContextHead
from clrun.system.errors import ConfigError, Count, Fraction

SECOND = "method.second_backbone"
STD = 0.01  # of new text prompts
Mask = Literal["learned", "fixed", "none"]


@dataclass(frozen=True)
class Prompts:
    """Numbers of learned vectors.

    Attributes:
        text: M, words per class; 0 for the captions of the data set.
        image: prompts of CLIP's image tower; 0 for its class token.
        booster: prompts of the Booster's transformer; 0 for its features.
    """

    text: Count
    image: Count
    booster: Count


class Booster(nn.Module):
    """Learned prompts beside the patches of a frozen vision transformer, which is no part of this module.

    The prompts enter the first block with the position of the class token.

    Args:
        width: D of the transformer.
        length: number of prompts; 0 for the plain transformer.
    """

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.rand(length, width) * 2 - 1)
        self.injector = Injector()

    def forward(self, vit: Any, x: Tensor) -> Tensor:
        """Return the mean [B, D] of the prompts' outputs for images x; without prompts the transformer's features."""
        if not len(self.prompts):
            features: Tensor = vit(x)
            return features
        at_class = vit.pos_embed[0, 0] if vit.has_class_token and not vit.no_embed_class else 0.0
        first = int(vit.num_prefix_tokens)
        with self.injector.use(vit, Plan(tokens={0: self.prompts + at_class}, keep_tokens=True)):
            tokens: Tensor = vit.forward_features(x)
        mean: Tensor = vit.fc_norm(tokens[:, first : first + len(self.prompts)].mean(dim=1))
        return mean


class Branches(Method):
    """The two branches, the class-weighted loss and the exemplars of PromptFusion; a subclass puts z together.

    Args:
        backbone: two towers, frozen.
        num_classes: C.
        prompts: numbers of learned vectors.
        mask: W: "learned" with alpha and beta, "fixed" at their initial value 1, or "none" for 1.
        capacity: exemplars of all classes together, chosen by herding in features of the frozen image tower.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    needs_text: ClassVar[bool] = True
    needs_towers: ClassVar[bool] = True
    hooks_backbone = True
    settings = frozenset({"til", "cil"})
    head: GrowingHead

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        prompts: Prompts,
        mask: Mask,
        capacity: int,
        compete: Compete,
    ) -> None:
        super().__init__(backbone, num_classes, compete=compete)
        freeze(backbone)
        joint: Any = backbone.joint
        self.text_head: NamesHead = (
            ContextHead(backbone, num_classes, length=prompts.text, position="end", option="method.prompts.text")
            if prompts.text
            else NamesHead(backbone, num_classes, names="fixed")
        )
        self.image_prompts = nn.Parameter(torch.randn(prompts.image, joint.vision_width))
        self.mask, self.capacity, self.prompts = mask, capacity, prompts
        self.alpha, self.beta = (
            nn.Parameter(torch.ones(num_classes), requires_grad=mask == "learned") for _ in range(2)
        )
        self.memory = Exemplars("y")
        self.second: FrozenNetwork | None = None
        self.prepared: ImageTransform | None = None  # what has prepared the images, without augmentations
        self._boost(backbone, "backbone")

    def _boost(self, vit: nn.Module, where: str) -> None:
        """Make prompts and head for the Booster's transformer."""
        require_vit(vit, type(self).__name__, where=where)
        width = int(vit.embed_dim)  # type: ignore[arg-type]
        self.booster, self.head = Booster(width, self.prompts.booster), GrowingHead(width, self.num_classes)

    # --- networks, names and options

    @classmethod
    def further_networks(cls, options: Mapping[str, Any]) -> Mapping[str, Factory]:
        second = options["second_backbone"]
        return {} if second is None else {SECOND: second}

    def receive(self, networks: Mapping[str, FrozenNetwork]) -> None:
        self.second = networks.get(SECOND)
        if self.second is not None:
            self._boost(self.second.network, SECOND)

    def loaded_networks(self) -> dict[str, nn.Module]:
        second = {} if self.second is None else {"second backbone": self.second.network}
        return super().loaded_networks() | second

    def read_names(self, captions: Captions | None) -> None:
        self.text_head.read(captions)

    def meet(self, classes: Tensor) -> None:
        self.text_head.grow(classes)

    def score_names(self, x: Tensor, captions: Captions) -> Tensor:
        """Return logits [B, K] of the Stabilizer, which alone knows classes by their names."""
        return self.text_head.match(self.embeddings(x), self.text_head.rows_of(captions))

    def check(self, stream: Stream) -> None:
        classes = int(stream.members.any(dim=0).sum())
        if 0 < self.capacity < classes:
            raise ConfigError(f"method.capacity={self.capacity}: less than one exemplar for each of {classes} classes")

    # --- a task

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        if self.second is not None and isinstance(ctx.stream.transform, ImageTransform):
            self.prepared = copy.copy(ctx.stream.transform)
            self.prepared.augmentations = ()  # a checkpoint stores the rest
        self.grow(self.text_head, task.classes)
        if isinstance(self.text_head, ContextHead):
            new = torch.arange(self.num_classes) if self.compete == "all" else task.classes
            shape = (len(new), self.text_head.length, self.text_head.joint.text_width)
            self.text_head.add(torch.randn(shape) * STD, new)
            self.text_head.train_only(task.classes)
            self.text_head.active = task.classes.tolist()
            self.text_head.refresh()
        with torch.no_grad():
            self.beta.fill_(1.0)

    def learn(self, task: Task, ctx: Context) -> None:
        parts: list[Split] = [task.train]
        if len(self.memory):
            parts.append(self.memory.split(task.train.transform))
        fit(self, concatenate(parts), ctx)

    def end_task(self, task: Task, ctx: Context) -> None:
        seen = int(ctx.stream.candidates(task.index + 1, "cil")[0].sum())
        self.memory.truncate(self.capacity // seen)
        if not self.capacity:
            return
        encode: Any = self.backbone.encode_image
        with eval_mode(self), torch.no_grad(), ctx.hardware.autocast():
            features = torch.cat(
                [F.normalize(encode(ctx.hardware.layout(b.x)).float(), dim=1) for b in task.train.batches(256)]
            )
        chosen = []
        for label in task.classes.tolist():
            rows = (task.train.y == label).nonzero()[:, 0]
            chosen.append(rows[herd(features[rows], self.capacity // seen)])
        for batch in task.train.select(torch.cat(chosen)).batches(256, view="raw"):
            self.memory.append(batch)

    # --- a step

    def after_step(self, ctx: Context) -> None:
        self.booster.injector.release()

    def weighted(self, logits: Tensor, batch: Batch, ctx: Context) -> Tensor:
        """Return -mean_i W_{y_i} log softmax(z_i)_{y_i} [] of logits z [B, C]; W = 1 in the first task."""
        competing = self.competing(batch.t, ctx)
        before = ctx.task.index
        if not before or self.mask == "none":
            return masked_cross_entropy(logits, batch.y, competing)
        old = ctx.stream.members[:before].any(dim=0).to(logits.device)
        weights = torch.where(old, before / 2 / self.beta.sigmoid(), self.alpha.sigmoid())
        log_p = logits.masked_fill(~competing, float("-inf")).log_softmax(dim=1)
        return -(weights[batch.y] * log_p.gather(1, batch.y[:, None])[:, 0]).mean()

    # --- the branches

    def embeddings(self, x: Tensor) -> Tensor:
        """Return the unit image embeddings f [B, d] of the Stabilizer for images x."""
        pool = "prompt_mean" if len(self.image_prompts) else "cls"
        encode: Any = self.backbone.image_from_tokens
        return F.normalize(encode(x, self.image_prompts, pool=pool), dim=1)

    def stable(self, f: Tensor) -> Tensor:
        """Return the logits z_c [B, C] of the Stabilizer for its embeddings f [B, d]."""
        return self.text_head.match(f, self.text_head.rows())

    def boosted(self, x: Tensor) -> Tensor:
        """Return the logits z_v [B, C] of the Booster for images x that are prepared for the backbone."""
        if self.second is None:
            logits: Tensor = self.head(self.booster(self.backbone, x))
            return logits
        assert self.prepared is not None, "begin_task sets it"
        found: Tensor = self.head(self.booster(self.second.network, self.second.view(self.prepared)(x)))
        return found


class Promptfusion(Branches):
    """A frozen CLIP with learned prompts that remembers, and a frozen ViT with learned prompts that adapts, mixed.

    Text prompts of a class are trained with its task and frozen afterwards; all else that is learned is shared by the
    tasks.

    Args:
        backbone: two towers, frozen: the Stabilizer.
        num_classes: C.
        second_backbone: factory of the Booster's vision transformer; None for the image tower of `backbone`.
        prompts: numbers of learned vectors.
        fusion: lambda, from 0 (Stabilizer alone) to 1 (Booster alone); None to learn it from sigmoid(1) = 0.731.
        mask: W: "learned" with alpha and beta, "fixed" at their initial value 1, or "none" for 1.
        capacity: exemplars of all classes together, chosen by herding in features of the frozen image tower.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        second_backbone: Factory | None,
        prompts: Prompts,
        fusion: Fraction | None,
        mask: Mask,
        capacity: Count,
        compete: Compete,
    ) -> None:
        super().__init__(backbone, num_classes, prompts, mask, capacity, compete)
        self.fixed = fusion
        self.fusion = nn.Parameter(torch.ones(()), requires_grad=fusion is None)

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        return self.weighted(self(batch.x), batch, ctx)

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        share: Any = self.fusion.sigmoid() if self.fixed is None else self.fixed
        mixed: Tensor = (1 - share) * self.stable(self.embeddings(x)) + share * self.boosted(x)
        return mixed
