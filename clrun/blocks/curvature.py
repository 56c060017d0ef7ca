"""Curvature of the loss around the learned weights, and the quadratic penalty that uses it.

Conventions of every estimate: the per-sample mean F = 1/N sum_n E_y[g g^T] with g = grad log p(y | x_n), whatever the
batch size; eval mode, un-augmented rows, fp32, a seeded subset; the model, its modes, `.grad` and the global random
numbers stay bitwise as they were. Published penalty weights often refer to F / B, or omit the 1/2.

Shapes: `N` rows, `B` rows of a batch, `C` classes, `K` columns a row, `P` numbers in the parameters.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from clrun.blocks.params import Carrier, Params, corner, eval_mode, flatten, match, select, unflatten
from clrun.data.split import Batch, Split

if TYPE_CHECKING:
    from clrun.method import Method
    from clrun.training import Context

Labels = Literal["exact", "sampled", "true", "predicted", "batched"]
# Per-sample gradients held at once: how many (more are not faster), and of how many numbers together (4 bytes each).
GRADIENTS = {"cpu": 64, "cuda": 512}
NUMBERS = {"cpu": 2**25, "cuda": 2**28}


def diagonal_fisher(
    method: "Method",
    split: Split,
    ctx: "Context",
    *,
    of: nn.Module,
    labels: Labels,
    samples: int | None,
    top_k: int | None = None,
) -> Params:
    """Return the diagonal of the Fisher information, per-sample mean, for the trainable parameters of `of`.

    Every per-sample policy is a set of columns s [C] in logit space, F = 1/N sum_n sum_s (J_n^T s)^2 with J_n the
    Jacobian of the logits: "exact" takes sqrt(p_c) (e_c - p) for every class c, the closed form of the expectation
    over y ~ p; the others take one e_y - p. Only classes that compete in the run's setting have probability.

    Args:
        method: the learner.
        split: rows to estimate on; every process reads the same ones.
        ctx: context of the current task; its generator "fisher" chooses rows and labels.
        of: submodule of `method` whose parameters count; the names of the result are its own.
        labels: "exact"; "sampled", one y ~ p a row, unbiased; "true", the row's label (empirical Fisher: biased, 0
            where the model fits); "predicted", the most probable class (biased); "batched", y ~ p for a whole batch
            and B times the square of the mean gradient: unbiased, because the B gradients are independent with mean 0,
            at the cost of one backward a batch, with more variance.
        samples: rows used, drawn without replacement; None for all.
        top_k: with "exact", sum over the k most probable classes of a row and add nothing for the rest; None for all.
    """
    generator = ctx.generator("fisher")
    if samples is not None and samples < len(split):
        split = split.select(torch.randperm(len(split), generator=generator)[:samples].to(split.y.device))
    names = {id(p): name for name, p in select(of).items()}
    params = {name: p for name, p in select(method).items() if id(p) in names}
    if not params:
        return {}
    position = ctx.task.index if method.needs_task_id else None
    competing = int(ctx.stream.candidates(ctx.task.index + 1).sum(dim=1).max())
    weights = {name: p.detach().contiguous() for name, p in params.items()}
    fisher = _Fisher(method, params, labels, min(top_k or competing, competing), position, weights)
    total = {name: torch.zeros_like(p) for name, p in fisher.weights.items()}
    with eval_mode(method), _eager(ctx):
        for batch in split.batches(ctx.budget.batch_size if labels == "batched" else fisher.at_once()[0]):
            mask = ctx.mask(batch.t)
            noise = torch.empty(mask.shape).exponential_(generator=generator).to(mask.device)
            for name, square in fisher(batch, mask, noise).items():
                total[name] += square
    return {names[id(p)]: total[name] / len(split) for name, p in params.items()}


def _eager(ctx: "Context") -> AbstractContextManager[object]:
    """Return the context of functorch's transforms: code that was compiled runs eagerly."""
    return torch.compiler.set_stance("force_eager") if ctx.hardware.compile else nullcontext()


@dataclass(frozen=True)
class _Fisher:
    """Sums of squared gradients over the rows of a batch.

    Attributes:
        method: the learner, in eval mode.
        params: the parameters that count, by their name in the method.
        labels: see `diagonal_fisher`.
        top_k: columns of a row with "exact".
        position: the task's position for a method that needs it; None otherwise.
        weights: the parameters without gradient and in plain memory order, which functorch's convolutions like best.
    """

    method: "Method"
    params: dict[str, nn.Parameter]
    labels: Labels
    top_k: int
    position: int | None
    weights: Params

    def at_once(self) -> tuple[int, int]:
        """Return of how many rows, and of how many columns of each, the gradients are held together."""
        kind = next(iter(self.params.values())).device.type
        numbers = sum(p.numel() for p in self.params.values())
        gradients = max(1, min(GRADIENTS[kind], NUMBERS[kind] // numbers))
        columns = min(self.top_k if self.labels == "exact" else 1, gradients)
        return gradients // columns, columns

    def __call__(self, batch: Batch, mask: Tensor, noise: Tensor) -> Params:
        """Return the sums, named as `params`; `noise` is [B, C], exponential, and draws the labels."""
        if self.labels == "batched":
            return self._batched(batch, mask, noise)
        # Gradients of parameters outside `params` would keep a graph alive.
        with torch.no_grad():
            squares = vmap(self._squares)(batch.x, batch.y, mask, noise)
            return {name: square.sum(dim=0) for name, square in squares.items()}

    def _batched(self, batch: Batch, mask: Tensor, noise: Tensor) -> Params:
        """Return B times B (mean gradient)^2: the sum over the batch of an unbiased estimate."""
        with torch.enable_grad():
            logits = self._logits(dict(self.params), batch.x)
            columns = self._columns(logits.detach(), batch.y, mask, noise)[:, 0]
            grads = torch.autograd.grad(logits, list(self.params.values()), columns, materialize_grads=True)
        return {name: grad.square() for name, grad in zip(self.params, grads, strict=True)}

    def _squares(self, x: Tensor, y: Tensor, mask: Tensor, noise: Tensor) -> Params:
        """Return the summed squares of one row."""
        logits, pull = vjp(lambda p: self._logits(p, x[None])[0], self.weights)  # type: ignore[misc]
        columns = self._columns(logits, y, mask, noise)
        if len(columns) == 1:
            return {name: grad.square() for name, grad in pull(columns[0])[0].items()}
        total = {name: torch.zeros_like(p) for name, p in self.weights.items()}
        for part in torch.split(columns, self.at_once()[1]):
            for name, grad in vmap(pull)(part)[0].items():
                total[name] = total[name] + grad.square().sum(dim=0)
        return total

    def _logits(self, params: Params, x: Tensor) -> Tensor:
        """Return the logits [B, C] under `params`."""
        arguments = (x,) if self.position is None else (x, self.position)
        logits: Tensor = functional_call(self.method, params, arguments)
        return logits.float()

    def _columns(self, logits: Tensor, y: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
        """Return [..., K, C], the columns of rows with logits [..., C]."""
        p = logits.masked_fill(~mask, float("-inf")).softmax(dim=-1)
        if self.labels == "exact":
            choice = p.topk(self.top_k).indices  # without a limit: every class that competes
        elif self.labels == "true":
            choice = y[..., None]
        elif self.labels == "predicted":
            choice = p.argmax(dim=-1, keepdim=True)
        else:  # argmax p / noise is a draw from p, needs no cumulative sum and never meets a class without probability
            choice = (p / noise).argmax(dim=-1, keepdim=True)
        columns = torch.eye(p.shape[-1], device=p.device)[choice] - p[..., None, :]
        return columns * p.gather(-1, choice)[..., None].sqrt() if self.labels == "exact" else columns


def normalised(fisher: Params, by: Literal["none", "mean", "max"]) -> Params:
    """Return the importances divided by their overall mean or maximum, so that tasks of any loss scale count equally.

    All zeros stay zeros. Progress & Compress (Schwarz et al., ICML 2018) normalises each task's Fisher.
    """
    if by == "none":
        return fisher
    flat = flatten(fisher)
    scale = flat.mean() if by == "mean" else flat.max()
    return {name: f / scale.clamp(min=torch.finfo(scale.dtype).tiny) for name, f in fisher.items()}


class QuadraticPenalty(Carrier):
    """1/2 sum_i F_i (theta_i - a_i)^2, which remembers the tasks seen so far as one diagonal Gaussian.

    Parameters are matched by name; where one has grown, the entries it began with are penalised and the new ones are
    free.

    Args:
        decay: F <- decay * F + F_task when a task is added.
        mode: "online": all tasks around the latest weights, a <- theta (Huszar, PNAS 2018). "separate": one quadratic
            a task, each around its own weights (Kirkpatrick et al., PNAS 2017). Their sum is again a quadratic up to a
            constant, with summed F and a = the F-weighted mean of the anchors, so that 2 P numbers hold T tasks.
    """

    def __init__(self, decay: float, mode: Literal["online", "separate"] = "online") -> None:
        super().__init__()
        self.decay = decay
        self.mode = mode
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.importance = torch.zeros(0)  # [P]
        self.anchor = torch.zeros(0)  # [P]

    def forward(self, module: nn.Module) -> Tensor:
        """Return the penalty [] of the parameters of `module`; 0 before the first task."""
        if not self.shapes:
            return self.anchor.sum()
        change = flatten(self._view(module)) - self.anchor
        return 0.5 * torch.dot(self.importance * change, change)

    def update(self, module: nn.Module, importance: Params) -> None:
        """Add a task: its `importance`, named as the parameters of `module`, around the present parameters."""
        now = {name: p.detach() for name, p in module.named_parameters() if name in importance}
        old_f, old_a = ({name: torch.zeros_like(p) for name, p in now.items()} for _ in range(2))
        for stored, grown in ((self.importance, old_f), (self.anchor, old_a)):
            for _, before, place in match(unflatten(stored, self.shapes), grown):
                place.copy_(before)
        past, task, theta = flatten(old_f) * self.decay, flatten({n: importance[n] for n in now}), flatten(now)
        self.importance = past + task
        if self.mode == "separate":
            weight = torch.where(self.importance > 0, task / self.importance, torch.ones_like(task))
            theta = torch.lerp(flatten(old_a), theta, weight)
        self.anchor = theta.clone()
        self.shapes = {name: tuple(p.shape) for name, p in now.items()}

    def proximal_(self, module: nn.Module, rate: float) -> None:
        """Move the parameters to argmin |theta' - theta|^2 / 2 + rate * penalty(theta'): stable for any F."""
        if not self.shapes:
            return
        with torch.no_grad():
            views = self._view(module)
            pull = rate * self.importance
            moved = (flatten(views) + pull * self.anchor) / (1 + pull)
            for name, value in unflatten(moved, self.shapes).items():
                views[name].copy_(value)

    def _view(self, module: nn.Module) -> Params:
        """Return the penalised part of each parameter of `module`."""
        params = dict(module.named_parameters())
        return {name: corner(params[name], shape) for name, shape in self.shapes.items()}
