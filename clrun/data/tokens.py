"""Tokenizers: from a text to token ids, as the first layer of a text backbone reads them.

A data set stores texts; its rows are tokenised once, by the tokenizer of the backbone (`Tokenizer`). Rows of ids are
filled up with `pad`, which is 0. CLIP's tokenizer, which belongs to text towers and marks its padding otherwise, is in
`clrun.data.byte_pairs`.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from clrun.system.errors import ConfigError, first_line

SEPARATOR = "\x1f"  # between the two parts of a text of two parts; no other use of this control character is known
LONGEST_WORD = 100  # letters; a longer word is unknown as a whole, as in BERT
LINES = 1_000_000  # of a vocabulary
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


@runtime_checkable
class Tokenizer(Protocol):
    """How texts become token ids; one per backbone.

    Attributes:
        pad: id that fills up rows, 0 always; no text has it at its first place.
        vocab_size: number of ids; all ids are below it.
        digest: SHA-256, hexadecimal, of everything the ids depend on: kind, options and vocabulary.
        name: for people, such as "WordPiece 30,522".
    """

    @property
    def pad(self) -> int:
        """The id of padding."""

    @property
    def vocab_size(self) -> int:
        """The number of ids."""

    @property
    def digest(self) -> str:
        """SHA-256 of what the ids depend on."""

    @property
    def name(self) -> str:
        """A name for people."""

    def encode(self, text: str, max_tokens: int) -> list[int]:
        """Return the ids of a text with the special tokens; a longer one is cut so that these stay."""

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the tokens of ids as they are shown to people."""


@runtime_checkable
class Speller(Tokenizer, Protocol):
    """A tokenizer whose ids can be turned back into text; what a network writes is read with it."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, up to the first end mark, without special tokens."""


class ByteTokenizer:
    """UTF-8 bytes as tokens: byte + 3, then the end mark 1; 0 is padding and 2 is unused, as in ByT5.

    It needs no file, knows every text, and gives every text back (Xue et al., TACL 2022, arXiv 2105.13626).
    """

    pad, end = 0, 1
    first = 3  # id of byte 0
    vocab_size = 256 + first
    name = "bytes"

    @property
    def digest(self) -> str:
        """SHA-256 of the rule."""
        return hashlib.sha256(f"bytes + {self.first}, end {self.end}".encode()).hexdigest()

    def encode(self, text: str, max_tokens: int) -> list[int]:
        """Return the ids of a text; the empty text has the end mark alone. A cut may split a character."""
        return [byte + self.first for byte in text.encode()][: max_tokens - 1] + [self.end]

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Return printable ASCII characters as they are, other bytes as "<E2>", special tokens by name."""
        names = {self.pad: "<pad>", self.end: "</s>", 2: "<unk>"}
        return [names.get(token) or _byte_name(token - self.first) for token in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids up to the first end mark; bytes that are no UTF-8, and other ids, are left out."""
        ids = list(ids)
        ids = ids[: ids.index(self.end)] if self.end in ids else ids
        known = bytes(token - self.first for token in ids if self.first <= token < self.vocab_size)
        return known.decode(errors="ignore")


class WordPiece:
    """BERT's tokenizer: words, each cut from the left into the longest pieces of the vocabulary (Devlin et al. 2019).

    A text is cleaned (control characters go, white space becomes one space), Chinese characters become words, accents
    are removed and letters made small if `lower`, punctuation marks become words. A word that cannot be made of pieces,
    or has more than 100 characters, is [UNK] as a whole. The ids are those of the libraries `tokenizers` and
    `transformers` for the same vocabulary, with two exceptions: names of special tokens in a text, such as "[SEP]", are
    ordinary characters here, and `SEPARATOR` stands for [SEP].

    Args:
        vocabulary: one token per line; pieces inside of words begin with "##".
        lower: whether accents and capital letters are removed (models called "uncased").

    Raises:
        ConfigError: a special token is missing, or [PAD] is not the first line.
    """

    pad = 0

    def __init__(self, vocabulary: str, *, lower: bool = True) -> None:
        self.vocabulary, self.lower = vocabulary, lower
        missing = [token for token in SPECIAL if token not in self._ids]
        if missing or self._ids["[PAD]"] != self.pad:
            what = f"has no {missing[0]}" if missing else f"has [PAD] in line {self._ids['[PAD]'] + 1}, not in line 1"
            raise ConfigError(f"backbone: the vocabulary {what}; use vocab.txt of a BERT model")

    @classmethod
    def read(cls, path: Path, *, lower: bool = True) -> "WordPiece":
        """Return the tokenizer of a file vocab.txt.

        Raises:
            ConfigError: the file cannot be read, or is no vocabulary.
        """
        try:
            text = path.read_bytes().decode()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"backbone: the vocabulary {path} cannot be read ({first_line(error)})") from error
        if text.count("\n") > LINES:
            raise ConfigError(f"backbone: {path} has more than {LINES:,} lines and is no vocabulary")
        return cls(text, lower=lower)

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self._pieces)

    @property
    def name(self) -> str:
        """Kind and size."""
        return f"WordPiece {self.vocab_size:,}{'' if self.lower else ' cased'}"

    @property
    def digest(self) -> str:
        """SHA-256 of vocabulary and options."""
        return hashlib.sha256(f"WordPiece lower={self.lower}\n{self.vocabulary}".encode()).hexdigest()

    def encode(self, text: str, max_tokens: int) -> list[int]:
        """Return [CLS], the ids of the pieces, [SEP]; with `SEPARATOR` in the text, [SEP] between its parts as well."""
        ids = [self._ids["[CLS]"]]
        for part in text.split(SEPARATOR):
            ids += [token for word in self._words(part) for token in self._of_word(word)]
            ids.append(self._ids["[SEP]"])
        return ids if len(ids) <= max_tokens else [*ids[: max_tokens - 1], self._ids["[SEP]"]]

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the pieces of the vocabulary."""
        return [self._pieces[token] for token in ids]

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the tables, which are made again."""
        return {"vocabulary": self.vocabulary, "lower": self.lower}

    @cached_property
    def _pieces(self) -> list[str]:
        # Other line separators than "\n" are tokens of BERT's own vocabulary.
        return [line.removesuffix("\r") for line in self.vocabulary.removesuffix("\n").split("\n")]

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {piece: number for number, piece in enumerate(self._pieces)}

    @cached_property
    def _known(self) -> dict[str, list[int]]:
        """Ids of words that were encoded before."""
        return {}

    def _words(self, text: str) -> Iterator[str]:
        """Yield the words of a text: runs of characters between white space, punctuation and Chinese characters."""
        text = "".join(_cleaned(text))
        if self.lower:
            plain = (c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
            text = "".join(c.lower() for c in plain)  # one by one: the small sigma has another form at an end of a word
        for run in text.split():
            yield from _split(run)

    def _of_word(self, word: str) -> list[int]:
        """Return the ids of the longest pieces of a word from the left; that of [UNK] if they do not cover it."""
        if word not in self._known:
            self._known[word] = list(self._cut(word)) if len(word) <= LONGEST_WORD else []
        return self._known[word] or [self._ids["[UNK]"]]

    def _cut(self, word: str) -> list[int]:
        found, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = (end for end in range(len(word), start, -1) if prefix + word[start:end] in self._ids)
            end = next(ends, None)
            if end is None:
                return []
            found.append(self._ids[prefix + word[start:end]])
            start = end
        return found


def _byte_name(byte: int) -> str:
    """Return a printable ASCII character, or the hexadecimal number of another byte."""
    return chr(byte) if 32 < byte < 127 else f"<{byte:02X}>"


def _cleaned(text: str) -> Iterator[str]:
    """Yield the characters of a text without control characters, with plain spaces, and spaces around Chinese ones."""
    for c in text:
        if c in "\t\n\r" or unicodedata.category(c) in ("Zs", "Zl", "Zp"):
            yield " "
        elif c != "\ufffd" and unicodedata.category(c) not in ("Cc", "Cf", "Co", "Cs"):
            yield f" {c} " if _is_chinese(c) else c


CHINESE = re.compile(
    "[\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f\U0002b920-\U0002ceaf"
    "\uf900-\ufaff\U0002f800-\U0002fa1f]"
)


def _is_chinese(c: str) -> bool:
    """Return whether BERT makes a word of a character."""
    return c > "\u33ff" and CHINESE.match(c) is not None


def _split(run: str) -> Iterator[str]:
    """Yield the parts of a run without spaces: punctuation marks, and what is between them."""
    start = 0
    for place, c in enumerate(run):
        if _is_punctuation(c):
            if place > start:
                yield run[start:place]
            yield c
            start = place + 1
    if start < len(run):
        yield run[start:]


def _is_punctuation(c: str) -> bool:
    """Return whether a character is a word of its own: ASCII symbols such as $ and ~, too."""
    if c.isascii():
        return not c.isalnum() and c.isprintable()
    return unicodedata.category(c)[0] == "P"


__all__ = ["SEPARATOR", "ByteTokenizer", "Speller", "Tokenizer", "WordPiece"]
