"""Features of frozen backbones on disk: one memory-mapped file per entry, found by everything the features depend on.

An entry is KEY.npy (rows in data-set order) and KEY.json (description and checksum). KEY.json is written last: features
without it are not read. KEY.lock prevents two processes from computing the same entry. Nothing here imports torch.
"""

import errno
import hashlib
import json
import math
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from clrun.system.errors import ConfigError, first_line
from clrun.system.files import cache_folder, is_at, json_text, lock, open_own, replace_text, temporary_name
from clrun.system.locks import exclusive
from clrun.system.reading import MB, read_json

SCHEMA = 1
ABANDONED = 3600.0  # seconds without a write after which an unfinished file is removed as left by a crash
HEADER = 128  # bytes of .npy before the rows
BLOCK = 2**20  # bytes read at once for a checksum
SIDECAR_LIMIT = MB  # bytes of KEY.json that are read
MAPPED = 2**25  # bytes up to which features are read through a memory map

Floats = npt.NDArray[np.float32]
_intact: set[tuple[str, int, int]] = set()  # (path, inode, time of change) of files that this process has checked


def default_folder() -> Path:
    """Return the folder for clrun's features: $CLRUN_CACHE/features, else in the user's cache."""
    return cache_folder("features")


@dataclass(frozen=True)
class Features:
    """Rows of the cache. While the object lives its file is open, and the entry counts as in use.

    Attributes:
        file: the open .npy file, locked against removal.
        shape: (M, D).
        key: digest of what the features depend on.
        reused: whether they were found in the cache, and not computed by this process.
        in_cache: whether they stay in the cache; features that do not fit exist as long as the file is open.
        notes: sentences for the readers of the results.
    """

    file: BinaryIO
    shape: tuple[int, int]
    key: str
    reused: bool
    in_cache: bool
    notes: tuple[str, ...] = ()

    @cached_property
    def rows(self) -> np.memmap[Any, np.dtype[np.float32]]:
        """[M, D] float32, mapped into memory: pages are read when they are touched; writing changes a private copy."""
        return np.memmap(self.file, dtype="<f4", mode="c", offset=HEADER, shape=self.shape)

    @property
    def size(self) -> int:
        """Bytes of all rows."""
        return 4 * self.shape[0] * self.shape[1]

    def take(self, rows: npt.NDArray[np.int64]) -> Floats:
        """Return copies of rows ([k]), in this order.

        Small files are read through the memory map. With a large file every access would load up to two megabytes
        around the row, so that large files are read directly, one run of consecutive rows at a time.
        """
        if self.size <= MAPPED:
            return self.rows[rows]
        width = 4 * self.shape[1]
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        runs = zip([0, *breaks], [*breaks, len(rows)], strict=True)
        data = b"".join(
            os.pread(self.file.fileno(), (end - first) * width, HEADER + int(rows[first]) * width)
            for first, end in runs
            if end > first
        )
        return np.frombuffer(bytearray(data), dtype="<f4").reshape(len(rows), self.shape[1])


@dataclass(frozen=True)
class Entry:
    """An entry of the cache, for listings.

    Attributes:
        path: the features.
        size: bytes on the disk.
        used: time of the last use, in seconds since 1970.
        about: description from the time of computation (data set, backbone, rows, width, ...); empty if unreadable.
    """

    path: Path
    size: int
    used: float
    about: Mapping[str, Any]

    @property
    def in_use(self) -> bool:
        """Whether a living process has the entry open."""
        try:
            file = _locked(self.path, shared=False)
        except OSError:
            return False
        if file is not None:
            file.close()
        return file is None

    def remove(self) -> bool:
        """Remove the entry unless it is in use; return whether it is gone."""
        file = _locked(self.path, shared=False)
        if file is None:
            return not self.path.exists()
        with file:
            for suffix in (".json", ".npy", ".lock"):
                self.path.with_suffix(suffix).unlink(missing_ok=True)
        return True


@dataclass(frozen=True)
class FeatureCache:
    """A folder of features.

    Attributes:
        folder: the folder; made when features are first stored.
        limit: size limit of all entries together in bytes. The entries used least recently make room for new ones;
            entries in use are never removed.
        about: facts recorded with new entries that are not part of their key (names, versions, device).
        opened: features requested so far.
    """

    folder: Path
    limit: float = math.inf
    about: Mapping[str, Any] = field(default_factory=dict)
    opened: list[Features] = field(default_factory=list)

    def get(
        self,
        key: Mapping[str, Any],
        *,
        shape: tuple[int, int],
        compute: Callable[[], Iterable[Floats]],
        agrees: Callable[[Features], bool],
        about: Mapping[str, Any],
    ) -> Features:
        """Return the features of `key`, computed by the first process that asks while others wait.

        Args:
            key: everything the features depend on, as plain JSON values.
            shape: (M, D).
            compute: yields the rows in order, in blocks.
            agrees: recomputes a few rows and says whether the stored ones match.
            about: facts recorded with a new entry, in addition to `self.about`.

        Raises:
            ConfigError: the folder cannot be written.
        """
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        found = self._open(name, shape, agrees)
        if not isinstance(found, Features):
            self._make_folder()
            with _writing(self.folder):
                open_own(self.folder / f"{name}.lock", "lock").close()
            with exclusive(self.folder / f"{name}.lock"):
                found = self._open(name, shape, agrees)  # another process may have been first
                if not isinstance(found, Features):
                    found = self._compute(name, shape, compute, {**self.about, **about, "key": dict(key)}, found)
        self.opened.append(found)
        return found

    def _make_folder(self) -> None:
        """Make the folder if there is none; the process that makes it says so on stderr, with its size limit."""
        with _writing(self.folder):
            try:
                self.folder.mkdir(parents=True)
            except FileExistsError:
                if self.folder.is_dir():
                    return
                raise
        print(
            f"clrun: features of frozen backbones are kept in {self.folder}, up to {self.limit / 1e9:g} GB; change "
            "this with job.feature_cache_gb=N, job.feature_cache=FOLDER or job.feature_cache=false",
            file=sys.stderr,
        )

    def entries(self) -> list[Entry]:
        """Return the entries of the cache, most recently used first."""
        found = []
        for path in self.folder.glob("*.npy"):
            try:
                about = _sidecar(path)
                facts = path.with_suffix(".json") if about else path
                found.append(Entry(path, path.stat().st_size, facts.stat().st_mtime, about.get("about", {})))
            except FileNotFoundError:  # removed meanwhile
                continue
        return sorted(found, key=lambda entry: -entry.used)

    def make_room(self, size: int = 0) -> bool:
        """Remove files left by crashes, then entries until `size` more bytes fit; return whether they fit."""
        total = size
        for path in [*self.folder.glob("*.tmp"), *self.folder.glob("*.lock")]:
            with _missing_is_fine():
                stored, useless = path.stat(), path.suffix == ".tmp" or not path.with_suffix(".npy").exists()
                if useless and time.time() - stored.st_mtime > ABANDONED:
                    path.unlink()
                else:
                    total += stored.st_size
        entries = self.entries()
        total += sum(entry.size for entry in entries)
        while total > self.limit >= size and entries:
            entry = entries.pop()
            with _missing_is_fine():
                total -= entry.size if entry.remove() else 0
        return total <= self.limit

    def _open(self, name: str, shape: tuple[int, int], agrees: Callable[[Features], bool]) -> Features | str | None:
        """Return the stored features; or the reason why they cannot be used; or None if there are none."""
        path = self.folder / f"{name}.npy"
        facts = _sidecar(path)
        file = _locked(path, shared=True) if facts else None
        if file is None:
            return None
        seen = _identity(path)
        if not _fits(file, shape) or (seen not in _intact and _checksum(file) != facts.get("checksum")):
            return "the stored features were damaged"
        found = Features(file, shape, name, reused=True, in_cache=True, notes=self._differences(facts))
        if seen not in _intact and not agrees(found):
            return "the stored features differ from those that the backbone computes here"
        _intact.add(seen)
        with _missing_is_fine():
            os.utime(path.with_suffix(".json"), follow_symlinks=False)
        return found

    def _differences(self, facts: Mapping[str, Any]) -> tuple[str, ...]:
        """Return a note if the features were computed with another version or on another device."""
        before, now = facts.get("about", {}).get("circumstances"), self.about.get("circumstances")
        return () if before == now else (f"features were computed with {before}, this run has {now}",)

    def _compute(
        self,
        name: str,
        shape: tuple[int, int],
        compute: Callable[[], Iterable[Floats]],
        about: Mapping[str, Any],
        damage: str | None,
    ) -> Features:
        """Compute, store and open the features; those that do not fit into the cache exist as long as they are open."""
        path, start = self.folder / f"{name}.npy", time.perf_counter()
        temporary = path.with_name(temporary_name(path.name))
        fits = self.make_room(HEADER + 4 * shape[0] * shape[1])
        try:
            checksum = _write(temporary, shape, compute)
            file = _locked(temporary, shared=True)
            assert file is not None and _fits(file, shape), "no other process knows the file"
            if fits:
                about = {**about, "rows": shape[0], "width": shape[1], "seconds": time.perf_counter() - start}
                facts = {"schema": SCHEMA, "checksum": checksum, "made": datetime.now(UTC).isoformat(), "about": about}
                with _writing(self.folder):
                    path.with_suffix(".json").unlink(missing_ok=True)
                    os.replace(temporary, path)
                    replace_text(path.with_suffix(".json"), json_text(facts))
                _intact.add(_identity(path))
        finally:
            with _missing_is_fine():
                temporary.unlink()
        notes = [f"{damage}; they were computed again"] if damage else []
        if not fits:
            notes.append(
                f"features are not kept: they do not fit into the {self.limit / 1e9:g} GB of {self.folder} "
                "(job.feature_cache_gb)"
            )
        return Features(file, shape, name, reused=False, in_cache=fits, notes=tuple(notes))


def listing(folder: Path) -> str:
    """Return a table of the entries in `folder`, most recently used first, and their total size."""
    entries = FeatureCache(folder).entries()
    lines = [f"{'data set':<16}{'part':<7}{'backbone':<32}{'rows x width':>16}{'MB':>10}  last used"] if entries else []
    for entry in entries:
        names = [str(entry.about.get(key, "?")) for key in ("dataset", "part", "backbone", "rows", "width")]
        used = datetime.fromtimestamp(entry.used).isoformat(" ", "minutes")
        size = f"{' x '.join(names[3:]):>16}{entry.size / 1e6:>10.1f}"
        state = " (in use)" if entry.in_use else ""
        lines.append(f"{names[0][:15]:<16}{names[1][:6]:<7}{names[2][:31]:<32}{size}  {used}{state}")
    total = sum(entry.size for entry in entries)
    return "\n".join([*lines, f"{len(entries)} files, {total / 1e6:.1f} MB in {folder}"])


def _write(path: Path, shape: tuple[int, int], compute: Callable[[], Iterable[Floats]]) -> int:
    """Write rows as .npy, block by block, flushed to the disk; return their checksum."""
    checksum = count = 0
    blocks = iter(compute())
    with _writing(path.parent):
        file = open_own(path, "new")
    with file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for block in blocks:
            data = np.ascontiguousarray(block, dtype="<f4")
            with _writing(path.parent):
                file.write(data.data)
            checksum, count = zlib.crc32(data.data, checksum), count + len(data)
        assert count == shape[0], f"{count} rows of {shape[0]}"
        with _writing(path.parent):
            file.flush()
            os.fsync(file.fileno())
    return checksum


def _fits(file: BinaryIO, shape: tuple[int, int]) -> bool:
    """Return whether an open file is .npy with rows of this shape; the file is then positioned at the first row."""
    try:
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0(file) if version == (1, 0) else None
    except Exception:  # the header is a Python literal: what its parser raises depends on the damage
        return False
    size = os.fstat(file.fileno()).st_size
    return (
        header == (shape, False, np.dtype("<f4")) and file.tell() == HEADER and size == HEADER + 4 * shape[0] * shape[1]
    )


def _checksum(file: BinaryIO) -> int:
    """Return the checksum of the rest of an open file; its position is restored."""
    checksum, start = 0, file.tell()
    while block := file.read(BLOCK):
        checksum = zlib.crc32(block, checksum)
    file.seek(start)
    return checksum


def _identity(path: Path) -> tuple[str, int, int]:
    """Return a value that changes if the file at `path` is replaced or changed."""
    state = path.stat()
    return str(path), state.st_ino, state.st_mtime_ns


def _sidecar(path: Path) -> dict[str, Any]:
    """Return the record of the features at `path`; {} if there is none or it is unreadable."""
    try:
        facts = read_json(path.with_suffix(".json"), remedy="", limit=SIDECAR_LIMIT)
    except ConfigError:
        return {}
    sound = isinstance(facts, dict) and facts.get("schema") == SCHEMA and isinstance(facts.get("about", {}), dict)
    return facts if sound else {}


def _locked(path: Path, *, shared: bool) -> BinaryIO | None:
    """Return the file at `path`, locked until it is closed; None if it is missing, locked by others or replaced.

    Args:
        path: the file.
        shared: wait for a lock that several readers can have; otherwise ask once for one that excludes all others.
    """
    try:
        file = open_own(path, "read" if shared else "update")
    except FileNotFoundError:
        return None
    try:
        free = lock(file, shared=shared, wait=shared)
    except OSError:
        file.close()
        raise
    if free is not False and is_at(file, path):
        return file
    file.close()
    return None


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write into a `ConfigError` that names the switch."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{folder}: features cannot be stored there ({first_line(error)}); set job.feature_cache=FOLDER, "
            "or job.feature_cache=false to keep them in memory"
        ) from error


@contextmanager
def _missing_is_fine() -> Iterator[None]:
    """Ignore files that another process has removed, and a cache without write permission."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
