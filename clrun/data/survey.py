"""What all image files of a data set are, found before anything is learned: which cannot be read, and their range.

Every file is opened once. With `dataset.images.verify=headers` only the header is read, except in files with more than
8 bits per value when the range is to be found. The result is kept within the process.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clrun.data.decode import Decoding, Files, check_size, decode, opened, undecodable
from clrun.data.depth import bits_of, declared, depth, eight_bits, values
from clrun.system.errors import ConfigError
from clrun.system.processes import core_count


@dataclass(frozen=True)
class Survey:
    """What some image files are.

    Attributes:
        problems: the problem of each file that cannot be read, by row.
        largest: the largest value of each file with more than 8 bits per value, by row; -1 for a given range.
    """

    problems: dict[int, str] = field(default_factory=dict)
    largest: dict[int, int] = field(default_factory=dict)


_known: dict[str, Survey] = {}


def survey(files: Files, options: Decoding, channels: int) -> Survey:
    """Return what the files are, as far as `options.verify` asks for it; files to be skipped are decoded in any case.

    Args:
        files: M files.
        options: how they are decoded.
        channels: 1 or 3.
    """
    if options.verify == "none" and options.unreadable == "error":
        return Survey()
    key = _key(files, options, channels)
    if key not in _known:
        found = Survey()

        def look(row: int) -> tuple[str | None, int | None]:
            return _look(files, row, options, channels)

        with ThreadPoolExecutor(core_count(), "clrun-survey") as pool:
            rows = pool.map(look, range(len(files)), chunksize=64)
            for row, (problem, largest) in enumerate(
                tqdm(rows, "looking at images", len(files), unit="image", leave=False, disable=None)
            ):
                if problem is not None:
                    found.problems[row] = problem
                elif largest is not None:
                    found.largest[row] = largest
        _known[key] = found
    return _known[key]


def ranged(options: Decoding, surveys: Sequence[Survey]) -> tuple[Decoding, str]:
    """Return the options with the range that was found, and a word on it for the user; "" without such files.

    Args:
        options: how the files are decoded.
        surveys: of all parts of a data set.
    """
    largest = [value for part in surveys for value in part.largest.values()]
    if not largest:
        return options, ""
    if isinstance(options.range, list):
        return options, f"values {options.range[0]:g} to {options.range[1]:g} as black to white"
    bits: Any = bits_of(max(largest)) if options.range == "auto" else options.range
    source = "as found" if options.range == "auto" else "as set"
    return replace(options, range=bits), f"16-bit files read as {bits} bits, {source}"


def _look(files: Files, row: int, options: Decoding, channels: int) -> tuple[str | None, int | None]:
    """Return the problem of a file, or None; and the largest value of a file with 16 bits per value, or None."""
    name = files.name(row)
    try:
        content = files.content(row)
        largest = _header(content, name, options)
        if options.verify == "decode" or options.unreadable == "skip":
            decode(content, name, options, channels)
    except ConfigError as error:
        return str(error).partition(";")[0], None
    return None, largest


def _header(content: Path | bytes, name: str, options: Decoding) -> int | None:
    """Return the largest value of a file with more than 8 bits per value (-1 for a given range); None for others.

    Raises:
        ConfigError: the file cannot be opened, is too large, or cannot be scaled.
    """
    try:
        with opened(content, name) as image:
            check_size(image, name, options)
            bits = depth(image)
            if bits == 8 or declared(image):
                return None
            if isinstance(options.range, list):
                return -1
            found = values(image, content)
            colours = found[..., :-1] if found.ndim == 3 and found.shape[2] in (2, 4) else found
            eight_bits(colours, options.range)  # refuses values that do not fit
            return int(colours.max())
    except ConfigError:
        raise
    except Exception as error:  # decoders of damaged files raise almost anything
        raise undecodable(content, name, error) from error


def _key(files: Files, options: Decoding, channels: int) -> str:
    """Return a digest of what a survey depends on."""
    asked = f"{options.recipe} {options.range} {options.max_pixels} {options.verify} {options.unreadable} {channels}"
    digest = hashlib.sha256(asked.encode())
    for row in range(len(files)):
        try:
            stamp = str(files.stamp(row))
        except ConfigError:
            stamp = "gone"
        digest.update(f"\n{files.name(row)} {stamp}".encode(errors="surrogateescape"))
    return digest.hexdigest()
