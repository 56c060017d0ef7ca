"""Reading of files that may come from somebody else: regular files only, never more than a stated number of bytes."""

import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from clrun.system.errors import ConfigError, first_line
from clrun.system.files import open_own

MB = 2**20
# Bounds on a JSON file that are checked before it is parsed, because parsed values need many times their bytes.
VALUES, TEXTS, CONTAINERS = 8_000_000, 2_000_000, 1_000_000


def read_regular(path: Path, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Links are refused: clrun writes none into the folders of runs, and one may name a device or a file of its reader.
    Nothing is read from a file that is too large, and a file that grows meanwhile is read up to the limit.

    Raises:
        OSError: the file does not exist, cannot be read, is too large, or is a link, a pipe or a device.
        ConfigError: a link was put there between the look at the file and its opening.
    """
    kind = os.lstat(path).st_mode  # before opening, which has effects on some devices
    if stat.S_ISLNK(kind):
        raise OSError(None, "a link, which is not followed; put the file itself there")
    if not stat.S_ISREG(kind):
        raise OSError(None, "not a regular file")
    with open_own(path, "read") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(None, f"{size / MB:,.1f} MB, at most {limit / MB:,.0f} MB are read")
        return file.read(limit)


def read_lines(path: Path, limit: int) -> list[bytes]:
    """Return the lines of a regular file with their ends; see `read_regular`.

    Raises:
        ConfigError: the file cannot be read; the message says what to do.
    """
    try:
        return read_regular(path, limit).splitlines(keepends=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({first_line(error)}); move it away to go on without it") from error


def read_json(path: Path, *, remedy: str, limit: int) -> Any:
    """Return the content of a JSON file.

    Args:
        path: a regular file; see `read_regular`.
        remedy: end of the error message, which says what to do.
        limit: largest size in bytes.

    Raises:
        ConfigError: the file cannot be read, has too many values, or is not JSON (NaN and infinity are not).
    """
    try:
        data = read_regular(path, limit)
        containers = data.count(b"[") + data.count(b"{")
        if data.count(b",") > VALUES or data.count(b'"') > 2 * TEXTS or containers > CONTAINERS:
            raise ValueError("it has too many values")
        return json.loads(data, parse_constant=_no_number)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read ({first_line(error)}); {remedy}") from error


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
