"""Progress & Compress: learn beside a knowledge base, then distil into it (Schwarz et al., ICML 2018, 1805.06370).

Memory between tasks: 3 P floats (knowledge base, importance, anchor; P with the head) and a backbone: the initial one
(column=reset) or the active column (keep), with its head and, for each block of c channels, adaptors of (2 r + 1) c + r
floats. Task id: not needed.

Verified: the knowledge base rests while a task is learned, without penalty compression is distillation alone
(test_methods_columns).
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
    """Two columns: the knowledge base (backbone and head), which answers, and an active one, which learns the task.

    Progress: the active column learns by cross-entropy among the classes that compete, the knowledge base frozen. Each
    of its blocks reads the same block of the knowledge base: h_i <- h_i + alpha_i * U_i relu(V_i h_i^KB + c_i), the
    form for any backbone of the published lateral connections, which read the layer below. Compress: the knowledge base
    learns

        KL(softmax(z_active / tau) || softmax(z_KB / tau)) + strength / 2 sum_i F_i (theta_i - theta*_i)^2

    over the task's rows and the same classes; the active column reads the knowledge base as progress found it. Then
    F <- decay F + F_task, estimated on the knowledge base, head included, theta* <- theta.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        strength: lambda; with 0, compress is distillation alone. For F normalised as below.
        decay: gamma, applied when a task ends, not in the loss: published strengths are decay times as large.
        normalise: divide each task's F by its "mean" or "max", so that all tasks count equally, or leave it ("none").
        labels: how the Fisher's labels are chosen; see `clrun.methods.ewc`.
        samples: rows of the task used for the estimate; null for all.
        solver: of the penalty. "grad": part of the loss of compress; diverges when learning rate * strength * F exceeds
            2, and F adds up over tasks with decay 1. "proximal": after each step on the distillation alone, the exact
            step on the penalty: stable for any number of tasks; compress needs torch.optim.SGD.
        tau: temperature of the distillation.
        lateral: alpha begins uniform in [0, lateral]; 0: no lateral connections, tasks are learned independently.
        bottleneck: r, width of the adaptors.
        column: "reset": every task begins from the backbone's initial weights and new adaptors. "keep": from those
            that the task before left.
        compress: budget of the second phase; the run's is spent on the first.
        compete: classes that compete in the cross-entropy of progress and are distilled by compress, see
            `clrun.learning.losses`; "current" as published.
    """

    knobs = (Knob("strength"),)

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
            raise ConfigError("method.compress: what is not compressed is lost; give it at least one epoch or step")
        if solver == "proximal":
            needs_sgd(compress.optimizer, "method.solver=proximal", instead="use method.solver=grad")
        self.solver = solver
        self.labels = labels
        self.strength, self.normalise, self.samples, self.tau = strength, normalise, samples, tau
        self.lateral, self.bottleneck, self.kept, self.compress = lateral, bottleneck, column == "keep", compress
        self.hooks_backbone = lateral > 0
        self.penalty = QuadraticPenalty(decay)
        self.initial = None if self.kept else deepcopy(backbone)
        self.active = Active(deepcopy(backbone), self._new_head()) if self.kept else None
        self.injectors = Injector(), Injector()  # of the knowledge base and of the active column

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
                target = self.answer(batch.x, base.backbone)
            return self.compress_loss(batch, target, ctx)

        with frozen(self.active):
            params = trainable(self.backbone, self.head)
            fit(self, task.train, ctx, loss=loss, params=params, budget=self.compress, name="compress")

    def after_step(self, ctx: Context) -> None:
        if self.solver == "proximal" and ctx.progress.phase == "compress":
            self.penalty.proximal_(self.knowledge(), ctx.progress.lr * self.strength)

    def end_task(self, task: Task, ctx: Context) -> None:
        if not self.kept:
            self.active = None
        base = self.knowledge()
        fisher = diagonal_fisher(self, task.train, ctx, of=base, labels=self.labels, samples=self.samples)
        self.penalty.update(base, normalised(fisher, self.normalise))

    def knowledge(self) -> nn.Module:
        """Return the knowledge base as one module."""
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
        """Return the cross-entropy [] of the active column among the classes that compete."""
        return masked_cross_entropy(self.answer(batch.x, self.backbone), batch.y, ctx.mask(batch.t, self.compete))

    def compress_loss(self, batch: Batch, target: Tensor, ctx: Context) -> Tensor:
        """Return the distance [] of the knowledge base from `target` [B, C], and what moving it costs."""
        loss = distillation_loss(self(batch.x), target, [self.columns(ctx)], tau=self.tau)
        if self.solver == "grad" and self.strength:
            loss = loss + self.strength * self.penalty(self.knowledge())
        return loss

    def answer(self, x: Tensor, base: nn.Module) -> Tensor:
        """Return logits [B, C] of the active column, which reads the blocks of `base`, a knowledge base's backbone."""
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
        """Return the head of an active column."""
        return GrowingHead(int(self.backbone.num_features), self.num_classes)  # type: ignore[arg-type]

    def _connect(self, active: "Active", task: Task, ctx: Context) -> None:
        """Give an active column new adaptors."""
        widths = block_widths(self.backbone, next(iter(task.train.batches(1))).x)
        seed_all(ctx.seed, "task", task.id, "adaptors")
        active.paths = list(widths)
        active.adaptors.extend([Lateral(width, self.bottleneck, self.lateral) for width in widths.values()])


class Active(nn.Module):
    """The active column.

    Args:
        column: backbone.
        head: of the active column alone.

    Attributes:
        paths: of the blocks with an adaptor.
        adaptors: one for each path.
    """

    def __init__(self, column: nn.Module, head: GrowingHead) -> None:
        super().__init__()
        self.column, self.head = column, head
        self.paths: list[str] = []
        self.adaptors = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, C] of prepared x."""
        logits: Tensor = self.head(self.column(x))
        return logits


def trainable(*modules: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that may learn."""
    return [p for module in modules for p in module.parameters() if p.requires_grad]
