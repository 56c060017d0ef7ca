"""Files that survive a kill and a full disk: replacing, appending, locking, and text that is safe in a spreadsheet."""

import csv
import errno
import fcntl
import io
import json
import math
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

from clrun.system.errors import ConfigError, first_line

BEAT = 30.0  # seconds between two signs of life of a lock
SILENCE = 120.0  # seconds without a sign of life after which a lock of another machine is taken over
FORMULA = re.compile(r"[=+\-@\t\r]")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def cache_folder(kind: str) -> Path:
    """Return the folder for what can be computed again: `kind` under $CLRUN_CACHE, else in the user's cache folder."""
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
    """Turn an operating system's refusal to write `path` (disk full, no permission) into a `ConfigError`."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({first_line(error)}); make room or choose another folder"
        ) from error


@contextmanager
def replacing(path: Path, *, flush: bool = True) -> Iterator[BinaryIO]:
    """Yield a temporary file beside `path` that takes its place when the block ends well.

    Args:
        path: what to replace.
        flush: wait until the disk has it, so that it survives a loss of power as well.

    Raises:
        ConfigError: it cannot be written; `path` is untouched.
    """
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                if flush:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def append(path: Path, text: str) -> None:
    """Append all of `text` to the file at `path` or, when that fails, nothing of it.

    Raises:
        ConfigError: it cannot be written; what it held is untouched.
    """
    with writing(path), path.open("ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        rest = memoryview(text.encode())
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise


def plain(value: Any) -> Any:
    """Return `value` as JSON knows it: numpy numbers and arrays, tuples and paths converted, NaN and infinity null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value) if isinstance(value, Path) else value


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Return `plain(value)` as JSON with a line end."""
    return json.dumps(plain(value), indent=indent, allow_nan=False, ensure_ascii=False) + "\n"


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Return `rows` as CSV with LF line ends, every cell through `cell`."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([cell(value) for value in row] for row in rows)
    return buffer.getvalue()


def cell(value: Any) -> str:
    """Return the text of one CSV cell: floats in full, None empty, and strings that a spreadsheet would run disarmed.

    A string that begins with = + - @, tab or carriage return and is no plain number gets a leading apostrophe.
    """
    if value is None:
        return ""
    text = str(value)
    return f"'{text}" if FORMULA.match(text) and not NUMBER.fullmatch(text) else text


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the operating system's lock on the file `path` while the block runs; wait for whoever holds it now.

    The file stays. The lock ends with the process, whatever ends it.
    """
    with writing(path):
        file = path.open("a")
    with file:
        _flock(file)
        yield


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Own the lock file `path` while the block runs, for hours if need be; never wait.

    The file names its holder: process id, host and the start time of the process, which tells it from a later process
    of the same id. A lock whose holder is dead is taken over. On the same host that is certain and immediate. Another
    host cannot be asked, so a holder touches its lock every 30 seconds, and one from elsewhere counts as dead after
    120 seconds of silence. Two processes that look at the same stale lock are kept apart by the operating system's
    lock on the file, held only while it is read and written; a file system without such locks leaves a gap of
    microseconds.

    Raises:
        ConfigError: a living process holds the lock, or it cannot be written.
    """
    with writing(path):
        own = _acquire(path)
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, stop), daemon=True, name="clrun-lock")
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()
        _release(path, own)


def holder(path: Path) -> str | None:
    """Return who holds the lock file `path` ("process 12 on host"), or None when nobody alive does."""
    try:
        with path.open() as file:
            return _living(file)
    except OSError:
        return None


def _acquire(path: Path) -> str:
    """Write this process into the lock file and return what was written."""
    own = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())})
    while True:
        with path.open("a+") as file:
            _flock(file)
            if not _is_at(file, path):  # released, hence removed, between opening and locking
                continue
            if (other := _living(file)) is not None:
                raise ConfigError(f"{path.parent}: in use by {other}; wait for it or choose another folder")
            file.truncate(0)
            file.write(own)
            return own


def _release(path: Path, own: str) -> None:
    """Remove the lock file unless it is another's by now; a folder removed meanwhile is nobody's."""
    try:
        with path.open("r+") as file:
            _flock(file)
            if file.read() == own:
                path.unlink()
    except OSError:
        return


def _beat(path: Path, stop: threading.Event) -> None:
    """Touch the lock file until `stop` is set."""
    while not stop.wait(BEAT):
        try:
            os.utime(path)
        except OSError:
            return


def _living(file: IO[str]) -> str | None:
    """Return the holder named in an open lock file if it may be alive; an empty or foreign file has none."""
    file.seek(0)
    try:
        content = json.loads(file.read())
        pid, host, started = int(content["pid"]), str(content["host"]), content["started"]
    except (ValueError, KeyError, TypeError):
        return None
    if host == socket.gethostname():
        return f"process {pid} on {host}" if started is not None and _started(pid) == started else None
    silent = time.time() - os.fstat(file.fileno()).st_mtime
    if silent >= SILENCE:
        return None
    return f"process {pid} on {host}, last seen {max(0.0, silent):.0f} s ago (dead after {SILENCE:.0f} s)"


def _started(pid: int) -> str | None:
    """Return when process `pid` started, in the words of the system; None when it is dead or a zombie."""
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]
    ps = ["ps", "-o", "lstart=", "-p", str(pid)]
    return subprocess.run(ps, capture_output=True, text=True, check=False).stdout.strip() or None


def _flock(file: IO[str]) -> None:
    """Lock an open file exclusively until it is closed; file systems that know no locks go without."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
