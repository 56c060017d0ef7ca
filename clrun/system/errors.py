"""Exceptions for user mistakes and diverged training, the warning about data, ranges of options, texts of messages."""

import difflib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated


class ConfigError(Exception):
    """A mistake of the user: reported as one line per problem, with exit code 2 and without traceback.

    The message says where the problem is (full dotted key or file), what is wrong and what to do.
    """


class WeightsMissing(ConfigError):
    """A file of weights is not there: a run needs it, and a dry run can do without."""


class NumericalError(ArithmeticError):
    """A loss or a parameter became NaN or infinite: reported as one line, with exit code 1 and without traceback."""


def one_line(error: BaseException) -> str:
    """Return the whole message of an exception on one line; the name of its type when it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """Return the first line of the message of an exception; the name of its type when it has no message.

    For an OSError it is the reason without error number and file name.
    """
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)


def printable(text: str) -> str:
    """Return `text` on one line; control characters, which a terminal would execute, are written as escapes."""
    return "".join(c if c.isprintable() else " " if c.isspace() else repr(c)[1:-1] for c in text)


class DataWarning(UserWarning):
    """A warning about the user's data: shown once and stored in run.json."""


def warn(text: str) -> None:
    """Issue a `DataWarning`."""
    warnings.warn(text, DataWarning, stacklevel=3)


@contextmanager
def collecting_warnings(notes: list[str]) -> Iterator[None]:
    """Append the messages of every `DataWarning` in the block to `notes` instead of showing them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DataWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, DataWarning):
            notes.append(str(warning.message))
        else:
            warnings.showwarning(warning.message, warning.category, warning.filename, warning.lineno)


@dataclass(frozen=True)
class Range:
    """Bounds of a number, declared as `Annotated[int, Range(minimum=0)]` and checked by `clrun.config.check`.

    Args:
        minimum: smallest value allowed; None for no bound.
        maximum: largest value allowed; None for no bound.
        above: largest value that is too small (exclusive bound); None for no bound.
    """

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None

    def problem(self, value: float) -> str | None:
        """Return the problem of `value` ("must be at least 0"), or None when it is within the bounds."""
        if value != value:
            return "must be a number"
        if self.minimum is not None and value < self.minimum:
            return f"must be at least {self.minimum:g}"
        if self.above is not None and value <= self.above:
            return f"must be greater than {self.above:g}"
        if self.maximum is not None and value > self.maximum:
            return f"must be at most {self.maximum:g}"
        return None


Count = Annotated[int, Range(minimum=0)]
PositiveInt = Annotated[int, Range(minimum=1)]
NonNegative = Annotated[float, Range(minimum=0)]
Positive = Annotated[float, Range(above=0)]
Fraction = Annotated[float, Range(minimum=0, maximum=1)]


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the option closest to `name`, or "" when none is close."""
    known = {option.casefold(): option for option in options}
    close = difflib.get_close_matches(name.casefold(), list(known), n=1, cutoff=0.5)
    return f"; did you mean '{known[close[0]]}'?" if close else ""
