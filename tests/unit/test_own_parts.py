"""Parts from outside of clrun: what is wrong with them is said in one line, or their file stands in the traceback."""

import sys
import traceback
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from running import member, quiet
from torch import nn

from clrun.config.job import JobInfo
from clrun.config.signature import locate
from clrun.data.reading.assemble import assemble
from clrun.data.reading.options import Reading
from clrun.data.split import TensorSplit
from clrun.data.stream import Dataset
from clrun.learning.hooks import misspelt_hooks
from clrun.learning.method import Method
from clrun.running.build import build_images
from clrun.running.parts import Parts
from clrun.running.run import preflight, run_config
from clrun.system.errors import ConfigError, collecting_warnings
from clrun.system.yaml_files import conf_dir

IMAGES, LABELS = torch.zeros(40, 1, 8, 8, dtype=torch.uint8), torch.arange(40) % 10


def made(images, labels):
    split = TensorSplit(images, labels)
    return Dataset("own", split, split, 10, tuple("abcdefghij"), tuple(images.shape[1:]))


def without_test_rows_of_some_tasks():
    options = {"class_names": "abcdefghij", "mean": (), "std": (), "groups": {}}
    reading = Reading(val_fraction=0, seed=0, augment=[])
    return assemble("own", (IMAGES, LABELS), (IMAGES[:2], LABELS[:2]), reading=reading, **options)


DATASETS = {
    "a tuple": (lambda: (IMAGES, LABELS), "dataset: own.part returns a tuple, not a clrun.data.stream.Dataset, ..."),
    "floats": (
        lambda: made(IMAGES / 255, LABELS),
        "dataset: own.part gives train rows with images of [40, 1, 8, 8] torch.float32, expected a tensor ...",
    ),
    "no channels": (
        lambda: made(IMAGES[:, 0], LABELS),
        "dataset: own.part gives train rows with images of [40, 8, 8] torch.uint8, expected a tensor [N, C, H, W] ...",
    ),
    "channels last": (
        lambda: made(torch.zeros(40, 8, 8, 3, dtype=torch.uint8), LABELS),
        "dataset: own.part gives train rows with images of [40, 8, 8, 3] torch.uint8, expected a tensor [N, ...",
    ),
    "constant channel": (
        lambda: replace(made(IMAGES, LABELS), mean=(0.5,), std=(0.0,)),
        "dataset: own.part gives train rows with the standard deviations (0.0,), expected numbers above 0",
    ),
    "labels from 1": (
        lambda: made(IMAGES, LABELS + 1),
        "dataset: own.part gives train rows with labels from 1 to 10, expected 0 to 9 (num_classes is 10)",
    ),
    "short labels": (
        lambda: made(IMAGES, LABELS.int()),
        "dataset: own.part gives train rows with labels of [40] torch.int32, expected a tensor [N] of torch.int64",
    ),
    "NumPy labels": (
        lambda: made(IMAGES, LABELS.numpy()),
        "dataset: own.part gives train rows with labels of ndarray, expected a tensor [N] of torch.int64",
    ),
    "fewer labels than images": (
        lambda: made(IMAGES, LABELS[:30]),
        "dataset: own.part gives train rows with 40 images and 30 labels, expected one label per image",
    ),
    "nothing to test": (
        without_test_rows_of_some_tasks,
        "dataset: there are no test rows of task 1 (c/d); add images of its classes, ...",
    ),
}


class Net(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.linear = nn.Linear(64, 8)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        return self.norm(self.linear(x.flatten(1)))


class WrongWidth(Net):
    num_features = 9


class Maps(Net):
    num_features = 8

    def forward(self, x):
        return x.expand(-1, 8, -1, -1)


class SideAlone(Net):
    num_features, input_size = 8, 16


class Right(Net):
    num_features = 8


BACKBONES = {
    "no width": (Net, "backbone: own.part has no num_features; set self.num_features to the width of its features"),
    "another width": (WrongWidth, "backbone: own.part returns features [B, 8], expected [B, num_features] = [B, 9]"),
    "no module": (lambda shape: 3, "backbone: own.part is no torch.nn.Module"),
    "a side": (SideAlone, "backbone: own.part has input_size=16, expected (channels, height, width)"),
    "maps": (Maps, "backbone: own.part returns features [B, 8, 8, 8], expected [B, num_features] = [B, 8]"),
}


class ManyLosses(Method):
    def loss(self, batch, ctx):
        return super().loss(batch, ctx) * torch.ones(3)


@pytest.fixture
def config(monkeypatch):
    """Return a function: the configuration of a small run with one part replaced by `own.part`."""

    def with_part(group, part):
        module = ModuleType("own")
        module.part, module.__file__ = part, "somewhere/own.py"
        part.__module__ = "own"
        setattr(module, getattr(part, "__name__", "part"), part)  # where pickle looks for it
        monkeypatch.setitem(sys.modules, "own", module)
        # The real one keeps what it has found once.
        monkeypatch.setattr("clrun.running.parts.locate", lambda name: part if name == "own.part" else locate(name))
        plain, _ = quiet("job=smoke")
        called = group in ("scenario", "task_order", "backbone", "method")
        partial = {"_partial_": True} if called else {}
        return {**plain, group: {"_target_": "own.part", **partial}}

    return with_part


def assert_line(error, expected):
    assert str(error.value).startswith(expected.removesuffix("..."))
    assert "\n" not in str(error.value) and (expected.endswith("...") or str(error.value) == expected)


@pytest.mark.parametrize(("part", "expected"), DATASETS.values(), ids=DATASETS)
def test_unusable_dataset(part, expected, config):
    with pytest.raises(ConfigError) as error:
        preflight(config("dataset", part))
    assert_line(error, expected)


@pytest.mark.parametrize(("part", "expected"), BACKBONES.values(), ids=BACKBONES)
def test_unusable_backbone(part, expected, config):
    with pytest.raises(ConfigError) as error:
        build_images(Parts(config("backbone", part)), place=False)
    assert_line(error, expected)


def test_a_loader_that_calls_the_shape_by_its_old_name_is_told(config):
    split = TensorSplit(IMAGES, LABELS)
    with pytest.raises(ConfigError) as error:
        preflight(
            config("dataset", lambda: Dataset("own", split, split, 10, tuple("abcdefghij"), image_shape=(1, 8, 8)))
        )
    assert_line(error, "dataset: own.part: rename image_shape, which is now `shape` of a Dataset")


class Embedding(nn.Module):
    num_features = 8

    def __init__(self, shape):
        super().__init__()
        self.table = nn.Embedding(30, 8)

    def forward(self, x):
        return self.table(x).mean(dim=1)


def test_rows_of_numbers_reach_a_backbone_as_they_are_stored(config):
    plain = config("backbone", Embedding)
    ids = torch.arange(40 * 5).reshape(40, 5) % 30
    split = TensorSplit(ids, LABELS)
    with pytest.MonkeyPatch.context() as patch:
        rows = Dataset("own", split, split, 10, tuple("abcdefghij"), (5,))
        patch.setattr(Parts, "load_dataset", lambda self: rows)
        _, stream, line = build_images(Parts(plain), place=False)
    assert line == "5 features, as stored" and torch.equal(next(stream.tasks[0].train.batches(2)).x, ids[[0, 1]])


def test_traceback_of_a_loader_is_its_own(config):
    with pytest.raises(KeyError) as error:
        preflight(config("dataset", lambda: {}["images"]))
    assert error.value.__cause__ is None


def test_trying_a_backbone_leaves_it_as_it_is(config):
    backbone, _, _ = build_images(Parts(config("backbone", Right)), place=False)
    assert backbone.training and backbone.norm.num_batches_tracked == 0


@pytest.mark.parametrize("part", [lambda n: None, lambda n: [0] * n, lambda n: [*range(n - 1)]])
def test_order_that_is_none(part, config):
    with pytest.raises(ConfigError, match="^task_order: must return a list of the 5 task ids, each once, got"):
        preflight(config("task_order", part))


def test_method_that_is_none(config):
    with pytest.raises(ConfigError) as error:
        build_images(Parts(config("method", Net)), place=False)
    assert_line(error, "method: own.part is no subclass of clrun.learning.method.Method")


KINDS = {
    "scenario": "clrun.data.stream.Stream",
    "budget": "clrun.learning.budget.Budget",
    "hardware": "clrun.system.hardware.Hardware",
    "logger": "clrun.running.loggers.Logger",
    "job": "clrun.config.job.Job",
}


@pytest.mark.parametrize(("group", "kind"), KINDS.items(), ids=KINDS)
def test_part_of_another_kind(group, kind, config, tmp_path):
    with pytest.raises(ConfigError) as error:
        preflight(wrong := config(group, lambda *_: 3))
        run_config(wrong, tmp_path / "run", job=JobInfo(None, 1, {}, False, [], {}))
    assert_line(error, f"own.part gives int, expected {kind}")
    assert not (tmp_path / "run").exists()


def test_traceback_names_the_file_of_a_method_whose_mistake_shows_later(config, tmp_path):
    with pytest.raises(
        TypeError, match=r"the loss must be a scalar tensor with a gradient, got a tensor \[3\]"
    ) as error:
        run_config(config("method", ManyLosses), tmp_path / "run", job=JobInfo(None, 1, {}, False, [], {}))
    text = "".join(traceback.format_exception(error.value))
    assert "In a run with method=own.part (somewhere/own.py)" in text
    assert "In a run with" in (tmp_path / "run" / "clrun.log").read_text()


class Forgetful(Method):
    def __init__(self, backbone, num_classes):
        self.backbone = backbone


class Empty(Method):
    def __init__(self, backbone, num_classes):
        self.strength = 1


class Unbased(Method):
    def __init__(self, backbone, num_classes):
        nn.Module.__init__(self)


@pytest.mark.parametrize("part", [Forgetful, Empty, Unbased])
def test_a_method_that_does_not_call_its_base(part, config, tmp_path):
    with pytest.raises(ConfigError) as error:
        run_config(config("method", part), tmp_path / "run", job=JobInfo(None, 1, {}, False, [], {}))
    assert_line(error, f"method: {part.__name__}.__init__ does not call the constructor of its base; begin it with ...")


class Mixes(Method):
    def mix(self, batch, ctx):
        batch.raw  # noqa: B018  # and forgets to return it


def test_a_method_whose_mix_returns_nothing(config, tmp_path):
    with pytest.raises(ConfigError) as error:
        run_config(config("method", Mixes), tmp_path / "run", job=JobInfo(None, 1, {}, False, [], {}))
    assert_line(error, "method: Mixes.mix returned NoneType, expected a clrun.data.split.Batch; end it with ...")


class Misspelt(Method):
    def befor_task(self, task, ctx): ...

    def after_task(self, task, ctx): ...

    def aftre_step(self, ctx): ...

    def foward(self, x, task=None): ...

    def loss(self, batch, ctx):
        return self.losses(batch, ctx)

    def losses(self, batch, ctx): ...

    def _learned(self, task, ctx): ...

    def learnt(self, more, than, a, hook): ...


def test_misspelt_hooks_are_mentioned(config):
    found = {"befor_task": "begin_task", "after_task": "end_task", "aftre_step": "after_step", "foward": "forward"}
    assert dict(misspelt_hooks(Misspelt)) == found
    notes = []
    with collecting_warnings(notes):
        preflight(config("method", Misspelt))
    assert sum("nothing calls Misspelt." in note and "\n" not in note for note in notes) == 4


def test_no_method_of_clrun_has_a_misspelt_hook():
    for file in (conf_dir() / "method").glob("*.yaml"):
        assert not list(misspelt_hooks(locate(member(file)["_target_"])))


def test_constants_of_pixels_up_to_255_are_refused(config):
    with pytest.raises(ConfigError) as error:
        preflight(config("dataset", lambda: replace(made(IMAGES, LABELS), mean=(128.0,), std=(64.0,))))
    assert_line(error, "dataset: own.part gives train rows with mean: every value must be from 0 to 1, got [128.0]...")
