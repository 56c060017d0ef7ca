"""DLCFT: the tangent model of a pre-trained network, squared error, quadratic penalty (Shon et al., arXiv 2208.08112).

Memory between tasks, for P parameters of the body and a head on D features: 2 P floats (the change and its anchor), the
two Kronecker factors of each layer, in^2 + out^2 floats, and one float for every other parameter; for the head C (D +
1) floats (its anchor) and one matrix of (D + 1)^2, in task-incremental streams one per task. With linearise=head only
the latter. Task id: not needed.

Verified: the tangent model equals the network at the start and central differences, and is linear in the change; its
gradient equals automatic differentiation through the tangent; heads on frozen features are learned as by joint ridge
regression in any order (golden values); a linear network is learned as by EWC with the exact Hessian; blocks of the
curvature equal J'J (test_methods_dlcft).
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clrun.blocks.curvature import (
    Composite,
    Curvature,
    KroneckerFactored,
    KroneckerFisher,
    QuadraticPenalty,
    estimate,
    isotropic,
)
from clrun.blocks.params import Carrier, eval_mode, select
from clrun.blocks.tangent import leaky, make_differentiable, tangent
from clrun.data.split import Batch
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.heads import GrowingHead
from clrun.learning.knobs import Knob
from clrun.learning.losses import Compete
from clrun.learning.method import Method, freeze
from clrun.system.errors import ConfigError, NonNegative, Positive, PositiveInt

TRACE_ROWS = 128  # largest number of rows for the traces of tkfac, one number per layer, which need a gradient per row


class Dlcft(Method):
    """Task t minimises [n_t loss_t + strength/2 (delta - delta*)' K (delta - delta*)] / (n_1 + ... + n_t).

    The model is f(x) = W phi(x) + b with phi(x) = phi_0(x) + J_0(x) delta: features of the pre-trained network and
    their derivative by its weights, both at the pre-trained weights. delta, W and b are trained from 0, and delta*
    stands for all three after the last task. loss_t = 1/2 |f(x) - target_scale onehot(y)|^2 is summed over the classes
    that compete and averaged over rows. Its Hessian in f is the identity, so that K = sum_k n_k E_k[J'J] over earlier
    tasks k is their exact curvature where f is linear in what is trained: the penalty then equals their loss up to a
    constant.

    K is exact for the head: one matrix E[(phi, 1)(phi, 1)'] for every class, new classes included, because the rows of
    earlier tasks have the target 0 for them. In task-incremental streams and with compete=current it holds for the
    classes of the task alone. For the body K has a Kronecker product per layer and a diagonal for other parameters.

    A step computes f by one pass in forward mode and its gradient by one backward pass at the pre-trained weights. The
    network is in eval mode throughout: batch normalisation, whose own parameters are not trained, is fixed, and dropout
    is off. Precision is full also under autocast, which would cost the derivative three digits; attention is not fused,
    because fused kernels have no forward mode.

    The loss is large (its gradients are target_scale times those of a cross-entropy, and features are not normalised).
    The published class-incremental budget is Adam with learning rate 1e-4, weight decay 1e-5 and a linear decay; for
    task-incremental baselines SGD with learning rate 1e-3 and gradients clipped to norm 1.

    Deviations from the code of the first author (hushon/linear-continual-learning): it averages A and S of all tasks
    separately, which is not the average of their products (see `add`); the curvature is estimated from images without
    augmentation; batch normalisation is not merged into the convolutions. The paper has no factor `strength`. Neither
    `weighting=rows` nor `prior` is published; with both, linearise=head is ridge regression on all rows.

    Args:
        backbone: maps prepared images to features [B, D]; pre-trained.
        num_classes: C.
        linearise: "body": as above, bilinear in W and delta (as the public code). "all": also W is linearised, around
            initial rows W_0 as in `nn.Linear`: f = W phi_0 + W_0 J_0 delta + b. "head": delta = 0; the features of the
            frozen backbone are computed once, without augmentation.
        target_scale: the target of the true class.
        relu_slope: slope of ReLUs below 0 in the body, published 0.01: units that are off would have no derivative.
            linearise=head leaves the network as it is.
        strength: factor of the penalty.
        prior: precision of a Gaussian prior around the initial values, in the units of n_t.
        weighting: n_t: "tasks", 1; "rows", the number of rows of task t.
        clip_norm: largest norm of the whole gradient; None does not clip, and SGD may then diverge.
        curvature: of layers of the body: "kfac", the Kronecker factors as they are; "tkfac", multiplied so that their
            trace is that of the layer's block of E[J'J]; "exact_head": no body, needs linearise=head.
        residuals: how the factors at the outputs are estimated: "sampled", from one draw of N(0, I) per row; "exact".
        samples: number of rows of the task for the estimate of the body's curvature; None for all.
        sharing: see `KfacEwc`.
        add: see `KfacEwc`.
        modules: see `KfacEwc`.
        largest: see `KfacEwc`.
        groups: see `KfacEwc`.
        compete: classes that compete in the loss, see `clrun.learning.losses`.
    """

    initial_rows: Tensor
    hooks_backbone = True  # compiled code can be neither hooked nor differentiated in forward mode
    knobs = (Knob("strength"),)

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        linearise: Literal["body", "all", "head"],
        target_scale: Positive,
        relu_slope: NonNegative,
        strength: NonNegative,
        prior: NonNegative,
        weighting: Literal["tasks", "rows"],
        clip_norm: Positive | None,
        curvature: Literal["kfac", "tkfac", "exact_head"],
        residuals: Literal["sampled", "exact"],
        samples: PositiveInt | None,
        sharing: Literal["expand", "reduce"],
        add: Literal["kl", "additive", "rank1", "list"],
        modules: list[str],
        largest: PositiveInt,
        groups: Literal["skip", "average"],
        compete: Compete,
    ) -> None:
        if curvature == "exact_head" and linearise != "head":
            raise ConfigError("method.curvature=exact_head: there is a body; set method.linearise=head, or use tkfac")
        super().__init__(backbone, num_classes, compete=compete)
        self.linearise, self.target_scale, self.relu_slope = linearise, target_scale, relu_slope
        self.weighting, self.strength, self.prior, self.form = weighting, strength, prior, curvature
        columns: Literal["normal", "unit"] = "normal" if residuals == "sampled" else "unit"
        self.fisher = KroneckerFisher(columns, samples, None, sharing, modules, largest, groups)
        self.clip_norm = clip_norm
        self.past = 0.0  # n_1 + ... + n_(t-1)
        self.at_start = False  # whether `forward` is that of the pre-trained body, for estimates of its curvature
        width = int(backbone.num_features)  # type: ignore[arg-type]
        self.head: GrowingHead = GrowingHead(width, num_classes)
        self.head_penalty = HeadPenalty(num_classes, width + 1, prior)
        self.register_buffer("initial_rows", torch.zeros(num_classes, width if linearise == "all" else 0))
        self.penalty = QuadraticPenalty(1.0, how=add)
        self.change: nn.Module = nn.Module()
        if linearise != "head":
            make_differentiable(backbone)
            self.fisher.check(backbone)
            self.change = copy.deepcopy(backbone)  # delta, under the names of the weights
            for parameter in self.change.parameters():
                nn.init.zeros_(parameter)
        self.names = tuple(select(self.change))
        freeze(backbone)

    @classmethod
    def reads_features(cls, options: Mapping[str, Any]) -> bool:
        return bool(options["linearise"] == "head")

    # --- a task

    def begin_task(self, task: Task, ctx: Context) -> None:
        before = self.head.initialised.clone()
        super().begin_task(task, ctx)
        new = self.head.initialised & ~before
        assert self.head.bias is not None
        with torch.no_grad():
            if self.linearise == "all":
                self.initial_rows[new] = self.head.weight[new]
            else:
                self.head.weight[new] = 0.0
            self.head.bias[new] = 0.0
            self.head_penalty.anchor[new] = self._rows()[new]

    def end_task(self, task: Task, ctx: Context) -> None:
        share = self._share(task)
        self.past += share
        own = self.competing(torch.tensor([task.index], device=ctx.hardware.device), ctx)[0]
        if self.compete == "seen" and ctx.stream.setting != "til":
            own = torch.ones_like(own)
        self.head_penalty.update(self._rows().detach(), own, share * self._gram(task, ctx))
        if self.names:
            curvature = self.curvature(task, ctx).scale(share)
            if self.prior and self.penalty.curvature is None:
                curvature = isotropic(curvature, self.prior).add(curvature, self.penalty.how)
            self.penalty.update(self.change, curvature)

    def curvature(self, task: Task, ctx: Context) -> Curvature:
        """Return E[J'J] of the body on the rows of `task`, by the names of its parameters."""
        with self._pre_trained():
            found = self.fisher(self, task, ctx)
            if self.form != "tkfac":
                return found
            rows = None if self.fisher.samples is None else min(self.fisher.samples, TRACE_ROWS)
            exact = estimate("diag", self, task.train, ctx, of=self.backbone, labels=self.fisher.labels, samples=rows)
        assert isinstance(found, Composite)
        traces = {name: float(values.sum()) for name, values in exact.params(exact.diag()).items()}
        return Composite.of([_with_trace(part, sum(traces[name] for name in part.shapes)) for part in found.parts])

    @contextmanager
    def _pre_trained(self) -> Iterator[None]:
        """Let `forward` differentiate the pre-trained body by its weights within the `with` block."""
        weights = [p for name, p in self.backbone.named_parameters() if name in self.names]
        try:
            self.at_start = True
            for weight in weights:
                weight.requires_grad_(True)
            yield
        finally:
            self.at_start = False
            freeze(self.backbone)

    def _gram(self, task: Task, ctx: Context) -> Tensor:
        """Return the mean of (phi, 1)(phi, 1)' [D + 1, D + 1] over the rows of `task`, without augmentation."""
        total = torch.zeros((), dtype=torch.float64)
        with torch.no_grad(), eval_mode(self):
            for batch in task.train.batches(256):
                value, moved = self.features(ctx.hardware.layout(batch.x))
                phi = F.pad((value if self.linearise == "all" else value + moved).double(), (0, 1), value=1.0)
                total = total.to(phi.device) + phi.T @ phi
        return (total / len(task.train)).to(self.head.weight.dtype)

    def _share(self, task: Task) -> float:
        """Return n_t."""
        return float(len(task.train)) if self.weighting == "rows" else 1.0

    def _rows(self) -> Tensor:
        """Return [W, b] [C, D + 1]."""
        assert self.head.bias is not None
        return torch.cat([self.head.weight, self.head.bias[:, None]], dim=1)

    # --- a step

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        target = self.target_scale * F.one_hot(batch.y, self.num_classes)
        error = (self(batch.x) - target) * self.competing(batch.t, ctx)
        share = self._share(ctx.task)
        loss: Tensor = share * 0.5 * error.square().sum(dim=1).mean()
        if self.strength:
            loss = loss + self.strength * (self.head_penalty(self._rows()) + self._body_penalty())
        return loss / (self.past + share)

    def _body_penalty(self) -> Tensor | float:
        if self.prior and self.names and self.penalty.curvature is None:
            return 0.5 * self.prior * sum(p.square().sum() for p in select(self.change).values())
        penalty: Tensor = self.penalty(self.change)
        return penalty

    def adjust_gradients(self, ctx: Context) -> None:
        if self.clip_norm is not None:
            params = [*self.change.parameters(), *self.head.parameters()]
            nn.utils.clip_grad_norm_(params, self.clip_norm, foreach=True)

    # --- prediction

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        rows: Any = self.initial_rows if self.linearise == "all" else self.head.weight
        if self.at_start:
            with leaky(self.relu_slope):
                return F.linear(self.backbone(x), rows)
        value, moved = self.features(x)
        if self.linearise == "all":
            logits: Tensor = self.head(value) + F.linear(moved, rows)
        else:
            logits = self.head(value + moved)
        return logits

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return phi_0(x) and J_0(x) delta, both [B, D], of prepared x; differentiable in delta."""
        if not self.names:
            value = self.backbone(x)
            return value, torch.zeros_like(value)
        return tangent(self.backbone, select(self.change), x, slope=self.relu_slope)


class HeadPenalty(Carrier):
    """1/2 sum_c (v_c - a_c)' A_c (v_c - a_c) for the rows v_c [I] of a head, with A_c the sum of matrices over tasks.

    Tasks that concern the same classes share a matrix.

    Args:
        num_classes: C.
        size: I, features and the constant of the bias.
        prior: A_c before the first task is prior times the identity.

    Attributes:
        anchor: a [C, I].
        masks: [G, C], the classes of each of the G matrices.
        grams: [G, I, I].
    """

    def __init__(self, num_classes: int, size: int, prior: float) -> None:
        super().__init__()
        self.anchor = torch.zeros(num_classes, size)
        self.masks = torch.ones(int(prior > 0), num_classes)
        self.grams = prior * torch.eye(size).expand(int(prior > 0), size, size).clone()

    def update(self, rows: Tensor, classes: Tensor, gram: Tensor) -> None:
        """Add the matrix `gram` [I, I] for some classes ([C] bool), around the present rows [C, I]."""
        self.anchor, mask = rows.clone(), classes.to(self.masks.dtype)
        known = (self.masks == mask).all(dim=1)
        if known.any():
            self.grams = self.grams + known[:, None, None] * gram
        else:
            self.masks, self.grams = torch.cat([self.masks, mask[None]]), torch.cat([self.grams, gram[None]])

    def forward(self, rows: Tensor) -> Tensor:
        """Return the penalty [] of rows [C, I], differentiable."""
        change = rows - self.anchor
        total = change.new_zeros(())
        for mask, gram in zip(self.masks, self.grams, strict=True):
            total = total + (mask[:, None] * (change @ gram) * change).sum()
        return 0.5 * total


def _with_trace(part: Curvature, trace: float) -> Curvature:
    """Return a Kronecker product scaled so that it has this trace; other forms as they are."""
    if not isinstance(part, KroneckerFactored):
        return part
    own = float(part.outer.trace() * part.inner.trace())
    return part.scale(trace / own) if own else part
