"""EBLL: LwF that also keeps codes of the features (Rannen Triki et al., ICCV 2017, arXiv 1704.01920).

Memory between tasks: one encoder per task, 4 T h (D + 1) bytes for T tasks and codes of h units; during a task a frozen
copy of the network, and a decoder while a code is learned. Task id: not needed.

Verified: without codes it is lwf bit for bit, the code loss is 0 while the network does not change, and encoders stay
as they were learned (test_methods_distillation).
"""

import torch
from torch import Tensor, nn

from clrun.blocks.distillation import CodeAutoencoder, code_loss
from clrun.blocks.params import frozen
from clrun.blocks.statistics import extract
from clrun.data.split import Batch, TensorSplit
from clrun.data.stream import Task
from clrun.learning.budget import Budget
from clrun.learning.context import Context
from clrun.learning.knobs import Knob
from clrun.learning.losses import Compete, masked_cross_entropy
from clrun.learning.method import freeze
from clrun.learning.training import fit
from clrun.methods.lwf import Lwf
from clrun.system.errors import ConfigError, NonNegative, Positive, PositiveInt
from clrun.system.seeding import seed_all


class Ebll(Lwf):
    """loss = LwF's + code_strength / 2 sum_k |code_k(f) - code_k(f_old)|^2, k over the tasks before.

    f and f_old are the features of the network and of its copy from before the task. When a task ends, an undercomplete
    autoencoder of the features f [D] (after the backbone's pooling) is trained while the network is frozen. Its loss is
    alpha |r - f|^2 + CE(head(r)) with the reconstruction r, so that the code keeps what the head uses; the classes of
    this cross-entropy are the candidates of an evaluation. The encoder sigmoid(E f + e) [h] is kept and does not change
    any more. Norms are sums over units. Code that takes means instead, without the 1/2 (CLsurvey, a = 1, alpha = 0.01
    to 0.1), corresponds to code_strength = 2 a / h and alpha / D.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        strength: see `Lwf`.
        tau: see `Lwf`.
        per_head: see `Lwf`.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
        warmup: see `Lwf`.
        code_strength: a, weight of the code loss; 0 is LwF.
        code_size: h, number of units of a code.
        alpha: weight of the reconstruction against the cross-entropy.
        encoding: budget of each autoencoder.
    """

    knobs = (Knob("strength"), Knob("code_strength"))

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        strength: NonNegative,
        tau: Positive,
        per_head: bool,
        compete: Compete,
        warmup: Budget,
        code_strength: NonNegative,
        code_size: PositiveInt,
        alpha: NonNegative,
        encoding: Budget,
    ) -> None:
        super().__init__(
            backbone, num_classes, strength=strength, tau=tau, per_head=per_head, compete=compete, warmup=warmup
        )
        if code_strength and not (encoding.epochs or encoding.steps):
            raise ConfigError("method.encoding: codes are learned; give it at least one epoch or step")
        self.code_strength, self.code_size, self.alpha, self.encoding = code_strength, code_size, alpha, encoding
        self.encoders = nn.ModuleList()

    def wants_teacher(self) -> bool:
        return super().wants_teacher() or self.code_strength > 0

    def preservation(self, x: Tensor, features: Tensor, logits: Tensor) -> Tensor:
        assert self.teacher is not None
        then, target = self.teacher(x)
        loss = self.distilled(logits, target)
        if self.code_strength:
            distances = [code_loss(encoder(features), encoder(then)) for encoder in self.encoders]
            loss = loss + self.code_strength / 2 * torch.stack(distances).sum()
        return loss

    def end_task(self, task: Task, ctx: Context) -> None:
        super().end_task(task, ctx)
        if self.code_strength:
            self.encoders.append(self._encoder(task, ctx))

    def _encoder(self, task: Task, ctx: Context) -> nn.Module:
        """Return a trained encoder of the task's features."""
        rows = TensorSplit(*extract(self, task.train), positions=task.index)
        seed_all(ctx.seed, "task", task.id, "autoencoder")
        autoencoder = CodeAutoencoder(rows.images.shape[1], self.code_size).to(ctx.hardware.device)

        def loss(batch: Batch, ctx: Context) -> Tensor:
            reconstruction = autoencoder(batch.x)
            distance = code_loss(reconstruction, batch.x)
            return self.alpha * distance + masked_cross_entropy(self.head(reconstruction), batch.y, ctx.mask(batch.t))

        with frozen(self.backbone, self.head):
            parameters = autoencoder.parameters()
            fit(self, rows, ctx, loss=loss, params=parameters, budget=self.encoding, name="autoencoder")
        freeze(autoencoder.encoder)
        return autoencoder.encoder
