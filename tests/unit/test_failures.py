"""The messages for failures with a known cause."""

import pytest
import torch

from clrun.system.errors import ConfigError, NumericalError
from clrun.system.failures import failure_lines

pytestmark = pytest.mark.exact  # whole numbers, bytes and texts alone


def test_mistakes_have_a_line_each_and_divergence_has_one():
    assert failure_lines(ConfigError("a: wrong\nb: wrong")) == ["a: wrong", "b: wrong"]
    assert failure_lines(NumericalError("the loss is nan")) == ["the loss is nan"]


@pytest.mark.parametrize("make", [lambda: torch.empty(10**15), lambda: torch.empty(2**62, 7), lambda: [0] * 10**18])
def test_a_machine_without_the_memory_is_no_bug(make):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        make()
    [line] = failure_lines(caught.value)
    assert line.startswith("out of memory (") and "\n" not in line


def test_a_gpu_without_the_memory_is_no_bug():
    assert failure_lines(torch.OutOfMemoryError("CUDA out of memory.\nTried")) == [
        "out of memory (CUDA out of memory. Tried); use smaller batches, a smaller memory or a smaller network"
    ]


def test_a_bug_wants_its_traceback():
    assert failure_lines(KeyError("x")) == []
    assert failure_lines(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) == []
