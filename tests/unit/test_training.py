"""Learning-rate schedules and the length of a fit, step by step."""

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from helpers import Net, context, image_stream, sgd

from clrun.learning.budget import (
    Budget,
    TaskBudget,
    cosine,
    floor_cosine,
    milestones,
    returning_cosine,
    stepped_cosine,
)
from clrun.learning.method import Method
from clrun.system.errors import ConfigError
from clrun.system.seeding import seed_all


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


def by_group(schedule: Any, steps: int, *lrs: float, **options: Any) -> list[list[float]]:
    """Return the learning rates of groups with these rates, in each step and after the last."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    running, found = schedule(optimizer, steps, **options), []
    for _ in range(steps + 1):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        running.step()
    return found


def test_a_stepped_cosine_is_constant_within_an_epoch() -> None:
    found = [rate for [rate] in by_group(stepped_cosine, 10, 1.0, levels=5)]
    assert found[0:10:2] == pytest.approx([1, 0.9045, 0.6545, 0.3455, 0.0955], abs=1e-4)
    assert found[1:10:2] == found[0:10:2]


def test_a_returning_cosine_comes_back_after_two_half_periods() -> None:
    found = [rate for [rate] in by_group(returning_cosine, 60, 1.0, levels=30, half_period=5)]
    assert found[0:60:10] == pytest.approx([1.0, 0.0, 1.0, 0.0, 1.0, 0.0], abs=1e-9)
    assert found[2] == found[3] == pytest.approx(0.9045, abs=1e-4)


def test_all_groups_fall_to_the_same_floor() -> None:
    found = by_group(floor_cosine, 20, 0.01, 0.005, 0.001, 0.0, floor=1e-4)
    assert found[0] == pytest.approx([0.01, 0.005, 0.001, 0.0])
    assert found[10] == pytest.approx([0.00505, 0.00255, 0.00055, 0.0])
    assert found[20] == pytest.approx([1e-4, 1e-4, 1e-4, 0.0])


def test_the_rate_falls_at_milestones() -> None:
    found = [rate for [rate] in by_group(milestones, 20, 1.0, at=[0.5, 0.9], factor=0.1)]
    assert found[:20] == pytest.approx([1.0] * 10 + [0.1] * 8 + [0.01] * 2)


class Two(Method):
    """Backbone and head with learning rates of their own."""

    def trainable(self) -> list[dict[str, Any]]:
        return [
            {"params": list(self.backbone.parameters()), "lr_factor": 0.25},
            {"params": list(self.head.parameters())},
        ]


def test_a_task_may_have_a_learning_rate_of_its_own() -> None:
    method, stream = Two(Net(), 6), image_stream(augment=())
    names = [task.name for task in stream.tasks]
    budget = TaskBudget(partial(torch.optim.SGD, lr=0.125), steps=1, lr_factors={names[1]: 0.5})
    found = []
    for task in stream.tasks:
        ctx = context(stream, task.index, budget=budget)
        method.begin_task(task, ctx)
        method.learn(task, ctx)
        found.append(ctx.progress.lr)
    assert found == [0.25 * 0.125, 0.25 * 0.5 * 0.125, 0.25 * 0.125]  # of the first group
    budget.check_tasks(names)
    with pytest.raises(ConfigError, match="^budget.lr_factors: the stream has no task named .* \\(it has: a, b\\)"):
        budget.check_tasks("ab")


def test_a_factor_of_a_group_multiplies_the_rate_of_the_budget() -> None:
    moved = []
    for method_class in (Method, Two):
        seed_all(0, "init")
        method, stream = method_class(Net(), 6), image_stream(augment=())
        ctx = context(stream, budget=sgd(lr=0.125, momentum=0.0, epochs=None, steps=1))
        seed_all(0, "task")
        method.begin_task(stream.tasks[0], ctx)
        before = copy.deepcopy(method.state_dict())
        method.learn(stream.tasks[0], ctx)
        moved.append({name: p.detach() - before[name] for name, p in method.named_parameters()})
    for name, change in moved[0].items():
        factor = 0.25 if name.startswith("backbone") else 1.0
        torch.testing.assert_close(moved[1][name], factor * change, rtol=1e-3, atol=1e-7)
    assert moved[0]["backbone.linear.weight"].any() and moved[0]["head.weight"].any()
