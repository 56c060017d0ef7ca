"""RegMean: merged layers that reproduce the outputs of the single ones on their own inputs, in least squares.

Shapes: a layer has a weight [O, I], which includes the bias as a last column if the layer has one.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from clrun.blocks.merging.averages import Mean
from clrun.blocks.merging.base import Evidence, Merge, Total
from clrun.blocks.merging.evidence import input_grams
from clrun.blocks.moments import Gram
from clrun.blocks.params import Params, eval_mode, flatten, select, unflatten
from clrun.blocks.statistics import SymmetricSum
from clrun.system.errors import Fraction, NonNegative

SINGULAR = 1e-10  # smallest eigenvalue, of a second-moment matrix with diagonal 1, that is used


class RegMean(Merge):
    """W* = [sum_t W_t G_t] [sum_t G_t]^-1 for each layer (Jin et al., ICLR 2023, arXiv 2212.09849, equation 2).

    G_t [I, I] is the second-moment matrix of the inputs of layer t, with its off-diagonal entries multiplied by alpha
    and delta added to its diagonal. Parameters of no such layer (norms, embeddings) are averaged. W* minimises
    sum_t |X_t (W - W_t)'|^2 for alpha = 1 and delta = 0: with sums of moments, least-squares fits merge to the joint
    fit. alpha = 0 is the mean weighted by the diagonal; delta to infinity is the plain mean.

    Where the sum is singular (inputs that are always 0), the directions without moments are copied from the newest
    model, so that merging equal models changes nothing.

    State: sum_t G_t and sum_t W_t G_t for each layer, one sum of the other parameters.

    Args:
        alpha: factor of the off-diagonal entries, 0 to 1.
        gram: "sum" over the rows, so that a task weighs by its rows; "mean", so that all tasks weigh alike.
        delta: damping, added to the diagonal of every G_t (never to their sum alone).
    """

    needs = frozenset({"grams"})

    def __init__(self, *, alpha: Fraction, gram: Literal["sum", "mean"], delta: NonNegative) -> None:
        super().__init__()
        self.alpha, self.gram, self.delta = alpha, gram, delta
        self.layers: dict[str, list[str]] = {}  # the names of weight and bias, by the name of the layer
        self.moments, self.products = nn.ModuleList(), nn.ModuleList()
        self.mean = Mean()

    def _add(self, model: Tensor, evidence: Evidence, key: int, weight: float) -> None:
        params = unflatten(model, self.shapes)
        if not self.models:
            self._allocate(evidence.grams, model.device)
        for index, (layer, names) in enumerate(self.layers.items()):
            if layer not in evidence.grams:
                raise ValueError(f"RegMean: the model has no second moments of the inputs of layer {layer}")
            moments = weight * self._shrunk(evidence.grams[layer])
            whole = matrix_of(params, names).double()
            self.products[index].plus(whole @ moments)  # type: ignore[operator]
            total = self.moments[index]
            if isinstance(total, SymmetricSum):
                term = SymmetricSum(0)
                term.matrix = moments.tril()
                total.add(term)
            else:
                total.plus(moments)  # type: ignore[operator]
        self.mean.add({name: p for name, p in params.items() if name in self.mean.shapes}, weight=weight)

    def _allocate(self, grams: Mapping[str, Gram], device: torch.device) -> None:
        """Make the sums for the layers with second moments."""
        for layer, gram in grams.items():
            names = [f"{layer}.{part}" if layer else part for part in ("weight", "bias")]
            if names[0] not in self.shapes:
                continue
            outputs, width = self.shapes[names[0]][0], len(gram.matrix)
            if width == prod(self.shapes[names[0]][1:]):
                names = names[:1]
            self.layers[layer] = names
            kind = SymmetricSum(width) if self.exact else Total(width, width, exact=False)
            self.moments.append(kind.to(device))
            self.products.append(Total(outputs, width, exact=self.exact).to(device))
        inside = {name for names in self.layers.values() for name in names}
        rest = {name: torch.empty(shape, device=device) for name, shape in self.shapes.items() if name not in inside}
        self.mean.begin(rest, exact=self.exact)
        self.mean.types = {name: torch.float64 for name in rest}

    def _shrunk(self, gram: Gram) -> Tensor:
        """Return the moments G_t [I, I] float64 that are added."""
        matrix = gram.matrix.double() / (gram.rows if self.gram == "mean" else 1)
        diagonal = matrix.diagonal()
        return self.alpha * matrix + torch.diag((1 - self.alpha) * diagonal + self.delta)

    def _value(self, newest: Tensor | None) -> Tensor:
        start = None if newest is None else unflatten(newest.double(), self.shapes)
        merged = self.mean.value() if self.mean.shapes else {}
        for index, names in enumerate(self.layers.values()):
            moments: Tensor = self.moments[index].value().double()  # type: ignore[operator]
            products: Tensor = self.products[index].value().double()  # type: ignore[operator]
            near = torch.zeros_like(products) if start is None else matrix_of(start, names)
            solved = near + solve_near(moments, products - near @ moments)
            columns = [solved[:, :-1], solved[:, -1]] if len(names) == 2 else [solved]
            merged |= {n: part.reshape(self.shapes[n]) for n, part in zip(names, columns, strict=True)}
        return flatten({name: merged[name] for name in self.shapes})


def matrix_of(params: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """Return the weight [O, I] of a layer from its weight and, if named, its bias as the last column."""
    weight = params[names[0]].flatten(1)
    return weight if len(names) == 1 else torch.cat([weight, params[names[1]][:, None]], dim=1)


def solve_near(moments: Tensor, products: Tensor) -> Tensor:
    """Return X [O, I] with X moments = products; 0 in the directions in which `moments` [I, I] is singular."""
    scale = moments.diagonal().clamp(min=0).rsqrt()
    scale = torch.where(scale.isfinite(), scale, torch.zeros_like(scale))
    unit = scale[:, None] * moments * scale
    factor, failed = torch.linalg.cholesky_ex(unit)
    if not bool(failed) and float(factor.diagonal().min()) ** 2 > SINGULAR:
        return torch.cholesky_solve(scale[:, None] * products.T, factor).T * scale
    values, vectors = torch.linalg.eigh(unit)
    inverse = torch.where(values > SINGULAR, 1 / values, torch.zeros_like(values))
    solved: Tensor = (products * scale) @ (vectors * inverse) @ vectors.T * scale
    return solved


def regmean_plus(models: Sequence[nn.Module], inputs: Sequence[Iterable[Tensor]], rule: RegMean) -> Params:
    """Return the parameters of models merged by RegMean++ (arXiv 2508.03121; code FusionBench, MIT).

    The second moments of a block are those of what it reads behind the merged blocks before it, not behind the model's
    own ones. For each block in turn: every model's own block runs on the outputs of the merged blocks, the block is
    merged by RegMean with the moments of its layers, and the outputs pass through the merged block. Other parameters
    (embeddings, norms) are averaged. This needs all models and rows of all tasks at the same time, so that it is no
    accumulator. Running statistics are those of the first model.

    Args:
        models: networks with the same parameters and a sequence of blocks, see `chain_of`; they are not changed.
        inputs: prepared batches [B, ...] of the task of each model.
        rule: an unused rule with the options; a new one of the same kind is used for every block.

    Raises:
        ValueError: the network has no sequence of blocks.
    """
    merged = copy.deepcopy(models[0])
    mean = Mean()
    for model in models:
        mean.add(select(model))
    _load(merged, mean.value())
    names = chain_of(merged)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for network in (merged, *models):
            stack.enter_context(eval_mode(network))
        passing = [_inputs_of(merged, names[0], batches) for batches in inputs]
        for name in names:
            block = merged.get_submodule(name)
            one = RegMean(alpha=rule.alpha, gram=rule.gram, delta=rule.delta)
            for model, batches in zip(models, passing, strict=True):
                own = model.get_submodule(name)
                if grams := input_grams(own, batches):
                    one.add(select(own), Evidence(grams=grams))
            if one.models:
                _load(block, one.value(select(block)))
            passing = [[block(x) for x in batches] for batches in passing]
    return {name: p.detach() for name, p in select(merged).items()}


def chain_of(module: nn.Module) -> list[str]:
    """Return the names of the blocks of a network, each of which reads the output of the one before.

    They are in `blocks` of a vision transformer, or in `layers` of clrun's own small networks.

    Raises:
        ValueError: the network is neither.
    """
    for attribute in ("blocks", "layers"):
        blocks = getattr(module, attribute, None)
        if isinstance(blocks, nn.Sequential | nn.ModuleList) and len(blocks):
            return [f"{attribute}.{name}" for name, _ in blocks.named_children()]
    raise ValueError(f"{type(module).__name__} has no sequence of blocks")


def _load(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set parameters of a module by name."""
    with torch.no_grad():
        for name, parameter in select(module).items():
            parameter.copy_(values[name])


def _inputs_of(module: nn.Module, block: str, batches: Iterable[Tensor]) -> list[Tensor]:
    """Return what the block with this name reads when the module is called with each of the batches."""
    found: list[Tensor] = []
    handle = module.get_submodule(block).register_forward_pre_hook(lambda module, args: found.append(args[0]))
    try:
        for x in batches:
            module(x)
    finally:
        handle.remove()
    return found


__all__ = ["RegMean", "chain_of", "regmean_plus", "solve_near"]
