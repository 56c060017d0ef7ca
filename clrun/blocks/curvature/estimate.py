"""One entry to every estimate of curvature."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from clrun.blocks.curvature.forms import Curvature, Diagonal
from clrun.blocks.curvature.gradients import diagonal, gram
from clrun.blocks.curvature.kfac import kronecker
from clrun.blocks.curvature.layers import Groups, Sharing, layers_of
from clrun.blocks.curvature.target import Labels, Target
from clrun.data.split import Split
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.method import Method
from clrun.system.errors import ConfigError

Kind = Literal["diag", "kfac_expand", "kfac_reduce", "gram", "abs_output"]


def estimate(
    kind: Kind,
    method: Method,
    split: Split,
    ctx: Context,
    *,
    of: nn.Module,
    labels: Labels,
    samples: int | None,
    top_k: int | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    modules: Sequence[str] = ("*",),
    largest: int | None = None,
    groups: Groups = "skip",
    limit: int | None = None,
) -> Curvature:
    """Return an estimate of the Fisher information F, per-sample mean, for the trainable parameters of `of`.

    Every label policy is a set of columns s [C] in logit space, F = 1/N sum_n sum_s (J_n' s)(J_n' s)' with J_n the
    Jacobian of the logits. Only classes that compete in the run's setting have probability.

    Args:
        kind: "diag": the diagonal. "kfac_expand", "kfac_reduce": a Kronecker product for each linear and convolutional
            layer, and the diagonal for every other parameter (norms, tokens, position embeddings); expand is the safe
            choice and that of class tokens, reduce that of networks that average over positions. "gram": the matrix
            itself, as one row a gradient. "abs_output": no Fisher but the diagonal 1/N sum_n |d |f(x_n)|^2 / d theta|
            of the logits of competing classes, which needs no labels (MAS, Aljundi et al., ECCV 2018, 1711.09601).
        method: the learner; afterwards it is bitwise what it was.
        split: rows to estimate on; every process reads the same ones.
        ctx: context of the current task; its generator "fisher" chooses rows and labels.
        of: submodule of `method`; the names of the result are its own.
        labels: "exact": sqrt(p_c) (e_c - p) for every class c, the closed form of the expectation over y ~ p; all
            others take one e_y - p: "sampled", one y ~ p a row, unbiased; "true", the row's label (empirical Fisher:
            biased, 0 where the model fits); "predicted", the most probable class (biased); "batched", y ~ p for a
            whole batch (of the budget's size) and B times the square of the mean gradient: unbiased, because the B
            gradients are independent with mean 0, at the cost of one backward a batch, with more variance. For
            Kronecker factors "batched" is "sampled". For "abs_output" it stands for the published codes, whose
            gradients of one batch cancel before the absolute value is taken; anything else takes it row by row.
        samples: rows used, drawn without replacement; None for all.
        top_k: with "exact", sum over the k most probable classes of a row and add nothing for the rest; None for all.
        include: patterns of the shell for the names of parameters that count; one must match.
        exclude: patterns none of which may match.
        modules: patterns for the names of layers with Kronecker factors; one must match.
        largest: most inputs or outputs of such a layer, whose factors have that many squared numbers; None: no limit.
        groups: of convolutions: "skip" gives them a diagonal, "average" takes groups as positions.
        limit: most rows of "gram".
    """
    columns = "output" if kind == "abs_output" else labels
    target = Target.of(
        method, split, ctx, of, columns=columns, samples=samples, top_k=top_k, include=include, exclude=exclude
    )
    batched = labels == "batched"
    if kind in ("diag", "abs_output"):
        return diagonal(target, batched=batched, magnitude=torch.square if kind == "diag" else torch.abs)
    if kind == "gram":
        return gram(target, batched=batched, limit=limit)
    sharing = "expand" if kind == "kfac_expand" else "reduce"
    return kronecker(target, of, sharing, modules=modules, largest=largest, groups=groups)  # type: ignore[arg-type]


@dataclass(frozen=True)
class KroneckerFisher:
    """The Fisher information with Kronecker factors, by options that a method holds; see `estimate`.

    Attributes:
        labels: how labels are chosen.
        samples: rows used; None for all.
        top_k: most columns of a row with labels="exact"; None for all.
        sharing: "expand" or "reduce": how positions share a weight.
        modules: patterns for the names of layers with Kronecker factors.
        largest: most inputs or outputs of such a layer.
        groups: what becomes of grouped convolutions.
    """

    labels: Labels
    samples: int | None
    top_k: int | None
    sharing: Sharing
    modules: Sequence[str]
    largest: int
    groups: Groups

    def __post_init__(self) -> None:
        """Check combinations."""
        require_exact(self.labels, self.top_k)

    def check(self, backbone: nn.Module) -> None:
        """Refuse a pattern that no layer of the backbone fits.

        Raises:
            ConfigError: there is one.
        """
        for pattern in self.modules:
            if pattern != "*" and not layers_of(backbone, modules=[pattern], groups="average"):
                known = ", ".join(layers_of(backbone, groups="average"))
                raise ConfigError(f"method.modules: no layer fits '{pattern}' (layers: {known})")

    def __call__(self, method: Method, task: Task, ctx: Context) -> Curvature:
        """Return that of the backbone of `method` on `task`."""
        return estimate(
            "kfac_expand" if self.sharing == "expand" else "kfac_reduce",
            method,
            task.train,
            ctx,
            of=method.backbone,
            labels=self.labels,
            samples=self.samples,
            top_k=self.top_k,
            modules=self.modules,
            largest=self.largest,
            groups=self.groups,
        )


def require_exact(labels: Labels, top_k: int | None) -> None:
    """Refuse a limit of the classes summed over where no sum is taken.

    Raises:
        ConfigError: `top_k` is given, and labels are not "exact".
    """
    if top_k is not None and labels != "exact":
        raise ConfigError(f"method.top_k: says which classes method.labels=exact sums over; labels is {labels}")


def diagonal_fisher(
    method: Method,
    split: Split,
    ctx: Context,
    *,
    of: nn.Module,
    labels: Labels,
    samples: int | None,
    top_k: int | None = None,
) -> Diagonal:
    """Return the diagonal of the Fisher information; see `estimate`."""
    found = estimate("diag", method, split, ctx, of=of, labels=labels, samples=samples, top_k=top_k)
    assert isinstance(found, Diagonal)
    return found
