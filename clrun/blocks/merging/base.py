"""The accumulator that every rule for merging networks is, and the sums that it is made of.

Shapes: `P` entries of all merged parameters together, in one vector.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from clrun.blocks.moments import Gram
from clrun.blocks.params import Carrier, Params, Shapes, flatten, shapes_of, unflatten
from clrun.blocks.statistics import ExactSum


@dataclass(frozen=True)
class Evidence:
    """The statistics of one model on its own task that a rule may weight its parameters with.

    Attributes:
        fisher: diagonal of the Fisher information, by parameter name.
        grams: second moments of a layer's inputs, by the name of the layer.
    """

    fisher: Mapping[str, Tensor] = field(default_factory=dict)
    grams: Mapping[str, Gram] = field(default_factory=dict)


class Total(ExactSum):
    """A running sum of tensors of the same shape.

    Args:
        shape: shape of the terms.
        exact: sum in float64 with the rounding errors beside it (8 to 16 bytes per entry), so that the order of the
            terms does not change a bit; or in float32 (4 bytes per entry).
    """

    def __init__(self, *shape: int, exact: bool) -> None:
        super().__init__(*shape)
        self.exact = exact
        if not exact:
            self.high = torch.zeros(shape)

    def plus(self, term: Tensor) -> None:
        """Add a tensor of any floating type, which is not changed."""
        term = term.detach().to(self.high.device)
        if self.exact:
            self._add(term.clone() if term.dtype == torch.float64 else term.double())
        else:
            self.high = self.high + term.to(self.high.dtype)


class Merge(Carrier):
    """A rule that makes one network of several, as an accumulator: models are added one by one.

    Where a rule `commutes`, the value is the same for every order of the models, bit for bit with `exact`. Adding
    models one by one equals merging all of them at once for every rule, because `add` is all there is.

    Only named parameters are merged. Heads never enter, because their rows belong to classes; integer buffers and
    running statistics do not enter either (see `clrun.blocks.merging.evidence.estimate_statistics`).
    """

    needs: frozenset[str] = frozenset()  # the evidence that `add` reads: "fisher", "grams"
    reads_initial: bool = False  # whether the value depends on the weights that all models started from
    every_step: bool = False  # whether models are added after every optimizer step, not after every task
    commutes: bool = True  # whether the value does not depend on the order of the models

    def __init__(self) -> None:
        super().__init__()
        self.exact = True
        self.shapes: Shapes = {}
        self.types: dict[str, torch.dtype] = {}
        self.initial = torch.zeros(0)  # theta_0 [P]; empty unless the rule reads it or `begin` was told to keep it
        self.models = 0  # number of models added

    def begin(
        self, initial: Mapping[str, Tensor], *, linear: Collection[str] = (), keep: bool = False, exact: bool = True
    ) -> None:
        """Fix the merged parameters and the weights theta_0 from which all models start; called once, before `add`.

        Args:
            initial: theta_0 by name.
            linear: names of the parameters that are weights of linear layers, which `Opcm` and `Dop` treat apart.
            keep: store theta_0 even if the rule does not read it.
            exact: keep sums exactly, see `Total`, and other state in float64; otherwise all state is in float32.
        """
        self.exact = exact
        self.shapes = shapes_of(initial)
        self.types = {name: p.dtype for name, p in initial.items()}
        self.linear = [name for name in self.shapes if name in set(linear)]
        if self.reads_initial or keep:
            self.initial = flatten(initial).detach().clone()
        self._begin(sum(p.numel() for p in initial.values()))
        self.to(next(iter(initial.values())).device if initial else "cpu")

    def add(
        self,
        model: Mapping[str, Tensor],
        evidence: Evidence | None = None,
        *,
        key: int = 0,
        weight: float = 1.0,
    ) -> None:
        """Add a model.

        Args:
            model: its parameters by name; names that `begin` did not see are ignored.
            evidence: what the rule `needs` of this model.
            key: identity of the model's task, which seeds what the rule draws at random.
            weight: coefficient of the model, above 0; rules of task vectors multiply the vector by it.

        Raises:
            ValueError: a parameter or the evidence is missing, or has another shape.
        """
        if not self.shapes:
            if self.reads_initial:
                raise ValueError(f"{type(self).__name__} needs the initial weights: call begin before add")
            self.begin(model)
        evidence = evidence or Evidence()
        if missing := [need for need in sorted(self.needs) if not getattr(evidence, need)]:
            raise ValueError(f"{type(self).__name__}: the model has no {' and no '.join(missing)}")
        self._add(self.vector(model), evidence, key, weight)
        self.models += 1

    def value(self, newest: Mapping[str, Tensor] | None = None) -> Params:
        """Return the merged parameters by name, in the type of the models.

        Args:
            newest: parameters of the newest model. Names that the rule does not know are copied from it, and so are
                entries on which no model has any weight.

        Raises:
            ValueError: no model was added.
        """
        if not self.models:
            raise ValueError(f"{type(self).__name__}: there is nothing to merge yet")
        merged = self._value(None if newest is None else self.vector(newest))
        found = {name: part.to(self.types[name], copy=True) for name, part in unflatten(merged, self.shapes).items()}
        return found if newest is None else {name: found.get(name, p.detach()) for name, p in newest.items()}

    def vector(self, params: Mapping[str, Tensor]) -> Tensor:
        """Return the merged parameters of a model as one vector [P].

        Raises:
            ValueError: one is missing or has another shape.
        """
        for name, shape in self.shapes.items():
            if name not in params or tuple(params[name].shape) != shape:
                found = "none" if name not in params else str(tuple(params[name].shape))
                raise ValueError(f"{name}: expected a parameter of shape {shape}, found {found}")
        return flatten({name: params[name].detach() for name in self.shapes})

    def params(self, vector: Tensor) -> Params:
        """Return views of a vector [P] by parameter name: the inverse of `vector`."""
        return unflatten(vector, self.shapes)

    def fisher(self, evidence: Evidence) -> Tensor:
        """Return the diagonal Fisher information of a model as one vector [P] float64."""
        return self.vector(evidence.fisher).double()

    @property
    def kind(self) -> torch.dtype:
        """The type of the state that is no sum."""
        return torch.float64 if self.exact else torch.float32

    @property
    def bytes(self) -> int:
        """Bytes of the tensors of the state."""
        return sum(t.nbytes for m in self.modules() for t in vars(m).values() if isinstance(t, Tensor))

    # --- what a rule defines

    def _begin(self, size: int) -> None:
        """Allocate the state for `size` = P entries."""

    def _add(self, model: Tensor, evidence: Evidence, key: int, weight: float) -> None:
        """Add the model [P]."""
        raise NotImplementedError

    def _value(self, newest: Tensor | None) -> Tensor:
        """Return the merged vector [P]."""
        raise NotImplementedError


def linear_weights(module: nn.Module) -> list[str]:
    """Return the names of the weights [O, I] of the linear layers of `module`."""
    found = [(name, layer) for name, layer in module.named_modules() if type(layer) is nn.Linear]
    return [f"{name}.weight" if name else "weight" for name, _ in found]


__all__ = ["Evidence", "Gram", "Merge", "Total", "linear_weights"]
