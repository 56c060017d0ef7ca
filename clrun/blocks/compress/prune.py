"""Pruning of the weights of layers: by magnitude, by optimal brain surgery, and by M-FAC's empirical Fisher matrix."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clrun.blocks.compress.base import Compressed, Compressor, Evidence, Layer
from clrun.blocks.compress.forms import FLOAT, MOST_PATTERNS, Sparse, columns_of, from_columns
from clrun.blocks.compress.obs import (
    damped,
    error_of,
    inverse_of,
    refit,
    removal_in_groups,
    removal_of_blocks,
    removal_order,
)
from clrun.blocks.low_rank import bits_bytes
from clrun.system.errors import ConfigError, NonNegative, Positive, PositiveInt


@dataclass(frozen=True, kw_only=True)
class Pruner(Compressor):
    """The base of pruners.

    Attributes:
        target: what `amount` is: "sparsity", the fraction of weights that are removed; or "ratio", the fraction of the
            bytes that is kept, the places of the kept weights included.
        amount: from 0 to 1. Sparsity 0 and ratio 1 leave weights as they are.
    """

    target: Literal["sparsity", "ratio"]
    amount: NonNegative

    def __post_init__(self) -> None:
        """Check the amount."""
        if self.target == "sparsity" and self.amount >= 1:
            raise ConfigError(f"compress.amount={self.amount:g}: a sparsity is the fraction that is removed, below 1")
        if self.target == "ratio" and not 1 / 32 < self.amount <= 1:
            raise ConfigError(
                f"compress.amount={self.amount:g}: a ratio is the fraction of the bytes that is kept, above 1/32, "
                "which the places of the kept weights take, and at most 1"
            )

    @property
    def words(self) -> str:
        """What is to be reached."""
        return f"{self.target} {self.amount:g} {'per layer' if self.scope == 'layer' else 'over all layers'}"

    @property
    def neutral(self) -> bool:
        """Whether nothing is removed."""
        return self.amount == (0 if self.target == "sparsity" else 1)

    def removed(self, count: int) -> int:
        """Return how many of `count` weights are removed."""
        if self.target == "sparsity":
            return int(self.amount * count + 1e-9)
        return count - max(0, int((self.amount * FLOAT * count - bits_bytes(count)) // FLOAT))

    def check_layers(self, layers: Mapping[str, Layer]) -> None:
        """Refuse a ratio that leaves no weight of a layer, or for scope=global of all together.

        Raises:
            ConfigError: see above.
        """
        super().check_layers(layers)
        counts = {name: layer.weight.numel() for name, layer in layers.items()}
        if self.scope == "global":
            counts = {"the layers together": sum(counts.values())}
        for name, count in counts.items():
            if count <= self.removed(count):
                what = name if self.scope == "global" else f"layer {name}"
                raise ConfigError(
                    f"compress.amount={self.amount:g}: no weight of {what} would be left; use another amount, or "
                    "add small layers to compress.exclude"
                )

    def compress(self, evidence: Evidence) -> dict[str, Compressed]:
        """Return the pruned layers; weights that are removed stay removed, and a target that is met changes nothing."""
        gone = {name: removed_before(name, evidence) for name in evidence.layers}
        if self.scope == "layer":
            open_ = {name: mask for name, mask in gone.items() if int(mask.sum()) < self.removed(mask.numel())}
        else:
            total = sum(mask.numel() for mask in gone.values())
            open_ = gone if sum(int(mask.sum()) for mask in gone.values()) < self.removed(total) else {}
        return self.prune(open_, evidence) if open_ else {}

    def prune(self, gone: Mapping[str, Tensor], evidence: Evidence) -> dict[str, Compressed]:
        """Return the pruned layers among those of `gone`.

        Args:
            gone: by layer, the mask of weights that are removed already, in the shape of the weight.
            evidence: of the network.
        """
        raise NotImplementedError

    def chosen(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return by layer which entries are removed, bool: those of the lowest scores, in each layer or of all.

        Of equal scores the first are removed. Entries that are removed already have the score -1.
        """
        if self.scope == "layer":
            return {name: lowest(score, self.removed(score.numel())) for name, score in scores.items()}
        pooled = torch.cat([score.flatten() for score in scores.values()])
        mask = lowest(pooled, self.removed(len(pooled)))
        parts = torch.split(mask, [score.numel() for score in scores.values()])
        return {name: part.view(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


def removed_before(name: str, evidence: Evidence) -> Tensor:
    """Return the mask of the weights of a layer that an earlier task has removed, in the shape of the weight."""
    form = evidence.forms.of(name)
    return ~form.kept if isinstance(form, Sparse) else torch.zeros_like(evidence.weight(name), dtype=torch.bool)


def lowest(scores: Tensor, count: int) -> Tensor:
    """Return the mask of the `count` lowest scores; of equal ones the first."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.flatten().argsort(stable=True)[:count]] = True
    return mask.view(scores.shape)


def parsed_pattern(text: str | None) -> tuple[int, int] | None:
    """Return (N, M) of a pattern "N:M".

    Raises:
        ConfigError: the text is none.
    """
    if text is None:
        return None
    left, colon, right = text.partition(":")
    if not (colon and left.isdecimal() and right.isdecimal() and len(text) < 8):
        raise ConfigError(f"compress.pattern={text}: expected N:M, such as 2:4, which keeps 2 of every 4 columns")
    n, m = int(left), int(right)
    if not 0 < n < m:
        raise ConfigError(f"compress.pattern={text}: N of every M columns are kept, so N must be below M and above 0")
    if math.comb(m, n) > MOST_PATTERNS:
        raise ConfigError(f"compress.pattern={text}: a group has too many patterns; M up to 16 is always possible")
    return n, m


@dataclass(frozen=True, kw_only=True)
class Structured(Pruner):
    """The base of pruners that can remove weights in a pattern.

    Attributes:
        pattern: "N:M" keeps exactly N of every M consecutive columns, instead of `target` and `amount`; null for none.
            Columns of a convolution are ordered by place in the window first, so that they run over its inputs.
    """

    pattern: str | None

    def __post_init__(self) -> None:
        """Check the amount and the pattern."""
        parsed = parsed_pattern(self.pattern)
        if parsed is None:
            super().__post_init__()
        elif self.scope == "global":
            raise ConfigError("compress.pattern: is the same in every layer; set compress.scope=layer")

    @property
    def places(self) -> tuple[int, int] | None:
        """N and M of the pattern."""
        return parsed_pattern(self.pattern)

    @property
    def words(self) -> str:
        """What is to be reached."""
        return super().words if self.pattern is None else f"{self.pattern} in every layer"

    @property
    def neutral(self) -> bool:
        """Whether nothing is removed."""
        return self.pattern is None and super().neutral

    def removed(self, count: int) -> int:
        """Return how many of `count` weights are removed."""
        if self.places is None:
            return super().removed(count)
        n, m = self.places
        return count // m * (m - n)

    def check_layer(self, name: str, layer: Layer) -> None:
        """Refuse a layer whose columns are no whole number of groups.

        Raises:
            ConfigError: see above.
        """
        columns = layer.weight.flatten(1).shape[1]
        if self.places is not None and columns % self.places[1]:
            raise ConfigError(
                f"compress.pattern={self.pattern}: layer {name} has {columns} columns, which is no multiple of "
                f"{self.places[1]}; add it to compress.exclude, as in compress.exclude=[{name}]"
            )


@dataclass(frozen=True, kw_only=True)
class MagnitudePrune(Structured):
    """Remove the weights of the smallest magnitude, with scope=global those of all layers together."""

    @property
    def differentiates(self) -> bool:
        """Never: magnitudes are compared."""
        return False

    def prune(self, gone: Mapping[str, Tensor], evidence: Evidence) -> dict[str, Compressed]:
        """Return the pruned layers; the weights that are kept stay as they are."""
        scores = {name: evidence.weight(name).abs().masked_fill(mask, -1.0) for name, mask in gone.items()}
        masks = self.chosen(scores) if self.places is None else {n: self._in_groups(s) for n, s in scores.items()}
        last, found = self.places is not None, {}
        for name, mask in masks.items():
            weight = evidence.weight(name).masked_fill(mask, 0.0)
            form = Sparse(tuple(weight.shape), ~mask, pattern=self.places, channels_last=last)
            found[name] = Compressed(form, weight)
        return found

    def _in_groups(self, scores: Tensor) -> Tensor:
        """Return which entries are removed, M - N of every M columns."""
        assert self.places is not None
        n, m = self.places
        groups = columns_of(scores, channels_last=True).view(-1, m)
        mask = torch.zeros_like(groups, dtype=torch.bool)
        mask.scatter_(1, groups.argsort(dim=1, stable=True)[:, : m - n], True)
        return from_columns(mask.view(len(scores), -1), tuple(scores.shape), channels_last=True)


@dataclass(frozen=True, kw_only=True)
class ObcPrune(Structured):
    """Optimal brain compression: exact removal of one weight of a row after the other (see `obs`).

    With scope=global the increments of all layers are compared as estimated increases of the loss.

    Attributes:
        block: consecutive columns of a row that are removed together.
        damping: share of the mean second moment that is added to each.
    """

    block: PositiveInt
    damping: Positive

    def __post_init__(self) -> None:
        """Check combinations."""
        super().__post_init__()
        if self.block > 1 and self.pattern is not None:
            raise ConfigError(
                "compress.block: excludes compress.pattern; set compress.block=1 or compress.pattern=null"
            )

    def check_layer(self, name: str, layer: Layer) -> None:
        """Refuse a layer whose columns are no whole number of blocks.

        Raises:
            ConfigError: see above.
        """
        super().check_layer(name, layer)
        columns = layer.weight.flatten(1).shape[1]
        if columns % self.block:
            raise ConfigError(
                f"compress.block={self.block}: layer {name} has {columns} columns, which is no multiple; add it to "
                f"compress.exclude, as in compress.exclude=[{name}]"
            )

    def removed(self, count: int) -> int:
        """Return how many of `count` weights are removed: a whole number of blocks, whose places take a bit each."""
        if self.block == 1 or self.places is not None:
            return super().removed(count)
        blocks = count // self.block
        if self.target == "sparsity":
            return int(self.amount * blocks + 1e-9) * self.block
        kept = int((self.amount * FLOAT * count - bits_bytes(blocks)) // (FLOAT * self.block))
        return (blocks - max(0, kept)) * self.block

    @property
    def last(self) -> bool:
        """Whether the columns of a convolution are taken with its inputs last."""
        return self.places is not None or self.block > 1

    def prune(self, gone: Mapping[str, Tensor], evidence: Evidence) -> dict[str, Compressed]:
        """Return the pruned layers, with the weights that are kept fitted to the outputs of the dense layer."""
        known = {name: mask for name, mask in gone.items() if evidence.hessians(name) is not None}
        evidence.warn_of_unread(gone, "stay as they are")
        inverses = {name: self._inverses(name, evidence) for name in known}
        before = {name: columns_of(mask, channels_last=self.last) for name, mask in known.items()}
        if self.places is not None:
            kept = {name: self._in_groups(name, before[name], inverses[name], evidence) for name in known}
        else:
            scores = {name: self._scores(name, before[name], inverses[name], evidence) for name in known}
            kept = {name: ~mask for name, mask in self._chosen(scores).items()}
        return {name: self._fitted(name, kept[name], inverses[name], evidence) for name in known}

    def _inverses(self, name: str, evidence: Evidence) -> list[Tensor]:
        """Return H^-1 of each group, in the order of the columns."""
        hessians = evidence.hessians(name)
        assert hessians is not None
        return [inverse_of(damped(self._ordered(h, name, evidence), self.damping), name) for h in hessians]

    def _ordered(self, hessian: Tensor, name: str, evidence: Evidence) -> Tensor:
        """Return H with rows and columns in the order of the weight's columns."""
        shape = evidence.weight(name).shape
        places = torch.arange(len(hessian), device=hessian.device).view(1, *shape[1:])
        order = columns_of(places, channels_last=self.last)[0]
        return hessian[order][:, order]

    def _rows(self, name: str, evidence: Evidence) -> Tensor:
        """Return the weight as [n, d] float64, in the order of the columns."""
        return columns_of(evidence.weight(name), channels_last=self.last).double()

    def _in_groups(self, name: str, before: Tensor, inverses: list[Tensor], evidence: Evidence) -> Tensor:
        """Return which weights [n, d] are kept under the pattern."""
        assert self.places is not None
        parts = zip(self._rows(name, evidence).chunk(len(inverses)), before.chunk(len(inverses)), inverses, strict=True)
        return torch.cat([removal_in_groups(rows, inverse, own, self.places) for rows, own, inverse in parts])

    def _scores(self, name: str, before: Tensor, inverses: list[Tensor], evidence: Evidence) -> Tensor:
        """Return for each weight, or block, of each row the running maximum of the increments at its removal."""
        found = []
        parts = zip(self._rows(name, evidence).chunk(len(inverses)), before.chunk(len(inverses)), inverses, strict=True)
        for rows, own, inverse in parts:
            if self.block == 1:
                order, increments = removal_order(rows, inverse, own)
            else:
                blocks = removal_of_blocks(rows, inverse, own[:, :: self.block], self.block)
                order, increments = blocks.order, blocks.increments
            rising = increments.cummax(dim=1).values
            found.append(torch.empty_like(rising).scatter_(1, order, rising))
        scores = torch.cat(found)
        if self.scope == "global":
            scores = 0.5 * evidence.outputs[name] * scores / self.block
        return scores.masked_fill(before[:, :: self.block], -1.0)

    def _chosen(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return which weights [n, d] are removed."""
        if self.block == 1:
            return self.chosen(scores)
        if self.scope == "layer":
            counts = {name: self.removed(score.numel() * self.block) // self.block for name, score in scores.items()}
            masks = {name: lowest(score, counts[name]) for name, score in scores.items()}
        else:
            pooled = torch.cat([score.flatten() for score in scores.values()])
            every = lowest(pooled, self.removed(len(pooled) * self.block) // self.block)
            parts = torch.split(every, [score.numel() for score in scores.values()])
            masks = {name: part.view(scores[name].shape) for name, part in zip(scores, parts, strict=True)}
        return {name: mask.repeat_interleave(self.block, dim=1) for name, mask in masks.items()}

    def _fitted(self, name: str, kept: Tensor, inverses: list[Tensor], evidence: Evidence) -> Compressed:
        """Return a layer with these weights, fitted."""
        rows = self._rows(name, evidence)
        parts = zip(rows.chunk(len(inverses)), kept.chunk(len(inverses)), inverses, strict=True)
        fitted = torch.cat([refit(some, inverse, own) for some, own, inverse in parts])
        hessians = evidence.hessians(name)
        assert hessians is not None
        changes = zip((fitted - rows).chunk(len(hessians)), hessians, strict=True)
        error = sum(float(error_of(c, self._ordered(h, name, evidence)).sum()) for c, h in changes)
        shape = tuple(evidence.weight(name).shape)
        weight, mask = (from_columns(x, shape, channels_last=self.last) for x in (fitted.float(), kept))
        form = Sparse(shape, mask, pattern=self.places, block=self.block, channels_last=self.last)
        return Compressed(form, weight, {"output_error": error})


__all__ = ["MagnitudePrune", "ObcPrune", "Pruner", "lowest", "removed_before"]
