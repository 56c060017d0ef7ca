"""A task in words: prefix, template, strings of classes and metric of a data set of texts.

That is how T5 states tasks (Raffel et al., JMLR 21(140), 2020, arXiv 1910.10683): what is to be done is part of the
text, and an answer is a string. The text of a row is put into the template before it is tokenised; the stored text
stays as it was read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from string import Formatter
from typing import Literal

from torch import Tensor

from clrun.data.tokens import SEPARATOR
from clrun.system.errors import ConfigError, did_you_mean

Metric = Literal["accuracy", "exact_match"]
FIELDS = ("prefix", "text", "text_b")
SHOWN = 3  # strings of classes in a description
QUOTES = """write it in quotes within quotes, as in 'dataset.schema.template="{prefix} {text}"'"""


@dataclass(frozen=True, kw_only=True)
class Schema:
    """How a data set of texts states its task.

    Attributes:
        prefix: words that say what is to be done, such as "topic:"; or one prefix by the name of each part (domain) of
            the data set, which then tells the part of a text, in every setting; None for none.
        template: the text that is tokenised, with the places {prefix}, {text} and, for pairs, {text_b}; "{{" is a
            brace. None for "{prefix} {text}", where a pair stays one.
        verbaliser: the string of each class by its name, such as {"0": "negative", "1": "positive"}. It is what
            `text_to_text` writes and what a head of class names encodes; None for the names themselves.
        metric: what counts as a correct answer of a method that writes texts: "accuracy", the admissible string with
            the highest score; "exact_match", the string that greedy decoding writes, and anything else is wrong.

    Raises:
        ConfigError: the template lacks a place or has an unknown one, or a text is empty or cannot be stored.
    """

    prefix: str | dict[str, str] | None
    template: str | None
    verbaliser: dict[str, str] | None
    metric: Metric

    def __post_init__(self) -> None:
        """Refuse what cannot be put into words before any file is read."""
        for key in ("prefix", "verbaliser"):
            value = getattr(self, key)
            texts = [*value.values()] if isinstance(value, Mapping) else [] if value is None else [value]
            if isinstance(value, Mapping) and not value:
                raise ConfigError(f"dataset.schema.{key}: is empty; set it to null for none")
            for text in texts:
                _check_text(key, text)
        if self.template is not None:
            _check_text("template", self.template)
            self._check_places()

    @property
    def plain(self) -> bool:
        """Whether texts are tokenised as they are stored."""
        return self.prefix is None and self.template is None

    @cached_property
    def by_part(self) -> dict[str, str]:
        """The prefix of each part by its name; {} where all texts have the same."""
        return {str(name): text for name, text in self.prefix.items()} if isinstance(self.prefix, Mapping) else {}

    @cached_property
    def pieces(self) -> list[tuple[str, str | None]]:
        """The template: words, and the name of the place behind them (None at the end).

        Raises:
            ConfigError: its braces do not match.
        """
        try:
            found = list(Formatter().parse(self.template or ""))
        except ValueError as error:
            raise ConfigError(f"dataset.schema.template: {self.template!r}: {error}; {QUOTES}") from error
        if any(spec or conversion for _, _, spec, conversion in found):
            raise ConfigError(
                f"dataset.schema.template: {self.template!r} has a place with a format; leave ':' and '!' out of braces"
            )
        return [(words, name) for words, name, _, _ in found]

    def state(self, text: str, part: str = "") -> str:
        """Return a stored text (a pair is joined by U+001F) as it is tokenised.

        Args:
            text: as stored.
            part: name of its part, where the prefix depends on it.

        Raises:
            ConfigError: the template has a place for a second text and there is none, or the other way round.
        """
        prefix = self.by_part.get(part, "") if self.by_part else str(self.prefix or "")
        if self.template is None:
            return f"{prefix} {text}" if prefix else text
        first, mark, second = text.partition(SEPARATOR)
        wanted = any(name == "text_b" for _, name in self.pieces)
        if wanted != bool(mark):
            what = "has {text_b}, and the text is none of a pair" if wanted else "has no {text_b}, and texts are pairs"
            raise ConfigError(f"dataset.schema.template: {what}: '{first[:40]}'; change the template or dataset.text_b")
        values = {"prefix": prefix, "text": first, "text_b": second}
        return "".join(words + (values[name] if name else "") for words, name in self.pieces)

    @property
    def line(self) -> str:
        """What the schema changes, in words; "" for nothing."""
        found = []
        if not self.plain:
            found.append(f"stated as '{self.template or '{prefix} {text}'}'")
            if self.by_part:
                found.append("prefix by part: " + ", ".join(f"{name} '{text}'" for name, text in self.by_part.items()))
            elif self.prefix is not None:
                found.append(f"prefix '{self.prefix}'")
        if self.verbaliser:
            more = ", ..." if len(self.verbaliser) > SHOWN else ""
            shown = [f"{name} = '{text}'" for name, text in self.verbaliser.items()]
            found.append(f"classes in words: {', '.join(shown[:SHOWN])}{more}")
        if self.metric != "accuracy":
            found.append("exact match")
        return "; ".join(found)

    def _check_places(self) -> None:
        """Refuse places that are unknown, missing or useless.

        Raises:
            ConfigError: see above.
        """
        names = [name for _, name in self.pieces if name is not None]
        shown = f"dataset.schema.template: {self.template!r}"
        if unknown := [name for name in names if name not in FIELDS]:
            hint = did_you_mean(unknown[0], FIELDS)
            raise ConfigError(f"{shown} has the place '{unknown[0]}'{hint} (places: {{{'}, {'.join(FIELDS)}}})")
        if "text" not in names:
            raise ConfigError(f"{shown} has no place for the text; add {{text}}, and {QUOTES}")
        if "prefix" in names and self.prefix is None:
            raise ConfigError(f"{shown} has {{prefix}}, and there is none; set dataset.schema.prefix or remove it")
        if "prefix" not in names and self.prefix is not None:
            raise ConfigError(f"{shown} has no {{prefix}}, and dataset.schema.prefix is set; add {{prefix}} to it")


@dataclass(frozen=True)
class Stated:
    """The rows of a data set in the words of its schema.

    Attributes:
        schema: of the data set.
        parts: names of its parts.
        part_of: by the `id` of a stored tensor [M, W], the part of each of its rows [M] long; -1 for rows of none.
    """

    schema: Schema
    parts: tuple[str, ...] = ()
    part_of: Mapping[int, Tensor] = field(default_factory=dict, repr=False)

    def texts(self, texts: Sequence[str], stored: Tensor, rows: Tensor) -> list[str]:
        """Return the texts of some rows as they are tokenised.

        Args:
            texts: n texts as stored.
            stored: the tensor that they lie in.
            rows: [n] long, their rows in it.

        Raises:
            ConfigError: a text does not suit the template.
        """
        parts = self.part_of.get(id(stored))
        names = [""] * len(texts) if parts is None else [self._name(k) for k in parts[rows.cpu()].tolist()]
        return [self.schema.state(text, name) for text, name in zip(texts, names, strict=True)]

    def _name(self, part: int) -> str:
        """Return the name of a part, "" for none."""
        return self.parts[part] if part >= 0 else ""


def _check_text(key: str, text: str) -> None:
    """Refuse a text that is empty or cannot be stored.

    Raises:
        ConfigError: see above.
    """
    if not text.strip():
        raise ConfigError(f"dataset.schema.{key}: a text is empty; set it to null for none")
    if any(c in text for c in ("\0", SEPARATOR)) or any("\ud800" <= c <= "\udfff" for c in text):
        raise ConfigError(f"dataset.schema.{key}: {text!r} holds a character that is none of a text; remove it")


__all__ = ["Metric", "Schema", "Stated"]
