"""PromptFusion-Lite: a gate decides for each image whether the Booster runs (Chen et al., ECCV 2024, 2303.07223).

    v = W2 tanh(W1 f),   h = hard Gumbel-softmax(v / 3),   z = z_c + h_0 z_v
    L = L_W(z) + Lambda (mean h_0 - gamma)^2 + Delta KL(softmax(v_old / 2) || softmax(v / 2))

with f, z_c, z_v and the class-weighted cross-entropy L_W of `clrun.methods.promptfusion`, and v_old of the gate as the
task before left it. In training both branches run for every image; at test the Booster runs for images with v_0 > v_1
alone.

Memory between tasks: as PromptFusion, and the gate; during a task also a copy of it. Task id: not needed.

Deviations: the gate is deterministic at test (the published code draws noise there too), every test row is scored
(there the last incomplete batch is dropped), the gate of the task before has its tanh (there it is forgotten), and
those of PromptFusion.

Verified: with a gate that is closed predictions are the Stabilizer's and the Booster is never called, with one that is
open they are z_c + z_v; the old gate gives no loss where the new one equals it (test_methods_promptfusion).
"""

import copy

import torch.nn.functional as F
from torch import Tensor, nn

from clrun.data.split import Batch
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.losses import Compete
from clrun.learning.networks import Factory
from clrun.methods.promptfusion import Branches, Mask, Prompts
from clrun.system.errors import Count, Fraction, NonNegative

HIDDEN = 100
GUMBEL, SOFT = 3.0, 2.0  # temperatures of the choice and of the distillation


class PromptfusionLite(Branches):
    """A frozen CLIP with learned prompts, to which a frozen ViT with learned prompts is added where a gate opens.

    Args:
        backbone: two towers, frozen: the Stabilizer.
        num_classes: C.
        second_backbone: factory of the Booster's vision transformer; None for the image tower of `backbone`.
        prompts: numbers of learned vectors.
        open_share: gamma, the share of images for which the gate should open.
        open_strength: Lambda; published: 0.3 (CIFAR-100), 0.7 (ImageNet-R).
        gate_strength: Delta.
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
        open_share: Fraction,
        open_strength: NonNegative,
        gate_strength: NonNegative,
        mask: Mask,
        capacity: Count,
        compete: Compete,
    ) -> None:
        super().__init__(backbone, num_classes, prompts, mask, capacity, compete)
        self.open_share, self.open_strength, self.gate_strength = open_share, open_strength, gate_strength
        dim = self.text_head.joint.dim
        self.gate = nn.Sequential(nn.Linear(dim, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2))
        self.old_gate: nn.Module | None = None

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        self.old_gate = copy.deepcopy(self.gate).requires_grad_(False) if task.index else None

    def end_task(self, task: Task, ctx: Context) -> None:
        super().end_task(task, ctx)
        self.old_gate = None

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        f = self.embeddings(batch.x)
        v = self.gate(f)
        chosen = F.gumbel_softmax(v.float(), tau=GUMBEL, hard=True)[:, :1]
        loss = self.weighted(self.stable(f) + chosen * self.boosted(batch.x), batch, ctx)
        return loss + self.open_strength * (chosen.mean() - self.open_share).square() + self.kept(f, v)

    def kept(self, f: Tensor, v: Tensor) -> Tensor:
        """Return Delta KL(old gate || gate) [] for embeddings f [B, d] and gate values v [B, 2]; 0 without old gate."""
        if self.old_gate is None:
            return v.new_zeros(())
        log_p, log_q = ((values.float() / SOFT).log_softmax(dim=1) for values in (self.old_gate(f), v))
        return self.gate_strength * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    def opened(self, f: Tensor) -> Tensor:
        """Return [B] bool: the images with embeddings f [B, d] for which the gate opens, without noise."""
        v: Tensor = self.gate(f)
        return v[:, 0] > v[:, 1]

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        f = self.embeddings(x)
        logits, rows = self.stable(f), self.opened(f).nonzero()[:, 0]
        return logits.index_add(0, rows, self.boosted(x[rows]).to(logits)) if len(rows) else logits

    def choices(self, x: Tensor) -> Tensor:
        """Return [B, 2] integers: 1 for the Booster in addition, or for the Stabilizer alone."""
        return F.one_hot((~self.opened(self.embeddings(x))).long(), 2)
