"""PromptFusion and PromptFusion-Lite: limits of the mixture and of the gate, prompts, weights of classes, exemplars."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, born, context, factory, image_stream, live, state, tiny_vit
from running import configuration, run, run_interrupted
from torch import Tensor, nn

from clrun.data.split import Batch
from clrun.data.stream import Stream
from clrun.learning.context import Context
from clrun.learning.losses import masked_cross_entropy
from clrun.learning.networks import FrozenNetwork
from clrun.methods.promptfusion import SECOND, Branches, Promptfusion
from clrun.methods.promptfusion_lite import PromptfusionLite
from clrun.system.errors import ConfigError

BOTH = ("promptfusion", "promptfusion_lite")
SHORT = {"prompts": {"text": 2, "image": 3, "booster": 2}, "capacity": 12}


def learner(name: str = "promptfusion", **options: Any) -> tuple[Branches, Stream]:
    method, stream = born(factory(name, **(SHORT | options)), image_stream(augment=[]))
    assert isinstance(method, Branches)
    return method, stream


def learned(name: str = "promptfusion", tasks: int = 2, **options: Any) -> tuple[Any, Stream, Tensor]:
    """Return a method in eval mode after some tasks, its stream, and test images."""
    method, stream = learner(name, **options)
    live(method, stream, until=tasks)
    x = torch.cat([next(task.test.batches(4)).x for task in stream.tasks])
    return method.eval(), stream, x


def at(method: Branches, stream: Stream, index: int) -> tuple[Context, Batch]:
    ctx = context(stream, index)
    method.begin_task(stream.tasks[index], ctx)
    return ctx, next(stream.tasks[index].train.batches(10))


class TestMixture:
    def test_the_limits_of_lambda_are_the_two_branches(self) -> None:
        method, _, x = learned()
        with torch.inference_mode():
            stabilizer, booster = method.stable(method.embeddings(x)), method.boosted(x)
            for fixed, logit, branch in ((0.0, -1e4, stabilizer), (1.0, 1e4, booster)):
                method.fixed = fixed
                assert torch.equal(method(x), branch)
                method.fixed = None
                method.fusion.data.fill_(logit)
                assert torch.equal(method(x), branch)
        assert not torch.equal(stabilizer, booster)

    def test_the_gradient_of_lambda(self) -> None:
        method, _, x = learned()
        share = method.fusion.detach().sigmoid()
        (found,) = torch.autograd.grad(method(x).sum(), method.fusion)
        with torch.no_grad():
            difference = (method.boosted(x) - method.stable(method.embeddings(x))).sum()
        torch.testing.assert_close(found, share * (1 - share) * difference, rtol=1e-4, atol=1e-4)

    def test_lambda_starts_at_0_731_and_is_learned_unless_it_is_given(self) -> None:
        method, _ = learner()
        assert isinstance(method, Promptfusion)
        assert float(method.fusion.detach().sigmoid()) == pytest.approx(0.731, abs=1e-3)
        assert not any(p is method.fusion for p in learner(fusion=0.5)[0].trainable())
        assert float(learned()[0].fusion.detach()) != 1.0

    def test_without_prompts_the_stabilizer_is_zero_shot_and_the_booster_a_linear_head(self) -> None:
        method, _, x = learned(prompts={"text": 0, "image": 0, "booster": 0}, fusion=0.0)
        plain, stream = born(factory("zero_shot"), image_stream(augment=[]))
        live(plain, stream, until=2)
        with torch.inference_mode():
            torch.testing.assert_close(method(x), plain.eval()(method.backbone(x)), rtol=1e-5, atol=1e-5)
            assert torch.equal(method.boosted(x), method.head(method.backbone(x)))

    def test_a_class_that_comes_changes_no_other_column_of_the_booster(self) -> None:
        method, stream, x = learned()
        before = method.boosted(x)[:, :4]
        method.begin_task(stream.tasks[2], context(stream, 2))
        assert torch.equal(before, method.boosted(x)[:, :4])


class TestWeights:
    def test_the_first_task_and_no_weights_are_the_cross_entropy(self) -> None:
        for mask, index in (("learned", 0), ("none", 1)):
            method, stream = learner(mask=mask)
            if index:
                live(method, stream, until=1)
            ctx, batch = at(method, stream, index)
            logits = method(batch.x)
            plain = masked_cross_entropy(logits, batch.y, method.competing(batch.t, ctx))
            assert torch.equal(method.weighted(logits, batch, ctx), plain)

    def test_weights_by_hand(self) -> None:
        method, stream, _ = learned()
        ctx, new = at(method, stream, 2)
        old = next(stream.tasks[0].train.batches(10))
        batch = Batch.cat(new, old)
        method.alpha.data.fill_(0.3)
        method.beta.data.fill_(-0.2)
        logits = method(batch.x)
        log_p = logits[torch.arange(len(batch)), batch.y] - logits.logsumexp(dim=1)
        weights = torch.cat([torch.full((len(new),), 0.3).sigmoid(), 1.0 / torch.full((len(old),), -0.2).sigmoid()])
        torch.testing.assert_close(method.weighted(logits, batch, ctx), -(weights * log_p).mean(), rtol=1e-5, atol=1e-6)

    def test_beta_is_new_in_each_task_and_fixed_weights_are_not_trained(self) -> None:
        method, stream, _ = learned(tasks=3)
        assert method.beta.ne(1).any() and method.alpha.ne(1).any()
        method.begin_task(stream.tasks[2], context(stream, 2))
        assert method.beta.eq(1).all() and method.alpha.ne(1).any()
        fixed = learned(mask="fixed")[0]
        assert fixed.alpha.eq(1).all() and fixed.beta.eq(1).all()


@pytest.mark.parametrize("name", BOTH)
def test_networks_and_earlier_text_prompts_stay_bit_for_bit(name: str) -> None:
    method, stream = learner(name)
    towers = state(method.backbone)
    live(method, stream, until=1)
    first, shared = method.text_head.contexts[0].detach().clone(), method.image_prompts.detach().clone()  # type: ignore[union-attr, operator]
    live(method, stream, learned=1)
    assert_same(towers, state(method.backbone))
    assert torch.equal(first, method.text_head.contexts[0])  # type: ignore[index, arg-type]
    assert not torch.equal(shared, method.image_prompts)


def test_exemplars_are_herded_in_features_of_the_frozen_tower() -> None:
    method, stream = learner(capacity=12)
    live(method, stream, until=1)
    assert len(method.memory) == 12 and method.memory.y.unique(return_counts=True)[1].tolist() == [6, 6]
    live(method, stream, learned=1)
    assert method.memory.y.unique(return_counts=True)[1].tolist() == [2] * 6
    task = stream.tasks[2]
    rows = (task.train.y == int(task.classes[0])).nonzero()[:, 0]
    images = torch.cat([batch.x for batch in task.train.select(rows).batches(100)])
    with torch.no_grad():
        features = F.normalize(method.backbone.encode_image(images), dim=1)  # type: ignore[operator]
    first = (features - features.mean(dim=0)).square().sum(dim=1).argmin()
    stored = next(method.memory.split(stream.transform).select(method.memory.set(int(task.classes[0]))).batches(9))
    torch.testing.assert_close(stored.x[0], images[first], rtol=0, atol=0)


class TestGate:
    def test_closed_it_is_the_stabilizer_and_never_calls_the_booster(self, monkeypatch: pytest.MonkeyPatch) -> None:
        method, _, x = learned("promptfusion_lite")
        last = method.gate[2]
        calls: list[int] = []
        boosted = method.boosted
        monkeypatch.setattr(method, "boosted", lambda rows: calls.append(len(rows)) or boosted(rows))
        with torch.inference_mode():
            stabilizer, booster = method.stable(method.embeddings(x)), boosted(x)
            last.bias.copy_(torch.tensor([-1e4, 1e4]))
            assert torch.equal(method(x), stabilizer) and not calls
            assert method.choices(x).tolist() == [[0, 1]] * len(x)
            last.bias.copy_(torch.tensor([1e4, -1e4]))
            torch.testing.assert_close(method(x), stabilizer + booster, rtol=0, atol=0)
            assert calls == [len(x)]

    def test_it_decides_for_each_image_and_without_noise(self) -> None:
        method, _, x = learned("promptfusion_lite")
        with torch.inference_mode():
            v = method.gate(method.embeddings(x))
            low, high = (v[:, 0] - v[:, 1]).sort().values[len(x) // 2 - 1 : len(x) // 2 + 1]
            method.gate[2].bias[0] -= (low + high) / 2  # between two images, so that rounding decides nothing
            opened = method.choices(x)[:, 0].bool()
            assert 0 < int(opened.sum()) < len(x)
            whole, stabilizer = method(x), method.stable(method.embeddings(x))
            assert torch.equal(whole, method(x)) and torch.equal(whole[~opened], stabilizer[~opened])
            alone = torch.cat([method(row[None]) for row in x])
        torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-4)

    def test_the_gate_of_the_task_before_is_no_loss_where_the_new_one_equals_it(self) -> None:
        method, stream, _ = learned("promptfusion_lite")
        assert isinstance(method, PromptfusionLite) and method.old_gate is None
        _, batch = at(method, stream, 2)
        f = method.embeddings(batch.x)
        assert abs(float(method.kept(f, method.gate(f)).detach())) < 1e-7
        v = method.gate(f) + torch.tensor([1.0, -1.0])
        p, q = ((values / 2).softmax(dim=1) for values in (method.gate(f), v))
        expected = 0.1 * (p * (p.log() - q.log())).sum(dim=1).mean()
        torch.testing.assert_close(method.kept(f, v), expected, rtol=1e-4, atol=1e-6)


class TestSecondBackbone:
    def test_it_is_the_boosters_and_stays_as_it_is(self) -> None:
        method, stream = learner(fusion=1.0)
        vit = tiny_vit(embed_dim=16)
        before = state(vit)
        method.receive({SECOND: FrozenNetwork("second", vit)})
        live(method, stream, until=2)
        assert method.head.weight.shape == (6, 16) and method.booster.prompts.shape == (2, 16)
        assert_same(before, state(vit))
        x = next(stream.tasks[0].test.batches(4)).x
        with torch.inference_mode():
            logits = method.eval()(x)
            method.booster.prompts.zero_()
            assert not torch.equal(logits, method(x))

    def test_one_that_takes_no_prompts_is_refused(self) -> None:
        method, _ = learner()
        net = nn.Linear(3, 3)
        net.num_features = 3  # type: ignore[assignment]
        with pytest.raises(ConfigError, match=r"^method.second_backbone: Promptfusion needs a vision transformer"):
            method.receive({SECOND: FrozenNetwork("net", net)})

    def test_a_run_has_two_backbones_in_its_configuration(self, tmp_path: Any) -> None:
        options = ("method=promptfusion", "+backbone@method.second_backbone=glyph_vit", "method.capacity=20")
        config, _ = configuration("backbone=glyph_clip", *options)
        assert config["method"]["second_backbone"]["_target_"] == "clrun.backbones.glyph.glyph_vit"
        quick = ("backbone=glyph_clip", "dataset=digits", "job.max_tasks=2", "job.max_steps=2", "job.max_eval_rows=8")
        plain = run(tmp_path / "run", *quick, *options)
        run_interrupted(tmp_path / "again", *quick, *options)
        assert run(tmp_path / "again", *quick, *options) == plain
