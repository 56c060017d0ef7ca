"""`job=preview`: samples of every task in order, recognisable, without training."""

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from running import quiet, run

from clrun.config.job import JobInfo
from clrun.data.features import FeatureBackbone
from clrun.data.sources.digits import digits
from clrun.data.split import TensorSplit
from clrun.data.stream import Dataset
from clrun.reporting.samples import BETWEEN, GAP, HEADER, LABEL, LINE, MARGIN, TILE, Band, draw_samples
from clrun.running import preview
from clrun.running.parts import Parts
from clrun.running.run import run_config
from clrun.system.errors import ConfigError

pytestmark = pytest.mark.records  # files, and bits of runs of one layout

DIGITS = digits(val_fraction=0.0, seed=0, augment=[])


def samples(*overrides: str) -> tuple[str, str, list[Band]]:
    """Return the title, the subtitle and the bands of the picture that a configuration gives."""
    parts = Parts(quiet("job=preview", *overrides)[0])
    parts.hardware.setup()
    return preview.samples(parts)


def stored(label: int, count: int) -> np.ndarray:
    """The first training images of a digit, [count, 8, 8, 1]."""
    rows = (DIGITS.train.y == label).nonzero()[:count, 0]
    return DIGITS.train.images[rows].permute(0, 2, 3, 1).numpy()


def test_every_task_in_order_as_stored(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run" / "preview.png"
    run(path.parent, "job=preview", "task_order=reverse")
    title, subtitle, bands = samples("task_order=reverse")
    assert title == "er-digits: 5 tasks, class-incremental, order 4 3 2 1 0"
    assert subtitle.startswith("8x8x1")
    draw_samples(title, subtitle, bands, tmp_path / "expected.png")
    assert path.read_bytes() == (tmp_path / "expected.png").read_bytes()
    assert list(path.parent.iterdir()) == [path]
    assert [band.title for band in bands] == [f"{i + 1}. task {4 - i}: {8 - 2 * i}/{9 - 2 * i}" for i in range(5)]
    assert bands[0].names == ("8",) * 4 + ("9",) * 4 and bands[0].training is None
    np.testing.assert_array_equal(bands[0].images, np.concatenate([stored(8, 4), stored(9, 4)]))
    assert bands[0].lines == ("284 train, 70 test", "2 classes: 8, 9")
    assert capfd.readouterr().out == f"5 tasks drawn: {path}\n"


@pytest.mark.parametrize("kind", ["hard", "easy"])
def test_the_order_is_that_of_the_run_also_where_it_depends_on_the_backbone(kind: str, tmp_path: Path) -> None:
    options = ("method=finetune", "backbone=glyph_vit", "task_order=edge", f"task_order.kind={kind}")
    title, _, bands = samples(*options)
    run(tmp_path / "run", *options, "job.max_steps=1", "job.max_eval_rows=8", "budget.epochs=1")
    order = json.loads((tmp_path / "run" / "run.json").read_text())["task_order"]
    assert order != sorted(order), "the order depends on the features"
    assert title.endswith(f"order {' '.join(map(str, order))}")
    assert [band.title for band in bands] == [f"{i + 1}. task {t}: {2 * t}/{2 * t + 1}" for i, t in enumerate(order)]


def test_the_training_view_is_drawn_beside_it() -> None:
    first, second = (samples("dataset.augment=[crop]")[2][0] for _ in range(2))
    assert first.training is not None and second.training is not None
    assert first.training.shape == first.images.shape and (first.training != first.images).any()
    np.testing.assert_array_equal(first.training, second.training)


def test_domains_show_their_shift() -> None:
    _, _, bands = samples("scenario=domain_shift", "scenario.n_tasks=20")
    assert len(bands) == 20 and len(bands[0].names) == 6 and bands[0].names == bands[19].names
    flat = bands[0].images.reshape(6, -1)
    assert (np.sort(flat) == np.sort(bands[1].images.reshape(6, -1))).all() and (
        flat != bands[1].images.reshape(6, -1)
    ).any()


def test_no_weights_are_needed() -> None:
    pytest.importorskip("timm")
    backbone = ("backbone=timm", "backbone.name=test_vit", "backbone.weights=gone.pth", "backbone.image_size=32")
    _, _, bands = samples(*backbone, "job.max_tasks=2")
    assert len(bands) == 2 and bands[0].images.shape == (8, 32, 32, 3)


def test_wider_ranges_are_compressed_and_channels_joined() -> None:
    wide = torch.tensor([-255.0, 0.0, 510.0]).view(1, 1, 1, 3)
    assert preview._pixels(wide).flatten().tolist() == [0, 85, 255]
    assert preview._pixels(torch.full((2, 5, 4, 4), 7.0)).shape == (2, 4, 4, 1)


def test_many_classes_are_sampled_evenly() -> None:
    rows = preview._rows(DIGITS.train, 4)
    assert DIGITS.train.y[rows].tolist() == [0, 3, 6, 9]


def test_rows_that_are_no_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("own_vectors")
    rows = TensorSplit(torch.rand(40, 6), torch.arange(40) % 10)
    vectors = Dataset("vectors", rows, rows, 10, tuple("0123456789"), (6,), mean=(0.0,), std=(1.0,))
    setattr(module, "load", lambda: vectors)  # noqa: B010 - mypy knows no such attribute
    monkeypatch.setitem(sys.modules, "own_vectors", module)
    setattr(module, "network", lambda shape: FeatureBackbone(*shape))  # noqa: B010
    config, _ = quiet("job=preview")
    own = {
        "dataset": {"_target_": "own_vectors.load"},
        "backbone": {"_target_": "own_vectors.network", "_partial_": True},
    }
    with pytest.raises(ConfigError, match="^job=preview: the rows of er-digits are no images"):
        run_config(
            config | own,
            tmp_path / "run",
            job=JobInfo(None, 1, {}, False, [], {}),
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("tasks", "columns", "rows"), [(2, 1, 2), (13, 2, 7), (51, 3, 17)])
def test_the_picture_grows_with_the_tasks(tmp_path: Path, tasks: int, columns: int, rows: int) -> None:
    image = np.zeros((2, 4, 4, 1), dtype=np.uint8)
    bands = [Band("1. task", ("some text " * 30,), ("a_class_with_a_long_name", "b $x$"), image, image)]
    bands = bands * tasks
    draw_samples("title", "subtitle", bands, tmp_path / "a.png")
    picture = pytest.importorskip("matplotlib.image").imread(tmp_path / "a.png")[..., :3]
    black = (picture == 0).all(axis=-1).sum()
    assert 1 < black / (tasks * 4) / (0.62 * 110) ** 2 < 1.3  # the images, and pixels of text that are wholly black
    one = LABEL + 2 * (2 * (TILE + GAP) + BETWEEN) - BETWEEN + 2 * MARGIN
    assert picture.shape[1] == pytest.approx(110 * columns * one, abs=2)
    assert picture.shape[0] == pytest.approx(110 * (HEADER + rows * (TILE + 2 * LINE + 3 * GAP) + MARGIN), abs=2)


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    image = np.full((1, 4, 4, 3), 7, dtype=np.uint8)
    for name in ("a.png", "b.png"):
        draw_samples("title", "", [Band("1. task", (), ("ß 漢",), image, None)], tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
