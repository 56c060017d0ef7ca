"""InfLoRA: maps down outside the old inputs, keys and values that stay, folded updates, thresholds, the alignment."""

from typing import Any

import pytest
import torch
from helpers import assert_same, born, context, factory, image_stream, live, node, rows, sgd, state
from omegaconf import OmegaConf
from torch import Tensor

from clrun.data.stream import Stream
from clrun.learning.context import Context
from clrun.system.seeding import seed_all

FIRST = "blocks.0.attn.qkv"
ALIGNED = {
    **OmegaConf.to_container(node("method", "slca").alignment),  # type: ignore[dict-item]
    "rows_per_class": 8,
}
ALIGNED["budget"] = {**ALIGNED["budget"], "epochs": 3, "batch_size": 16}


def make(**options: Any) -> tuple[Any, Stream]:
    method, stream = born(factory("inflora", **({"rank": 3} | options)), image_stream())
    return method, stream


def begun(learned: int, **options: Any) -> tuple[Any, Context]:
    method, stream = make(**options)
    live(method, stream, until=learned) if learned else None
    ctx = context(stream, learned)
    seed_all(0, "task", learned)
    method.begin_task(stream.tasks[learned], ctx)
    return method, ctx


@pytest.mark.parametrize("learned", [0, 1, 2])
def test_a_has_orthogonal_rows_outside_the_protected_directions(learned: int) -> None:
    method, _ = begun(learned, eps=0.9)
    for space, update in zip(method.by_site(), method.newest().values(), strict=True):
        (down,) = update.down.double()
        torch.testing.assert_close(3 * down @ down.t(), torch.eye(3, dtype=torch.float64), rtol=1e-5, atol=1e-6)
        assert (space.dimension > 0) == (learned > 0)
        assert (down - space.outside(down)).abs().max() < 1e-6
        assert not update.down.requires_grad and update.up.requires_grad


def test_a_of_the_first_task_is_that_of_its_inputs() -> None:
    method, ctx = begun(0, moment_view="eval")
    tokens: list[Tensor] = []
    handle = method.backbone.get_submodule(FIRST).register_forward_hook(lambda m, args, y: tokens.append(args[0]))
    for batch in ctx.task.train.batches(100):
        method(batch.x)
    handle.remove()
    x = torch.cat(tokens).flatten(0, 1).double()
    values, vectors = torch.linalg.eigh(x.t() @ x)
    (down,) = method.newest()[FIRST].down.double()
    found = (3**0.5 * down @ vectors.flip(1)[:, :3]).abs()
    torch.testing.assert_close(found, torch.eye(3, dtype=torch.float64), rtol=1e-4, atol=1e-4)
    assert values[-1] > values[-2]


def test_old_inputs_have_the_same_keys_and_values_whatever_b_becomes() -> None:
    method, _ = begun(1, eps=0.99, eps_final=0.99, fold=False)
    space, total = method.by_site()[0], method.by_path()[FIRST]
    (basis,) = (space.basis,) if not space.complement else (torch.linalg.svd(space.basis).U[:, space.basis.shape[1] :],)
    inside = (torch.randn(5, space.dimension, dtype=torch.float64) @ basis.t()).float()
    outside = torch.randn(5, 32)
    before, other = total(inside), total(outside)
    with torch.no_grad():
        total.updates[-1].up.normal_()
    torch.testing.assert_close(total(inside), before, rtol=0, atol=1e-5)
    assert not torch.allclose(total(outside), other, atol=1e-2)
    assert not total(outside)[:, :32].any(), "queries have no update"


def test_where_everything_is_protected_a_task_trains_its_head_alone() -> None:
    method, stream = make(eps=1.0)
    live(method, stream, until=1)
    for space in method.by_site():
        space.basis, space.complement = torch.zeros(space.width, 0, dtype=torch.float64), True
    x = rows(stream)
    before = method.eval().features(x)
    ctx = context(stream, 1)
    method.begin_task(stream.tasks[1], ctx)
    assert not any(update.down.any() for update in method.newest().values())
    method.learn(stream.tasks[1], ctx)
    assert torch.equal(method.eval().features(x), before)


def test_folding_changes_no_prediction_and_keeps_one_weight() -> None:
    ends = []
    for fold in (True, False):
        method, stream = make(fold=fold)
        live(method, stream, until=1)
        ends.append(method)
    x = rows(stream)
    folded, kept = ends
    assert len(folded.folded) == 4 and not len(folded.by_path()[FIRST].updates) and not len(kept.folded)
    with torch.inference_mode():
        torch.testing.assert_close(folded(x), kept(x), rtol=1e-4, atol=1e-5)
    live(folded, stream, learned=1)
    assert len(folded.folded) == 4
    change = folded.folded[0] - folded.backbone.get_submodule(FIRST).weight
    assert not change[:32].any() and int(torch.linalg.matrix_rank(change.double(), rtol=1e-4)) == 9


def test_the_share_grows_to_its_end_and_the_ranks_are_logged() -> None:
    method, stream = make(eps=0.7)
    assert method.depends_on_task_count and not make(eps=0.7, eps_final=0.7)[0].depends_on_task_count
    journal = live(method, stream)
    logged = [record for record in journal.logged if record.get("phase") == "input_space"]
    assert [record["share"] for record in logged] == pytest.approx([0.7, 0.8, 0.9])
    ranks = [record[f"protected.{FIRST}"] for record in logged]
    assert ranks == sorted(ranks) and ranks[-1] == method.by_site()[0].dimension


@pytest.mark.parametrize("view", ["train", "eval"])
def test_the_share_of_fourth_powers_protects_fewer_directions(view: str) -> None:
    found = {}
    for energy in ("squared", "plain"):
        method, stream = make(energy=energy, moment_view=view)
        live(method, stream, until=1, budget=sgd(epochs=1))
        found[energy] = [space.dimension for space in method.by_site()]
    assert all(a < b for a, b in zip(found["squared"], found["plain"], strict=True))


def test_basis_and_complement_learn_the_same() -> None:
    ends = []
    for basis in ("keep", "dual"):
        method, stream = make(basis=basis, eps=0.999, energy="plain")
        live(method, stream, until=2)
        ends.append(method)
    assert any(space.complement for space in ends[1].by_site())
    for a, b in zip(*(method.by_site() for method in ends), strict=True):
        assert a.dimension == b.dimension
    with torch.inference_mode():
        torch.testing.assert_close(ends[0](rows(stream)), ends[1](rows(stream)), rtol=1e-3, atol=1e-4)


def test_an_alignment_moves_the_head_alone_and_is_kept_by_the_next_task() -> None:
    method, stream = make(alignment=ALIGNED)
    counts: list[tuple[int, int]] = []
    for position, task in enumerate(stream.tasks):
        seen: list[str] = []
        ctx = context(stream, position, on_step=lambda progress, seen=seen: seen.append(progress.phase))
        method.begin_task(task, ctx)
        if position:
            assert torch.equal(method.head.weight[: 2 * position], aligned[: 2 * position])  # noqa: F821
        method.learn(task, ctx)
        before = method.head.weight.detach().clone()
        method.end_task(task, ctx)
        aligned = method.head.weight.detach().clone()
        assert torch.equal(before, aligned) == (position == 0)
        counts.append((seen.count("fit"), seen.count("align")))
    assert counts == [(8, 0), (8, 3 * 2), (8, 3 * 3)]
    assert method.replay.classes.tolist() == [0, 1, 2, 3, 4, 5]


def test_old_classes_are_drawn_around_shrunk_means() -> None:
    method, stream = make(alignment=ALIGNED | {"jitter": 0.0}, mean_shrink=0.3)
    live(method, stream, until=2)
    method.replay.covariances.zero_()
    drawn = method._replayed(context(stream, 1))()
    factors = torch.tensor([0.85, 0.85, 1.0, 1.0])
    torch.testing.assert_close(drawn[:, 0], method.replay.means[:4].float() * factors[:, None], rtol=1e-5, atol=1e-5)


def test_without_an_alignment_the_method_is_that_of_the_paper() -> None:
    ends = []
    for alignment in (None, ALIGNED | {"budget": {**ALIGNED["budget"], "epochs": 0}}):
        method, stream = make(alignment=alignment)
        live(method, stream, until=2)
        ends.append({n: t for n, t in state(method).items() if not n.startswith("replay")})
    assert_same(*ends)
    assert method(rows(stream)).isfinite().all()
