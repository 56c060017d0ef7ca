"""MoE-Adapters: gates, frozen experts, routers per task, selectors, and the plain model as fallback."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Identity, assert_same, born, context, factory, image_stream, live, state, tiny_towers
from running import run, run_interrupted
from test_methods_zscl import OTHERS
from torch import Tensor

from clrun.blocks.inject import Adapter, Injector, Plan
from clrun.data.stream import Stream
from clrun.methods.moe_adapters import Autoencoder, Mixture, MoeAdapters, routed
from clrun.methods.zero_shot import ZeroShot
from clrun.system.errors import ConfigError

SHORT = {"experts": 5, "bottleneck": 4, "code": 6, "selector_budget": {"steps": 20}}
INCREMENTAL = {"experts": 2, "routers": "shared", "freeze_used": False, "selector": "none"}


def learner(**options: Any) -> tuple[MoeAdapters, Stream]:
    method, stream = born(factory("moe_adapters", **(SHORT | options)), image_stream(augment=[]))
    assert isinstance(method, MoeAdapters)
    return method, stream


def images(stream: Stream) -> Tensor:
    return torch.cat([next(task.test.batches(6)).x for task in stream.tasks])


def mixture(experts: int = 5, top_k: int = 2, *, noisy: bool = False, trained: bool = True) -> Mixture:
    torch.manual_seed(0)
    made = [Adapter(8, 3, activation="relu", dropout=0.0, scale=0.1, learn_scale=False) for _ in range(experts)]
    found = Mixture(8, made, top_k, noisy=noisy)
    for _ in range(2):
        found.begin(new=True)
    if trained:
        with torch.no_grad():
            for parameter in found.parameters():
                parameter.normal_()
    return found


class TestMixture:
    def test_gates_are_the_softmax_of_the_best_and_sum_to_1(self) -> None:
        found = mixture().eval()
        s = torch.randn(7, 8)
        found.route = 1
        gates, logits = found.gates(s), s @ found.routers[1]
        torch.testing.assert_close(gates.sum(dim=1), torch.ones(7))
        for row in range(7):
            best = logits[row].topk(2)
            torch.testing.assert_close(gates[row, best.indices], best.values.softmax(dim=0))
            assert int((gates[row] > 0).sum()) == 2

    def test_each_row_has_its_own_router_or_none(self) -> None:
        found = mixture().eval()
        x = torch.randn(6, 4, 8)
        whole = torch.tensor([0, 1, -1, 1, 0, -1])
        with routed([found], whole):
            together = found(x)
        for route in (0, 1):
            with routed([found], route):
                torch.testing.assert_close(together[whole == route], found(x)[whole == route], rtol=1e-5, atol=1e-5)
        assert not together[whole == -1].any() and together[whole >= 0].any(dim=(1, 2)).all()

    def test_one_expert_is_an_adapter(self) -> None:
        found = mixture(experts=1, top_k=1).eval()
        x = torch.randn(3, 4, 8)
        with routed([found], 0):
            torch.testing.assert_close(found(x), found.experts[0](x))

    def test_training_and_prediction_compute_the_same_and_unused_experts_get_no_gradient(self) -> None:
        found = mixture()
        x = torch.randn(3, 4, 8)
        with routed([found], 1):
            trained = found.train()(x)
            torch.testing.assert_close(trained, found.eval()(x), rtol=1e-5, atol=1e-5)
            used = (found.gates(x[:, 0]) > 0).any(dim=0).tolist()
        trained.sum().backward()
        assert [expert.up.weight.grad is not None for expert in found.experts] == used  # type: ignore[union-attr]
        assert found.routers[1].grad is not None and found.routers[0].grad is None
        assert found.counts.sum() == 3 * 2

    def test_noise_has_the_published_deviation_and_comes_in_training_alone(self) -> None:
        found = mixture(experts=2, noisy=True, trained=False)
        s = torch.randn(20000, 8)
        with routed([found], 0):
            gates = found.train().gates(s)
            assert torch.equal(found.eval().gates(s[:4]), torch.full((4, 2), 0.5))
        difference = (gates[:, 0] / gates[:, 1]).log()  # of two independent noises
        assert float(difference.std()) / 2**0.5 == pytest.approx(0.70314718, rel=0.03)


@pytest.mark.parametrize("form", [{}, INCREMENTAL], ids=["multi-domain", "class-incremental"])
def test_with_new_experts_it_is_the_plain_model(form: dict[str, Any]) -> None:
    method, stream = learner(**form)
    method.begin_task(stream.tasks[0], context(stream))
    x, plain = images(stream), ZeroShot(method.backbone, 6)
    plain.read_names(stream.captions)
    plain.begin_task(stream.tasks[0], context(stream))
    with torch.inference_mode():
        torch.testing.assert_close(method.eval()(x), plain.eval()(x), rtol=1e-5, atol=1e-5)
        unit = F.normalize(method.backbone.encode_image(x), dim=1)  # type: ignore[operator]
        assert torch.equal(method.encode(x, 0), unit)
        assert torch.equal(method.heads[0].final_texts([0, 1]), method.head.final_texts([0, 1]))  # type: ignore[operator]


def test_towers_frozen_experts_and_earlier_routers_stay_bit_for_bit() -> None:
    method, stream = learner()
    towers = state(method.backbone)
    live(method, stream, until=1)
    mixtures = method._mixtures()
    assert all(int(m.frozen.sum()) == 2 and int(m.counts[m.frozen].min()) >= int(m.counts.max()) / 2 for m in mixtures)
    frozen = [(e, state(e)) for m in mixtures for e, done in zip(m.experts, m.frozen.tolist(), strict=True) if done]
    routers = [m.routers[0].detach().clone() for m in mixtures]
    moving = [state(e) for m in mixtures for e, done in zip(m.experts, m.frozen.tolist(), strict=True) if not done]
    live(method, stream, learned=1)
    assert_same(towers, state(method.backbone))
    for expert, before in frozen:
        assert_same(before, state(expert))
    assert all(torch.equal(m.routers[0], before) for m, before in zip(mixtures, routers, strict=True))
    assert all(len(m.routers) == 3 for m in mixtures) and len(moving) == 3 * len(mixtures)


def test_choices_of_a_task_are_counted() -> None:
    method, stream = learner(freeze_used=False)
    live(method, stream, until=1)
    rows = 2 * len(stream.tasks[0].train)  # two epochs
    assert all(int(m.counts.sum()) == 2 * rows for m in method.image_mixtures)  # type: ignore[operator, union-attr]


class TestSelector:
    @pytest.mark.parametrize("selector", ["autoencoder", "nearest_mean"])
    def test_it_finds_the_task_of_features_that_lie_apart(self, selector: str) -> None:
        method, stream = learner(selector=selector, threshold=None, selector_budget={"steps": 200})
        centres = 3 * torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
        method.plain = lambda x: x  # type: ignore[method-assign]
        for index, centre in enumerate(centres):
            rows = centre + 0.1 * torch.randn(64, 12, generator=torch.Generator().manual_seed(index))
            method._learn_selector(method.selectors, [rows], context(stream, index), f"selector {index}")
            method.heads.append(Identity(12))
        assert method.routes(centres).tolist() == [0, 1, 2]
        method.threshold = 3.0
        assert method.routes(torch.cat([centres, -centres.sum(dim=0)[None]])).tolist() == [0, 1, 2, -1]
        method.others.append(method.selectors[2])
        del method.selectors[2]
        assert method.routes(centres).tolist() == [0, 1, -1]

    def test_its_choice_is_made_for_each_image_unless_for_the_batch(self) -> None:
        method, stream = learner(threshold=None)
        live(method, stream)
        method.eval()
        f = torch.cat([method.plain(images(stream)), torch.randn(9, method.backbone.joint.dim) * 3])  # type: ignore[union-attr, operator]
        with torch.inference_mode():
            each = method.routes(f)
            assert torch.equal(torch.cat([method.routes(row[None]) for row in f]), each)
            method.selection = "batch"
            assert len(method.routes(f).unique()) == 1

    def test_the_choice_of_the_plain_model_is_zero_shot(self) -> None:
        method, stream = learner(threshold=0.0)
        live(method, stream)
        x = images(stream)
        with torch.inference_mode():
            assert method.eval().choices(x)[:, 0].all()  # type: ignore[index]
            zero_shot = method.head(method.backbone(x))
            assert torch.equal(method(x), zero_shot)
            method.threshold = None
            assert not torch.equal(method(x), zero_shot)

    def test_reference_data_have_the_plain_model(self) -> None:
        method, stream = learner(reference=[OTHERS], threshold=None)
        live(method, stream)
        assert len(method.others) == 1 and len(method.selectors) == 3
        assert isinstance(method.others[0], Autoencoder) and float(method.others[0].usual) > 0
        assert not any(p.requires_grad for p in (*method.others.parameters(), *method.selectors.parameters()))

    def test_options_that_do_not_suit_each_other_are_refused(self, tmp_path: Any) -> None:
        quick = ("method=moe_adapters", "backbone=glyph_clip", "dataset=digits", "job.max_tasks=1", "job.max_steps=1")
        with pytest.raises(ConfigError, match="^method.selector=none: nothing chooses among the routers"):
            run(tmp_path / "a", *quick, "method.selector=none")
        with pytest.raises(ConfigError, match="^method.top_k=3: there are 2 experts"):
            run(tmp_path / "b", *quick, "method.top_k=3", "method.experts=2")


def test_predictions_do_not_depend_on_the_other_images() -> None:
    method, stream = learner()
    live(method, stream)
    x = images(stream)
    with torch.inference_mode():
        together = method.eval()(x)
        mates = torch.cat([x[:6], 2 - 3 * x[6:]])
        assert torch.equal(together[:6], method(mates)[:6])


def test_the_class_incremental_form_has_one_router() -> None:
    method, stream = learner(**INCREMENTAL)
    live(method, stream)
    assert len(method.heads) == 1 and all(len(m.routers) == 1 for m in method._mixtures())
    assert method.constant(images(stream)) is None and method.choices(images(stream)) is None


def test_experts_of_the_image_tower_are_those_of_adaptformer() -> None:
    towers = tiny_towers().eval()
    adapter = Adapter(32, 4, activation="relu", dropout=0.0, scale=0.1, learn_scale=False)
    torch.nn.init.normal_(adapter.up.weight)
    alone = Mixture(32, [adapter], 1, noisy=False).eval()
    alone.begin(new=True)
    x = torch.randn(2, 1, 8, 8)
    found = []
    with torch.inference_mode(), routed([alone], 0):
        for module in (adapter, alone):
            with Injector().use(towers, Plan(beside_mlp={0: module, 1: module})):
                found.append(towers.encode_image(x))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_a_run_is_interrupted_and_goes_on(tmp_path: Any) -> None:
    small = ("method.experts=3", "method.bottleneck=2", "method.selector_budget.steps=3", "job.max_eval_rows=8")
    quick = ("method=moe_adapters", "backbone=glyph_clip", "dataset=digits", "job.max_tasks=2", "job.max_steps=2")
    plain = run(tmp_path / "run", *quick, *small)
    run_interrupted(tmp_path / "again", *quick, *small)
    assert run(tmp_path / "again", *quick, *small) == plain
