"""Progress & Compress: learn next to a knowledge base, then distil into it (Schwarz et al., ICML 2018, 1805.06370).

Memory between tasks: the knowledge base, its importances and its anchor, 3 P floats for the P parameters of backbone
and head. With column=reset also the initial backbone; with column=keep the active column with its head and, for each
block of c channels, an adaptor of (2 r + 1) c + r floats. Task id: not needed.

Verified: the knowledge base does not change in the first phase, and without the penalty the second phase equals plain
distillation (test_methods_columns).
"""

from copy import deepcopy
from typing import Literal

import torch
from torch import Tensor, nn

from clrun.blocks.curvature import Labels, QuadraticPenalty, diagonal_fisher, normalised
from clrun.blocks.distillation import Teacher, distillation_loss
from clrun.blocks.inject import Injector, Plan
from clrun.blocks.lateral import Lateral, LateralInput, StoreOutput, block_widths
from clrun.blocks.optimizers import needs_sgd
from clrun.blocks.params import frozen
from clrun.data.split import Batch
from clrun.data.stream import Task
from clrun.learning.budget import Budget
from clrun.learning.context import Context
from clrun.learning.heads import GrowingHead
from clrun.learning.knobs import Knob
from clrun.learning.losses import Compete, masked_cross_entropy
from clrun.learning.method import Method
from clrun.learning.training import fit
from clrun.system.errors import ConfigError, Fraction, NonNegative, Positive, PositiveInt
from clrun.system.seeding import seed_all


class ProgressCompress(Method):
    """Two columns: the knowledge base (backbone and head), which predicts, and an active column, which learns tasks.

    Progress, the first phase: the active column is trained by the cross-entropy over the classes that compete, and the
    knowledge base is frozen. Each block i of the active column reads the output h_i^KB of the same block of the
    knowledge base: h_i <- h_i + alpha_i * U_i relu(V_i h_i^KB + c_i). The published lateral connections read the layer
    below instead; this form exists for any backbone. Compress, the second phase: the knowledge base is trained by

        KL(softmax(z_active / tau) || softmax(z_KB / tau)) + strength / 2 sum_i F_i (theta_i - theta*_i)^2

    on the rows of the task and over the classes that compete, where z are the logits of the two columns. The active
    column reads a copy of the knowledge base from the end of the first phase. Afterwards F <- decay F + F_task, where
    F_task is the Fisher information of the knowledge base including its head, and theta* <- theta.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        strength: lambda, for F normalised by `normalise`; with 0 the second phase is plain distillation.
        decay: gamma, the factor of F when the F of a task is added. The published loss multiplies F by gamma once more:
            a published strength corresponds to gamma times that strength here.
        normalise: divide the F of each task by its "mean" or "max", so that all tasks count equally, or by nothing
            ("none").
        labels: how the Fisher's labels are chosen; see `clrun.methods.ewc`.
        samples: number of rows of the task for the estimate; null for all.
        solver: "grad": the penalty is part of the loss of the second phase; training diverges if
            learning rate * strength * F exceeds 2, and with decay 1 F grows with the number of tasks. "proximal": a
            step on the distillation alone, and then the exact proximal step on the penalty; it is stable for any number
            of tasks, but `compress` needs torch.optim.SGD.
        tau: temperature of the distillation.
        lateral: the initial values of alpha are uniform in [0, lateral]; with 0 there are no lateral connections.
        bottleneck: r, the number of hidden units of the adaptors.
        column: "reset": the active column starts each task from the initial weights of the backbone and new adaptors.
            "keep": it starts from its weights after the previous task.
        compress: budget of the second phase; the budget of the run is that of the first phase.
        compete: classes that compete in the cross-entropy of progress and are distilled by compress, see
            `clrun.learning.losses`; "current" as published.
    """

    knobs = (Knob("strength"),)
    samples_names = False

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        strength: NonNegative,
        decay: Fraction,
        normalise: Literal["none", "mean", "max"],
        labels: Labels,
        samples: PositiveInt | None,
        solver: Literal["grad", "proximal"],
        tau: Positive,
        lateral: Fraction,
        bottleneck: PositiveInt,
        column: Literal["reset", "keep"],
        compress: Budget,
        compete: Compete,
    ) -> None:
        super().__init__(backbone, num_classes, compete=compete)
        if not (compress.epochs or compress.steps):
            raise ConfigError(
                "method.compress: needs at least one epoch or step; knowledge that is not compressed is lost"
            )
        if solver == "proximal":
            needs_sgd(compress.optimizer, "method.solver=proximal", instead="use method.solver=grad")
        self.solver = solver
        self.labels = labels
        self.strength, self.normalise, self.samples, self.tau = strength, normalise, samples, tau
        self.lateral, self.bottleneck, self.compress = lateral, bottleneck, compress
        self.keeps_column = column == "keep"
        self.hooks_backbone = lateral > 0
        self.penalty = QuadraticPenalty(decay)
        self.initial = None if self.keeps_column else deepcopy(backbone)
        self.active = Active(deepcopy(backbone), self._new_head()) if self.keeps_column else None
        self.injectors = Injector(), Injector()  # for the knowledge base and for the active column

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        if self.initial is not None:
            self.active = Active(deepcopy(self.initial), self._new_head())
        assert self.active is not None
        if self.lateral and not self.active.paths:
            self._connect(self.active, task, ctx)
        self.grow(self.active.head, self.columns(ctx), ctx.generator("active"))

    def learn(self, task: Task, ctx: Context) -> None:
        assert self.active is not None
        with frozen(self.backbone, self.head):
            fit(self, task.train, ctx, loss=self.progress_loss, params=trainable(self.active))
        base = Teacher(self.backbone, self.head)

        def loss(batch: Batch, ctx: Context) -> Tensor:
            with torch.no_grad():
                target = self.active_logits(batch.x, base.backbone)
            return self.compress_loss(batch, target, ctx)

        with frozen(self.active):
            params = trainable(self.backbone, self.head)
            fit(self, task.train, ctx, loss=loss, params=params, budget=self.compress, name="compress")

    def after_step(self, ctx: Context) -> None:
        if self.solver == "proximal" and ctx.progress.phase == "compress":
            self.penalty.proximal_(self.knowledge_base(), ctx.progress.lr * self.strength)

    def end_task(self, task: Task, ctx: Context) -> None:
        if not self.keeps_column:
            self.active = None
        base = self.knowledge_base()
        fisher = diagonal_fisher(self, task.train, ctx, of=base, labels=self.labels, samples=self.samples)
        self.penalty.update(base, normalised(fisher, self.normalise))

    def knowledge_base(self) -> nn.Module:
        """Return the knowledge base as a single module."""
        return nn.ModuleDict({"backbone": self.backbone, "head": self.head})

    def competing(self, t: Tensor, ctx: Context) -> Tensor:
        """Return [B, C] bool: the classes that the Fisher information of the knowledge base is estimated among.

        They are the candidates of an evaluation, since the knowledge base answers; `compete` is about the losses.
        """
        return ctx.mask(t)

    def columns(self, ctx: Context) -> Tensor:
        """Return [k] long, the classes that compete in both losses of the current task."""
        if self.compete == "current":
            return ctx.task.classes.to(ctx.hardware.device)
        task = torch.tensor([ctx.task.index], device=ctx.hardware.device)
        return ctx.mask(task, self.compete)[0].nonzero()[:, 0]

    def progress_loss(self, batch: Batch, ctx: Context) -> Tensor:
        """Return the cross-entropy [] of the active column over the classes that compete."""
        return masked_cross_entropy(
            self.active_logits(batch.x, self.backbone), batch.y, ctx.mask(batch.t, self.compete)
        )

    def compress_loss(self, batch: Batch, target: Tensor, ctx: Context) -> Tensor:
        """Return the distillation loss [] of the knowledge base for logits `target` [B, C], plus the penalty."""
        loss = distillation_loss(self(batch.x), target, [self.columns(ctx)], tau=self.tau)
        if self.solver == "grad" and self.strength:
            loss = loss + self.strength * self.penalty(self.knowledge_base())
        return loss

    def active_logits(self, x: Tensor, base: nn.Module) -> Tensor:
        """Return the logits [B, C] of the active column for prepared rows x; it reads blocks of the backbone `base`."""
        assert self.active is not None
        paths = dict(zip(self.active.paths, self.active.adaptors, strict=True))
        if not paths:
            return self.active(x)  # type: ignore[no-any-return]
        stores = {path: StoreOutput() for path in paths}
        with torch.no_grad(), self.injectors[0].use(base, Plan(scaled=stores)):
            base(x)
        lateral = {path: LateralInput(adaptor, stores[path].seen) for path, adaptor in paths.items()}
        with self.injectors[1].use(self.active.column, Plan(sequential=lateral)):
            return self.active(x)  # type: ignore[no-any-return]

    def _new_head(self) -> GrowingHead:
        """Return a new head for an active column."""
        return GrowingHead(int(self.backbone.num_features), self.num_classes)  # type: ignore[arg-type]

    def _connect(self, active: "Active", task: Task, ctx: Context) -> None:
        """Add new adaptors to an active column."""
        widths = block_widths(self.backbone, next(iter(task.train.batches(1))).x)
        seed_all(ctx.seed, "task", task.id, "adaptors")
        active.paths = list(widths)
        active.adaptors.extend([Lateral(width, self.bottleneck, self.lateral) for width in widths.values()])


class Active(nn.Module):
    """The active column: a backbone with its own head and with adaptors for the lateral connections.

    Args:
        column: the backbone.
        head: the head.

    Attributes:
        paths: paths of the blocks with an adaptor.
        adaptors: one adaptor per path.
    """

    def __init__(self, column: nn.Module, head: GrowingHead) -> None:
        super().__init__()
        self.column, self.head = column, head
        self.paths: list[str] = []
        self.adaptors = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [B, C] of prepared rows x, without lateral connections."""
        logits: Tensor = self.head(self.column(x))
        return logits


def trainable(*modules: nn.Module) -> list[nn.Parameter]:
    """Return the trainable parameters of all modules."""
    return [p for module in modules for p in module.parameters() if p.requires_grad]
