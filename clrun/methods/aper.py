"""APER (ADAM): adapt on the first task, then prototypes of both models (Zhou et al., IJCV 2024, arXiv 2303.07338).

Memory between tasks: what adapts (L D, n L D, 22 D n + 4 D or n (2 D r + r + D) floats; "finetune" a second backbone),
C (16 D + 8) bytes of sums (twice that once a class comes in a second domain), 8 C D of prototypes. Task id: not needed.

Verified: without adaptation it is simplecil, scores are cosines with class means, prototypes do not depend on the order
of later tasks (test_methods_prompts).
"""

import torch
from torch import Tensor, nn

from clrun.blocks.adaptation import Adaptation, Kind, Recipe
from clrun.blocks.params import eval_mode
from clrun.blocks.statistics import ClassStats
from clrun.data.split import Batch
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.heads import PrototypeHead
from clrun.learning.training import fit
from clrun.methods.prompted import Prompted, scaled
from clrun.system.errors import Count, Fraction, NonNegative, Positive, PositiveInt


class Aper(Prompted):
    """Prototypes in the features of the plain model and of one adapted to the first task.

    The first task trains the adaptation and a cosine head that is thrown away; then everything is frozen. The
    classifier row of a class is the mean of [plain feature; adapted feature], un-normalised, over its training images
    in the eval view; the score is the cosine. A class that comes in several domains has the mean over all of them.

    What the first task holds decides what is adapted: results depend on the task order through it, and only through it.

    Args:
        backbone: a timm vision transformer (without prompts: any of timm's with `blocks`), frozen; "finetune" trains a
            copy.
        num_classes: C.
        adaptation: what the first task trains, see `Adaptation`.
        length: L, prompts of VPT, which begin at 0.
        bottleneck: r of adapters.
        adapter_scale: factor of an adapter's output, not trained.
        dropout: share of an adapter's activations dropped in training.
        ssf_std: of the initial scales about 1 and shifts about 0.
        cosine_scale: initial value of the trained factor of the cosine head; the published 1 gives tiny gradients.
        lr_scale: factor of the budget's learning rate.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        adaptation: Kind,
        length: Count,
        bottleneck: PositiveInt,
        adapter_scale: float,
        dropout: Fraction,
        ssf_std: NonNegative,
        cosine_scale: Positive,
        lr_scale: Positive,
    ) -> None:
        super().__init__(backbone, num_classes, lr_scale=lr_scale, compete="current", tokens=False)
        recipe = Recipe(adaptation, length, bottleneck, adapter_scale, dropout, ssf_std, cosine_scale)
        self.adaptation = Adaptation(backbone, num_classes, recipe, method=type(self).__name__)
        self.head: PrototypeHead = PrototypeHead(2 * self.width, num_classes, metric="cosine")
        self.stats = ClassStats(2 * self.width, num_classes)

    def begin_task(self, task: Task, ctx: Context) -> None:
        if task.index == 0:
            self.adaptation.begin(task.classes)

    def learn(self, task: Task, ctx: Context) -> None:
        if task.index == 0:
            fit(self, task.train, ctx, budget=scaled(ctx.budget, self.lr_scale))
            self.adaptation.end()
        with torch.no_grad(), eval_mode(self):
            own = self.stats.empty()
            for batch in task.train.batches(256):
                own.update(self.both(batch.x), batch.y)
        self.stats.merge(own)
        self.head.prototypes.copy_(self.stats.means())

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        return self.adaptation.loss(self.backbone, batch, ctx.mask(batch.t, "current"))

    def after_step(self, ctx: Context) -> None:
        self.adaptation.release()

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        return self._scores(self.both(x))

    def constant(self, x: Tensor) -> Tensor | None:
        return self.both(x) if self.adaptation.done else None

    def forward_with(self, constant: Tensor, x: Tensor, task: int | None = None) -> Tensor:
        return self._scores(constant)

    def _scores(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            scores: Tensor = self.head(features)
        return scores

    def both(self, x: Tensor) -> Tensor:
        """Return [B, 2 D], the features of the plain and of the adapted model, fp32."""
        return torch.cat([self.query(x), self.adaptation.features(self.backbone, x).float()], dim=1)
