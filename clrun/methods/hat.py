"""HAT: learned gates say which units a task uses, and protect them afterwards (Serra et al., ICML 2018, 1801.01423).

Memory between tasks: T + 1 floats per gated unit for T tasks; gated units are channels, hidden units and attention
heads. Task id: needed.

Verified: learned tasks stay the same bit for bit, open gates are finetuning, and a large penalty opens no new unit
(test_methods_masks).
"""

import math
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from clrun.blocks.gates import UnitGates
from clrun.data.split import Batch
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.knobs import Knob
from clrun.learning.training import fit
from clrun.methods.masked import Masked
from clrun.system.errors import Count, NonNegative, Positive, Range

LIMIT = 6.0  # largest absolute value of an embedding
FLAT = 50.0  # largest absolute value of s e within cosh


class Hat(Masked):
    """loss = CE with units multiplied by sigmoid(s e_t) + strength * fraction of the unused units that are open.

    e_t is the task's embedding, one number per unit. s rises from 1 / s_max to s_max over the batches of each epoch: s
    = 1/s_max + (s_max - 1/s_max) (i - 1) / (n - 1) for batch i of n (the authors' code uses (sample offset) / N instead
    and stays one batch below s_max). The gradient of a weight from unit j to unit i is multiplied by 1 - min(used_i,
    used_j), where used is the maximum of the gates of earlier tasks. Parameters without gates (biases and normalisation
    of a residual stream, patch embedding, positions, class token) and running statistics are frozen after the first
    task. A vision transformer has gates on the hidden units of its MLPs and on its attention heads, a chain of layers
    on all units, and a ResNet inside its blocks.

    Args:
        backbone: maps prepared images to features [B, D]; a timm ViT or a network that torch.fx can follow.
        num_classes: C.
        s_max: largest slope of the gates; a smaller one makes them softer. Published: 400.
        strength: c, weight of the regularisation. Published: 0.75.
        binarise: gates of a learned task. "hard": a unit is open or closed, e > 0; with the published soft gates no
            unit is ever quite closed. "paper": sigmoid(s_max e), under which earlier tasks change a little.
        init: embeddings of a new task: "normal", N(0, 1), half of the units open; "uniform", on (0, 2), all open.
        warmup_epochs: number of first epochs of a task without regularisation.
        clip_norm: largest norm of the whole gradient after the embeddings' gradient is compensated; null does not clip.
    """

    hooks_backbone = True
    knobs = (Knob("s_max", bound=1.0), Knob("strength"))

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        s_max: Annotated[float, Range(minimum=1)],
        strength: NonNegative,
        binarise: Literal["hard", "paper"],
        init: Literal["normal", "uniform"],
        warmup_epochs: Count,
        clip_norm: Positive | None,
    ) -> None:
        super().__init__(backbone, num_classes)
        self.s_max, self.strength, self.binarise = s_max, strength, binarise
        self.init, self.warmup_epochs, self.clip_norm = init, warmup_epochs, clip_norm
        self.units = UnitGates(backbone)
        self.embeddings = nn.ParameterList()  # one per task, [U]
        self.slopes: list[float] = []  # s_max of each learned task
        self.opened: Tensor | None = None  # [U], the gates of the step being taken

    # --- a task

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        size, generator = len(self.units.used), ctx.generator("gates")
        uniform = self.init == "uniform"
        start = 2 * torch.rand(size, generator=generator) if uniform else torch.randn(size, generator=generator)
        self.embeddings.append(nn.Parameter(start))

    def learn(self, task: Task, ctx: Context) -> None:
        self.protect(self.units.plasticity(self.backbone) if task.index else {}, task)
        fit(self, task.train, ctx)

    def end_task(self, task: Task, ctx: Context) -> None:
        super().end_task(task, ctx)
        self.opened = None
        self.slopes.append(self.s_max)
        embedding = self.embeddings[task.index]
        embedding.requires_grad_(False)
        soft = torch.sigmoid(self.s_max * embedding)
        gates = self.gates(task.index)
        record: dict[str, float | str] = {"phase": "gates", "open_units": float(gates.mean())}
        if self.binarise == "hard":
            record["binarisation_gain"] = self._accuracy(task, gates) - self._accuracy(task, soft)
        self.units.use(gates)
        ctx.log(record | {"used_units": float(self.units.used.mean())})

    # --- a step

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        self.opened = torch.sigmoid(slope(ctx, self.s_max) * self.embeddings[-1])
        loss = super().loss(batch, ctx)
        if not self.strength or ctx.progress.epoch < self.warmup_epochs:
            return loss
        return loss + self.strength * self.units.spent(self.opened)

    def training_features(self, x: Tensor) -> Tensor:
        assert self.opened is not None
        return self.units.features(self.backbone, x, self.opened)

    def adjust_gradients(self, ctx: Context) -> None:
        super().adjust_gradients(ctx)
        embedding = self.embeddings[-1]
        if embedding.grad is not None:
            factor = compensation(embedding.detach(), slope(ctx, self.s_max), self.s_max)
            embedding.grad = embedding.grad * factor
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(list(self.trainable()), self.clip_norm)  # type: ignore[arg-type]

    def after_step(self, ctx: Context) -> None:
        super().after_step(ctx)
        with torch.no_grad():
            self.embeddings[-1].clamp_(-LIMIT, LIMIT)

    # --- predictions

    def gates(self, task: int) -> Tensor:
        """Return the gates [U] that predictions for the task at position `task` use."""
        embedding = self.embeddings[task].detach()
        steepest = self.slopes[task] if task < len(self.slopes) else self.s_max
        return (embedding > 0).float() if self.binarise == "hard" else torch.sigmoid(steepest * embedding)

    def features(self, x: Tensor, task: int) -> Tensor:
        return self.units.features(self.backbone, x, self.gates(task))

    @torch.no_grad()
    def _accuracy(self, task: Task, gates: Tensor) -> float:
        """Return the accuracy on the task's validation rows, or its training rows where there are none."""
        self.eval()
        split, correct = task.train if task.val is None else task.val, 0
        classes = task.classes.to(gates.device)
        for batch in split.batches(256):
            logits = self.head(self.units.features(self.backbone, batch.x, gates))
            correct += int((classes[logits[:, classes].argmax(dim=1)] == batch.y).sum())
        return correct / max(1, len(split))


def slope(ctx: Context, s_max: float) -> float:
    """Return s of the step being taken: its place among the batches of the epoch says how steep the gates are."""
    batches = math.ceil(len(ctx.task.train) / ctx.budget.batch_size)
    place = (ctx.progress.step % batches) / (batches - 1) if batches > 1 else 1.0
    return 1 / s_max + (s_max - 1 / s_max) * place


def compensation(embedding: Tensor, s: float, s_max: float) -> Tensor:
    """Return the factor of an embedding's gradient that makes it s_max sigmoid'(e) dL/da, whatever s is.

    s_max (cosh(s e) + 1) / (s (cosh(e) + 1)), with s e held within 50 (Serra et al., equation 7).
    """
    return s_max / s * (torch.cosh((s * embedding).clamp(-FLAT, FLAT)) + 1) / (torch.cosh(embedding) + 1)
