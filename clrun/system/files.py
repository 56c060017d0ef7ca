"""The only place where clrun writes files: replacing, creating and appending; JSON and CSV text.

A folder may come from someone else, with symbolic links where clrun is going to write. Therefore no file is written
through a link: new files get a random name, made by this process alone (O_EXCL) in a folder that is opened once, and
are renamed within that folder; files that exist are opened without following a link (O_NOFOLLOW). Replaced files stay
whole after a kill and on a full disk. Locks are in `clrun.system.locks`.
"""

import errno
import fcntl
import json
import math
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from clrun.system.errors import ConfigError, first_line

MODE = 0o666  # of new files; the umask takes bits away, so that all of them are 0644 under the usual umask
TEMPORARY = re.compile(r".+\.[0-9a-f]{16}\.tmp")  # names of files that are being written
ABANDONED = 3600.0  # seconds after which a file that was being written is left over, where there are no locks
LINK = "is a symbolic link, through which clrun does not write; remove it or choose another folder"
BREAK = r"\n\r\u2028\u2029"  # characters that end a line for some reader; others are control characters
CONTROL = re.compile(r"[\0-\x08\v\f\x0e-\x1f\x7f-\x9f]")  # a terminal would execute them
FORMULA = re.compile(rf"(?:\A|(?<=[{BREAK}]))(?=[^\S{BREAK}]*[=+\-@\t\r\uff1d\uff0b\uff0d\uff20])")
EMPTY = '""'  # a line with one empty cell; readers skip a line without characters
QUOTED = re.compile(rf'[",{BREAK}]')
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def cache_folder(kind: str) -> Path:
    """Return the cache folder of this `kind`: under $CLRUN_CACHE if it is set, else in the user's cache folder."""
    if home := os.environ.get("CLRUN_CACHE"):
        return Path(home).expanduser() / kind
    if os.uname().sysname == "Darwin":
        return Path.home() / "Library" / "Caches" / "clrun" / kind
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clrun" / kind


def missing_folders(path: Path) -> list[Path]:
    """Return the folder `path` and its parents as far as they do not exist, innermost first."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, innermost first, until one holds something."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError about writing `path` (disk full, no permission) into a `ConfigError`."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({first_line(error)}); make room or choose another folder"
        ) from error


@contextmanager
def replacing(path: Path, *, flush: bool = True, below: Path | None = None) -> Iterator[BinaryIO]:
    """Yield a temporary file beside `path` that replaces it when the block ends without an exception.

    A symbolic link at `path` is replaced, its target stays as it is.

    Args:
        path: file to replace.
        flush: wait until the content is on the disk, so that it also survives a loss of power.
        below: a folder above `path`. The folders between are made when they are missing, and refused when they are
            symbolic links.

    Raises:
        ConfigError: the file cannot be written; then `path` is unchanged.
    """
    temporary = temporary_name(path.name)
    with writing(path), _folder(path.parent, below) as folder:
        try:
            with os.fdopen(_open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, path, folder), "w+b") as file:
                lock(file)  # tells `remove_leftovers` that a process is writing
                yield file
                file.flush()
                if flush:
                    os.fsync(file.fileno())
                os.replace(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=folder)
            raise


def replace_text(path: Path, text: str, *, flush: bool = True, below: Path | None = None) -> None:
    """Replace the file at `path` by one with this text; see `replacing`."""
    with replacing(path, flush=flush, below=below) as file:
        file.write(text.encode())


def append_text(path: Path, text: str) -> None:
    """Append `text` to the file at `path`, completely or not at all.

    Raises:
        ConfigError: the file cannot be written; then its content is unchanged.
    """
    with writing(path), open_own(path, "append") as file:
        size = os.fstat(file.fileno()).st_size
        rest = memoryview(text.encode())
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise


def open_own(path: Path, how: Literal["new", "append", "update", "lock", "read"]) -> BinaryIO:
    """Open a file without following a symbolic link at its name; "append" and "lock" have no buffer.

    Args:
        path: the file; its folder may be reached through links.
        how: "new" makes a file where none may be; "append" and "lock" make one where none is; "update" needs one.
            "lock" and "update" read and write; "read" reads.

    Raises:
        OSError: the file cannot be opened, or is a pipe or a device.
        ConfigError: there is a symbolic link at `path`, or a file to append to or to lock has a second name.
    """
    flags, mode = {
        "new": (os.O_RDWR | os.O_CREAT | os.O_EXCL, "w+b"),
        "append": (os.O_WRONLY | os.O_CREAT | os.O_APPEND, "ab"),
        "update": (os.O_RDWR, "r+b"),
        "lock": (os.O_RDWR | os.O_CREAT, "r+b"),
        "read": (os.O_RDONLY, "rb"),
    }[how]
    with _folder(path.parent, None) as folder:
        descriptor = _open(path.name, flags, path, folder)
    return cast(BinaryIO, os.fdopen(descriptor, mode, 0 if how in ("append", "lock") else -1))


def open_to_read(path: str) -> int:
    """Return a descriptor of a file, through links, in as little time as possible; a pipe is opened without waiting.

    Raises:
        OSError: the file cannot be opened.
    """
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)


def make_folder(path: Path, *, below: Path | None = None) -> None:
    """Make a folder and its parents as far as they are missing.

    Args:
        path: the folder.
        below: a folder above it that exists; from there on symbolic links are refused.

    Raises:
        ConfigError: it cannot be made, or a folder below `below` is a symbolic link.
    """
    with writing(path):
        if below is None:
            os.makedirs(path, exist_ok=True)
        else:
            with _folder(path, below):
                return


def refuse_links(*paths: Path) -> None:
    """Refuse symbolic links at paths below which something is going to be written or removed.

    Raises:
        ConfigError: one of the paths is a symbolic link.
    """
    for path in paths:
        if path.is_symlink():
            raise ConfigError(f"{path}: {LINK}")


def temporary_name(name: str) -> str:
    """Return a new random name for a file that is renamed to `name` when it is complete."""
    return f"{name}.{secrets.token_hex(8)}.tmp"


def remove_leftovers(folder: Path, *inner: str) -> None:
    """Remove temporary files of killed processes from a folder, and from folders in it that are no symbolic links.

    A process that is writing holds the operating system's lock on its file. On file systems without locks a file
    counts as left over after an hour.
    """
    for place in (folder, *(folder / name for name in inner)):
        with suppress(OSError, ConfigError), _folder(place, folder, make=False) as opened:
            for name in filter(TEMPORARY.fullmatch, os.listdir(place)):
                with suppress(OSError, ConfigError):
                    _remove_leftover(name, place / name, opened)


def _remove_leftover(name: str, path: Path, folder: int) -> None:
    """Remove a temporary file that no process is writing; see `remove_leftovers`."""
    with os.fdopen(_open(name, os.O_RDWR, path, folder), "rb") as file:
        free = lock(file, wait=False)
        if free or (free is None and time.time() - os.fstat(file.fileno()).st_mtime > ABANDONED):
            os.unlink(name, dir_fd=folder)


def lock(file: BinaryIO, *, wait: bool = True, shared: bool = False) -> bool | None:
    """Lock an open file until it is closed; the operating system ends the lock when the process ends.

    Returns:
        True with the lock; False when another process has it and `wait` is false; None on file systems without locks.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    return True


def is_at(file: BinaryIO, path: Path) -> bool:
    """Return whether `path` still names the open file, and not a link to it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


def json_value(value: Any) -> Any:
    """Return `value` in the types of JSON: numpy values, tuples and paths are converted, NaN and infinity are None."""
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return json_value(value.tolist())
    return str(value) if isinstance(value, Path) else value


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Return `value` as JSON text with a line end; see `json_value`."""
    return encodable(json.dumps(json_value(value), indent=indent, allow_nan=False, ensure_ascii=False)) + "\n"


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Return `rows` as CSV text with LF line ends; cells are written by `csv_cell`.

    A cell with a quote, a comma or any character that ends a line is quoted, so that every reader finds the same cells.
    """
    lines = (",".join(map(_quoted, map(csv_cell, row))) for row in rows)
    return "".join(f"{line or EMPTY}\n" for line in lines)


def csv_cell(value: Any) -> str:
    """Return the text of one CSV cell: floats in full precision, None as an empty cell.

    A spreadsheet would run a text that begins with = + - @, tab or carriage return as a formula, and a reader that does
    not know quotes begins a new cell after each line break. An apostrophe is put before each such beginning, unless the
    whole text is a number. Other control characters, and half characters (lone surrogates, as in the name of a foreign
    folder), are written as escapes.
    """
    if value is None:
        return ""
    text = str(value)
    if NUMBER.fullmatch(text):
        return text
    text = CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", encodable(text))
    return FORMULA.sub("'", text)


def encodable(text: str) -> str:
    """Return `text` with half characters (lone surrogates), which no file can hold, as escapes."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _quoted(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"' if QUOTED.search(cell) else cell


@contextmanager
def _folder(path: Path, below: Path | None, *, make: bool = True) -> Iterator[int]:
    """Yield a descriptor of the folder `path`; below the folder `below` links are refused, and folders made."""
    flags = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC
    descriptor = os.open(path if below is None else below, flags)
    here = below
    try:
        for step in () if below is None else path.relative_to(below).parts:
            assert here is not None and step != ".."
            here = here / step
            if make:
                with suppress(FileExistsError):
                    os.mkdir(step, dir_fd=descriptor)
            try:
                inner = os.open(step, flags | os.O_NOFOLLOW, dir_fd=descriptor)
            except OSError:
                refuse_links(here)
                raise
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


def _open(name: str, flags: int, path: Path, folder: int) -> int:
    """Open a regular file that has one name, without waiting for the other end of a pipe.

    Args:
        name: of the file in the folder.
        flags: of os.open.
        path: the path for messages.
        folder: descriptor of the folder.
    """
    try:
        descriptor = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, MODE, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):  # the second on some BSD systems
            raise ConfigError(f"{path}: {LINK}") from None
        raise
    found = os.fstat(descriptor)
    several = found.st_nlink > 1 and flags & os.O_CREAT
    if stat.S_ISREG(found.st_mode) and not several:
        return descriptor
    os.close(descriptor)
    if several:
        raise ConfigError(
            f"{path}: has a second name by a hard link, whose content would change with it; put a copy in its place "
            "or choose another folder"
        )
    raise OSError(errno.EINVAL, "not a regular file")
