"""Locks on folders: one holder for hours (`locked`), or a short turn for which others wait (`exclusive`).

What `locked` relies on, in this order:

1. The operating system's lock (flock) on the lock file, held for the whole time. It ends with the process and works
   across containers of one machine and, where the network file system has it, across machines.
2. The identity of the holder, written into the file: boot id of the machine, pid namespace, process id and start time
   of the process. A host name is for messages only, because containers and cloned machines share it.
3. A heartbeat: the holder touches the file every BEAT seconds. It decides where the two above cannot: for another
   machine, and for another namespace on a file system without locks. Ages are differences of times that the file
   system itself has set, so that the clocks of two machines need not agree.

What remains possible: on a file system without locks two processes that find the same abandoned lock within
microseconds can both take it. Where the heartbeat decides, a holder that was suspended for more than SILENCE seconds
loses its lock without being told, and so may a holder during the BEAT seconds after the clock of the file system was
set forward.
"""

import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from clrun.system.errors import ConfigError, warn
from clrun.system.files import (
    is_at,
    lock,
    make_folder,
    missing_folders,
    open_own,
    remove_empty,
    remove_leftovers,
    temporary_name,
    writing,
)

BEAT = 30.0  # seconds after which the holder of a lock touches it again
SILENCE = 120.0  # a lock that only its heartbeat can vouch for is taken over after this number of seconds without one
PROBES, PAUSE = 5, 0.02  # a reader that asks who holds a lock has it for an instant: tries, and seconds between them
SIZE = 4096  # bytes of a lock file that are read


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the operating system's lock on the file `path` while the block runs; wait while another process holds it.

    The file is touched and not removed. The lock ends with the process, however that ends.

    Raises:
        ConfigError: the file cannot be written, or is a symbolic link.
    """
    with writing(path):
        file = open_own(path, "lock")
    with file:
        lock(file)
        with suppress(OSError):
            os.utime(file.fileno())
        yield


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` while the block runs, for hours if necessary; a living holder is never waited for.

    A lock whose holder has ended is taken over; the head of this module says how that is known. A lock from another
    machine whose last heartbeat lies in the future, because a clock was set back, is watched for SILENCE seconds: if it
    shows no sign of life in that time it is taken over, with a warning.

    Raises:
        ConfigError: a running process holds the lock, or the file cannot be written, or is a symbolic link.
    """
    with writing(path):
        file, own = _acquire(path)
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(file, stop), daemon=True, name="clrun-lock")
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()
        with file, suppress(OSError):  # also when the folder is gone
            if is_at(file, path) and _content(file) == own:
                path.unlink()


@contextmanager
def folder_locked(folder: Path, name: str, *, cleaned: tuple[str, ...] = ()) -> Iterator[None]:
    """Make a folder and hold its lock file `name` while the block runs; see `locked`.

    Folders that were made for this and are empty at the end are removed.

    Args:
        folder: the folder.
        name: name of the lock file in it.
        cleaned: folders below `folder` in which temporary files of killed processes are removed, as in `folder`.

    Raises:
        ConfigError: another living process holds the folder, or it cannot be written.
    """
    missing = missing_folders(folder)
    make_folder(folder)
    try:
        with locked(folder / name):
            remove_leftovers(folder, *cleaned)
            yield
    finally:
        remove_empty(missing)


def lock_holder(path: Path) -> str | None:
    """Return the holder of the lock file `path` ("process 12 on host"), or None when no running process holds it."""
    try:
        with open_own(path, "read") as file:
            free, content = lock(file, wait=False, shared=True), _content(file)
            silence = time.time() - os.fstat(file.fileno()).st_mtime
            return _name(content) if free is False else _living(content, _runs(file, content, free), silence)
    except (OSError, ConfigError):
        return None


def _acquire(path: Path) -> tuple[BinaryIO, dict[str, Any]]:
    """Return the lock file, open and with this process in it, and what was written.

    Raises:
        ConfigError: another process holds it.
    """
    watch = _Watch(path)
    while True:
        file = open_own(path, "lock")
        try:
            if (own := _take(file, path, watch)) is not None:
                return file, own
        except BaseException:
            file.close()
            raise
        file.close()
        watch.wait()


def _take(file: BinaryIO, path: Path, watch: "_Watch") -> dict[str, Any] | None:
    """Write this process into the open lock file and return what was written; None to try again.

    Raises:
        ConfigError: another process holds it.
    """
    for _ in range(PROBES):
        if (free := lock(file, wait=False)) is not False:
            break
        time.sleep(PAUSE)
    content = _content(file)
    if free is False:
        raise _in_use(path, _name(content))
    if not is_at(file, path):  # released, hence removed, between opening and locking
        return None
    runs = _runs(file, content, free)
    silence = _file_time(path.parent) - os.fstat(file.fileno()).st_mtime if runs is None else 0.0
    if silence < -BEAT:
        if not watch.is_over(file, content):
            return None
    elif (holder := _living(content, runs, silence)) is not None:
        raise _in_use(path, holder)
    return _written(file, path, free)


class _Watch:
    """Watches a lock whose last heartbeat lies in the future; time is this machine's, which no clock changes."""

    def __init__(self, path: Path) -> None:
        self.path, self.since, self.changed = path, 0.0, 0

    def wait(self) -> None:
        """Wait for the next look."""
        time.sleep(min(1.0, SILENCE / 10) if self.since else 0.001)

    def is_over(self, file: BinaryIO, content: Mapping[str, Any]) -> bool:
        """Return whether the lock was not touched for SILENCE seconds.

        Raises:
            ConfigError: it was touched.
        """
        changed, now = os.fstat(file.fileno()).st_mtime_ns, time.monotonic()
        if not self.since:
            self.since, self.changed = now, changed
            warn(f"{self.path}: its last change lies in the future; watching it for {SILENCE:.0f} s for signs of life")
        if changed != self.changed:
            raise _in_use(self.path, _name(content))
        if now - self.since < SILENCE:
            return False
        warn(f"{self.path}: taken over from {_name(content)}, which did not touch it for {SILENCE:.0f} s")
        return True


def _in_use(path: Path, holder: str) -> ConfigError:
    return ConfigError(f"{path.parent}: in use by {holder}; wait for it or choose another folder")


def _written(file: BinaryIO, path: Path, free: bool | None) -> dict[str, Any]:
    """Write this process into the open lock file; remove the file when that fails."""
    own = {**_identity(), "flock": bool(free), "device": os.fstat(file.fileno()).st_dev}
    try:
        file.seek(0)
        file.truncate(0)
        file.write(json.dumps(own).encode())
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise
    return own


def _content(file: BinaryIO) -> dict[str, Any]:
    """Return the record in an open lock file; {} for an empty or foreign one."""
    file.seek(0)
    try:
        content = json.loads(file.read(SIZE))
        return {**content, "pid": int(content["pid"]), "host": str(content["host"])[:64], "started": content["started"]}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}


def _name(content: Mapping[str, Any]) -> str:
    """Return the words for the holder of a lock."""
    host = "".join(c if c.isprintable() else "?" for c in content["host"]) if content else ""
    return f"process {content['pid']} on {host}" if content else "another process"


def _runs(file: BinaryIO, content: Mapping[str, Any], free: bool | None) -> bool | None:
    """Return whether the holder of a lock file, which no other process has locked, runs; None if the heartbeat decides.

    Args:
        file: the open lock file.
        content: of the lock file.
        free: True when this process has the operating system's lock on it; None on file systems without locks.
    """
    if not content:
        return False
    if content.get("boot") != _boot():
        return None
    if free and content.get("flock") is True and content.get("device") == os.fstat(file.fileno()).st_dev:
        return False  # the holder had locked it, on this file system under this kernel
    if _namespace() is None or content.get("namespace") != _namespace():
        return None
    return content["started"] is not None and _started(content["pid"]) == content["started"]


def _living(content: Mapping[str, Any], runs: bool | None, silence: float) -> str | None:
    """Return the holder of a lock file if it may still run; `silence` is the time in s since its last heartbeat."""
    if runs is not None:
        return _name(content) if runs else None
    if silence >= SILENCE:
        return None
    return f"{_name(content)}, last seen {max(0.0, silence):.0f} s ago (abandoned after {SILENCE:.0f} s)"


def _beat(file: BinaryIO, stop: threading.Event) -> None:
    """Touch the open lock file until `stop` is set."""
    while not stop.wait(BEAT):
        with suppress(OSError):
            os.utime(file.fileno())


def _file_time(folder: Path) -> float:
    """Return the time by the clock of the file system that holds `folder`, in seconds since 1970."""
    path = folder / temporary_name("clock")
    with open_own(path, "new") as file:
        path.unlink()
        os.utime(file.fileno())
        return os.fstat(file.fileno()).st_mtime


def _identity() -> dict[str, Any]:
    """Return what tells this process from every other one, as JSON values."""
    pid = os.getpid()
    return {
        "pid": pid,
        "host": socket.gethostname(),
        "boot": _boot(),
        "namespace": _namespace(),
        "started": _started(pid),
    }


@cache
def _boot() -> str:
    """Return the id of this start of the machine, shared by all its containers; the host name where there is none."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):
        command = ["sysctl", "-n", "kern.bootsessionuuid"]
        if found := subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip():
            return found
    return socket.gethostname()


def _namespace() -> str | None:
    """Return the id of this process's pid namespace; None where /proc shows the processes of another one."""
    if not Path("/proc/self").exists():
        return "only one"
    try:
        own = os.readlink("/proc/self") == str(os.getpid())
        return os.readlink("/proc/self/ns/pid") if own else None
    except OSError:
        return None


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
