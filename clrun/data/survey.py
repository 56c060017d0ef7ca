"""What all image files of a data set are, found before anything is learned: which cannot be read, and their range.

Every file is opened once. With `dataset.images.verify=headers` only the header is read, except in files with more than
8 bits per value when the range is to be found. The result is kept within the process; for at least 2,000 files without
a problem also in the user's cache ("surveys", see `clrun.system.files.cache_folder`), so that they are opened once as
long as their names, sizes and times of change stay the same.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clrun.data.decode import Decoding, Files, check_size, decode, opened, undecodable
from clrun.data.depth import bits_of, declared, depth, eight_bits, values
from clrun.system.errors import ConfigError
from clrun.system.files import cache_folder, make_folder, replace_text
from clrun.system.processes import core_count
from clrun.system.reading import MB, read_json

STORED = 2000  # files from which on a survey is kept on the disk
RECENT = 2_000_000_000  # ns; a file changed this recently may change again without another time
LIMIT = 256 * MB  # bytes of a stored survey


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
    key, newest = _key(files, options, channels)
    if key not in _known:
        place = _path(files, options, channels) if len(files) >= STORED else None
        found = None if place is None else _load(place, key)
        if found is None:
            found = _looked(files, options, channels)
            if place is not None and not found.problems and newest < time.time_ns() - RECENT:
                _store(place, key, found)
        _known[key] = found
    return _known[key]


def _looked(files: Files, options: Decoding, channels: int) -> Survey:
    """Return what the files are, after opening each of them."""
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
    return found


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


def _asked(options: Decoding, channels: int) -> str:
    """Return what is asked of each file, as text."""
    asked = (options.recipe, options.range, options.max_pixels, options.verify, options.unreadable, channels)
    return " ".join(map(str, asked))


def _key(files: Files, options: Decoding, channels: int) -> tuple[str, int]:
    """Return a digest of what a survey depends on, and the time of the last change of any file in ns."""
    digest, newest = hashlib.sha256(_asked(options, channels).encode()), 0
    for row in range(len(files)):
        try:
            stamp = files.stamp(row)
            newest = max(newest, stamp[1])
            text = str(stamp)
        except ConfigError:
            text = "gone"
        digest.update(f"\n{files.name(row)} {text}".encode(errors="surrogateescape"))
    return digest.hexdigest(), newest


def _path(files: Files, options: Decoding, channels: int) -> Path:
    """Return the file that keeps the survey of some files; a part of a data set has one however its files change."""
    text = f"{files.place} {files.name(0)} {_asked(options, channels)}"
    name = hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=12).hexdigest()
    return cache_folder("surveys") / f"{name}.json"


def _load(path: Path, key: str) -> Survey | None:
    """Return a stored survey; None when there is none for this key, or it is damaged, which costs only time."""
    try:
        stored = read_json(path, remedy="", limit=LIMIT)
        if stored["key"] == key:
            return Survey({}, {int(row): int(value) for row, value in stored["largest"].items()})
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError):
        pass
    return None


def _store(path: Path, key: str, found: Survey) -> None:
    """Store a survey without problems. A cache that cannot be written is left alone: it only saves time."""
    try:
        make_folder(path.parent)
        replace_text(path, json.dumps({"key": key, "largest": found.largest}), flush=False)
    except ConfigError:
        return
