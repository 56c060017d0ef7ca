"""Whole runs with image and text towers: texts of classes, evaluation before learning and on held-out data sets."""

import csv
import json

import numpy as np
import pytest
from running import cells, configuration, run, run_interrupted

from clrun.api import load
from clrun.reporting.sweep import report
from clrun.system.errors import ConfigError

DIGITS = ("backbone=glyph_clip", "dataset=digits", "scenario.n_tasks=5", "job.max_eval_rows=20")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CLRUN_CACHE", str(tmp_path_factory.getbasetemp() / "text_cache"))


def stored(out):
    return json.loads((out / "run.json").read_text())


class TestZeroShot:
    def test_every_order_gives_the_same_final_accuracies_and_the_texts_stand_in_run_json(self, tmp_path):
        runs = []
        for order in ("canonical", "reverse"):
            run(tmp_path / order, *DIGITS, "method=zero_shot", f"task_order={order}", "dataset.templates=['a {}']")
            finals = {task: n for (position, task), n in cells(tmp_path / order).items() if position == 5}
            runs.append((stored(tmp_path / order), finals))
        assert runs[0][1] == runs[1][1] and min(right / total for right, total in runs[0][1].values()) > 0.5
        captions = [found["captions"] for found, _ in runs]
        assert captions[0] == captions[1] and captions[0]["templates"] == ["a {}"]
        assert captions[0]["names"][3] == "digit three"
        texts = [file for file in runs[1][0]["features"]["files"] if file["bytes"] < 10_000]
        assert [file["reused"] for file in texts] == [True], "texts are encoded once, whatever the order"

    def test_unseen_tasks_are_evaluated_among_their_own_and_among_all_classes(self, tmp_path):
        out = tmp_path / "run"
        run(out, *DIGITS, "method=zero_shot", "job.eval_unseen=true", "job.eval_extra=[glyphs]")
        found = stored(out)
        for setting in ("cil", "til", "open"):
            assert cells(out, setting).keys() == {(i, j) for i in range(6) for j in range(5)}
        grid = {setting: cells(out, setting) for setting in ("cil", "til", "open")}
        assert all(grid["til"][i, j] == grid["til"][0, j] for i in range(6) for j in range(5)), "nothing is learned"
        assert all(grid["open"][i, j] == grid["cil"][5, j] for i in range(6) for j in range(5))
        assert all(grid["cil"][i, j] == grid["open"][i, j] for i in range(6) for j in range(i, 5))
        metrics = found["metrics"]
        means = [sum(grid["til"][5, j][0] for j in tasks) / 20 / len(tasks) for tasks in (range(1, 5), range(5))]
        assert metrics["til"]["transfer"] == pytest.approx(means[0])
        assert metrics["til"]["matrix_average"] == pytest.approx(means[1])
        assert metrics["open"]["harmonic_accuracy"] <= max(
            metrics["open"]["seen_accuracy"], metrics["open"]["unseen_accuracy"]
        )
        assert len(found["held_out"]) == 6 and all(counts == found["held_out"][0] for counts in found["held_out"])
        assert found["held_out"][0]["glyphs"][1] == 20
        report([tmp_path])
        with (tmp_path / "sweep.csv").open() as file:
            (line,) = csv.DictReader(file)
        assert float(line["open_harmonic_accuracy"]) == metrics["open"]["harmonic_accuracy"]

    @pytest.mark.parametrize(
        "words", [("method=proof", "method.init=identity"), ("method=rapf",), ("method=rail", "method.m=50")]
    )
    def test_methods_on_features_have_seen_unseen_and_harmonic_accuracy(self, tmp_path, words):
        run(tmp_path, *DIGITS, *words, "job.eval_unseen=true", "job.eval_extra=[glyphs]", "job.max_steps=5")
        found, counts = stored(tmp_path), cells(tmp_path, "open")
        metrics = found["metrics"]["open"]
        seen, unseen = metrics["seen_accuracy"], metrics["unseen_accuracy"]
        assert counts.keys() == {(i, j) for i in range(6) for j in range(5)}
        assert 0 < unseen <= 1 and 0.5 < seen <= 1
        assert min(seen, unseen) <= metrics["harmonic_accuracy"] <= max(seen, unseen)
        assert len(found["held_out"]) == 6 and found["held_out"][0]["glyphs"][1] == 20

    @pytest.mark.parametrize("method", ["zero_shot", "clip_finetune"])
    def test_a_backbone_without_text_tower_is_refused(self, tmp_path, method):
        with pytest.raises(ConfigError, match=r"^backbone: \w+ needs names .*, which Backbone cannot encode; use"):
            run(tmp_path, f"method={method}", "dataset=digits")


class TestUnseen:
    @pytest.mark.parametrize("option", ["job.eval_unseen=true", "job.eval_extra=[glyphs]"])
    def test_a_method_that_does_not_know_names_is_refused(self, tmp_path, option):
        with pytest.raises(ConfigError, match=r"^job.eval_\w+: Er knows no class that it has not learned"):
            run(tmp_path, *DIGITS, "method=er", option)

    def test_a_head_of_names_makes_any_method_know_them(self, tmp_path):
        run(tmp_path, *DIGITS, "method=er", "backbone.head=fixed", "job.eval_unseen=true", "job.max_steps=2")
        assert cells(tmp_path, "til").keys() == {(i, j) for i in range(6) for j in range(5)}

    def test_a_head_of_names_is_refused_for_a_method_with_a_classifier_of_its_own(self, tmp_path):
        with pytest.raises(ConfigError, match="^backbone.head: Ncm has a classifier of its own"):
            run(tmp_path, *DIGITS, "method=ncm", "backbone.head=fixed")

    def test_a_resumed_run_equals_an_uninterrupted_one(self, tmp_path):
        options = (*DIGITS, "method=coop", "job.eval_unseen=true", "job.eval_extra=[glyphs]", "job.max_steps=3")
        run(tmp_path / "whole", *options, "method.length=2")
        run_interrupted(tmp_path / "parts", *options, "method.length=2", at=2)
        run(tmp_path / "parts", *options, "method.length=2")
        whole, parts = ((tmp_path / name / "accuracy.csv").read_text() for name in ("whole", "parts"))
        assert whole == parts and len(list(csv.reader(whole.splitlines()))) == 1 + 6 * 5 * 3
        assert stored(tmp_path / "whole")["held_out"] == stored(tmp_path / "parts")["held_out"]

    @pytest.mark.parametrize(
        "words",
        [
            ("method=coop", "method.length=2"),
            ("method=proof",),
            ("method=rapf",),
            ("method=rail", "method.m=50"),
            ("method=rail", "method.form=dual"),
        ],
    )
    def test_the_trained_method_predicts_from_checkpoint_and_from_weights(self, tmp_path, words):
        run(tmp_path, *DIGITS, *words, "job.max_steps=2", "job.save_model=true", "job.keep_checkpoint=true")
        found = []
        for file in ("checkpoint.pt", "model.safetensors"):
            learner = load(tmp_path).learner()
            images, labels = learner.test_images(4)
            found.append(learner.predict(images, task=4).probabilities)
            assert (found[-1].argmax(axis=1) == labels).mean() > 0.5
            (tmp_path / file).unlink()
        np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-5)


class TestConfiguration:
    def test_names_of_data_sets_become_nodes(self):
        config, _ = configuration("job.eval_extra=[digits,mnist]", "backbone=cnn", "dataset=digits")
        nodes = config["job"]["eval_extra"]
        assert [node["_target_"].rpartition(".")[2] for node in nodes] == ["digits", "mnist"]
        assert all(node["_partial_"] for node in nodes) and nodes[1]["val_fraction"] == 0.0

    def test_an_unknown_name_is_refused(self):
        with pytest.raises(ConfigError, match=r"^job.eval_extra: no dataset named 'digts'; did you mean 'digits'\?"):
            configuration("job.eval_extra=[digts]", "backbone=cnn", "dataset=digits")

    def test_a_named_model_says_which_file_is_wanted_before_anything_is_built(self, tmp_path):
        with pytest.raises(
            ConfigError, match="^backbone.weights: the weights of ViT-B-16 are wanted; set it to a file"
        ):
            run(tmp_path, "backbone=clip_vit_b16", "method=zero_shot", "dataset=digits")
        with pytest.raises(ConfigError, match="^backbone.weights: there is no file nowhere.safetensors"):
            run(tmp_path, "backbone=clip_vit_b16", "backbone.weights=nowhere.safetensors", "dataset=digits")
