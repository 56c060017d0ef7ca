"""A task that is stopped inside any of its fits and goes on gives what an uninterrupted one gives, for every method."""

import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import METHODS, Recorder, assert_same, cpu, sgd, state
from test_methods import life

from clrun.learning.method import Method
from clrun.learning.progress import Running
from clrun.running import checkpoint
from clrun.running.checkpoint import RunState
from clrun.running.engine import Engine
from clrun.running.evaluation import Evaluation
from clrun.running.task_file import StoredFit
from clrun.running.task_fits import STOP, TaskFits
from clrun.system.signals import Stopped

pytestmark = pytest.mark.records  # bits of one layout


class Interrupted(TaskFits):
    """Keeps every fit in memory, and stops where `stop` says so of the number of a fit and of its progress."""

    def __init__(self, method: Method, stored: dict[int, StoredFit], stop: Callable[[int, Any], bool]) -> None:
        allowed, backbone = checkpoint.parts(method), checkpoint.fingerprints(method)
        super().__init__(Path("unused"), cpu(), interval=0.0, config_hash="", backbone=backbone, allowed=allowed)
        self.stored, self.stop_at, self.steps = stored, stop, 0
        self.checked |= {fit.name for fit in stored.values()}  # earlier lives have read them back

    def after_step(self, running: Running) -> None:
        self.steps += 1
        self.stopping = self.stop_at(self.number, running.progress)
        super().after_step(running)

    def wish(self) -> int:
        return STOP if self.stopping else 0

    def write(self, position: StoredFit | None) -> None:
        if position is not None:
            self.stored[self.number] = position

    def end_task(self) -> None:
        raise _End


class _End(Exception):
    """Ends a life after one task."""


def second_task(
    name: str, stored: dict[int, StoredFit], stop: Callable[[int, Any], bool]
) -> tuple[Method, Interrupted]:
    """Let a method that has learned one task learn the next one, going on from `stored` and stopping where told."""
    whole = life(name)
    method = pickle.loads(whole.pickled)
    fits, hardware = Interrupted(method, stored, stop), cpu()
    evaluation = Evaluation(hardware, "test", 64, 0)
    engine = Engine(
        whole.stream, sgd(), hardware, 0, evaluation, Recorder(None, None), fits=fits, state=RunState(learned=1)
    )
    with suppress(_End):
        engine.run(method)
    return method, fits


def interrupted_in_each_fit(name: str, place: Callable[[int], int]) -> tuple[Method, int, int]:
    """Stop once in each fit at the step that `place` gives for the number of its steps, going on after each stop.

    Returns:
        The method, the number of fits, and the number of steps that were taken in all.
    """
    stored: dict[int, StoredFit] = {}
    done, steps = -1, 0
    while True:
        last = done

        def stop(number: int, progress: Any, last: int = last) -> bool:
            return number > last and progress.step == place(progress.total)

        torch.rand(3)  # what ran before in this process must not matter
        try:
            method, fits = second_task(name, stored, stop)
        except Stopped:
            done = max(stored)
            assert not stored[done].finished
            steps += stored[done].steps
            continue
        return method, done + 1, fits.number + 1


@pytest.mark.parametrize("name", METHODS)
def test_goes_on_inside_each_fit_of_a_task(name: str) -> None:
    method, stopped, fits = interrupted_in_each_fit(name, lambda total: (total + 1) // 2)
    assert stopped == fits
    assert_same(state(life(name).copied), state(method))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_goes_on_at_the_first_and_the_last_steps(name: str) -> None:
    for place in (lambda total: 1, lambda total: total, lambda total: max(1, total - 1)):
        method, stopped, fits = interrupted_in_each_fit(name, place)
        assert stopped == fits
        assert_same(state(life(name).copied), state(method))


@pytest.mark.parametrize(("name", "count"), [("halrp", 2), ("progress_compress", 2), ("sema", 2), ("packnet", 2)])
def test_finished_fits_hand_back_their_result_and_take_no_step(name: str, count: int) -> None:
    stored: dict[int, StoredFit] = {}
    with pytest.raises(Stopped):
        second_task(name, stored, lambda number, progress: number == count - 1 and progress.step == 1)
    assert [fit.finished for fit in stored.values()] == [True] * (count - 1) + [False]
    taken = sum(fit.steps for fit in stored.values())
    _, fits = second_task(name, dict(stored), lambda number, progress: False)
    _, whole = second_task(name, {}, lambda number, progress: False)
    assert fits.steps == whole.steps - taken
