"""Data sets that consist of several: the five data sets, your own folders; and Omniglot turned."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_published as published
import torch
import torch.nn.functional as F
from helpers import configured
from hydra.errors import InstantiationException
from test_sources import write_cifar, write_mnist

from clrun.backbones.small import mlp
from clrun.data.orders import canonical
from clrun.data.reading.assemble import assemble
from clrun.data.reading.options import Reading
from clrun.data.reading.sequence import on_canvas, resized, sequence, with_quarter_turns
from clrun.data.scenarios import dataset_sequence
from clrun.data.split import Batch, Split
from clrun.data.stream import Dataset
from clrun.data.transforms import fit_transform


def part(name: str, classes: list[str], shape: tuple[int, int, int], mean: float = 0.5, *, val: float = 0.0) -> Dataset:
    """Return random images: four training rows and two test rows of each class."""
    draw = torch.Generator().manual_seed(len(name))

    def rows(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(len(classes)).repeat_interleave(count)
        return torch.randint(256, (len(labels), *shape), dtype=torch.uint8, generator=draw), labels

    constants: dict[str, Any] = {"mean": (mean,) * shape[0], "std": (0.25,) * shape[0], "groups": {}}
    reading = Reading(val_fraction=val, seed=0, augment=[])
    return assemble(name, rows(4), rows(2), class_names=classes, reading=reading, **constants)


def images(split: Split) -> torch.Tensor:
    return Batch.cat(*split.batches(64, view="raw")).x


DIGITS = [str(digit) for digit in range(10)]


@pytest.fixture
def five(monkeypatch: pytest.MonkeyPatch) -> dict[str, Dataset]:
    """The five loaders replaced by small ones; what they return."""
    shapes = {"mnist": (1, 28, 28), "fashion_mnist": (1, 28, 28), "notmnist": (1, 28, 28)}
    names = {"cifar10": [f"thing {k}" for k in range(10)], "notmnist": list("ABCDEFGHIJ")}
    found = {
        name: part(name, names.get(name, DIGITS), shapes.get(name, (3, 32, 32)), 0.1 * k, val=0.25)
        for k, name in enumerate(("cifar10", "mnist", "svhn", "fashion_mnist", "notmnist"))
    }
    for name, data in found.items():
        monkeypatch.setattr(f"clrun.data.sources.five_datasets.{name}", lambda data=data, **options: data)
    return found


def test_the_five_data_sets(five: dict[str, Dataset]) -> None:
    data = configured("dataset", "five_datasets", root="", val_fraction=0.25)
    assert data.num_classes == 50 and data.shape == (3, 32, 32)
    assert [own.name for own in data.parts] == list(five)
    assert data.class_names[:2] == ("thing 0", "thing 1") and data.class_names[40:42] == ("A", "B")
    assert data.class_names[10] == "mnist 0" and data.class_names[20] == "svhn 0"
    for k, own in enumerate(data.parts):
        assert set(own.train.y.tolist()) == set(own.test.y.tolist()) == set(range(10 * k, 10 * k + 10))
        assert own.val is not None and len(own.val) == 10 and own.num_classes == 50
    grey = images(data.parts[1].test)
    assert torch.equal(grey[:, :, 2:30, 2:30], images(five["mnist"].test).expand(-1, 3, -1, -1))
    frame = grey.clone()
    frame[:, :, 2:30, 2:30] = 0
    assert not frame.any()
    assert torch.equal(images(data.parts[2].train), images(five["svhn"].train))


def test_constants_of_the_five_data_sets(five: dict[str, Dataset]) -> None:
    data = configured("dataset", "five_datasets", root="")
    assert [own.mean[0] for own in data.parts] == pytest.approx([0.0, 0.1, 0.2, 0.2190, 0.4])
    assert data.parts[1].std == (0.2752,) * 3 and data.parts[3].std == (0.3318,) * 3
    transform, line = fit_transform(data, mlp((3, 32, 32), hidden=[4]))
    assert line == "32x32x3: each part normalised by its own constants"
    stream = dataset_sequence(data, canonical, transform, setting="til")
    for task, own in zip(stream.tasks, data.parts, strict=True):
        x = next(task.test.batches(64)).x
        pixels = images(own.test).double() / 255
        expected = (pixels - torch.tensor(own.mean).view(3, 1, 1)) / torch.tensor(own.std).view(3, 1, 1)
        torch.testing.assert_close(x, expected.float(), atol=2e-5, rtol=0)


def test_the_whole_has_the_rows_of_all_parts(five: dict[str, Dataset]) -> None:
    data = configured("dataset", "five_datasets", root="")
    for which in ("train", "test", "val"):
        whole, parts = getattr(data, which), [getattr(own, which) for own in data.parts]
        assert torch.equal(whole.y, torch.cat([split.y for split in parts]))
        assert torch.equal(images(whole), torch.cat([images(split) for split in parts]))


def test_a_sequence_without_validation_rows() -> None:
    data = sequence("two", [part("a", ["x"], (1, 4, 4)), part("b", ["x", "y"], (1, 4, 4), 0.7)])
    assert data.val is None and data.class_names == ("a x", "b x", "y") and data.mean == (0.6,)


def test_small_images_lie_in_the_middle() -> None:
    data = on_canvas(part("a", ["x"], (1, 3, 4)), channels=3, side=6)
    found = images(data.train)
    assert data.shape == (3, 6, 6) and data.mean == (0.5,) * 3
    assert torch.equal(found[:, 1, 1:4, 1:5], images(part("a", ["x"], (1, 3, 4)).train)[:, 0])
    assert found[:, :, 0].sum() == found[:, :, 4:].sum() == found[..., 5].sum() == 0


def test_small_images_are_resized_when_they_are_read() -> None:
    small = part("a", ["x", "y"], (1, 6, 6), val=0.5)
    large = resized(small, channels=3, side=9, interpolation="bicubic")
    assert large.shape == (3, 9, 9) and large.mean == (0.5,) * 3 and large.val is not None
    for before, after in ((small.train, large.train), (small.test, large.test), (small.val, large.val)):
        expected = F.interpolate(images(before).float(), (9, 9), mode="bicubic", antialias=True).round().clamp(0, 255)
        assert torch.equal(images(after), expected.byte().expand(-1, 3, -1, -1)) and torch.equal(after.y, before.y)
        assert set(after.stored_rows().contents.tolist()) <= set(before.stored_rows().contents.tolist())
    other = resized(small, channels=3, side=9, interpolation="bilinear")
    assert other.train.fingerprint() != large.train.fingerprint()
    assert resized(large, channels=3, side=9, interpolation="bicubic") is large


MTIL = ("fgvc_aircraft", "caltech101", "cifar100", "dtd", "eurosat", "flowers102", "food101", "mnist", "oxford_pets")
MTIL += ("stanford_cars", "sun397")


@pytest.mark.filterwarnings("ignore::clrun.system.errors.DataWarning")
def test_the_eleven_data_sets_of_mtil_are_read_from_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    utils = pytest.importorskip("torchvision.datasets.utils")
    monkeypatch.setattr(utils, "check_integrity", lambda path, md5=None: Path(path).is_file())
    for name in MTIL:
        if name not in ("cifar100", "mnist"):
            getattr(published, name)(tmp_path)
    write_cifar(tmp_path, fine=True)
    write_mnist(tmp_path, "MNIST")
    options = {"test_fraction": 0.5, "images": {"size": 8}, "augment": [], "templates": None}
    data = configured("dataset", "mtil", root=str(tmp_path), **options)
    assert tuple(part.name for part in data.parts) == MTIL and data.shape == (3, 8, 8)
    assert all(images(part.test).shape[1:] == (3, 8, 8) for part in data.parts)
    assert data.texts.of(data.class_names.index("Faces"))[1] == "a painting of a off-center face."
    digits = data.parts[7].train.y
    assert sorted(set(digits.tolist())) == list(range(int(digits.min()), int(digits.min()) + 10))
    assert data.texts.of(int(digits.min())) == ['a photo of the number: "0".']
    assert data.texts.of(data.num_classes - 1) == [
        "a photo of a bow window outdoor.",
        "a photo of the bow window outdoor.",
    ]


def test_quarter_turns_keep_training_and_test_drawings_apart() -> None:
    data = part("a", ["x", "y"], (1, 5, 5), val=0.25)
    turned = with_quarter_turns(data)
    for which in ("train", "test", "val"):
        before, after = getattr(data, which), getattr(turned, which)
        assert len(after) == 4 * len(before) and torch.equal(after.y, before.y.repeat(4))
        rows, count = images(after), len(before)
        for quarter in range(4):
            own = rows[quarter * count : (quarter + 1) * count].numpy()
            np.testing.assert_array_equal(own, np.rot90(images(before).numpy(), quarter, axes=(2, 3)))

    def drawings(split: Split) -> set[bytes]:
        return {min(np.rot90(x, k, axes=(1, 2)).tobytes() for k in range(4)) for x in images(split).numpy()}

    assert len(drawings(turned.train)) == len(data.train)
    assert not drawings(turned.train) & drawings(turned.test)


def test_omniglot_in_rotations_has_the_first_1200_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"c{k}" for k in range(1203)]
    small = part("omniglot", names, (1, 3, 3))
    monkeypatch.setattr("clrun.data.sources.omniglot.omniglot", lambda **options: small)
    data = configured("dataset", "omniglot_rotation", root="")
    assert data.num_classes == 1200 and data.class_names[-1] == "c1199" and data.name == "omniglot_rotation"
    assert torch.equal(data.train.y.bincount(), torch.full((1200,), 16))
    assert torch.equal(data.test.y.bincount(), torch.full((1200,), 8))


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Two data sets of coloured squares: fruit (apple, pear) and animals (cat, apple)."""
    image = pytest.importorskip("PIL.Image")
    for k, path in enumerate(("fruit/apple", "fruit/pear", "animals/apple", "animals/cat")):
        name, label = path.split("/")
        for which, count in (("train", 2), ("test", 1)):
            folder = tmp_path / name / which / label
            folder.mkdir(parents=True)
            for i in range(count):
                image.new("RGB", (20, 16), (60 * k, 10 * i, 0)).save(folder / f"{i}.png")
    return tmp_path


def test_folders_one_after_the_other(folders: Path) -> None:
    data = configured("dataset", "folder_sequence", root=str(folders), images={"size": 8}, sets=["fruit", "animals"])
    assert data.class_names == ("fruit apple", "pear", "animals apple", "cat") and data.shape == (3, 8, 8)
    stream = dataset_sequence(data, canonical, fit_transform(data, mlp((3, 8, 8), hidden=[2]))[0], setting="cil")
    assert [(task.name, task.classes.tolist()) for task in stream.tasks] == [("fruit", [0, 1]), ("animals", [2, 3])]
    assert images(stream.tasks[1].test)[:, 0].amax(dim=(1, 2)).tolist() == [120, 180]
    by_name = configured("dataset", "folder_sequence", root=str(folders), images={"size": 8})
    assert [own.name for own in by_name.parts] == ["animals", "fruit"]


def test_folders_that_are_not_there(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(InstantiationException, match=r"dataset.sets: no folder 'nuts' in .*animals, fruit"):
        configured("dataset", "folder_sequence", root=str(folders), sets=["nuts"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InstantiationException, match=r"dataset.root: no folders in "):
        configured("dataset", "folder_sequence", root=str(tmp_path / "empty"))
    with pytest.raises(InstantiationException, match="cannot be read"):
        configured("dataset", "folder_sequence", root=str(tmp_path / "gone"))
