"""Finetune, joint, EWC and SimpleCIL."""

from functools import partial

import pytest
import torch
from helpers import Identity, born, context, factory, image_stream, live, row_stream, sgd, trace

from clrun.blocks.params import flatten
from clrun.learning.budget import Budget
from clrun.running.accounting import state_bytes
from clrun.system.errors import ConfigError


def backbone(method: torch.nn.Module) -> torch.Tensor:
    """Return the weights of the backbone [P]."""
    return flatten(dict(method.backbone.named_parameters())).detach().clone()


@pytest.mark.parametrize("compete", ["seen", "current", "all"])
def test_finetune_moves_the_rows_of_old_classes_only_in_competition(compete: str) -> None:
    method, stream = born(factory("finetune", compete=compete), image_stream())
    rows = trace(lambda m: m.head.weight[:2].detach().clone(), method, stream)
    assert torch.equal(rows[0], rows[2]) == (compete == "current")


def test_joint_begins_each_task_from_the_initial_weights() -> None:
    for restart in (True, False):
        method, stream = born(factory("joint", restart=restart), image_stream())
        initial = backbone(method)
        live(method, stream, until=1)
        learned = backbone(method)
        ctx = context(stream, 1)
        method.begin_task(stream.tasks[1], ctx)
        assert torch.equal(backbone(method), initial if restart else learned)
        assert method.head.initialised.tolist() == [True] * 4 + [False] * 2


def test_joint_spends_its_epochs_on_the_union() -> None:
    counts = {}
    for mode in ("incremental", "once"):
        method, stream = born(factory("joint", mode=mode), image_stream())
        counts[mode] = live(method, stream, budget=sgd(epochs=2, batch_size=8)).steps
    assert counts == {"incremental": 8 + 16 + 24, "once": 24}


def test_joint_once_does_not_forget_task_incrementally() -> None:
    method, stream = born(factory("joint", mode="once"), image_stream(order=(1, 2, 0)))
    journal = live(method, stream, budget=sgd(epochs=20))
    by_task: dict[int, set[int]] = {}
    for row in journal.recorded:
        if row["setting"] == "til":
            by_task.setdefault(row["task"], set()).add(row["correct"])
    assert all(len(counts) == 1 for counts in by_task.values())
    assert sum(row["correct"] for row in journal.recorded if row["position"] == 3) > 0.8 * 2 * 48


def test_ewc_first_task_is_finetuning_and_the_penalty_holds_later() -> None:
    ends = []
    for name, options in (("finetune", {}), ("ewc", {"strength": 0.0}), ("ewc", {"strength": 100.0})):
        method, stream = born(factory(name, **options), image_stream("til", augment=()))
        ends.append(trace(backbone, method, stream, budget=sgd(epochs=10), until=2))
    plain, zero, strong = ends
    assert all(torch.equal(a, b) for a, b in zip(plain, zero, strict=True))
    assert torch.equal(plain[0], strong[0])
    method, stream = born(factory("ewc"), image_stream("til", augment=()))
    live(method, stream, budget=sgd(epochs=10), until=1)
    drift = [(method.penalty.importance * (end[1] - end[0]).square()).sum() for end in (plain, strong)]
    assert drift[1] < 0.5 * drift[0]


def test_ewc_state_is_two_numbers_a_weight_in_both_modes() -> None:
    for mode in ("online", "separate"):
        method, stream = born(factory("ewc", mode=mode), image_stream())
        live(method, stream)
        assert state_bytes(method)["penalty"] == 2 * 4 * len(backbone(method))


def test_ewc_proximal_freezes_where_the_gradient_form_diverges() -> None:
    method, stream = born(factory("ewc", strength=1e12, solver="proximal", labels="exact"), image_stream())
    live(method, stream, until=1)
    anchor = backbone(method)
    held = method.penalty.importance > 1e-9
    live(method, stream, learned=1, until=2)
    assert held.float().mean() > 0.5
    torch.testing.assert_close(backbone(method)[held], anchor[held], rtol=1e-3, atol=1e-3)
    exploded, stream = born(factory("ewc", strength=1e12, labels="exact"), image_stream())
    with pytest.raises(ArithmeticError):
        live(exploded, stream)


def test_ewc_proximal_refuses_other_optimizers() -> None:
    method, stream = born(factory("ewc", solver="proximal"), image_stream())
    budget = Budget(partial(torch.optim.Adam, lr=1e-3), epochs=1)
    with pytest.raises(ConfigError, match=r"method.solver=proximal: needs .*SGD, not Adam"):
        live(method, stream, budget=budget)


def test_ewc_freezes_running_statistics_after_the_first_task() -> None:
    moved = {}
    for norm in ("train", "freeze_after_first"):
        method, stream = born(factory("ewc", norm=norm), image_stream())
        seen = trace(lambda m: m.backbone.norm.running_mean.clone(), method, stream)
        moved[norm] = not torch.equal(seen[0], seen[2])
    assert moved == {"train": True, "freeze_after_first": False}


def test_simplecil_golden_scores() -> None:
    rows = torch.tensor([[1.0, 0], [1, 1], [0, 2], [2, 1]])
    stream = row_stream([(rows[:2], torch.tensor([0, 0])), (rows[2:], torch.tensor([1, 1]))], 3)
    method = factory("simplecil")(Identity(2), 3)
    live(method, stream)
    scores = method(torch.tensor([[1.0, 1.0]]))[0].tolist()
    assert scores == pytest.approx([0.9486832981, 0.9805806757, 0], abs=1e-6)


def test_simplecil_adds_the_domains_of_a_class() -> None:
    method, stream = born(factory("simplecil"), image_stream("dil"))
    live(method, stream)
    x = torch.cat([b.x for t in stream.tasks for b in t.train.batches(100)]).double()
    y = torch.cat([t.train.y for t in stream.tasks])
    means = torch.stack([x[y == c].mean(0) for c in range(6)])
    torch.testing.assert_close(method.head.prototypes.double(), means, rtol=1e-6, atol=1e-7)
    assert method.stats("features").counts().tolist() == [15] * 6
    assert not list(method.parameters())


def test_simplecil_accuracy_depends_on_the_set_of_seen_classes_only() -> None:
    after_two = []
    for order in ((0, 2, 1), (2, 0, 1)):
        method, stream = born(factory("simplecil"), image_stream(order=order))
        journal = live(method, stream, until=2)
        after_two.append({(r["task"], r["setting"], r["correct"]) for r in journal.recorded if r["position"] == 2})
    assert after_two[0] == after_two[1]
