"""ACIL: ridge regression on a random lift of frozen features (Zhuang et al., NeurIPS 2022, arXiv 2205.14922).

With options also GACL (NeurIPS 2024, arXiv 2403.15706), whose classes come back, which is the same sum; the kernel of
GKEAL (CVPR 2023), the balance of AIR (arXiv 2408.10349) and the second stream of DS-AL (AAAI 2024, arXiv 2403.17503).

    W = (sum H'H + gamma I)^-1 sum H'Y,    H = ReLU(f W_r)

Memory between tasks: the projection, 4 D M bytes; the sum of products of lifted features, 8 M^2 bytes (8 M^2 per class
with balance=air), a sum and a count per class, C (8 M + 8) bytes; and the weights, 8 C M bytes. With compensation > 0
8 M^2 + C (24 M + 8) bytes more. With keep_task_statistics=true the sums of each task in addition. Task id: not needed.

Deviations: the published recursion over batches is replaced by the sums that it equals, in float64: in float32 the
recursion loses digits (11 % error of W for 4000 rows, M = 1000, gamma = 0.1). Base training (base=sgd) has no selection
by test accuracy. Centres of the kernel are drawn from all rows of the first task; the public code of GKEAL permutes the
first M rows. The compensation keeps the classes of the task in each residual; the public code keeps those that are new,
and in streams without new classes all. AIR weights the classes that have rows; the public code counts allocated ones.

Verified: weights equal the recursion and joint ridge regression to 1e-9 for any order and batches, AOPD is 0, repeats
divide the ridge, equal counts make balance=air no difference, DS-AL equals values computed by hand, and with a normal
projection this is RanPAC with a fixed ridge (test_methods_acil).
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clrun.blocks.ridge import RandomProjection, ridge
from clrun.blocks.statistics import ClassStats, solve_positive
from clrun.data.split import Batch
from clrun.data.stream import Stream, Task
from clrun.learning.context import Context
from clrun.learning.heads import GrowingHead, SolvedHead
from clrun.learning.losses import masked_cross_entropy
from clrun.learning.method import freeze
from clrun.learning.training import fit
from clrun.methods.closed_form import ClosedForm
from clrun.system.errors import ConfigError, Count, NonNegative, Positive, PositiveInt
from clrun.system.seeding import generator

Lift = Literal["uniform", "normal", "gaussian_kernel"]


class GaussianKernel(nn.Module):
    """The lift h_j = exp(-|f - c_j|^2 / (2 sigma^2)) of features f [B, D] to M centres c_j, which are rows of a task.

    Args:
        num_features: D.
        centres: M.
        sigma: width.
    """

    centres: Tensor

    def __init__(self, num_features: int, centres: int, sigma: float) -> None:
        super().__init__()
        self.num_features, self.sigma = centres, sigma
        self.register_buffer("centres", torch.zeros(centres, num_features))

    def forward(self, features: Tensor) -> Tensor:
        """Return h [B, M] of features [B, D]."""
        distances = torch.cdist(features.double(), self.centres.double()).square()
        return torch.exp(-distances / (2 * self.sigma**2)).float()


class Acil(ClosedForm):
    """Ridge regression of one-hot labels on lifted features of a frozen backbone, with a fixed strength.

    f are features of the backbone. Entries of W_r [D, M] are uniform within 1/sqrt(D). With projection=normal they are
    N(0, 1), and h is about sqrt(3 D) times as large: gamma = 0.1 corresponds to 0.3 D there, 230 for D = 768. With
    gaussian_kernel, h_j = exp(-|f - c_j|^2 / (2 sigma^2)) for M rows c_j of the first task (GKEAL).

    balance=air weights each row by 1 / n_c for the n_c rows of its class, scaled so that the weights of the classes sum
    to their number (AIR).

    compensation > 0 adds a second stream (DS-AL): with z = f W_r, main features ReLU(z) and T = tanh(z), after each
    batch the residual E = Y - H W of the main stream so far is taken, its columns for classes of other tasks are set to
    0, and W_c = (sum T'T + gamma_comp I)^-1 sum T'E. The score is H W + compensation T W_c. W is not changed by it, but
    W_c depends on the order of tasks and on the batches.

    base=sgd trains the backbone and a linear head on the first task with the budget of the run, discards the head and
    freezes the backbone, as published for networks without pre-training. Which classes come first then shapes the
    features.

    Args:
        backbone: an identity of width D, because the inputs of this method are features; with base=sgd a network.
        num_classes: C.
        m: M, the width of the lift; 0 is ridge regression on the features themselves.
        projection: "uniform", "normal" or "gaussian_kernel".
        projection_seed: seed of W_r and of the choice of centres, independent of the seed of the run.
        sigma: of the kernel; published 10, between 5 and 15.
        gamma: added to the diagonal of the sum of products.
        repeats: how often each row counts, which divides gamma; 3 in the script of GACL.
        balance: "none" or "air".
        compensation: weight of the second stream; published for DS-AL 0.6 on CIFAR-100 and 1.5 on ImageNet-1k.
        gamma_comp: gamma of the second stream.
        batch: rows between two residuals of the second stream, in the order of the data set.
        base: "none" or "sgd".
        forget_tasks: ids of tasks to unlearn at the end.
        keep_task_statistics: store the sums of each task as well; see `ClosedForm`.
    """

    residual_sums: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        m: Count,
        projection: Lift,
        projection_seed: Count,
        sigma: Positive,
        gamma: Positive,
        repeats: PositiveInt,
        balance: Literal["none", "air"],
        compensation: NonNegative,
        gamma_comp: Positive,
        batch: PositiveInt,
        base: Literal["none", "sgd"],
        forget_tasks: list[Count],
        keep_task_statistics: bool,
    ) -> None:
        super().__init__(backbone, num_classes, forget_tasks=forget_tasks, keep_task_statistics=keep_task_statistics)
        self.gamma, self.repeats, self.balance, self.base = gamma, repeats, balance, base
        self.compensation, self.gamma_comp, self.batch = float(compensation), gamma_comp, batch
        self.kernel = projection == "gaussian_kernel"
        self.projection_seed = projection_seed
        self.order_invariant = base == "none" and not self.kernel and not compensation
        self.projection: GaussianKernel | RandomProjection
        if projection == "gaussian_kernel":
            self.projection = GaussianKernel(self.width, m, sigma)
        else:
            self.projection = RandomProjection(self.width, m, seed=projection_seed, kind=projection)
        lifted = self.projection.num_features
        self.head: SolvedHead = SolvedHead(lifted, num_classes)
        self.second = SolvedHead(lifted if compensation else 0, num_classes)  # W_c
        self.register_buffer("residual_sums", torch.zeros(lifted if compensation else 0, num_classes).double())
        self.base_head = GrowingHead(self.width, num_classes) if base == "sgd" else None  # until the base is trained

    @classmethod
    def reads_features(cls, options: Mapping[str, Any]) -> bool:
        return bool(options["base"] == "none")

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        lift, m = options["projection"], options["m"]
        if lift == "gaussian_kernel" and not m:
            raise ConfigError("method.m: the number of centres of projection=gaussian_kernel must be at least 1")
        if not options["compensation"]:
            return
        if lift == "gaussian_kernel" or not m or options["balance"] != "none":
            raise ConfigError(
                "method.compensation: needs a random projection (method.projection=uniform or normal, method.m at "
                "least 1) and method.balance=none; change these, or set it to 0"
            )
        if options["forget_tasks"] or options["keep_task_statistics"]:
            raise ConfigError(
                "method.compensation: residuals depend on the tasks before, so that no task can be unlearned; set it "
                "to 0, or method.forget_tasks=[] and method.keep_task_statistics=false"
            )

    def check(self, stream: Stream) -> None:
        super().check(stream)
        first = stream.tasks[0]
        if self.kernel and len(first.train) < self.projection.num_features:
            raise ConfigError(
                f"method.m: projection=gaussian_kernel draws {self.projection.num_features} centres from the first "
                f"task, which has {len(first.train)} rows; take at most so many"
            )
        if first.id in self.forget_tasks and (self.kernel or self.base == "sgd"):
            raise ConfigError(
                f"method.forget_tasks: task {first.id} comes first and shapes the features for all others; it can be "
                "unlearned with method.base=none and a random projection only"
            )

    # --- base training, and the centres of a kernel

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        if self.base_head is not None:
            self.base_head.grow(task.classes)

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        assert self.base_head is not None, "only base training has a loss"
        return masked_cross_entropy(self.base_head(self.backbone(batch.x)), batch.y, ctx.mask(batch.t, "current"))

    def learn(self, task: Task, ctx: Context) -> None:
        if self.base_head is not None:
            fit(self, task.train, ctx)
            self.base_head = None
            freeze(self.backbone)
        if isinstance(self.projection, GaussianKernel) and task.index == 0:
            rows = torch.cat([features for features, _ in self.read(task.train, ctx)])
            drawn = torch.randperm(len(rows), generator=generator(self.projection_seed, "centres"))
            self.projection.centres.copy_(rows[drawn[: len(self.projection.centres)].to(rows.device)])
        if self.compensation:
            self._learn_both(task, ctx)
        else:
            super().learn(task, ctx)

    def constant(self, x: Tensor) -> Tensor | None:
        return None if self.uses_frozen_features or self.base_head is not None else self.features(x)

    def forward_with(self, constant: Tensor, x: Tensor, task: int | None = None) -> Tensor:
        return self.scores(constant)

    # --- sums and their solution

    def empty(self) -> dict[str, ClassStats]:
        moments: Literal["class", "pooled"] = "class" if self.balance == "air" else "pooled"
        found = {"features": ClassStats(self.projection.num_features, self.num_classes, moments=moments)}
        if self.compensation:
            found["second"] = ClassStats(self.projection.num_features, self.num_classes, moments="pooled")
        return found

    def lift(self, features: Tensor) -> Tensor:
        lifted: Tensor = self.projection(features)
        return lifted

    def second_lift(self, features: Tensor) -> Tensor:
        """Return T = tanh(z) [B, M] of features [B, D]."""
        assert isinstance(self.projection, RandomProjection)
        return torch.tanh(features @ self.projection.weight)

    def solve(self, task: Task, ctx: Context) -> None:
        gamma = self.gamma / self.repeats
        stats = self.stats("features")
        weights = balanced_ridge(gamma, stats) if self.balance == "air" else ridge(gamma, stats)
        self.head.weight.copy_(weights.t())

    def _learn_both(self, task: Task, ctx: Context) -> None:
        """Add the rows of a task to both streams, batch by batch; each residual is that of the main stream so far."""
        parts = [(features, batch.y) for features, batch in self.read(task.train, ctx)]
        features, y = (torch.cat(part) for part in zip(*parts, strict=True))
        classes = task.classes.to(y.device)
        for x, labels in zip(features.split(self.batch), y.split(self.batch), strict=True):  # type: ignore[no-untyped-call]
            own = {name: stats.to(x.device) for name, stats in self.empty().items()}
            lifted, second = self.lift(x), self.second_lift(x)
            own["features"].update(lifted, labels)
            own["second"].update(second, labels)
            self._merge(own)
            self.solve(task, ctx)
            residual = F.one_hot(labels, self.num_classes).double() - lifted.double() @ self.head.weight.t()
            kept = torch.zeros_like(residual)
            kept[:, classes] = residual[:, classes]
            self.residual_sums += second.double().t() @ kept
        gram = self.stats("second").gram()
        gram.diagonal().add_(self.gamma_comp)
        self.second.weight.copy_(solve_positive(gram, self.residual_sums).t())

    def score_features(self, features: Tensor) -> Tensor:
        scores = super().score_features(features)
        return scores + self.compensation * self.second(self.second_lift(features)) if self.compensation else scores


def balanced_ridge(gamma: float, stats: ClassStats) -> Tensor:
    """Return W = (sum_c w_c G_c + gamma I)^-1 [w_c q_c] [M, C] float64, with w_c proportional to 1 / n_c (AIR).

    The weights of the k classes with rows sum to k.

    Args:
        gamma: added to the diagonal.
        stats: with moments by class.
    """
    present = (stats.counts() > 0).nonzero()[:, 0].tolist()
    shares = 1 / stats.counts().clamp(min=1).double()
    weights = shares * len(present) / shares[present].sum()
    gram = torch.zeros(stats.num_features, stats.num_features, dtype=torch.float64, device=shares.device)
    for label in present:  # in the order of the class ids, so that the order of the tasks changes no bit
        gram += weights[label] * stats.products.value()[stats.slots[label]]
    gram.diagonal().add_(gamma)
    return solve_positive(gram, (weights[:, None] * stats.sums.value()).t())
