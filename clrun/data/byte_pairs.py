"""CLIP's tokenizer: byte pairs with a merge list, lower case, the end-of-text mark last (Radford et al. 2021).

The numbers of the tokens are those of open_clip's `SimpleTokenizer` with the same merge list, which needs two more
packages: here letters and digits are told apart by Python's Unicode tables, and `ftfy` (which repairs text that was
decoded wrongly) is needed for text beyond ASCII alone.
"""

import gzip
import html
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clrun.system import libraries
from clrun.system.errors import ConfigError, first_line

CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
LARGEST = 49152 - 256 - 2  # merges of CLIP's vocabulary; longer lists are cut there, as in open_clip
END = "</w>"


class BytePairs:
    """Turns texts into token ids [N, L]: start mark, byte pairs, end mark, zeros.

    Args:
        merges: one merge per line, the two parts separated by a space; the earlier lines come first.
        context_length: L, the longest row that the text tower takes, marks included.
    """

    def __init__(self, merges: str, context_length: int) -> None:
        self.merges, self.context_length = merges, context_length

    @classmethod
    def read(cls, path: Path, context_length: int) -> "BytePairs":
        """Return the tokenizer of a gzipped merge list whose first line is a heading.

        Raises:
            ConfigError: the file cannot be read.
        """
        try:
            lines = gzip.decompress(path.read_bytes()).decode().split("\n")[1:]
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise ConfigError(f"backbone: the merge list {path} cannot be read ({first_line(error)})") from error
        return cls("\n".join(line for line in lines[:LARGEST] if len(line.split()) == 2), context_length)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return the token ids [N, context_length] long of N texts; too long ones are cut before their end mark."""
        rows = torch.zeros(len(texts), self.context_length, dtype=torch.long)
        start, end = self._marks
        for row, text in zip(rows, texts, strict=True):
            ids = [start, *self.encode(text)][: self.context_length - 1]
            row[: len(ids) + 1] = torch.tensor([*ids, end])
        return rows

    def too_long(self, texts: Sequence[str]) -> list[str]:
        """Return the texts that are cut."""
        return [text for text in texts if len(self.encode(text)) > self.context_length - 2]

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text without marks."""
        return [token for word in _words(_cleaned(text)) for token in self._pieces(word)]

    @property
    def size(self) -> int:
        """Number of tokens, the marks included."""
        return self._marks[1] + 1

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the tables, which are made again."""
        return {"merges": self.merges, "context_length": self.context_length}

    @cached_property
    def _tables(self) -> tuple[dict[tuple[str, str], int], dict[str, int]]:
        """Rank of each merge, and id of each token."""
        pairs = [tuple(line.split()) for line in self.merges.split("\n") if line]
        letters = list(_letters().values())
        tokens = [*letters, *(letter + END for letter in letters), *("".join(pair) for pair in pairs)]
        ranks = {pair: rank for rank, pair in enumerate(pairs)}
        return ranks, {token: number for number, token in enumerate(tokens)}  # type: ignore[return-value]

    @cached_property
    def _marks(self) -> tuple[int, int]:
        """Ids of the start and the end mark; the end mark has the largest id."""
        count = 2 * len(_letters()) + sum(1 for line in self.merges.split("\n") if line)
        return count, count + 1

    @cached_property
    def _known(self) -> dict[str, list[int]]:
        """Ids of words that were encoded before."""
        return {}

    def _pieces(self, word: str) -> list[int]:
        """Return the token ids of a word: its bytes, merged in the order of the list until no merge applies."""
        if word not in self._known:
            ranks, ids = self._tables
            letters = _letters()
            parts = [letters[byte] for byte in word.encode()]
            parts[-1] += END
            while len(parts) > 1:
                pair = min(zip(parts, parts[1:], strict=False), key=lambda two: ranks.get(two, len(ranks)))
                if pair not in ranks:
                    break
                parts = _merged(parts, pair)
            self._known[word] = [ids[part] for part in parts]
        return self._known[word]


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """Return the parts with every occurrence of a pair joined, from left to right."""
    found: list[str] = []
    position = 0
    while position < len(parts):
        both = tuple(parts[position : position + 2]) == pair
        found.append("".join(pair) if both else parts[position])
        position += 1 + both
    return found


@lru_cache(maxsize=1)
def _letters() -> dict[int, str]:
    """Return a printable character for each byte, in the order of CLIP's vocabulary: printable bytes first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + k) for k, byte in enumerate(others)}


def _cleaned(text: str) -> str:
    """Return a text repaired, with HTML entities replaced, single spaces and lower case."""
    if not text.isascii():
        text = libraries.load("ftfy").fix_text(text)
    text = html.unescape(html.unescape(text))
    return re.sub(r"\s+", " ", text).strip().lower()


def _words(text: str) -> Iterator[str]:
    """Yield contractions, runs of letters, single digits and runs of other characters; spaces are dropped."""
    position = 0
    while position < len(text):
        end = next((position + len(c) for c in CONTRACTIONS if text.startswith(c, position)), 0)
        kind = _kind(text[position])
        if not end:
            end = position + 1
            while kind in "LO" and end < len(text) and _kind(text[end]) == kind:
                end += 1
        if kind != " ":
            yield text[position:end]
        position = end


def _kind(character: str) -> str:
    """Return "L" for a letter, "N" for a digit or number, " " for white space and "O" for others."""
    if character.isspace():
        return " "
    found = unicodedata.category(character)[0]
    return found if found in "LN" else "O"
