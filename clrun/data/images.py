"""Images in files: read in batches, decoded by threads, and stored in memory or in a cache on disk if configured.

Decoding releases Python's global lock, so that threads decode in parallel. Unlike worker processes, threads start at
once and copy nothing between processes, and an error in one of them is an ordinary exception of the reader. The content
of a batch does not depend on their number.

Shapes: `M` stored rows, `B` batch, `C` channels, `S` side of the stored squares.
"""

import hashlib
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clrun.data.contents import StoredRows, text_digest
from clrun.data.decode import Decoding, Files, Pixels, decode
from clrun.data.image_cache import ImageCache
from clrun.data.split import Batch, Split, TensorSplit
from clrun.system.processes import core_count

Rows = NDArray[np.int64]
Take = Callable[[Rows], Pixels]  # rows [B] -> images [B, S, S, C]
AHEAD = 2  # batches that are decoded while one is in use; more if batches are too small to occupy the threads
CHUNK = 4  # images that a thread takes at once


class Images(ABC):
    """The storage of the rows of an `ImageSplit`.

    Attributes:
        shape: (M, C, S, S).
    """

    shape: tuple[int, int, int, int]

    @abstractmethod
    def fill(self, rows: Rows, out: Pixels) -> None:
        """Write the images of `rows` [B] into `out` [B, S, S, C]."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a digest that identifies the M stored images."""

    def stored_rows(self) -> StoredRows:
        """Return what identifies the M stored images; images that cannot be told apart are identified as a whole."""
        return StoredRows((), np.full(self.shape[0], text_digest(self.fingerprint()), dtype=np.uint64))

    def decoded_reader(self, workers: int) -> Take | None:
        """Return a function that reads rows without decoding; None if some need it. Builds the cache if configured."""
        return None


class FileImages(Images):
    """Images in files, decoded when they are read.

    Args:
        files: M files.
        options: how they are decoded.
        channels: C, 1 or 3.
        part: "train" or "test": the part of the data set.
    """

    def __init__(self, files: Files, options: Decoding, *, channels: int, part: str) -> None:
        self.files, self.options, self.channels, self.part = files, options, channels, part
        self.shape = (len(files), channels, options.size, options.size)
        self._lock = threading.Lock()
        self._stored: Take | None = None
        self._decoded: Pixels | None = None
        self._is_decoded = np.zeros(len(files), dtype=bool)
        self._rows: StoredRows | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without decoded images."""
        return {name: vars(self)[name] for name in ("files", "options", "channels", "part")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore an object that has decoded nothing yet."""
        self.__init__(state["files"], state["options"], channels=state["channels"], part=state["part"])  # type: ignore[misc]

    def fill(self, rows: Rows, out: Pixels) -> None:
        """Write the images of `rows` [B] into `out` [B, S, S, C].

        Raises:
            ConfigError: a file cannot be decoded; the message names it.
        """
        for row, slot in zip(rows.tolist(), out, strict=True):
            if self._decoded is not None and self._is_decoded[row]:
                np.copyto(slot, self._decoded[row])
                continue
            np.copyto(slot, decode(self.files.content(row), self.files.name(row), self.options, self.channels))
            if self._decoded is not None:
                self._decoded[row] = slot
                self._is_decoded[row] = True

    def fingerprint(self) -> str:
        """Return a digest of names, sizes and times of the files, and of how they are decoded.

        Raises:
            ConfigError: a file no longer exists.
        """
        digest = hashlib.sha256(f"{self.channels} {self.options.recipe} {len(self.files)}".encode())
        for row in range(len(self.files)):
            digest.update(f"\n{self.files.name(row)} {self.files.stamp(row)}".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def stored_rows(self) -> StoredRows:
        """Return names and digests of the files as they were when this was first asked.

        Raises:
            ConfigError: a file cannot be read.
        """
        if self._rows is None:
            self._rows = self.files.stored_rows()
        return self._rows

    def decoded_reader(self, workers: int) -> Take | None:
        """Return the reader of the cache on disk, built if needed; or of the memory, once all images are decoded."""
        with self._lock:
            if self._stored is None and self.options.cache is not False:
                cache = ImageCache(self.files, self.options, self.channels, self.part)
                self._stored = cache.open(workers=max(1, workers))
            if self._stored is None and self._decoded is None and np.prod(self.shape) <= self.options.memory * 2**20:
                count, channels, side, _ = self.shape
                self._decoded = np.empty((count, side, side, channels), dtype=np.uint8)
        if self._stored is None and self._decoded is not None and self._is_decoded.all():
            self._stored = self._decoded.__getitem__
        return self._stored


class JoinedImages(Images):
    """The rows of several splits, one after the other, with the shifts of their domains applied.

    Args:
        splits: splits whose images have one shape, in memory or in files.
    """

    def __init__(self, splits: Sequence[Split]) -> None:
        self.splits = [split.to("cpu") for split in splits]
        self.ends = np.cumsum([len(split) for split in splits])
        shapes = {tuple(split.images.shape[1:]) for split in splits}
        assert len(shapes) == 1, f"cannot join images of shapes {shapes}"
        self.shape = (int(self.ends[-1]), *shapes.pop())
        self._rows: StoredRows | None = None

    def fill(self, rows: Rows, out: Pixels) -> None:
        """Write the images of `rows` [B] into `out` [B, S, S, C]."""
        owner = np.searchsorted(self.ends, rows, side="right")
        for k in np.unique(owner).tolist():
            own = owner == k
            first = self.ends[k] - len(self.splits[k])
            part = self.splits[k].select(torch.from_numpy(rows[own] - first))
            out[own] = next(part.batches(len(part), view="raw")).x.permute(0, 2, 3, 1).numpy()

    def stored_rows(self) -> StoredRows:
        """Return what identifies the rows of the splits; shifts follow from the configuration."""
        if self._rows is None:
            self._rows = StoredRows.joined([(s.stored_rows(), s._rows(None).x.numpy()) for s in self.splits])
        return self._rows

    def fingerprint(self) -> str:
        """Return a digest of the images of each split, its rows, and the effect of its shift on a picture."""
        digest = hashlib.sha256()
        picture = np.random.RandomState(0).randint(0, 256, (1, *self.shape[1:])).astype(np.uint8)
        for split in self.splits:
            shown = picture if split.shift is None else split.shift(torch.from_numpy(picture)).numpy()
            digest.update(split.fingerprint().encode())
            for part in (split._rows(None).x.numpy(), shown):
                digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class ImageSplit(Split):
    """A split whose images are in files; its raw view yields [B, C, S, S] uint8 in channels-last order.

    Attributes:
        images: the storage of M images.
        workers: threads that decode ahead of the reader; 0 decodes each batch when it is read.
    """

    images: Images
    workers: int = field(default=0, kw_only=True)

    def to(self, device: torch.device | str, *, workers: int = 0) -> Self:
        """Return the split that delivers its batches on `device`, decoded by `workers` threads."""
        rows = None if self.rows is None else self.rows.to(device)
        positions = self.positions if isinstance(self.positions, int) else self.positions.to(device)
        return replace(self, labels=self.labels.to(device), rows=rows, positions=positions, workers=workers)

    def fingerprint(self) -> str:
        """Return a digest of names, sizes and times of the files, and of how they are decoded."""
        return self.images.fingerprint()

    def stored_rows(self) -> StoredRows:
        """Return what identifies the stored images."""
        return self.images.stored_rows()

    def _rows(self, order: Tensor | None) -> Batch:
        whole = super()._rows(order)
        return Batch(whole.x.cpu(), whole.y, whole.t, whole.i)  # row numbers of files are used on the CPU

    def _read(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        for images in read_ahead(self.images, (rows.numpy() for rows in parts), self.workers):
            yield torch.from_numpy(images).permute(0, 3, 1, 2).to(self.labels.device)

    @classmethod
    def joined(cls, parts: Sequence[Split]) -> Split:
        """Return one split with the rows of several, without copying them."""
        rows = [part._rows(None) for part in parts]
        labels, positions = torch.cat([r.y for r in rows]), torch.cat([r.t for r in rows])
        workers = max(part.workers for part in parts if isinstance(part, ImageSplit))
        return cls(JoinedImages(parts), labels, None, positions, parts[0].transform, workers=workers)


def read_ahead(images: Images, parts: Iterable[Rows], workers: int) -> Iterator[Pixels]:
    """Yield the images [B, S, S, C] of each of the `parts` (rows [B]), in order.

    Args:
        images: the storage.
        parts: rows to read; consumed some parts ahead.
        workers: number of threads; 0 reads in the calling thread.

    Raises:
        ConfigError: a file cannot be decoded, or the cache cannot be built.
    """
    take = images.decoded_reader(workers)
    if not workers:
        for rows in parts:
            if take is not None:
                yield take(rows)
                continue
            out = np.empty(_block(images, rows), dtype=np.uint8)
            images.fill(rows, out)
            yield out
        return
    pool = ThreadPoolExecutor(workers, "clrun-decode")
    due: deque[Callable[[], Pixels]] = deque()
    try:
        for rows in parts:
            due.append(_decoding(pool, images, rows) if take is None else pool.submit(take, rows).result)
            if len(due) > max(AHEAD, 2 * CHUNK * workers // max(1, len(rows))):
                yield due.popleft()()
        while due:
            yield due.popleft()()
    finally:
        pool.shutdown(cancel_futures=True)


def _decoding(pool: ThreadPoolExecutor, images: Images, rows: Rows) -> Callable[[], Pixels]:
    """Start to decode a batch; return a function that waits for it and returns it."""
    out = np.empty(_block(images, rows), dtype=np.uint8)
    chunks = [slice(start, start + CHUNK) for start in range(0, len(rows), CHUNK)]
    running = [pool.submit(images.fill, rows[chunk], out[chunk]) for chunk in chunks]

    def wait() -> Pixels:
        for future in running:
            future.result()
        return out

    return wait


def _block(images: Images, rows: Rows) -> tuple[int, int, int, int]:
    """Return the shape [B, S, S, C] of a batch."""
    _, channels, height, width = images.shape
    return len(rows), height, width, channels


_loaded: dict[str, Tensor] = {}


def in_memory(split: ImageSplit) -> TensorSplit:
    """Return a split in memory, decoded now by one thread per core; the same files are decoded once per process.

    Raises:
        ConfigError: a file cannot be decoded.
    """
    key = split.images.fingerprint()
    if key not in _loaded:
        whole = ImageSplit(split.images, split.labels, workers=core_count())
        parts = [batch.x.contiguous() for batch in whole.batches(256, view="raw")]
        _loaded[key] = torch.cat([torch.empty(0, *split.images.shape[1:], dtype=torch.uint8), *parts])
    return TensorSplit(_loaded[key], split.labels, split.rows, split.positions, split.transform, split.shift)
