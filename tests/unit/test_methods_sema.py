"""SEMA: mixtures with routers, descriptors of what was learned, and where modules are added."""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import answers, assert_same, born, context, copies, factory, image_stream, live, rows, sgd, state, trace
from running import run
from torch import Tensor, nn

from clrun.blocks.inject import Adapter
from clrun.data.stream import Stream
from clrun.methods.sema import Descriptor, MixtureOfAdapters
from clrun.running.accounting import parameter_counts
from clrun.system.errors import ConfigError

D, DEPTH, C, T, R, CODE = 32, 4, 6, 3, 16, 8
ADAPTER = 2 * D * R + R + D


def sema(setting: Any = "cil", order: Any = (0, 1, 2), augment: Any = ("crop",), **options: Any) -> tuple[Any, Stream]:
    options = {"code": CODE, "rd": {"epochs": 1, "optimizer": {"lr": 0.001}}} | options
    return born(factory("sema", **options), image_stream(setting, order, augment=augment))


def budget(**options: Any) -> Any:
    return sgd(**({"epochs": 1, "weight_decay": 0.01} | options))


@cache
def _lived() -> tuple[Any, Stream, list[Any]]:
    method, stream = sema(threshold=0.0)
    found = trace(lambda m: (copies(m), m.expansion()), method, stream, budget=budget())
    return method, stream, found


def adapter(seed: int) -> Adapter:
    torch.manual_seed(seed)
    found = Adapter(D, R, activation="relu", dropout=0.0, scale=1.0, learn_scale=False)
    nn.init.normal_(found.up.weight)
    return found


def test_a_threshold_of_zero_expands_every_block_once_per_task_and_old_modules_stand_still() -> None:
    method, stream, found = _lived()
    assert [counts for _, counts in found] == [{"block 2": k, "block 3": k} for k in (1, 2, 3)]
    for place, (before, _) in enumerate(found):
        old = {name: p for name, p in before.items() if name.startswith(("mixtures", "simple", "backbone"))}
        for later, _ in found[place + 1 :]:
            assert_same(old, {name: later[name] for name in old})
    method, x = copy.deepcopy(method), rows(stream)
    before = state(method)
    assert torch.equal(answers(method, x), answers(method, x))
    assert_same(before, state(method))


def test_an_infinite_threshold_trains_the_head_alone() -> None:
    method, stream = sema(threshold=float("inf"))
    phases: list[str] = []
    live(method, stream, until=1, budget=budget())
    x = rows(stream)
    features = method.features(x, method.plan())
    before = copies(method)
    ctx = context(stream, 1, budget=budget(), on_step=lambda progress: phases.append(progress.phase))
    method.begin_task(stream.tasks[1], ctx)
    method.learn(stream.tasks[1], ctx)
    assert set(phases) == {"fit"} and method.expansion() == {"block 2": 1, "block 3": 1}
    after = copies(method)
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["head.weight", "head.bias"]
    assert torch.equal(features, method.features(x, method.plan()))


def test_golden_scores_of_a_descriptor() -> None:
    found = Descriptor(D, CODE)
    losses = torch.tensor([6.0, 0.5])
    assert found.z(losses).tolist() == [0.0, 0.0], "fewer than three records"
    found.begin(4)
    found.recent = torch.tensor([1.0, 2.0, 3.0, 4.0])
    found.end(context(image_stream()))
    assert found.statistics.tolist() == pytest.approx([2.5, 1.2909944, 4.0])
    assert found.z(losses).tolist() == pytest.approx([2.7110883, 1.5491933])
    assert float(found.z(losses).mean()) == pytest.approx(2.1301408) and not len(found.recent)
    same = copy.deepcopy(found)
    same.begin(4)
    same.recent = 3 * torch.tensor([1.0, 2.0, 3.0, 4.0]) + 7
    same.end(context(image_stream()))
    torch.testing.assert_close(same.z(3 * losses + 7), found.z(losses))


def test_the_last_losses_are_recorded() -> None:
    found, seen = Descriptor(D, CODE), torch.randn(12, D)
    found.begin(5)
    first, second = found.record(seen[:8]), found.record(seen[8:])
    assert torch.equal(found.recent, torch.cat([first, second]).detach()[-5:])
    with torch.no_grad():
        expected = (found.decoder(found.encoder(seen)) - seen).square().mean(dim=1)
    torch.testing.assert_close(found.losses(seen), expected)


def test_one_module_is_its_adapter_and_its_router_has_no_gradient() -> None:
    mixture, x = MixtureOfAdapters(), torch.randn(3, 5, D)
    mixture.add(adapter(0), Descriptor(D, CODE))
    assert torch.equal(mixture(x), mixture.adapters[0](x))
    assert not any(p.requires_grad for p in mixture.rows.parameters())


def test_the_router_mixes_by_the_mean_token() -> None:
    mixture, x = MixtureOfAdapters(), torch.randn(3, 5, D)
    for seed in (0, 1):
        mixture.add(adapter(seed), Descriptor(D, CODE))
    weights = torch.cat([row(x.mean(dim=1)) for row in mixture.rows], dim=1).softmax(dim=1)
    expected = sum(weights[:, k, None, None] * mixture.adapters[k](x) for k in (0, 1))
    torch.testing.assert_close(mixture(x), expected)
    with torch.no_grad():
        mixture.rows[1].weight.zero_()
        mixture.rows[1].bias.fill_(-torch.inf)
    assert torch.equal(mixture(x), mixture.adapters[0](x)), "a module that is never chosen changes nothing"


def test_untrained_adapters_are_the_plain_model() -> None:
    method, stream = sema(threshold=0.0)
    live(method, stream, until=2, budget=sgd(epochs=0))
    x = rows(stream)
    with torch.inference_mode():
        assert torch.equal(method.features(x, method.plan()), method.query(x))


def test_trained_parameters_of_the_first_task_and_of_an_expansion() -> None:
    method, stream = sema()
    method.begin_task(stream.tasks[0], context(stream))
    head = C * (D + 1)
    assert sum(p.numel() for p in method.trainable()) == DEPTH * ADAPTER + head
    descriptors = 2 * (2 * D * CODE + CODE + D)
    assert parameter_counts(method)["trainable"] == DEPTH * ADAPTER + head + descriptors
    method = copy.deepcopy(_lived()[0])
    method._add(3, context(stream))
    assert sum(p.numel() for p in method.trainable()) == ADAPTER + D + 1 + head


def test_the_published_number_of_parameters() -> None:
    counts = [
        sum(p.numel() for p in module.parameters())
        for module in (
            Adapter(768, 16, activation="relu", dropout=0.0, scale=1.0, learn_scale=False),
            Descriptor(768, 128),
            nn.Linear(768, 1),
        )
    ]
    assert counts == [25_360, 197_504, 769]


def test_the_same_data_again_do_not_expand_and_other_data_do() -> None:
    method, stream = sema(augment=(), rd={"epochs": 20, "optimizer": {"lr": 0.001}})
    live(method, stream, until=1, budget=budget())
    same = method.views(stream.tasks[0].train.batches(256), [2, 3])
    assert all(method.mixture(block).novelty(same[block]) < 2.0 for block in (2, 3))
    assert all(method.mixture(block).novelty(same[block] + 5.0) > 2.0 for block in (2, 3))
    ctx = context(stream, 1, budget=budget())
    again = Stream((stream.tasks[0],), C, "cil").tasks[0]
    assert not method._expand_by_task(again, ctx)
    first = stream.tasks[0].train
    shuffled = first.select(torch.randperm(len(first), generator=torch.Generator().manual_seed(0)))
    mixed = method.views(shuffled.batches(256), [2])[2]
    assert method.mixture(2).novelty(mixed) == pytest.approx(method.mixture(2).novelty(same[2]), rel=1e-4)


def test_the_first_block_that_a_batch_triggers_expands_and_the_data_are_read_again() -> None:
    method, stream = sema(threshold=0.0, detect="batch", detect_batch=8)
    live(method, stream, until=1, budget=budget())
    phases: list[str] = []
    ctx = context(stream, 1, budget=budget(), on_step=lambda progress: phases.append(progress.phase))
    method.begin_task(stream.tasks[1], ctx)
    method.learn(stream.tasks[1], ctx)
    assert list(dict.fromkeys(phases)) == ["func-2", "rd-2", "func-3", "rd-3"]
    assert method.expansion() == {"block 2": 2, "block 3": 2}


def test_descriptors_see_the_mean_token_of_their_block() -> None:
    method, stream, _ = _lived()
    x, streams = rows(stream)[:4], list[Tensor]()
    handle = method.backbone.blocks[3].norm2.register_forward_pre_hook(lambda module, args: streams.append(args[0]))
    method.eval()
    with torch.inference_mode():
        seen = method.seen(x, [3])[3]
    handle.remove()
    torch.testing.assert_close(seen, streams[0].mean(dim=1))


def test_a_run_records_its_modules_after_each_task(tmp_path: Path) -> None:
    short = ("job.max_tasks=2", "job.max_steps=2", "method.threshold=0", "backbone.pretrained=false")
    run(tmp_path, "method=sema", "backbone=glyph_vit", "dataset=digits", "scenario.n_tasks=5", *short)
    tasks = json.loads((tmp_path / "run.json").read_text())["cost"]["tasks"]
    assert [task["modules"] for task in tasks] == [{"block 2": k, "block 3": k} for k in (1, 2)]


def test_growth_is_recorded_and_blocks_are_checked() -> None:
    method, stream = sema(threshold=0.0)
    journal = live(method, stream, until=2, budget=sgd(epochs=0))
    logged = [record for record in journal.logged if record.get("phase") == "modules"]
    assert [record["block 2"] for record in logged] == [1, 2]
    with pytest.raises(ConfigError, match=r"^method\.blocks: there is no block 9"):
        sema(blocks=[9])
