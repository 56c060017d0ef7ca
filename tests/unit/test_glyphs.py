import gzip
import json
import socket
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clrun.backbones.glyph import FOLDER, SIZE, glyph_clip, glyph_vit
from clrun.data.sources.digits import digits
from clrun.data.sources.glyphs import FILE, glyphs
from clrun.data.transforms import fit_transform
from clrun.system.seeding import seed_all

MEGABYTE = 1_000_000
PLAIN = {"val_fraction": 0.0, "seed": 0, "augment": []}
CLIP = FOLDER / "glyph_clip"


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("tried to open a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def facts():
    with np.load(FILE) as stored:
        return json.loads(stored["facts"].tobytes()), stored["train_family"], stored["test_family"]


def images_of(split):
    return next(iter(split.batches(len(split), view="raw")))


def every(split, step):
    """Every step-th row."""
    return split.select(torch.arange(0, len(split), step))


def nearest_mean(backbone, dataset):
    """Accuracy of the nearest class mean by cosine."""
    transform, _ = fit_transform(dataset, backbone)
    with torch.no_grad():
        prepared = [(transform.eval(batch.x), batch.y) for batch in map(images_of, (dataset.train, dataset.test))]
        (x, y), (test_x, test_y) = [(backbone.eval()(x), y) for x, y in prepared]
    means = torch.stack([x[y == label].mean(dim=0) for label in range(dataset.num_classes)])
    guess = (F.normalize(test_x, dim=1) @ F.normalize(means, dim=1).T).argmax(dim=1)
    return (guess == test_y).double().mean().item()


class TestDataset:
    def test_counts_and_shapes(self):
        dataset = glyphs(**PLAIN)
        assert 60 <= dataset.num_classes == len(dataset.class_names) == len(set(dataset.class_names)) <= 80
        for split, least in ((dataset.train, 60), (dataset.test, 20)):
            batch = images_of(split)
            assert batch.x.shape == (len(split), 1, 28, 28) and batch.x.dtype == torch.uint8
            assert batch.y.bincount(minlength=dataset.num_classes).min() >= least
        assert dataset.shape == (1, 28, 28)
        assert FILE.stat().st_size < 4 * MEGABYTE

    def test_twelve_equal_tasks_of_at_least_five_classes_are_possible(self):
        classes = glyphs(**PLAIN).num_classes
        assert classes % 12 == 0 and classes // 12 >= 5

    def test_normalisation_constants_are_those_of_the_training_images(self):
        dataset = glyphs(**PLAIN)
        pixels = images_of(dataset.train).x.double() / 255
        assert dataset.mean == (round(pixels.mean().item(), 4),)
        assert dataset.std == (round(pixels.std(correction=0).item(), 4),)

    def test_scripts_partition_the_classes_and_are_neither_latin_nor_digits(self):
        dataset = glyphs(**PLAIN)
        groups = dataset.groups["script"]
        assert sorted(label for group in groups for label in group) == list(range(dataset.num_classes))
        first_words = [{dataset.class_names[label].split()[0] for label in group} for group in groups]
        assert first_words == [{"greek"}, {"cyrillic"}, {"hiragana"}, {"katakana"}]

    def test_characters_match_the_class_names(self, facts):
        names = [unicodedata.name(c).replace("LETTER ", "").lower() for c in facts[0]["characters"]]
        assert tuple(names) == glyphs(**PLAIN).class_names

    def test_training_and_test_fonts_are_disjoint_families(self, facts):
        stored, train, test = facts
        assert not set(stored["train_families"]) & set(stored["test_families"])
        classes = len(stored["classes"])
        for families, least in ((train, 8), (test, 3)):
            assert min(len(set(row)) for row in families.reshape(classes, -1).tolist()) >= least

    def test_no_image_is_empty_or_repeated(self):
        dataset = glyphs(**PLAIN)
        rows = torch.cat([images_of(split).x.flatten(1) for split in (dataset.train, dataset.test)])
        assert rows.float().mean(dim=1).min() > 2
        assert len(torch.unique(rows, dim=0)) == len(rows)

    def test_two_loads_agree_and_validation_rows_leave_the_test_set_alone(self):
        first, second = glyphs(**PLAIN), glyphs(**{**PLAIN, "val_fraction": 0.1, "seed": 3})
        assert torch.equal(images_of(first.test).x, images_of(second.test).x)
        assert len(second.train) + len(second.val) == len(first.train)
        assert len(second.val) == 8 * first.num_classes


class TestVisionTransformer:
    def test_loads_offline_as_a_plain_timm_model(self, offline):
        model = glyph_vit((3, 64, 64), pretrained=True)
        assert type(model).__module__ == "timm.models.vision_transformer"
        assert (model.num_features, model.input_size, model.mean, model.std) == (96, (1, 28, 28), (0.2,), (0.33,))
        assert model.eval()(torch.zeros(2, 1, 28, 28)).shape == (2, 96)

    def test_weights_do_not_depend_on_the_seed_and_differ_from_random_ones(self):
        seed_all(0, "first")
        first, random = glyph_vit((1, 8, 8), pretrained=True), glyph_vit((1, 8, 8), pretrained=False)
        seed_all(1, "second")
        second = glyph_vit((1, 8, 8), pretrained=True)
        x = torch.randn(3, 1, SIZE, SIZE)
        with torch.no_grad():
            a, b, c = (model.eval()(x) for model in (first, second, random))
        assert torch.equal(a, b)
        assert (a - c).abs().max() > 0.1

    def test_class_means_of_its_features_tell_digits_apart_and_random_ones_do_not(self):
        trained = nearest_mean(glyph_vit((1, 8, 8), pretrained=True), digits(**PLAIN))
        assert trained >= 0.88
        seed_all(0, "twin")
        assert nearest_mean(glyph_vit((1, 8, 8), pretrained=False), digits(**PLAIN)) < trained - 0.3

    def test_class_means_of_its_features_beat_those_of_pixels_on_scripts_it_has_never_seen(self):
        dataset = glyphs(**PLAIN)
        part = replace(dataset, train=every(dataset.train, 4), test=every(dataset.test, 3))
        trained = nearest_mean(glyph_vit((1, 28, 28), pretrained=True), part)
        assert trained >= 0.5
        assert trained >= 1.15 * nearest_mean(torch.nn.Flatten(), replace(part, mean=(0.0,), std=(1.0,)))


@pytest.mark.parametrize("weights", ["glyph_vit.safetensors", "glyph_clip/open_clip_model.safetensors"])
def test_weights_are_at_most_one_megabyte(weights):
    assert (FOLDER / weights).stat().st_size <= MEGABYTE


@pytest.mark.parametrize("card", ["glyph_vit.md", "glyph_clip/README.md"])
def test_model_cards_state_data_fonts_seed_command_cost_and_numbers(card):
    text = (FOLDER / card).read_text(encoding="utf-8")
    for word in (
        "Latin letters",
        "OFL",
        "Debian",
        "seed",
        "pretrain_glyphs.py",
        "CPU minutes",
        "| raw pixels | digits |",
    ):
        assert word in text


def clip(pretrained=True):
    return glyph_clip((1, 28, 28), pretrained=pretrained, weights=None, weights_key=None, head="linear")


class TestDualEncoder:
    def test_the_folder_is_small(self):
        assert sum(path.stat().st_size for path in CLIP.iterdir()) <= MEGABYTE

    def test_the_vocabulary_fits_the_text_tower(self):
        merges = gzip.decompress((CLIP / "merges.txt.gz").read_bytes()).decode().splitlines()[1:]
        text = json.loads((CLIP / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
        assert text["vocab_size"] == 512 + len(merges) + 2

    def test_is_the_model_that_open_clip_opens(self, offline):
        open_clip = pytest.importorskip("open_clip", reason="needs the package open_clip_torch")
        model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{CLIP}")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{CLIP}", bpe_path=str(CLIP / "merges.txt.gz"))
        ours = clip().eval()
        texts = ["a photo of a digit seven", "7", "Hello, World's 42!", "a_b  c", "caf\u00e9 \u00b2", "x" * 40]
        assert torch.equal(tokenizer(texts), ours.tokenize(texts))
        with torch.no_grad():
            x = torch.randn(4, 3, SIZE, SIZE)
            torch.testing.assert_close(model.eval().encode_image(x), ours.encode_image(x), rtol=1e-4, atol=1e-5)
            ids = tokenizer(texts)
            torch.testing.assert_close(model.encode_text(ids), ours.encode_text(ids), rtol=1e-4, atol=1e-5)
            assert model.logit_scale == ours.logit_scale
        shown = preprocess(Image.new("RGB", (50, 40), (255, 255, 255)))
        assert shown.shape == ours.input_size
        torch.testing.assert_close(shown[:, 0, 0], (1 - torch.tensor(ours.mean)) / torch.tensor(ours.std))

    def test_zero_shot_tells_digits_apart(self, offline):
        model, dataset = clip().eval(), digits(**PLAIN)
        batch = images_of(dataset.test)
        with torch.no_grad():
            images = model.encode_image(fit_transform(dataset, model)[0].eval(batch.x))
            texts = model.joint.encode_texts([dataset.texts.of(label)[3] for label in range(10)])
        guess = F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
        assert (guess.argmax(dim=1) == batch.y).double().mean() >= 0.85

    def test_words_unknown_to_the_vocabulary_are_spelled(self):
        known, unknown = clip(pretrained=False).tokenize(["seven", "zebra"])
        assert (known != 0).sum() == 3  # start, word, end
        assert (unknown != 0).sum() == 2 + len("zebra")
