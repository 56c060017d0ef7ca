"""RAIL: ridge regression on frozen CLIP features, fused with zero-shot scores (Xu et al., NeurIPS 2024, 2406.18868).

    p = softmax(kappa f . w_k) over all known names, f = n(g_i(x))                 zero-shot
    primal:  r = h W,        h = ReLU(f R),  W = (H'H + gamma I)^-1 H'Y            R uniform on +-1/sqrt(d)
    dual:    r = k(f, F) A,  A = (K + gamma I)^-1 Y,  k(a, b) = exp(-sigma |a - b|^2)
    score = (1 - beta) p + beta r  if argmax p is a learned class (r = 0 for the others), else p

Memory between tasks: one text row per class, 4 C d bytes. In the primal form the projection, 4 d M bytes; the sum of
products of features, 8 M^2 bytes; a sum of features and a count per class, C (8 M + 8) bytes; and weights and biases,
8 C (M + 1) bytes. In the dual form the unit features of all n training rows with class and task, n (4 d + 16) bytes,
which is rehearsal of features; the weights, 8 C n bytes; and C (8 d + 8) bytes of sums and counts. Task id: not needed.

Deviations: statistics are those of the test view, published are those of one random crop per image, whose result
depends on the random stream; sums are float64 and solved once instead of a recursion in float32; the dual weights are
solved anew after each task in the order of the task ids, as the public code solves them anew, too. The templates are
those of the data set; the public code has "a photo of a {}." alone (`dataset.templates`).

Verified: weights of both forms equal joint ridge regression to 1e-9, a linear kernel gives the primal form without
projection, kernel scores equal values computed by hand, beta = 0 and images of unlearned names are
zero-shot, AOPD is 0, and unlearning a task equals never having learned it (test_methods_names, test_methods).
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clrun.blocks.ridge import RandomProjection, ridge
from clrun.blocks.statistics import ClassStats, solve_positive
from clrun.data.stream import Stream, Task
from clrun.learning.context import Context
from clrun.learning.heads import SolvedHead
from clrun.learning.names import NamesHead
from clrun.methods.closed_form import ClosedForm
from clrun.system.errors import ConfigError, Count, Fraction, Positive

GAMMA = {"primal": 0.1, "dual": 0.001}  # of the public code
WELL_POSED = 1e-6  # gamma over the trace of H'H, which bounds the condition of the matrix
LARGEST_KERNEL = 32768  # rows; its matrix takes 8.6 GB


class KernelRidge(nn.Module):
    """Kernel ridge regression with a Gaussian kernel on stored rows, in float64.

    Rows and weights are buffers, because predictions need them: they are part of exported weights.

    Args:
        num_features: d.
        num_classes: C.
        width: sigma of k(a, b) = exp(-sigma |a - b|^2).

    Attributes:
        rows: [n, d] fp32 stored features, by ascending task id.
        labels: [n] long.
        tasks: [n] long, ids of the tasks.
        weight: A [n, C] float64.
    """

    rows: Tensor
    labels: Tensor
    tasks: Tensor
    weight: Tensor

    def __init__(self, num_features: int, num_classes: int, *, width: float) -> None:
        super().__init__()
        self.num_classes, self.width = num_classes, width
        self.register_buffer("rows", torch.zeros(0, num_features))
        for name in ("labels", "tasks"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.long))
        self.register_buffer("weight", torch.zeros(0, num_classes, dtype=torch.float64))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Take over tensors of any number of rows."""
        for name, own in list(self._buffers.items()):
            given = state_dict.get(prefix + name)
            if given is not None and own is not None and given.shape[1:] == own.shape[1:]:
                self.register_buffer(name, own.new_zeros(given.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def kernel(self, a: Tensor, b: Tensor) -> Tensor:
        """Return k [m, n] float64 of rows a [m, d] and b [n, d], both float64."""
        distances = a.square().sum(dim=1, keepdim=True) + b.square().sum(dim=1) - 2 * a @ b.t()
        return torch.exp(-self.width * distances.clamp_(min=0))

    def add(self, rows: Tensor, labels: Tensor, task: int) -> None:
        """Store rows [m, d] of a task with labels [m]; they are sorted by task id, so that no order matters."""
        tasks = torch.cat([self.tasks.to(labels.device), torch.full_like(labels, task)])
        order = tasks.argsort(stable=True)
        self.rows = torch.cat([self.rows.to(rows), rows])[order]
        self.labels, self.tasks = torch.cat([self.labels.to(labels), labels])[order], tasks[order]

    def drop(self, tasks: Sequence[int]) -> None:
        """Remove the rows of these tasks."""
        kept = ~torch.isin(self.tasks, torch.tensor(list(tasks), device=self.tasks.device))
        self.rows, self.labels, self.tasks = self.rows[kept], self.labels[kept], self.tasks[kept]

    def solve(self, gamma: float) -> None:
        """Compute the weights of all stored rows."""
        rows = self.rows.double()
        gram = self.kernel(rows, rows)
        gram.diagonal().add_(gamma)
        self.weight = solve_positive(gram, F.one_hot(self.labels, self.num_classes).double())

    def forward(self, features: Tensor) -> Tensor:
        """Return scores [B, C] fp32 of features [B, d]; 0 for classes without rows."""
        return (self.kernel(features.double(), self.rows.double()) @ self.weight).float()


class Rail(ClosedForm):
    """Trust ridge regression on images where zero-shot CLIP sees a learned class, and zero-shot CLIP elsewhere.

    p is a softmax over all names that are known: those of the classes learned so far, and with `job.eval_unseen=true`
    those of all classes from the first task on, as in the published protocol X-TAIL. Where only learned names are
    known, every image passes the gate: RAIL is then (1 - beta) zero-shot + beta ridge regression.

    Args:
        backbone: passes on features of a frozen image tower; has a `joint` space with a text tower.
        num_classes: C.
        form: "primal": random projection and sums over rows. "dual": Gaussian kernel on the stored features of all
            training rows.
        m: M, width of the random projection of the primal form; 0 is ridge regression on f itself.
        projection_seed: seed of R, independent of the seed of the run.
        gamma: added to the diagonal of the matrix; null for that of the public code, 0.1 (primal) or 0.001 (dual).
        kernel_width: sigma, of the dual form.
        fusion: beta, the weight of the regression.
        gate: "zero_shot", as above; "none" fuses the scores of all images.
        forget_tasks: ids of tasks to unlearn at the end.
        keep_task_statistics: store the sums of each task as well; see `ClosedForm`.
    """

    needs_text: ClassVar[bool] = True
    head: NamesHead
    learned: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        form: Literal["primal", "dual"],
        m: Count,
        projection_seed: Count,
        gamma: Positive | None,
        kernel_width: Positive,
        fusion: Fraction,
        gate: Literal["zero_shot", "none"],
        forget_tasks: list[Count],
        keep_task_statistics: bool,
    ) -> None:
        super().__init__(backbone, num_classes, forget_tasks=forget_tasks, keep_task_statistics=keep_task_statistics)
        self.head = NamesHead(backbone, num_classes, names="fixed")
        self.width = self.head.joint.dim
        self.register_buffer("learned", torch.zeros(num_classes, dtype=torch.bool))  # classes with rows
        self.form, self.fusion, self.gate = form, fusion, gate
        self.gamma = GAMMA[form] if gamma is None else gamma
        self.projection = RandomProjection(
            self.width, m if form == "primal" else 0, seed=projection_seed, kind="uniform"
        )
        self.regression: SolvedHead | KernelRidge = (
            SolvedHead(self.projection.num_features, num_classes)
            if form == "primal"
            else KernelRidge(self.width, num_classes, width=kernel_width)
        )

    def check(self, stream: Stream) -> None:
        super().check(stream)
        rows = sum(len(task.train) for task in stream.tasks)
        if self.form == "dual" and rows > LARGEST_KERNEL:
            raise ConfigError(
                f"method.form: the dual form solves for a matrix of {rows} x {rows} numbers, {8e-9 * rows**2:.0f} GB, "
                f"and its limit is {LARGEST_KERNEL} rows; use method.form=primal"
            )

    def empty(self) -> dict[str, ClassStats]:
        moments: Literal["pooled", "none"] = "pooled" if self.form == "primal" else "none"
        return {"features": ClassStats(self.projection.num_features, self.num_classes, moments=moments)}

    def begin_task(self, task: Task, ctx: Context) -> None:
        super().begin_task(task, ctx)
        self.head.grow(task.classes)

    def learn(self, task: Task, ctx: Context) -> None:
        if isinstance(self.regression, KernelRidge):
            for features, batch in self.read(task.train, ctx):
                self.regression.add(features, batch.y, task.id)
        super().learn(task, ctx)

    def features(self, x: Tensor) -> Tensor:
        """Return f = n(g_i(x)) [B, d] of features x [B, D] of the image tower."""
        return self.head.embed(super().features(x))

    def lift(self, features: Tensor) -> Tensor:
        lifted: Tensor = self.projection(features)
        return lifted

    def solve(self, task: Task, ctx: Context) -> None:
        self.learned.copy_(self.stats("features").counts() > 0)
        if isinstance(self.regression, KernelRidge):
            self.regression.solve(self.gamma)
        else:
            stats = self.stats("features")
            well_posed = self.gamma >= WELL_POSED * float(stats.lower_gram().diagonal().sum())
            self.regression.weight.copy_(ridge(self.gamma, stats, ratio=12 if well_posed else 2).t())

    def _forget(self, ctx: Context) -> None:
        """Unlearn the tasks, and the names of classes of which no row remains."""
        super()._forget(ctx)
        if isinstance(self.regression, KernelRidge):
            self.regression.drop(self.forget_tasks)
        self.head.initialised[self.lost] = False

    def score_features(self, features: Tensor) -> Tensor:
        """Return the fused scores [B, C] of unit features [B, d]; 0 for classes whose names are not known."""
        logits = self.head.match(features, self.head.rows()).masked_fill(~self.head.initialised, float("-inf"))
        p = logits.softmax(dim=1)
        regression: Tensor = self.regression(self.lift(features))
        fused = (1 - self.fusion) * p + self.fusion * regression  # 0 for classes that were not learned
        if self.gate == "none":
            return fused
        return torch.where(self.learned[p.argmax(dim=1)][:, None], fused, p)
