"""Names of files and classes in messages."""

from collections.abc import Sequence

SHOWN = 3  # names in a message


def printable(text: str) -> str:
    """Return a name with bytes that are not valid text replaced."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def some(names: Sequence[str]) -> str:
    """Return the first names, and the number of the others."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(printable(name) for name in names[:SHOWN]) + more
