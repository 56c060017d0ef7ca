"""Whole runs on texts: what is learned is predicted again from texts, tasks are shown, ordered and refused as texts."""

import csv
import json
from pathlib import Path

import pytest
from running import quiet, run

from clrun.api import load
from clrun.config.job import JobInfo
from clrun.running.run import run_config
from clrun.system.errors import ConfigError

TINY = ("dataset=text_synthetic", "dataset.num_classes=6", "dataset.train_rows=12", "dataset.test_rows=4")
TINY += ("scenario.n_tasks=3", "backbone=bert_tiny", "backbone.width=16", "backbone.depth=1", "budget.epochs=1")


@pytest.mark.parametrize("method", ["finetune", "ncm"])
def test_a_learner_predicts_texts_as_the_run_did(tmp_path: Path, method: str) -> None:
    run(tmp_path, *TINY, f"method={method}", "job.keep_checkpoint=true", "job.save_predictions=final")
    learner = load(tmp_path).learner()
    stored = json.loads((tmp_path / "run.json").read_text())
    assert learner.input == stored["input"] and learner.input.startswith("texts, at most ")
    with (tmp_path / "predictions.csv").open() as file:
        lines = [{key: int(value) for key, value in line.items()} for line in csv.DictReader(file)]
    for task in range(3):
        texts, labels = learner.test_texts(task)
        predicted = learner.predict(texts)
        own = [line for line in lines if line["task"] == task]
        assert [line["label"] for line in own] == labels.tolist()
        assert [line["cil"] for line in own] == predicted.labels.tolist()
        assert predicted.probabilities.shape == (8, 6)
        assert learner.predict(texts[0]).labels[0] == predicted.labels[0], "alone as in a batch"
    with pytest.raises(ConfigError, match=r"^texts\[1\]: expected a text \(str\), got int"):
        learner.predict(["a", 3])
    with pytest.raises(ConfigError, match="^test_images: this run has learned texts; use test_texts"):
        learner.test_images(0)


def test_texts_are_predicted_in_the_words_of_their_part(tmp_path: Path) -> None:
    domains = ("dataset.num_classes=2", "dataset.domains=2", "scenario=dataset_sequence", "scenario.setting=dil")
    kept = [word for word in TINY if not word.startswith(("scenario", "dataset.num_classes"))]
    words = ("dataset.schema.prefix={domain 0: 'in x:', domain 1: 'in y:'}", "job.save_predictions=final")
    run(tmp_path, *kept, *domains, *words, "job.keep_checkpoint=true")
    learner = load(tmp_path).learner()
    assert learner.input.endswith("prefix by part: domain 0 'in x:', domain 1 'in y:'")
    with (tmp_path / "predictions.csv").open() as file:
        lines = [{key: int(value) for key, value in line.items()} for line in csv.DictReader(file)]
    for task in range(2):
        texts, _ = learner.test_texts(task)
        assert not any(text.startswith("in ") for text in texts), "texts are stored as they were read"
        expected = [line["dil"] for line in lines if line["task"] == task]
        assert learner.predict(texts, task=task).labels.tolist() == expected
    assert not (learner.logits(texts, task=0) == learner.logits(texts, task=1)).all(), "the prefix is read"
    with pytest.raises(
        ConfigError, match="^texts: their prefix depends on their part of the data set .domain 0, domain"
    ):
        learner.predict(texts)


def test_exactly_written_strings_are_for_methods_that_write(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="^dataset.schema.metric: exact_match needs a method that writes texts, such"):
        run(tmp_path / "run", *TINY, "dataset.schema.metric=exact_match")
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_page_shows_texts_of_every_task(tmp_path: Path) -> None:
    config, choices = quiet(*TINY, "job=preview", "backbone.max_tokens=8")
    run_config(config, tmp_path / "page", job=JobInfo(None, 1, choices, False, [], {}))
    page = (tmp_path / "page" / "preview.html").read_text()
    assert page.count("<section") == 3 and "cut at 8), bytes" in page and "cut off)" in page
    assert [path.name for path in (tmp_path / "page").iterdir()] == ["preview.html"]


def test_tasks_of_texts_are_ordered_by_their_features(tmp_path: Path) -> None:
    run(tmp_path, *TINY, "method=ncm", "task_order=edge", "task_order.kind=easy")
    assert sorted(json.loads((tmp_path / "run.json").read_text())["task_order"]) == [0, 1, 2]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("scenario=domain_shift",), "^scenario=domain_shift: needs images, and text_synthetic consists of texts"),
        (("dataset.augment=[flip]",), "^dataset.augment: flip: is for images, not for texts"),
        (("backbone=cnn",), "^backbone: takes images "),
    ],
)
def test_what_is_for_images_is_refused(tmp_path: Path, words: tuple[str, ...], expected: str) -> None:
    kept = [word for word in TINY if not word.startswith(("backbone", "scenario"))]
    backbone = () if words[0].startswith("backbone") else ("backbone=bert_tiny",)
    with pytest.raises(ConfigError, match=expected):
        run(tmp_path / "run", *kept, *backbone, *words)
    assert not (tmp_path / "run" / "run.json").exists()
