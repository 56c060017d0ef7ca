"""CL-LoRA: LoRA of all tasks in the lower blocks, of each task in the upper ones (He et al., CVPR 2025, 2505.24816).

Memory between tasks, for T tasks, C classes, D features, rank r and p parts: 2 p D r floats per shared block, and p D r
again for its values after the last task; per task 2 p D r floats per specific block, 3 floats of weights per block, and
20 C D + 8 C bytes of sums and prototypes. A prediction takes one pass of the lower blocks and T of the upper ones. Task
id: not needed.

Verified: the frozen maps are orthonormal and stand still, untrained LoRA gives SimpleCIL, the reassigned gradient has
its factors and the value of the weights bit for bit, distillation and orthogonality equal values computed by hand, and
the passes are counted (test_methods_cl_lora).
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clrun.blocks.inject import Plan, require_depth
from clrun.blocks.lora import QkvLoRA, fused, linear_at
from clrun.blocks.params import Params, clone, eval_mode
from clrun.blocks.task_features import TaskFeatures
from clrun.data.split import Batch
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.heads import CosineHead
from clrun.learning.losses import masked_cross_entropy
from clrun.learning.method import freeze
from clrun.methods.prompted import Prompted
from clrun.system.errors import ConfigError, Count, NonNegative, Positive, PositiveInt

Random = Literal["gaussian", "uniform"]


class ClLora(Prompted):
    """Shared LoRA B A in the lower blocks, LoRA mu B A of each task in the upper ones, prototypes in each task's space.

    A begins with orthonormal rows and B at 0; the shared A is frozen for ever, the shared B is trained in every task.
    mu is a weight per part (query, key, value) and upper block, which begins uniform in (0.5, 1.5). A task trains its
    own LoRA and mu, the shared B and a cosine head of its classes, which is discarded, with

        loss = CE + L_KD + ortho * mean over earlier tasks j of |mu . mu_j| / (|mu| |mu_j|).

    L_KD = kd * mean of -sum_c softmax(z' / T)_c log softmax(z / T)_c, from the second task on: z are the logits of the
    head on the output of the lower blocks, after the last normalisation of the transformer; z' are those with the
    shared B after the last task, without gradient, and T = kd_temperature. Gradient reassignment multiplies row i of
    the gradient of L_KD by omega_i = D |b_i| / sum_j |b_j|, b_i the rows of B after the last task (1 if B is 0).

    Prediction: class c of task j has the score cos(f_j(x), p_c), where f_j are the features with the shared LoRA of now
    and that of task j, and p_c is the mean of the task's images, measured when the task ended. Prototypes are never
    measured again while the shared LoRA moves on, which is what the method forgets by. In domain-incremental streams
    a class has a prototype per domain, and the largest score counts.

    Deviations from the public code. There a step on L_KD comes first, then one on the rest of the loss with a graph
    from before the first one, which current versions of torch refuse; here one step is taken on the sum. There the
    teacher's logits have a gradient, too. Blocks are run one by one here, so that gradient checkpointing of the
    backbone has no effect.

    Args:
        backbone: a timm vision transformer, frozen.
        num_classes: C.
        rank: r.
        shared_blocks: numbers of the blocks with shared LoRA, all of them below `specific_blocks`.
        specific_blocks: numbers of the blocks with LoRA of each task.
        parts: which of "q", "k" and "v" are updated, in this order.
        kd: weight of the distillation; 0 for none.
        kd_temperature: T.
        reassign: whether gradients of the distillation are reassigned.
        ortho: weight of the term that keeps the weights mu of tasks apart.
        random: matrix whose orthonormalised columns A begins with: "gaussian", or "uniform" in (0, 1), as in the public
            code, whose first row is nearly constant.
        cosine_scale: initial value of the trained factor of the cosine head.
        task_id: "inferred", or "given" at test time: only the features and classes of that task score.
        lr_scale: factor of the budget's learning rate.
    """

    head: CosineHead

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        rank: PositiveInt,
        shared_blocks: list[Count],
        specific_blocks: list[Count],
        parts: Literal["q", "k", "v", "qk", "qv", "kv", "qkv"],
        kd: NonNegative,
        kd_temperature: Positive,
        reassign: bool,
        ortho: NonNegative,
        random: Random,
        cosine_scale: Positive,
        task_id: Literal["inferred", "given"],
        lr_scale: Positive,
    ) -> None:
        super().__init__(backbone, num_classes, lr_scale=lr_scale, compete="current")
        require_depth(backbone, shared_blocks, "method.shared_blocks")
        require_depth(backbone, specific_blocks, "method.specific_blocks")
        if not specific_blocks or (shared_blocks and max(shared_blocks) >= min(specific_blocks)):
            raise ConfigError(
                f"method.specific_blocks: {specific_blocks} must have a block, and all of them above "
                f"method.shared_blocks={shared_blocks}"
            )
        for block in (*shared_blocks, *specific_blocks):
            linear_at(backbone, path_of(block), type(self).__name__)
        self.rank, self.parts, self.random = rank, parts, random
        self.shared_blocks, self.specific_blocks = sorted(shared_blocks), sorted(specific_blocks)
        self.kd, self.kd_temperature, self.reassign, self.ortho = kd, kd_temperature, reassign, ortho
        self.cosine_scale = float(cosine_scale)
        self.needs_task_id = task_id == "given"
        self.features_width = int(backbone.num_features)  # type: ignore[arg-type]
        self.shared = nn.ModuleDict({str(block): self._lora() for block in self.shared_blocks})
        for lora in self.shared.values():
            lora.down.requires_grad_(False)
        self.teacher: Params = {}  # shared B after the last task, by block; empty before the second task
        self.tasks = nn.ModuleList()
        self.head = CosineHead(self.features_width, num_classes, scale=self.cosine_scale)

    def _lora(self) -> QkvLoRA:
        """Return LoRA whose A has orthonormal rows in each part."""
        lora = QkvLoRA(self.width, self.rank, self.parts)
        draw = torch.randn if self.random == "gaussian" else torch.rand
        with torch.no_grad():
            for part in lora.down:
                part.copy_(torch.linalg.qr(draw(self.width, self.rank)).Q.t())
        return lora

    # --- training

    def begin_task(self, task: Task, ctx: Context) -> None:
        loras = nn.ModuleDict({str(block): self._lora() for block in self.specific_blocks})
        self.tasks.append(Specific(loras, self.features_width, self.num_classes))
        self.head = CosineHead(self.features_width, self.num_classes, scale=self.cosine_scale)
        self.head.grow(task.classes)

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        newest = self.of(len(self.tasks) - 1)
        classes = ctx.mask(batch.t, "current")
        features = self.upper(self.lower(batch.x, self.shared), newest)
        loss = masked_cross_entropy(self.head(features), batch.y, classes)
        if self.teacher and self.kd:
            loss = loss + self.kd * self._distillation(batch.x, classes)
        if self.ortho and len(self.tasks) > 1:
            earlier = torch.stack([self.of(place).weights.detach() for place in range(len(self.tasks) - 1)])
            loss = loss + self.ortho * overlap(newest.weights, earlier)
        return loss

    def _distillation(self, x: Tensor, classes: Tensor) -> Tensor:
        """Return the distillation from the shared LoRA after the last task, []."""
        updates = {block: Replaced(self._shared(block), up) for block, up in self.teacher.items()}
        with torch.no_grad():
            target = self.head(self._early_exit(self.lower(x, updates)))
        if self.reassign:
            student: Mapping[str, nn.Module] = {
                block: Replaced(lora, rescaled(lora.up, importances(self.teacher[block])))
                for block, lora in ((block, self._shared(block)) for block in self.teacher)
            }
        else:
            student = dict(self.shared.items())
        logits = self.head(self._early_exit(self.lower(x, student)))
        return distillation(logits, target, classes, self.kd_temperature)

    def _shared(self, block: str) -> QkvLoRA:
        found = self.shared[block]
        assert isinstance(found, QkvLoRA)
        return found

    def end_task(self, task: Task, ctx: Context) -> None:
        newest = self.of(len(self.tasks) - 1)
        freeze(newest)
        freeze(self.head)
        newest.own[task.classes.to(newest.own.device)] = True
        with torch.no_grad(), eval_mode(self):
            newest.measure(lambda x: self.inside(len(self.tasks) - 1, x), task)
        now = clone({block: self._shared(block).up for block in self.shared})
        if self.teacher:
            moved = sum(float((now[block] - before).square().sum()) for block, before in self.teacher.items())
            size = sum(float(before.square().sum()) for before in self.teacher.values())
            ctx.log({"phase": "shared", "drift": (moved / max(size, 1e-30)) ** 0.5})
        self.teacher = now

    # --- passes through the blocks

    def lower(self, x: Tensor, updates: Mapping[str, nn.Module] | nn.ModuleDict) -> Tensor:
        """Return the tokens [B, N, D] of images x that enter the first specific block, with these shared updates."""
        vit: Any = self.backbone
        with self.injector.use(vit, plan_of(updates)):
            tokens: Tensor = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(x))))
            for block in vit.blocks[: self.specific_blocks[0]]:
                tokens = block(tokens)
        return tokens

    def upper(self, tokens: Tensor, specific: "Specific") -> Tensor:
        """Return the features [B, D] of what `lower` has returned, with the LoRA of a task."""
        vit: Any = self.backbone
        with self.injector.use(vit, specific.plan()):
            for block in vit.blocks[self.specific_blocks[0] :]:
                tokens = block(tokens)
        features: Tensor = vit.forward_head(vit.norm(tokens))
        return features

    def _early_exit(self, tokens: Tensor) -> Tensor:
        """Return the features [B, D] of what `lower` has returned, without any further block."""
        vit: Any = self.backbone
        features: Tensor = vit.forward_head(vit.norm(tokens))
        return features

    # --- prediction

    def of(self, place: int) -> "Specific":
        """Return the modules and prototypes of the task at this position."""
        found = self.tasks[place]
        assert isinstance(found, Specific)
        return found

    def inside(self, place: int, x: Tensor) -> Tensor:
        """Return the features [B, D] of images x with the LoRA of the task at this position."""
        return self.upper(self.lower(x, self.shared), self.of(place))

    def scores(self, x: Tensor, places: range) -> Tensor:
        """Return the cosines [T, B, C] of images x in the spaces of some tasks; -inf for classes of other tasks."""
        tokens, found = self.lower(x, self.shared), []
        for place in places:
            space = self.of(place)
            features = self.upper(tokens, space)
            with torch.autocast(x.device.type, enabled=False):
                found.append(space.head(features.float()).masked_fill(~space.own, float("-inf")))
        return torch.stack(found)

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        if self.training:
            logits: Tensor = self.head(self.inside(len(self.tasks) - 1, x))
            return logits
        given = self.needs_task_id and task is not None
        places = range(task, task + 1) if given and task is not None else range(len(self.tasks))
        best = self.scores(x, places).amax(dim=0)
        return best.masked_fill(best == float("-inf"), 0.0)

    def choices(self, x: Tensor) -> Tensor | None:
        if self.needs_task_id:
            return None
        best = self.scores(x, range(len(self.tasks))).amax(dim=2).argmax(dim=0)
        return F.one_hot(best, len(self.tasks))


class Specific(TaskFeatures):
    """LoRA of one task with its weights, and the prototypes of its classes.

    Args:
        loras: by block.
        width: D.
        num_classes: C.

    Attributes:
        weights: mu [3, number of blocks], of queries, keys and values; rows of parts without LoRA are not used.
    """

    def __init__(self, loras: nn.ModuleDict, width: int, num_classes: int) -> None:
        super().__init__(nn.ModuleDict(), width, num_classes)
        self.loras = loras
        self.weights = nn.Parameter(torch.rand(3, len(loras)) + 0.5)

    def plan(self) -> Plan:
        """Return the plan that adds the weighted LoRA to the blocks."""
        blocks = enumerate(self.loras.items())
        return plan_of({block: Weighted(lora, self.weights[:, place]) for place, (block, lora) in blocks})


class Weighted(nn.Module):
    """An update of queries, keys and values with a weight for each of the three.

    Args:
        lora: the update.
        weights: [3].
    """

    def __init__(self, lora: nn.Module, weights: Tensor) -> None:
        super().__init__()
        self.lora = lora
        self.factors = weights  # a tensor that is no parameter of this module

    def forward(self, x: Tensor) -> Tensor:
        """Return the change [..., 3 D] for x [..., D]."""
        change: Tensor = self.lora(x)
        return change * self.factors.repeat_interleave(change.shape[-1] // 3)


class Replaced(nn.Module):
    """LoRA whose map up is another tensor.

    Args:
        lora: the update, without learned scale.
        up: [parts, D, r].
    """

    def __init__(self, lora: QkvLoRA, up: Tensor) -> None:
        super().__init__()
        self.lora = lora
        self.other = up

    def forward(self, x: Tensor) -> Tensor:
        """Return the change [..., 3 D] for x [..., D]."""
        lora = self.lora
        changes = [F.linear(F.linear(x, lora.down[k]), up) for k, up in enumerate(self.other)]
        return fused(changes, lora.parts)


def path_of(block: int | str) -> str:
    """Return the path of the fused layer of queries, keys and values of a block."""
    return f"blocks.{block}.attn.qkv"


def plan_of(updates: Mapping[str, nn.Module] | nn.ModuleDict) -> Plan:
    """Return the plan that adds updates, by block, to queries, keys and values."""
    return Plan(parallel={path_of(block): update for block, update in updates.items()})


def rescaled(parameter: Tensor, factors: Tensor) -> Tensor:
    """Return the value of a parameter, bit for bit, whose gradient is multiplied by `factors`."""
    value = parameter.detach()
    return value + factors * (parameter - value)


def importances(up: Tensor) -> Tensor:
    """Return omega [parts, D, 1]: the norm of each row of B [parts, D, r], divided by the mean norm; 1 where B is 0."""
    norms = up.norm(dim=2, keepdim=True)
    mean = norms.mean(dim=1, keepdim=True)
    return torch.where(mean > 0, norms / mean.clamp_min(1e-30), torch.ones_like(norms))


def distillation(logits: Tensor, target: Tensor, classes: Tensor, temperature: float) -> Tensor:
    """Return the mean cross-entropy [] of the softened distributions of a teacher and a student, over some classes.

    Args:
        logits: of the student [B, C].
        target: of the teacher [B, C].
        classes: [B, C] bool.
        temperature: T.
    """
    probabilities = (target / temperature).masked_fill(~classes, float("-inf")).softmax(dim=1)
    log_p = (logits / temperature).masked_fill(~classes, float("-inf")).log_softmax(dim=1).masked_fill(~classes, 0.0)
    return -(probabilities * log_p).sum(dim=1).mean()


def overlap(own: Tensor, earlier: Tensor) -> Tensor:
    """Return the mean over earlier tasks of the absolute cosine of weights, flattened, [].

    Args:
        own: of any shape.
        earlier: [tasks, ...] of the same shapes.
    """
    return F.cosine_similarity(own.flatten()[None], earlier.flatten(1), dim=1).abs().mean()
