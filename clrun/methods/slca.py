"""SLCA: slow learner with classifier alignment (Zhang et al., ICCV 2023, arXiv 2303.05118; code GengDavid/SLCA).

Memory between tasks, for C classes of D features: 8 C D bytes of means and 8 C of counts, 4 D^2 bytes of covariance per
class (alignment.covariance "diagonal": 4 D; "shared": 4 D^2 for all classes together), the head before its alignment,
4 C (D + 1), and 8 C bytes that say which task a class belongs to. Task id: not needed.

Verified: equal rates without alignment are finetuning bit for bit, old rows of the head stand still in training and
come back bit for bit after an alignment, loss and factors equal values computed by hand, and zero covariances repeat
the means (test_methods_slca, test_blocks_gaussian).
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from clrun.blocks.gaussian import Alignment
from clrun.blocks.params import eval_mode, rate_groups
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.heads import GrowingHead
from clrun.learning.losses import Compete
from clrun.learning.method import Method, freeze
from clrun.system.errors import ConfigError, Fraction, NonNegative


class Slca(Method):
    """Finetune everything, the backbone slowly; after each task align all rows of the head to replayed features.

    Stage 1 trains the task by cross-entropy over its own classes, with the learning rate of the budget for the head and
    `backbone_lr_scale` times as much for the backbone. Rows of the head that do not compete are fixed: neither momentum
    nor weight decay moves them. Then mean and covariance of the features of each class of the task are stored, measured
    without augmentation; they are never measured again, although the backbone moves on.

    Stage 2, from the second task on, trains the whole head on features f ~ N(s_c mu_c, Sigma_c) of all classes c so
    far, which are drawn anew for each epoch, by the cross-entropy of z / (nu kappa). z are the logits of f, nu is the
    mean over the tasks of the norm of the logits of each, and kappa is `alignment.temperature`. The means of older
    classes are shrunk by s_c = 1 - mean_shrink (t - tau_c) / (t + 1), where t and tau_c are the positions of the
    current task and of that of the class, from 0. Predictions use the aligned head. The next task begins from the head
    as it was before the alignment.

    A class that comes in several tasks belongs to the latest of them, and its Gaussian is that of all its rows. In the
    task-incremental setting the alignment compares the classes of all tasks, too.

    Deviations from the public code: rows of the head begin as those of `nn.Linear`; covariances are factorised in
    float64, once per alignment; the position of a class's task is known instead of computed from the size of the last
    task, which is wrong for unequal tasks.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        backbone_lr_scale: learning rate of the backbone, relative to that of the budget, which is the head's.
        mean_shrink: largest reduction of the means of old classes; 0 does not shrink them.
        alignment: options of stage 2, see `clrun.blocks.gaussian.Alignment`. With alignment.budget.epochs=0 there is no
            alignment: the slow learner alone.
        reset_final_norm: begin with a new last normalisation of a transformer (scale 1, shift 0, epsilon 1e-5), as the
            public code does, in the place of the pre-trained one.
        compete: classes that compete in the training loss of stage 1, see `clrun.learning.losses`.
    """

    head: GrowingHead
    latest: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        backbone_lr_scale: NonNegative,
        mean_shrink: Fraction,
        alignment: Alignment,
        reset_final_norm: bool,
        compete: Compete,
    ) -> None:
        super().__init__(backbone, num_classes, compete=compete)
        self.backbone_lr_scale, self.mean_shrink, self.alignment = backbone_lr_scale, mean_shrink, alignment
        self.replay = alignment.replay(int(backbone.num_features), num_classes)  # type: ignore[arg-type]
        self.register_buffer("latest", torch.full((num_classes,), -1))  # position of the task of each class
        self.unaligned: GrowingHead | None = None  # the head before its alignment
        self.fixed: Tensor | None = None  # [k] long, rows of the head that stand still in stage 1
        if reset_final_norm:
            renew_final_norm(backbone)

    # --- stage 1: the slow learner

    def begin_task(self, task: Task, ctx: Context) -> None:
        if self.unaligned is not None:
            self.head.load_state_dict(self.unaligned.state_dict())
        super().begin_task(task, ctx)
        position = torch.tensor([task.index], device=ctx.hardware.device)
        fixed = self.head.initialised.to(position.device) & ~self.competing(position, ctx)[0]
        self.fixed = None if self.unaligned is None else fixed.nonzero()[:, 0]

    def trainable(self) -> list[dict[str, Any]]:
        return rate_groups((self.backbone.parameters(), self.backbone_lr_scale), (self.head.parameters(), 1.0))

    def features(self, x: Tensor) -> Tensor:
        """Return the features [B, D] of prepared images x."""
        features: Tensor = self.backbone(x)
        return features

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits

    def after_step(self, ctx: Context) -> None:
        if self.fixed is None or not len(self.fixed):
            return
        assert self.unaligned is not None
        with torch.no_grad():
            for parameter, before in zip(self.head.parameters(), self.unaligned.parameters(), strict=True):
                parameter[self.fixed] = before[self.fixed]

    # --- stage 2: classifier alignment

    def end_task(self, task: Task, ctx: Context) -> None:
        self.fixed = None
        self.unaligned = copy.deepcopy(self.head)
        freeze(self.unaligned)
        self.latest[task.classes.to(self.latest.device)] = task.index
        self.combine(task, ctx)
        self.measure(task)
        if task.index > 0:
            self.align_head(task, ctx)

    def combine(self, task: Task, ctx: Context) -> None:
        """Change the weights of the backbone after stage 1; this method does not."""

    def measure(self, task: Task) -> None:
        """Store the Gaussians of the classes of the task, from the features of its rows without augmentation."""
        with torch.no_grad(), eval_mode(self):
            self.replay.add(self.replay.measured(self.features, task.train))

    def align_head(self, task: Task, ctx: Context) -> None:
        """Train the head on replayed features of all classes so far."""
        draw = self.replayed(self.replay.classes, ctx)
        self.alignment.fit(self, self.head, ctx, draw=draw, groups=self.latest)

    def replayed(self, classes: Tensor, ctx: Context) -> Callable[[], Tensor]:
        """Return a function that draws features [k, N, D] of `classes` [k]."""
        draw = self.replay.aged(classes, self.ages(classes, ctx), ctx, shrink=self.mean_shrink)
        return lambda: draw(self.alignment.rows_per_class)

    def ages(self, classes: Tensor, ctx: Context) -> Tensor:
        """Return [k] float64, how many tasks ago the task of each of `classes` [k] was; 0 for the current one."""
        return (ctx.task.index - self.latest[classes]).double()


def renew_final_norm(backbone: nn.Module) -> None:
    """Set the last normalisation of a transformer to scale 1, shift 0 and epsilon 1e-5, in place.

    Raises:
        ConfigError: there is none.
    """
    norms = [m for name in ("norm", "fc_norm") if isinstance(m := getattr(backbone, name, None), nn.LayerNorm)]
    if not norms:
        raise ConfigError(
            f"method.reset_final_norm: {type(backbone).__name__} has no last layer normalisation; set it to false"
        )
    norms[-1].reset_parameters()
    norms[-1].eps = 1e-5
