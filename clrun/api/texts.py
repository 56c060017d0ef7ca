"""Texts as users have them, as the token ids that a run stores.

Shapes: `N` texts, `L` tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from clrun.data.texts import TextTransform
from clrun.system.errors import ConfigError


@dataclass(frozen=True)
class TextReader:
    """Turns texts into stored token ids.

    Attributes:
        transform: of the run; knows the tokenizer.
    """

    transform: TextTransform

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the data set on which the prefix of a text depends; () where all texts have the same."""
        stated = self.transform.stated
        return stated.parts if stated is not None and stated.schema.by_part else ()

    def batches(self, texts: Any, size: int, part: str = "") -> Iterator[Tensor]:
        """Yield token ids [at most `size`, L] int32, in order; L is at least that of the run.

        Args:
            texts: a text, or a list of texts; pairs of texts are joined by U+001F.
            size: texts per batch.
            part: of the data set, to which the texts belong; "" where nothing depends on it.

        Raises:
            ConfigError: something else, or a text without any character.
        """
        items = [texts] if isinstance(texts, str) else texts
        if not isinstance(items, Sequence | Iterator):
            raise ConfigError(f"texts: expected a text or a list of texts, got {type(texts).__name__}")
        items = list(items)
        for number, item in enumerate(items):
            if not isinstance(item, str):
                raise ConfigError(f"texts[{number}]: expected a text (str), got {type(item).__name__}")
            if not item.strip():
                raise ConfigError(f"texts[{number}]: is empty")
        for start in range(0, len(items), size):
            yield self.transform.rows(items[start : start + size], part)
