"""`estimate`, the one function behind every estimate of curvature, and the sets of its options that methods share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from clrun.blocks.curvature.forms import Curvature, Diagonal
from clrun.blocks.curvature.gradients import diagonal
from clrun.blocks.curvature.kfac import kronecker
from clrun.blocks.curvature.layers import Groups, Sharing, layers_of, named_too_large, tables_of
from clrun.blocks.curvature.target import Columns, Labels, Target
from clrun.data.split import Split
from clrun.data.stream import Task
from clrun.learning.context import Context
from clrun.learning.method import Method
from clrun.system.errors import ConfigError, warn

Kind = Literal["diag", "kfac_expand", "kfac_reduce", "abs_output"]


def estimate(
    kind: Kind,
    method: Method,
    split: Split,
    ctx: Context,
    *,
    of: nn.Module,
    labels: Columns,
    samples: int | None,
    top_k: int | None = None,
    modules: Sequence[str] = ("*",),
    largest: int | None = None,
    groups: Groups = "skip",
    tables: bool = False,
) -> Curvature:
    """Return an estimate of the Fisher information F, the mean over rows, for the trainable parameters of `of`.

    F = 1/N sum_n sum_s (J_n' s)(J_n' s)', where J_n is the Jacobian of the logits of row n and s [C] are the columns of
    that row. `labels` says which columns a row has. Below, p [C] are the predicted probabilities of a row and e_c is
    the unit vector of class c. Only classes that compete in the method's training loss have a probability above 0.

    Args:
        kind: "diag": the diagonal of F. "kfac_expand", "kfac_reduce": a Kronecker product per linear and convolutional
            layer, and the diagonal for all other parameters (norms, tokens, position embeddings). Use "kfac_expand" if
            in doubt and for networks with a class token, "kfac_reduce" for networks that average over positions.
            "abs_output": not F but the diagonal 1/N sum_n |d |f(x_n)|^2 / d theta| for the logits f(x_n) of the
            competing classes, which needs no labels (MAS, Aljundi et al., ECCV 2018, arXiv 1711.09601).
        method: the method; afterwards it is bitwise as before.
        split: the rows of the estimate; every process reads the same ones.
        ctx: context of the current task; its generator "fisher" draws rows and labels.
        of: a submodule of `method`; the result has the parameter names of this submodule.
        labels: "exact": the columns sqrt(p_c) (e_c - p) of all classes c, which is the closed form of the expectation
            over labels y ~ p. All other choices have one column e_y - p per row. "sampled": y ~ p, unbiased.
            "empirical": the label of the row (the empirical Fisher: biased, and 0 where the method fits the label).
            "predicted": the most probable class (biased). "batched": y ~ p, and B times the square of the mean gradient
            over each batch of B rows (the budget's batch size); this is unbiased, because the B gradients are
            independent with mean 0, and costs one backward pass per batch, but has a larger variance. For Kronecker
            factors "batched" is the same as "sampled". For "abs_output", "batched" follows the published code, where
            gradients of a batch cancel before the absolute value is taken; all other choices take the absolute value
            row by row. For a squared error 1/2 |f - y|^2, whose curvature needs no labels: "unit" (exact) and "normal"
            (unbiased, one column per row).
        samples: number of rows, drawn without replacement; None for all.
        top_k: for "exact", the number of most probable classes that are summed over; None for all.
        modules: shell-style patterns for the names of layers with Kronecker factors; one must match.
        largest: largest number of inputs or outputs of such a layer, whose factors hold the square of that many
            numbers; None for no limit.
        groups: convolutions with several groups: "skip" estimates their diagonal, "average" treats groups as positions.
        tables: whether tables of embeddings have a Kronecker product, too (`KroneckerTable`), instead of a diagonal;
            their positions are always those of "kfac_expand".
    """
    columns = "output" if kind == "abs_output" else labels
    target = Target.of(method, split, ctx, of, columns=columns, samples=samples, top_k=top_k)
    if kind in ("diag", "abs_output"):
        magnitude = torch.square if kind == "diag" else torch.abs
        return diagonal(target, batched=labels == "batched", magnitude=magnitude)
    sharing: Sharing = "expand" if kind == "kfac_expand" else "reduce"
    return kronecker(target, of, sharing, modules=modules, largest=largest, groups=groups, tables=tables)


@dataclass(frozen=True)
class KroneckerFisher:
    """The options of a Fisher information with Kronecker factors, which can be called for its estimate.

    Attributes:
        labels: how the columns of a row are chosen; see `estimate`.
        samples: number of rows; None for all.
        top_k: for labels="exact", the number of most probable classes that are summed over; None for all.
        sharing: "expand" or "reduce"; how positions share a weight, see `clrun.blocks.curvature.layers`.
        modules: patterns for the names of layers with Kronecker factors.
        largest: largest number of inputs or outputs of such a layer.
        groups: treatment of convolutions with several groups; see `estimate`.
        tables: whether tables of embeddings have a Kronecker product; see `estimate`.
    """

    labels: Columns
    samples: int | None
    top_k: int | None
    sharing: Sharing
    modules: Sequence[str]
    largest: int
    groups: Groups
    tables: bool = False

    def __post_init__(self) -> None:
        """Check combinations of options."""
        require_exact(self.labels, self.top_k)

    def check(self, backbone: nn.Module) -> None:
        """Refuse a pattern that matches no layer of the backbone, and warn of layers that are too large for factors.

        Raises:
            ConfigError: there is such a pattern.
        """
        for pattern in self.modules:
            tables = tables_of(backbone, modules=[pattern]) if self.tables else {}
            if pattern != "*" and not tables and not layers_of(backbone, modules=[pattern], groups="average"):
                names = ", ".join(layers_of(backbone, groups="average"))
                raise ConfigError(f"method.modules: no layer matches '{pattern}' (layers: {names})")
        message = named_too_large(backbone, self.largest, "method.largest", modules=self.modules, groups=self.groups)
        if message:
            warn(message)

    def __call__(self, method: Method, task: Task, ctx: Context) -> Curvature:
        """Return the estimate for the backbone of `method` on the training rows of `task`."""
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
            tables=self.tables,
        )


def require_exact(labels: Columns, top_k: int | None) -> None:
    """Refuse a limit on the classes that are summed over if there is no such sum.

    Raises:
        ConfigError: `top_k` is given, and labels are not "exact".
    """
    if top_k is not None and labels != "exact":
        raise ConfigError(
            f"method.top_k: limits the sum over classes of method.labels=exact, but method.labels is {labels}; "
            "set method.top_k=null or method.labels=exact"
        )


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


__all__ = ["Kind", "KroneckerFisher", "diagonal_fisher", "estimate", "require_exact"]
