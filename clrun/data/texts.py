"""Texts as they are stored (UTF-8 bytes) and as a backbone reads them (token ids), tokenised once for the run.

Storing bytes keeps a data set independent of the backbone, as images are. Selection, memories and digests treat the
rows of bytes, and later those of ids, like any other tensor.

Shapes: `M` stored rows, `W` bytes of the longest stored text, `L` tokens of the longest text, `B` batch.
"""

import re
import unicodedata
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clrun.data.schema import Stated
from clrun.data.tokens import SEPARATOR, Tokenizer

APART = re.compile(r"[\W_]+")  # runs of characters that are neither letters nor digits


class TextTransform:
    """Turns stored token ids into the input of a text backbone.

    Args:
        tokenizer: of the backbone; a pickled transform keeps its digest alone.
        length: L, the width of the stored rows.
        max_tokens: the longest input of the backbone.
        stated: puts texts into the words of the data set's schema; None for texts as they are. A pickled transform
            does not keep it.

    Attributes:
        digest: identifies the tokenizer, also where features of the rows are stored.
    """

    augments = False
    stated: Stated | None = None

    def __init__(self, tokenizer: Tokenizer, length: int, max_tokens: int, stated: Stated | None = None) -> None:
        self.tokenizer: Tokenizer | None = tokenizer
        self.stated = stated
        self.digest, self.pad = tokenizer.digest, tokenizer.pad
        self.length, self.max_tokens = length, max_tokens

    def eval(self, x: Tensor) -> Tensor:
        """Return stored ids [B, L] as int64, which is what embedding tables take."""
        return x.long()

    def train(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return what `eval` does: texts are not augmented."""
        return x.long()

    def rows(self, texts: Sequence[str], part: str = "") -> Tensor:
        """Return new texts as ids [N, at least L] int32, as the rows of the run are stored.

        A text that is longer than all texts of the run makes all rows of this tensor wider.

        Args:
            texts: as a data set stores them; the words of its schema are added here.
            part: name of the part of the data set to which they belong, where their prefix depends on it.

        Raises:
            ConfigError: a text does not suit the template of the schema.
        """
        assert self.tokenizer is not None, "the transform was pickled"
        stated = texts if self.stated is None else [self.stated.schema.state(text, part) for text in texts]
        found = [self.tokenizer.encode(text, self.max_tokens) for text in stated]
        return padded(found, max([self.length, *map(len, found)]), self.pad)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the tokenizer, which belongs to the backbone."""
        kept = {name: value for name, value in vars(self).items() if name != "stated"}
        return {**kept, "tokenizer": None}


def pair(first: str, second: str) -> str:
    """Return two texts as one stored text; a tokenizer puts its separator between them."""
    return f"{first.replace(SEPARATOR, ' ')}{SEPARATOR}{second.replace(SEPARATOR, ' ')}"


def to_bytes(texts: Sequence[str]) -> Tensor:
    """Return texts as rows of bytes [M, W] uint8, with zeros behind each; no text holds the character U+0000."""
    table = np.array([text.encode() for text in texts], dtype=bytes)
    return torch.from_numpy(np.array(table.view(np.uint8).reshape(len(texts), -1)))


def to_texts(rows: Tensor) -> list[str]:
    """Return the texts of rows of bytes [k, W]."""
    table = np.ascontiguousarray(rows.cpu().numpy())
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in table]


def cut(text: str, max_bytes: int) -> str:
    """Return the beginning of a text that has at most `max_bytes` bytes in UTF-8; no character is cut in two."""
    encoded = text[:max_bytes].encode()
    return encoded[:max_bytes].decode(errors="ignore") if len(encoded) > max_bytes else text[:max_bytes]


def fold(text: str) -> str:
    """Return a text as it is compared with others: NFKC, case folded, words of letters and digits, single spaces."""
    return APART.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()


def text_key(text: str) -> str:
    """Return the folded text; one without letters and digits is only normalised, so that such texts stay apart."""
    return fold(text) or unicodedata.normalize("NFKC", text).casefold().strip()


def padded(rows: Sequence[Sequence[int]], length: int, pad: int) -> Tensor:
    """Return rows of ids as one tensor [M, length] int32, with `pad` behind each."""
    table = np.full((len(rows), length), pad, dtype=np.int32)
    for row, own in enumerate(rows):
        table[row, : len(own)] = own
    return torch.from_numpy(table)


@dataclass(frozen=True)
class Tokenised:
    """The token ids of stored texts.

    Attributes:
        ids: [M, longest] int32.
        lengths: [M], tokens of each row that are not padding.
        cut: how many rows have more tokens than the backbone takes.
    """

    ids: Tensor
    lengths: Tensor
    cut: int


_known: dict[tuple[int, str, int, str], tuple[Callable[[], Tensor | None], Tokenised]] = {}


def tokenised(stored: Tensor, tokenizer: Tokenizer, max_tokens: int, stated: Stated | None = None) -> Tokenised:
    """Return the token ids of stored texts [M, W] uint8, computed once per process.

    Args:
        stored: rows of bytes.
        tokenizer: of the backbone.
        max_tokens: rows are cut there.
        stated: puts them into words; None for texts as they are.

    Raises:
        ConfigError: a text does not suit the template of the schema.
    """
    key = id(stored), tokenizer.digest, max_tokens, repr(stated)
    known = _known.get(key)
    if known is None or known[0]() is not stored:
        rows, many = [], 0
        texts = to_texts(stored)
        for text in texts if stated is None else stated.texts(texts, stored, torch.arange(len(texts))):
            found = tokenizer.encode(text, max_tokens + 1)
            if len(found) > max_tokens:
                many, found = many + 1, tokenizer.encode(text, max_tokens)
            rows.append(found)
        lengths = torch.tensor([len(own) for own in rows], dtype=torch.long)
        ids = padded(rows, max(map(len, rows), default=0), tokenizer.pad)
        forget = weakref.ref(stored, lambda _: _known.pop(key, None))
        known = _known[key] = (forget, Tokenised(ids, lengths, many))
    return known[1]
