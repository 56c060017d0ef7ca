"""Signals that ask a run to stop: it ends its step, writes a checkpoint and exits with a code of its own.

Schedulers announce the end of a job by SIGTERM, SIGUSR1 or SIGUSR2, and a closed terminal by SIGHUP. The first such
signal is noted; while a step is computed it waits for the step's end (`deferred`), at most `PATIENCE` seconds, and
anywhere else it raises `Stopped` at once. A second signal ends the process at once, unless it follows within `SAME`
seconds: a closed terminal sends SIGHUP twice, and a process of several gets a signal from outside and from its parent.
A signal that is ignored or has another handler (nohup, a launcher) keeps it. SIGINT is left to Python.
"""

import _thread
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
EXIT_CODE = 75  # "temporary failure; try again" in sysexits.h
PATIENCE = 20.0  # seconds that the end of a step is waited for
SAME = 2.0  # seconds within which further signals belong to the first


class Stopped(KeyboardInterrupt):
    """A signal has asked the process to stop. Like Ctrl-C, it is no failure of a job.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


@dataclass
class _Request:
    """What has been asked of this process.

    Attributes:
        number: the signal that asked it to stop; None for none.
        since: time of that signal, of time.monotonic.
        deferrals: number of blocks of `deferred` that are open.
        overdue: whether the end of the step was waited for too long.
        timer: ends the wait for the end of the step; None where nothing is waited for.
        forward: sends a signal to the processes that do the work of this one; None without such processes.
        active: whether handlers are set.
    """

    number: int | None = None
    since: float = 0.0
    deferrals: int = 0
    overdue: bool = False
    timer: threading.Timer | None = None
    forward: Callable[[int], None] | None = None
    active: bool = False


_request = _Request()


def requested() -> int | None:
    """Return the number of the signal that has asked this process to stop; None for none."""
    return _request.number


@contextmanager
def caught() -> Iterator[None]:
    """Raise `Stopped` in the block when a signal asks to stop; do nothing within such a block and in other threads."""
    if _request.active or threading.current_thread() is not threading.main_thread():
        yield
        return
    _request.active, _request.number = True, None
    own = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    for number in own:
        signal.signal(number, _handle)
    try:
        yield
    finally:
        for number in own:
            signal.signal(number, signal.SIG_DFL)
        _request.active = False


@contextmanager
def deferred() -> Iterator[None]:
    """Let a signal wait for the end of the block, where `raise_requested` or the caller looks for it."""
    _request.deferrals += 1
    try:
        yield
    finally:
        _request.deferrals -= 1
        if _request.timer is not None:
            _request.timer.cancel()
            _request.timer = None


def raise_requested() -> None:
    """Raise `Stopped` if a signal has asked this process to stop.

    Raises:
        Stopped: see above.
    """
    if _request.active and _request.number is not None:
        raise Stopped(_request.number)


@contextmanager
def forwarded(processes: Sequence[int]) -> Iterator[None]:
    """Send signals on to these processes (ids) in the block, which waits for their end, instead of raising."""

    def send(number: int) -> None:
        for process in processes:
            try:
                os.kill(process, number)
            except ProcessLookupError:
                continue

    _request.forward = send
    try:
        yield
    finally:
        _request.forward = None


def _handle(number: int, frame: FrameType | None) -> None:
    """Note the first signal; see the module."""
    now = time.monotonic()
    if _request.number is None:
        _request.number, _request.since, _request.overdue = number, now, False
        if _request.forward is not None:
            _request.forward(number)
        elif _request.deferrals:
            _request.timer = threading.Timer(PATIENCE, _lose_patience, (number,))
            _request.timer.daemon = True
            _request.timer.start()
        else:
            raise Stopped(number)
    elif _request.overdue:
        _request.overdue = False
        raise Stopped(_request.number)
    elif now - _request.since >= SAME:
        if _request.forward is not None:
            _request.forward(signal.SIGKILL)
        os._exit(128 + number)


def _lose_patience(number: int) -> None:
    """Interrupt the main thread, whose step takes too long; runs in a thread of its own."""
    if _request.active and _request.deferrals:
        _request.overdue = True
        _thread.interrupt_main(signal.Signals(number))
