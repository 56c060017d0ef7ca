"""RAIL, RAPF and PROOF: joint ridge regression, linear maps and their fusion, projections and attention."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, born, context, factory, image_stream, live, state
from torch import Tensor, nn

from clrun.blocks.gaussian import Sampler
from clrun.data.captions import Captions
from clrun.data.split import Batch
from clrun.data.stream import Stream, Task
from clrun.learning.context import Context
from clrun.learning.losses import masked_cross_entropy
from clrun.learning.method import Method
from clrun.methods import rail
from clrun.methods.proof import Fusion, Projections
from clrun.methods.rail import KernelRidge
from clrun.methods.rapf import fused, near_pairs
from clrun.system.errors import ConfigError

SMALL: dict[str, dict[str, Any]] = {"rail": {"m": 100}, "rapf": {}, "proof": {"capacity": 12}}
# Options under which nothing is drawn by class, so that ids may be permuted.
PERMUTABLE = [
    ("rail", {"m": 20}),
    ("rail", {"form": "dual"}),
    ("rapf", {"draw": 0, "name_distance": 2.0, "pair_draw": 0}),
    ("proof", {"capacity": 0, "dropout": 0.0}),
]


def lived(name: str, until: int | None = None, **options: Any) -> tuple[Any, Stream]:
    """Return a method after a life, and the stream of features."""
    method, stream = born(factory(name, **(SMALL[name] | options)), image_stream())
    live(method, stream, until=until)
    return method.eval(), stream


def begun(name: str, learned: int, **options: Any) -> tuple[Any, Stream, Context]:
    """Return a method that has learned some tasks and begun the next one."""
    method, stream = born(factory(name, **(SMALL[name] | options)), image_stream())
    if learned:
        live(method, stream, until=learned)
    ctx = context(stream, learned)
    method.begin_task(stream.tasks[learned], ctx)
    return method, stream, ctx


def rows(stream: Stream, tasks: tuple[int, ...] = (0, 1, 2), part: str = "train") -> tuple[Tensor, Tensor]:
    """Return the features and labels of some tasks."""
    batches = [next(getattr(stream.tasks[k], part).batches(1000)) for k in tasks]
    return torch.cat([b.x for b in batches]), torch.cat([b.y for b in batches])


def unit(method: Any, x: Tensor) -> Tensor:
    return F.normalize(method.backbone.joint.project(x), dim=1)


def permuted(stream: Stream, ids: Tensor) -> Stream:
    """Return the stream whose class k has the id `ids[k]`, with its name."""
    inverse = ids.argsort()

    def task(old: Task) -> Task:
        train, test = (replace(split, labels=ids[split.labels]) for split in (old.train, old.test))
        return replace(old, classes=ids[old.classes].sort().values, train=train, test=test)

    captions = stream.captions
    assert captions is not None
    names = Captions(*(tuple(column[k] for k in inverse) for column in (captions.classes, captions.templates)))
    return replace(stream, tasks=tuple(map(task, stream.tasks)), captions=names)


@pytest.mark.parametrize(("name", "options"), PERMUTABLE, ids=str)
def test_ids_and_names_permute_together(name: str, options: dict[str, Any]) -> None:
    ids = torch.tensor([3, 1, 5, 0, 2, 4])
    scores = []
    for stream in (image_stream(), permuted(image_stream(), ids)):
        method, featured = born(factory(name, **options), stream)
        live(method, featured)
        with torch.no_grad():
            scores.append(method.eval()(rows(featured, part="test")[0]))
    torch.testing.assert_close(scores[0], scores[1][:, ids], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SMALL)
def test_towers_stay_bit_for_bit_and_scores_of_learned_classes_do_not_depend_on_further_names(name: str) -> None:
    method, stream = born(factory(name, **SMALL[name]), image_stream())
    towers = state(method.backbone)
    live(method, stream, until=2)
    assert_same(towers, state(method.backbone))
    x = rows(stream, part="test")[0]
    with torch.no_grad():
        before = method.eval()(x)
        method.meet(torch.arange(6))
        after = method(x)
    assert after[:, 4:].any(dim=0).all()
    if name != "rail":  # its probabilities are those among all names
        torch.testing.assert_close(before[:, :4], after[:, :4], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_other_names_are_scored_as_classes_that_have_not_been_learned(name: str) -> None:
    method, stream, _ = begun(name, 0)
    method.meet(torch.arange(6))
    x = rows(stream, part="test")[0]
    with torch.no_grad():
        scores = method.eval()(x)
        found = method.score_names(x, stream.captions)
    torch.testing.assert_close(found.softmax(dim=1) if name == "rail" else found, scores, rtol=1e-4, atol=1e-4)


def test_the_map_of_rapf_applies_to_images_of_other_classes_too() -> None:
    method, stream = lived("rapf")
    x = rows(stream, part="test")[0]
    torch.testing.assert_close(method.score_names(x, stream.captions), method(x), rtol=1e-4, atol=1e-4)


# --- RAIL


def joint_ridge(lifted: Tensor, y: Tensor, gamma: float) -> Tensor:
    lifted = lifted.double()
    gram = lifted.t() @ lifted + gamma * torch.eye(lifted.shape[1]).double()
    return torch.linalg.solve(gram, lifted.t() @ F.one_hot(y, 6).double())


def as_read(method: Any, stream: Stream, ids: Iterable[int]) -> tuple[list[Tensor], Tensor]:
    """Return the embeddings [N, d] of the training rows of each task, in the batches of learning, and all labels.

    Another batch rounds embeddings differently in the last bit of fp32 on some CPUs, far above 1e-9.
    """
    wanted = set(ids)
    read = [method.read(task.train, context(stream)) for task in stream.tasks if task.id in wanted]
    pairs = [pair for batches in read for pair in batches]
    return [f for f, _ in pairs], torch.cat([batch.y for _, batch in pairs])


def gaussian(a: Tensor, b: Tensor, width: float) -> Tensor:
    return torch.exp(-width * (a.double()[:, None] - b.double()[None]).square().sum(dim=2))


class TestRail:
    @pytest.mark.parametrize("m", [0, 50])
    @pytest.mark.parametrize("forget", [(), (1,)])
    def test_the_primal_form_is_joint_ridge_regression(self, m, forget):
        method, stream = lived("rail", m=m, forget_tasks=list(forget))
        parts, y = as_read(method, stream, (k for k in range(3) if k not in forget))
        lifted = torch.cat([method.lift(part) for part in parts])
        assert lifted.shape[1] == (m or 12)
        expected = joint_ridge(lifted, y, 0.1)
        torch.testing.assert_close(method.regression.weight.t(), expected, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("forget", [(), (1,)])
    def test_the_dual_form_is_joint_kernel_ridge_regression(self, forget):
        method, stream = lived("rail", form="dual", forget_tasks=list(forget))
        parts, y = as_read(method, stream, (k for k in range(3) if k not in forget))
        stored, queries = torch.cat(parts), unit(method, rows(stream, part="test")[0])
        gram = gaussian(stored, stored, 0.1) + 0.001 * torch.eye(len(stored)).double()
        weight = torch.linalg.solve(gram, F.one_hot(y, 6).double())
        expected = gaussian(queries, stored, 0.1) @ weight
        found = method.regression.kernel(queries.double(), method.regression.rows.double()) @ method.regression.weight
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    def test_a_linear_kernel_is_the_primal_form_without_projection(self):
        class Linear(KernelRidge):
            def kernel(self, a: Tensor, b: Tensor) -> Tensor:
                return a @ b.t()

        x, y = torch.randn(20, 5), torch.arange(20) % 6
        dual = Linear(5, 6, width=1.0)
        for task in (2, 0, 1):
            dual.add(x[task::3], y[task::3], task)
        dual.solve(0.1)
        queries = torch.randn(7, 5).double()
        expected = queries @ joint_ridge(x, y, 0.1)
        torch.testing.assert_close(
            dual.kernel(queries, dual.rows.double()) @ dual.weight, expected, rtol=1e-9, atol=1e-9
        )

    def test_kernel_scores_of_three_rows(self):
        dual = KernelRidge(2, 2, width=0.1)
        dual.add(torch.tensor([[1, 0], [0, 1], [0.6, 0.8]]), torch.tensor([0, 1, 1]), 0)
        dual.solve(0.001)
        found = dual(torch.tensor([[0.8, 0.6]]))
        torch.testing.assert_close(found, torch.tensor([[0.22900397, 0.77289557]]), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("form", ["primal", "dual"])
    def test_without_fusion_and_before_the_first_task_it_is_zero_shot(self, form):
        method, stream, _ = begun("rail", 0, form=form)
        method.meet(torch.arange(6))
        other, _ = born(factory("zero_shot"), image_stream())
        live(other, stream)
        x = rows(stream, part="test")[0]
        p = other.eval()(x).softmax(dim=1)
        torch.testing.assert_close(method.eval()(x), p, rtol=1e-5, atol=1e-6)
        method, stream = lived("rail", form=form, fusion=0.0)
        torch.testing.assert_close(method(x), p, rtol=1e-5, atol=1e-6)

    def test_images_that_look_like_classes_to_come_keep_their_zero_shot_scores(self):
        method, stream = lived("rail", until=1)
        x = rows(stream, part="test")[0]
        method.meet(torch.arange(6))
        features = method.features(x)
        p = method.head.match(features, method.head.rows()).softmax(dim=1)
        learned = p.argmax(dim=1) < 2
        assert 0 < learned.sum() < len(x)
        ridge = method.regression(method.lift(features))
        assert not ridge[:, 2:].any()
        torch.testing.assert_close(method(x)[~learned], p[~learned])
        torch.testing.assert_close(method(x)[learned], (0.2 * p + 0.8 * ridge)[learned])
        method.gate = "none"
        torch.testing.assert_close(method(x), 0.2 * p + 0.8 * ridge)

    def test_a_kernel_of_too_many_rows_is_refused(self, monkeypatch):
        monkeypatch.setattr(rail, "LARGEST_KERNEL", 95)
        method, stream = born(factory("rail", form="dual"), image_stream())
        with pytest.raises(ConfigError, match=r"^method.form: the dual form .* 96 x 96 .*; use method.form=primal"):
            method.check(stream)
        born(factory("rail"), image_stream())[0].check(stream)


# --- RAPF


class Linear(Method):
    """A linear map of embeddings, trained by cross-entropy with the texts."""

    def __init__(self, backbone: nn.Module, num_classes: int) -> None:
        super().__init__(backbone, num_classes)
        self.mapping = nn.Linear(12, 12, bias=False)
        nn.init.eye_(self.mapping.weight)
        self.texts = torch.stack([F.normalize(F.normalize(own, dim=1).mean(0), dim=0) for own in backbone.captions])

    @classmethod
    def reads_features(cls, options: Any) -> bool:
        return True

    def trainable(self) -> Any:
        return self.mapping.parameters()

    def loss(self, batch: Batch, ctx: Context) -> Tensor:
        joint = self.backbone.joint
        units = F.normalize(self.mapping(joint.project(batch.x)), dim=1)
        return masked_cross_entropy(joint.scale * units @ self.texts.t(), batch.y, self.competing(batch.t, ctx))


class TestRapf:
    def test_without_replay_hinge_and_fusion_it_is_a_linear_map_by_cross_entropy(self):
        method, stream = born(factory("rapf", draw=0, pair_draw=0, mix_bias=1.0), image_stream())
        plain = Linear(method.backbone, 6)
        live(method, stream)
        live(plain, stream)
        torch.testing.assert_close(method.head.mapping.weight, plain.mapping.weight, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(plain.mapping.weight, torch.eye(12), atol=1e-2)

    def test_the_fused_map_of_a_diagonal_one(self):
        old, new = torch.tensor([[2.0, 0], [0, 1]]), torch.tensor([[2.5, 0.4], [-0.2, 1.1]])
        expected = torch.tensor([[2.5, 0.4], [-0.2, 1.08]])
        torch.testing.assert_close(fused(old, new, 0.6), expected)
        assert torch.equal(fused(old, new, 1.0), new) and torch.equal(fused(old, old, 0.6), old)

    def test_the_fused_map_does_not_depend_on_the_signs_of_singular_vectors(self, monkeypatch):
        old, new = torch.randn(2, 5, 5)
        first, svd = fused(old, new, 0.5), torch.linalg.svd
        signs = torch.tensor([1.0, -1, -1, 1, -1]).double()

        def other(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            left, values, right = svd(matrix)
            return left * signs, values, signs[:, None] * right

        monkeypatch.setattr(torch.linalg, "svd", other)
        torch.testing.assert_close(fused(old, new, 0.5), first)

    def test_near_pairs_are_those_of_an_old_and_a_new_class_nearest_first(self):
        angles = torch.tensor([0.0, 1.0, 0.2, 1.1, 2.0])
        texts = torch.stack([angles.cos(), angles.sin()], dim=1)
        pairs = near_pairs(texts, torch.tensor([0, 1]), torch.tensor([2, 3, 4]), 0.5)
        assert pairs.tolist() == [[1, 3], [0, 2]]
        assert not len(near_pairs(texts, torch.tensor([0]), torch.tensor([4]), 0.5))

    def test_the_hinge_of_drawn_features(self):
        method, _, ctx = begun("rapf", 1, name_distance=2.0, pair_draw=3, draw_factor=2)
        assert {tuple(pair) for pair in method.pairs.tolist()} == {(a, b) for a in (0, 1) for b in (2, 3)}
        means = method.replay.means[:2]
        still = Sampler(means, [torch.zeros(12, 12).double()] * 2).of(method.pairs[:, 0].tolist())
        texts = method.head.weight
        expected = torch.stack(
            [
                (method.head.mapped(means[a : a + 1].float()) @ (texts[b] - texts[a]) + 0.1).clamp(min=0)[0]
                for a, b in method.pairs.tolist()
            ]
        ).mean()
        mapped = method.head.mapped(method._drawn(still, method.pair_draw, ctx).flatten(0, 1))
        torch.testing.assert_close(method._hinge(mapped), expected)
        assert float(method._hinge(mapped[:0])) == 0, "a process whose share has no row"
        assert method._drawn(method.pair_sampler, method.pair_draw, ctx).shape == (4, 6, 12)
        for (old, _), mean in zip(method.pairs.tolist(), method.pair_sampler.means, strict=True):
            assert torch.equal(mean, means[old])

    def test_the_nearest_pairs_count(self):
        every, _, _ = begun("rapf", 1, name_distance=2.0)
        method, _, _ = begun("rapf", 1, name_distance=2.0, max_pairs=3)
        assert torch.equal(method.pairs, every.pairs[:3])

    def test_old_classes_take_turns_in_a_new_order_in_every_epoch(self):
        method, _, ctx = begun("rapf", 2, classes_per_batch=3)
        orders = []
        for ctx.progress.epoch in range(4):
            turns = [method._next_places(ctx) for _ in range(4)]
            flat = [place for turn in turns for place in turn]
            assert sorted(flat[:4]) == sorted(flat[4:8]) == [0, 1, 2, 3] and flat[:4] == flat[4:8]
            orders.append(flat[:4])
        assert len({tuple(order) for order in orders}) > 1

    def test_replayed_rows_are_part_of_the_cross_entropy(self):
        method, stream, ctx = begun("rapf", 1, draw=4, draw_factor=1, pair_draw=0)
        batch = next(stream.tasks[1].train.batches(6))
        seen: list[Tensor] = []
        method.head.mapping.register_forward_hook(lambda module, args, output: seen.append(args[0]))
        loss = method.loss(batch, ctx)
        assert [len(x) for x in seen] == [6 + 2 * 4]
        labels = torch.tensor(method.cycle).repeat_interleave(4)
        logits = method.head.match(method.head.mapped(seen[0]), method.head.weight)[:, :4]
        torch.testing.assert_close(loss, F.cross_entropy(logits, torch.cat([batch.y, labels])))

    def test_statistics_of_old_classes_stay_and_are_those_of_embeddings(self):
        method, stream = lived("rapf", until=1)
        means, covariance = method.replay.means[:2].clone(), method.replay.covariance_of(1).clone()
        live(method, stream, learned=1)
        assert torch.equal(means, method.replay.means[:2])
        assert torch.equal(covariance, method.replay.covariance_of(1))
        x, y = rows(stream)
        own = method.backbone.joint.project(x[y == 1])
        torch.testing.assert_close(covariance, own.t().cov(), rtol=1e-3, atol=1e-4)

    def test_scores_do_not_depend_on_the_length_of_features(self):
        method, stream = lived("rapf")
        x = rows(stream, part="test")[0]
        torch.testing.assert_close(method(x), method(3 * x), rtol=1e-4, atol=1e-4)


# --- PROOF


class Passing(nn.Module):
    """In the place of the fusion: everything stays as it is."""

    def forward(self, image: Tensor, read: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return image, read.expand(len(image), -1, -1)


class TestProof:
    def test_the_fusion_is_attention_over_the_sequence_of_each_image(self):
        fusion = Fusion(8, dropout=0.1).eval()
        image, tokens = torch.randn(3, 8), torch.randn(7, 8)
        found = fusion(image, tokens[:5], tokens)
        for number, own in enumerate(image):
            sequence = torch.cat([own[None], tokens])
            weights = (fusion.query(sequence) @ fusion.key(sequence).t() / 8**0.5).softmax(dim=1)
            rows = fusion.norm(fusion.out(weights @ fusion.value(sequence)) + sequence)
            torch.testing.assert_close(found[0][number], rows[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found[1][number], rows[1:6], rtol=1e-4, atol=1e-5)

    def test_dropout_changes_fused_rows_by_image_in_training_alone(self):
        fusion = Fusion(8, dropout=0.5)
        image, tokens = torch.randn(1, 8).repeat(2, 1), torch.randn(7, 8)
        fused_images, found = fusion(image, tokens, tokens)
        assert not torch.allclose(found[0], found[1]) and not torch.allclose(*fused_images)
        _, found = fusion.eval()(image, tokens, tokens)
        torch.testing.assert_close(found[0], found[1])

    def test_identity_projections_are_zero_shot_with_prototypes(self):
        method, stream = born(factory("proof", init="identity"), image_stream())
        method.fusion = Passing()
        for index in range(3):
            ctx = context(stream, index, max_steps=0)
            method.begin_task(stream.tasks[index], ctx)
            method.learn(stream.tasks[index], ctx)
        other, _ = born(factory("zero_shot"), image_stream())
        live(other, stream)
        x, y = rows(stream)
        zero_shot, scale = other.eval()(x), method.backbone.joint.scale
        means = torch.stack([unit(method, x[y == label]).mean(dim=0) for label in range(6)])
        torch.testing.assert_close(method.prototypes, means, rtol=1e-6, atol=1e-6)
        visual = unit(method, x) @ F.normalize(means, dim=1).t()
        torch.testing.assert_close(method.eval()(x), zero_shot + zero_shot / scale + visual, rtol=1e-4, atol=1e-4)

    def test_layers_add_up(self):
        halves, one = Projections(4, init="random"), Projections(4, init="identity")
        for projections in (halves, halves, one):
            projections.add(train_old=True)
        with torch.no_grad():
            for layer in halves.layers:
                layer.weight.copy_(torch.eye(4) / 2)
                layer.bias.zero_()
        x = torch.randn(3, 4)
        torch.testing.assert_close(halves(x), x)
        torch.testing.assert_close(one(x), x)

    @pytest.mark.parametrize("train_old", [False, True])
    def test_old_parts_stay(self, train_old):
        compat = {"train_old_text": train_old}
        method, stream = lived("proof", until=1, compat=compat)
        before = state(method)
        live(method, stream, learned=1)
        after = state(method)
        moved = {name for name in before if name in after and not torch.equal(before[name], after[name])}
        old = {f"head.{side}.layers.0.{part}" for side in ("image", "text") for part in ("weight", "bias")}
        assert moved & ({*old, "contexts.0"}) == ({name for name in old if ".text." in name} if train_old else set())
        assert {"fusion.query.weight", "fusion.norm.bias"} <= moved

    def test_the_number_of_parameters_is_the_published_one(self):
        method, stream = lived("proof", until=2)
        d, b = method.head.joint.dim, 2
        found = sum(p.numel() for p in method.parameters())
        found -= sum(p.numel() for p in method.backbone.parameters()) + method.head.weight.numel()
        assert found == 2 * b * (d * d + d) + 4 * d * d + 3 * d + 3 * b * d

    def test_exemplars_are_divided_among_the_classes(self):
        method, stream = lived("proof", capacity=13)
        assert torch.bincount(method.memory.y, minlength=6).tolist() == [2] * 6
        method, stream = lived("proof", capacity=3, per_class=True)
        assert torch.bincount(method.memory.y, minlength=6).tolist() == [3] * 6
        with pytest.raises(ConfigError, match=r"^method.capacity=5: less than one exemplar for each of 6 classes"):
            born(factory("proof", capacity=5), image_stream())[0].check(stream)

    def test_the_loss_is_the_sum_of_three_cross_entropies(self):
        method, stream, ctx = begun("proof", 1, dropout=0.0)
        method.prototypes[:4] = torch.randn(4, 12)
        method.learned[:4] = True
        batch = next(stream.tasks[1].train.batches(6))
        named = torch.arange(4)
        texts, units = method.head.texts(named.tolist()), method.head.embed(batch.x)
        parts = [method.head.match(units, texts), *method.fused_matchings(units, texts, named)]
        expected = sum(F.cross_entropy(part, batch.y) for part in parts)
        torch.testing.assert_close(method.loss(batch, ctx), expected)
        method.compat = replace(method.compat, contrastive=True)
        pairs, own = method.head.match(units, texts[batch.y]), torch.arange(6)
        clip = (F.cross_entropy(pairs, own) + F.cross_entropy(pairs.t(), own)) / 2
        torch.testing.assert_close(method.loss(batch, ctx), expected - F.cross_entropy(parts[0], batch.y) + clip)

    def test_as_the_public_code_does_it_a_prediction_depends_on_its_batch(self):
        method, stream = lived("proof", compat={"batch_mean": True, "raw_test_image": True, "contrastive": True})
        assert method.depends_on_batch
        x = rows(stream, part="test")[0]
        with torch.no_grad():
            assert not torch.allclose(method(x)[:4], method(x[:4]), atol=1e-3)
            assert not torch.allclose(method(x), method(3 * x), atol=1e-3)

    def test_projected_templates_are_averaged(self):
        method, stream = lived("proof")
        features = torch.randn(3, 12)
        expected = F.normalize(F.normalize(method.head.text(features), dim=1).mean(dim=0), dim=0)
        torch.testing.assert_close(method.head.ensemble(features), expected)
