"""APER (ADAM): adapt on the first task, then prototypes of both models (Zhou et al., IJCV 2024, arXiv 2303.07338).

Memory between tasks: the adaptation (for n blocks of width D: L D floats for shallow and n L D for deep prompts of
length L, 22 D n + 4 D for scales and shifts, n (2 D r + r + D) for adapters of width r; with "finetune" a second
backbone), 16 D + 8 bytes of sums per class (twice as much once a class comes in a second domain) and 8 D bytes of
prototype per class. Task id: not needed.

Verified: without adaptation it is simplecil, the scores are cosines with class means, and the prototypes do not depend
on the order of later tasks (test_methods_prompts).
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

    The first task trains the adaptation together with a cosine head over its classes. The head is then discarded and
    everything is frozen. The classifier row of a class is the mean of [plain feature; adapted feature], without
    normalisation, over the training images of the class in the eval view; the score is the cosine. A class that comes
    in several domains has the mean over all of them.

    The first task decides what is adapted. Results depend on the task order only through it.

    Args:
        backbone: a timm vision transformer (without prompts: any of timm's with `blocks`), frozen; "finetune" trains a
            copy.
        num_classes: C.
        adaptation: what the first task trains, see `Adaptation`.
        length: L, number of VPT prompts, which start at 0.
        bottleneck: r, width of the adapters.
        adapter_scale: factor of an adapter's output; it is not trained.
        dropout: fraction of an adapter's activations that is dropped in training.
        ssf_std: standard deviation of the initial scales around 1 and of the initial shifts around 0.
        cosine_scale: initial value of the trained factor of the cosine head. The published value of 1 gives very small
            gradients.
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
