"""Digests of the contents of image files and of rows in memory: what tells changed data from moved or copied data.

A digest has 64 bits. It finds accidents, not forgeries: whoever wants to can make two contents with one digest. All
digests are computed by one rule, see `row_digests`: of names, of rows in memory and of what is read of files.

A file of at most 16 KiB is read as a whole. Of a larger file the size and three blocks of 4 KiB are read, at its
beginning, in its middle and at its end, so that a large data set is not read twice. The blind spot is therefore a file
above 16 KiB that was changed outside these blocks and has kept its size, such as an uncompressed picture of which a few
pixels were painted over; an image that was compressed again hardly ever keeps its size.

Digests are kept for a file while its path, size, time of the last change and inode stay the same: within the process,
and for folders with at least 2,000 images in the user's cache ("contents", see `clrun.system.files.cache_folder`).
"""

import hashlib
import os
import resource
import time
import unicodedata
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clrun.system.checksums import RULE
from clrun.system.errors import ConfigError, first_line
from clrun.system.files import cache_folder, make_folder, open_to_read, remove_leftovers, replacing
from clrun.system.locks import exclusive
from clrun.system.reading import MB, read_regular

Digests = NDArray[np.uint64]
Stamps = NDArray[np.int64]  # [M, 3]: size in bytes, time of the last change in ns, inode
WHOLE = 16 * 1024  # bytes; larger files are read in blocks
BLOCK = 4 * 1024
ROW = 8 + WHOLE  # bytes of a file that its digest depends on: its size and what is read
LIMIT = 1024 * MB  # bytes of stored digests that are read; 5 million files need that many
STORED = 2000  # files of a folder from which on digests are kept on the disk
RECENT = 2_000_000_000  # ns; a file changed this recently may change again without another time
THREADS, CHUNK = 4, 256  # readers, and the files that each takes at once
ROWS = 256  # rows of a tensor that are copied at once
WORDS = 2**15  # words that are multiplied at once; they fit into the cache of a processor's core

_known: dict[str, dict[str, tuple[int, int, int, int]]] = {}  # folder -> name -> stamp and digest


@dataclass(frozen=True, eq=False)
class StoredRows:
    """What identifies the M stored rows of a split, wherever they lie.

    Attributes:
        names: M names from the root of the data set on; () for rows in memory, which have none.
        contents: [M] digest of the content of each row.
        stamps: [M, 3] size, time and inode of each file; None for rows that are not files of their own.
        path: returns the path of the file of a row; "" when it has none.
    """

    names: tuple[str, ...]
    contents: Digests
    stamps: Stamps | None = None
    path: Callable[[int], str] = field(default=lambda row: "")

    @cached_property
    def name_digests(self) -> Digests:
        """[M] digest of each name, the same for composed and decomposed accents; zeros for rows without names."""
        if not self.names:
            return np.zeros(len(self.contents), dtype=np.uint64)
        return text_digests([name if name.isascii() else unicodedata.normalize("NFC", name) for name in self.names])

    def changed(self, rows: NDArray[np.int64]) -> list[str]:
        """Return the names of those of the `rows` whose files have another content than they had, or are gone.

        Only files of another size or time are read.
        """
        if self.stamps is None:
            return []
        return [self.names[row] for row in rows.tolist() if self._is_changed(row)]

    def _is_changed(self, row: int) -> bool:
        """Whether the file of a row has changed."""
        path = self.path(row)
        if not path or self.stamps is None:
            return False
        try:
            if file_stamp(path)[:2] == tuple(self.stamps[row, :2].tolist()):
                return False
            return file_digest(path) != int(self.contents[row])
        except ConfigError:
            return True

    @classmethod
    def of_files(cls, root: str, names: Sequence[str]) -> Self:
        """Return what identifies the files `names` of the folder `root` (absolute).

        Raises:
            ConfigError: a file cannot be read.
        """
        digests, stamps = file_digests(root, names)
        return cls(tuple(names), digests, stamps, lambda row: os.path.join(root, names[row]))

    @classmethod
    def joined(cls, parts: Sequence[tuple[Self, NDArray[np.int64]]]) -> Self:
        """Return some rows of several storages as one, in order."""
        owners = [(part, row) for part, rows in parts for row in rows.tolist()]
        named = any(part.names for part, _ in parts)
        names = tuple(part.names[row] if part.names else "" for part, row in owners) if named else ()
        contents = [part.contents[rows] for part, rows in parts]
        unknown = [
            np.zeros((len(rows), 3), np.int64) if part.stamps is None else part.stamps[rows] for part, rows in parts
        ]
        stamps = np.concatenate(unknown) if any(part.stamps is not None for part, _ in parts) else None
        return cls(names, np.concatenate(contents), stamps, lambda row: owners[row][0].path(owners[row][1]))


def text_digest(text: str) -> int:
    """Return the digest of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest())


def text_digests(texts: Sequence[str]) -> Digests:
    """Return the digest of each text, as of a row of its bytes; zeros behind a row do not change its digest."""
    table = np.array([text.encode(errors="surrogateescape") for text in texts], dtype=bytes)
    return row_digests(torch.from_numpy(table.view(np.uint8).reshape(len(texts), -1)))


def bytes_digest(content: bytes | memoryview) -> int:
    """Return the digest of an encoded image, by the rule at the head of this module."""
    size = len(content)
    row = size.to_bytes(8, "little") + b"".join(content[start:stop] for start, stop in _blocks(size))
    return int(row_digests(torch.frombuffer(bytearray(row), dtype=torch.uint8)[None])[0])


def file_digest(path: str) -> int:
    """Return the digest of a file's content.

    Raises:
        ConfigError: the file cannot be read.
    """
    return int(_read_files([path])[0][0])


def _read_files(paths: Sequence[str], table: NDArray[np.uint8] | None = None) -> tuple[Digests, Stamps]:
    """Return digest and stamp of each file.

    Args:
        paths: N files.
        table: [at least N, 8 + WHOLE], is overwritten; a new one costs time, because its pages are cleared.

    Raises:
        ConfigError: a file cannot be read.
    """
    table = np.empty((len(paths), ROW), dtype=np.uint8) if table is None else table
    stamps: list[tuple[int, int, int]] = []
    lengths: list[int] = []
    content = table.reshape(-1).data
    for row, path in enumerate(paths):
        start = at = row * ROW
        try:
            file = open_to_read(path)
            try:
                state = os.fstat(file)
                size = state.st_size
                stamps.append((size, state.st_mtime_ns, state.st_ino))
                content[at : at + 8] = size.to_bytes(8, "little")
                at += 8
                for first, stop in _blocks(size):
                    part = os.pread(file, stop - first, first)
                    content[at : at + len(part)] = part
                    at += len(part)
            finally:
                os.close(file)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({first_line(error)})") from error
        lengths.append(at - start)
    widest = -(-max(lengths) // 4) * 4
    for row, length in enumerate(lengths):
        if length < widest:
            table[row, length:widest] = 0
    return _mixed(_sums(table[: len(paths), :widest])), np.array(stamps, dtype=np.int64)


def _blocks(size: int) -> tuple[tuple[int, int], ...]:
    """Return the parts (start, stop) of a content of `size` bytes that its digest depends on."""
    if size <= WHOLE:
        return ((0, size),)
    middle = (size - BLOCK) // 2
    return (0, BLOCK), (middle, middle + BLOCK), (size - BLOCK, size)


def file_digests(root: str, names: Sequence[str]) -> tuple[Digests, Stamps]:
    """Return digest [M] and stamp [M, 3] of each file; only files without a digest are read.

    Args:
        root: absolute path of the folder.
        names: paths from there.

    Raises:
        ConfigError: a file cannot be read.
    """
    stored = _load(root) if root not in _known and len(names) >= STORED else {}
    known = _known.setdefault(root, stored)
    start = os.path.join(root, "")
    # Calling os.path.join for each name would take as long as asking for its stamp.
    paths = [name if name.startswith("/") else start + name for name in names]
    stamps = np.empty((len(names), 3), dtype=np.int64)
    digests = np.empty(len(names), dtype=np.uint64)
    missing = []
    for row, name in enumerate(names):
        found = known.get(name)
        if found is not None and found[:3] == file_stamp(paths[row]):
            stamps[row], digests[row] = found[:3], found[3]
        else:
            missing.append(row)
    if missing:
        digests[missing], stamps[missing] = _read([paths[row] for row in missing])
        before = time.time_ns() - RECENT
        read = zip(missing, stamps[missing].tolist(), digests[missing].tolist(), strict=True)
        fresh = {
            names[row]: (size, changed, inode, digest)
            for row, (size, changed, inode), digest in read
            if changed < before
        }
        known |= fresh
        if fresh and len(names) >= STORED:
            _store(root, known)
    return digests, stamps


def file_stamp(path: str) -> tuple[int, int, int]:
    """Return size, time of the last change (ns) and inode of a file.

    Raises:
        ConfigError: the file no longer exists.
    """
    try:
        state = os.stat(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({first_line(error)})") from error
    return state.st_size, state.st_mtime_ns, state.st_ino


def _read(paths: Sequence[str]) -> tuple[Digests, Stamps]:
    """Return digest and stamp of each file.

    Files that the operating system has in memory are read by this thread alone, because threads would take turns. When
    this thread has waited for every fourth of the first files or more, several threads wait for the disk at once.

    Raises:
        ConfigError: a file cannot be read.
    """
    parts = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
    table, before = np.empty((len(parts[0]), ROW), dtype=np.uint8), _waits()
    found = [_read_files(parts[0], table)]
    if _waits() - before > len(parts[0]) / 4:
        with ThreadPoolExecutor(THREADS, "clrun-contents") as pool:
            found += pool.map(_read_files, parts[1:])
    else:
        found += [_read_files(part, table) for part in parts[1:]]
    digests, stamps = zip(*found, strict=True)
    return np.concatenate(digests), np.concatenate(stamps)


def _waits() -> int:
    """Return how often this thread has waited, as for a disk; other programs that need the processor do not count."""
    return resource.getrusage(getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)).ru_nvcsw


def _path(root: str) -> Path:
    """Return the file that keeps the digests of a folder."""
    name = hashlib.blake2b(f"{RULE} {root}".encode(errors="surrogateescape"), digest_size=12).hexdigest()
    return cache_folder("contents") / f"{name}.tsv"


def _load(root: str) -> dict[str, tuple[int, int, int, int]]:
    """Return the stored digests of a folder; none when the file is missing or damaged, which costs only time."""
    try:
        lines = read_regular(_path(root), LIMIT).decode(errors="surrogateescape").split("\n")
        split = [line.split("\t", 4) for line in lines if line]
        return {name: (int(a), int(b), int(c), int(d)) for a, b, c, d, name in split}
    except (OSError, ValueError, ConfigError):
        return {}


def _store(root: str, known: dict[str, tuple[int, int, int, int]]) -> None:
    """Store the digests of a folder. A cache that cannot be written is left alone: it only saves time."""
    lines = [f"{a}\t{b}\t{c}\t{d}\t{name}" for name, (a, b, c, d) in known.items() if "\n" not in name]
    try:
        make_folder(_path(root).parent)
        with exclusive(_path(root).with_suffix(".lock")), replacing(_path(root), flush=False) as file:
            remove_leftovers(_path(root).parent)
            file.write("\n".join(lines).encode(errors="surrogateescape"))
    except (OSError, ConfigError):
        return


def row_digests(rows: Tensor) -> Digests:
    """Return the digest [M] of each row of a tensor [M, ...]; zeros behind a row do not change its digest.

    Each row's bytes are read as 32-bit words w_k, and its digest is sum_k a_k w_k modulo 2^64 with fixed random odd
    64-bit numbers a_k (multilinear hashing, Carter and Wegman 1979), mixed by the last steps of SplitMix64 (Steele et
    al., 2014), so that sums of digests do not cancel. One changed word always changes the digest, and changes of
    several words cancel with a probability of at most 2^-32 over the a_k, whichever bits of the words they are in;
    with 64-bit words it would be 2^-8 for changes of their highest bytes alone, such as a column of pixels.
    A hash function per row would take ten times as long.
    """
    count = len(rows)
    if not rows.numel():
        return np.zeros(count, dtype=np.uint64)
    width = rows[0].numel() * rows.element_size()
    found = np.empty(count, dtype=np.uint64)
    padded = np.zeros((min(ROWS, count), -(-width // 4) * 4), dtype=np.uint8)
    for start in range(0, count, ROWS):
        part = rows[start : start + ROWS].detach().cpu().contiguous()
        padded[: len(part), :width] = part.reshape(len(part), -1).view(torch.uint8).numpy()
        found[start : start + ROWS] = _sums(padded[: len(part)])
    return _mixed(found)


def _sums(table: NDArray[np.uint8]) -> Digests:
    """Return the sum of the weighted words of each row of bytes [M, 4 n]; see `row_digests`."""
    words = table.view(np.uint32)
    keys = _keys(words.shape[1])
    rows = max(1, WORDS // max(1, len(keys)))
    return np.concatenate([words[k : k + rows].astype(np.uint64) @ keys for k in range(0, len(words), rows)])


@lru_cache(maxsize=8)
def _keys(count: int) -> Digests:
    """Return the first numbers by which words are multiplied; they are the same for every count."""
    return np.random.RandomState(0).randint(0, 2**64, count, dtype=np.uint64) | np.uint64(1)


def _mixed(digests: Digests) -> Digests:
    """Return the digests after a bijection in which every bit depends on all bits."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        digests = (digests ^ (digests >> np.uint64(shift))) * np.uint64(factor)
    return digests ^ (digests >> np.uint64(31))


_tensors: dict[int, tuple[Callable[[], Tensor | None], StoredRows]] = {}


def tensor_rows(images: Tensor) -> StoredRows:
    """Return what identifies the rows of a tensor, computed once per process."""
    known = _tensors.get(id(images))
    if known is None or known[0]() is not images:
        known = _tensors[id(images)] = (weakref.ref(images), StoredRows((), row_digests(images)))
    return known[1]
