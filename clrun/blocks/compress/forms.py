"""Compressed forms of a weight: what is stored, how many bytes that takes, and how the weight keeps its form.

A compressed layer stays the layer that it was, with a weight of the same name and shape, so that penalties, masks,
statistics and checkpoints of every method go on working. Its form, which the method carries, puts the weight back after
each optimizer step (`hold`): removed entries are set to 0, and a low-rank weight is projected onto the matrices of that
rank. A form packs what is stored into tensors and is made again from them; the weight is bit for bit the same.

Shapes: a weight [out, in, ...] counts as the matrix [n, m] with m = in * ... columns.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import combinations
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from clrun.blocks.low_rank import bits_bytes

FLOAT = 4  # bytes of a stored number
MOST_PATTERNS = 2**14  # numbers of patterns of one group of columns that are told apart


class Form(nn.Module):
    """The compressed form of one weight.

    Args:
        shape: shape of the weight.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    @property
    def sides(self) -> tuple[int, int]:
        """The numbers n of rows and m of columns of the weight as a matrix."""
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def dense_bytes(self) -> int:
        """Bytes of the weight in single precision."""
        return FLOAT * math.prod(self.shape)

    @property
    @abstractmethod
    def stored_bytes(self) -> int:
        """Bytes of the stored form."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return the amount of compression for records, such as {"rank": 3}."""

    @abstractmethod
    def hold_(self, weight: Tensor) -> None:
        """Put a weight back into this form, in place; a form that training leaves free does nothing."""

    @abstractmethod
    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Return what is stored of a weight of this form, by name."""

    @classmethod
    @abstractmethod
    def unpack(cls, parts: Mapping[str, Tensor], facts: Mapping[str, Any]) -> tuple[Self, Tensor]:
        """Return the form and the weight that `pack` and `facts` have stored."""

    def facts(self) -> dict[str, Any]:
        """Return what `unpack` needs besides tensors, as JSON has it."""
        return {"form": type(self).__name__, "shape": list(self.shape)}


class LowRank(Form):
    """A weight A B of rank r, stored as A [n, r] and B [r, m].

    Args:
        shape: shape of the weight.
        left: A, float32.
        right: B, float32.
    """

    left: Tensor
    right: Tensor

    def __init__(self, shape: tuple[int, ...], left: Tensor, right: Tensor) -> None:
        super().__init__(shape)
        self.register_buffer("left", left)
        self.register_buffer("right", right)

    @property
    def rank(self) -> int:
        """The rank r."""
        return int(self.left.shape[1])

    @property
    def stored_bytes(self) -> int:
        """Bytes of A and B."""
        return FLOAT * self.rank * sum(self.sides)

    def describe(self) -> dict[str, Any]:
        """Return the rank."""
        return {"rank": self.rank}

    @property
    def weight(self) -> Tensor:
        """The weight, float32: the product in double precision, rounded once, hardly depends on the order of sums."""
        return (self.left.double() @ self.right.double()).float().view(self.shape)

    def hold_(self, weight: Tensor) -> None:
        """Replace the weight W by Q Q' W with an orthonormal basis Q [n, r] of the columns of W B'.

        This is one step of subspace iteration from the row space before the optimizer step. It leaves a matrix of rank
        r as it is up to rounding, and differs from the best approximation of rank r by terms of second order in the
        step.
        """
        matrix = weight.detach().flatten(1).float()
        rows = torch.linalg.qr(self.right.T).Q  # B' itself has the condition number of W
        basis = torch.linalg.qr(matrix @ rows).Q
        self.left.copy_(basis)
        self.right.copy_(basis.T @ matrix)
        weight.copy_(self.weight)

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Return A and B."""
        return {"left": self.left, "right": self.right}

    @classmethod
    def unpack(cls, parts: Mapping[str, Tensor], facts: Mapping[str, Any]) -> tuple[Self, Tensor]:
        """Return the form and A B."""
        form = cls(tuple(facts["shape"]), parts["left"], parts["right"])
        return form, form.weight


class Sparse(Form):
    """A weight with entries that are 0 for good: the other values are stored, and where they belong.

    Args:
        shape: shape of the weight.
        kept: bool mask in the shape of the weight, True for entries that are stored.
        pattern: (N, M) when exactly N of every M consecutive columns are kept; else None. Then the place of a group is
            the number of its pattern; otherwise it is one bit for each entry.
        block: consecutive columns that are kept together, which need one bit together.
        channels_last: whether "consecutive" is meant in the order (window, in) of a convolution's columns.
    """

    kept: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        kept: Tensor,
        *,
        pattern: tuple[int, int] | None = None,
        block: int = 1,
        channels_last: bool = False,
    ) -> None:
        super().__init__(shape)
        self.register_buffer("kept", kept)
        self.pattern, self.block, self.channels_last = pattern, block, channels_last

    @property
    def stored_bytes(self) -> int:
        """Bytes of the values and their places; those of the dense weight if they are fewer."""
        return min(self.dense_bytes, FLOAT * int(self.kept.sum()) + self._place_bytes())

    def _place_bytes(self) -> int:
        """Return the bytes that say which entries are kept."""
        rows, columns = self.sides
        if self.pattern is None:
            return bits_bytes(rows * -(-columns // self.block))
        return bits_bytes(rows * (columns // self.pattern[1]) * pattern_bits(*self.pattern))

    def describe(self) -> dict[str, Any]:
        """Return the fraction of the entries that are 0 for good."""
        return {"sparsity": 1 - int(self.kept.sum()) / self.kept.numel()}

    def hold_(self, weight: Tensor) -> None:
        """Set the removed entries to 0."""
        weight.masked_fill_(~self.kept, 0.0)

    def _matrix(self, tensor: Tensor) -> Tensor:
        """Return the entries as [n, m] in the order in which columns are consecutive."""
        return columns_of(tensor, channels_last=self.channels_last)

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the values and their places; the weight itself if that takes fewer bytes."""
        kept = self._matrix(self.kept)
        if self.stored_bytes == self.dense_bytes:
            return {"weight": weight.detach().float()}
        values = self._matrix(weight.detach().float())[kept]
        if self.pattern is None:
            return {"values": values, "places": pack_bits(kept[:, :: self.block].flatten().long(), 1)}
        n, m = self.pattern
        powers = 1 << torch.arange(m)
        codes = (kept.cpu().view(-1, m).long() * powers).sum(dim=1)
        numbers = torch.searchsorted(_patterns(n, m), codes)
        return {"values": values, "places": pack_bits(numbers, pattern_bits(n, m))}

    @classmethod
    def unpack(cls, parts: Mapping[str, Tensor], facts: Mapping[str, Any]) -> tuple[Self, Tensor]:
        """Return the form and the weight."""
        shape, pattern = tuple(facts["shape"]), facts["pattern"] and tuple(facts["pattern"])
        rows, columns = shape[0], math.prod(shape[1:])
        if pattern and math.comb(max(pattern[1], 0), max(pattern[0], 0)) > MOST_PATTERNS:
            raise ValueError("the pattern has too many places")
        block, last = int(facts["block"]), bool(facts["channels_last"])
        if "weight" in parts:
            weight = parts["weight"]
            kept = weight != 0
            return cls(shape, kept, pattern=pattern, block=block, channels_last=last), weight
        if pattern is None:
            groups = -(-columns // block)
            bits = unpack_bits(parts["places"], 1, rows * groups).bool().view(rows, groups)
            mask = bits.repeat_interleave(block, dim=1)[:, :columns]
        else:
            n, m = pattern
            numbers = unpack_bits(parts["places"], pattern_bits(n, m), rows * columns // m)
            mask = (_patterns(n, m)[numbers][:, None] >> torch.arange(m) & 1).bool().view(rows, columns)
        matrix = torch.zeros(rows, columns)
        matrix[mask] = parts["values"].cpu()
        weight, kept = (from_columns(x, shape, channels_last=last) for x in (matrix, mask))
        return cls(shape, kept, pattern=pattern, block=block, channels_last=last), weight

    def facts(self) -> dict[str, Any]:
        """Return what `unpack` needs besides tensors."""
        return {**super().facts(), "pattern": self.pattern, "block": self.block, "channels_last": self.channels_last}


class Quantised(Form):
    """A weight on a grid: b-bit integers q [n, m], and for each row a step and a zero, with weight = step (q - zero).

    Training leaves the weight free; the next compression puts it on a grid again.

    Args:
        shape: shape of the weight.
        bits: b.
        steps: [n] float32.
        zeros: [n] uint8.
        codes: q [n, m] uint8.
        symmetric: whether all zeros are 2^(b-1), which is not stored.
    """

    codes: Tensor
    steps: Tensor
    zeros: Tensor

    def __init__(
        self, shape: tuple[int, ...], bits: int, steps: Tensor, zeros: Tensor, codes: Tensor, *, symmetric: bool
    ) -> None:
        super().__init__(shape)
        self.bits, self.symmetric = bits, symmetric
        for name, value in (("steps", steps), ("zeros", zeros), ("codes", codes)):
            self.register_buffer(name, value)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the packed integers, of the steps and, if they differ, of the zeros."""
        return bits_bytes(self.codes.numel() * self.bits) + (FLOAT + (not self.symmetric)) * self.shape[0]

    def describe(self) -> dict[str, Any]:
        """Return the number of bits."""
        return {"bits": self.bits}

    @property
    def weight(self) -> Tensor:
        """The weight, float32."""
        levels = self.codes.float() - self.zeros.float()[:, None]
        return (self.steps[:, None] * levels).view(self.shape)

    def hold_(self, weight: Tensor) -> None:
        """Do nothing: steps of training are smaller than those of the grid, on which the weight would never move."""

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the packed integers, the steps and, if they differ, the zeros."""
        parts = {"codes": pack_bits(self.codes.flatten().long(), self.bits), "steps": self.steps}
        return parts if self.symmetric else {**parts, "zeros": self.zeros}

    @classmethod
    def unpack(cls, parts: Mapping[str, Tensor], facts: Mapping[str, Any]) -> tuple[Self, Tensor]:
        """Return the form and the weight."""
        shape, bits, symmetric = tuple(facts["shape"]), int(facts["bits"]), bool(facts["symmetric"])
        if not 1 <= bits <= 8:
            raise ValueError("the integers have another number of bits")
        codes = unpack_bits(parts["codes"], bits, math.prod(shape)).to(torch.uint8).view(shape[0], -1)
        steps = parts["steps"].cpu()
        middle = torch.full((shape[0],), 2 ** (bits - 1), dtype=torch.uint8)
        form = cls(shape, bits, steps, middle if symmetric else parts["zeros"].cpu(), codes, symmetric=symmetric)
        return form, form.weight

    def facts(self) -> dict[str, Any]:
        """Return what `unpack` needs besides tensors."""
        return {**super().facts(), "bits": self.bits, "symmetric": self.symmetric}


FORMS: dict[str, type[Form]] = {form.__name__: form for form in (LowRank, Sparse, Quantised)}


class Forms(nn.ModuleDict):
    """The forms of the compressed layers of a backbone, by the names of the layers with "/" in the place of dots."""

    def by_layer(self) -> Iterator[tuple[str, Form]]:
        """Yield (name of the layer, form)."""
        for key, form in self.items():
            assert isinstance(form, Form)
            yield key.replace("/", "."), form

    def of(self, layer: str) -> Form | None:
        """Return the form of a layer; None for a layer without one."""
        key = layer.replace(".", "/")
        found = self._modules.get(key)
        assert found is None or isinstance(found, Form)
        return found

    def put(self, layer: str, form: Form) -> None:
        """Set the form of a layer."""
        self[layer.replace(".", "/")] = form

    @torch.no_grad()
    def hold_(self, backbone: nn.Module) -> None:
        """Put the weights of the layers back into their forms."""
        for layer, form in self.by_layer():
            form.hold_(backbone.get_parameter(f"{layer}.weight"))


# --- columns and bits


def columns_of(weight: Tensor, *, channels_last: bool) -> Tensor:
    """Return a weight [n, in, ...] as a matrix [n, m], with the columns of a window first or the channels last."""
    return (weight.movedim(1, -1) if channels_last and weight.dim() > 2 else weight).reshape(len(weight), -1)


def from_columns(matrix: Tensor, shape: tuple[int, ...], *, channels_last: bool) -> Tensor:
    """Return the weight of this shape whose `columns_of` are the matrix."""
    if not (channels_last and len(shape) > 2):
        return matrix.reshape(shape)
    return matrix.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()


def pattern_bits(n: int, m: int) -> int:
    """Return the number of bits that tell apart the ways to keep n of m entries."""
    return max(1, math.ceil(math.log2(math.comb(m, n))))


@cache
def _patterns(n: int, m: int) -> Tensor:
    """Return the ways to keep n of m entries as sums of powers of 2, ascending [number of ways] long."""
    return torch.tensor(sorted(sum(1 << place for place in places) for places in combinations(range(m), n)))


def pack_bits(numbers: Tensor, width: int) -> Tensor:
    """Return integers from 0 to 2^width - 1, packed into bytes one after the other, lowest bit first (uint8)."""
    bits = (numbers.cpu()[:, None] >> torch.arange(width)) & 1
    return torch.from_numpy(np.packbits(bits.numpy().astype(np.uint8).ravel(), bitorder="little"))


def unpack_bits(packed: Tensor, width: int, count: int) -> Tensor:
    """Return the `count` integers [count] long that `pack_bits` has packed."""
    bits = np.unpackbits(packed.cpu().numpy(), bitorder="little", count=count * width).reshape(count, width)
    return (torch.from_numpy(bits).long() << torch.arange(width)).sum(dim=1)


__all__ = ["FORMS", "Form", "Forms", "LowRank", "Quantised", "Sparse"]
