"""What scripts/soak.py attempts with: forked processes, kills at a file operation, namespaces, and their outcomes.

Every attempt runs in processes that are forked from one that has imported everything and has trained nothing. It ends
as "identical" (the same bytes as an undisturbed run), "refused" (one line per problem, exit code 2) or "wrong".
"""

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("CLRUN_TEST_THREADS", "1")

from clrun.system.errors import ConfigError  # noqa: E402

Outcome = Literal["identical", "refused", "wrong"]
HANGS = 120  # seconds after which a process counts as hanging
NEW_MOUNTS, NEW_USER, NEW_PIDS = 0x00020000, 0x10000000, 0x20000000  # flags of unshare(2)
REMOUNT = 32  # flag of mount(2)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")


class Unavailable(Exception):
    """The operating system does not offer what an attempt needs, so that it is left out."""


@dataclass(frozen=True)
class Result:
    """The end of one attempt.

    Attributes:
        outcome: how it ended.
        detail: what is wrong, or how it was refused.
    """

    outcome: Outcome
    detail: str = ""


@dataclass(frozen=True)
class Ended:
    """The end of one process.

    Attributes:
        code: exit code; negative for a signal.
        text: what it printed.
    """

    code: int
    text: str

    @property
    def refused(self) -> bool:
        """Whether it ended with one line per problem, and without a traceback."""
        lines = self.text.strip().splitlines()
        return self.code == 2 and 0 < len(lines) <= 3 and "Traceback" not in self.text and self.text.isascii()


def start(work: Callable[[], None], log: Path) -> int:
    """Start `work` in a forked process that prints into `log`; return its process id.

    It ends with exit code 2 for a `ConfigError`, 1 for another exception, 130 for an interrupt.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.alarm(HANGS)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)
        work()
        code = 0
    except ConfigError as error:
        print(error, file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end(pid: int, log: Path) -> Ended:
    """Wait for a process that `start` has started."""
    _, status = os.waitpid(pid, 0)
    return Ended(os.waitstatus_to_exitcode(status), log.read_text(errors="replace") if log.exists() else "")


def forked(work: Callable[[], None], log: Path) -> Ended:
    """Do `work` in a forked process."""
    return end(start(work, log), log)


def at_file_operation(number: int, then: Callable[[], None]) -> Callable[[], int]:
    """Call `then` before file operation `number` (from 1) of this process; return a function that counts them.

    A file operation opens a file for writing, or makes, renames, truncates or removes one.
    """
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & WRITES or str(path).startswith(("/proc", "/dev")):
                return
        elif event not in CHANGES:
            return
        count += 1
        if count == number:
            then()

    sys.addaudithook(hook)
    return lambda: count


def kill_myself() -> None:
    """End this process as a kill does: at once, nothing is written or unlocked."""
    os.kill(os.getpid(), signal.SIGKILL)


def _call(name: str, *arguments: Any) -> None:
    """Call a function of the C library.

    Raises:
        Unavailable: it failed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        raise Unavailable(f"{name}: {os.strerror(ctypes.get_errno())}")


def own_namespaces(flags: int) -> None:
    """Give this process namespaces of its own; without the rights of root a user namespace makes it possible.

    Raises:
        Unavailable: the system allows neither.
    """
    try:
        _call("unshare", flags)
    except Unavailable:
        _call("unshare", flags | NEW_USER)


def mount(kind: bytes, target: Path, options: bytes = b"", *, again: bool = False) -> None:
    """Mount a file system in this process's own mount namespace, or change its options.

    Raises:
        Unavailable: the system does not allow it.
    """
    if not again:
        _call("mount", b"none", b"/", None, 0x4000 | 0x40000, None)  # recursive and private: nobody else sees it
    _call("mount", kind, str(target).encode(), kind, REMOUNT if again else 0, options)


@contextmanager
def torchrun(rank: int, world: int, port: int) -> Iterator[None]:
    """Set the environment variables that torchrun sets."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    try:
        yield
    finally:
        for name in (*names, "MASTER_ADDR"):
            del os.environ[name]


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
