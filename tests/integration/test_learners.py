"""The trained method of a run predicts what the run has predicted, whatever method, and from either file."""

import shutil

import numpy as np
import pytest
from helpers import METHODS

from clrun.api import ConfigError, load, run

SHORT = {"job": {"max_tasks": 2, "max_steps": 3, "save_predictions": "final", "save_model": True, "picture": False}}
# Few test rows: each is predicted several times, by a transformer in most runs.
IMAGES = "dataset=synthetic dataset.image_shape=[1,8,8] dataset.train_rows=20 dataset.test_rows=6"
TEXTS = "dataset=text_synthetic dataset.train_rows=20 dataset.test_rows=6 backbone=t5_tiny"
# Tried in turn until one suits the method, as in scripts/byte_identity.py.
ATTEMPTS = (
    f"{IMAGES} scenario.setting=cil",
    f"{IMAGES} scenario.setting=til",
    f"{IMAGES} scenario.setting=til backbone=cnn",
    f"{IMAGES} backbone=glyph_clip",
    f"{TEXTS} scenario.setting=cil",
    f"{TEXTS} scenario.setting=til",
)
# What cannot be rebuilt from tensors alone, and what the refusal says of it.
REBUILT, MORE = "cannot be rebuilt from tensors alone", "with these tensors predicts otherwise than the run's"
CHECKPOINT_ONLY = {"aper": REBUILT, "ebll": REBUILT, "fish": REBUILT, "halrp": REBUILT, "progress_compress": REBUILT}
CHECKPOINT_ONLY |= {"fecam": MORE, "icarl": MORE, "moe_adapters": REBUILT, "promptfusion_lite": REBUILT}
CHECKPOINT_ONLY |= {"sema": REBUILT}
# One method each with: an output for every class, task ids, features, prompts, growth, and the two kinds of refusal.
QUICK = ("er", "hat", "ranpac", "l2p", "apd", "halrp", "fecam")
CASES = [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]


def short_run(method, folder):
    mistakes = []
    for attempt in ATTEMPTS:
        try:
            return run(attempt, method=method, folder=folder, progress=False, hardware={"threads": 1}, **SHORT)
        except ConfigError as error:
            mistakes.append(str(error))
    raise AssertionError(mistakes)


def agrees(done, learner):
    """Whether the learner's predictions for the stored test rows are those of predictions.csv, exactly."""
    saved = done.predictions()
    read = learner.test_texts if learner.input.startswith("texts") else learner.test_images
    for task in done.order:
        rows, labels = read(task)
        own = saved[saved.task == task]
        np.testing.assert_array_equal(own.label, labels)
        for setting in set(own.columns) & {"cil", "til"}:
            told = task if setting == "til" else None
            np.testing.assert_array_equal(learner.predict(rows, task=told).labels, own[setting], f"{setting} {task}")


@pytest.mark.parametrize("method", CASES)
def test_a_learner_predicts_as_its_run_did(method, tmp_path):
    done = short_run(method, tmp_path / "run")
    agrees(done, done.learner())
    weights = tmp_path / "weights"
    shutil.copytree(done.folder, weights, ignore=shutil.ignore_patterns("checkpoint.pt"))
    if method not in CHECKPOINT_ONLY:
        agrees(done, load(weights).learner())
        return
    with pytest.raises(ConfigError, match=r"job\.keep_checkpoint=true") as refused:
        load(weights).learner()
    assert CHECKPOINT_ONLY[method] in str(refused.value)
