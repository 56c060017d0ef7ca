"""Image and text towers: their forwards, names and captions of classes, heads of names, zero-shot, CoOp, finetuning."""

import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, born, context, factory, image_stream, live, sgd, state, tiny_towers

from clrun.backbones.glyph import glyph_clip
from clrun.data.captions import CIFAR, Captions, captions, in_words
from clrun.data.sources.digits import digits
from clrun.data.stream import Stream
from clrun.learning.losses import masked_cross_entropy, smoothed_cross_entropy
from clrun.learning.names import NamesHead, class_text
from clrun.system.errors import ConfigError
from clrun.system.seeding import seed_all

TEXTS = ["a photo of a digit seven.", "7", "written capital g"]


@pytest.fixture(scope="module")
def towers():
    return glyph_clip((1, 28, 28), pretrained=True, weights=None, weights_key=None, head="linear").eval()


def renamed(stream: Stream, names: tuple[str, ...]) -> Stream:
    return replace(stream, captions=captions("synthetic", names))


class TestForwards:
    def test_the_manual_text_forward_is_the_stock_one_and_cutting_after_the_longest_text_changes_nothing(self, towers):
        ids = towers.tokenize(TEXTS)
        assert ids.shape == (3, towers.context_length) and ids.argmax(dim=1).max() < towers.context_length - 2
        with torch.no_grad():
            whole = towers.text_from_embeddings(towers.embed_tokens(ids), ids.argmax(dim=1))
            torch.testing.assert_close(whole, towers.encode_text(ids), rtol=1e-5, atol=1e-6)
            alone = torch.cat([towers.encode_text(row[None]) for row in ids])
        torch.testing.assert_close(whole, alone, rtol=1e-5, atol=1e-6)
        assert whole.shape == (3, towers.dim)

    def test_the_manual_image_forward_is_the_stock_one(self, towers):
        x = torch.randn(3, 3, 28, 28)
        with torch.no_grad():
            stock = towers.encode_image(x)
            assert torch.equal(towers.image_from_tokens(x), stock)
            assert torch.equal(towers.image_from_tokens(x, torch.empty(0, towers.vision_width)), stock)
            prompts = torch.randn(2, towers.vision_width)
            shared, each = (
                towers.image_from_tokens(x, p, pool="prompt_mean") for p in (prompts, prompts.repeat(3, 1, 1))
            )
        assert torch.equal(shared, each) and not torch.allclose(shared, stock)

    def test_texts_that_are_too_long_are_cut_before_the_end_mark(self, towers):
        ids = towers.tokenize(["zebra " * 20])
        assert ids[0, -1] == ids.max() == towers.joint.tokenizer.size - 1

    def test_the_joint_space_is_frozen_and_the_image_tower_is_not(self):
        model = tiny_towers()
        assert {n for n, p in model.named_parameters() if not p.requires_grad} == {
            f"joint.{n}" for n, _ in model.joint.named_parameters()
        }


class TestCaptions:
    def test_names_become_words(self):
        found = [in_words(name) for name in ("lawn_mower", "001.Black_footed_Albatross", "n01440764", "2.5", "7")]
        assert found == ["lawn mower", "Black footed Albatross", "tench", "2.5", "7"]

    def test_published_templates_belong_to_their_data_set(self):
        own = captions("cifar100", ["aquarium_fish"])
        assert len(own.of(0)) == 18 and own.of(0)[0] == "a photo of a aquarium fish." and own.templates[0] == CIFAR
        assert (
            own.of(0)[1] == "a blurry photo of a aquarium fish."
            and own.of(0)[-1] == "a photo of the big aquarium fish."
        )
        assert captions("mine", ["x"]).of(0) == ["a photo of a x."]
        assert digits(val_fraction=0.0, seed=0, augment=[], templates=["see {}"]).texts.of(3) == ["see digit three"]

    def test_words_are_read_from_a_file_by_class(self, tmp_path):
        file = tmp_path / "words.txt"
        file.write_text("n2 dog, hound\nn1\tcat\nn3 not asked for\n")
        assert captions("mine", ["n1", "n2"], words=str(file)).names == ("cat", "dog")
        with pytest.raises(ConfigError, match=r"^dataset.class_names: .* no words of the class n4 \(1 missing\)"):
            captions("mine", ["n1", "n4"], words=str(file))

    @pytest.mark.parametrize("wrong", [[], ["no place"], ["{} and {}"]])
    def test_templates_without_one_place_for_the_name_are_refused(self, wrong):
        with pytest.raises(ConfigError, match="^dataset.templates: "):
            digits(val_fraction=0.0, seed=0, augment=[], templates=wrong)

    def test_captions_follow_the_class_in_every_order_and_in_domains(self):
        streams = [image_stream("cil", order, class_seed=1) for order in ((0, 1, 2), (2, 0, 1))]
        assert streams[0].captions == streams[1].captions and streams[0].captions.names == (
            "c0",
            "c1",
            "c2",
            "c3",
            "c4",
            "c5",
        )
        assert image_stream("dil").captions.names == streams[0].captions.names


class TestZeroShot:
    def test_towers_and_rows_stay_and_rows_are_the_ensemble_of_templates(self):
        method, stream = born(factory("zero_shot"), image_stream())
        before = state(method.backbone)
        live(method, stream)
        assert_same(before, state(method.backbone))
        joint = method.backbone.joint
        for label in range(6):
            own = F.normalize(joint.encode_texts(stream.captions.of(label)), dim=1).mean(dim=0)
            torch.testing.assert_close(method.head.weight[label], F.normalize(own, dim=0), rtol=1e-5, atol=1e-6)

    def test_ids_and_names_permute_together(self):
        stream, order = image_stream(), torch.tensor([3, 1, 5, 0, 2, 4])
        names = stream.captions.names
        scores = []
        for own in (names, tuple(names[k] for k in order)):
            method, featured = born(factory("zero_shot"), renamed(stream, own))
            live(method, featured)
            scores.append(method.eval()(next(featured.tasks[0].test.batches(8)).x))
        torch.testing.assert_close(scores[0][:, order], scores[1], rtol=1e-5, atol=1e-5)

    def test_a_class_that_comes_changes_no_other_column(self):
        method, stream = born(factory("zero_shot"), image_stream())
        x = next(stream.tasks[0].test.batches(8)).x
        live(method, stream, until=2)
        before = method.eval()(x)
        method.meet(torch.arange(6))
        assert torch.equal(before[:, :4], method(x)[:, :4]) and method(x)[:, 4:].any(dim=0).all()


class TestCoop:
    def test_embeddings_of_real_words_as_context_are_the_hard_prompt(self, towers):
        method = factory("coop", length=3, init="a photo of", context="class")(towers, 10)
        texts = captions("digits", [str(k) for k in range(10)], templates=["a photo of {}."])
        method.read_names(texts)
        method.head.add(method._vectors(10), torch.arange(10))
        hard = torch.stack([class_text(towers.joint.encode_texts(texts.of(k))) for k in range(10)])
        torch.testing.assert_close(method.head.final_texts(list(range(10))), hard, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("position", ["end", "middle", "front"])
    def test_vectors_stand_where_the_position_says(self, towers, position):
        method = factory("coop", length=4, position=position)(towers, 2)
        method.read_names(Captions(("digit seven", "capital g"), (("{}",),) * 2))
        spelled = {"end": "x x x x digit seven .", "middle": "x x digit seven x x .", "front": "digit seven x x x x ."}
        ids = towers.tokenize([spelled[position]])
        assert torch.equal(method.head.ids[:1], ids)
        marks = towers.tokenize(["x"])[0, 1]
        assert method.head.places[0].tolist() == (ids[0] == marks).nonzero()[:, 0].tolist()

    @pytest.mark.parametrize("context_of", ["shared", "task", "class"])
    def test_only_contexts_of_the_present_task_are_trained(self, context_of):
        method, stream = born(factory("coop", context=context_of), image_stream())
        towers = state(method.backbone)
        live(method, stream, until=1)
        first = [c.detach().clone() for c in method.head.contexts]
        live(method, stream, learned=1)
        assert_same(towers, state(method.backbone))
        assert torch.equal(first[0], method.head.contexts[0]) == (context_of != "shared")
        assert [len(c) for c in method.head.contexts] == {"shared": [1], "task": [1] * 3, "class": [2] * 3}[context_of]

    def test_a_class_out_of_competition_gets_no_gradient(self):
        method, stream = born(factory("coop", context="class"), image_stream())
        ctx = context(stream)
        method.begin_task(stream.tasks[0], ctx)
        batch = next(stream.tasks[0].train.batches(8))
        own = int(stream.tasks[0].classes[1])
        mask = torch.arange(6)[None] != own
        keep = batch.y != own
        masked_cross_entropy(method(batch.x[keep]), batch.y[keep], mask).backward()
        gradient = method.head.contexts[0].grad
        assert gradient[0].abs().sum() > 0 and not gradient[1].any()

    def test_a_prompt_that_is_too_long_is_refused(self, towers):
        method = factory("coop", length=12)(towers, 1)
        with pytest.raises(ConfigError, match=r"^method.length: 12 vectors and the name 'digit seven' need 17 tokens"):
            method.read_names(Captions(("digit seven",), (("{}",),)))


class TestFinetuning:
    def test_gradients_reach_both_towers_and_not_the_scale(self):
        method, stream = born(factory("clip_finetune"), image_stream())
        method.begin_task(stream.tasks[0], context(stream))
        method.train()
        batch = next(stream.tasks[0].train.batches(8))
        method.loss(batch, context(stream)).backward()
        without = {name for name, p in method.named_parameters() if p.grad is None}
        assert without == {"backbone.joint.logit_scale", "head.weight"}

    def test_predictions_use_the_text_tower_as_it_is_now(self):
        method, stream = born(factory("clip_finetune"), image_stream())
        live(method, stream, until=1)
        x = next(stream.tasks[0].test.batches(4)).x
        with torch.inference_mode():
            before = method.eval()(x)
            assert torch.equal(before, method(x))
        with torch.no_grad():
            method.backbone.joint.text_projection.weight[0].add_(1.0)
        twin = pickle.loads(pickle.dumps(method))
        with torch.inference_mode():
            assert not torch.equal(before, method(x)) and torch.equal(method(x), twin(x))
        text = class_text(method.backbone.joint.encode_texts(stream.captions.of(0)))
        torch.testing.assert_close(method.head.weight[0], text, rtol=1e-5, atol=1e-6)

    def test_smoothing_spreads_over_the_classes_that_compete(self):
        logits, y, mask = (
            torch.randn(5, 4),
            torch.tensor([0, 1, 0, 1, 1]),
            torch.tensor([[True, True, False, True]] * 5),
        )
        assert torch.equal(smoothed_cross_entropy(logits, y, mask, 0.0), masked_cross_entropy(logits, y, mask))
        kept = F.cross_entropy(logits[:, [0, 1, 3]], y, label_smoothing=0.2)
        torch.testing.assert_close(smoothed_cross_entropy(logits, y, mask, 0.2), kept)


class TestNamesHead:
    @pytest.mark.parametrize("names", ["fixed", "init", "live"])
    def test_other_methods_train_with_rows_of_names(self, names):
        stream = image_stream()
        seed_all(0, "init")
        backbone = tiny_towers()
        backbone.joint.head = names
        backbone.joint.requires_grad_(names == "live")
        method = factory("er")(backbone, 6)
        method.read_names(stream.captions)
        assert isinstance(method.head, NamesHead)
        method.begin_task(stream.tasks[0], context(stream))
        first = method.head.weight[stream.tasks[0].classes].clone()
        texts = torch.stack(
            [class_text(backbone.joint.encode_texts(stream.captions.of(k))) for k in stream.tasks[0].classes.tolist()]
        )
        torch.testing.assert_close(first, texts, rtol=1e-5, atol=1e-6)
        live(method, stream)
        with torch.inference_mode():
            method.eval()(next(stream.tasks[0].test.batches(4)).x)
        assert torch.equal(first, method.head.weight[stream.tasks[0].classes]) == (names == "fixed")

    def test_a_fit_of_a_fixed_head_alone_is_refused(self):
        stream = image_stream()
        backbone = tiny_towers()
        backbone.joint.head = "fixed"
        method = factory("fish")(backbone, 6)
        method.read_names(stream.captions)
        with pytest.raises(
            ConfigError, match=r"^backbone.head: Fish trains its head alone .* set it to init or linear"
        ):
            live(method, stream, until=1)

    @pytest.mark.parametrize("name", ["ewc", "kfac_ewc"])
    def test_fisher_information_takes_live_texts_as_constants(self, name):
        stream = image_stream()
        backbone = tiny_towers()
        backbone.joint.head = "live"
        backbone.joint.requires_grad_(True)
        method = factory(name)(backbone, 6)
        method.read_names(stream.captions)
        live(method, stream, budget=sgd(lr=0.001, epochs=1), until=1)
        text = class_text(method.backbone.joint.encode_texts(stream.captions.of(0)))
        torch.testing.assert_close(method.eval().head.weight[0], text, rtol=1e-5, atol=1e-6)


def test_an_image_backbone_with_unused_parts_suits_methods_that_rate_all_layers():
    backbone = tiny_towers()
    stream = image_stream("til")
    method = factory("halrp")(backbone, 6)
    journal = live(method, stream, budget=sgd(lr=0.001, epochs=1), until=2)
    assert [(row["position"], row["task"]) for row in journal.recorded] == [(1, 0), (2, 0), (2, 1)]
