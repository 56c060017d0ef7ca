"""SLCA++: few slow parameters, symmetric cross-entropy and scaled features (arXiv 2408.08295; code GengDavid/SLCA).

Memory between tasks: that of SLCA; LoRA of rank r, 4 r (3 D + D) bytes per block for `qkv`; and a factor per class,
4 C bytes, twice. Task id: not needed.

Verified: LoRA and the trained parameters are those of the paper and move nothing else, initial predictions are those of
the plain model bit for bit, loss, rates and factors equal values computed by hand (test_methods_slca).
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clrun.blocks.gaussian import Alignment
from clrun.blocks.inject import Injector, Plan, require_blocks
from clrun.blocks.lora import LinearLoRA, linear_at
from clrun.blocks.params import rate_groups
from clrun.data.split import Batch
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.heads import GrowingHead
from clrun.learning.losses import Compete, masked_symmetric_cross_entropy
from clrun.learning.method import freeze
from clrun.methods.slca import Slca
from clrun.system.errors import ConfigError, Count, NonNegative

PATHS = {"qkv": "attn.qkv", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}  # in a block, by name of the target


class SlcaPp(Slca):
    """SLCA whose backbone trains LoRA, normalisations, biases and the class token only.

    LoRA adds lora_scale B A x to the output of each target layer for its input x. B begins at 0, and A at the first
    right singular vectors of the layer's weight, set before the first task; both are trained in all tasks. The fused
    `qkv` has one pair A, B. The public code declares LoRA on `fc1` and `fc2` too, but its optimizer misses them, so
    that the published numbers are those of targets=[qkv]; the paper describes [qkv, fc1, fc2].

    The loss of stage 1 is ce_weight CE + rce_weight RCE with the reverse cross-entropy
    RCE = -sum_k max(p_k, 1e-7) ln max(y_k, 1e-4). In stage 2 the means are not shrunk. Instead each feature is divided
    by 1 + rho (t - tau), where t - tau says how many tasks ago the task of its class was, and rho is uniform in
    feature_scale (1 +- feature_scale_spread / 2). After the alignment the row of a class receives the features times
    1 + feature_scale (t - tau). These factors are 1 again when the next task begins.

    Deviations from the public code: those of `Slca`.

    Args:
        backbone: a transformer of timm with `blocks`; all parameters but those in `tuned` are frozen.
        num_classes: C.
        tuned: a parameter of the backbone is trained if its name contains one of these words.
        targets: layers of each block with LoRA, of qkv, fc1 and fc2.
        rank: r, rank of LoRA; 0 for no LoRA.
        lora_scale: factor of the updates.
        lora_init: initial A: "svd", the first right singular vectors of the weight, or "kaiming", as in `nn.Linear`.
        lora_lr_scale_first: learning rate of LoRA in the first task, relative to that of the budget.
        lora_lr_scale: learning rate of LoRA in all later tasks, relative to that of the budget.
        backbone_lr_scale: learning rate of the trained parameters of the backbone, relative to that of the budget.
        ce_weight: weight of the cross-entropy.
        rce_weight: weight of the reverse cross-entropy.
        feature_scale: mean of rho, and rate of the factors of old rows of the head; 0 scales nothing.
        feature_scale_spread: width of the interval of rho, relative to its mean.
        alignment: options of stage 2, see `clrun.blocks.gaussian.Alignment`.
        reset_final_norm: begin with a new last normalisation, as the public code does.
        compete: classes that compete in the training loss of stage 1, see `clrun.learning.losses`.
    """

    needs_vit: ClassVar[bool] = True
    hooks_backbone = True
    head: "ScaledHead"

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        tuned: list[str],
        targets: list[Literal["qkv", "fc1", "fc2"]],
        rank: Count,
        lora_scale: float,
        lora_init: Literal["svd", "kaiming"],
        lora_lr_scale_first: NonNegative,
        lora_lr_scale: NonNegative,
        backbone_lr_scale: NonNegative,
        ce_weight: NonNegative,
        rce_weight: NonNegative,
        feature_scale: NonNegative,
        feature_scale_spread: NonNegative,
        alignment: Alignment,
        reset_final_norm: bool,
        compete: Compete,
    ) -> None:
        require_blocks(backbone, type(self).__name__)
        if len(set(targets)) < len(targets):
            raise ConfigError(f"method.targets: a layer is listed twice in {targets}; name each once")
        super().__init__(
            backbone,
            num_classes,
            backbone_lr_scale=backbone_lr_scale,
            mean_shrink=0.0,
            alignment=alignment,
            reset_final_norm=reset_final_norm,
            compete=compete,
        )
        self.lora_init, self.lora_lr_scale_first, self.lora_lr_scale = lora_init, lora_lr_scale_first, lora_lr_scale
        self.ce_weight, self.rce_weight = ce_weight, rce_weight
        self.feature_scale, self.feature_scale_spread = feature_scale, feature_scale_spread
        train_only(backbone, tuned)
        blocks = range(len(backbone.blocks))  # type: ignore[arg-type]
        self.paths = [f"blocks.{block}.{PATHS[target]}" for block in blocks for target in targets] if rank else []
        layers = (linear_at(backbone, path, type(self).__name__) for path in self.paths)
        self.updates = nn.ModuleList(LinearLoRA.beside(layer, rank, scale=lora_scale) for layer in layers)
        self.injector = Injector()
        self.head = ScaledHead(int(backbone.num_features), num_classes)  # type: ignore[arg-type]

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        if task.index == 0 and self.lora_init == "svd":
            for path, update in zip(self.paths, self.updates, strict=True):
                update.align_with(self.backbone.get_submodule(path).weight)  # type: ignore[operator]

    def trainable(self) -> list[dict[str, Any]]:
        first = self.unaligned is None
        return rate_groups(
            (self.backbone.parameters(), self.backbone_lr_scale),
            (self.updates.parameters(), self.lora_lr_scale_first if first else self.lora_lr_scale),
            (self.head.parameters(), 1.0),
        )

    def features(self, x: Tensor) -> Tensor:
        plan = Plan(parallel=dict(zip(self.paths, self.updates, strict=True)))
        with self.injector.use(self.backbone, plan):
            features: Tensor = self.backbone(x)
        return features

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        mask = self.competing(batch.t, ctx)
        return masked_symmetric_cross_entropy(
            self(batch.x), batch.y, mask, weight=self.ce_weight, reverse_weight=self.rce_weight
        )

    def after_step(self, ctx: Context) -> None:
        super().after_step(ctx)
        self.injector.release()

    def align_head(self, task: Task, ctx: Context) -> None:
        super().align_head(task, ctx)
        classes = self.replay.classes
        self.head.scale[classes] = 1 + self.feature_scale * self.ages(classes, ctx).to(self.head.scale)

    def replayed(self, classes: Tensor, ctx: Context) -> Callable[[], Tensor]:
        sampler, generator = self.replay.sampler(classes), ctx.generator("replay")
        ages = self.ages(classes, ctx).float()[:, None, None]

        def draw() -> Tensor:
            rows = sampler(self.alignment.rows_per_class, generator)
            uniform = torch.rand(*rows.shape[:2], 1, generator=generator).to(rows.device)
            rho = self.feature_scale * (1 + self.feature_scale_spread * (uniform - 0.5))
            return rows / (1 + rho * ages)

        return draw


class ScaledHead(GrowingHead):
    """A growing linear classifier whose row of a class receives the features times a constant factor.

    Args:
        num_features: D.
        num_classes: C.

    Attributes:
        scale: [C], the factor per class; 1 unless it is set.
    """

    scale: Tensor

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__(num_features, num_classes)
        self.register_buffer("scale", torch.ones(num_classes))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [B, C] of features [B, D]."""
        return F.linear(features, self.scale[:, None] * self.weight, self.bias)


def train_only(backbone: nn.Module, words: list[str]) -> None:
    """Freeze all parameters except those whose names contain one of the words.

    Raises:
        ConfigError: no name contains one of them.
    """
    freeze(backbone)
    named = dict(backbone.named_parameters())
    for word in words:
        matching = [parameter for name, parameter in named.items() if word in name]
        if not matching:
            raise ConfigError(f"method.tuned: no parameter of the backbone has a name with '{word}'; remove it")
        for parameter in matching:
            parameter.requires_grad_(True)
