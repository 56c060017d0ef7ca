"""Methods that merge networks: `merge` with every rule, and `imm`."""

import pickle
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_type_hints

import pytest
import torch
from helpers import (
    Linear,
    assert_same,
    born,
    context,
    factory,
    image_stream,
    live,
    row_stream,
    sgd,
    state,
    tiny_vit,
    trace,
)
from torch import Tensor, nn

from clrun.blocks.merging import Evidence, Mean
from clrun.blocks.params import clone, select
from clrun.learning.method import Method
from clrun.methods.imm import dropped_to
from clrun.methods.merge import Merge
from clrun.system.errors import ConfigError
from clrun.system.seeding import seed_all

RULES = [rule for rule in get_args(get_type_hints(Merge.__init__)["rule"]) if rule != "regmean_pp"]
Options = dict[str, Any]


def weights(method: Method) -> dict[str, Tensor]:
    return clone(select(method.backbone))


def vit_life(
    name: str, options: Options, order: Sequence[int], setting: Literal["til", "cil", "dil"] = "cil"
) -> Method:
    """Return a method on a small transformer, which has no running statistics, after a life with this order."""
    seed_all(0, "init")
    stream = image_stream(setting, order)
    method = factory(name, **options)(tiny_vit(depth=1, embed_dim=8, num_heads=2), stream.num_classes)
    method.check(stream)
    live(method, stream, budget=sgd(epochs=1, weight_decay=0.01))
    return method


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_lives_resumes_and_merges_something(rule: str) -> None:
    method, stream = born(factory("merge", rule=rule, samples=12), image_stream())
    live(method, stream, until=1)
    twin = pickle.loads(pickle.dumps(method))
    live(method, stream, learned=1)
    live(twin, stream, learned=1)
    assert_same(state(method), state(twin))
    last, stream = born(factory("finetune", compete="current"), image_stream())
    live(last, stream)
    assert any(not torch.equal(a, b) for a, b in zip(weights(method).values(), weights(last).values(), strict=True))
    assert all(bool(value.isfinite().all()) for value in weights(method).values())


@pytest.mark.parametrize("rule", ["mean", "fisher", "regmean", "imm_mode", "task_arithmetic", "ties", "dare"])
def test_the_order_of_independent_tasks_changes_no_bit(rule: str) -> None:
    options = {"rule": rule, "samples": 8}
    first = vit_life("merge", options, (0, 1, 2))
    assert first.order_invariant
    other = vit_life("merge", options, (2, 0, 1))
    assert_same(first.state_dict(), other.state_dict())


@pytest.mark.parametrize(
    "options", [{"rule": "opcm"}, {"rule": "dop"}, {"train_from": "previous"}, {"rule": "magmax"}, {"compete": "seen"}]
)
def test_no_claim_where_the_order_matters(options: Options) -> None:
    method, _ = born(factory("merge", **options), image_stream())
    assert not method.order_invariant
    assert not vit_life("merge", {}, (0, 1, 2), "dil").order_invariant, "all tasks train the same rows of the head"
    if options.get("rule") != "magmax":  # which commutes except for ties
        first, other = (vit_life("merge", options, order).state_dict() for order in ((0, 1, 2), (2, 0, 1)))
        assert any(not torch.equal(first[name], other[name]) for name in first)


def recorded(options: Options, name: str = "merge") -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]], Method]:
    """Return the trained networks before and after each merge, and the method at the end of its life."""
    method, stream = born(factory(name, **options), image_stream())
    trained: list[dict[str, Tensor]] = []
    learn = method.learn

    def watched(task: Any, ctx: Any) -> None:
        trained.append(weights(method))
        learn(task, ctx)
        trained.append(weights(method))

    method.learn = watched  # type: ignore[method-assign]
    return trained, trace(weights, method, stream), method


@pytest.mark.parametrize("start", ["initial", "previous", "merged"])
def test_tasks_start_where_they_should_and_the_merge_is_that_of_the_trained_networks(start: str) -> None:
    trained, merged, _ = recorded({"train_from": start})
    begins, ends = trained[::2], trained[1::2]
    expected = {"initial": begins[0], "previous": ends[0], "merged": merged[0]}
    assert_same(begins[1], expected[start])
    expected = {"initial": begins[0], "previous": ends[1], "merged": merged[1]}
    assert_same(begins[2], expected[start])
    mean = Mean()
    for end, now in zip(ends, merged, strict=True):
        mean.add(end)
        assert_same(mean.value(), now)


def test_modules_limit_what_is_trained_and_merged() -> None:
    method, stream = born(factory("merge", modules=["linear", "norm.*"]), image_stream())
    before = clone(dict(method.backbone.named_parameters()))
    live(method, stream)
    moved = {name for name, p in method.backbone.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"linear.weight", "linear.bias", "norm.weight", "norm.bias"} == method.rule.shapes.keys()
    with pytest.raises(ConfigError, match=r"method.modules: no trained parameter matches 'block.*' \(modules: conv, "):
        born(factory("merge", modules=["linear", "block.*"]), image_stream())


def test_a_class_keeps_the_row_that_its_task_trained() -> None:
    method, stream = born(factory("merge"), image_stream())
    rows = trace(lambda m: m.head.weight.clone(), method, stream, budget=sgd(weight_decay=0.1))
    for position, task in enumerate(stream.tasks):
        assert torch.equal(rows[-1][task.classes], rows[position][task.classes])
        assert rows[position][task.classes].any()


def test_running_statistics_belong_to_the_merge() -> None:
    method, stream = born(factory("merge"), image_stream())
    live(method, stream)
    net: Any = method.backbone
    found = clone(dict(net.named_buffers()))
    assert found["norm.num_batches_tracked"] == 8, "integer buffers are those of the newest network"
    (batch,) = stream.tasks[-1].train.batches(100)
    activations = net.conv(batch.x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(found["norm.running_mean"], activations.mean(dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("matching", "rule"), [("mean", "imm_mean"), ("mode", "imm_mode")], ids=["mean", "mode"])
def test_imm_without_transfer_is_merging_by_its_rule(matching: str, rule: str) -> None:
    plain = {"samples": 8}
    imm, stream = born(factory("imm", matching=matching, l2_transfer=0.0, **plain), image_stream())
    live(imm, stream)
    merge, stream = born(factory("merge", rule=rule, train_from="previous", **plain), image_stream())
    live(merge, stream)
    assert_same(imm.state_dict(), merge.state_dict())


def test_imm_weighs_the_newest_network_by_alpha() -> None:
    trained, merged, _ = recorded({"matching": "mean", "alpha": 0.5}, "imm")
    ends = trained[1::2]
    for name, value in merged[-1].items():
        expected = 0.5 * ends[2][name] + 0.25 * (ends[0][name] + ends[1][name])
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("transfer", [True, False])
def test_l2_transfer_is_the_l2_penalty_with_twice_the_strength(transfer: bool) -> None:
    method, stream = born(factory("imm", l2_transfer=0.3, weight_transfer=transfer, compete="seen"), image_stream())
    live(method, stream, until=1)
    plain, _ = born(factory("l2", strength=0.6), image_stream())
    plain.load_state_dict(method.state_dict(), strict=False)
    plain.penalty.update(plain.backbone, plain.curvature(stream.tasks[0], context(stream)))
    with torch.no_grad():
        for one in (method, plain):
            for parameter in one.backbone.parameters():
                parameter += 0.1
    (batch,) = stream.tasks[0].train.batches(100)
    losses = [one.eval().loss(batch, context(stream)) for one in (method, plain)]
    torch.testing.assert_close(losses[0], losses[1])


def test_dropped_units_compute_with_the_last_weights() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(2), nn.Linear(9, 5))
    last = clone(dict(layer.named_parameters()))
    x = torch.randn(3, 2, 5, 5)
    old = layer[0](x)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter))
    new = layer[0](x)
    with dropped_to(last, layer, 0.5):
        found = layer[0](x)
        several = torch.stack([layer[0](x) for _ in range(2500)]).mean(dim=0)
        whole = layer(x)
    units = set(((found - old) / (new - old)).detach().amax(dim=(2, 3)).round(decimals=3).flatten().tolist())
    assert units == {0.0, 2.0}, "a channel of an image is the old one, or moves twice as far"
    share = ((several - old) / (new - old)).detach()
    assert float((share - 1).abs().max()) < 0.1, "within five standard errors of the expectation"
    assert whole.shape == (3, 4, 5) and torch.equal(layer[0](x), new), "hooks are gone"
    with dropped_to(last, layer, 0.0):
        assert torch.equal(layer[0](x), new)


def test_drop_transfer_changes_training_and_resumes() -> None:
    ends = []
    for rate in (0.0, 0.5):
        method, stream = born(factory("imm", drop_transfer=rate), image_stream())
        live(method, stream, until=2)
        twin = pickle.loads(pickle.dumps(method))
        live(method, stream, learned=2)
        live(twin, stream, learned=2)
        assert_same(state(method), state(twin))
        ends.append(weights(method))
        assert method.hooks_backbone == (rate > 0)
    assert any(not torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_task_by_task_equals_all_at_once() -> None:
    source = torch.Generator().manual_seed(0)
    tasks = [(torch.randn(12, 4, generator=source), torch.tensor([2 * t, 2 * t + 1] * 6)) for t in range(3)]
    stream = row_stream(tasks, 6)
    torch.manual_seed(0)
    method = factory("merge", rule="regmean", samples=None)(Linear(), 6)
    trained: list[dict[str, Tensor]] = []
    grams: list[Evidence] = []
    merge = method.merge

    def watched(network: Any, found: Evidence, task: Any) -> Any:
        trained.append(clone(network))
        grams.append(found)
        return merge(network, found, task)

    method.merge = watched
    live(method, stream)
    rule = factory("merge", rule="regmean")(Linear(), 6).rule
    for one, found in reversed(list(zip(trained, grams, strict=True))):
        rule.add({n: v.double() for n, v in one.items()}, found)
    for name, value in rule.value(trained[-1]).items():
        torch.testing.assert_close(value, weights(method)[name], rtol=0, atol=1e-12)
    x = torch.cat([tasks[0][0], torch.ones(12, 1)], dim=1).double()
    torch.testing.assert_close(grams[0].grams["layer"].matrix, x.T @ x)


def test_what_finished_runs_alone_allow_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"clrun merge RUN RUN rule=regmean_pp"):
        Merge.check_options({"rule": "regmean_pp", "train_from": "initial"})
    with pytest.raises(ConfigError, match=r"set method.train_from=initial, previous or merged"):
        Merge.check_options({"rule": "mean", "train_from": "runs"})


def test_a_chain_of_task_vectors_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="method.train_from=initial trains independent networks"):
        Merge.check_options({"rule": "ties", "train_from": "previous"})
