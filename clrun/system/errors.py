"""The exceptions for user mistakes and diverged training, the one warning, spelling, declared ranges of options."""

import difflib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated


class ConfigError(Exception):
    """A mistake of the user: reported as one line per problem, exit code 2, no traceback.

    The message says what is wrong, where (full dotted key or file) and what to do.
    """


class NumericalError(ArithmeticError):
    """Training produced numbers that are not finite: reported as one line, exit code 1, no traceback."""


def one_line(error: BaseException) -> str:
    """Return the message of an exception on one line, its type where it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """Return the first line of the message of an exception; the bare reason of an OSError; the type without message."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)


class DataWarning(UserWarning):
    """Something about the data that the user should know: shown once, and kept in run.json."""


def warn(text: str) -> None:
    """Issue a `DataWarning`."""
    warnings.warn(text, DataWarning, stacklevel=3)


@contextmanager
def noting(notes: list[str]) -> Iterator[None]:
    """Put the `DataWarning`s of the block into `notes` instead of showing them."""
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
    """Bounds of a number, declared in a signature as `Annotated[int, Range(minimum=0)]` and checked by `config.check`.

    Args:
        minimum: smallest value allowed; None for no bound.
        maximum: largest value allowed; None for no bound.
        above: value that must be exceeded (exclusive bound); None for no bound.
    """

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None

    def problem(self, value: float) -> str | None:
        """Return what is wrong with `value` ("must be at least 0"), or None."""
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
    close = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
