"""Files that stay whole after a kill or on a full disk: replacing, appending, locking; JSON and CSV text."""

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

BEAT = 30.0  # seconds after which the holder of a lock touches it again
SILENCE = 120.0  # a lock of another machine that was not touched for this number of seconds is taken over
FORMULA = re.compile(r"[=+\-@\t\r]")
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
def replacing(path: Path, *, flush: bool = True) -> Iterator[BinaryIO]:
    """Yield a temporary file beside `path` that replaces it when the block ends without an exception.

    Args:
        path: file to replace.
        flush: wait until the content is on the disk, so that it also survives a loss of power.

    Raises:
        ConfigError: the file cannot be written; then `path` is unchanged.
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


def append_text(path: Path, text: str) -> None:
    """Append `text` to the file at `path`, completely or not at all.

    Raises:
        ConfigError: the file cannot be written; then its content is unchanged.
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
    return json.dumps(json_value(value), indent=indent, allow_nan=False, ensure_ascii=False) + "\n"


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Return `rows` as CSV text with LF line ends; cells are written by `csv_cell`."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([csv_cell(value) for value in row] for row in rows)
    return buffer.getvalue()


def csv_cell(value: Any) -> str:
    """Return the text of one CSV cell: floats in full precision, None as an empty cell.

    A spreadsheet would run a text that begins with = + - @, tab or carriage return as a formula. Such a text gets a
    leading apostrophe unless it is a number.
    """
    if value is None:
        return ""
    text = str(value)
    return f"'{text}" if FORMULA.match(text) and not NUMBER.fullmatch(text) else text


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the operating system's lock on the file `path` while the block runs; wait while another process holds it.

    The file is not removed. The lock ends with the process, however that ends.
    """
    with writing(path):
        file = path.open("a")
    with file:
        _flock(file)
        yield


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` while the block runs, for hours if necessary; never wait for it.

    The file names its holder by process id, host and start time of the process; the start time distinguishes it from a
    later process with the same id. A lock whose holder has ended is taken over. On the same host this is certain and
    immediate. Processes on another host cannot be looked up: a holder touches its lock every 30 seconds, and a lock
    from another host counts as abandoned after 120 seconds without a touch. Two processes that find the same abandoned
    lock are kept apart by the operating system's lock on the file, which is held only while the file is read and
    written. On a file system without such locks both could take it within microseconds.

    Raises:
        ConfigError: a running process holds the lock, or the file cannot be written.
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


def lock_holder(path: Path) -> str | None:
    """Return the holder of the lock file `path` ("process 12 on host"), or None when no running process holds it."""
    try:
        with path.open() as file:
            return _living(file)
    except OSError:
        return None


def read_json(path: Path, *, remedy: str) -> Any:
    """Return the content of a JSON file.

    Args:
        path: a regular file; a pipe or device of that name is refused because reading it could block for ever.
        remedy: end of the error message, which says what to do.

    Raises:
        ConfigError: the file cannot be read or is not JSON.
    """
    try:
        return json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read ({first_line(error)}); {remedy}") from error


def read_regular(path: Path) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: the file does not exist, cannot be read, or is a pipe or device, which could block its reader for ever.
    """
    if not path.is_file():
        raise FileNotFoundError(None, "not a regular file" if path.exists() else "no such file")
    return path.read_bytes()


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
    """Remove the lock file if it still names this process; do nothing when the folder is gone."""
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
    """Return the holder named in an open lock file if it may still run; an empty or foreign file has none."""
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
    return f"process {pid} on {host}, last seen {max(0.0, silent):.0f} s ago (abandoned after {SILENCE:.0f} s)"


def _started(pid: int) -> str | None:
    """Return the start time of process `pid` as the system prints it; None when it has ended or is a zombie."""
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]
    ps = ["ps", "-o", "lstart=", "-p", str(pid)]
    return subprocess.run(ps, capture_output=True, text=True, check=False).stdout.strip() or None


def _flock(file: IO[str]) -> None:
    """Lock an open file exclusively until it is closed; do nothing on file systems without locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


def _is_at(file: IO[str], path: Path) -> bool:
    """Return whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
