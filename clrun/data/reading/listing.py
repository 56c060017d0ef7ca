"""Lists of image files: found in class folders, split by the hash of their names; hidden and other files left out."""

import hashlib
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clrun.data.decode import SUFFIXES
from clrun.system.errors import ConfigError, first_line

SHOWN = 3  # names of files in a message


@dataclass(frozen=True)
class Listing:
    """Labelled image files.

    Attributes:
        root: folder that the paths start from.
        names: paths relative to `root`, with slashes.
        labels: class id of each image.
        skipped: files that were found and whose names are not those of images.
        found: whether the files were found in their folders, and not named by a list that may name missing files.
    """

    root: Path
    names: tuple[str, ...]
    labels: tuple[int, ...]
    skipped: tuple[str, ...] = ()
    found: bool = False

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.names)

    def selected(self, keep: Sequence[bool]) -> "Listing":
        """Return the images marked in `keep`."""
        kept = [row for row, wanted in enumerate(keep) if wanted]
        names, labels = tuple(self.names[k] for k in kept), tuple(self.labels[k] for k in kept)
        return replace(self, names=names, labels=labels)


def class_folders(folder: Path) -> list[str]:
    """Return the names of the class folders in `folder`, sorted by code point, without hidden ones.

    Raises:
        ConfigError: the folder cannot be read, or the names of two classes differ only in case.
    """
    names = sorted(entry.name for entry in entries(folder) if entry.is_dir() and not hidden(entry.name))
    alike: dict[str, str] = {}
    for name in names:
        other = alike.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            raise ConfigError(
                f"{folder}: the classes '{other}' and '{name}' differ only in case; rename one or merge them"
            )
    return names


def hidden(name: str) -> bool:
    """Return whether a file or folder is hidden or was left by an archive program."""
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return the entries of a folder, sorted by name.

    Raises:
        ConfigError: the folder cannot be read.
    """
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be read ({first_line(error)})") from error


def list_classes(folder: Path, classes: Sequence[str], *, root: Path | None = None) -> Listing:
    """Return the images in the folders `classes` of `folder`; the position in the list is the class id.

    Images in folders within a class folder belong to the class. Links are followed, except those to a folder around
    them. Hidden files are ignored; other files whose names are not those of images are listed as skipped.

    Args:
        folder: holds the class folders.
        classes: names of the class folders to list; some may be missing.
        root: folder that the paths start from; default `folder`.

    Raises:
        ConfigError: a folder cannot be read.
    """
    root = root or folder
    start = len(os.path.join(root, ""))
    names: list[str] = []
    labels: list[int] = []
    skipped: list[str] = []
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            continue
        for path in files_below(folder / name):
            if os.path.splitext(path)[1].lower() in SUFFIXES:
                names.append(path[start:])
                labels.append(label)
            else:
                skipped.append(path)
    return Listing(root, tuple(names), tuple(labels), tuple(skipped), found=True)


def files_below(folder: Path, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the paths of the files in a folder and below, sorted within each folder.

    Args:
        folder: the folder.
        above: real paths of the folders around it.
    """
    real = os.path.realpath(folder)
    if real in above:
        return  # a link to a folder around it
    for entry in entries(folder):
        if hidden(entry.name):
            continue
        if entry.is_dir():
            yield from files_below(Path(entry.path), (*above, real))
        else:
            yield entry.path


def in_test(name: str, fraction: float) -> bool:
    """Return whether a file is a test image by the hash of its name; a `fraction` of all names is.

    Only the name decides, so that adding or removing files moves no other file between the parts.
    """
    digest = hashlib.sha256(unicodedata.normalize("NFC", name).encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8]) < fraction * 2**64


def by_hash(listing: Listing, fraction: float, *, start: int = 0) -> tuple[Listing, Listing]:
    """Return the training and the test images of a listing, as `in_test` decides by their names.

    Args:
        listing: all images.
        fraction: expected fraction of test images.
        start: position in the names from which on they are hashed.
    """
    chosen = [in_test(name[start:], fraction) for name in listing.names]
    return listing.selected([not test for test in chosen]), listing.selected(chosen)


def printable(text: str) -> str:
    """Return a name with bytes that are not valid text replaced."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def some(names: Sequence[str]) -> str:
    """Return the first names, and the number of the others."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(printable(name) for name in names[:SHOWN]) + more
