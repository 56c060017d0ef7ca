"""Decoded images on disk, mapped into memory: every image is decoded once for all runs of a machine.

A cache is a folder with pairs of files, one pair per folder of images, part of the data and decoding. KEY-NUMBER.bin
holds the images (uint8, [R, S, S, C], without a header). KEY.json names it and lists for each image the file's name,
size, time of the last change and digest. KEY.json is replaced last, so that everything it describes is complete.
Processes that need the same pair at the same time wait for each other: the first builds it, the others read it.

Shapes: `M` images asked for, `R` images of a pair, `S` side, `C` channels, `B` images of a block.
"""

import hashlib
import json
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from clrun.data.decode import Decoding, Files, Pixels, decode
from clrun.system.errors import ConfigError, first_line
from clrun.system.files import cache_folder, make_folder, replace_text, replacing
from clrun.system.locks import exclusive
from clrun.system.reading import MB, read_regular

SCHEMA = 1
ENTRY = 5000  # bytes that the description of an image has at most; a path may have 4096
BLOCK = 64  # images between two writes
COLUMNS = ("name", "size", "changed", "digest")


@dataclass(frozen=True)
class Entry:
    """The record of a stored image.

    Attributes:
        row: row in the file of images; -1 before it is stored.
        name: name of the image file.
        size: size of the image file in bytes.
        changed: time of the last change of the image file in ns.
        digest: digest of the content of the image file.
    """

    row: int
    name: str
    size: int
    changed: int
    digest: str


@dataclass(frozen=True)
class ImageCache:
    """The pair of files for some images.

    Attributes:
        files: M files.
        options: how the images are decoded, and the cache's folder.
        channels: C.
        part: part of the data set, such as "train".
    """

    files: Files
    options: Decoding
    channels: int
    part: str

    @property
    def folder(self) -> Path:
        """The cache's folder."""
        chosen = self.options.cache
        return Path(chosen).expanduser() if isinstance(chosen, str) else cache_folder("images")

    @property
    def key(self) -> str:
        """The first part of the names of the pair's files."""
        text = f"{SCHEMA} {self.files.place} {self.part} {self.channels} {self.options.recipe}"
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:24]

    def open(self, *, workers: int) -> Callable[[NDArray[np.int64]], Pixels]:
        """Return a function from rows [B] to images [B, S, S, C], after decoding missing and changed images.

        A file counts as unchanged if its size and time of change are as recorded, or if only the time differs and the
        digest of its content is the same.

        Args:
            workers: number of threads that decode.

        Raises:
            ConfigError: the folder cannot be written, the disk is too small, or a file cannot be decoded.
        """
        make_folder(self.folder)
        with exclusive(self.folder / f"{self.key}.lock"):
            data, stored = self._load()
            wanted = [self._current(row, stored) for row in range(len(self.files))]
            if any(entry.row < 0 for entry in wanted):
                data, wanted = self._build(data, wanted, stored, workers)
            elif any(entry is not stored[entry.name] for entry in wanted):
                self._describe(data, [*({**stored, **{entry.name: entry for entry in wanted}}).values()])
            images = self._mapped(data)
        rows = np.array([entry.row for entry in wanted], dtype=np.int64)
        if np.array_equal(rows, np.arange(len(images))):
            return images.__getitem__
        return lambda asked: images[rows[asked]]

    def _load(self) -> tuple[Path, dict[str, Entry]]:
        """Return the file of images and its entries by name; no entries if there is no such file or it is damaged."""
        empty = self.folder / f"{self.key}-0.bin"
        try:
            facts = json.loads(read_regular(self.folder / f"{self.key}.json", self._limit))
            data = self.folder / Path(facts["data"]).name
            columns = [facts[column] for column in COLUMNS]
            entries = {values[0]: Entry(row, *values) for row, values in enumerate(zip(*columns, strict=True))}
            state = data.lstat()
            whole = stat.S_ISREG(state.st_mode) and state.st_size == len(entries) * self._bytes
        except (OSError, ValueError, KeyError, TypeError, RecursionError, ConfigError):
            return empty, {}
        return (data, entries) if whole else (empty, {})

    def _current(self, row: int, stored: dict[str, Entry]) -> Entry:
        """Return the entry of a file; with row -1 if it is not stored or its content has changed."""
        name, (size, changed) = self.files.name(row), self.files.stamp(row)
        known = stored.get(name)
        if known is None or known.size != size:
            return Entry(-1, name, size, changed, "")
        if known.changed == changed:
            return known
        same = _digest(self._content(row)) == known.digest
        return replace(known, changed=changed) if same else Entry(-1, name, size, changed, "")

    def _build(
        self, old: Path, wanted: Sequence[Entry], stored: dict[str, Entry], workers: int
    ) -> tuple[Path, list[Entry]]:
        """Write a new pair with the wanted images and, up to their number, others already stored.

        Returns:
            The new file of images and the entries of the wanted ones.
        """
        names = {entry.name for entry in wanted}
        others = [entry for entry in stored.values() if entry.name not in names][: len(wanted)]
        data = self.folder / f"{self.key}-{int(old.stem.rpartition('-')[2]) + 1}.bin"
        self._make_room(old, len(wanted) + len(others))
        source = self._mapped(old) if stored else np.empty((0, 0, 0, 0), dtype=np.uint8)
        entries: list[Entry] = []
        with ThreadPoolExecutor(workers, "clrun-decode") as pool, replacing(data) as file:
            for block in _blocks([*enumerate(wanted), *((-1, entry) for entry in others)]):
                for image, entry in pool.map(lambda item: self._image(item[0], item[1], source), block):
                    file.write(image.data)
                    entries.append(replace(entry, row=len(entries)))
        self._describe(data, entries)
        return data, entries[: len(wanted)]

    def _image(self, row: int, entry: Entry, source: Pixels) -> tuple[Pixels, Entry]:
        """Return an image [S, S, C] with its entry, from the old file if it is there."""
        if entry.row >= 0:
            return source[entry.row], entry
        content = self._content(row)
        image = decode(content, entry.name, self.options, self.channels)
        return np.ascontiguousarray(image), replace(entry, digest=_digest(content))

    def _content(self, row: int) -> bytes:
        """Return the bytes of a file."""
        content = self.files.content(row)
        if isinstance(content, bytes):
            return content
        try:
            return content.read_bytes()
        except OSError as error:
            raise ConfigError(f"{content}: cannot be read ({first_line(error)})") from error

    def _make_room(self, current: Path, images: int) -> None:
        """Remove files of processes that were killed, and refuse to build a cache that does not fit on the disk."""
        self._remove_all_but(current)
        needed, free = images * self._bytes, shutil.disk_usage(self.folder).free
        if needed > free:
            raise ConfigError(
                f"{self.folder}: decoded images need {needed / 1e9:.1f} GB there and {free / 1e9:.1f} GB are free; set "
                "dataset.images.cache to another folder or to false, or choose a smaller dataset.images.size"
            )

    def _describe(self, data: Path, entries: Sequence[Entry]) -> None:
        """Write the description of the file of images, and remove the previous file of images."""
        facts: dict[str, Any] = {"schema": SCHEMA, "place": self.files.place, "part": self.part, "data": data.name}
        facts |= {"shape": [len(entries), *self._shape], "recipe": self.options.recipe}
        facts |= {column: [getattr(entry, column) for entry in entries] for column in COLUMNS}
        replace_text(self.folder / f"{self.key}.json", json.dumps(facts))
        self._remove_all_but(data)

    def _remove_all_but(self, data: Path) -> None:
        """Remove other files of images of this key; processes that have them open can still read them."""
        for other in self.folder.glob(f"{self.key}-*"):
            if other != data:
                other.unlink(missing_ok=True)

    @property
    def _shape(self) -> tuple[int, int, int]:
        return self.options.size, self.options.size, self.channels

    @property
    def _limit(self) -> int:
        """Bytes of the description that are read: those of as many other images as are asked for, and of these."""
        return MB + 2 * len(self.files) * ENTRY

    @property
    def _bytes(self) -> int:
        """Bytes per image."""
        return self.options.size**2 * self.channels

    def _mapped(self, data: Path) -> Pixels:
        """Return the images [R, S, S, C] of a file; pages are read from the disk on first access."""
        rows = data.stat().st_size // self._bytes
        if not rows:
            return np.empty((0, *self._shape), dtype=np.uint8)
        return np.memmap(data, dtype=np.uint8, mode="r", shape=(rows, *self._shape)).view(np.ndarray)


def _blocks(items: Sequence[tuple[int, Entry]]) -> Iterator[Sequence[tuple[int, Entry]]]:
    """Yield the items in blocks, with a progress bar on the terminal."""
    with tqdm(total=len(items), desc="decoding images", unit="image", leave=False, disable=None) as bar:
        for start in range(0, len(items), BLOCK):
            yield items[start : start + BLOCK]
            bar.update(min(BLOCK, len(items) - start))


def _digest(content: bytes) -> str:
    """Return the digest of a file's content."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()
