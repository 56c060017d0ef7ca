"""Lists of image files: found in class folders, split by the hash of their names; hidden and other files left out."""

import hashlib
import os
import stat
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from clrun.data.decode import SUFFIXES
from clrun.data.reading.class_names import composed, distinct
from clrun.system.errors import ConfigError, first_line

# Folders and files that programs and file servers leave beside images, in lower case; those with a leading dot, too.
SERVICE: tuple[str, ...] = ("__macosx", "thumbs.db", "desktop.ini", "@eadir", "#recycle", "@recycle", "lost+found")
SERVICE += ("$recycle.bin", "system volume information", "__pycache__")
Kind = Literal["folder", "file", "broken", "special"]


@dataclass(frozen=True)
class FileKind:
    """The kind of files that are the rows of a data set.

    Attributes:
        unit: what one of them is called in messages.
        suffixes: of their names, in lower case.
    """

    unit: str
    suffixes: frozenset[str]

    def has(self, name: str) -> bool:
        """Return whether the suffix of a name is one of this kind."""
        return os.path.splitext(name)[1].lower() in self.suffixes


IMAGES = FileKind("image", frozenset(SUFFIXES))
TEXTS = FileKind("text", frozenset({".txt"}))


@dataclass(frozen=True)
class Listing:
    """Labelled image files.

    Attributes:
        root: folder that the paths start from.
        names: paths relative to `root`, with slashes.
        labels: class id of each image.
        skipped: files that were found and whose names are not those of images.
        unfollowed: links that lead to a folder around them, or nowhere.
        special: pipes, sockets and devices, which are never opened.
        linked: real path of each image that is reached through a link below `root`.
        found: whether the files were found in their folders, and not named by a list that may name missing files.
    """

    root: Path
    names: tuple[str, ...]
    labels: tuple[int, ...]
    skipped: tuple[str, ...] = ()
    unfollowed: tuple[str, ...] = ()
    special: tuple[str, ...] = ()
    linked: Mapping[str, str] = field(default_factory=dict)
    found: bool = False

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.names)

    def selected(self, keep: Sequence[bool]) -> "Listing":
        """Return the images marked in `keep`."""
        kept = [row for row, wanted in enumerate(keep) if wanted]
        names, labels = tuple(self.names[k] for k in kept), tuple(self.labels[k] for k in kept)
        return replace(self, names=names, labels=labels)

    def real_paths(self) -> list[str]:
        """Return the path of each image with links resolved, as far as they lie below `root`."""
        start = os.path.join(os.path.realpath(self.root), "")
        return [self.linked.get(name) or os.path.normpath(start + name) for name in self.names]


def class_folders(folder: Path) -> list[str]:
    """Return the names of the class folders in `folder`, composed and sorted by code point, without hidden ones.

    Raises:
        ConfigError: the folder cannot be read, or the names of two classes differ only in case.
    """
    return sorted(distinct(subfolders(folder), str(folder)))


def subfolders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder as they are stored, sorted, without hidden ones.

    Raises:
        ConfigError: the folder cannot be read.
    """
    found = [entry for entry in entries(folder) if not hidden(entry.name) and kind_of(entry) == "folder"]
    return [entry.name for entry in found if not leads_around(entry.path)]


def hidden(name: str) -> bool:
    """Return whether a file or folder is hidden, or was left by an archive program, a file server or an editor."""
    return name.startswith(".") or name.casefold() in SERVICE


def leads_around(path: str) -> bool:
    """Return whether a path is a link to a folder around it."""
    if not os.path.islink(path):
        return False
    inside, target = (os.path.join(os.path.realpath(p), "") for p in (os.path.dirname(path), path))
    return inside.startswith(target)


def kind_of(entry: os.DirEntry[str]) -> Kind:
    """Return what an entry of a folder is, links followed; "broken" is a link to nothing or to itself."""
    if entry.is_symlink():
        try:
            mode = os.stat(entry.path).st_mode
        except OSError:
            return "broken"
        return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "special"
    if entry.is_dir(follow_symlinks=False):
        return "folder"
    return "file" if entry.is_file(follow_symlinks=False) else "special"


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


def list_classes(
    folder: Path, classes: Sequence[str], *, root: Path | None = None, by_path: bool = False, files: FileKind = IMAGES
) -> Listing:
    """Return the images in the folders `classes` of `folder`; the position in the list is the class id.

    Images in folders within a class folder belong to the class. Links are followed, except those to a folder around
    them. Hidden files are ignored; other files whose names are not those of images are listed as skipped, and broken
    links with such a name count as images that cannot be read.

    Args:
        folder: holds the class folders.
        classes: names of the class folders to list; some may be missing.
        root: folder that the paths start from; default `folder`.
        by_path: whether a class is the path from `folder` to the folder that holds an image; images that lie in none
            of the `classes` are then left out.
        files: the kind of files.

    Raises:
        ConfigError: a folder cannot be read.
    """
    root = root or folder
    walk = _Walk(0 if root == Path() else len(os.path.join(root, "")), files)
    linked = os.path.realpath(folder) != _below(root, folder)
    ids = {composed(name): label for label, name in enumerate(classes)}
    tops = _stored_names(folder, {name.partition("/")[0] if by_path else name for name in ids})
    found: list[list[str]] = [[] for _ in classes]
    for top in tops:
        for path in walk.files(str(folder / top), linked or os.path.islink(folder / top)):
            own = os.path.relpath(os.path.dirname(path), folder).replace(os.sep, "/") if by_path else top
            if (label := ids.get(composed(own))) is not None:
                found[label].append(path[walk.start :])
    names = tuple(name for own in found for name in own)
    labels = tuple(label for label, own in enumerate(found) for _ in own)
    return Listing(
        root,
        names,
        labels,
        skipped=tuple(walk.skipped),
        unfollowed=tuple(walk.unfollowed),
        special=tuple(walk.special),
        linked=walk.linked,
        found=True,
    )


def class_paths(folder: Path, files: FileKind = IMAGES) -> list[str]:
    """Return the paths from `folder` to the folders below it that hold files of a kind, composed and sorted.

    Raises:
        ConfigError: a folder cannot be read, or two paths differ only in case.
    """
    walk = _Walk(0, files)
    holders = {
        os.path.relpath(os.path.dirname(path), folder).replace(os.sep, "/")
        for top in subfolders(folder)
        for path in walk.files(str(folder / top), linked=False)
    }
    return sorted(distinct(sorted(holders), str(folder)))


def _below(root: Path, folder: Path) -> str:
    """Return where `folder` would be below the real path of `root` if no link were between them."""
    return os.path.normpath(os.path.join(os.path.realpath(root), os.path.relpath(folder, root)))


def _stored_names(folder: Path, wanted: set[str]) -> list[str]:
    """Return the folders in `folder` whose composed names are wanted, as they are stored."""
    if not folder.is_dir():
        return []
    return [name for name in subfolders(folder) if composed(name) in wanted]


class _Walk:
    """Finds the images, or other rows, below folders and notes what else is there.

    Args:
        start: length of the part of each path before its name.
        kind: of the files that are rows.
    """

    def __init__(self, start: int, kind: FileKind) -> None:
        self.start, self.kind = start, kind
        self.skipped: list[str] = []
        self.unfollowed: list[str] = []
        self.special: list[str] = []
        self.linked: dict[str, str] = {}

    def files(self, folder: str, linked: bool, above: tuple[str, ...] = ()) -> Iterator[str]:
        """Yield the paths of the images in a folder and below, sorted within each folder.

        Args:
            folder: the folder.
            linked: whether it is reached through a link.
            above: real paths of the folders on the way to it that were entered through links.
        """
        above = (*above, os.path.realpath(folder)) if linked or not above else above
        for entry in entries(Path(folder)):
            if hidden(entry.name):
                continue
            kind, through = kind_of(entry), linked or entry.is_symlink()
            if kind == "folder":
                if leads_around(entry.path) or (through and os.path.realpath(entry.path) in above):
                    self.unfollowed.append(entry.path)
                else:
                    yield from self.files(entry.path, through, above)
            elif kind == "special":
                self.special.append(entry.path)
            elif self.kind.has(entry.name):
                if through and kind == "file":
                    self.linked[entry.path[self.start :]] = os.path.realpath(entry.path)
                yield entry.path
            else:
                (self.unfollowed if kind == "broken" else self.skipped).append(entry.path)


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
