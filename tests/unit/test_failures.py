"""How a failed run is told."""

import pytest
import torch

from clrun.system.errors import ConfigError, NumericalError
from clrun.system.failures import told


def test_mistakes_have_a_line_each_and_divergence_has_one():
    assert told(ConfigError("a: wrong\nb: wrong")) == ["a: wrong", "b: wrong"]
    assert told(NumericalError("the loss is nan")) == ["the loss is nan"]


@pytest.mark.parametrize("make", [lambda: torch.empty(10**15), lambda: torch.empty(2**62, 7), lambda: [0] * 10**18])
def test_a_machine_without_the_memory_is_no_bug(make):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        make()
    [line] = told(caught.value)
    assert line.startswith("out of memory (") and "\n" not in line


def test_a_gpu_without_the_memory_is_no_bug():
    assert told(torch.OutOfMemoryError("CUDA out of memory.\nTried")) == [
        "out of memory (CUDA out of memory. Tried); make batches, memories or the network smaller"
    ]


def test_a_bug_wants_its_traceback():
    assert told(KeyError("x")) == []
    assert told(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) == []
