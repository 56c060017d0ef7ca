"""Quantisation of the weights of layers: optimal brain quantisation, or rounding to the nearest value.

Source and deviations: see `obs` and `grid`. Activations are not quantised.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from clrun.blocks.compress.base import Compressed, Compressor, Evidence, Layer
from clrun.blocks.compress.forms import Quantised
from clrun.blocks.compress.grid import Fit, grid_of
from clrun.blocks.compress.obs import damped, error_of, inverse_of, rounded
from clrun.blocks.low_rank import select_ranks
from clrun.system.errors import ConfigError, Positive, Range

Rounding = Literal["obq", "nearest"]
LOWEST, HIGHEST = 2, 8  # bits of a grid
PLAIN = 16  # bits from which on weights stay as they are


@dataclass(frozen=True, kw_only=True)
class ObcQuant(Compressor):
    """Quantisation of weights with 2 to 8 bits by optimal brain quantisation.

    Training leaves the weights free; after the next task they are put on a grid again.

    Attributes:
        target: what `amount` is: "bits" per weight, or "ratio", the fraction of the bytes that is kept.
        amount: a whole number of bits from 2 to 8, or at least 16, which leaves weights as they are; or a ratio from 0
            to 1. With scope=global, bits are the mean over all weights, and may be broken.
        symmetric: whether grids are symmetric around 0.
        fit: how the range of a grid is found: mse or minmax.
        rounding: "obq" lets the weights that are left absorb each error; "nearest" does not, and is the baseline.
        damping: share of the mean second moment that is added to each.
    """

    target: Literal["bits", "ratio"]
    amount: Annotated[float, Range(above=0, maximum=32)]
    symmetric: bool
    fit: Fit
    rounding: Rounding
    damping: Positive

    frees: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the amount."""
        if self.target == "ratio" and self.amount > 1:
            raise ConfigError(f"compress.amount={self.amount:g}: a ratio is the fraction that is kept, at most 1")
        if self.target == "bits" and not (LOWEST <= self.amount <= HIGHEST or self.amount >= PLAIN):
            raise ConfigError(
                f"compress.amount={self.amount:g}: grids have 2 to 8 bits; 16 or more leave weights as they are"
            )
        if self.target == "bits" and self.amount != int(self.amount) and self.scope == "layer":
            raise ConfigError(
                f"compress.amount={self.amount:g}: bits are a whole number, except with compress.scope=global"
            )

    @property
    def words(self) -> str:
        """What is to be reached."""
        what = f"{self.amount:g} bits" if self.target == "bits" else f"ratio {self.amount:g}"
        return f"{what} {'per layer' if self.scope == 'layer' else 'over all layers'}"

    @property
    def neutral(self) -> bool:
        """Whether weights stay as they are."""
        return self.amount >= PLAIN if self.target == "bits" else self.amount == 1

    def bits_of(self, n: int, m: int) -> int:
        """Return the most bits of a layer [n, m] that the target allows; 0 if not even 2 fit."""
        if self.target == "bits":
            return int(self.amount)
        scales = n * (4 + (not self.symmetric))
        found = int((self.amount * 4 * n * m - scales) * 8 / (n * m))
        return min(found, HIGHEST) if found >= LOWEST else 0

    def check_layers(self, layers: Mapping[str, Layer]) -> None:
        """Refuse a ratio that has no room for 2 bits in each layer, or for scope=global in all together.

        Raises:
            ConfigError: see above.
        """
        if self.scope == "layer":
            super().check_layers(layers)
            return
        weights = [layer.weight for layer in layers.values()]
        if not self.neutral and self._room([w.flatten(1) for w in weights]) < 0:
            raise ConfigError(
                f"compress.amount={self.amount:g}: 2 bits per weight and a scale per output take more; use more"
            )

    def check_layer(self, name: str, layer: Layer) -> None:
        """Refuse a ratio that has no room for 2 bits.

        Raises:
            ConfigError: see above.
        """
        n, m = layer.weight.flatten(1).shape
        if not self.neutral and not self.bits_of(n, m):
            raise ConfigError(
                f"compress.amount={self.amount:g}: layer {name} [{n}, {m}] has no room for 2 bits per weight and a "
                "scale per output; use more, or add it to compress.exclude"
            )

    def compress(self, evidence: Evidence) -> dict[str, Compressed]:
        """Return the quantised layers; a layer that takes no fewer bytes so stays as it is."""
        layers = {name: evidence.weight(name).flatten(1).double() for name in evidence.layers}
        found = {}
        if self.rounding == "obq":
            evidence.warn_of_unread(layers, "are rounded to the nearest values")
        for name, bits in self.bits(layers, evidence).items():
            if evidence.layers[name].weight.numel() and bits < PLAIN:
                compressed = self._quantised(name, layers[name], bits, evidence)
                if compressed.form.stored_bytes < compressed.form.dense_bytes:
                    found[name] = compressed
        return found

    def _quantised(self, name: str, matrix: Tensor, bits: int, evidence: Evidence) -> Compressed:
        """Return a layer on grids of so many bits."""
        grid = grid_of(matrix, bits, symmetric=self.symmetric, fit=self.fit)
        values = grid.nearest(matrix)
        hessians = evidence.hessians(name)
        facts = {}
        if hessians is not None:
            size = len(matrix) // len(hessians)
            error = 0.0
            for g, hessian in enumerate(hessians):
                own = slice(g * size, (g + 1) * size)
                if self.rounding == "obq":
                    inverse = inverse_of(damped(hessian, self.damping), name)
                    values[own] = rounded(matrix[own], inverse, grid.rows(own))
                error += float(error_of(values[own] - matrix[own], hessian).sum())
            facts["output_error"] = error
        codes = grid.codes(values).to(torch.uint8)
        shape = tuple(evidence.weight(name).shape)
        zeros = grid.zeros.to(torch.uint8)
        form = Quantised(shape, bits, grid.steps.float(), zeros, codes, symmetric=self.symmetric)
        return Compressed(form, form.weight, facts)

    def bits(self, layers: dict[str, Tensor], evidence: Evidence) -> dict[str, int]:
        """Return the bits of each layer.

        With scope=global they are chosen as HALRP chooses ranks: every layer has 2 bits, and a further bit goes where
        it lowers the loss most per stored bit, until the bytes of the target are spent. The loss is estimated from
        rounding to the nearest value.
        """
        uniform = {name: self.bits_of(*matrix.shape) for name, matrix in layers.items()}
        if self.scope == "layer":
            return uniform
        room = self._room(list(layers.values()))
        scores, costs = {}, {}
        for name, matrix in layers.items():
            losses = self._losses(name, matrix, evidence)
            gains = (losses[:-1] - losses[1:]).clamp_min(0) / matrix.numel()
            scores[name] = gains.flip(0).cummax(0).values.flip(0)  # descending, also where one bit more gains little
            costs[name] = float(matrix.numel())
        more = select_ranks(scores, alpha=1, lowest=0, highest=HIGHEST - LOWEST, costs=costs, budget=room)
        return {name: LOWEST + more[name] for name in layers}

    def _room(self, layers: Sequence[Tensor]) -> float:
        """Return the bits that the target leaves for all layers [n, m] together besides 2 per weight and the scales."""
        count = sum(matrix.numel() for matrix in layers)
        if self.target == "bits":
            return (self.amount - LOWEST) * count
        scales = sum(8 * len(x) * (4 + (not self.symmetric)) for x in layers)
        return self.amount * 32 * count - scales - LOWEST * count

    def _losses(self, name: str, matrix: Tensor, evidence: Evidence) -> Tensor:
        """Return the estimated loss increase of a layer with 2, 3, ..., 8 bits [7]."""
        hessians = evidence.hessians(name)
        found = []
        for bits in range(LOWEST, HIGHEST + 1):
            change = grid_of(matrix, bits, symmetric=self.symmetric, fit=self.fit).nearest(matrix) - matrix
            parts = change.chunk(len(hessians)) if hessians is not None else ()
            pairs = zip(parts, hessians, strict=True) if hessians is not None else ()
            found.append(sum(float(error_of(part, hessian).sum()) for part, hessian in pairs))
        return 0.5 * evidence.outputs.get(name, 0.0) * torch.tensor(found, dtype=torch.float64)


__all__ = ["ObcQuant"]
