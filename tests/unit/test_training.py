"""Learning-rate schedules and the length of a fit, step by step."""

import math
from functools import partial

import pytest
import torch

from clrun.learning.budget import Budget, cosine


def rates(warmup: float, steps: int) -> list[float]:
    """Return the learning rate of each step, relative to the first one set, and what would follow."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, found = cosine(optimizer, steps, warmup=warmup), []
    for _ in range(steps + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_cosine_rises_and_falls() -> None:
    falling = [(1 + math.cos(math.pi * k / 6)) / 2 for k in range(7)]
    assert rates(0.4, 10) == pytest.approx([0.2, 0.4, 0.6, 0.8, *falling]), "no step is taken at 0, and the end is 0"
    assert rates(0.0, 6) == pytest.approx(falling)
    assert rates(1.0, 3) == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_length_of_a_fit() -> None:
    optimizer = partial(torch.optim.SGD, lr=0.1)
    assert Budget(optimizer, epochs=3, batch_size=10).total_steps(21) == 9, "the last batch of an epoch is a short one"
    assert Budget(optimizer, epochs=3, batch_size=10).total_steps(0) == 0
    assert Budget(optimizer, steps=7, batch_size=10).total_steps(21) == 7
    assert Budget(optimizer, steps=7, batch_size=10).total_steps(0) == 0
