"""ZSCL: finetune CLIP, but keep its similarities on reference data (Zheng et al., ICCV 2023, arXiv 2303.06628).

    L = CE_ls(kappa n(g_i(x)) . n(g_t(t_k)), y) + a KD(S0, S) + b KD(S0', S') + c sum_p |p - p_{t-1}|^2
    S = kappa n(g_i(X)) T0',   S0 = kappa n(g0_i(X)) T0',   T0 = n(g0_t(R))
    KD(A, B) = tau^2 mean over rows of KL(softmax(A / tau) || softmax(B / tau))

X reference images, R reference texts, g0 the model as loaded, for every task; k runs over the classes of the current
task, in captions of their first template. Weight ensemble: the mean of the weights at the start of the task and after
steps 1, 1 + I, 1 + 2I, ... becomes the model when the task ends.

Memory between tasks: 4 d (N + R) bytes, the embeddings of N reference images and R texts by the model as loaded, and
one text row per class, 4 C d bytes; during a task also 8 P bytes for P weights (their mean and those at its start).
The reference data are read again and not counted. Task id: not needed; with scenario.setting=til it is the MTIL form.

Deviations: KL instead of the cross-entropy, which differs by a constant. Reference images are not augmented and their
embeddings by the model as loaded are computed once, as are the texts; the published code computes both in each step.
The published code also evaluates its class-incremental runs on randomly cropped test images; here they are whole.
As published, the texts of both terms are those of the model as loaded, so that no term but CE reaches the text tower.

Verified: with all weights 0 and without ensemble it is clip_finetune bit for bit; divergence and gradient are 0 at the
model as loaded, and the text tower gets none; the ensemble is the arithmetic mean of its snapshots; a large c keeps the
weights (test_methods_zscl).
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clrun.blocks.merging import Mean
from clrun.blocks.params import Carrier, Params, clone, eval_mode, select
from clrun.blocks.reference import Loader, Reference
from clrun.data.split import Batch
from clrun.data.stream import Stream, Task
from clrun.learning.context import Context
from clrun.learning.knobs import Knob
from clrun.learning.losses import Compete
from clrun.methods.clip_finetune import ClipFinetune
from clrun.system.errors import ConfigError, Fraction, NonNegative, Positive, PositiveInt


class Zscl(ClipFinetune):
    """Finetuning of both towers that is held by distillation on reference data and by averages of its weights.

    Args:
        backbone: two towers.
        num_classes: C.
        reference: loaders of the data sets whose images are X; no label is used.
        reference_rows: largest number of images of each of them, drawn once; None for all.
        reference_texts: file with one text per line for R; None for the captions of their classes.
        reference_size: images per step, over all processes; None for as many as the batch size.
        image_strength: a; each image keeps its similarities to the texts. Published: 1 (MTIL), 5 (class-incremental).
        text_strength: b; each text keeps its similarities to the images of the batch.
        tau: temperature of both.
        consolidation: c; published: 1 (MTIL), 0 (class-incremental).
        average_every: I, steps between snapshots of the weight ensemble; None for no ensemble.
        text: train the text tower too; without it the texts are constant and encoded once.
        label_smoothing: share of the target that is spread over the classes that compete.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    knobs = (Knob("image_strength"), Knob("text_strength"), Knob("consolidation"))

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        reference: list[Loader],
        reference_rows: PositiveInt | None,
        reference_texts: str | None,
        reference_size: PositiveInt | None,
        image_strength: NonNegative,
        text_strength: NonNegative,
        tau: Positive,
        consolidation: NonNegative,
        average_every: PositiveInt | None,
        text: bool,
        label_smoothing: Fraction,
        compete: Compete,
    ) -> None:
        super().__init__(backbone, num_classes, text=text, label_smoothing=label_smoothing, compete=compete)
        self.image_strength, self.text_strength, self.tau = image_strength, text_strength, tau
        self.consolidation, self.average_every, self.reference_size = consolidation, average_every, reference_size
        self.reference = Reference(reference, rows=reference_rows, texts=reference_texts, option="method.reference")
        self.teacher: Embeddings | None = None
        self.anchor: Params = {}
        self.ensemble: Mean | None = None

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        if (options["image_strength"] or options["text_strength"]) and not options["reference"]:
            raise ConfigError(
                "method.reference: names no data set, and the distillation needs images; name some, as in "
                "method.reference=[cifar100], or set method.image_strength=0 and method.text_strength=0"
            )

    @property
    def distils(self) -> bool:
        """Whether the loss has a term on reference data."""
        return self.image_strength > 0 or self.text_strength > 0

    def check(self, stream: Stream) -> None:
        if self.distils:
            self.reference.open(self.backbone, stream)

    # --- a task

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        if self.distils:
            self._open(ctx)
        weights = select(self.backbone)
        self.anchor = clone(weights) if self.consolidation else {}
        self.ensemble = None
        if self.average_every is not None:
            self.ensemble = Mean()
            self.ensemble.begin(weights, exact=False)
            self.ensemble.add(weights)

    def _open(self, ctx: Context) -> None:
        """Read the reference data; before the first task, store how the model as loaded embeds them."""
        hardware, backbone, reference = ctx.hardware, self.backbone, self.reference
        reference.open(backbone, ctx.stream)
        reference.place(hardware)
        if self.teacher is not None:
            return
        with torch.no_grad(), eval_mode(backbone), hardware.autocast():
            images = [backbone.encode_image(hardware.layout(x)).float() for x in reference.images()]  # type: ignore[operator]
            texts = backbone.joint.encode_texts(reference.texts).float()  # type: ignore[union-attr, operator]
        self.teacher = Embeddings(F.normalize(torch.cat(images), dim=1), F.normalize(texts, dim=1))

    def end_task(self, task: Task, ctx: Context) -> None:
        if self.ensemble is not None:
            weights = select(self.backbone)
            with torch.no_grad():
                for name, mean in self.ensemble.value().items():
                    weights[name].copy_(mean)
        self.ensemble, self.anchor = None, {}

    # --- a step

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        loss = super().loss(batch, ctx)
        if self.distils:
            loss = loss + self.distillation(
                self.reference.sample(self.reference_size or ctx.budget.batch_size, ctx), ctx
            )
        if self.anchor and self.consolidation:
            moved = [(p - self.anchor[name]).square().sum() for name, p in select(self.backbone).items()]
            loss = loss + self.consolidation * torch.stack(moved).sum()
        return loss

    def distillation(self, rows: Tensor, ctx: Context) -> Tensor:
        """Return a KD(S0, S) + b KD(S0', S') [] on these reference images ([B] long)."""
        assert self.teacher is not None, "begin_task stores the embeddings"
        before, texts = self.teacher.images[rows.to(self.teacher.images.device)], self.teacher.texts
        x = ctx.hardware.layout(self.reference.take(rows).to(texts.device))
        now = F.normalize(self.backbone.encode_image(x).float(), dim=1)  # type: ignore[operator]
        scale = self.backbone.joint.scale.detach()  # type: ignore[union-attr, operator]
        student, target = scale * F.linear(now, texts), scale * F.linear(before, texts)
        return self.image_strength * divergence(student, target, self.tau) + self.text_strength * divergence(
            student.T, target.T, self.tau
        )

    def after_step(self, ctx: Context) -> None:
        if self.ensemble is not None and ctx.progress.step % (self.average_every or 1) == 0:
            self.ensemble.add(select(self.backbone))


class Embeddings(Carrier):
    """Unit vectors of the joint space: of images [N, d] and of texts [R, d]."""

    def __init__(self, images: Tensor, texts: Tensor) -> None:
        super().__init__()
        self.images, self.texts = images, texts


def divergence(student: Tensor, target: Tensor, tau: float) -> Tensor:
    """Return tau^2 times the mean over rows of KL(softmax(target / tau) || softmax(student / tau)), []."""
    log_p, log_q = ((values / tau).log_softmax(dim=1) for values in (target, student))
    return tau**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
