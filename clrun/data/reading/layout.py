"""How a folder of images is laid out: which folders are training, test and validation parts, and which are classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from clrun.data.reading.class_names import distinct, match
from clrun.data.reading.listing import (
    IMAGES,
    FileKind,
    Listing,
    by_hash,
    class_folders,
    class_paths,
    entries,
    hidden,
    kind_of,
    list_classes,
    subfolders,
)
from clrun.data.reading.text import some
from clrun.system.errors import ConfigError, did_you_mean, warn

LAYOUT = "expected train/ and test/ with one folder per class, or only one folder per class"
PARTS: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "val": ("val", "valid", "validation", "dev"),
}
LOOKED = 100  # class folders that are looked into for parts of data sets
Splits = Mapping[str, str | None]
Classes = Literal["top", "path"]


def part_of(name: str) -> str | None:
    """Return the part ("train", "test" or "val") that a name stands for, in any case; None for other names."""
    return next((part for part, names in PARTS.items() if name.casefold() in names), None)


def given_parts(splits: Splits, names: Sequence[str], where: str) -> dict[str, str]:
    """Return the name of each part, as `dataset.splits` says.

    Args:
        splits: names by part; {} for no parts.
        names: the names that there are.
        where: folder or file, for the message.

    Raises:
        ConfigError: a part or a name is unknown, or there is no training part.
    """
    for part in splits:
        if part not in PARTS:
            raise ConfigError(
                f"dataset.splits: there is no part '{part}'{did_you_mean(part, PARTS)} ({', '.join(PARTS)})"
            )
    chosen = {part: name for part, name in splits.items() if name is not None}
    if chosen and "train" not in chosen:
        raise ConfigError("dataset.splits: names no training part; add train: NAME, or set it to {} for no parts")
    for part, name in chosen.items():
        if name not in names:
            hint = did_you_mean(name, names)
            raise ConfigError(
                f"dataset.splits.{part}: there is no '{name}' in {where}{hint} (there are: {some(names) or 'none'})"
            )
    return chosen


def found_parts(names: Sequence[str], where: str, unit: str = "image") -> dict[str, str]:
    """Return the name of each part by what the names stand for; {} without a training part.

    A validation part is tested on where there is no test part; a warning says so.

    Args:
        names: the names that there are.
        where: folder or file, for messages.
        unit: what one row is called, for messages.

    Raises:
        ConfigError: two names stand for one part, or there is only a training part.
    """
    found: dict[str, str] = {}
    for name in names:
        part = part_of(name)
        if part is not None and found.setdefault(part, name) != name:
            raise ConfigError(
                f"{where}: both '{found[part]}' and '{name}' may be the {part} part; choose, as in "
                f"dataset.splits={{train: {found.get('train', 'NAME')}, test: {found.get('test', 'NAME')}}}"
            )
    if "train" not in found:
        return {}
    if "test" not in found and "val" not in found:
        raise ConfigError(
            f"{where}: contains {found['train']} but no test part; add one, or set dataset.splits={{train: "
            f"{found['train']}}} to take dataset.test_fraction of it as test {unit}s"
        )
    if "test" not in found:
        found["test"] = found.pop("val")
        warn(
            f"{where}: there is no test part, so that {found['test']} is tested on and there are no validation "
            f"{unit}s; with dataset.splits={{train: {found['train']}}} a part of {found['train']} is tested on instead"
        )
    return found


@dataclass(frozen=True)
class Tree:
    """A folder with one folder per class, or with one such folder per part.

    Attributes:
        home: the folder.
        train: folder of the classes, or of their training images.
        test: folder of their test images; None if there is none.
        val: folder of their validation images; None if there is none.
        classes: names of the classes.
        by_path: whether a class is the path from the part's folder to the folder that holds an image.
        files: the kind of files that are the rows.
    """

    home: Path
    train: Path
    test: Path | None
    val: Path | None
    classes: list[str]
    by_path: bool
    files: FileKind = IMAGES

    @property
    def said(self) -> str:
        """Which folders are tested and validated on, where these are not simply test/ and none."""
        if self.test is None or (self.val is None and part_of(self.test.name) == "test"):
            return ""
        return f"tested on {self.test.name}/" + (f", validated on {self.val.name}/" if self.val else "")

    def parts(self, classes: Sequence[str], root: Path, fraction: float) -> tuple[Listing, Listing, Listing | None]:
        """Return training, test and validation images; the position in `classes` is the class id.

        Args:
            classes: names of all classes.
            root: folder that the paths start from.
            fraction: fraction of test images where there is no test part.

        Raises:
            ConfigError: a folder cannot be read.
        """

        def listed(folder: Path) -> Listing:
            return list_classes(folder, classes, root=root, by_path=self.by_path, files=self.files)

        train = listed(self.train)
        val = None if self.val is None else listed(self.val)
        if self.test is not None:
            return train, listed(self.test), val
        start = len(self.train.relative_to(root).as_posix()) + 1 if self.train != root else 0
        return *by_hash(train, fraction, start=start), val


def tree(
    home: Path, splits: Splits | None, classes: Classes, *, key: str = "dataset.root", files: FileKind = IMAGES
) -> Tree:
    """Return the class folders of `home`, which may be divided into parts.

    Args:
        home: the folder.
        splits: names of the parts; None to find them.
        classes: "top" for one class per folder, "path" for one class per path to a folder with images.
        key: the option that names the folder, for messages.
        files: the kind of files that are the rows.

    Raises:
        ConfigError: there are no class folders, the parts are unclear, or a class is not in the training part.
    """
    if not home.is_dir():
        raise ConfigError(f"{key}: there is no folder {home}; {LAYOUT}")
    home = home if splits else _unwrapped(home, files)
    names = subfolders(home)
    if not names:
        raise ConfigError(f"{home}: contains no folders; {LAYOUT}")
    chosen = _found(home, names, files) if splits is None else given_parts(splits, names, str(home))
    _say_ignored(home, names, chosen, files)
    train = home / chosen["train"] if chosen else home
    places = {part: home / chosen[part] if part in chosen else None for part in ("test", "val")}
    listed = partial(class_paths, files=files) if classes == "path" else class_folders
    known = listed(train)
    if not known:
        raise ConfigError(f"{train}: contains no class folders; {LAYOUT}")
    if not chosen and classes == "top":
        _say_nested_parts(home, names)
    for part, place in places.items():
        if place is not None:
            match(known, listed(place), where=str(home), part=f"{chosen[part]}/", unit=files.unit)
    return Tree(home, train, places["test"], places["val"], known, classes == "path", files)


def _unwrapped(home: Path, files: FileKind) -> Path:
    """Return the folder that holds the data set: `home`, or the only folder in it if that holds folders alone.

    A data set of a single class cannot be meant, so that the class folders lie one level deeper; a warning says so.
    """
    inner = home
    while len(names := subfolders(inner)) == 1 and not _rows(inner, files):
        below = inner / names[0]
        if part_of(names[0]) is not None or not subfolders(below) or _rows(below, files):
            break
        inner = below
    if inner != home:
        warn(f"{home}: holds nothing but the folder {inner}, which is read as the data set; set dataset.root to it")
    return inner


def _found(home: Path, names: Sequence[str], files: FileKind) -> dict[str, str]:
    """Return the folder of each part by its name.

    A folder counts as a part only if it holds folders. Folders with the name of a part that hold images are classes,
    which a warning says; two of them are refused, because their labels are then elsewhere.

    Raises:
        ConfigError: it is unclear which folders are parts.
    """
    named = [name for name in names if part_of(name) is not None]
    deep = [name for name in named if subfolders(home / name)]
    found = found_parts(deep, str(home), files.unit)
    if found or not named:
        return found
    listed = some(named)
    if deep or len(named) > 1:
        raise ConfigError(
            f"{home}: {listed} look like parts of a data set, but there is no training part with one folder per class; "
            "name the parts, as in dataset.splits={train: NAME, test: NAME}; or set dataset.splits={} to learn every "
            "folder as a class; labels in a file are read by dataset=list"
        )
    warn(f"{home}: the folder {listed} is learned as a class, because it holds {files.unit}s and no folders")
    return {}


def _say_ignored(home: Path, names: Sequence[str], chosen: Mapping[str, str], files: FileKind) -> None:
    """Warn about folders beside the parts, images outside of class folders, and parts that are learned as classes."""
    if chosen:
        ignored = [f"{name}/" for name in names if name not in chosen.values()]
        loose = [f"{name}/{image}" for name in dict.fromkeys(chosen.values()) for image in _rows(home / name, files)]
        ignored += [*_rows(home, files), *loose]
    else:
        ignored = _rows(home, files)
        if len(classes := [name for name in names if part_of(name) is not None]) > 1:
            warn(f"{home}: the folders {some(classes)} are learned as classes, as dataset.splits={{}} asks")
    if ignored:
        warn(f"{home}: ignored, because they are in no class folder of a part: {some(ignored)}")


def _say_nested_parts(home: Path, names: Sequence[str]) -> None:
    """Warn about class folders in which there are training and test parts: they are probably data sets."""
    looked = names[:LOOKED]
    nested = [name for name in looked if {"train", "test"} <= {part_of(inner) for inner in subfolders(home / name)}]
    if nested:
        warn(
            f"{home}: in {some(nested)} there are folders called train and test, which are not read as parts: all "
            "images of such a folder are one class, divided by dataset.test_fraction; set dataset.root to one of them, "
            "use dataset=folder_domains or dataset=folder_sequence, or name images and parts in a list (dataset=list)"
        )


def _rows(folder: Path, files: FileKind) -> list[str]:
    """Return the names of the images, or other rows, directly in a folder."""
    found = [entry for entry in entries(folder) if files.has(entry.name) and not hidden(entry.name)]
    return [entry.name for entry in found if kind_of(entry) == "file"]


def merged_classes(trees: Sequence[Tree], where: str) -> list[str]:
    """Return the classes of several trees together, sorted.

    Raises:
        ConfigError: two names differ only in case.
    """
    return sorted(distinct((label for tree in trees for label in tree.classes), where))
